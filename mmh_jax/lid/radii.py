r"""Dimensions from the radii of the nearest neighbours alone, besides the likelihood in `mle`.

Let r_1 <= ... <= r_k be the distances from a point to its neighbours.  Where the density of a
d-dimensional set does not change within r_k, the volumes r_j^d grow like a Poisson process:

    r_j^d / r_k^d, j < k       are k - 1 independent uniform numbers, in order;
    (r_n / r_m)^d, n < m       is Beta(n, m - n): mu = r_m / r_n has the density
                               d (mu^d - 1)^{m-n-1} / (B mu^{(m-1)d+1}).

- *Generalized ratios* (GRIDE, Denti et al. 2022, 2104.13832): the likelihood of mu = r_m / r_n over
  many points.  With n = 1, m = 2 it is TwoNN (Facco et al. 2017, 1803.06992): the d log mu are
  exponential numbers, and the likelihood is solved in closed form; or, as in that paper, a line
  through the origin is fitted to -log(1 - F) against log mu, whose slope is d.
- *Moments* (Amsaleg et al. 2018): E r_j = r_k d / (d + 1) for a uniform one of the k - 1.
- *Manifold-adaptive* (MADA; Farahmand, Szepesvari & Audibert 2007): log 2 / log(r_k / r_{k/2}).

Distances of 0 have no scale: a point with a duplicate lies on an atom, of dimension 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.lid.neighborhoods import check_distances
from mmh_jax.typing import Array, ArrayLike, Estimate

__all__ = ["gride", "mada", "mom", "two_nn", "two_nn_regression"]


def gride(distances: ArrayLike, *, inner: int = 1, outer: int = 2) -> Estimate:
    """One dimension for many points, from the ratio of two of their radii, by maximum likelihood.

    With `inner` = n and `outer` = 2 n a larger n looks at a larger scale, and there averages over
    noise: a curve over n = 1, 2, 4, ... is a multi-scale estimate.

    The standard error is that of the observed Fisher information for independent ratios.  They are
    not: neighbourhoods share points.  The likelihood has N - 1 factors of d in place of N, as in
    the authors' code: unbiased for `inner` = 1.  For one point take the ratios of its neighbours:
    `jax.vmap(lambda i: gride(distances[i]))(indices)`.

    Cost: 60 passes over N numbers.

    Args:
        distances: (N, k), as from `nearest_neighbors`, ascending in each row; k at least `outer`.
        inner, outer: n < m; the ratio is r_m / r_n.

    Returns:
        The estimate.  Points with r_n = 0 are left out; 0 if all are.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if `distances` is not a matrix with that many columns, or not 1 <= n < m.

    >>> volumes = jax.random.exponential(jax.random.key(0), (2000, 8)).cumsum(axis=1)
    >>> gride(volumes ** (1 / 3), inner=2, outer=4).value.round(1)             # dimension 3
    Array(3., dtype=float32)
    """
    distances = check_distances("gride", distances, ndim=2, least=outer)
    if not 1 <= inner < outer:
        raise ValueError(f"`gride(inner={inner}, outer={outer})`: they must be 1 <= inner < outer.")
    logs, used = _log_ratio(distances[:, inner - 1], distances[:, outer - 1])
    num, total = jnp.sum(used).astype(logs.dtype), jnp.sum(logs)
    weight = outer - inner - 1

    def slopes(dim: Array) -> tuple[Array, Array]:
        """The derivative of the log-likelihood, and the observed information."""
        scaled = dim * logs
        # l / (1 - exp(-d l)), and 1 / d for a ratio of 1.
        grows = jnp.where(scaled > 0, scaled / -jnp.expm1(-jnp.where(scaled > 0, scaled, 1)), 1)
        first = (
            (num - 1) / dim
            + weight * jnp.sum(jnp.where(used, grows, 0)) / dim
            - (outer - 1) * total
        )
        second = jnp.sum(jnp.where(used, grows**2 * jnp.exp(-scaled), 0))
        return first, (num + weight * second) / dim**2

    # Since 1 <= x / (1 - e^-x) <= 1 + x, the root is between these two.
    most = ((outer - inner) * num - 1) / jnp.where(total == 0, 1, inner * total)
    low, high = most * inner / (outer - 1), most

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        rises = slopes(middle)[0] > 0
        return jnp.where(rises, middle, low), jnp.where(rises, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    value = jnp.sqrt(low * high)
    stderr = 1 / jnp.sqrt(slopes(jnp.where(value == 0, 1, value))[1])
    nothing, unscaled = num == 0, (num > 0) & (total == 0)
    value = jnp.where(nothing, 0, jnp.where(unscaled, jnp.inf, value))
    return Estimate(value, jnp.where(nothing, 0, jnp.where(unscaled, jnp.inf, stderr)))


def two_nn(distances: ArrayLike, *, discard: float = 0.0) -> Estimate:
    """One dimension for many points, from the distances to the first two neighbours.

    Of N ratios mu = r_2 / r_1 the largest `discard` of them are censored: known only to exceed the
    rest.  With n left, (n - 1) / T is unbiased, T the sum of the n logarithms and of N - n times
    the largest of these; its standard error is value / sqrt(n - 2) for independent ratios.

    A point whose two nearest are duplicates of each other has a ratio of 1: many duplicates make
    the value too large, and infinite if there is nothing else.  `find_duplicates` finds them.

    Of all neighbour estimators it looks at the smallest scale: least biased by curvature and a
    changing density, and the first to see noise.  For one point take the ratios of its neighbours.

    Args:
        distances: (N, k), as from `nearest_neighbors`; N at least 4, k at least 2.
        discard: at least 0 and below 1; 0.1 in the paper, where outliers spoil a regression.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if `distances` is not such a matrix, `discard` out of range, or too large.

    >>> volumes = jax.random.exponential(jax.random.key(0), (2000, 2)).cumsum(axis=1)
    >>> two_nn(volumes ** (1 / 3)).value.round(1)
    Array(3., dtype=float32)
    """
    distances = check_distances("two_nn", distances, ndim=2, least=2)
    num_points = distances.shape[0]
    if not 0 <= discard < 1 or num_points * (1 - discard) < 4:
        raise ValueError(
            f"`two_nn(discard={discard})` must be at least 0 and leave at least 4 of the "
            f"{num_points} points."
        )
    logs, used = _log_ratio(distances[:, 0], distances[:, 1])
    num = jnp.sum(used)
    kept = jnp.floor(num * (1 - discard)).astype(int)
    ordered = jnp.sort(jnp.where(used, logs, jnp.inf))
    largest = ordered[jnp.maximum(kept - 1, 0)]
    total = jnp.sum(jnp.where(jnp.arange(num_points) < kept, ordered, 0)) + jnp.where(
        kept < num, (num - kept) * largest, 0
    )
    total = total + 0 * jnp.sum(logs)  # NaN among those left out is NaN, too
    value = jnp.where(total == 0, jnp.inf, (kept - 1) / jnp.where(total == 0, 1, total))
    value = jnp.where(num == 0, 0, value)
    return Estimate(value, value / jnp.sqrt(jnp.maximum(kept - 2, 1)))


def two_nn_regression(distances: ArrayLike, *, discard: float = 0.1) -> Estimate:
    """One dimension for many points by regression, as in Facco et al. (2017).

    The least squares line through the origin for y_i = -log(1 - i / N) against the i-th smallest
    log mu, without the largest `discard` of them.  It weighs the large ratios most, and is noisier
    than `two_nn`, by 7%; for 400 independent ratios it is too large by .4%, for 1,000 by .2%.  The
    standard error is that of first order, for independent ratios.

    Args:
        distances: (N, k), as from `nearest_neighbors`; N at least 4, k at least 2.
        discard: above 0, since the last y is infinite, and below 1.

    Returns:
        The estimate.  Points with a duplicate are left out; 0 if all are.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if `distances` is not such a matrix, `discard` out of range, or too large.

    >>> volumes = jax.random.exponential(jax.random.key(0), (2000, 2)).cumsum(axis=1)
    >>> two_nn_regression(volumes ** (1 / 3)).value.round(1)
    Array(3., dtype=float32)
    """
    distances = check_distances("two_nn_regression", distances, ndim=2, least=2)
    num_points = distances.shape[0]
    if not 0 < discard < 1 or num_points * (1 - discard) < 3:
        raise ValueError(
            f"`two_nn_regression(discard={discard})` must be above 0 and leave at least 3 of the "
            f"{num_points} points."
        )
    logs, used = _log_ratio(distances[:, 0], distances[:, 1])
    num = jnp.sum(used)
    kept = jnp.minimum(jnp.floor(num * (1 - discard)).astype(int), num - 1)
    place = jnp.arange(num_points)
    inside = place < kept
    x = jnp.where(inside, jnp.sort(jnp.where(used, logs, jnp.inf)), 0)
    x = x + 0 * jnp.sum(logs)  # NaN among those left out is NaN, too
    left = jnp.where(inside, num - place, 2).astype(x.dtype)  # of N - i + 1 the i-th is the least
    y = jnp.where(inside, -jnp.log((left - 1) / jnp.maximum(num, 1)), 0)
    square, none = jnp.sum(x**2), kept < 1
    value = jnp.where(square == 0, jnp.inf, jnp.sum(x * y) / jnp.where(square == 0, 1, square))
    # Steps between exponential order statistics are independent, of variance 1 / (N - l + 1)^2.
    beyond = jnp.cumsum(y[::-1])[::-1]
    spread = jnp.sqrt(jnp.sum(jnp.where(inside, beyond / left, 0) ** 2)) / jnp.sum(y**2)
    return Estimate(jnp.where(none, 0, value), jnp.where(none, 0, value * spread))


def mom(distances: ArrayLike, *, unbiased: bool = True) -> Estimate:
    """The dimension at one point by the first moment: m / (r_k - m), m the mean of r_j over j < k.

    To first order in 1 / k it is too large by d (d + 1) / ((d + 2) (k - 1)), which `unbiased` takes
    off at the value found.  The standard error is (d + 1) sqrt(d / ((d + 2) (k - 1))): that of the
    likelihood (`mle`) or larger, and less of it rests on the nearest neighbours.

    Args:
        distances: (k,) to the neighbours, k at least 3; a distance of 0 makes it an atom, value 0.
        unbiased: whether to take off the bias.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if `distances` is not a vector of at least 3.

    >>> mom(jnp.array([0.25, 0.5, 0.75, 1.0]), unbiased=False).value   # uniform on a line
    Array(1., dtype=float32)
    """
    distances = check_distances("mom", distances, ndim=1, least=3)
    num, farthest = distances.shape[0] - 1, jnp.max(distances)
    is_atom = jnp.min(distances) == 0
    # The differences, not the mean, are summed: they do not cancel.
    gap = jnp.sum(farthest - distances) / num
    value = (farthest - gap) / jnp.where(gap == 0, 1, gap)
    if unbiased:
        value = value - value * (value + 1) / ((value + 2) * num)
    stderr = (value + 1) * jnp.sqrt(value / ((value + 2) * num))
    value, stderr = (jnp.where(gap == 0, jnp.inf, field) for field in (value, stderr))
    return Estimate(jnp.where(is_atom, 0, value), jnp.where(is_atom, 0, stderr))


def mada(distances: ArrayLike) -> Estimate:
    """The dimension at one point by counting: log 2 / log(r_k / r_h), h = k // 2.

    The standard error is the value's times sqrt(psi'(h) - psi'(k)) / (psi(k) - psi(h)), which for
    large k is 1 / (log 2 sqrt k): 1.44 times that of `mle`.

    Args:
        distances: (k,) to the neighbours, ascending, k at least 2; if r_h is 0, the value is 0, and
            infinite if r_k is r_h, as to a far outlier in float32.

    Raises:
        TypeError: if `distances` is not of a floating dtype.
        ValueError: if `distances` is not a vector of at least 2.

    >>> mada(jnp.array([1.0, 2.0, 3.0, 4.0])).value
    Array(1., dtype=float32)
    """
    distances = check_distances("mada", distances, ndim=1, least=2)
    k = distances.shape[0]
    h = k // 2
    logs, used = _log_ratio(distances[h - 1], distances[k - 1])
    value = jnp.where(logs == 0, jnp.inf, jnp.log(2.0) / jnp.where(logs == 0, 1, logs))
    value = jnp.where(used, value, 0)
    # psi(k) - psi(h), and the same of its derivative: both sums over h <= j < k.
    between = jnp.arange(h, k, dtype=value.dtype)
    spread = jnp.sqrt(jnp.sum(between**-2)) / jnp.sum(1 / between)
    return Estimate(value, value * spread)


def _log_ratio(inner: Array, outer: Array) -> tuple[Array, Array]:
    """log(outer / inner), and whether it exists: for an `inner` of 0 it does not, and is 0."""
    used = inner != 0
    ratio = jnp.where(used, outer, 1) / jnp.where(used, inner, 1)
    # A ratio that overflows is still finite.
    return jnp.log(jnp.minimum(ratio, jnp.finfo(ratio.dtype).max)), used
