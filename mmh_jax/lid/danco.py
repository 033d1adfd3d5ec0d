r"""DANCo: how norms and angles concentrate, compared with balls of known dimension.

The two statistics of `concentration`, of distances and of angles, are biased in a finite sample.
Ceruti, Bassis, Rozza, Lombardi, Casiraghi & Campadelli (2014, 1206.3881) take the same from as many
points, uniform in the unit ball of each dimension; the dimension is that whose laws have the least
Kullback-Leibler divergence from those of the data.  For the distances it is, with q = d_ball /
d_data and H_k = 1 + 1/2 + ... + 1/k,

    -log q - (1 - q) H_k + (k - 1) E[log(1 - u) - log(1 - u^q)],   u ~ Beta(1, k),

here by quadrature: the closed form in the paper is an alternating sum that cancels for large k.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.concentration import DENSE, DancoStatistics, check_sizes, danco_statistics
from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = ["Danco", "DancoCalibration", "danco", "danco_calibration", "nearest_ball"]


class DancoCalibration(NamedTuple):
    """The statistics of balls: to keep, for all data sets of N points.

    Attributes:
        statistics: of the dimensions 1, 2, ..., each (upto,).
        num_points: N.
        num_neighbors: k.
    """

    statistics: DancoStatistics
    num_points: int
    num_neighbors: int


class Danco(NamedTuple):
    """The dimension by DANCo.

    Attributes:
        value: an integer, that of least divergence; as a real number, infinite if all neighbours of
            each point are equally far, 0 if no point has a neighbour that is not a duplicate.
        fractional: where the parabola in log d through the divergences at the value and its two
            neighbours is least; the value itself at either end of the calibration.
        divergence: (upto,), for each dimension.
    """

    value: Array
    fractional: Array
    divergence: Array


def danco(points: ArrayLike, calibration: DancoCalibration) -> Danco:
    """The dimension of a data set, or of one neighbourhood, by DANCo.

    Nearly unbiased where the set looks like a ball at the scale of the neighbours, since the
    calibration has the same bias; normal points do not: in 5 dimensions they have 5 or 6.  A value
    that is the last of the calibration says that it does not go far enough.  The calibration is a
    sample: near the tie of two dimensions another key may decide otherwise, and in the fractional
    value it is noise.

    Duplicates of a point are not among its directions, and it is not among the norms.

    Cost: that of `nearest_neighbors`, and a k x k Gram matrix at each point.  With at most 256
    points also under `jit` and `vmap`.

    Args:
        points: (N, *shape), as many as in the calibration.
        calibration: from `danco_calibration`.

    Raises:
        TypeError: if `points` are not of a floating dtype.
        ValueError: if the calibration is for another number of points, or a value is not finite
            (under `jit` the result is then NaN).

    >>> calibration = danco_calibration(200, 10, upto=6, key=jax.random.key(0))
    >>> points = np.random.default_rng(0).normal(size=(200, 2)) @ np.eye(2, 8)
    >>> danco(points, calibration).value
    Array(2., dtype=float32)
    """
    num_points = len(jnp.asarray(points))
    if num_points != calibration.num_points:
        raise ValueError(
            f"`danco(calibration=...)` is for {calibration.num_points} points, and there are "
            f"{num_points}; make one with `danco_calibration({num_points}, ...)`."
        )
    found = danco_statistics(points, calibration.num_neighbors)
    return nearest_ball(found, calibration)


def danco_calibration(
    num_points: int, num_neighbors: int = 10, *, upto: int, repeats: int = 1, key: Key
) -> DancoCalibration:
    """The statistics of `num_points` points, uniform in the unit ball of 1, ..., `upto` dimensions.

    Cost: `upto` times `repeats` times that of `danco`, one compilation for all.

    Args:
        num_points: N.
        num_neighbors: k, from 2 to N - 2; 10 in the paper.
        upto: the largest dimension.
        repeats: samples to average over; 1 in the paper, more for less noise.
        key: for the samples.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if one of the numbers is out of range.
    """
    check_key("danco_calibration", key)
    check_sizes("danco_calibration", num_points, num_neighbors)
    if upto < 1 or repeats < 1:
        raise ValueError(
            f"`danco_calibration(upto={upto}, repeats={repeats})` must both be at least 1."
        )
    dims = jnp.repeat(jnp.arange(1, upto + 1), repeats)
    keys = jax.random.split(key, len(dims))
    if num_points <= DENSE:
        every = _of_balls(keys, dims, num_points, num_neighbors, upto)
    else:
        balls = (_ball(k, d, num_points, upto) for k, d in zip(keys, dims, strict=True))
        each = [danco_statistics(ball, num_neighbors) for ball in balls]
        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf.reshape(upto, repeats), axis=1), every)
    return DancoCalibration(mean, num_points, num_neighbors)


def nearest_ball(found: DancoStatistics, calibration: DancoCalibration) -> Danco:
    """The dimension from the statistics of a sample and those of balls."""
    return _nearest_ball(found, calibration.statistics, calibration.num_neighbors)


@functools.partial(jax.jit, static_argnums=2)
def _nearest_ball(found: DancoStatistics, ball: DancoStatistics, k: int) -> Danco:
    finite = jnp.isfinite(found.norm) & (found.norm > 0)
    norm = jnp.where(finite, found.norm, 1)
    divergence = _between_norms(ball.norm / norm, k) + _between_angles(found, ball)
    least = jnp.argmin(divergence)
    value = (least + 1).astype(norm.dtype)
    inside = (least > 0) & (least < len(divergence) - 1)
    below, above = (jnp.clip(least + i, 0, len(divergence) - 1) for i in (-1, 1))
    # A parabola in log d, of which the divergence is nearly one.
    left, right = -jnp.log1p(-1 / jnp.maximum(value, 2)), jnp.log1p(1 / value)
    falls, climbs = divergence[below] - divergence[least], divergence[above] - divergence[least]
    bend = right * falls + left * climbs
    shift = (right**2 * falls - left**2 * climbs) / jnp.where(bend > 0, 2 * bend, 1)
    fractional = jnp.where(inside & (bend > 0), value * jnp.exp(shift), value)
    value, fractional = (jnp.where(finite, x, found.norm) for x in (value, fractional))
    return Danco(value, fractional, divergence)


def _ball(key: Key, dim: ArrayLike, num_points: int, upto: int) -> Array:
    """Uniform in the unit ball of `dim` dimensions, in R^upto: one shape for all."""
    for_direction, for_radius = jax.random.split(key)
    normal = jax.random.normal(for_direction, (num_points, upto)) * (jnp.arange(upto) < dim)
    radius = jax.random.uniform(for_radius, (num_points, 1)) ** (1 / dim)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True) * radius


@jax.jit(static_argnums=(2, 3, 4))
def _of_balls(
    keys: Key, dims: Array, num_points: int, num_neighbors: int, upto: int
) -> DancoStatistics:
    def of_one(key_and_dim: tuple[Key, Array]) -> DancoStatistics:
        return danco_statistics(_ball(*key_and_dim, num_points, upto), num_neighbors)

    return jax.lax.map(of_one, (keys, dims))


def _between_norms(q: Array, k: int) -> Array:
    """The divergence of the ratios, for each q; by double exponential quadrature over u."""
    t = np.linspace(-4.0, 3.0, 141)
    arc = np.pi * np.sinh(t)
    log_u, log_rest = -np.logaddexp(0, -arc), -np.logaddexp(0, arc)
    # du = u (1 - u) pi cosh t dt, times the density k (1 - u)^{k-1}.
    weights = k * np.exp(log_u + k * log_rest) * np.pi * np.cosh(t) * (t[1] - t[0])
    log_u, log_rest, weights = (jnp.asarray(x, q.dtype) for x in (log_u, log_rest, weights))
    gap = jnp.sum(weights * (log_rest - jnp.log(-jnp.expm1(q[:, None] * log_u))), axis=1)
    harmonic = float(np.sum(1 / np.arange(1, k + 1)))
    return -jnp.log(q) - (1 - q) * harmonic + (k - 1) * gap


def _between_angles(found: DancoStatistics, ball: DancoStatistics) -> Array:
    """The divergence of von Mises laws."""
    tau, other = found.concentration, ball.concentration
    order0, order1 = jax.scipy.special.i0e, jax.scipy.special.i1e
    normalizers = jnp.log(order0(other) / order0(tau)) + other - tau
    apart = jnp.cos(found.direction - ball.direction)
    return normalizers + order1(tau) / order0(tau) * (tau - other * apart)
