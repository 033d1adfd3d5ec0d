r"""The diffusion estimator of data in closed form: FLIPD of the exact denoiser of a data set.

With squared distances q_i = |x - x_i|^2 and weights p_i = softmax_i(-q_i / (2 sigma^2)),

    F(x; sigma) = sum_i p_i q_i / sigma^2                            (see `analytic.Empirical`).

At a point of the data set F tends to 0 with sigma: the data are atoms, and that is their dimension.
*Leave-one-out* asks the others: x itself is not among the x_i.  Then F is a kernel estimate of the
dimension of the law the data were drawn from.  For a density that does not change within sigma on a
flat d-dimensional set E q / sigma^2 = d exactly; where no neighbour is within sigma it grows like
r_1^2 / sigma^2.  Between that and the scale on which the density changes lies a plateau, if there
are points enough for one.

F is a ratio of two sums over independent points.  Its standard error is that of such a ratio,
sqrt(sum_i p_i^2 (q_i / sigma^2 - F)^2): right where many points share the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.flipd import Curve
from mmh_jax.lid.points import check_exclude, check_finite, check_points, rounded, rounding_offset
from mmh_jax.mapping import Progress, over_points
from mmh_jax.typing import Array, ArrayLike

__all__ = ["closed_form_curve"]

_ROWS = 256
# A chunk of points against a block of rows holds at most so many numbers.
_CHUNK = 2**22


def closed_form_curve(
    points: ArrayLike,
    sigmas: ArrayLike,
    *,
    queries: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Curve:
    """FLIPD of the empirical distribution at every point, each left out of it in its turn.

    A curve as `flipd_curve` and `spectral_curve` give of a model, and read by the same
    `at_plateau`.  A duplicate of a point stays when the point is left out: at small sigma F is then
    0, the dimension of the atom that two equal points are taken for.

    Cost: N^2 (D + S) operations for N points and S levels, distances by difference.  Memory: the
    data, and blocks of 2^22 numbers.  Runs from the host, not inside `jit`.

    Args:
        points: (N, *shape), N at least 3.
        sigmas: (S,) noise levels in data units, positive and increasing.
        queries: (M, *shape), or None for the points themselves.  Nothing is left out for them
            but by `exclude`.
        exclude: (M,) whole numbers: the row of the points to leave out for each query, as that of a
            query which is one of the points; -1 for none.
        progress: called as `progress(done, total)` after each chunk.

    Returns:
        `Curve`: `sigmas` (S,), and `value`, `stderr` and `residual` (M, S) NumPy arrays.  The
        residual is |x - D(x; sigma)|^2 / sigma^2 of the denoiser of the other points.

    Raises:
        TypeError: if `points` or `queries` are not of a floating dtype.
        ValueError: for fewer than 3 points, shapes that do not agree, NaN or infinite values, noise
            levels that are not positive and increasing, or `exclude` without one row for each.

    >>> plane = np.random.default_rng(0).normal(size=(2000, 2)) @ np.eye(2, 10)
    >>> curve = closed_form_curve(plane, np.geomspace(0.05, 0.5, 8))
    >>> curve.value.shape, np.median(curve.value[:, 3]).round(1)
    ((2000, 8), np.float32(2.0))
    """
    here = _checked("points", points)
    levels = np.asarray(sigmas, np.float64)
    if len(here) < 3:
        raise ValueError(f"`closed_form_curve(points=...)` holds {len(here)}; it takes at least 3.")
    if levels.ndim != 1 or not levels.size or not np.all(np.diff(levels, prepend=0) > 0):
        raise ValueError("`closed_form_curve(sigmas=...)` must be (S,), positive and increasing.")
    own = np.arange(len(here), dtype=np.int32)
    there = here
    if queries is not None:
        there = _checked("queries", queries)
        own = np.full(len(there), -1, np.int32)
    if exclude is not None:
        own = check_exclude("closed_form_curve", exclude, len(there)).astype(np.int32)
    if there.shape[1:] != here.shape[1:]:
        raise ValueError(
            f"`closed_form_curve(queries=...)` holds points of shape {there.shape[1:]}, but "
            f"`points=...` of shape {here.shape[1:]}; they must agree."
        )
    offset = rounding_offset(here, there)
    here, there = rounded(here, offset), rounded(there, offset)
    rows = min(_ROWS, len(here))
    blocks = np.pad(here, [(0, -len(here) % rows), (0, 0)]).reshape(-1, rows, here.shape[1])
    size = int(np.clip(_CHUNK // (rows * here.shape[1]), 1, 256))
    shared = (jax.device_put(blocks), np.int32(len(here)), levels.astype(here.dtype))
    value, stderr, residual = _mapped(size)(*shared, there, own, progress=progress)
    nothing = np.zeros_like(value, int)
    return Curve(levels, value, stderr, residual, nothing, nothing)


def _checked(name: str, points: ArrayLike) -> np.ndarray:
    array = check_points("closed_form_curve", name, points)
    check_finite("closed_form_curve", name, array)
    return array


@functools.lru_cache(maxsize=8)
def _mapped(chunk_size: int) -> Callable[..., Any]:
    return over_points(_at_one, (None, None, None, 0, 0), chunk_size=chunk_size)


def _at_one(
    blocks: Array, num_points: Array, sigmas: Array, x: Array, own: Array
) -> tuple[Array, Array, Array]:
    """Value, error and residual at one point, (S,) each, in one pass over the blocks."""
    rows = blocks.shape[1]

    def update(carry: tuple[Array, ...], block_at: tuple[Array, Array]) -> tuple[Any, None]:
        least, sums, squares, shift = carry
        block, start = block_at
        index = start + jnp.arange(rows, dtype=jnp.int32)
        steps = block - x
        distances = jnp.sum(steps**2, axis=1)
        terms = distances / sigmas[:, None] ** 2
        distances = jnp.where((index < num_points) & (index != own), distances, jnp.inf)
        new_least = jnp.minimum(least, jnp.min(distances))
        # Nothing but left-out points so far: all are infinite.
        base = jnp.where(jnp.isfinite(new_least), new_least, 0)
        # Squares are subtracted, not exponents, as in `analytic.Empirical`.
        keep = jnp.exp((base - least) / (2 * sigmas**2))
        weights = jnp.exp((base - distances) / (2 * sigmas[:, None] ** 2))
        powers = jnp.stack([jnp.ones_like(terms), terms, terms**2])
        return (
            new_least,
            keep * sums + jnp.sum(weights * powers[:2], axis=-1),
            keep**2 * squares + jnp.sum(weights**2 * powers, axis=-1),
            keep[:, None] * shift + jnp.matmul(weights, steps, precision=jax.lax.Precision.HIGHEST),
        ), None

    num_levels, dim = sigmas.shape[0], x.shape[0]
    start = (
        jnp.full((), jnp.inf, x.dtype),
        jnp.zeros((2, num_levels), x.dtype),
        jnp.zeros((3, num_levels), x.dtype),
        jnp.zeros((num_levels, dim), x.dtype),
    )
    starts = jnp.arange(len(blocks), dtype=jnp.int32) * rows
    _, sums, squares, shift = jax.lax.scan(update, start, (blocks, starts))[0]
    value = sums[1] / sums[0]
    spread = squares[2] - 2 * value * squares[1] + value**2 * squares[0]
    stderr = jnp.sqrt(jnp.maximum(spread, 0)) / sums[0]
    return value, stderr, jnp.sum((shift / sums[0][:, None]) ** 2, axis=1) / sigmas**2
