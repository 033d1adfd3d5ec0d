r"""Which samples of a model are copies of its training data, measured by sampling.

A sample x is a copy of its nearest training point, at a distance d_1, if d_1 is small beside some
length.  Three lengths are in use:

    d_2                the distance to the second nearest point, d_1 / d_2 < 1/3: x lies three times
                       nearer to one point than to any other (Yoon et al. 2023; Gu et al. 2023,
                       2310.02664; Bonnaire et al. 2025, 2505.17638);
    alpha mean d_j     over the n = 50 nearest, alpha = 1/2, the calibrated distance of Carlini et
                       al. 2023 (2301.13188): less sensitive to one other point nearby;
    a constant         in a space of features in which distances mean the same everywhere, such as
                       a cosine of .5 for the copy detector SSCD (Somepalli et al. 2023,
                       2212.03860).

Duplicates in the data would make d_2 = d_1, and all n distances 0, for what was copied most often;
they are counted as one point.  Each answer is graded: the distance in units of its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mmh_jax.lid.duplicates import Duplicates, connected, find_duplicates
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["Copies", "calibrated_copies", "copies", "feature_copies"]


class Copies(NamedTuple):
    """For each of M samples, the nearest of N training points and how it stands out.

    Attributes:
        ratio: (M,) the distance d_1 in units of the length it is measured by; small = copied.
        distance: (M,) d_1, in data units, or in the space of the features.
        nearest: (M,) the row of the nearest training point; of duplicates the first.
        memorized: (M,) whether `ratio` is below the threshold.
        counts: (N,) how many memorized samples copy each training point; those of duplicates are
            the first one's (see `extraction`, which spreads them).
        cluster: (N,) for each training point the first row of those it counts as one with.
    """

    ratio: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray
    memorized: np.ndarray
    counts: np.ndarray
    cluster: np.ndarray

    @property
    def fraction(self) -> Estimate:
        """The share of memorized samples, and its binomial standard error.

        Of M samples, with (k + 1) / (M + 2) in the error, so that it is not 0 for k = 0 or M.
        """
        num = len(self.memorized)
        smoothed = (self.memorized.sum() + 1) / (num + 2)
        error = float(np.sqrt(smoothed * (1 - smoothed) / num))
        return Estimate(float(self.memorized.mean()), error)

    @property
    def pairs(self) -> np.ndarray:
        """(K, 2) who was copied by whom: rows (sample, training point), the closest copy first."""
        rows = np.flatnonzero(self.memorized)
        rows = rows[np.argsort(self.ratio[rows], kind="stable")]
        return np.stack([rows, self.nearest[rows]], axis=1)


def copies(
    samples: ArrayLike,
    points: ArrayLike,
    *,
    threshold: float = 1 / 3,
    tolerance: float = 0.0,
    groups: ArrayLike | None = None,
) -> Copies:
    """Which samples are copies of a training point by d_1 / d_2.

    Args:
        samples: (M, *shape), of the model, in data units.
        points: (N, *shape), the training data, with two different points at least.
        threshold: of d_1 / d_2, between 0 and 1.
        tolerance: training points linked by steps no longer than it count as one
            (`lid.find_duplicates`): set it where there are near-duplicates.
        groups: (N,) integers, where it is known which training points count as one: versions of a
            picture, frames of a scene.  Equal points are in one group.

    d_2 is the distance to the nearest point that is not linked to the first.

    Cost: exact nearest neighbours, M N D.

    Raises:
        TypeError: if samples or points are not of a floating dtype.
        ValueError: if shapes differ, values are not finite, all points are one, equal points are
            in different groups, or the threshold is not between 0 and 1.

    >>> points = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> found = copies(np.array([[0.5, 0.0], [2.0, 0.0], [4.1, 0.0]]), points)
    >>> found.ratio.astype(float).round(3).tolist(), found.counts.tolist()
    ([0.143, 1.0, 0.024], [1, 1, 0])
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`copies(threshold={threshold})` must lie between 0 and 1.")
    near = _different("copies", samples, points, 2, tolerance, groups)
    d_1, d_2 = near.distances.T
    return _judged(near, _over(d_1, d_2), threshold)


def calibrated_copies(
    samples: ArrayLike,
    points: ArrayLike,
    *,
    threshold: float = 1.0,
    alpha: float = 0.5,
    num_neighbors: int = 50,
    tolerance: float = 0.0,
    groups: ArrayLike | None = None,
) -> Copies:
    """Which samples are copies by Carlini's distance, d_1 / (alpha * mean of d_1, ..., d_n).

    `Copies.ratio` is that distance.  It does not exceed 1 / alpha, and tends to that where all
    neighbours are equally far, as they are in high dimensions.

    Args:
        samples, points, tolerance, groups: as for `copies`.
        threshold: of the calibrated distance.  There is no established one; at 1 a copy lies nearer
            than `alpha` times the mean of its neighbours.
        alpha: of the denominator, 1/2 in the paper.  Only `threshold * alpha` matters for labels.
        num_neighbors: n, of points that count as different; fewer if there are no more.

    Cost: exact nearest neighbours, M N D, and with a tolerance as many more of them as the largest
    clusters have members.

    Raises:
        TypeError, ValueError: as `copies`; or if `alpha` or the threshold are not positive, or
            `num_neighbors` is below 2.

    >>> points = np.array([[0.0], [4.0], [4.0], [8.0]])
    >>> found = calibrated_copies(np.array([[0.1], [2.0]]), points)
    >>> found.ratio.astype(float).round(3).tolist(), found.pairs.tolist()
    ([0.05, 1.2], [[0, 0]])
    """
    if not (threshold > 0 and alpha > 0):
        raise ValueError(
            f"`calibrated_copies(threshold={threshold}, alpha={alpha})`: both must be positive."
        )
    if num_neighbors < 2:
        raise ValueError(
            f"`calibrated_copies(num_neighbors={num_neighbors})` must be at least 2: the distance "
            "to the nearest point alone has nothing to be compared with."
        )
    near = _different("calibrated_copies", samples, points, num_neighbors, tolerance, groups)
    ratio = _over(near.distances[:, 0], near.distances.mean(axis=1)) / alpha
    return _judged(near, ratio, threshold)


def feature_copies(
    samples: ArrayLike,
    points: ArrayLike,
    *,
    distance: float | None = None,
    similarity: float | None = None,
    features: Callable[[ArrayLike], ArrayLike] | None = None,
) -> Copies:
    """Which samples are copies by a threshold on their distance in a space of features.

    Args:
        samples, points: (M, *shape) and (N, *shape): features, or what `features` takes.
        distance: a sample nearer than this is a copy; or
        similarity: one whose cosine with its nearest training point exceeds this, from 0 to below
            1, is.  The distances are then those of features scaled to length 1, sqrt(2 - 2 cos).
        features: a function of all samples, or all points, that returns one row for each of them.

    `Copies.ratio` is the distance in units of the threshold: below 1 for copies.

    Cost: the features, and exact nearest neighbours in their space.

    Raises:
        TypeError: if the features are not of a floating dtype.
        ValueError: if not exactly one of `distance` and `similarity` is given, or it is out of
            range; if `features` does not return a row for each; if shapes differ, values are not
            finite, or a feature of length 0 has no direction.

    >>> points = np.array([[1.0, 0.0], [0.0, 3.0]])
    >>> feature_copies(np.array([[9.0, 1.0], [1.0, 1.0]]), points, similarity=0.9).counts.tolist()
    [1, 0]
    """
    if (distance is None) == (similarity is None):
        raise ValueError("`feature_copies` takes one of `distance=` and `similarity=`, not both.")
    rows = [_features_of(features, name, of) for name, of in _named(samples, points)]
    if similarity is not None:
        if not 0 <= similarity < 1:
            raise ValueError(f"`feature_copies(similarity={similarity})` is not in [0, 1).")
        rows = [_directions(row) for row in rows]
        distance = (2 - 2 * similarity) ** 0.5
    assert distance is not None
    if not 0 < distance < float("inf"):
        raise ValueError(f"`feature_copies(distance={distance})` must be positive and finite.")
    near = _different("feature_copies", rows[0], rows[1], 1, 0.0)
    return _judged(near, near.distances[:, 0] / distance, 1.0)


class _Near(NamedTuple):
    """The nearest points of different clusters: distances (M, n) and the nearest row, (M,)."""

    distances: np.ndarray
    nearest: np.ndarray
    cluster: np.ndarray


def _different(
    caller: str,
    samples: ArrayLike,
    points: ArrayLike,
    num: int,
    tolerance: float,
    groups: ArrayLike | None = None,
) -> _Near:
    """The nearest member of each of the `num` nearest clusters, or of all if there are fewer."""
    points = np.asarray(points)
    equal = find_duplicates(points)
    different = points[equal.first]
    clusters = find_duplicates(different, tolerance=tolerance)
    if groups is not None:
        clusters = _linked(clusters, _checked_groups(caller, groups, equal))
    if num > 1 and len(clusters.first) < 2:
        raise ValueError(
            f"`{caller}(points=...)`: its {len(points)} points are one to the tolerance "
            f"{tolerance}, or one group; whether one of them was copied cannot be said."
        )
    num = min(num, len(clusters.first))
    # Among so many neighbours there are members of `num` clusters.
    largest = np.sort(clusters.counts)[::-1]
    near = nearest_neighbors(different, int(largest[: num - 1].sum()) + 1, queries=samples)
    of_cluster = clusters.cluster[near.indices]
    column = np.argsort(_is_repeated(of_cluster), axis=1, kind="stable")[:, :num]
    return _Near(
        np.take_along_axis(near.distances, column, axis=1).astype(float),
        equal.first[near.indices[:, 0]],
        _first_rows(equal, clusters),
    )


def _checked_groups(caller: str, groups: ArrayLike, equal: Duplicates) -> np.ndarray:
    """The groups of the different points."""
    groups = np.asarray(groups)
    if groups.shape != equal.cluster.shape or not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(
            f"`{caller}(groups=...)` has shape {groups.shape} and dtype {groups.dtype}; it takes "
            f"one integer for each of the {len(equal.cluster)} points."
        )
    of_first = groups[equal.first]
    apart = np.flatnonzero(of_first[equal.cluster] != groups)
    if len(apart):
        raise ValueError(
            f"`{caller}(groups=...)`: point {apart[0]} equals an earlier one of another group; "
            "give both the same."
        )
    return of_first


def _linked(clusters: Duplicates, groups: np.ndarray) -> Duplicates:
    """Points linked by a chain in which each is in the cluster or the group of the next."""
    num = len(groups)
    # A graph of the points and, beyond them, a node for each cluster and for each group.
    group = np.unique(groups, return_inverse=True)[1] + num + len(clusters.first)
    ends = np.concatenate([clusters.cluster + num, group])
    component = connected(int(group.max()) + 1, np.tile(np.arange(num), 2), ends)[:num]
    _, first, cluster, counts = np.unique(
        component, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    return Duplicates(np.argsort(order)[cluster], first[order], counts[order])


def _is_repeated(numbers: np.ndarray) -> np.ndarray:
    """(M, k) whether an entry is found to its left in the same row."""
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    again = np.zeros(numbers.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    result = np.empty_like(again)
    np.put_along_axis(result, order, again, axis=1)
    return result


def _first_rows(equal: Duplicates, clusters: Duplicates) -> np.ndarray:
    """(N,) the first row of the points that each of them counts as one with."""
    return equal.first[clusters.first[clusters.cluster[equal.cluster]]]


def _over(distance: np.ndarray, length: np.ndarray) -> np.ndarray:
    # A length of 0: points that are not equal are so in float32, and nothing stands out.
    return np.where(length > 0, distance / np.where(length > 0, length, 1), 1.0)


def _judged(near: _Near, ratio: np.ndarray, threshold: float) -> Copies:
    memorized = ratio < threshold
    counts = np.bincount(near.nearest[memorized], minlength=len(near.cluster))
    return Copies(ratio, near.distances[:, 0], near.nearest, memorized, counts, near.cluster)


def _named(samples: ArrayLike, points: ArrayLike) -> tuple[tuple[str, ArrayLike], ...]:
    return ("samples", samples), ("points", points)


def _features_of(
    features: Callable[[ArrayLike], ArrayLike] | None, name: str, of: ArrayLike
) -> np.ndarray:
    rows = np.asarray(of if features is None else features(of))
    if rows.ndim < 2 or len(rows) != len(np.asarray(of)):
        raise ValueError(
            f"`feature_copies({name}=...)` has features of shape {rows.shape} for "
            f"{len(np.asarray(of))} of them; there must be one row for each, (N, F)."
        )
    return rows


def _directions(rows: np.ndarray) -> np.ndarray:
    flat = rows.reshape(len(rows), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    if not np.all(length > 0):
        raise ValueError(
            f"`feature_copies(similarity=...)`: {int(np.sum(length <= 0))} features have length 0, "
            "and no direction. Leave them out, or take `distance=`."
        )
    return flat / length
