r"""Exact nearest neighbours, the input of the estimators that read data.

The matrix of all distances does not fit, and the fast formula for a block of it,

    |q - p|^2 = |q|^2 + |p|^2 - 2 q.p,

cancels: in float32 its error is about 1e-7 (|q|^2 + |p|^2), in which the distance of a close pair
drowns.  Hence *filter and refine*.  With c a bound on the relative error of the formula,

    lower(q, p) = (1 - c) (|q|^2 + |p|^2) - 2 q.p  <=  |q - p|^2,       c = 4 (2 + sqrt(D)) eps,

the points with the least `lower` are kept, block by block, a few more than the k asked for.  Their
distances are taken by difference, which does not cancel and gives exactly 0 for duplicates and for
nothing else.  Where the k-th of these lies below the last `lower` that was kept, no other point can
be nearer: the answer is proved.  The queries for which it is not (in tight clusters far apart, or
with more duplicates than were kept) are searched again, by difference over all points.

The bound c is the probabilistic one of Higham & Mary (2019), four times the root of the number of
terms; up to D = 16 it is the worst case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.mapping import Progress, over_points
from mmh_jax.typing import Array, ArrayLike

__all__ = ["Neighbors", "nearest_neighbors"]

# By difference, a block of queries times a block of points times D numbers may be in memory.
_QUERIES_BY_DIFFERENCE = 16


class Neighbors(NamedTuple):
    """The k nearest points of each of M queries, nearest first.

    Attributes:
        distances: (M, k), ascending.
        indices: (M, k) integers, rows of the points that were searched.
    """

    distances: Any
    indices: Any


def nearest_neighbors(
    points: ArrayLike,
    num_neighbors: int,
    *,
    queries: ArrayLike | None = None,
    block_size: int = 512,
    progress: Progress | None = None,
) -> Neighbors:
    """The `num_neighbors` nearest points of every query by Euclidean distance, exactly.

    Without `queries` they are the points themselves, and a point is not its own neighbour; a
    duplicate of it is, at distance exactly 0.  Among equal distances the smaller index comes first.
    XLA takes subnormal numbers for 0: coordinates closer than 1.2e-38 in float32 count as equal.
    Float64 arrays are centred before they are rounded to float32, unless JAX is in 64-bit mode.

    Cost: M N D multiplications, in matrix products, and a selection.  Memory: `block_size`^2
    numbers beside the points.  Runs from the host, not inside `jit`.

    Args:
        points: (N, *shape).
        num_neighbors: k, at most N - 1; at most N if there are `queries`.
        queries: (M, *shape), or None.
        block_size: queries, and points, in one matrix product.
        progress: called as `progress(done, total)` after each block of queries.

    Returns:
        `Neighbors` of NumPy arrays.

    Raises:
        TypeError: if `points` or `queries` are not of a floating dtype.
        ValueError: if points and queries differ in shape, if `num_neighbors` is not between 1 and
            the number of possible neighbours, or if a value is NaN or infinite.

    >>> line = np.array([[0.0], [1.0], [3.0], [3.0]])
    >>> nearest_neighbors(line, 2).indices
    array([[1, 2], [0, 2], [3, 1], [2, 1]], dtype=int32)
    >>> nearest_neighbors(line, 1, queries=np.array([[2.5]])).distances
    array([[0.5]], dtype=float32)
    """
    points = _checked("points", points)
    num_points = num_others = len(points)
    if queries is None:
        queries, own, num_others = points, np.arange(num_points, dtype=np.int32), num_points - 1
    else:
        queries = _checked("queries", queries)
        own = np.full(len(queries), -1, np.int32)
    if queries.shape[1:] != points.shape[1:]:
        raise ValueError(
            f"`nearest_neighbors(queries=...)` holds points of shape {queries.shape[1:]}, but "
            f"`points=...` of shape {points.shape[1:]}; they must agree."
        )
    _check_size("num_neighbors", num_neighbors)
    _check_size("block_size", block_size)
    if num_neighbors > num_others:
        raise ValueError(
            f"`nearest_neighbors(num_neighbors={num_neighbors})` exceeds the {num_others} points "
            "that can be neighbours; ask for fewer, or pass more points."
        )
    queries, space = _prepare(points, queries, min(block_size, num_points))
    num_kept = min(num_others, num_neighbors + num_neighbors // 8 + 16)
    find = _by_filter(num_neighbors, num_kept, num_kept == num_others, block_size, progress)
    distances, indices, proved = find(space, queries, own)
    again = np.flatnonzero(~proved)
    if len(again):
        find = _by_difference(num_neighbors)
        distances[again], indices[again] = find(space, queries[again], own[again])
    return Neighbors(distances, indices)


def _checked(name: str, points: ArrayLike) -> np.ndarray:
    points = np.asarray(points)
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(
            f"`nearest_neighbors({name}=...)` has dtype {points.dtype}; points are in real data "
            "units. Convert them, for example `x.astype(float) / 255`."
        )
    if points.ndim == 0 or points.size == 0:
        raise ValueError(
            f"`nearest_neighbors({name}=...)` has shape {points.shape}; pass an array (N, *shape) "
            "of at least one point."
        )
    bad = ~np.isfinite(points).reshape(len(points), -1).all(axis=1)
    if bad.any():
        raise ValueError(
            f"`nearest_neighbors({name}=...)` has NaN or infinite values in {bad.sum()} of "
            f"{len(points)} rows, row {bad.argmax()} the first; remove these rows."
        )
    return points


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`nearest_neighbors({name}={value!r})` must be an integer of at least 1.")


class _Space(NamedTuple):
    """The points, in blocks, the last one padded with zeros."""

    blocks: Array
    num_points: Array
    centre: Array
    scale: Array


def _prepare(points: np.ndarray, queries: np.ndarray, block_size: int) -> tuple[np.ndarray, _Space]:
    """Flat queries, and points in blocks, in the working precision."""
    points, queries = points.reshape(len(points), -1), queries.reshape(len(queries), -1)
    dtype = jnp.result_type(float)
    centre = points.mean(axis=0, dtype=np.float64)
    if max(points.dtype.itemsize, queries.dtype.itemsize) > dtype.itemsize:
        # Rounding would otherwise cost digits of the distances in proportion to the offset.
        points, queries, centre = points - centre, queries - centre, np.zeros_like(centre)
    points, queries, centre = (array.astype(dtype) for array in (points, queries, centre))
    largest = max(np.abs(array - centre).max() for array in (points, queries))
    blocks = np.pad(points, [(0, -len(points) % block_size), (0, 0)])
    return queries, _Space(
        blocks=jnp.asarray(blocks.reshape(-1, block_size, points.shape[1])),
        num_points=jnp.asarray(len(points), jnp.int32),
        centre=jnp.asarray(centre),
        # A power of two, which rounds nothing, brings all coordinates into [-1, 1]: no square
        # overflows.
        scale=jnp.asarray(2.0 ** -np.clip(np.frexp(largest)[1], -120, 120), dtype),
    )


def _distance(q: Array, p: Array) -> Array:
    """|q - p| without overflow or underflow, so that 0 means equal; along the last axis."""
    difference = q - p
    _, exponent = jnp.frexp(jnp.max(jnp.abs(difference), axis=-1))
    unit = jnp.ldexp(jnp.ones_like(difference[..., 0]), exponent - 1)
    return unit * jnp.sqrt(jnp.sum((difference / unit[..., None]) ** 2, axis=-1))


def _least(
    space: _Space, own: Array, measure: Callable[[Array], Array], num_kept: int
) -> tuple[Array, Array]:
    """The points with the least `measure(block)`, in ascending order; by index among equals."""
    num_blocks, block_size, _ = space.blocks.shape

    def merge(kept: tuple[Array, Array], block_at: tuple[Array, Array]) -> tuple[Any, None]:
        block, start = block_at
        index = start + jnp.arange(block_size, dtype=jnp.int32)
        possible = (index != own) & (index < space.num_points)
        values = jnp.concatenate([kept[0], jnp.where(possible, measure(block), jnp.inf)])
        # `top_k` prefers the earlier among equals, and what was kept has the smaller indices.
        negative, place = jax.lax.top_k(-values, num_kept)
        return (-negative, jnp.concatenate([kept[1], index])[place]), None

    dtype = space.blocks.dtype
    nothing = jnp.full(num_kept, jnp.inf, dtype), jnp.zeros(num_kept, jnp.int32)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block_size
    return jax.lax.scan(merge, nothing, (space.blocks, starts))[0]


# The programs are cached, so that a sweep over data sets of one shape compiles once.


@functools.lru_cache(maxsize=32)
def _by_filter(
    num_neighbors: int,
    num_kept: int,
    keeps_all: bool,
    block_size: int,
    progress: Progress | None,
) -> Callable[..., Any]:
    def find(space: _Space, query: Array, own: Array) -> tuple[Array, Array, Array]:
        dim, eps = query.shape[0], jnp.finfo(query.dtype).eps
        slack = 4 * (2 + dim**0.5) * float(eps)
        q = (query - space.centre) * space.scale

        def lower(block: Array) -> Array:
            p = (block - space.centre) * space.scale
            product = jnp.matmul(p, q, precision=jax.lax.Precision.HIGHEST)
            return (1 - slack) * (jnp.sum(p**2, axis=-1) + jnp.sum(q**2)) - 2 * product

        bounds, indices = _least(space, own, lower, num_kept)
        points = space.blocks.reshape(-1, dim)
        distances = jax.lax.map(lambda i: _distance(query, points[i]), indices, batch_size=8)
        distances, indices = jax.lax.sort((distances, indices), num_keys=2)
        distances, indices = distances[:num_neighbors], indices[:num_neighbors]
        farthest = (1 + slack) * (distances[-1] * space.scale) ** 2
        return distances, indices, keeps_all | (farthest < bounds[-1])

    return over_points(find, (None, 0, 0), chunk_size=block_size, progress=progress)


@functools.lru_cache(maxsize=32)
def _by_difference(num_neighbors: int) -> Callable[..., Any]:
    def find(space: _Space, query: Array, own: Array) -> tuple[Array, Array]:
        return _least(space, own, lambda block: _distance(query, block), num_neighbors)

    return over_points(find, (None, 0, 0), chunk_size=_QUERIES_BY_DIFFERENCE)
