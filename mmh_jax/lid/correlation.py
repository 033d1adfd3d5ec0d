r"""Dimensions from the distances of pairs: the correlation dimension.

The correlation integral C(r) is the share of the pairs of points that are less than r apart.  Of a
d-dimensional set of smooth density C(r) ~ r^d for small r (Grassberger & Procaccia 1983).

- *The slope* between two radii, r_1 and r_2 the medians over the points of the distance to the
  k_1-th and the k_2-th neighbour (Hino et al. 2017, R package ider):

      d = log(C(r_2) / C(r_1)) / log(r_2 / r_1).

- *Maximum likelihood* (Takens 1985): below a radius r_0 the r_ij / r_0 of the pairs have the
  density d x^{d-1}, so that d = -1 / mean log(r_ij / r_0).

Both need only the pairs below a radius, in a matrix of the k nearest neighbours all of those of a
point whose k-th neighbour is not nearer than that.

Their errors.  Pairs share points: the variance of log d is that of the two sums over pairs (the
number of pairs, the sum of logarithms) relative to each other.  With psi_i the difference of the
relative contributions of point i, a jackknife has J = 4 sum psi_i^2 / N^2.  It counts the noise
of the pairs, P, twice, at both of their points (P = 1 / M for M pairs in Takens' estimate), so that
J - P is the variance; never less than P, which it would be for independent pairs.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.neighborhoods import check_distances
from mmh_jax.lid.pairs import count_pairs
from mmh_jax.typing import Array, ArrayLike, Estimate, is_traced

__all__ = ["correlation_dimension", "takens"]


def correlation_dimension(
    distances: ArrayLike,
    *,
    inner: int = 10,
    outer: int = 20,
    points: ArrayLike | None = None,
) -> Estimate:
    """The slope of log C(r) between two radii, of the k_1-th and k_2-th neighbour.

    Biased downward where r_2 is not small against the set, as the likelihood is: pairs at the edge
    have fewer neighbours.  Duplicates are pairs; if more than half of the points have `inner` of
    them, r_1 = 0 has no scale and the value is 0, that of an atom.  A far outlier does not move
    medians.  If r_1 = r_2, or no pair is nearer than r_1, as on a lattice, the value is infinite.

    Cost: a pass over the distances; with `points`, besides, the distances of those points with
    fewer than all of their neighbours within r_2 to all points.

    Args:
        distances: (N, k), as from `nearest_neighbors`, ascending; k more than `outer`, best several
            times it: all neighbours within r_2 must be among the k, at every point.
        inner, outer: k_1 < k_2.
        points: (N, *shape), from which the neighbours within r_2 that are not among the k are
            counted.  Not inside `jit`.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if it is not a matrix with that many columns, not 1 <= k_1 < k_2, or if k is too
            small and there are no `points`.  Under `jit`, where it cannot be raised, the value is
            then NaN.

    >>> line = np.random.default_rng(0).uniform(size=(1000, 1))
    >>> from mmh_jax import lid
    >>> distances = lid.nearest_neighbors(line, 60).distances
    >>> correlation_dimension(distances).value.round(1)
    Array(1., dtype=float32)
    """
    if not 1 <= inner < outer:
        raise ValueError(
            f"`correlation_dimension(inner={inner}, outer={outer})`: they must be "
            "1 <= inner < outer."
        )
    distances = check_distances("correlation_dimension", distances, ndim=2, least=outer)
    radii = jnp.median(distances[:, jnp.array([inner - 1, outer - 1])], axis=0)
    counts = jnp.sum(distances[:, :, None] < radii, axis=1)
    complete = _complete(distances, radii[1])
    if not is_traced(distances) and not bool(jnp.all(complete)) and jnp.all(jnp.isfinite(radii)):
        if points is None:
            raise ValueError(
                f"`correlation_dimension(distances=...)`: at {int(jnp.sum(~complete))} points all "
                f"{distances.shape[1]} neighbours are within r_2 = {float(radii[1]):.3g}, and more "
                "may be. Ask for more neighbours, or pass `points=`, to count them."
            )
        again = np.flatnonzero(~np.asarray(complete))
        counts = counts.at[again].set(count_pairs(points, again, radii))
        complete = jnp.ones_like(complete)
    found = _slope(counts.astype(distances.dtype), radii)
    return Estimate(*(jnp.where(jnp.all(complete), field, jnp.nan) for field in found))


def takens(distances: ArrayLike, *, radius: ArrayLike | None = None) -> Estimate:
    """The maximum likelihood correlation dimension (Takens 1985), over all pairs below a radius.

    (M - 1) / sum log(r_0 / r_ij) over the M pairs with 0 < r_ij < r_0.  Duplicates have no scale,
    and their pairs are left out.  No pairs: value 0, the points are atoms or farther apart.

    Cost: a logarithm of each distance.

    Args:
        distances: (N, k), as from `nearest_neighbors`, ascending in each row.
        radius: r_0; by default the largest below which all pairs are known: the least distance to
            a k-th neighbour that is not 0.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if it is not a matrix, or if not all pairs below `radius` are among the
            distances.  Under `jit`, where it cannot be raised, the value is then NaN.

    >>> line = np.random.default_rng(0).uniform(size=(1000, 1))
    >>> from mmh_jax import lid
    >>> takens(lid.nearest_neighbors(line, 20).distances).value.round(1)
    Array(1., dtype=float32)
    """
    distances = check_distances("takens", distances, ndim=2, least=1)
    last = distances[:, -1]
    if radius is None:
        radius = jnp.min(jnp.where(last == 0, jnp.inf, last))
    radius = jnp.asarray(radius, distances.dtype)
    known = jnp.all(_complete(distances, radius) | (last == 0))
    if not is_traced((distances, radius)) and not bool(known) and jnp.isfinite(radius):
        largest = float(jnp.min(jnp.where(last == 0, jnp.inf, last)))
        raise ValueError(
            f"`takens(radius={float(radius):.3g})`: not all pairs below it are among the "
            f"distances. Ask for a radius of at most {largest:.3g}, or for more than "
            f"{distances.shape[1]} neighbours."
        )
    below = (distances < radius) & (distances != 0)
    ratio = jnp.where(below, distances, 1) / jnp.where(below, radius, 1)
    # A ratio that underflows is still not 0.
    logs = -jnp.log(jnp.maximum(ratio, jnp.finfo(ratio.dtype).tiny))
    number, total = (jnp.sum(x, axis=1) for x in (below.astype(logs.dtype), logs))
    pairs, summed = jnp.sum(number) / 2, jnp.sum(total) / 2
    value = jnp.maximum(pairs - 1, 0) / jnp.where(summed == 0, 1, summed)
    error = value * _relative_error(number, total, 1 / jnp.maximum(pairs, 1))
    known = known & ~jnp.isnan(jnp.sum(distances))
    return Estimate(*(jnp.where(known, field, jnp.nan) for field in (value, error)))


def _complete(distances: Array, radius: Array) -> Array:
    """Whether all neighbours nearer than `radius` are known, at each point; true for NaN."""
    everything = distances.shape[1] == distances.shape[0] - 1
    return jnp.asarray(everything) | ~(distances[:, -1] < radius)


def _slope(counts: Array, radii: Array) -> Estimate:
    """log(C_2 / C_1) / log(r_2 / r_1) from the counts at each point, (N, 2)."""
    first, second = jnp.sum(counts, axis=0) / 2
    some, apart = first > 0, radii[1] > radii[0]
    share = jnp.where(some, first / jnp.where(second > 0, second, 1), 1)
    ratio = jnp.where(radii[0] > 0, radii[1] / jnp.where(radii[0] > 0, radii[0], 1), 2)
    step = jnp.where(apart, jnp.log(ratio), 1)
    error = _relative_error(counts[:, 0], counts[:, 1], (1 - share) / jnp.maximum(first, 1))
    found = -jnp.log(share) / step, error / step
    found = (jnp.where(apart & some, field, jnp.inf) for field in found)
    found = (jnp.where(radii[0] == 0, 0, field) for field in found)
    return Estimate(*(field + 0 * radii[1] for field in found))  # NaN stays


def _relative_error(first: Array, second: Array, pair_noise: Array) -> Array:
    """The standard error of the logarithm of the ratio of two sums over pairs; see above."""
    first, second = (x / jnp.where(jnp.sum(x) == 0, 1, jnp.mean(x)) for x in (first, second))
    jackknife = 4 * jnp.sum((first - second) ** 2) / len(first) ** 2
    return jnp.sqrt(jnp.maximum(jackknife - pair_noise, pair_noise))
