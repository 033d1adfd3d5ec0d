"""Distances of pairs: of a few points all of them, of many the number below a radius."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.neighbor_search import (
    QUERIES_BY_DIFFERENCE,
    Space,
    distance,
    space_of,
)
from mmh_jax.lid.points import rounded, rounding_offset
from mmh_jax.mapping import over_points
from mmh_jax.typing import Array, ArrayLike

__all__ = ["correlation_integral", "count_pairs", "pair_distances"]

_BLOCK = 512


def correlation_integral(points: ArrayLike, radii: ArrayLike) -> np.ndarray:
    """C(r), the share of the pairs of points that are less than r apart, exactly.

    Cost: the N^2 D / 2 differences of all pairs twice, in blocks: memory does not grow with N^2.
    Runs from the host, not inside `jit`.

    Args:
        points: (N, *shape), N at least 2.
        radii: (R,).

    Returns:
        (R,), float64.

    Raises:
        ValueError: if there are fewer than 2 points.

    >>> correlation_integral(np.array([[0.0], [1.0], [3.0], [7.0]]), [1.5, 3.5, 10.0])
    array([0.16666667, 0.5       , 1.        ])
    """
    num_points = len(np.asarray(points))
    if num_points < 2:
        raise ValueError(
            f"`correlation_integral(points=...)` has {num_points} points; a pair takes two."
        )
    counts = count_pairs(points, np.arange(num_points), jnp.asarray(radii, float))
    return counts.sum(axis=0, dtype=np.int64) / (num_points * (num_points - 1))


def pair_distances(points: ArrayLike) -> Array:
    """The distances of each of a few points to all others, ascending: of one neighbourhood.

    By difference, without cancellation, in memory for N x N x D numbers; differentiable and under
    `jit`.  For a data set use `nearest_neighbors`.

    Args:
        points: (N, *shape).

    Returns:
        (N, N - 1).

    >>> pair_distances(jnp.array([[0.0], [1.0], [3.0]])).tolist()
    [[1.0, 3.0], [1.0, 2.0], [2.0, 3.0]]
    """
    points = jnp.asarray(points)
    flat = points.reshape(len(points), -1)
    difference = flat[:, None] - flat[None, :]
    largest = jnp.max(jnp.abs(difference))
    unit = jnp.where(largest == 0, 1, largest)
    square = jnp.sum((difference / unit) ** 2, axis=-1)
    square = jnp.where(jnp.eye(len(flat), dtype=bool), jnp.inf, square)
    return unit * jnp.sqrt(jnp.sort(square, axis=1)[:, :-1])


def count_pairs(points: ArrayLike, rows: np.ndarray, radii: Array) -> Any:
    """How many others are nearer than each of the radii, at some of the points.

    Args:
        points: (N, *shape).
        rows: (M,), which of them.
        radii: (R,).

    Returns:
        (M, R).
    """
    array = np.asarray(points)
    flat = rounded(array, rounding_offset(array))
    size = min(_BLOCK, len(flat))
    space = space_of(flat, np.zeros(flat.shape[1]), size, -(-len(flat) // size), 0.0)
    return _count_at(jax.device_put(space), radii, flat[rows], rows.astype(np.int32))


def _at_row(space: Space, radii: Array, query: Array, own: Array) -> Array:
    block_size = space.blocks.shape[1]

    def add(total: Array, block_at: tuple[Array, Array]) -> tuple[Array, None]:
        block, start = block_at
        index = start + jnp.arange(block_size, dtype=jnp.int32)
        possible = (index != own) & (index < space.num_points)
        # As in `nearest_neighbors`, to the last bit: the radii are themselves distances.
        near = possible[:, None] & (distance(query, block)[:, None] < radii)
        return total + jnp.sum(near, axis=0, dtype=jnp.int32), None

    starts = jnp.arange(len(space.blocks), dtype=jnp.int32) * block_size
    nothing = jnp.zeros(radii.shape, jnp.int32)
    return jax.lax.scan(add, nothing, (space.blocks, starts))[0]


_count_at = over_points(_at_row, (None, None, 0, 0), chunk_size=QUERIES_BY_DIFFERENCE)
