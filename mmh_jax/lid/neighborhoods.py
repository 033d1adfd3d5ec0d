"""Every point's neighbourhood, once: what the estimators that read directions are mapped over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmh_jax.lid.points import rounded, rounding_offset
from mmh_jax.mapping import Progress, over_points
from mmh_jax.typing import Array, ArrayLike

__all__ = ["check_distances", "check_offsets", "over_neighborhoods"]

# A chunk's neighbours hold at most so many numbers.
_CHUNK = 2**21


def over_neighborhoods(
    estimator: Callable[[Array], Any],
    *,
    chunk_size: int | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """Map an estimator of offsets, such as `ess`, over the neighbourhoods of many points.

    Args:
        estimator: takes the neighbours of one point minus that point, (k, D).
        chunk_size: points at a time on each device; by default as many as make 2^21 numbers, at
            most 256.
        progress, mesh: as in `over_points`.

    Returns:
        `mapped(points, indices, queries=points)`, of (N, *shape), (M, k) and (M, *shape), with
        `indices` those of `nearest_neighbors(points, k, queries=queries)`; its results are NumPy
        arrays with a leading axis of M.  Float64 arrays are centred before they are rounded to the
        working precision.

    >>> from mmh_jax import lid
    >>> points = np.random.default_rng(0).normal(size=(300, 2)) @ np.eye(2, 5)
    >>> neighbors = lid.nearest_neighbors(points, 40)
    >>> dimension = over_neighborhoods(lid.ess)(points, neighbors.indices)
    >>> dimension.value.shape, np.mean(dimension.value).round()
    ((300,), np.float32(2.0))
    """

    def at_one(points: Array, index: Array, x: Array) -> Any:
        return estimator(points[index] - x)

    # Kept, so that calls on arrays of one shape compile once.
    mapped: dict[int, Callable[..., Any]] = {}

    def mapped_function(
        points: ArrayLike, indices: ArrayLike, queries: ArrayLike | None = None
    ) -> Any:
        everywhere, indices = np.asarray(points), np.asarray(indices)
        here = everywhere if queries is None else np.asarray(queries)
        if indices.ndim != 2 or len(indices) != len(here):
            raise ValueError(
                f"`indices` has shape {indices.shape}; for {len(here)} points it must be "
                f"({len(here)}, k), as `nearest_neighbors` returns it."
            )
        offset = rounding_offset(everywhere, here)
        everywhere, here = rounded(everywhere, offset), rounded(here, offset)
        numbers = indices.shape[1] * everywhere.shape[1]
        size = chunk_size or int(np.clip(_CHUNK // numbers, 1, 256))
        if size not in mapped:
            mapped[size] = over_points(
                at_one, (None, 0, 0), chunk_size=size, progress=progress, mesh=mesh
            )
        return mapped[size](jax.device_put(everywhere), indices, here)

    return mapped_function


def check_distances(caller: str, distances: ArrayLike, *, ndim: int, least: int) -> Array:
    """Distances (k,) of one point or (N, k) of many, or an error that says what is wrong."""
    distances = jnp.asarray(distances)
    if not jnp.issubdtype(distances.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(distances=...)` has dtype {distances.dtype}; distances are real numbers."
        )
    if distances.ndim != ndim or distances.shape[-1] < least or distances.size == 0:
        wanted = "(k,)" if ndim == 1 else "(N, k)"
        cure = "Ask for more neighbours."
        if distances.ndim != ndim:
            many = f"Did you mean `jax.vmap({caller})`?"
            cure = many if ndim == 1 else "It reads many points at once, one in each row."
        raise ValueError(
            f"`{caller}(distances=...)` has shape {distances.shape}; it takes {wanted} with k of "
            f"at least {least}. {cure}"
        )
    return distances


def check_offsets(caller: str, offsets: ArrayLike, *, least: int) -> Array:
    """Flat neighbours (k, D) of one point, or an error that says what is wrong."""
    offsets = jnp.asarray(offsets)
    if not jnp.issubdtype(offsets.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(offsets=...)` has dtype {offsets.dtype}; coordinates are real numbers."
        )
    if offsets.ndim < 2 or offsets.shape[0] < least or offsets.size == 0:
        raise ValueError(
            f"`{caller}(offsets=...)` has shape {offsets.shape}; it takes the neighbours of one "
            f"point, (k, *shape) with k of at least {least}."
        )
    return offsets.reshape(len(offsets), -1)
