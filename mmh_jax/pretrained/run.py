r"""From unit noise to samples at the times of a published scheduler.

A published sampler starts from x_t = z, z ~ N(0, I), at its first t, whatever s_t is, and goes
through its t in order.  Here x = x_t / alpha_t, so that it starts from z / alpha.  After the last t
the sample is the network's x0, or, where the scheduler says so (`set_alpha_to_one: false`, as
Stable Diffusion 1 does), a point that still has the noise of t = 0.  Flow matching starts at t = 1,
pure noise, where x is infinite; here at t = 1 - 2^-20.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.noise import RectifiedFlow
from mmh_jax.pretrained.schedules import Process
from mmh_jax.sample import Step, solve_path
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key

__all__ = ["carried", "first_alpha", "levels"]

# A power of two, so that alpha, sigma and the way back are exact in float32.
_FLOW_FIRST = 1 - 2.0**-20


def levels(process: Process, num_steps: int) -> tuple[Array, bool]:
    """The noise levels of a published sampler, and whether its end keeps the noise of the last.

    >>> from mmh_jax.pretrained.schedules import process_of
    >>> config = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    >>> levels(process_of(config), 2)[0].round(3)
    Array([3.443, 0.01 ], dtype=float32)
    >>> levels(process_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}), 2)[0].round(3)
    Array([1.048575e+06, 1.000000e-03], dtype=float32)
    """
    times = _times(process, num_steps)
    sigmas = jax.vmap(process.schedule.sigma)(times)
    is_noisy = not process.last_is_clean and not isinstance(process.schedule, RectifiedFlow)
    if is_noisy and float(times[-1]) > 0:
        sigmas = jnp.append(sigmas, process.schedule.sigma(jnp.float32(0)))
    return sigmas, is_noisy and len(sigmas) > 1


def first_alpha(process: Process, num_steps: int) -> float:
    """The alpha by which unit noise is divided where a published sampler starts."""
    return float(process.schedule.alpha(_times(process, num_steps)[0]))


def _times(process: Process, num_steps: int) -> Array:
    """The t of the schedule at which the network is evaluated, all with a finite noise level."""
    times = process.steps(num_steps) / process.time_scale
    if isinstance(process.schedule, RectifiedFlow):
        times = np.minimum(times, _FLOW_FIRST)
    return jnp.asarray(times, jnp.float32)


def carried(
    caller: str,
    denoiser: Denoiser,
    process: Process,
    shape: tuple[int, ...],
    num: int,
    *,
    key: Key | None,
    noise: ArrayLike | None,
    num_steps: int,
    step: Step,
    chunk_size: int,
) -> np.ndarray:
    """Samples (num, *shape) of a denoiser, in units of x0.

    Args:
        caller: the function to name in an error.
        denoiser, process, shape: of the model.
        num, key, noise: how many to draw and by what, or (num, *shape) noise of unit variance.
        num_steps: t of the scheduler, each with one step.
        step: from one to the next.
        chunk_size: at once.
    """
    if noise is None:
        noise_key, key = jax.random.split(check_key(caller, key))
        noise = jax.random.normal(noise_key, (num, *shape))
    noise = np.asarray(noise, np.float32)
    if noise.shape[1:] != shape or not len(noise):
        raise ValueError(
            f"`{caller}(noise=...)` has shape {noise.shape}; it is (num, *{shape}), num at least 1."
        )
    if step.is_stochastic and key is None:
        raise TypeError(f"`{caller}(step=...)` draws noise; pass `key=`.")
    sigmas, is_noisy = levels(process, num_steps)
    start = noise / np.float32(first_alpha(process, num_steps))
    keys = None if key is None else jax.random.split(key, len(start))
    size, parts = min(chunk_size, len(start)), []
    for begin in range(0, len(start), size):
        # Chunks of one size: one program.
        rows = np.minimum(np.arange(begin, begin + size), len(start) - 1)
        some = None if keys is None else keys[rows]
        parts.append(np.asarray(_down(denoiser, step, sigmas, is_noisy, start[rows], some)))
    found = np.concatenate(parts)[: len(start)]
    return found * float(process.schedule.alpha(jnp.float32(0))) if is_noisy else found


@eqx.filter_jit
def _down(
    denoiser: Denoiser, step: Step, sigmas: Array, is_noisy: bool, x: Any, keys: Any
) -> Array:
    def one(x: Array, key: Key | None) -> Array:
        if len(sigmas) == 1:
            return denoiser(x, sigmas[0])
        path = solve_path(denoiser, x, sigmas, step=step, key=key)
        return path.states[-1] if is_noisy else path.denoised[-1]

    return jax.vmap(one, in_axes=(0, None if keys is None else 0))(x, keys)
