r"""Steering by a population: particles that are about to become copies make room for others.

K particles run down the levels of a stochastic sampler, and at levels sigma_1 > ... > sigma_M are
weighted by a potential r(x; sigma), 0 where the dimension is usual and negative below
(`LidGuided.log_weight`),

    log G_m = r(x_m; sigma_m) - r(x_{m-1}; sigma_{m-1}),            r_0 = 0,

the Feynman-Kac steering of Singhal et al. (2025, 2501.06848) with potentials that are differences:
the product of all weights along a path is exp r(x_M; sigma_M).  The particles are drawn again
whenever their effective number, (sum w)^2 / sum w^2, falls below a share of K, and at the last of
the levels.  No gradient is taken.  For K -> infinity the samples have the law of the sampler,
weighted by exp r at the last level; for finite K they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.sample import Step, ancestral
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key, check_level, is_traced

__all__ = ["Particles", "particles", "systematic_resampling"]


class Particles(NamedTuple):
    """One population at its end.

    Attributes:
        samples: (K, *shape).
        ancestors: (K,) the start from which each descends.
        effective: (S,) the effective number of particles at each level, before any is drawn again.
    """

    samples: Any
    ancestors: Any
    effective: Any


def systematic_resampling(log_weights: Array, *, key: Key) -> Array:
    """(K,) whom each of K new particles copies; on average in proportion to the weights.

    One uniform number for all: the number of copies of each differs from K w by less than 1.

    >>> systematic_resampling(jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0])), key=jax.random.key(0))
    Array([0, 0, 1, 1], dtype=int32)
    """
    num = len(log_weights)
    ends = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(num) + jax.random.uniform(key, (), ends.dtype)) / num
    # The sum of all is 1 to rounding.
    return jnp.minimum(jnp.searchsorted(ends, points, side="right"), num - 1).astype(jnp.int32)


def particles(
    denoiser: Denoiser,
    starts: ArrayLike,
    sigmas: ArrayLike,
    potential: Callable[[Array, Array], Array],
    *,
    key: Key,
    low: ArrayLike = 0.0,
    high: ArrayLike = float("inf"),
    step: Step = ancestral(),  # noqa: B008 (a frozen value)
    threshold: float = 0.5,
) -> Particles:
    """Carry one population through noise levels, and denoise it at the last.

    Args:
        denoiser: the model.
        starts: (K, *shape) draws from N(0, sigmas[0]^2 I); `jax.vmap` over many populations.
        sigmas: (S,) decreasing noise levels.
        potential: r, called as `potential(x, sigma)`.
        key: draws the noise, and who is copied.
        low, high: levels, in data units, at which the potential counts.
        step: a stochastic one: after a deterministic one copies would stay together.
        threshold: share of K below which the effective number must fall.

    Returns:
        `Particles`.

    Cost: of `solve` for each particle, and a potential at each level (outside of `low`, `high`,
    too, under `vmap`).

    Raises:
        TypeError: without a key.
        ValueError: for a deterministic step, a threshold that is not between 0 and 1, or levels
            that are not positive or do not decrease.

    >>> pair = lambda x, sigma: jnp.tanh(x / sigma**2)                  # two atoms, at -1 and 1
    >>> starts = 5 * jax.random.normal(jax.random.key(0), (64, 1))
    >>> found = particles(pair, starts, jnp.geomspace(5.0, 0.05, 24), lambda x, sigma: 9 * x[0],
    ...     key=jax.random.key(1), low=0.1)
    >>> bool(jnp.mean(found.samples > 0) > 0.95)
    True
    """
    key = check_key("particles", key)
    if not step.is_stochastic:
        raise ValueError(
            "`particles(step=...)` has no noise: particles that descend from one would stay one. "
            "Take `ancestral()`, `ddim(eta)` or `heun(churn)`."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"`particles(threshold={threshold})` must lie between 0 and 1.")
    starts = jnp.asarray(starts, jnp.result_type(starts, float))
    if np.ndim(sigmas) != 1 or (not is_traced(sigmas) and np.any(np.diff(np.asarray(sigmas)) >= 0)):
        raise ValueError(
            f"`particles(sigmas=...)` has shape {np.shape(sigmas)}; it takes a vector of noise "
            "levels that decrease."
        )
    sigmas = check_level("particles", sigmas, starts.dtype)
    num = len(starts)
    is_within = (jnp.asarray(low) <= sigmas) & (sigmas <= jnp.asarray(high))
    last = jnp.max(jnp.where(is_within, jnp.arange(len(sigmas)), -1))

    def weigh(carry: Any, index: Array, draw_key: Key) -> tuple[Any, Array]:
        """Weights at a level; drawn again where they have become too uneven."""
        x, memory, log_weights, before, ancestors = carry
        now = jax.lax.cond(
            is_within[index],
            lambda: jax.vmap(lambda one: potential(one, sigmas[index]))(x).astype(before.dtype),
            lambda: before,
        )
        log_weights = log_weights + now - before
        share = jax.nn.softmax(log_weights)
        effective = 1 / jnp.sum(share**2)
        again = (effective < threshold * num) | (index == last)
        drawn = systematic_resampling(log_weights, key=draw_key)
        chosen = jnp.where(again, drawn, jnp.arange(num))
        moved = jax.tree.map(lambda leaf: leaf[chosen], (x, memory, now, ancestors))
        x, memory, now, ancestors = moved
        return (x, memory, jnp.where(again, 0.0, log_weights), now, ancestors), effective

    def advance(carry: Any, at: Any) -> tuple[Any, Array]:
        index, one_key = at
        draw_key, step_key = jax.random.split(one_key)
        (x, memory, *rest), effective = weigh(carry, index, draw_key)

        def move(point: Array, memory: Any, key: Key) -> tuple[Array, Any]:
            found = step(denoiser, point, sigmas[index], sigmas[index + 1], memory, key=key)
            return found.x, found.memory

        x, memory = jax.vmap(move)(x, memory, jax.random.split(step_key, num))
        return (x, memory, *rest), effective

    zeros = jnp.zeros(num, starts.dtype)
    carry = (starts, jax.vmap(step.start)(starts), zeros, zeros, jnp.arange(num))
    keys = jax.random.split(key, len(sigmas))
    steps = (jnp.arange(len(sigmas) - 1), keys[:-1])
    carry, effective = jax.lax.scan(advance, carry, steps)
    (x, _, _, _, ancestors), at_end = weigh(carry, jnp.asarray(len(sigmas) - 1), keys[-1])
    samples = jax.vmap(lambda point: denoiser(point, sigmas[-1]))(x)
    return Particles(samples, ancestors, jnp.append(effective, at_end))
