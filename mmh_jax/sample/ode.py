r"""Sampling along the probability-flow ODE, with the noise level as time.

For x = x_t / alpha and sigma = s / alpha, every schedule's probability flow is the same curve,

    dx / d sigma = (x - D(x; sigma)) / sigma,

from N(0, sigma_max^2 I) down to sigma_min (Song et al. 2021, 2011.13456; Karras et al. 2022,
2206.00364, eq. 1 and 4).  In u = log sigma it reads dx/du = x - D, free of the singularity at 0.
Both samplers end with one application of the denoiser, which removes the last noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mmh_jax.typing import Array, ArrayLike, Denoiser, Key

if TYPE_CHECKING:
    import diffrax

__all__ = ["Path", "heun", "heun_path", "karras_levels", "probability_flow", "sample"]


def karras_levels(
    num_levels: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Array:
    """Decreasing noise levels, evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5).

    >>> karras_levels(3, sigma_min=1.0, sigma_max=9.0, rho=2.0)
    Array([9., 4., 1.], dtype=float32)
    """
    if num_levels < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"`karras_levels(num_levels={num_levels}, sigma_min={sigma_min}, "
            f"sigma_max={sigma_max})` needs at least 2 levels and 0 < sigma_min < sigma_max."
        )
    ends = jnp.asarray([sigma_max, sigma_min]) ** (1 / rho)
    return jnp.linspace(ends[0], ends[1], num_levels) ** rho


def _heun_step(
    denoiser: Denoiser, x: Array, sigma: Array, sigma_next: Array
) -> tuple[Array, Array]:
    """The point at the next level, and what the denoiser made of it at this one."""
    denoised = denoiser(x, sigma)
    slope = (x - denoised) / sigma
    euler = x + (sigma_next - sigma) * slope
    slope_next = (euler - denoiser(euler, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2, denoised


def heun(denoiser: Denoiser, x: Array, sigmas: Array) -> Array:
    """The fixed-step second-order sampler of Karras et al. (2022, algorithm 1).

    Args:
        denoiser: the model.
        x: the noisy start, a draw from N(0, sigmas[0]^2 I), one point.
        sigmas: (S,) decreasing noise levels.

    Returns:
        The denoised end, of x's shape.  Cost: 2 S - 1 evaluations; error of order 1/S^2.
    """

    def step(x: Array, levels: tuple[Array, Array]) -> tuple[Array, None]:
        return _heun_step(denoiser, x, *levels)[0], None

    x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
    return denoiser(x, sigmas[-1])


class Path(NamedTuple):
    """One run of a sampler, from its start to its end.

    Attributes:
        sigmas: (S,) the noise levels.
        states: (S, *shape) the point at each of them.
        denoised: (S, *shape) the denoiser's answer there; the last is the sample.
    """

    sigmas: Any
    states: Any
    denoised: Any


def heun_path(denoiser: Denoiser, x: Array, sigmas: Array) -> Path:
    """`heun` with all that it passes through; upwards, too, to encode a point.

    Args:
        denoiser: the model.
        x: one point at the noise level `sigmas[0]`.
        sigmas: (S,) noise levels, decreasing to sample, increasing to add noise along the flow.

    Cost: 2 S - 1 evaluations, as `heun`; 2 S points of memory.

    >>> path = heun_path(lambda x, sigma: 0 * x, jnp.array([4.0]), jnp.array([4.0, 2.0, 1.0]))
    >>> path.states[:, 0], path.denoised.shape
    (Array([4., 2., 1.], dtype=float32), (3, 1))
    """

    def step(x: Array, levels: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        x_next, denoised = _heun_step(denoiser, x, *levels)
        return x_next, (x, denoised)

    end, (states, denoised) = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
    last = denoiser(end, sigmas[-1])
    return Path(
        sigmas,
        jnp.concatenate([states, end[None]]),
        jnp.concatenate([denoised, last[None]]),
    )


def probability_flow(
    denoiser: Denoiser,
    x: Array,
    sigma_start: ArrayLike,
    sigma_end: ArrayLike,
    *,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int = 4096,
) -> Array:
    """Carry x along the probability flow from one noise level to another, either way.

    Args:
        denoiser: the model.
        x: one point at noise level `sigma_start`.
        sigma_start: where x is.
        sigma_end: where to go: below `sigma_start` to sample, above it to encode.
        solver: any diffrax solver of ODEs; `diffrax.Tsit5()` by default.
        controller: any diffrax step-size controller; `PIDController(rtol=1e-5, atol=1e-5)` by
            default.
        max_steps: after which a point gives up and becomes NaN.

    Returns:
        The point at `sigma_end`, of x's shape, not denoised.

    >>> gaussian = lambda x, sigma: x / (1 + sigma**2)      # x scales as sqrt(1 + sigma^2)
    >>> end = probability_flow(gaussian, jnp.ones(1), 1.0, 3.0)
    >>> bool(jnp.allclose(end, 5**0.5, rtol=1e-4))
    True
    """
    import diffrax  # here, for it takes a fifth of the time of `import mmh_jax`

    solver = diffrax.Tsit5() if solver is None else solver
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5) if controller is None else controller
    start, end = (
        jnp.log(jnp.asarray(sigma_start, x.dtype)),
        jnp.log(jnp.asarray(sigma_end, x.dtype)),
    )
    constant = isinstance(controller, diffrax.StepTo)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda u, y, _: y - denoiser(y, jnp.exp(u))),
        solver,
        t0=start,
        t1=end,
        dt0=None if constant else jnp.sign(end - start) * 0.05,
        y0=x,
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,
    )
    assert solution.ys is not None
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, solution.ys[-1], jnp.nan)


def sample(
    denoiser: Denoiser,
    num: int,
    *,
    key: Key,
    sigma_min: float,
    sigma_max: float,
    num_levels: int = 32,
    shape: tuple[int, ...] | None = None,
    conditions: Any = None,
) -> Array:
    """Draw samples with `heun` on `karras_levels`.

    Args:
        denoiser: the model.
        num: how many.
        key: draws the noise.
        sigma_min: the smallest noise level, where the model was still trained.
        sigma_max: the largest; several times the spread of the data.
        num_levels: the cost is 2 num_levels - 1 evaluations for each sample.
        shape: of a point; by default the denoiser's.
        conditions: (num, ...), a pytree: one for each sample, bound by `denoiser.condition`; None
            for the denoiser as it is.

    Returns:
        (num, *shape).

    Raises:
        ValueError: if no shape is known, or there is not one condition for each sample.
    """
    shape = getattr(denoiser, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("`sample(denoiser)` does not know the shape of a point; pass `shape=`.")
    if wrong := [leaf for leaf in jax.tree.leaves(conditions) if jnp.shape(leaf)[:1] != (num,)]:
        raise ValueError(
            f"`sample(conditions=...)` has an array of shape {jnp.shape(wrong[0])} for {num} "
            "samples; pass one condition for each."
        )
    sigmas = karras_levels(num_levels, sigma_min=sigma_min, sigma_max=sigma_max)
    noise = sigma_max * jax.random.normal(key, (num, *shape))
    return _heun_many(denoiser, jax.tree.map(jnp.asarray, conditions), noise, sigmas)


def _conditional_heun(denoiser: Any, condition: Any, x: Array, sigmas: Array) -> Array:
    return heun(denoiser if condition is None else denoiser.condition(condition), x, sigmas)


# Filtered, so that a plain function may be the denoiser.
_heun_many = eqx.filter_jit(eqx.filter_vmap(_conditional_heun, in_axes=(None, 0, 0, None)))
