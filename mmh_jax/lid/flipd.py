r"""FLIPD: local intrinsic dimension from one noise level of a denoiser.

How the density of the noised data at x changes with the noise tells the dimension: a d-dimensional
cloud smoothed at sigma has log rho_sigma(x) = const + (d - D) log sigma.  Hence, with Tweedie,

    F(x; sigma) = D + d log rho_sigma(x) / d log sigma
                = tr dD/dx (x; sigma) + |x - D(x; sigma)|^2 / sigma^2     ->  LID(x)  as sigma -> 0,

the same for every schedule and parametrisation (Kamkari et al., NeurIPS 2024, 2406.03537, there for
VP).  On a smooth manifold the bias is first order in sigma^2.  Off the model's manifold the second
term grows like distance^2 / sigma^2: it is then no dimension but the news that x is not on it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.typing import Array, ArrayLike, Denoiser, Estimate, Key, check_point

__all__ = ["Curve", "flipd", "flipd_curve"]


class Curve(NamedTuple):
    """A dimension as a function of the noise level; each field has the shape of `sigmas`."""

    sigmas: Array
    value: Array
    stderr: Array


def flipd(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
) -> Estimate:
    """FLIPD at one point and one noise level.

    Args:
        denoiser: the model.
        x: one point, of any shape; many with `jax.vmap` or `mapping.over_points`.
        sigma: the noise level, in data units.
        trace: how to take the trace of dD/dx.  `linalg.exact()` for an exact denoiser or a small
            dimension; `linalg.positive_exact()` for a trained network (projected FLIPD: the trace
            of the positive part, which no network error can drive below 0); `linalg.rademacher(K)`
            or `linalg.xtrace(m)` in large dimension.
        key: for a stochastic trace.

    Returns:
        `Estimate(value, stderr)`; `stderr` is that of the trace (0 if deterministic) and does not
        contain the bias in sigma, nor the network's error.

    Cost: one network evaluation and its linearisation, plus the products of the trace strategy.
    Differentiable in x, sigma and the denoiser's parameters.

    Raises:
        TypeError: for an integer `x`, or a stochastic trace without a key.
        ValueError: if `x` has not the denoiser's shape, or sigma is not positive.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])     # a wide Gaussian on an axis
    >>> flipd(line, jnp.array([0.3, 0.0, 0.0]), 0.1)
    Estimate(value=Array(1., dtype=float32), stderr=Array(0., dtype=float32))
    """
    x, sigma = check_point("flipd", denoiser, x, sigma)
    denoised, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
    dimension = trace(matvec, x, key=key)
    return Estimate(dimension.value + squared_residual(x, denoised, sigma), dimension.stderr)


def squared_residual(x: Array, denoised: Array, sigma: Array) -> Array:
    """|x - D(x; sigma)|^2 / sigma^2; divided first, so that a tiny sigma does not underflow."""
    return jnp.sum(((x - denoised) / sigma) ** 2)


def flipd_curve(
    denoiser: Denoiser,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008
    key: Key | None = None,
) -> Curve:
    """FLIPD at a grid of noise levels, with the same random probes at each.

    Common probes make the curve smooth: differences between neighbouring noise levels carry far
    less noise than the values.

    Args:
        denoiser: the model.
        x: one point.
        sigmas: (S,) noise levels in data units.
        trace: as in `flipd`.
        key: for a stochastic trace.

    Returns:
        `Curve(sigmas, value, stderr)`, each (S,).

    Cost: S times that of `flipd`; memory that of one noise level.

    >>> ball = lambda x, sigma: x / (1 + sigma**2)              # a standard Gaussian in the plane
    >>> curve = flipd_curve(ball, jnp.zeros(2), jnp.array([0.5, 1.0]))
    >>> [round(float(value), 3) for value in curve.value]     # 2 / (1 + sigma^2)
    [1.6, 1.0]
    """
    x, sigmas = check_point("flipd_curve", denoiser, x, sigmas)
    if sigmas.ndim != 1:
        raise ValueError(
            f"`flipd_curve(sigmas=...)` has shape {sigmas.shape}; "
            "it takes a vector of noise levels."
        )
    value, stderr = jax.lax.map(
        lambda sigma: flipd(denoiser, x, sigma, trace=trace, key=key), sigmas
    )
    return Curve(sigmas, value, stderr)
