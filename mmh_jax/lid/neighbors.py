r"""Nearest neighbours, the input of the estimators that read data.

The matrix of all distances does not fit; nor, perhaps, do the points.  They are read in *parts*, of
a memory-mapped file or of an iterator, and each part is searched in blocks (`neighbor_search`, with
the mathematics); the best of all parts so far are kept.  Every answer is exact: distances are taken
by difference, and no nearer point is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmh_jax.lid.approximate_search import NNDescent, Search
from mmh_jax.lid.neighbor_search import (
    POINTS_AXIS,
    by_difference,
    by_filter,
    distance,
    farthest_coordinate,
    space_of,
    with_sides,
)
from mmh_jax.lid.points import (
    centre_of,
    check_exclude,
    check_finite,
    check_points,
    rounded,
    rounding_offset,
)
from mmh_jax.mapping import Progress, over_points
from mmh_jax.typing import Array, ArrayLike

__all__ = ["Neighbors", "nearest_neighbors"]

_CALLER = "nearest_neighbors"
# Numbers in a part of the points: 128 MiB in float32.
_PART = 2**25
# Rows of points in a block, for each query in a matrix product, and blocks in one product.
_ROWS_PER_QUERY = 4
_BLOCKS = 5


class Neighbors(NamedTuple):
    """The k nearest points of each of M queries, nearest first.

    Attributes:
        distances: (M, k), ascending.
        indices: (M, k) integers, rows of the points that were searched.
    """

    distances: Any
    indices: Any


def nearest_neighbors(
    points: ArrayLike | Iterable[ArrayLike],
    num_neighbors: int,
    *,
    queries: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    block_size: int = 512,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    search: Search | None = None,
) -> Neighbors:
    """The `num_neighbors` nearest points of every query by Euclidean distance, exactly.

    Without `queries` they are the points themselves, and a point is not its own neighbour; a
    duplicate of it is, at distance exactly 0.  Among equal distances the smaller index comes first.
    XLA takes subnormal numbers for 0: coordinates closer than 1.2e-38 in float32 count as equal.
    Float64 arrays are centred before they are rounded to float32, unless JAX is in 64-bit mode.

    Cost: M N D multiplications, in matrix products, and a selection.  Memory: the queries, 2^25
    numbers of the points a few times over, and products of `block_size` queries with twenty times
    as many points.  Runs from the host, not inside `jit`.

    Args:
        points: (N, *shape); an array, a memory-mapped one (`np.load(path, mmap_mode="r")`), of
            which a part is in memory at a time, or an iterable of such arrays, read once.
        num_neighbors: k, at most N - 1; at most N if there are `queries` and nothing to exclude.
        queries: (M, *shape), or None; they must be given if `points` is an iterable.
        exclude: (M,) whole numbers: the row of the points that is not to be found for each query,
            as that of a query which is one of the points; -1 for none.
        block_size: queries in one matrix product.
        progress: called as `progress(done, total)` after each block of queries, in queries times
            parts; `total` is 0 for an iterable, whose length is not known.
        mesh: devices.  The queries are spread over all axes of the mesh but one named `points`;
            over this one, if there is one, the points.
        search: None for the exact one; `approximate(recall)` or `nn_descent()` may miss some of the
            neighbours.  Their distances are exact in each case.

    Returns:
        `Neighbors` of NumPy arrays.

    Raises:
        TypeError: if `points` or `queries` are not of a floating dtype.
        ValueError: if points and queries differ in shape, if `num_neighbors` is not between 1 and
            the number of possible neighbours, if a value is NaN or infinite, or if `nn_descent()`
            is asked to search an iterable or on a mesh.

    >>> line = np.array([[0.0], [1.0], [3.0], [3.0]])
    >>> nearest_neighbors(line, 2).indices
    array([[1, 2], [0, 2], [3, 1], [2, 1]], dtype=int32)
    >>> nearest_neighbors(line, 1, queries=np.array([[2.5]])).distances
    array([[0.5]], dtype=float32)
    >>> nearest_neighbors(iter([line, line + 9]), 1, queries=np.array([[9.2]])).indices
    array([[4]], dtype=int32)
    """
    _check_size("num_neighbors", num_neighbors)
    _check_size("block_size", block_size)
    whole = None if _is_in_parts(points) else _checked("points", points)
    if queries is None and whole is None:
        raise ValueError(
            "`nearest_neighbors(points=...)` is an iterable; pass `queries=`, or an array."
        )
    asked: Any = whole if queries is None else _checked("queries", queries)
    check_finite(_CALLER, "points" if queries is None else "queries", asked)
    own = _excluded(exclude, len(asked), are_points=queries is None)
    if isinstance(search, NNDescent):
        if whole is None or mesh is not None:
            raise ValueError(
                "`nearest_neighbors(search=nn_descent())` takes an array of points and no mesh; "
                "for an iterable or on a mesh use `approximate()`."
            )
        _check_shape(whole.shape[1:], asked)
        _check_enough(num_neighbors, len(whole), own)
        check_finite(_CALLER, "points", whole)
        return _by_graph(search, whole, asked, own, num_neighbors)
    recall = None if search is None else search.recall
    state = _Search(asked, own, num_neighbors, block_size, mesh, recall)
    if whole is None:
        num_parts, parts = 0, (_checked("points", part) for part in cast("Iterable[Any]", points))
        state.prepare(asked, num_rows=0)
    else:
        _check_shape(whole.shape[1:], asked)
        _check_enough(num_neighbors, len(whole), own)
        num_parts = -(-len(whole) // max(_PART // max(whole[0].size, 1), 1))
        rows = -(-len(whole) // num_parts)  # of equal length
        parts = (whole[start : start + rows] for start in range(0, len(whole), rows))
        state.prepare(whole, num_rows=min(rows, len(whole)))
    num_points = 0
    for number, part in enumerate(parts):
        _check_shape(part.shape[1:], asked)
        if queries is not None:
            check_finite(_CALLER, "points", part, first=num_points)
        state.add(part, num_points, _shifted(progress, number, num_parts, len(asked)))
        num_points += len(part)
    _check_enough(num_neighbors, num_points, own)
    return Neighbors(state.distances, state.indices)


class _Search:
    """The nearest of the parts so far."""

    def __init__(
        self,
        queries: np.ndarray,
        own: np.ndarray,
        num_neighbors: int,
        block_size: int,
        mesh: Mesh | None,
        recall: float | None,
    ):
        self.asked, self.own, self.recall = queries, own, recall
        self.num_neighbors, self.block_size, self.mesh = num_neighbors, block_size, mesh
        self.distances = np.full((len(queries), num_neighbors), np.inf, jnp.result_type(float))
        self.indices = np.zeros((len(queries), num_neighbors), np.int32)

    def prepare(self, points: np.ndarray, *, num_rows: int) -> None:
        """Bring the queries into the working precision.

        Args:
            points: all of them, or the queries where they are not known yet.
            num_rows: of the largest part; 0 if it is not known.
        """
        self.offset = rounding_offset(points, self.asked)
        self.centre = centre_of(points) - self.offset
        self.queries = rounded(self.asked, self.offset)
        self.farthest = farthest_coordinate(self.queries, self.centre)
        self.num_rows = num_rows

    def add(self, part: np.ndarray, first: int, progress: Progress | None) -> None:
        """Search one part, whose first row has the index `first`."""
        # All parts of an array have the blocks of the largest, so that one program serves all.
        num_rows = max(self.num_rows, len(part))
        splits = 1 if self.mesh is None else self.mesh.shape.get(POINTS_AXIS, 1)
        rows, num_blocks, merged = self._layout(num_rows, splits)
        space = space_of(rounded(part, self.offset), self.centre, rows, num_blocks, self.farthest)
        space = with_sides(space, merged)
        if self.mesh is None:
            space = jax.device_put(space)
        own = (self.own - first).clip(-1, len(part)).astype(np.int32)
        k = self.num_neighbors
        find: Callable[..., Any] = by_filter(
            k, k + k // 8 + 16, self.block_size, self.mesh, self.recall
        )
        distances, indices, proved = find(space, self.queries, own, progress=progress)
        again = np.flatnonzero(~proved)
        if len(again):
            find = by_difference(k, self.mesh)
            distances[again], indices[again] = find(space, self.queries[again], own[again])
        self._keep(distances, indices + np.int32(first))

    def _layout(self, num_rows: int, splits: int) -> tuple[int, int, int]:
        """Rows of a block, blocks, and how many of them are in one product."""
        limit = _ROWS_PER_QUERY * self.block_size
        num_blocks = -(-num_rows // (limit * splits))  # on each device
        merged = min(_BLOCKS, num_blocks)
        num_blocks = -(-num_blocks // merged) * merged * splits
        rows = -(-num_rows // num_blocks)
        if self.num_rows == 0:  # parts of any length: few programs for them
            rows = min(limit, 1 << (rows - 1).bit_length())
        return -(-rows // 8) * 8, num_blocks, merged

    def _keep(self, distances: np.ndarray, indices: np.ndarray) -> None:
        distances = np.concatenate([self.distances, distances], axis=1)
        indices = np.concatenate([self.indices, indices], axis=1)
        order = np.lexsort((indices, distances), axis=1)[:, : self.num_neighbors]
        self.distances = np.take_along_axis(distances, order, axis=1)
        self.indices = np.take_along_axis(indices, order, axis=1)


def _by_graph(
    search: NNDescent, points: np.ndarray, queries: np.ndarray, own: np.ndarray, k: int
) -> Neighbors:
    """The candidates that the graph has, their distances by difference.

    A query for which it has too few is searched exactly.
    """
    offset = rounding_offset(points, queries)
    flat, asked = rounded(points, offset), rounded(queries, offset)
    candidates = search.candidates(flat, None if queries is points else asked, k + 1)
    candidates = np.where(candidates == own[:, None], -1, candidates).astype(np.int32)
    mapped = over_points(_distances_of, (None, 0, 0), chunk_size=256)
    distances, indices = mapped(flat, asked, candidates)
    short = np.flatnonzero(np.isinf(distances[:, k - 1]))
    if len(short):
        exact = nearest_neighbors(points, k, queries=queries[short], exclude=own[short])
        distances[short, :k], indices[short, :k] = exact
    return Neighbors(distances[:, :k], indices[:, :k])


def _distances_of(points: Array, query: Array, candidates: Array) -> tuple[Array, Array]:
    """In ascending order; infinite where there is no candidate (-1)."""
    found = distance(query, points[jnp.maximum(candidates, 0)])
    found = jnp.where(candidates < 0, jnp.inf, found)
    distances, indices = jax.lax.sort((found, candidates), num_keys=2)
    return distances, indices


def _shifted(progress: Progress | None, number: int, num_parts: int, num: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(number * num + done, num_parts * num)


def _is_in_parts(points: Any) -> bool:
    """Whether it is an iterator, or a list or tuple of arrays each of which holds points."""
    if hasattr(points, "shape"):
        return False
    return isinstance(points, Iterator) or any(getattr(part, "ndim", 0) > 1 for part in points)


def _checked(name: str, points: Any) -> np.ndarray:
    return check_points(_CALLER, name, points)


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`nearest_neighbors({name}={value!r})` must be an integer of at least 1.")


def _check_shape(shape: tuple[int, ...], queries: np.ndarray) -> None:
    if queries.shape[1:] != shape:
        raise ValueError(
            f"`nearest_neighbors(queries=...)` holds points of shape {queries.shape[1:]}, but "
            f"`points=...` of shape {shape}; they must agree."
        )


def _check_enough(num_neighbors: int, num_points: int, own: np.ndarray) -> None:
    possible = num_points - bool(np.any((own >= 0) & (own < num_points)))
    if num_neighbors > possible:
        raise ValueError(
            f"`nearest_neighbors(num_neighbors={num_neighbors})` exceeds the {possible} points "
            "that can be neighbours; ask for fewer, or pass more points."
        )


def _excluded(exclude: ArrayLike | None, num: int, *, are_points: bool) -> np.ndarray:
    """(M,) the row that is not to be found for each query, or -1."""
    if exclude is None:
        return np.arange(num) if are_points else np.full(num, -1)
    return check_exclude(_CALLER, exclude, num)
