r"""Detectors that compare: generations with each other, a point with the data, or with nothing.

    pairwise radius    around one of n generations of a condition, such that it holds half of the
                       others, in tiled l2                           Carlini et al. 2023, 2301.13188
    danger zone        W = E_z max_i softmax_i(-|x + sigma z - x_i|^2 / 2 sigma^2)            (2026)
    nearest distance   min_i |x - x_i|, for generated points
    pixel variance     of one point, the simplest measure of how complex it is

The first two say how far the model, or the data, leave no choice; the last two are baselines.  All
but the danger zone are small where something is memorized; the detectors negate them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.analytic import Empirical
from mmh_jax.linalg.operator import check_positive, in_chunks, mean_and_stderr, safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Estimate, Key, check_key, check_level

__all__ = ["danger_zone", "nearest_distance", "pairwise_radius", "pixel_variance", "tiled_distance"]


def tiled_distance(a: ArrayLike, b: ArrayLike, *, tiles: int = 4) -> Array:
    """The largest Euclidean distance between corresponding tiles of two images (Carlini 2023).

    A large common background does not make two images close by it.  A norm of a - b.

    Args:
        a, b: one image each, (H, W) or (H, W, C); with `tiles=1` points of any shape.
        tiles: along each of the two sides, which it divides.

    Raises:
        ValueError: if the shapes differ or `tiles` does not divide the sides.

    >>> tiled_distance(jnp.zeros((2, 2)), jnp.array([[3.0, 0.0], [0.0, 4.0]]), tiles=2)
    Array(4., dtype=float32)
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    check_positive("tiled_distance", "tiles", tiles)
    if a.shape != b.shape:
        raise ValueError(f"`tiled_distance` was given the shapes {a.shape} and {b.shape}.")
    if tiles == 1:
        return safe_sqrt(jnp.sum((a - b) ** 2))
    if a.ndim < 2 or a.shape[0] % tiles or a.shape[1] % tiles:
        raise ValueError(
            f"`tiled_distance(tiles={tiles})` does not divide a point of shape {a.shape}; choose a "
            "divisor of its height and width, or `tiles=1` for the plain distance."
        )
    height, width = a.shape[0] // tiles, a.shape[1] // tiles
    squares = ((a - b) ** 2).reshape(tiles, height, tiles, width, -1)
    return safe_sqrt(jnp.max(jnp.sum(squares, axis=(1, 3, 4))))


def pairwise_radius(
    generations: ArrayLike, *, tiles: int = 4, num_close: int | None = None
) -> Array:
    """How close together generations of one condition lie: the least radius that holds some others.

    Carlini et al. look for a clique of ten among 500 generations whose pairs are closer than a
    threshold.  Here the threshold is the answer, and the clique a star: the least r such that one
    generation has `num_close` others within r.  A clique of that many others within r is such a
    star, and the pairs of such a star are within 2 r, so that the two agree to a factor of 2.

    Args:
        generations: (n, *shape), independent draws of one condition.
        tiles: of `tiled_distance`.
        num_close: how many others; half of them by default, n // 2.  Fewer find a copy that is made
            less often.

    Cost: n evaluations of a sampler; n^2 D here.

    Raises:
        ValueError: if there are fewer than 2 generations, or not so many others.

    >>> pairwise_radius(jnp.array([[0.0], [1.0], [9.0]]), tiles=1, num_close=1)
    Array(1., dtype=float32)
    """
    generations = jnp.asarray(generations)
    num = generations.shape[0] if generations.ndim else 0
    num_close = max(num // 2, 1) if num_close is None else num_close
    check_positive("pairwise_radius", "num_close", num_close)
    if num < 2 or num_close >= num:
        raise ValueError(
            f"`pairwise_radius(generations=..., num_close={num_close})` has {num} generations; it "
            "takes (n, *shape) with n >= 2, more than `num_close`."
        )

    def to_others(one: Array) -> Array:
        distances = jax.vmap(lambda other: tiled_distance(one, other, tiles=tiles))(generations)
        return jnp.sort(distances)[num_close]  # the first is its own, 0

    return jnp.min(jax.lax.map(to_others, generations))


def danger_zone(
    x: ArrayLike,
    sigma: ArrayLike,
    data: ArrayLike,
    *,
    key: Key,
    num_samples: int = 16,
    chunk_size: int = 256,
) -> Estimate:
    """E_z of the largest posterior weight of a training point, given x + sigma z.

    1 where the noised x can be told to come from one training point, and a model that knows the
    data by heart would go back to it; about 1/N where the noise has mixed all.

    Args:
        x: one point; of the training data as a rule.
        sigma: the noise level, in data units.
        data: (N, *shape), the training data.
        key: draws z.
        num_samples: of z.
        chunk_size: training points read at a time, so that N chunk x D numbers are never made.

    Cost: no evaluation of the model; N D operations for each sample, N numbers of memory.

    Raises:
        TypeError: without a key.
        ValueError: if the data are not points like x, or a number is not positive.

    >>> points = jnp.array([[0.0], [10.0]])
    >>> danger_zone(points[0], 0.1, points, key=jax.random.key(0)).value
    Array(1., dtype=float32)
    """
    x, data = jnp.asarray(x, float), jnp.asarray(data)
    sigma = check_level("danger_zone", sigma, x.dtype)
    key = check_key("danger_zone", key)
    check_positive("danger_zone", "num_samples", num_samples)
    check_positive("danger_zone", "chunk_size", chunk_size)
    if data.ndim != x.ndim + 1 or data.shape[1:] != x.shape or not data.shape[0]:
        raise ValueError(
            f"`danger_zone(data=...)` has shape {data.shape}; for a point of shape {x.shape} it is "
            f"(N, *{x.shape}) with N >= 1."
        )

    def largest_weight(sample_key: Key) -> Array:
        noisy = x + sigma * jax.random.normal(sample_key, x.shape, x.dtype)
        exponents = in_chunks(
            lambda point: -jnp.sum(((noisy - point) / sigma) ** 2) / 2, data, chunk_size
        )
        return 1 / jnp.sum(jnp.exp(exponents - jnp.max(exponents)))

    return mean_and_stderr(in_chunks(largest_weight, jax.random.split(key, num_samples), 1))


def nearest_distance(x: ArrayLike, data: ArrayLike) -> Array:
    """The distance from a generated point to the nearest training point, in data units.

    Of a training point it is 0 and says nothing.  For many points `lid.nearest_neighbors` is
    faster.

    Args:
        x: one point.
        data: (N, *shape), the training data.

    Cost: N D operations.

    Raises:
        TypeError, ValueError: if x or the data are not of a floating dtype, or of different shapes.

    >>> nearest_distance(jnp.array([3.0, 4.0]), jnp.array([[0.0, 0.0], [9.0, 9.0]]))
    Array(5., dtype=float32)
    """
    return Empirical(jnp.asarray(data)).distance(jnp.asarray(x))


def pixel_variance(x: ArrayLike) -> Array:
    """The variance of the entries of one point: small for an image that is simple.

    >>> pixel_variance(jnp.array([[1.0, 3.0]]))
    Array(1., dtype=float32)
    """
    return jnp.var(jnp.asarray(x))
