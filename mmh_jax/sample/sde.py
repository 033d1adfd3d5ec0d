r"""Sampling along the reverse stochastic differential equation.

In tau = -log sigma, and for x = x_t / alpha, every schedule's reverse equation is, for any share c
of noise,

    dx = -(1 + c^2) (x - D(x; sigma)) d tau + c sqrt(2) sigma dW,        sigma = e^-tau.

c = 1 is that of Song et al. (2021, 2011.13456, eq. 6), c = 0 the probability flow: all have the
same law at each noise level.  The noise depends on time alone, so that Ito's and Stratonovich's
readings agree, and any of diffrax's solvers of stochastic equations may be taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from mmh_jax.linalg.operator import check_positive
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key, check_level, is_traced

if TYPE_CHECKING:
    import diffrax

__all__ = ["reverse_sde"]


def reverse_sde(
    denoiser: Denoiser,
    x: Array,
    sigma_start: ArrayLike,
    sigma_end: ArrayLike,
    *,
    key: Key,
    noise: ArrayLike = 1.0,
    num_steps: int = 128,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int | None = None,
) -> Array:
    """Carry x down from one noise level to another along the reverse SDE.

    Args:
        denoiser: the model.
        x: one point at noise level `sigma_start`.
        sigma_start: where x is.
        sigma_end: where to go, below `sigma_start`.
        key: draws the Brownian path.
        noise: c above: 1 for the reverse SDE, 0 for the probability flow, more for more noise.
        num_steps: equal steps in log sigma, for a controller of constant steps; the Brownian path
            is known to a quarter of such a step.
        solver: any diffrax solver of SDEs with additive noise; `diffrax.Heun()` by default.
        controller: `diffrax.ConstantStepSize()` by default; adaptive ones, such as
            `PIDController(rtol=1e-2, atol=1e-2, dtmin=...)`, begin with this step, and should not
            go below the quarter.
        max_steps: after which a point gives up and becomes NaN; by default 4096, or twice
            `num_steps` if that is more.

    Returns:
        The point at `sigma_end`, of x's shape, not denoised.

    Cost: 2 evaluations for each of Heun's steps.

    Raises:
        TypeError: without a key.
        ValueError: if `sigma_end` is not below `sigma_start`, or one of them not positive.

    >>> import jax
    >>> gaussian = lambda x, sigma: x / (1 + sigma**2)
    >>> start = 10.0 * jax.random.normal(jax.random.key(0), (500,))
    >>> end = reverse_sde(gaussian, start, 10.0, 0.1, key=jax.random.key(1))
    >>> bool(abs(jnp.var(end) - 1) < 0.2)
    True
    """
    import diffrax  # here, for it takes a fifth of the time of `import mmh_jax`
    import lineax

    key = check_key("reverse_sde", key, otherwise=", or take `probability_flow`")
    check_positive("reverse_sde", "num_steps", num_steps)
    x = jnp.asarray(x, jnp.result_type(x, float))
    levels = [check_level("reverse_sde", sigma, x.dtype) for sigma in (sigma_start, sigma_end)]
    if not is_traced(levels) and not levels[1] < levels[0]:
        raise ValueError(
            f"`reverse_sde(sigma_start={sigma_start}, sigma_end={sigma_end})` goes down; to encode "
            "a point, take `probability_flow`."
        )
    start, end = (-jnp.log(level) for level in levels)
    share = jnp.asarray(noise, x.dtype)
    solver = diffrax.Heun() if solver is None else solver
    controller = diffrax.ConstantStepSize() if controller is None else controller
    length = end - start

    def drift(time: Any, y: Array, args: None) -> Array:
        return -(1 + share**2) * (y - denoiser(y.reshape(x.shape), jnp.exp(-time)).reshape(-1))

    def diffusion(time: Any, y: Array, args: None) -> lineax.DiagonalLinearOperator:
        return lineax.DiagonalLinearOperator(
            jnp.full_like(y, 1) * share * jnp.sqrt(2.0).astype(x.dtype) * jnp.exp(-time)
        )

    path = diffrax.VirtualBrownianTree(
        start, end, tol=length / num_steps / 4, shape=(x.size,), key=key,
        levy_area=diffrax.SpaceTimeLevyArea,
    )  # fmt: skip
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)),
        solver,
        t0=start,
        t1=end,
        dt0=None if isinstance(controller, diffrax.StepTo) else length / num_steps,
        y0=x.reshape(-1),
        stepsize_controller=controller,
        max_steps=max(4096, 2 * num_steps) if max_steps is None else max_steps,
        throw=False,
    )
    assert solution.ys is not None
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, solution.ys[-1], jnp.nan).reshape(x.shape)
