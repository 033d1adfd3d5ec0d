r"""The search behind `nearest_neighbors`: one part of the points, in blocks, by filter and refine.

The fast formula for a block of squared distances,

    |q - p|^2 = |q|^2 + |p|^2 - 2 q.p,

cancels: in float32 its error is about 1e-7 (|q|^2 + |p|^2), in which the distance of a close pair
drowns.  Hence *filter and refine*.  With c a bound on the relative error of the formula,

    lower(q, p) = (1 - c) (|q|^2 + |p|^2) - 2 q.p - e  <=  |q - p|^2,   c = 6 (2 + sqrt(D)) eps,

with e = 4 D times the least normal number, since smaller products are taken for 0.  All but what
depends on q alone is one product, of (2 q, -1) with (p, (1 - c) |p|^2): nothing but a matrix
product and a selection goes over the numbers.  The points with the least `lower` are kept, block by
block, a few more than the k asked for.  Their distances are taken by difference, which does not
cancel and gives exactly 0 for duplicates and for nothing else.  Where the k-th of these lies below
the last `lower` that was kept, no other point can be nearer: the answer is proved.  The queries for
which it is not (in tight clusters far apart, or with more duplicates than were kept) are searched
again, by difference over all points.

The bound c is the probabilistic one of Higham & Mary (2019), four times the root of the number of
terms, of the three sums of D terms that are rounded; up to D = 16 it is the worst case.

A search that may miss some keeps, on a TPU, the points that `lax.approx_min_k` finds in a block
(Chern et al. 2022, 2206.14286), and proves nothing.

On a mesh with an axis `points` the blocks are split over it: every device keeps its best, and the
best of these are found after an all-gather; an answer is proved if it is on each device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mmh_jax.mapping import over_points
from mmh_jax.typing import Array

__all__ = [
    "POINTS_AXIS",
    "QUERIES_BY_DIFFERENCE",
    "Space",
    "by_difference",
    "by_filter",
    "distance",
    "farthest_coordinate",
    "space_of",
    "with_sides",
]

POINTS_AXIS = "points"
# By difference, a block of queries times a block of points times D numbers may be in memory.
QUERIES_BY_DIFFERENCE = 16


class Space(NamedTuple):
    """Points in blocks, padded with zeros.

    Attributes:
        blocks: (B, rows, D).
        num_points: how many of the B times rows are points.
        centre: (D,), taken off in the filter.
        scale: a power of two, which rounds nothing, that brings all coordinates into [-1, 1]: no
            square overflows.
        sides: (B / m, D + 1, m rows), of `with_sides`: the right-hand sides of the filter.
    """

    blocks: Any
    num_points: Any
    centre: Any
    scale: Any
    sides: Any = None


def space_of(
    points: np.ndarray, centre: np.ndarray, rows: int, num_blocks: int, farthest: float
) -> Space:
    """`points` (N, D) in `num_blocks` blocks; `farthest` bounds the queries' distance to `centre`.

    Both in the sense of the largest coordinate.
    """
    dtype = points.dtype
    blocks = np.zeros((num_blocks * rows, points.shape[1]), dtype)
    blocks[: len(points)] = points
    largest = max(farthest, farthest_coordinate(points, centre))
    return Space(
        blocks=blocks.reshape(num_blocks, rows, -1),
        num_points=np.int32(len(points)),
        centre=centre.astype(dtype),
        scale=np.asarray(2.0 ** -np.clip(np.frexp(largest)[1], -120, 120), dtype),
    )


def slack(dim: int, dtype: Any) -> float:
    """The bound c on the relative error of the formula."""
    return 6 * (2 + dim**0.5) * float(jnp.finfo(dtype).eps)


# Numbers in a group of the selection.
_GROUP = 8
# In place of infinity for what is no point: a power of two, which is its own high part where a
# backend splits numbers into several of fewer bits, and infinity less itself would be NaN.
_FAR = 2.0**100


def with_sides(space: Space, num_merged: int) -> Space:
    """With what the filter multiplies by, `num_merged` blocks in one matrix product."""
    num_blocks, rows, dim = space.blocks.shape
    dtype, shape = space.blocks.dtype, (num_blocks // num_merged, num_merged * rows)
    sides = np.empty((shape[0], dim + 1, shape[1]), dtype)
    index = np.arange(num_blocks * rows).reshape(shape)
    for block, side, number in zip(space.blocks.reshape(*shape, dim), sides, index, strict=True):
        p = (block - space.centre) * space.scale
        side[:dim] = p.T
        squares = (1 - slack(dim, dtype)) * np.einsum("pd,pd->p", p, p)
        side[dim] = np.where(number < space.num_points, squares, _FAR)
    return space._replace(sides=sides)


def farthest_coordinate(points: np.ndarray, centre: np.ndarray) -> float:
    """The largest coordinate of `points - centre`, without a copy of the points."""
    high, low = points.max(axis=0) - centre, centre - points.min(axis=0)
    return float(max(high.max(), low.max()))


def distance(q: Array, p: Array) -> Array:
    """|q - p| without overflow or underflow, so that 0 means equal; along the last axis."""
    difference = q - p
    _, exponent = jnp.frexp(jnp.max(jnp.abs(difference), axis=-1))
    unit = jnp.ldexp(jnp.ones_like(difference[..., 0]), exponent - 1)
    return unit * jnp.sqrt(jnp.sum((difference / unit[..., None]) ** 2, axis=-1))


def _least(
    space: Space,
    own: Array,
    first: Array | int,
    measure: Callable[[Array], Array],
    num_kept: int,
) -> tuple[Array, Array]:
    """The points with the least `measure(block)`, in ascending order; by index among equals.

    `first` is the index of the first row here.  Where fewer than `num_kept` are possible, the rest
    is infinite.
    """
    num_blocks, rows, _ = space.blocks.shape

    def merge(kept: tuple[Array, Array], block_at: tuple[Array, Array]) -> tuple[Any, None]:
        block, start = block_at
        index = first + start + jnp.arange(rows, dtype=jnp.int32)
        possible = (index != own) & (index < space.num_points)
        values = jnp.concatenate([kept[0], jnp.where(possible, measure(block), jnp.inf)])
        # `top_k` prefers the earlier among equals, and what was kept has the smaller indices.
        negative, place = jax.lax.top_k(-values, num_kept)
        return (-negative, jnp.concatenate([kept[1], index])[place]), None

    dtype = space.blocks.dtype
    nothing = jnp.full(num_kept, jnp.inf, dtype), jnp.zeros(num_kept, jnp.int32)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * rows
    return jax.lax.scan(merge, nothing, (space.blocks, starts))[0]


def _largest(values: Array, num: int, recall: float | None) -> tuple[Array, Array]:
    """The `num` largest values and their places; with a `recall`, so large a share of them."""

    def exactly(values: Array) -> tuple[Array, Array]:
        # The largest lie in the groups with the largest maxima, a fraction of the places.
        if len(values) % _GROUP or 2 * num * _GROUP > len(values):
            largest, places = jax.lax.top_k(values, num)
            return largest, places
        num_groups = len(values) // _GROUP
        _, groups = jax.lax.top_k(jnp.max(values.reshape(_GROUP, num_groups), axis=0), num)
        places = (groups + num_groups * jnp.arange(_GROUP)[:, None]).reshape(-1)
        largest, which = jax.lax.top_k(values[places], num)
        return largest, places[which]

    def nearly(values: Array) -> tuple[Array, Array]:
        assert recall is not None  # for the type checker
        largest, place = jax.lax.approx_max_k(values, num, recall_target=recall)
        return largest, place

    if recall is None or len(values) <= num:
        return exactly(values)
    # Elsewhere XLA sorts for it: sixteen times slower than `top_k` on a CPU.
    return jax.lax.platform_dependent(values, tpu=nearly, default=exactly)


def _least_bounds(
    space: Space, query: Array, first: Array | int, num_kept: int, recall: float | None
) -> tuple[Array, Array]:
    """The least values of `lower`, in ascending order, infinite for no point; and their indices."""
    num_sides, dim, rows = space.sides.shape[0], query.shape[0], space.sides.shape[2]
    q = (query - space.centre) * space.scale
    left = jnp.append(2 * q, -jnp.ones_like(q[0]))

    def merge(kept: tuple[Array, Array], side_at: tuple[Array, Array]) -> tuple[Any, None]:
        side, start = side_at
        values = jnp.matmul(left, side, precision=jax.lax.Precision.HIGHEST)
        values, place = _largest(values, min(num_kept, rows), recall)
        index = jnp.concatenate([kept[1], (first + start + place).astype(jnp.int32)])
        values, place = jax.lax.top_k(jnp.concatenate([kept[0], values]), num_kept)
        return (values, index[place]), None

    nothing = jnp.full(num_kept, -jnp.inf, query.dtype), jnp.zeros(num_kept, jnp.int32)
    starts = jnp.arange(num_sides, dtype=jnp.int32) * rows
    (values, indices), _ = jax.lax.scan(merge, nothing, (space.sides, starts))
    least = 4 * dim * float(jnp.finfo(query.dtype).tiny)
    bounds = (1 - slack(dim, query.dtype)) * jnp.sum(q**2) - values - least
    return jnp.where(bounds > _FAR / 2, jnp.inf, bounds), indices


def _first_row(space: Space, is_split: bool) -> Array | int:
    if not is_split:
        return 0
    num_blocks, rows, _ = space.blocks.shape
    return jax.lax.axis_index(POINTS_AXIS).astype(jnp.int32) * (num_blocks * rows)


def _best_of_all(distances: Array, indices: Array, num: int, is_split: bool) -> tuple[Array, Array]:
    """The `num` nearest, of all devices; by index among equals."""
    if is_split:
        distances, indices = (
            jax.lax.all_gather(field, POINTS_AXIS, tiled=True) for field in (distances, indices)
        )
    distances, indices = jax.lax.sort((distances, indices), num_keys=2)
    return distances[:num], indices[:num]


def _mapped(find: Callable[..., Any], chunk_size: int, mesh: Mesh | None) -> Callable[..., Any]:
    specs = None
    if _is_split(mesh):
        whole = PartitionSpec()
        split = PartitionSpec(POINTS_AXIS)
        specs = [Space(split, whole, whole, whole, split)]
    return over_points(find, (None, 0, 0), chunk_size=chunk_size, mesh=mesh, shared_specs=specs)


def _is_split(mesh: Mesh | None) -> bool:
    return mesh is not None and POINTS_AXIS in mesh.axis_names


# The programs are cached, so that a sweep over data sets of one shape compiles once.


@functools.lru_cache(maxsize=32)
def by_filter(
    num_neighbors: int,
    num_kept: int,
    block_size: int,
    mesh: Mesh | None,
    recall: float | None = None,
) -> Callable[..., Any]:
    """`find(space, queries, own)`: distances and indices (M, k), and whether they are proved.

    `own` is the row of a point that is not to be found, or -1; distances are infinite where there
    are fewer than k.  With a `recall` nothing is proved, and all are reported as they were found.
    """
    is_split = _is_split(mesh)

    def find(space: Space, query: Array, own: Array) -> tuple[Array, Array, Array]:
        dim = query.shape[0]
        first = _first_row(space, is_split)
        # One more than are kept: the query itself may be among them.
        bounds, indices = _least_bounds(space, query, first, num_kept + 1, recall)
        points = space.blocks.reshape(-1, dim)
        distances = jax.lax.map(
            lambda i: distance(query, points[jnp.maximum(i - first, 0)]), indices, batch_size=8
        )
        possible = ~jnp.isinf(bounds) & (indices != own)
        distances = jnp.where(possible, distances, jnp.inf)
        distances, indices = _best_of_all(distances, indices, num_neighbors, is_split)
        least = 4 * dim * float(jnp.finfo(query.dtype).tiny)
        farthest = (1 + slack(dim, query.dtype)) * (distances[-1] * space.scale) ** 2 + least
        # An infinite bound: all points that are possible were kept.
        proved = (farthest < bounds[-1]) | jnp.isinf(bounds[-1]) | (recall is not None)
        if is_split:
            proved = jax.lax.pmin(proved.astype(int), POINTS_AXIS) > 0
        return distances, indices, proved

    return _mapped(find, block_size, mesh)


@functools.lru_cache(maxsize=32)
def by_difference(num_neighbors: int, mesh: Mesh | None) -> Callable[..., Any]:
    """`find(space, queries, own)`: as `by_filter`, and always proved."""
    is_split = _is_split(mesh)

    def find(space: Space, query: Array, own: Array) -> tuple[Array, Array]:
        first = _first_row(space, is_split)
        distances, indices = _least(
            space, own, first, lambda block: distance(query, block), num_neighbors
        )
        return _best_of_all(distances, indices, num_neighbors, is_split)

    return _mapped(find, QUERIES_BY_DIFFERENCE, mesh)
