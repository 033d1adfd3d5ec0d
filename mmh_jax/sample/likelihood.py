r"""The log-likelihood of a diffusion model, by change of variables along the probability flow.

In u = log sigma the flow dx/du = x - D(x; e^u) has divergence D - tr dD/dx (D the dimension of the
space), at which rate the density falls along the path (Song et al. 2021, 2011.13456, eq. 39):

    d log rho / du = -(D - tr dD/dx),

    log rho_sigma(x) = log rho_sigma_max(x(sigma_max))
                       + integral of (D - tr dD/dx)(x(u), u) du, from log sigma to log sigma_max.

At sigma_max the data are nearly lost in the noise, and N(m, (s^2 + sigma_max^2) I) stands for the
density.  For Gaussian data of mean m and variances l_i, at a point whose standardised squares are
t_i = y_i^2 / (l_i + sigma^2), the result is thereby too large by

    1/2 sum_i [log a_i + t_i (1 - a_i)],       a_i = (l_i + sigma_max^2) / (s^2 + sigma_max^2),

about sum_i (l_i - s^2) (1 - t_i) / (2 sigma_max^2).  At points of the data t_i hardly depends on a
sigma below their spread, so that LIDL does not see this error.  A mean that is off by a vector a
adds about |a| / sigma_max, of either sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmh_jax import linalg
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_point

if TYPE_CHECKING:
    import diffrax

__all__ = ["log_density"]


def log_density(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    sigma_max: ArrayLike,
    prior_mean: ArrayLike = 0.0,
    prior_std: ArrayLike,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int = 4096,
) -> Array:
    """log rho_sigma(x), the log density of the model's data with noise of level sigma.

    Normalised, in nats, with respect to volume in data units.  The densities at several noise
    levels give LIDL (`lid.lidl_from_density`); FLIPD gives the same at a fraction of the cost.

    Args:
        denoiser: the model.
        x: one point, of any shape with D entries; many with `jax.vmap` or `mapping.over_points`.
        sigma: one noise level, in data units; several with `jax.vmap`.
        sigma_max: where the path ends, above `sigma`; several times the spread of the data.
        prior_mean: the mean of the data, a number or an array of x's shape.
        prior_std: the spread of the data per coordinate, a number: the root of the mean over
            coordinates of their variance.
        trace: how to take the trace of dD/dx, as in `lid.flipd`.  A stochastic one uses the same
            probes along the whole path, which keeps the path smooth (FFJORD, Grathwohl et al.
            2019, 1810.01367); an unbiased one gives an unbiased log density, whose spread over
            keys is its standard error.
        key: for a stochastic trace.
        solver: any diffrax solver of ODEs; `diffrax.Tsit5()` by default.
        controller: any diffrax step-size controller; `PIDController(rtol=1e-5, atol=1e-5)` by
            default.
        max_steps: after which a point gives up and becomes NaN.

    Returns:
        A scalar; NaN where the solver failed.

    Cost: 6 network evaluations with their traces for each step of the solver; the default takes
    about 2 or 3 steps for each factor of e from sigma to sigma_max on smooth exact denoisers.
    Bias: that of the prior, of order |mean - prior_mean| / sigma_max and (spread / sigma_max)^2
    (see the module), and the network's; the solver's with the default is about 1e-5 for D = 2 and
    grows with D: lower its tolerances in large dimension.
    Differentiable in x, sigma and the denoiser's parameters.

    Raises:
        TypeError: for an integer `x`, or a stochastic trace without a key.
        ValueError: if `x` has not the denoiser's shape, a noise level is not positive, `sigma` is
            not one number below `sigma_max`, or the prior is not that of a point like `x`.

    >>> gaussian = lambda x, sigma: x / (1 + sigma**2)              # N(0, 1) in the plane
    >>> value = log_density(gaussian, jnp.zeros(2), 0.5, sigma_max=20.0, prior_std=1.0)
    >>> round(float(value), 3), round(float(-jnp.log(2 * jnp.pi * (1 + 0.5**2))), 3)
    (-2.061, -2.061)
    """
    import diffrax  # here, for it takes a fifth of the time of `import mmh_jax`

    x, start = check_point("log_density", denoiser, x, sigma)
    end = _check_end(start, sigma, sigma_max)
    mean, spread = _check_prior(x, prior_mean, prior_std)
    solver = diffrax.Tsit5() if solver is None else solver
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5) if controller is None else controller

    def velocity(u: ArrayLike, state: tuple[Array, Array], args: None) -> tuple[Array, Array]:
        point, _ = state
        denoised, matvec = jax.linearize(lambda y: denoiser(y, jnp.exp(u)), point)
        return point - denoised, x.size - trace(matvec, point, key=key).value

    low, high = jnp.log(start), jnp.log(end)
    constant = isinstance(controller, diffrax.StepTo)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        solver,
        t0=low,
        t1=high,
        dt0=None if constant else jnp.sign(high - low) * 0.05,
        y0=(x, jnp.zeros((), x.dtype)),
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,
    )
    assert solution.ys is not None
    moved, expansion = (leaf[-1] for leaf in solution.ys)
    variance = spread**2 + end**2
    log_volume = x.size * jnp.log(2 * jnp.pi * variance) / 2
    log_prior = -jnp.sum((moved - mean) ** 2) / (2 * variance) - log_volume
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, log_prior + expansion, jnp.nan)


def _check_end(start: Array, sigma: ArrayLike, sigma_max: ArrayLike) -> Array:
    """`sigma_max` as an array, or what is wrong with the ends of the path."""
    if np.ndim(sigma_max) != 0:
        raise ValueError(
            f"`log_density(sigma_max=...)` has shape {np.shape(sigma_max)}; it is one number."
        )
    end = jnp.asarray(sigma_max, start.dtype)
    traced = isinstance(start, Tracer) or isinstance(end, Tracer)
    if not traced and not start < end < jnp.inf:
        raise ValueError(
            f"`log_density(sigma={sigma}, sigma_max={sigma_max})`: the path goes up from sigma to "
            "a finite sigma_max; take several times the spread of the data."
        )
    return end


def _check_prior(x: Array, mean: ArrayLike, std: ArrayLike) -> tuple[Array, Array]:
    """The prior's mean and spread as arrays, or which of them does not fit a point like `x`."""
    if np.ndim(mean) != 0 and np.shape(mean) != x.shape:
        raise ValueError(
            f"`log_density(prior_mean=...)` has shape {np.shape(mean)}; for a point of shape "
            f"{x.shape} it is a number or an array of that shape."
        )
    if np.ndim(std) != 0:
        raise ValueError(
            f"`log_density(prior_std=...)` has shape {np.shape(std)}; it is one number, the spread "
            "per coordinate. Take the root of the mean of the variances."
        )
    if not isinstance(std, Tracer) and not (np.isfinite(std) and np.asarray(std) >= 0):
        raise ValueError(
            f"`log_density(prior_std={std})` must be a finite number of at least 0, in data units."
        )
    return jnp.asarray(mean, x.dtype), jnp.asarray(std, x.dtype)
