r"""Where a model has fewer dimensions than another: differences of curvature, point and map.

With J = dD/dx the Jacobian of a denoiser, H = (J - I) / sigma^2 that of its score, and a baseline,

    curvature map          diag(J_base - J) = sigma^2 [diag(-H) - diag(-H_base)]
    curvature difference   tr(J_base - J), the sum of the map
    squared difference     (D_base - D)^2 / sigma^2 = sigma^2 (s - s_base)^2, per coordinate

The trace of J counts dimensions, softly: the curvature difference says how many the model has lost
against the baseline, and the map where.  The baseline is the model without its condition, or an
early state of its training, when it had not memorized yet.  The squared difference is a surrogate
without derivatives.
"""

from __future__ import annotations

import jax

from mmh_jax import linalg
from mmh_jax.memorization.conditional import noise_difference
from mmh_jax.typing import (
    Array,
    ArrayLike,
    ChiSquareEstimate,
    Denoiser,
    Estimate,
    Key,
    Matvec,
    check_point,
)

__all__ = ["curvature_difference", "curvature_map", "squared_difference"]


def curvature_map(
    denoiser: Denoiser,
    baseline: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    diagonal: linalg.Diagonal = linalg.rademacher_diagonal(16),  # noqa: B008 (a frozen value)
    key: Key | None = None,
) -> Estimate:
    """diag(J_base - J) of one point: an image of where dimensions are missing.

    Args:
        denoiser: the model, with its condition if it has one.
        baseline: what it is compared with: without the condition, or of an early checkpoint.
        x: one point.
        sigma: a noise level, in data units.
        diagonal: `linalg.rademacher_diagonal(K)` or `linalg.exact_diagonal()`.
        key: for a stochastic diagonal.

    Returns:
        Value and standard error, of the shape of `x`.

    Cost: 2 evaluations, and of each model as many JVPs as the strategy takes products.

    Raises:
        TypeError: for an integer `x`, or a stochastic diagonal without a key.
        ValueError: if `x` has not the denoiser's shape, an answer has not that of `x`, or sigma is
            not positive.

    >>> import jax.numpy as jnp
    >>> narrow, wide = (lambda x, sigma: x / jnp.array([1, 2, 4])), (lambda x, sigma: x)
    >>> curvature_map(narrow, wide, jnp.ones(3), 0.5, diagonal=linalg.exact_diagonal()).value
    Array([0.  , 0.5 , 0.75], dtype=float32)
    """
    x, sigma = check_point("curvature_map", denoiser, x, sigma)
    return diagonal(_lost(denoiser, baseline, x, sigma), x, key=key)


def curvature_difference(
    denoiser: Denoiser,
    baseline: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    trace: linalg.Trace = linalg.rademacher(16),  # noqa: B008
    key: Key | None = None,
) -> ChiSquareEstimate | Estimate:
    """tr(J_base - J): how many dimensions fewer than the baseline, softly counted.

    Args:
        denoiser, baseline, x, sigma: as for `curvature_map`.
        trace: any linear strategy; a positive one would project the difference, which has no sign.
        key: for a stochastic trace.

    Cost, errors: as `curvature_map`.

    >>> import jax.numpy as jnp
    >>> narrow, wide = (lambda x, sigma: x / 4), (lambda x, sigma: x)
    >>> curvature_difference(narrow, wide, jnp.ones(8), 0.5, trace=linalg.exact()).value
    Array(6., dtype=float32)
    """
    x, sigma = check_point("curvature_difference", denoiser, x, sigma)
    if not getattr(trace, "is_linear", True):
        raise ValueError(
            "`curvature_difference(trace=...)` projects on the positive part; a difference has no "
            "sign. Choose `linalg.exact()`, `rademacher(K)` or `hutchpp(m)`."
        )
    return trace(_lost(denoiser, baseline, x, sigma), x, key=key)


def squared_difference(
    denoiser: Denoiser, baseline: Denoiser, x: ArrayLike, sigma: ArrayLike
) -> Array:
    """(D_base - D)^2 / sigma^2 per coordinate, the surrogate of `curvature_map` without derivative.

    Its sum is the squared CFG norm, where the baseline is the model without its condition.

    Args:
        denoiser, baseline, x, sigma: as for `curvature_map`.

    Cost: 2 evaluations.  Errors: as `curvature_map`.

    >>> import jax.numpy as jnp
    >>> squared_difference(lambda x, s: x, lambda x, s: 0 * x, jnp.array([1.0, 2.0]), 0.5)
    Array([ 4., 16.], dtype=float32)
    """
    x, sigma = check_point("squared_difference", denoiser, x, sigma)
    return noise_difference(denoiser, baseline, x, sigma) ** 2


def _lost(denoiser: Denoiser, baseline: Denoiser, x: Array, sigma: Array) -> Matvec:
    """Products with J_base - J; all that depends on x is inside the differentiated function."""

    def difference(point: Array) -> Array:
        return sigma * noise_difference(baseline, denoiser, point, sigma)

    return jax.linearize(difference, x)[1]
