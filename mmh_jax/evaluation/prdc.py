r"""Precision, recall, density and coverage: are samples like the data, and the data like samples?

A set of points stands for the region within its balls, one around each point, that reach to its
k-th nearest other point of the set.  With M samples y and N real points x, and the radii R(x_j) and
R(y_i) to the k-th neighbour in their own set,

    precision = share of the samples y in any ball of the data       (fidelity)
    recall    = share of the data x in any ball of the samples       (diversity)
    density   = mean over the samples of #{j : |y - x_j| <= R(x_j)} / k
    coverage  = share of the balls of the data that hold a sample.

Precision and recall are fooled by an outlier, whose ball is wide; density counts balls and coverage
takes balls of the data only.  Of two samples of one law, the expected density is 1 and the expected
coverage 1 - prod_{i<k} (N - 1 - i) / (N + M - 1 - i), about 1 - 2^-k for N = M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from mmh_jax.lid import nearest_neighbors
from mmh_jax.lid.neighbor_search import distance
from mmh_jax.lid.points import check_finite, check_points, rounded, rounding_offset
from mmh_jax.linalg.operator import check_positive
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["Prdc", "expected_coverage", "prdc"]

_BLOCK = 1024
_CALLER = "prdc"


class Prdc(NamedTuple):
    """Four shares, each an `Estimate` of floats.

    The standard errors of precision and density are over the samples, those of recall and coverage
    over the data, with the balls as they are.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def prdc(features: ArrayLike, reference: ArrayLike, *, num_neighbors: int = 5) -> Prdc:
    """Precision, recall, density and coverage of samples against data.

    The balls are closed, so that a copy of a real point is always inside (the authors' code for
    density and coverage has open ones).  Distances are exact, as those of `lid.nearest_neighbors`.

    Args:
        features: (M, *shape) of samples, of a floating dtype.
        reference: (N, *shape) of data.
        num_neighbors: k, fewer than the points of each set.  Naeem et al. take 5, Kynkaanniemi et
            al. 3; choose it so that coverage of real data by other real data is above .95.

    Returns:
        `Prdc`.

    Cost: three neighbour searches and 2 M N D multiplications, in blocks: memory does not grow
    with M N.  Runs from the host, not inside `jit`.

    Raises:
        TypeError: if a set is not of a floating dtype.
        ValueError: if the sets differ in the shape of a point or hold a value that is not finite,
            or if `num_neighbors` is not between 1 and the number of other points.

    References: Kynkaanniemi et al. 2019 (1904.06991), eqs. 1-3; Naeem et al. 2020 (2002.09797),
    eqs. 3, 4 and lemma 2.

    >>> data = np.arange(8.0)[:, None]
    >>> found = prdc(np.array([[0.1], [0.2], [50.0]]), data, num_neighbors=1)
    >>> [round(estimate.value, 2) for estimate in found]
    [0.67, 1.0, 1.33, 0.25]
    """
    check_positive(_CALLER, "num_neighbors", num_neighbors)
    samples, data = _checked(features, reference, num_neighbors)
    data_radii = nearest_neighbors(data, num_neighbors).distances[:, -1]
    sample_radii = nearest_neighbors(samples, num_neighbors).distances[:, -1]
    nearest = nearest_neighbors(samples, 1, queries=data).distances[:, 0]
    balls_of_data = _balls_around(samples, data, data_radii)
    balls_of_samples = _balls_around(data, samples, sample_radii)
    return Prdc(
        precision=_mean(balls_of_data > 0),
        recall=_mean(balls_of_samples > 0),
        density=_mean(balls_of_data / num_neighbors),
        coverage=_mean(nearest <= data_radii),
    )


def expected_coverage(num_samples: int, num_data: int, *, num_neighbors: int = 5) -> float:
    """The coverage to be expected where samples and data are of one law, free of ties.

    Raises:
        ValueError: if a number is not a positive integer, or there are no k other points.

    Reference: Naeem et al. 2020 (2002.09797), lemma 2.

    >>> round(expected_coverage(10_000, 10_000, num_neighbors=5), 4)
    0.9688
    """
    for name, value in (("num_samples", num_samples), ("num_neighbors", num_neighbors)):
        check_positive("expected_coverage", name, value)
    check_positive("expected_coverage", "num_data", num_data, least=num_neighbors + 1)
    # None of the samples among the k nearest of the others: k draws without replacement.
    i = np.arange(num_neighbors)
    return float(1 - np.prod((num_data - 1 - i) / (num_data + num_samples - 1 - i)))


def _checked(
    features: ArrayLike, reference: ArrayLike, num_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets flat and rounded alike, so that all distances below are of the same numbers."""
    samples = check_points(_CALLER, "features", features)
    data = check_points(_CALLER, "reference", reference)
    if samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"`prdc(features=...)` holds points of shape {samples.shape[1:]}, `reference=...` of "
            f"shape {data.shape[1:]}; take both from the same network."
        )
    for name, points in (("features", samples), ("reference", data)):
        if len(points) <= num_neighbors:
            raise ValueError(
                f"`prdc(num_neighbors={num_neighbors})` needs more than {num_neighbors} points in "
                f"`{name}`, which has {len(points)}."
            )
        check_finite(_CALLER, name, points)
    offset = rounding_offset(data, samples)
    return rounded(samples, offset), rounded(data, offset)


def _mean(values: np.ndarray) -> Estimate:
    values = values.astype(np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


_distances: Callable[..., jax.Array] = jax.jit(distance)


def _balls_around(queries: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """In how many of the balls each query lies.

    Most pairs are decided by |q|^2 + |c|^2 - 2 q.c in float64; those near the surface, and those
    so close that it cancels, by difference in the precision of the radii.
    """
    origin = centres.mean(axis=0, dtype=np.float64)
    slack = 8 * (2 + queries.shape[1] ** 0.5) * float(np.finfo(radii.dtype).eps)
    counts = np.zeros(len(queries), np.int64)
    for rows in _blocks(len(queries)):
        q = queries[rows] - origin
        for columns in _blocks(len(centres)):
            c = centres[columns] - origin
            size = (q**2).sum(axis=1)[:, None] + (c**2).sum(axis=1)
            square, radius = size - 2 * q @ c.T, radii[columns].astype(np.float64) ** 2
            margin = slack * radius + 1e-12 * size
            inside = square <= radius
            unsure, which = np.nonzero(np.abs(square - radius) <= margin)
            inside[unsure, which] = _by_difference(
                queries[rows][unsure], centres[columns][which], radii[columns][which]
            )
            counts[rows] += inside.sum(axis=1)
    return counts


def _by_difference(queries: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether |q - c| <= r, pair by pair; in programs of a fixed size."""
    inside = np.empty(len(queries), bool)
    for part in _blocks(len(queries)):
        q, c = queries[part], centres[part]
        pad = ((0, _BLOCK - len(q)), (0, 0))
        found = np.asarray(_distances(np.pad(q, pad), np.pad(c, pad)))[: len(q)]
        inside[part] = found <= radii[part]
    return inside


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
