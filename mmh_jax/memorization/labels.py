r"""Which samples of a model are copies of its training data, measured by sampling.

With d_1 and d_2 the distances of a sample to its nearest and second nearest training point, a
sample is memorized if d_1 / d_2 < 1/3 (Yoon et al. 2023; Gu et al. 2023, 2310.02664; Bonnaire et
al. 2025, 2505.17638): it lies three times nearer to one point than to any other.  Duplicates in
the data would make d_2 = d_1 for what was copied most often, so they are counted as one point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmh_jax.lid.duplicates import find_duplicates
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["Copies", "copies"]


class Copies(NamedTuple):
    """For each of M samples, the nearest training point and how it stands out.

    Attributes:
        ratio: (M,) d_1 / d_2, between 0 and 1.
        distance: (M,) d_1, in data units.
        nearest: (M,) the row of the nearest training point; of duplicates the first.
        memorized: (M,) whether `ratio` is below the threshold.
        counts: (N,) how many memorized samples copy each training point.
    """

    ratio: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray
    memorized: np.ndarray
    counts: np.ndarray

    @property
    def fraction(self) -> Estimate:
        """The share of memorized samples, and its binomial standard error.

        Of M samples, with (k + 1) / (M + 2) in the error, so that it is not 0 for k = 0 or M.
        """
        num = len(self.memorized)
        smoothed = (self.memorized.sum() + 1) / (num + 2)
        error = float(np.sqrt(smoothed * (1 - smoothed) / num))
        return Estimate(float(self.memorized.mean()), error)


def copies(
    samples: ArrayLike,
    points: ArrayLike,
    *,
    threshold: float = 1 / 3,
    tolerance: float = 0.0,
) -> Copies:
    """Which samples are copies of a training point.

    Args:
        samples: (M, *shape), of the model, in data units.
        points: (N, *shape), the training data, with two different points at least.
        threshold: of d_1 / d_2, between 0 and 1.
        tolerance: training points linked by steps no longer than it count as one
            (`lid.find_duplicates`): set it where there are near-duplicates.

    d_2 is the distance to the nearest point that is not linked to the first.

    Cost: exact nearest neighbours, M N D.

    Raises:
        TypeError: if samples or points are not of a floating dtype.
        ValueError: if shapes differ, values are not finite, all points are one, or the threshold is
            not between 0 and 1.

    >>> points = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> found = copies(np.array([[0.5, 0.0], [2.0, 0.0], [4.1, 0.0]]), points)
    >>> found.ratio.astype(float).round(3).tolist(), found.counts.tolist()
    ([0.143, 1.0, 0.024], [1, 1, 0])
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`copies(threshold={threshold})` must lie between 0 and 1.")
    points = np.asarray(points)
    first = find_duplicates(points).first
    clusters = find_duplicates(points[first], tolerance=tolerance)
    if len(clusters.first) < 2:
        raise ValueError(
            f"`copies(points=...)`: its {len(points)} points are one to the tolerance "
            f"{tolerance}; whether one of them was copied cannot be said."
        )
    # Among so many neighbours there is one of another cluster.
    num_neighbors = int(clusters.counts.max()) + 1
    near = nearest_neighbors(points[first], num_neighbors, queries=samples)
    of_cluster = clusters.cluster[near.indices]
    place = np.argmax(of_cluster != of_cluster[:, :1], axis=1)
    d_1 = near.distances[:, 0]
    d_2 = np.take_along_axis(near.distances, place[:, None], axis=1)[:, 0]
    # d_2 is 0 only if two points that are not equal are so in float32: nothing stands out.
    ratio = np.where(d_2 > 0, d_1 / np.where(d_2 > 0, d_2, 1), 1.0)
    nearest = first[near.indices[:, 0]]
    memorized = ratio < threshold
    counts = np.bincount(nearest[memorized], minlength=len(points))
    return Copies(ratio, d_1, nearest, memorized, counts)
