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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.denoise import is_guided, outside_training
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, Matvec, check_answer, check_point

__all__ = ["Curve", "Flipd", "flipd", "flipd_curve", "residual_bound"]


def residual_bound(trace: ArrayLike) -> Array:
    """What |x - D|^2 / sigma^2 hardly exceeds at a point of the model, given the trace of dD/dx.

    For a Gaussian with Jacobian eigenvalues g_i the residual at a point of it is sum g_i (1 - g_i)
    z_i^2, z standard normal.  If all g_i exceed 3/4, that is, sigma is below .58 of all scales, its
    mean is at most tr/4 and its variance at most tr/8.  The bound is three standard deviations
    above, and one half more, the dimension by which FLIPD is then off.  At a larger sigma points of
    the model may exceed it: 7% of them for 8 equal scales at sigma = scale, where the mean is tr/2.

    >>> residual_bound(jnp.array([0.0, 8.0]))
    Array([0.5, 5.5], dtype=float32)
    """
    positive = jnp.maximum(jnp.asarray(trace), 0)
    return positive / 4 + 3 * jnp.sqrt(positive / 8) + 0.5


class Flipd(NamedTuple):
    """FLIPD, and what says whether to believe it.

    Attributes:
        value: the dimension.
        stderr: its standard error, of the random probes (0 if there are none) and of the bias, half
            the slope dF / d log sigma, in quadrature.
        residual: |x - D(x; sigma)|^2 / sigma^2, the part of the value that is not the trace.
        guided: 1 if the field is classifier-free-guided, and so in general no density's; else 0.
        outside_training: 1 if sigma is outside the range of the training, where a network says
            nothing; 0 if it is inside, or the range is not known.
        dispersion: how the probes' variance grows with the dimension (`ChiSquareEstimate`).
    """

    value: Any
    stderr: Any
    residual: Any
    guided: Any = 0
    outside_training: Any = 0
    dispersion: Any = 0

    @property
    def trace(self) -> Array:
        """The trace of dD/dx; far off the manifold, where the residual is huge, to its rounding."""
        return self.value - self.residual

    @property
    def off_manifold(self) -> Array:
        """Whether x is not on the model's manifold (see `residual_bound`): no dimension then."""
        return self.residual > residual_bound(self.trace)

    @property
    def negative(self) -> Array:
        """Whether the value is below 0 by more than two standard errors: network error."""
        return self.value < -2 * self.stderr - 1e-3


class Curve(NamedTuple):
    """A dimension as a function of the noise level; each field has the shape of `sigmas`.

    Attributes:
        sigmas: (S,) noise levels, in data units.
        value: (S,) the dimension at each.
        stderr: (S,) its standard error; the bias, which the curve itself shows, is not in it.
        residual: (S,) |x - D(x; sigma)|^2 / sigma^2.
        guided: (S,) whether the field is guided, as in `Flipd`.
        outside_training: (S,) whether the level is outside the trained range, as in `Flipd`.
        dispersion: (S,) how the variance grows with the dimension, as in `Flipd`.
    """

    sigmas: Any
    value: Any
    stderr: Any
    residual: Any
    guided: Any = 0
    outside_training: Any = 0
    dispersion: Any = 0


def flipd(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
) -> Flipd:
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
        `Flipd`; its `stderr` does not contain the network's error (for that see
        `Spectrum.network_error`).  `.off_manifold` says whether the value is a dimension at all.

    Cost: one network evaluation and its linearisation, plus the products of the trace strategy; and
    about as much again for the derivative in sigma, which `jit` leaves out where `stderr` is not
    used.  Bias: where it is proportional to sigma^2, half the slope, which is in `stderr`.
    Differentiable in x, sigma and the denoiser's parameters.

    Raises:
        TypeError: for an integer `x`, or a stochastic trace without a key.
        ValueError: if `x` has not the denoiser's shape, or sigma is not positive.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])     # a wide Gaussian on an axis
    >>> result = flipd(line, jnp.array([0.3, 0.0, 0.0]), 0.1)
    >>> result.value, result.stderr, bool(result.off_manifold)
    (Array(1., dtype=float32), Array(0., dtype=float32), False)
    >>> off = flipd(line, jnp.array([0.3, 0.2, 0.0]), 0.1)    # two sigma off the line
    >>> off.value, bool(off.off_manifold)
    (Array(5., dtype=float32), True)
    """
    x, sigma = check_point("flipd", denoiser, x, sigma)

    def at(level: Array) -> tuple[Array, Flipd]:
        found = flipd_at(denoiser, x, level, trace=trace, key=key)
        return found.value, found

    _, slope, found = jax.jvp(at, (sigma,), (sigma,), has_aux=True)  # d / d log sigma
    bias = jax.lax.stop_gradient(slope / 2)
    return found._replace(stderr=safe_sqrt(found.stderr**2 + bias**2))


def flipd_at(
    denoiser: Denoiser, x: Array, sigma: Array, *, trace: linalg.Trace, key: Key | None
) -> Flipd:
    """FLIPD with the error of the probes alone, for what compares levels or models."""
    denoised, matvec = linearized("flipd", denoiser, x, sigma)
    dimension = trace(matvec, x, key=key)
    residual = squared_residual(x, denoised, sigma)
    return Flipd(
        dimension.value + residual,
        dimension.stderr,
        residual,
        jnp.asarray(is_guided(denoiser), int),
        outside_training(denoiser, sigma),
        jnp.asarray(getattr(dimension, "dispersion", 0), residual.dtype),
    )


def linearized(caller: str, denoiser: Denoiser, x: Array, sigma: Array) -> tuple[Array, Matvec]:
    """D(x; sigma), and products with its Jacobian.

    Raises:
        ValueError: if the denoiser's answer has not the shape of `x`.
    """
    denoised, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
    check_answer(caller, denoised, x)
    return denoised, matvec


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
        `Curve`, its fields (S,) each.

    Cost: S times that of `flipd`; memory that of one noise level.

    >>> ball = lambda x, sigma: x / (1 + sigma**2)              # a standard Gaussian in the plane
    >>> curve = flipd_curve(ball, jnp.zeros(2), jnp.array([0.5, 1.0]))
    >>> [round(float(value), 3) for value in curve.value]     # 2 / (1 + sigma^2)
    [1.6, 1.0]
    """
    x, sigmas = check_point("flipd_curve", denoiser, x, sigmas, levels=1)
    return Curve(
        sigmas,
        *jax.lax.map(lambda sigma: flipd_at(denoiser, x, sigma, trace=trace, key=key), sigmas),
    )
