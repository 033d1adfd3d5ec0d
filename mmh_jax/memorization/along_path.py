r"""Detectors that watch a sampler: the CFG norm along a path, and the steps between its states.

    along sampling   mean_t |eps_c - eps_0| at the states x_t of one run   Wen 2024, 2407.21720
    after encoding   the same at the end of the flow from a clean point up to a level
    step stability   max_t (|x_t - x_{t+1}| - m_t) / v_t                                  (2026)

with m_t and v_t the mean and the standard deviation of the step sizes of normal runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.memorization.conditional import noise_difference, norm
from mmh_jax.sample import Path, solve_path
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_point, is_traced

__all__ = [
    "StepReference",
    "cfg_norm_along",
    "encoded_cfg_norm",
    "step_reference",
    "step_sizes",
    "step_stability",
]


def cfg_norm_along(conditional: Denoiser, unconditional: Denoiser, path: Path) -> Array:
    """|eps_c - eps_0| at each state of a run, (S,); detectors take the first, or the mean.

    Args:
        conditional, unconditional: as for `cfg_norm`.
        path: one run of `sample.solve_path`, of the guided or of the conditional model.

    Cost: 2 S evaluations, one state at a time.

    >>> from mmh_jax.sample import solve_path
    >>> null, one = (lambda x, sigma: 0 * x), (lambda x, sigma: 0 * x + 1)
    >>> cfg_norm_along(one, null, solve_path(one, jnp.ones(4), jnp.array([4.0, 2.0, 1.0])))
    Array([0.5, 1. , 2. ], dtype=float32)
    """

    def at(state: tuple[Array, Array]) -> Array:
        sigma, x = state
        return norm(noise_difference(conditional, unconditional, x, sigma))

    return jax.lax.map(at, (path.sigmas, path.states))


def encoded_cfg_norm(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    flow: Denoiser | None = None,
) -> Array:
    """|eps_c - eps_0| where the probability flow carries a clean point.

    For images that were not sampled here: the noise is the one from which the model would make x.

    Args:
        conditional, unconditional: as for `cfg_norm`.
        x: one clean point, taken as the state at `sigmas[0]`.
        sigmas: (S,) increasing noise levels.
        flow: whose probability flow it is; by default that of `conditional`.

    Cost: 2 S + 1 evaluations, by Heun's steps.

    Raises:
        TypeError, ValueError: as `cfg_norm`; or if the levels do not increase.

    >>> null, ball = (lambda x, sigma: 0 * x), (lambda x, sigma: x / (1 + sigma**2))
    >>> up = jnp.geomspace(0.01, 1.0, 64)
    >>> encoded_cfg_norm(ball, null, jnp.ones(1), up).round(2)        # sqrt(2) / 2
    Array(0.71, dtype=float32)
    """
    x, levels = check_point("encoded_cfg_norm", conditional, x, sigmas, levels=1)
    up = is_traced(levels) or bool(np.all(np.diff(levels) > 0))
    if levels.size < 2 or not up:
        raise ValueError(
            "`encoded_cfg_norm(sigmas=...)` must be at least 2 increasing noise levels: the flow "
            "goes up. Did you mean `sigmas[::-1]`?"
        )
    flow = conditional if flow is None else flow
    end = solve_path(flow, x, levels).states[-1]
    return norm(noise_difference(conditional, unconditional, end, levels[-1]))


class StepReference(NamedTuple):
    """Step sizes of normal runs.

    Attributes:
        mean: (S - 1,) their mean, for each step.
        std: (S - 1,) their standard deviation.
    """

    mean: Any
    std: Any


def step_sizes(states: ArrayLike) -> Array:
    """|x_t - x_{t+1}| along one run: (S - 1,) from (S, *shape).

    Of `Path.states`, which are in data units; for the states of a variance-preserving sampler,
    multiply them by its alpha first.

    Raises:
        ValueError: if there are fewer than two states.

    >>> step_sizes(jnp.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
    Array([5., 0.], dtype=float32)
    """
    states = jnp.asarray(states)
    if states.ndim < 1 or states.shape[0] < 2:
        raise ValueError(
            f"`step_sizes(states=...)` has shape {states.shape}; it takes (S, *shape), S >= 2."
        )
    return jax.vmap(norm)(states[1:] - states[:-1])


def step_reference(sizes: ArrayLike) -> StepReference:
    """Mean and standard deviation of the step sizes of normal runs on the same noise levels.

    Args:
        sizes: (R, S - 1), of R >= 2 runs whose prompts, or models, are known not to be memorized.

    Raises:
        ValueError: for another shape.

    >>> step_reference(jnp.array([[1.0, 2.0], [3.0, 2.0]])).mean
    Array([2., 2.], dtype=float32)
    """
    sizes = jnp.asarray(sizes)
    if sizes.ndim != 2 or sizes.shape[0] < 2:
        raise ValueError(
            f"`step_reference(sizes=...)` has shape {sizes.shape}; it takes (R, S - 1), the sizes "
            "of at least 2 runs. Map `step_sizes` over runs with `jax.vmap`."
        )
    return StepReference(jnp.mean(sizes, axis=0), jnp.std(sizes, axis=0, ddof=1))


def step_stability(states: ArrayLike, reference: StepReference) -> Array:
    """max_t (|x_t - x_{t+1}| - m_t) / v_t: how abnormal the largest step of a run is.

    Args:
        states: (S, *shape), of one run.
        reference: of normal runs on the same noise levels.  A step whose size never varies there
            has no z-score: NaN, or infinite.

    Cost: no evaluation beyond those of the sampler.

    Raises:
        ValueError: if the reference is of another number of steps.

    >>> reference = step_reference(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> step_stability(jnp.array([[0.0], [2.0], [7.0]]), reference).round(3)    # 2 / sqrt(2)
    Array(1.414, dtype=float32)
    """
    sizes = step_sizes(states)
    if jnp.shape(reference.mean) != sizes.shape:
        raise ValueError(
            f"`step_stability(reference=...)` is of {jnp.shape(reference.mean)[0]} steps and the "
            f"run has {sizes.size}; take both on the same noise levels."
        )
    return jnp.max((sizes - reference.mean) / reference.std)
