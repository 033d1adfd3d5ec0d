"""What is usual for guidance by dimension, measured on reference runs of the sampler without it.

The runs are drawn in blocks that can be continued.  Those that ended in a copy of the training data
are left out, if these data are known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import sample
from mmh_jax.mitigation import LidGuided, Measure, Target, reference_target
from mmh_jax.report.files import read_array, write_array
from mmh_jax.report.guiding import STEPS, SampleOptions
from mmh_jax.report.measure import BLOCK_SIZE, Progress
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Array, Key

__all__ = ["Reference", "draw_reference"]


class Reference(NamedTuple):
    """R runs without guidance.

    Attributes:
        samples: (R, *shape) their ends.
        dimensions: (R, S) the dimension at each level, NaN where it does not count.
    """

    samples: np.ndarray
    dimensions: np.ndarray

    def target(
        self, options: SampleOptions, config: ModelConfig, is_copy: np.ndarray | None
    ) -> tuple[Target, int]:
        """What is usual, and on how many runs it was measured.

        Args:
            options, config: as the runs were drawn with.
            is_copy: (R,) which of the runs are left out; None if it cannot be said.

        Raises:
            ValueError: if too few runs are left.
        """
        sigmas = options.sigmas(config)
        inside = options.is_inside(sigmas, config)
        dimensions = self.dimensions[:, inside]
        seen = np.concatenate([dimensions, self.samples.reshape(len(dimensions), -1)], axis=1)
        kept = np.asarray(np.isfinite(seen).all(axis=1))
        if is_copy is not None:
            kept &= ~is_copy
        if kept.sum() < options.least_references:
            raise ValueError(
                f"--guidance {options.guidance}: only {kept.sum()} of {len(kept)} reference "
                f"samples are finite and no copies; a quantile of {options.quantile:g} needs "
                f"{options.least_references}. Raise --references or --quantile, with --overwrite."
            )
        found = reference_target(sigmas[inside], dimensions[kept], quantile=options.quantile)
        return found, int(kept.sum())


def draw_reference(
    model: Any,
    config: ModelConfig,
    options: SampleOptions,
    *,
    key: Key,
    measure: Measure,
    folder: Path,
    progress: Progress | None = None,
) -> Reference:
    """Run the sampler without guidance, and measure on the way.

    Args:
        model: a denoiser; with a label in the options it takes conditions.
        config: for the shape of a point and the noise levels.
        options: of the sampler and the interval.
        key: draws the noise.
        measure: the one that will guide.
        folder: where each finished block is kept; blocks found there are not drawn again.
        progress: called as `progress(done, total)`.
    """
    folder.mkdir(exist_ok=True)
    num, size, sigmas = options.references, math.prod(config.shape), options.sigmas(config)
    # Never called, only measured with: no target, and a strength and a trust of no matter.
    measured = LidGuided(
        model, None, measure, *map(jnp.asarray, (1.0, 1.0, *options.interval(config)))
    )
    blocks, step = [], STEPS[options.step]()
    for number, start in enumerate(range(0, num, BLOCK_SIZE)):
        path = folder / f"{start:09d}.npy"
        block = read_array(path)
        if block is None:
            noise_key, step_key = jax.random.split(jax.random.fold_in(key, number))
            noise = sigmas[0] * jax.random.normal(noise_key, (BLOCK_SIZE, *config.shape))
            keys = jax.random.split(step_key, BLOCK_SIZE) if step.is_stochastic else None
            conditions = options.conditions(config, BLOCK_SIZE, seed=0)
            ends, dimensions = _run_many(measured, conditions, noise, keys, sigmas, step)
            block = np.concatenate([np.reshape(ends, (BLOCK_SIZE, -1)), dimensions], axis=1)
            write_array(path, block)
        blocks.append(block)
        if progress is not None:
            progress(min(start + BLOCK_SIZE, num), num)
    rows = np.concatenate(blocks)[:num]
    return Reference(rows[:, :size].reshape(num, *config.shape), rows[:, size:])


def _run(
    measured: LidGuided,
    condition: Any,
    x: Array,
    key: Key | None,
    sigmas: Array,
    step: sample.Step,
) -> tuple[Array, Array]:
    """The end of one run, and the dimension at each level between the two."""
    bound = measured if condition is None else measured.condition(condition)

    def dimension(x: Array, denoised: Array, sigma: Array) -> Array:
        inside = (jnp.asarray(bound.low) <= sigma) & (sigma <= jnp.asarray(bound.high))
        return jax.lax.cond(
            inside,
            lambda: jnp.asarray(bound.measure(bound.inner, x, sigma), x.dtype),
            lambda: jnp.full((), jnp.nan, x.dtype),
        )

    path = sample.solve_path(bound.inner, x, sigmas, step=step, key=key, record=dimension)
    return path.denoised[-1], path.recorded


_run_many = eqx.filter_jit(eqx.filter_vmap(_run, in_axes=(None, 0, 0, 0, None, None)))
