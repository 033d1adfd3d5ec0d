r"""What several noise levels say together: extrapolation, and LIDL.

On a smooth manifold F(x; sigma) = d + c sigma^2 + O(sigma^4), with c from curvature and density.
Two scales remove the first order (Richardson):

    [r^2 F(sigma) - F(r sigma)] / (r^2 - 1)  =  d - r^2 c' sigma^4 + ...,

and m scales all orders below sigma^2m: the polynomial in sigma^2 through them, taken at 0.

LIDL (Tempczyk et al., ICML 2022, 2206.14882) fits a line to log rho_sigma(x) against log sigma and
adds D to its slope.  Since d log rho / d log sigma = F - D, that least-squares slope is a fixed
average of F over the range, with weights that are parabolic in log sigma: a FLIPD curve needs no
density, and no further model.  From log-likelihoods (`sample.log_density`) it is the cross-check.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.lid.flipd import Curve, flipd_curve, squared_residual
from mmh_jax.typing import (
    Array,
    ArrayLike,
    ChiSquareEstimate,
    Denoiser,
    Estimate,
    Key,
    check_answer,
    check_level,
    check_point,
)

__all__ = ["lidl", "lidl_from_density", "lidl_weights", "richardson"]


def richardson(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    ratio: float = 2.0,
    num_levels: int = 2,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008
    key: Key | None = None,
) -> ChiSquareEstimate | Estimate:
    """FLIPD extrapolated to sigma = 0 from the noise levels sigma, ratio sigma, ratio^2 sigma ...

    Prefer it where the curve still bends as sigma^2.  It multiplies the network's error: by up to
    5/3 for two levels of ratio 2, 1.9 for three, and more the closer they are (16 for three of
    ratio 1.2, which exact denoisers alone allow).  Where the first order averages out, as over a
    Gaussian, the next one remains and is multiplied by ratio^2: take a smaller sigma or ratio.

    Args:
        denoiser: the model.
        x: one point.
        sigma: the smallest noise level, in data units.
        ratio: between one level and the next, above 1.
        num_levels: m, at least 2.
        trace: as in `flipd`.  A linear strategy is applied once, to the combined Jacobian, so that
            its standard error is that of the combination; a projecting one to each Jacobian with
            common probes, whose errors are then taken as perfectly correlated: with Jacobians that
            have little to do with each other that is too small an error.
        key: for a stochastic trace.

    Cost: m network evaluations and m times the products.  Bias O(sigma^2m).

    Raises:
        TypeError, ValueError: as `flipd`; or if `ratio` is not above 1, or `num_levels` below 2.

    >>> ball = lambda x, sigma: x / (1 + sigma**2)              # F = 2 / (1 + sigma^2) at 0
    >>> round(float(richardson(ball, jnp.zeros(2), 0.2).value), 3), round(2 / 1.04, 3)
    (1.989, 1.923)
    """
    x, sigma = check_point("richardson", denoiser, x, sigma)
    if not ratio > 1 or num_levels < 2:
        raise ValueError(
            f"`richardson(ratio={ratio}, num_levels={num_levels})` needs a ratio above 1 and at "
            "least 2 levels."
        )
    factors = [ratio**i for i in range(num_levels)]
    weights = _weights_at_zero([factor**2 for factor in factors])
    if not getattr(trace, "is_linear", True):
        # In a loop, one after the other: on a CPU two eigenproblems at once, both mapped over
        # points, deadlock now and then (jaxlib 0.10).
        levels = sigma * jnp.asarray(factors, x.dtype)
        curve = flipd_curve(denoiser, x, levels, trace=trace, key=key)
        mix = jnp.asarray(weights, x.dtype)
        return _mixed(curve, mix)

    def combined(point: Array) -> tuple[Array, Array]:
        outputs = [denoiser(point, f * sigma) for f in factors]
        check_answer("richardson", outputs[0], x)
        residuals = [
            w * squared_residual(x, output, f * sigma)
            for w, f, output in zip(weights, factors, outputs, strict=True)
        ]
        mixed = jnp.tensordot(jnp.asarray(weights, x.dtype), jnp.stack(outputs), 1)
        return mixed, jnp.stack(residuals).sum()

    _, matvec, residual = jax.linearize(combined, x, has_aux=True)
    dimension = trace(matvec, x, key=key)
    return dimension._replace(value=dimension.value + residual)


def _mixed(curve: Curve, weights: Array) -> ChiSquareEstimate:
    """A weighted sum over levels whose errors are perfectly correlated."""
    value, stderr = (jnp.sum(weights * field, -1) for field in (curve.value, curve.stderr))
    growth = jnp.asarray(curve.dispersion)
    growth = growth if growth.ndim == curve.value.ndim else growth[..., None]
    return ChiSquareEstimate(value, jnp.abs(stderr), jnp.sum(weights * growth, -1))


def _weights_at_zero(nodes: list[float]) -> list[float]:
    """Lagrange's weights for the value at 0 of the polynomial through these nodes."""
    return [math.prod(other / (other - node) for other in nodes if other != node) for node in nodes]


def lidl_weights(sigmas: ArrayLike) -> Array:
    """The weights, (S,), with which LIDL averages FLIPD over these noise levels; they sum to 1.

    With u = log sigma, the least-squares slope of the trapezoidal integral of F - D.

    >>> lidl_weights(jnp.array([1.0, 2.0, 4.0])).round(3)
    Array([0.25, 0.5 , 0.25], dtype=float32)
    """
    levels = check_level("lidl_weights", sigmas, jnp.result_type(float))
    if levels.ndim != 1 or levels.size < 2:
        raise ValueError(
            f"`sigmas` has shape {levels.shape}; LIDL needs a vector of at least 2 levels."
        )
    u = jnp.log(levels)
    centred = u - jnp.mean(u)
    # Step j of the integral, between u_j and u_{j+1}, enters log rho at all later levels.
    after = jnp.cumsum(centred[::-1])[::-1][1:]
    steps = after * jnp.diff(u) / jnp.sum(centred**2)
    return (jnp.pad(steps, (0, 1)) + jnp.pad(steps, (1, 0))) / 2


def lidl(curve: Curve) -> ChiSquareEstimate:
    """LIDL from a FLIPD curve: its average with `lidl_weights` over the noise levels.

    Bias: that of FLIPD, averaged over the whole range: larger than that of FLIPD at the smallest
    level.  The standard error takes the errors at all levels as perfectly correlated, as they
    nearly are with common probes.

    Args:
        curve: from `flipd_curve`, over the range in which LIDL would have trained its densities;
            of one point, or of N as `over_points` returns them, with equal rows of sigmas.

    >>> sigmas = jnp.geomspace(0.01, 0.1, 5)
    >>> lidl(Curve(sigmas, jnp.full(5, 3.0), jnp.zeros(5), jnp.zeros(5))).value.round(4)
    Array(3., dtype=float32)
    """
    sigmas = jnp.asarray(curve.sigmas)
    weights = lidl_weights(sigmas[0] if sigmas.ndim == 2 else sigmas)
    # The sums run over the last axis, so that curves of many points are taken as well.
    return _mixed(curve, weights)


def lidl_from_density(sigmas: ArrayLike, log_density: ArrayLike, ambient_dim: int) -> Array:
    """D plus the least-squares slope of log rho_sigma(x) against log sigma.

    Args:
        sigmas: (S,) noise levels.
        log_density: (..., S), log rho_sigma(x) at each of them, as from `sample.log_density` or an
            exact distribution of `analytic`.
        ambient_dim: D.

    >>> sigmas = jnp.array([0.1, 0.2, 0.4])             # an atom at x in R^3
    >>> lidl_from_density(sigmas, -3 * jnp.log(sigmas), 3).round(4)
    Array(0., dtype=float32)
    """
    u = jnp.log(jnp.asarray(sigmas))
    centred = u - jnp.mean(u)
    return ambient_dim + jnp.sum(centred * jnp.asarray(log_density), -1) / jnp.sum(centred**2)
