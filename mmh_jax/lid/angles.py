r"""Dimensions from the directions of the neighbours: how far from orthogonal are they?

Two independent directions in R^d, angle theta:

    E cos^2 theta = 1 / d,
    E |sin theta| = Gamma(d/2)^2 / (Gamma((d+1)/2) Gamma((d-1)/2)) =: s(d),    s(1) = 0, s(inf) = 1.

- ABID (Thordsen & Schubert 2020, 2006.12880): 1 / mean of cos^2 over all pairs of neighbours, seen
  from the point.
- ESS (expected simplex skewness, Johnsson, Soneson & Fontes 2015): the parallelograms that pairs
  of neighbours span, seen from their mean, compared with rectangles of the same sides,

      sum |v_i| |v_j| |sin theta_ij|  /  sum |v_i| |v_j|  =  s(d),

  in which near neighbours, whose directions are noisiest, weigh least.

Unlike the radii, directions do not concentrate: these estimators are nearly unbiased in 100
dimensions from 100 neighbours.  They read the linear span: curvature, and a mixture of pieces
within the neighbourhood, count as dimensions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.lid.neighborhoods import check_offsets
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Estimate

__all__ = ["abid", "ess", "expected_skewness", "simplex_skewness"]


def expected_skewness(dim: ArrayLike) -> Array:
    """s(d) = E |sin| of the angle between independent directions in R^d, for real d of at least 1.

    To rounding for every d: not through differences of log Gamma, which cancel in float32.

    >>> expected_skewness(jnp.array([1.0, 2.0, 3.0])).round(3)         # 0, 2 / pi, pi / 4
    Array([0.   , 0.637, 0.785], dtype=float32)
    """
    dim = jnp.asarray(dim)
    # Q(n) = (Gamma(n + 1/2) / Gamma(n))^2 at n = d / 2: Q(n + 1) = Q(n) (1 + 1 / (2 n))^2, and for
    # large n the series below.
    n = dim / 2
    steps = jnp.arange(16, dtype=dim.dtype)
    shrink = jnp.prod((n[..., None] + steps) / (n[..., None] + steps + 0.5), axis=-1) ** 2
    m = 1 / (n + 16)
    series = m * (1 / 32 + m * (1 / 128 - m * (5 / 2048 + m * (23 / 8192 - m * 53 / 65536))))
    return (n - 0.5) / (shrink * (n + 15.75 + series))


def simplex_skewness(offsets: ArrayLike) -> Estimate:
    """sum |v_i| |v_j| |sin theta_ij| / sum |v_i| |v_j| over the pairs of k vectors.

    With v_j the neighbours minus their mean, whatever point they are given relative to.  The
    standard error is a jackknife over the neighbours.  0 if they are all on one line, NaN if they
    are all one point.

    Cost: one k x k Gram matrix.

    Args:
        offsets: (k, *shape), neighbours relative to any common point; k at least 3.

    Raises:
        TypeError: if `offsets` are not of a floating dtype.
        ValueError: if there are fewer than 3.
    """
    offsets = check_offsets("simplex_skewness", offsets, least=3)
    vectors = offsets - jnp.mean(offsets, axis=0)
    # In units of the longest, so that no product of four coordinates over- or underflows.
    largest = jnp.max(jnp.abs(vectors))
    gram = _gram(vectors / jnp.where(largest == 0, 1, largest))
    square = jnp.diagonal(gram)
    sides = square[:, None] * square[None, :]
    apart = ~jnp.eye(len(gram), dtype=bool)
    area = safe_sqrt(jnp.where(apart, jnp.maximum(sides - gram**2, 0), 0))
    return _jackknife(area, safe_sqrt(jnp.where(apart, sides, 0)))


def ess(offsets: ArrayLike) -> Estimate:
    """The dimension at one point by expected simplex skewness (Johnsson et al. 2015, version a).

    Standard error: that of the skewness over its derivative; a jackknife, right where directions
    are unequal and up to 1.6 times too large where they are not, as in a ball.  Neighbours that
    are all one and the same point, duplicates of it or not, have no directions: value 0; on one
    line: 1.

    The public code interpolates linearly between the skewness of integer dimensions; this is the
    inverse of s(d) at real d, which differs between the integers, by up to .2 between 1 and 2 and
    .03 at 10.

    Cost: one k x k Gram matrix and a bisection.  Differentiable.

    Args:
        offsets: (k, *shape), neighbours relative to any common point; k at least 3, and more than
            the dimension to be seen: k vectors minus their mean span at most k - 1.

    Raises:
        TypeError: if `offsets` are not of a floating dtype.
        ValueError: if there are fewer than 3.

    >>> plane = jax.random.normal(jax.random.key(0), (400, 2)) @ jnp.eye(2, 5)
    >>> ess(plane).value.round(1)
    Array(2., dtype=float32)
    """
    offsets = check_offsets("ess", offsets, least=3)
    skewness, stderr = simplex_skewness(offsets)
    nothing = jnp.all(offsets == offsets[0])

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        below = expected_skewness(middle) < skewness
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    one = jnp.ones_like(skewness)
    low, high = jax.lax.fori_loop(0, 60, halve, (one, 2.0**24 * one))
    dim = jax.lax.stop_gradient(jnp.sqrt(low * high))
    slope = jax.lax.stop_gradient(jax.grad(expected_skewness)(dim))
    # A last step by Newton's rule, which carries the derivative, and a NaN.
    dim = dim + (skewness - jax.lax.stop_gradient(expected_skewness(dim))) / slope
    return Estimate(jnp.where(nothing, 0, dim), jnp.where(nothing, 0, stderr / slope))


def abid(offsets: ArrayLike) -> Estimate:
    """The dimension at one point by the angles between its neighbours: 1 / mean of cos^2.

    Over all pairs of different neighbours, seen from the point.  Standard error: a jackknife, right
    where directions are unequal and up to 1.6 times too large where they are not.  Duplicates
    of the point have no direction and are left out; if fewer than two neighbours remain, the value
    is 0.

    Cost: one k x k Gram matrix.

    Args:
        offsets: (k, *shape), neighbours minus the point; k at least 3.

    Raises:
        TypeError: if `offsets` are not of a floating dtype.
        ValueError: if there are fewer than 3.

    >>> abid(jax.random.normal(jax.random.key(0), (400, 5))).value.round(1)
    Array(5., dtype=float32)
    """
    offsets = check_offsets("abid", offsets, least=3)
    largest = jnp.max(jnp.abs(offsets), axis=1, keepdims=True)
    used = largest[:, 0] != 0
    scaled = offsets / jnp.where(largest == 0, 1, largest)
    norms = safe_sqrt(jnp.sum(scaled**2, axis=1, keepdims=True))
    cosines = _gram(scaled / jnp.where(norms == 0, 1, norms))
    pairs = used[:, None] & used[None, :] & ~jnp.eye(len(used), dtype=bool)
    value, stderr = _jackknife(pairs.astype(cosines.dtype), jnp.where(pairs, cosines**2, 0))
    nothing = jnp.sum(used) < 2
    return Estimate(jnp.where(nothing, 0, value), jnp.where(nothing, 0, stderr))


def _gram(vectors: Array) -> Array:
    return jnp.matmul(vectors, vectors.T, precision=jax.lax.Precision.HIGHEST)


def _jackknife(above: Array, below: Array) -> Estimate:
    """The ratio of the sums of two symmetric matrices, and its error over their rows."""
    k = len(above)
    top, bottom = jnp.sum(above), jnp.sum(below)
    value = top / bottom
    without = (top - 2 * jnp.sum(above, axis=1)) / (bottom - 2 * jnp.sum(below, axis=1))
    return Estimate(value, jnp.sqrt((k - 1) / k * jnp.sum((without - jnp.mean(without)) ** 2)))
