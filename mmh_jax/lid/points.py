"""Points of a data set as the estimators take them: checked, flat, in the working precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax.typing import ArrayLike

__all__ = [
    "centre_of",
    "check_exclude",
    "check_finite",
    "check_points",
    "rounded",
    "rounding_offset",
    "slices_of",
]


def check_points(caller: str, name: str, points: Any) -> np.ndarray:
    """(N, *shape), not copied: a memory-mapped file stays one.

    Raises:
        TypeError: if the dtype is not a floating one.
        ValueError: if there is no point.
    """
    points = np.asarray(points)
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}({name}=...)` has dtype {points.dtype}; points are in real data units. "
            "Convert them, for example `x.astype(float) / 255`."
        )
    if points.ndim == 0 or points.size == 0:
        raise ValueError(
            f"`{caller}({name}=...)` has shape {points.shape}; pass an array (N, *shape) of at "
            "least one point."
        )
    return points


def check_finite(caller: str, name: str, points: np.ndarray, *, first: int = 0) -> None:
    """Raise ValueError for NaN and infinite values; `first` is the number of the first row."""
    flat = points.reshape(len(points), -1)
    bad = np.concatenate([~np.isfinite(flat[part]).all(axis=1) for part in slices_of(flat)])
    if bad.any():
        raise ValueError(
            f"`{caller}({name}=...)` has NaN or infinite values in {bad.sum()} of {len(points)} "
            f"rows, row {first + bad.argmax()} the first; remove these rows."
        )


def slices_of(flat: np.ndarray) -> Iterator[slice]:
    """Of the rows, a few megabytes each."""
    step = max(2**20 // flat[0].size, 1)
    return (slice(start, start + step) for start in range(0, len(flat), step))


def centre_of(points: np.ndarray) -> np.ndarray:
    """(D,) float64 near the middle of the points: medians over at most 1,001 of them.

    Not the mean, which one far outlier moves far from all others.
    """
    flat = points.reshape(len(points), -1)
    some = np.linspace(0, len(flat) - 1, min(len(flat), 1001)).astype(int)
    return np.median(flat[some].astype(np.float64), axis=0)


def rounding_offset(points: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """(D,) what to take off before the points are rounded to the working precision.

    Their centre if one of the arrays is wider: rounding would otherwise cost digits of distances in
    proportion to the place of the points.  Else 0, for nothing is rounded.
    """
    width = max(array.dtype.itemsize for array in (points, *others))
    if width > np.dtype(jnp.result_type(float)).itemsize:
        return centre_of(points)
    return np.zeros(points[0].size)


def rounded(points: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(N, D) in the working precision, less the offset; a few rows at a time."""
    flat = points.reshape(len(points), -1)
    result = np.empty(flat.shape, jnp.result_type(float))
    shifted = bool(offset.any())
    for part in slices_of(flat):
        result[part] = flat[part] - offset if shifted else flat[part]
    return result


def check_exclude(caller: str, exclude: ArrayLike, num: int) -> np.ndarray:
    """(num,) the row that is not to be found for each query, -1 for none.

    Raises:
        ValueError: if there is not one whole number for each query.
    """
    own = np.asarray(exclude)
    if own.shape != (num,) or not np.issubdtype(own.dtype, np.integer):
        raise ValueError(
            f"`{caller}(exclude=...)` has shape {own.shape} and dtype {own.dtype}; it takes one "
            f"row number, or -1, for each of the {num} queries."
        )
    return own.astype(np.int64)
