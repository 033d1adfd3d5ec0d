r"""The search behind `nearest_neighbors`: one part of the points, in blocks, by filter and refine.

The fast formula for a block of squared distances,

    |q - p|^2 = |q|^2 + |p|^2 - 2 q.p,

cancels: in float32 its error is about 1e-7 (|q|^2 + |p|^2), in which the distance of a close pair
drowns.  Hence *filter and refine*.  With c a bound on the relative error of the formula,

    lower(q, p) = (1 - c) (|q|^2 + |p|^2) - 2 q.p - e  <=  |q - p|^2,   c = 4 (2 + sqrt(D)) eps,

with e = 4 D times the least normal number, since smaller products are taken for 0,
the points with the least `lower` are kept, block by block, a few more than the k asked for.  Their
distances are taken by difference, which does not cancel and gives exactly 0 for duplicates and for
nothing else.  Where the k-th of these lies below the last `lower` that was kept, no other point can
be nearer: the answer is proved.  The queries for which it is not (in tight clusters far apart, or
with more duplicates than were kept) are searched again, by difference over all points.

The bound c is the probabilistic one of Higham & Mary (2019), four times the root of the number of
terms; up to D = 16 it is the worst case.

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
    """

    blocks: Any
    num_points: Any
    centre: Any
    scale: Any


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
    recall: float | None = None,
) -> tuple[Array, Array]:
    """The points with the least `measure(block)`, in ascending order; by index among equals.

    `first` is the index of the first row here.  Where fewer than `num_kept` are possible, the rest
    is infinite.  With a `recall`, of each block so large a share of the least is found.
    """
    num_blocks, rows, _ = space.blocks.shape

    def exactly(values: Array) -> tuple[Array, Array]:
        negative, place = jax.lax.top_k(-values, num_kept)
        return -negative, place

    def nearly(values: Array) -> tuple[Array, Array]:
        assert recall is not None  # for the type checker
        least, place = jax.lax.approx_min_k(values, num_kept, recall_target=recall)
        return least, place

    def least_of(values: Array) -> tuple[Array, Array]:
        if recall is None or rows <= num_kept:
            return exactly(values)
        # Elsewhere XLA sorts for it: sixteen times slower than `top_k` on a CPU.
        return jax.lax.platform_dependent(values, tpu=nearly, default=exactly)

    def merge(kept: tuple[Array, Array], block_at: tuple[Array, Array]) -> tuple[Any, None]:
        block, start = block_at
        index = first + start + jnp.arange(rows, dtype=jnp.int32)
        possible = (index != own) & (index < space.num_points)
        values = jnp.concatenate([kept[0], jnp.where(possible, measure(block), jnp.inf)])
        # `top_k` prefers the earlier among equals, and what was kept has the smaller indices.
        least, place = least_of(values)
        return (least, jnp.concatenate([kept[1], index])[place]), None

    dtype = space.blocks.dtype
    nothing = jnp.full(num_kept, jnp.inf, dtype), jnp.zeros(num_kept, jnp.int32)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * rows
    return jax.lax.scan(merge, nothing, (space.blocks, starts))[0]


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
        specs = [Space(PartitionSpec(POINTS_AXIS), whole, whole, whole)]
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
        dim, eps = query.shape[0], jnp.finfo(query.dtype).eps
        slack = 4 * (2 + dim**0.5) * float(eps)
        least = 4 * dim * float(jnp.finfo(query.dtype).tiny)
        q = (query - space.centre) * space.scale
        first = _first_row(space, is_split)

        def lower(block: Array) -> Array:
            p = (block - space.centre) * space.scale
            product = jnp.matmul(p, q, precision=jax.lax.Precision.HIGHEST)
            return (1 - slack) * (jnp.sum(p**2, axis=-1) + jnp.sum(q**2)) - 2 * product - least

        bounds, indices = _least(space, own, first, lower, num_kept, recall)
        points = space.blocks.reshape(-1, dim)
        distances = jax.lax.map(
            lambda i: distance(query, points[jnp.maximum(i - first, 0)]), indices, batch_size=8
        )
        distances = jnp.where(jnp.isinf(bounds), jnp.inf, distances)
        distances, indices = _best_of_all(distances, indices, num_neighbors, is_split)
        farthest = (1 + slack) * (distances[-1] * space.scale) ** 2 + least
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
