r"""Sampling along the probability-flow ODE, with the noise level as time.

For x = x_t / alpha and sigma = s / alpha, every schedule's probability flow is the same curve,

    dx / d sigma = (x - D(x; sigma)) / sigma,

from N(0, sigma_max^2 I) down to sigma_min (Song et al. 2021, 2011.13456; Karras et al. 2022,
2206.00364, eq. 1 and 4).  In u = log sigma it reads dx/du = x - D, free of the singularity at 0.
Few-step samplers (`steps`) end with one application of the denoiser, which removes the last noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.sample.steps import Step, heun
from mmh_jax.typing import (
    Array,
    ArrayLike,
    Denoiser,
    Key,
    check_key,
    check_level,
    is_traced,
)

if TYPE_CHECKING:
    import diffrax

__all__ = ["Path", "karras_levels", "probability_flow", "sample", "solve", "solve_path"]


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


class Path(NamedTuple):
    """One run of a sampler, from its start to its end.

    Attributes:
        sigmas: (S,) the noise levels, with churn the raised ones.
        states: (S, *shape) the point at each of them, as the denoiser saw it.
        denoised: (S, *shape) the denoiser's answer there; the last is the sample.
        recorded: what `record` made of each of them, (S, ...); None without.
    """

    sigmas: Any
    states: Any
    denoised: Any
    recorded: Any = None


def solve(
    denoiser: Denoiser,
    x: Array,
    sigmas: Array,
    *,
    step: Step = heun(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
) -> Array:
    """Carry one point through noise levels by a few-step sampler, and denoise it at the last.

    Args:
        denoiser: the model.
        x: the noisy start, a draw from N(0, sigmas[0]^2 I), one point.
        sigmas: (S,) decreasing noise levels; no 0 at the end, for the end is denoised.
        step: `heun()`, `ddim(eta)`, `ancestral()`, `dpm_solver_2m()`, or a `Step` of your own.
        key: for a step that draws noise.

    Returns:
        The denoised end, of x's shape.  Cost: (S - 1) `step.evaluations` + 1; error of order 1/S
        for `ddim`, 1/S^2 for `heun` and `dpm_solver_2m`.

    Raises:
        TypeError: for a stochastic step without a key.
        ValueError: for levels that are not positive, are repeated, or rise where a step has noise.

    >>> from mmh_jax.sample import dpm_solver_2m
    >>> gaussian = lambda x, sigma: x / (1 + sigma**2)
    >>> levels = karras_levels(32, sigma_min=0.01, sigma_max=3.0)
    >>> end = solve(gaussian, jnp.array([10**0.5]), levels, step=dpm_solver_2m())
    >>> bool(jnp.allclose(end, 1.0, atol=0.01))
    True
    """

    def advance(carry: Any, levels: Any) -> tuple[Any, None]:
        (x, memory), (sigma, sigma_next, step_key) = carry, levels
        moved = step(denoiser, x, sigma, sigma_next, memory, key=step_key)
        return (moved.x, moved.memory), None

    x, sigmas, levels = _checked("solve", x, sigmas, step, key)
    (x, _), _ = jax.lax.scan(advance, (x, step.start(x)), levels)
    return denoiser(x, sigmas[-1])


def solve_path(
    denoiser: Denoiser,
    x: Array,
    sigmas: Array,
    *,
    step: Step = heun(),  # noqa: B008
    key: Key | None = None,
    record: Callable[[Array, Array, Array], Any] | None = None,
) -> Path:
    """`solve` with all that it passes through; upwards, too, to encode a point.

    Args:
        denoiser: the model.
        x: one point at the noise level `sigmas[0]`.
        sigmas: (S,) noise levels, decreasing to sample, increasing to add noise along the flow.
        step, key: as for `solve`; a deterministic step to go upwards.
        record: called as `record(x, denoised, sigma)` at each level, a pytree of arrays.

    Cost: as `solve`; 2 S points of memory, and what is recorded.

    >>> path = solve_path(lambda x, sigma: 0 * x, jnp.array([4.0]), jnp.array([4.0, 2.0, 1.0]))
    >>> path.states[:, 0], path.denoised.shape
    (Array([4., 2., 1.], dtype=float32), (3, 1))
    """

    def seen(x: Array, denoised: Array, sigma: Array) -> tuple[Array, Array, Array, Any]:
        recorded = None if record is None else record(x, denoised, sigma)
        return sigma, x, denoised, jax.tree.map(jnp.asarray, recorded)

    def advance(carry: Any, levels: Any) -> tuple[Any, Any]:
        (x, memory), (sigma, sigma_next, step_key) = carry, levels
        moved = step(denoiser, x, sigma, sigma_next, memory, key=step_key)
        asked_x, asked_sigma = moved.at
        return (moved.x, moved.memory), seen(asked_x, moved.denoised, asked_sigma)

    x, sigmas, levels = _checked("solve_path", x, sigmas, step, key)
    (end, _), before = jax.lax.scan(advance, (x, step.start(x)), levels)
    last = seen(end, denoiser(end, sigmas[-1]), sigmas[-1])
    return Path(*jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), before, last))


def _checked(
    caller: str, x: ArrayLike, sigmas: ArrayLike, step: Step, key: Key | None
) -> tuple[Array, Array, tuple[Any, Any, Any]]:
    """Point and levels, and what the loop runs over: levels, the next ones, keys of noisy steps."""
    x = jnp.asarray(x, jnp.result_type(x, float))
    sigmas = check_level(caller, sigmas, x.dtype)
    if sigmas.ndim != 1 or sigmas.size == 0:
        raise ValueError(
            f"`{caller}(sigmas=...)` has shape {sigmas.shape}; it takes a vector of noise levels."
        )
    keys = None
    if step.is_stochastic:
        otherwise = ", or take a step without noise, such as `ddim()`"
        keys = jax.random.split(check_key(caller, key, otherwise=otherwise), len(sigmas) - 1)
    if not is_traced(sigmas):
        steps = np.diff(np.asarray(sigmas))
        if np.any(steps == 0) or (step.is_stochastic and np.any(steps > 0)):
            raise ValueError(
                f"`{caller}(sigmas=...)` must change at each step, and decrease where the step has "
                "noise; upwards, `ddim()` or `heun()`."
            )
    return x, sigmas, (sigmas[:-1], sigmas[1:], keys)


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
    step: Step = heun(),  # noqa: B008
) -> Array:
    """Draw samples with `solve` on `karras_levels`.

    Args:
        denoiser: the model.
        num: how many.
        key: draws the noise.
        sigma_min: the smallest noise level, where the model was still trained.
        sigma_max: the largest; several times the spread of the data.
        num_levels: the cost is 2 num_levels - 1 evaluations for each sample with Heun's steps.
        shape: of a point; by default the denoiser's.
        conditions: (num, ...), a pytree: one for each sample, bound by `denoiser.condition`; None
            for the denoiser as it is.
        step: as for `solve`.

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
    noise_key, step_key = jax.random.split(check_key("sample", key))
    noise = sigma_max * jax.random.normal(noise_key, (num, *shape))
    conditions = jax.tree.map(jnp.asarray, conditions)
    keys = jax.random.split(step_key, num) if step.is_stochastic else None
    return _solve_many(denoiser, conditions, noise, keys, sigmas, step)


def _conditional(
    denoiser: Any, condition: Any, x: Array, key: Key | None, sigmas: Array, step: Step
) -> Array:
    bound = denoiser if condition is None else denoiser.condition(condition)
    return solve(bound, x, sigmas, step=step, key=key)


# Filtered, so that a plain function may be the denoiser.
_solve_many = eqx.filter_jit(eqx.filter_vmap(_conditional, in_axes=(None, 0, 0, 0, None, None)))
