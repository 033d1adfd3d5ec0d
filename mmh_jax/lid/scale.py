r"""Choosing the noise level without knowing the answer.

FLIPD converges to the dimension as sigma -> 0, but a trained network is wrong at noise levels below
its resolution, and at large ones the data's own extent and curvature enter.  Between the two the
curve sigma -> F is flat: dF / d log sigma = 0 is what a dimension looks like.  The rule here takes
one noise level for a whole set of points: where the mean absolute slope in log sigma, relative to
the mean value, is least.  It reads no label and no ground truth.
"""

from __future__ import annotations

import numpy as np

from mmh_jax.typing import ArrayLike

__all__ = ["choose_scale", "relative_slope"]


def relative_slope(sigmas: ArrayLike, values: ArrayLike) -> np.ndarray:
    """mean_x |dF / d log sigma| / mean_x F at each noise level.

    Args:
        sigmas: (S,) increasing noise levels, at least 3.
        values: (N, S) FLIPD of N points on that grid.

    Returns:
        (S,): central differences inside, one-sided at the two ends; infinite where the mean value
        is not positive, or where a value is not finite.

    Raises:
        ValueError: if the shapes do not fit or `sigmas` does not increase.
    """
    sigmas, values = np.asarray(sigmas, np.float64), np.asarray(values, np.float64)
    if values.ndim != 2 or sigmas.ndim != 1 or values.shape[1] != sigmas.size or sigmas.size < 3:
        raise ValueError(
            f"`sigmas` has shape {sigmas.shape} and `values` {values.shape}; "
            "they must be (S,) and (N, S) with S at least 3."
        )
    if not (np.all(sigmas > 0) and np.all(np.diff(sigmas) > 0)):
        raise ValueError("`sigmas` must be positive and increasing.")
    slope = np.abs(np.gradient(values, np.log(sigmas), axis=1)).mean(axis=0)
    mean = values.mean(axis=0)
    good = np.isfinite(slope) & (mean > 0)
    return np.where(good, slope / np.where(good, mean, 1.0), np.inf)


def choose_scale(sigmas: ArrayLike, values: ArrayLike, *, ambient_dim: int | None = None) -> int:
    """The index of the noise level at which the FLIPD curves of these points are flattest.

    Only interior noise levels are chosen, so that both neighbours are there to tell how much the
    value moves.  Give a grid that ends below the spread of the data: far above it F falls to 0 and
    is flat again.

    Args:
        sigmas: (S,) increasing noise levels, at least 3.
        values: (N, S) FLIPD of N points on that grid; projected FLIPD for a trained network.
        ambient_dim: D, to pass over the noise levels at which the mean exceeds .95 D, unless all
            do.  A network that has learned nothing at a small sigma returns x itself; its FLIPD is
            D there, and perfectly flat.

    Raises:
        ValueError: as `relative_slope`; or if the curves are nowhere positive and finite.

    >>> choose_scale([0.1, 0.2, 0.4, 0.8], [[3.0, 2.1, 2.0, 1.0]])
    1
    """
    inner = relative_slope(sigmas, values)[1:-1]
    if ambient_dim is not None:
        informative = np.mean(np.asarray(values), axis=0)[1:-1] <= 0.95 * ambient_dim
        if np.any(informative & np.isfinite(inner)):
            inner = np.where(informative, inner, np.inf)
    if not np.isfinite(inner).any():
        raise ValueError(
            "no noise level has finite, positive mean FLIPD; the model is untrained on this range, "
            "or the points are far from its data."
        )
    return int(np.argmin(inner)) + 1
