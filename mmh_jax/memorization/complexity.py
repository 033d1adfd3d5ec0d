r"""Low dimension because it is simple, or because it is memorized?  LID given complexity.

A plain picture has few dimensions without being memorized.  Three corrections compare the LID of a
point with what is usual for its complexity c, a compressed size or the total variation:

    ratio          LID / (8 c), dimensions for each bit (Ross et al. 2025, 2411.00113);
    residual       LID less its regression on c over a reference set, in standard deviations;
    conformal p    the rank of LID among reference points of about the same complexity.

The p-value is exact in finite samples if the point and the reference points are exchangeable, as
draws of one law are that were treated alike: measured by the same model at the same noise level,
none of them used to choose anything.  Held-out data are such a reference for points that are not
memorized; training data are not, if some of them are memorized.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from mmh_jax.typing import ArrayLike

__all__ = [
    "complexity_residual",
    "conformal_p",
    "lid_per_bit",
    "png_bytes",
    "total_variation",
    "zlib_bytes",
]

_CHUNK = 2**22


def png_bytes(images: ArrayLike, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """The size of each image as PNG at the highest compression, (N,) bytes.

    Args:
        images: (N, H, W) grey or (N, H, W, 3) in colour.
        low, high: the values of black and white; what lies beyond is cut off.

    Raises:
        TypeError: if the images are not real numbers.
        ValueError: for other shapes, values that are not finite, or `low` not below `high`.

    >>> noise = np.random.default_rng(0).uniform(size=(16, 16))
    >>> flat, rough = png_bytes(np.stack([np.zeros((16, 16)), noise]))
    >>> bool(flat < rough)
    True
    """
    pixels = _quantised("png_bytes", images, low, high)
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in (1, 3)):
        raise ValueError(
            f"`png_bytes(images=...)` has shape {pixels.shape}; it takes (N, H, W) or "
            "(N, H, W, 3). For other points, `zlib_bytes`."
        )
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]

    def size(image: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", optimize=True)
        return buffer.tell()

    return _of_each(size, pixels)


def zlib_bytes(points: ArrayLike, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """The size of each point, in 256 steps from `low` to `high`, compressed by zlib, (N,) bytes.

    Args:
        points: (N, *shape).
        low, high: the values of 0 and 255; what lies beyond is cut off.

    Raises:
        TypeError, ValueError: as `png_bytes`, but for shapes.

    >>> bool(np.diff(zlib_bytes(np.random.default_rng(0).uniform(0, [[0.0], [1.0]], (2, 64)))) > 0)
    True
    """
    pixels = _quantised("zlib_bytes", points, low, high)
    return _of_each(lambda point: len(zlib.compress(point.tobytes(), 9)), pixels)


def total_variation(images: ArrayLike) -> np.ndarray:
    """The sum of the absolute differences of neighbouring pixels of each image, (N,).

    Args:
        images: (N, H, W) or (N, H, W, C), in data units.

    Raises:
        ValueError: for other shapes.

    >>> total_variation(np.array([[[0.0, 1.0], [0.0, 1.0]]])).tolist()
    [2.0]
    """
    images = np.asarray(images, float)
    if images.ndim not in (3, 4):
        raise ValueError(
            f"`total_variation(images=...)` has shape {images.shape}; it takes (N, H, W) or "
            "(N, H, W, C)."
        )
    axes = tuple(range(1, images.ndim))
    down, across = (np.abs(np.diff(images, axis=axis)).sum(axis=axes) for axis in (1, 2))
    return down + across


def lid_per_bit(lid: ArrayLike, num_bytes: ArrayLike) -> np.ndarray:
    """LID over the bits of the compressed picture, as Ross et al. 2025 normalise it.

    >>> lid_per_bit(np.array([40.0]), np.array([100])).tolist()
    [0.05]
    """
    lid, num_bytes = np.asarray(lid, float), np.asarray(num_bytes)
    if not np.all(num_bytes > 0):
        raise ValueError("`lid_per_bit(num_bytes=...)` must be positive.")
    return lid / (8 * num_bytes)


def complexity_residual(
    lid: ArrayLike,
    complexity: ArrayLike,
    reference_lid: ArrayLike,
    reference_complexity: ArrayLike,
    *,
    degree: int = 1,
) -> np.ndarray:
    """LID less its regression on complexity, in standard deviations of the reference: (M,).

    A polynomial by least squares over the reference, and the standard deviation of what it leaves
    with the degrees of freedom it uses taken off; beyond the range of its complexities the
    regression is continued as a constant, for a polynomial says nothing there.  A reference that
    lies on the polynomial has no spread: the result is then infinite, or 0 for what lies on it too.

    Args:
        lid, complexity: (M,) of the points in question.
        reference_lid, reference_complexity: (N,) of points that are not memorized.
        degree: of the polynomial; less where there are not so many different complexities.

    Raises:
        ValueError: if shapes differ, a value of the reference is not finite, or the reference has
            no more than `degree + 1` points.

    >>> c = np.arange(10.0)
    >>> complexity_residual([0.0], [5.0], 2 * c + (-1) ** c, c).round(1).tolist()
    [-9.1]
    """
    lid, complexity, known, size = _checked(
        "complexity_residual", lid, complexity, reference_lid, reference_complexity
    )
    if degree < 0 or len(known) <= degree + 1:
        raise ValueError(
            f"`complexity_residual(degree={degree})` needs a degree of at least 0 and more than "
            f"{degree + 1} reference points; there are {len(known)}."
        )
    degree = min(degree, len(np.unique(size)) - 1)
    fitted = np.polynomial.Polynomial.fit(size, known, degree)
    spread = np.sqrt(np.sum((known - fitted(size)) ** 2) / (len(known) - degree - 1))
    difference = lid - fitted(np.clip(complexity, size.min(), size.max()))
    rounding = 1e-12 * np.abs(known).max()
    if spread > rounding:
        return difference / spread
    exact = np.where(np.abs(difference) <= rounding, 0.0, np.sign(difference) * np.inf)
    return np.where(np.isnan(difference), np.nan, exact)


def conformal_p(
    lid: ArrayLike,
    complexity: ArrayLike,
    reference_lid: ArrayLike,
    reference_complexity: ArrayLike,
    *,
    num_bins: int = 5,
) -> np.ndarray:
    """The chance of so low a LID among points of the same complexity that are not memorized, (M,).

    Point and reference together are divided into bins by the rank of their complexity, and

        p = (1 + reference points of its bin with a LID as low) / (1 + reference points of its bin).

    Bins and ranks treat the point as one of the reference, so that P(p <= a) <= a for every a and
    in every bin (Mondrian conformal prediction, Vovk et al. 2005, chapter 4.5), if they are
    exchangeable; several p-values share a reference, and are not independent.

    Args:
        lid, complexity: (M,) of the points in question.
        reference_lid, reference_complexity: (N,) of points that are not memorized.
        num_bins: so many, equally filled but for equal complexities.  1: complexity is not used.
            The least p is about `num_bins / N`.  Within a bin complexity still differs: where LID
            depends on it steeply, compare residuals in place of LID, their regression fitted to one
            half of the reference and the other half kept for here.

    Returns:
        p-values; NaN where LID or complexity is.

    Raises:
        ValueError: if shapes differ, a value of the reference is not finite, or there are not ten
            reference points for each bin.

    >>> rng = np.random.default_rng(0)
    >>> c = rng.uniform(size=200)
    >>> conformal_p([1.0, 1.0], [0.1, 0.9], 10 * c + rng.normal(size=200), c).round(2).tolist()
    [0.56, 0.02]
    """
    lid, complexity, known, size = _checked(
        "conformal_p", lid, complexity, reference_lid, reference_complexity
    )
    num = len(known) + 1
    if num_bins < 1 or num - 1 < 10 * num_bins:
        raise ValueError(
            f"`conformal_p(num_bins={num_bins})` must be at least 1, with ten reference points for "
            f"each; there are {num - 1}."
        )
    ordered = np.sort(size)
    below = np.searchsorted(ordered, size)  # of the reference, how many are less complex
    p, rows = np.empty(len(lid)), max(1, _CHUNK // num)
    for start in range(0, len(lid), rows):
        part = slice(start, start + rows)
        own, value = complexity[part, None], lid[part, None]
        # The bin of each reference point once this point is among them.
        bins = num_bins * (below + (own < size)) // num
        same = bins == num_bins * np.searchsorted(ordered, own) // num
        p[part] = (1 + np.sum(same & (known <= value), axis=1)) / (1 + np.sum(same, axis=1))
    # NaN, of a point that could not be measured, is not low.
    return np.where(np.isnan(lid) | np.isnan(complexity), np.nan, p)


def _of_each(size: Callable[[np.ndarray], int], pixels: np.ndarray) -> np.ndarray:
    return np.array([size(image) for image in pixels], int)


def _quantised(caller: str, points: ArrayLike, low: float, high: float) -> np.ndarray:
    """Bytes; those that are bytes already stay."""
    points = np.asarray(points)
    if points.ndim < 2:
        raise ValueError(f"`{caller}` takes several points, an axis of N first: {points.shape}.")
    if points.dtype == np.uint8:
        return points
    if not np.issubdtype(points.dtype, np.floating):
        raise TypeError(f"`{caller}` takes real numbers or bytes, not {points.dtype}.")
    if not low < high:
        raise ValueError(f"`{caller}(low={low}, high={high})`: black must be below white.")
    bad = np.sum(~np.isfinite(points).reshape(len(points), -1).all(axis=1))
    if bad:
        raise ValueError(f"`{caller}`: {bad} of {len(points)} points are not finite.")
    return np.round(255 * np.clip((points - low) / (high - low), 0, 1)).astype(np.uint8)


def _checked(caller: str, *arrays: ArrayLike) -> list[np.ndarray]:
    lid, complexity, known, size = (np.asarray(array, float) for array in arrays)
    for name, one, other in (("", lid, complexity), ("reference_", known, size)):
        if one.ndim != 1 or one.shape != other.shape:
            raise ValueError(
                f"`{caller}({name}lid=..., {name}complexity=...)` have shapes {one.shape} and "
                f"{other.shape}; pass one number of each for every point."
            )
    if not (np.isfinite(known).all() and np.isfinite(size).all()):
        raise ValueError(f"`{caller}(reference_lid=...)` or its complexity is not finite.")
    return [lid, complexity, known, size]
