r"""Optimiser steps in rounds, whose random numbers depend on the number of the step alone.

For models that are not denoisers (`fit_vae`, `fit_gan`).  Step n draws its batch, with replacement,
and its noise from `fold_in(key, n)`: a run may stop and continue after any step.

A step is one compiled call, and not a turn of a scan: on CPUs XLA takes the gradients of
convolutions in a loop on another path, measured 5 times (with respect to the input) and 15 times
(to the weights) slower than outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.train.compiled import compiled
from mmh_jax.train.ema import halving_rate
from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = ["check_images", "ema_update", "rounds"]

Step = Callable[[Any, Array, Key], tuple[Any, Any]]


def rounds(
    step: Step,
    state: Any,
    points: Array,
    *,
    num_steps: int,
    batch_size: int,
    steps_per_round: int,
    key: Key,
) -> Iterator[tuple[Any, Any]]:
    """Yield the state and the mean of the metrics after every round, up to step `num_steps`.

    Rounds end at multiples of `steps_per_round`, wherever the run continues.

    Args:
        step: `step(state, batch, key) -> (state, metrics)`; hashable, as it is compiled once for
            all that are equal to it.  It adds 1 to `state.step`.
        state: consumed by the first round.
        points: (N, *shape).
        num_steps, batch_size, steps_per_round: as they say.
        key: draws everything.

    Raises:
        FloatingPointError: if a metric stops being finite.
    """
    done = int(state.step)
    while done < num_steps:
        count = min(steps_per_round - done % steps_per_round, num_steps - done)
        each = []
        for _ in range(count):
            state, metrics = _one(step, state, points, key, batch_size)
            each.append(metrics)
        done += count
        metrics = jax.tree.map(lambda *values: float(jnp.stack(values).mean()), *each)
        if not np.all(np.isfinite(jax.tree.leaves(metrics))):
            raise FloatingPointError(
                f"a loss was not finite by step {done}: {metrics}; lower the learning rate or look "
                "for outliers in the data."
            )
        yield state, metrics


@compiled(static_argnames=("step", "batch_size"), donate_argnames="state")
def _one(step: Step, state: Any, points: Array, key: Key, batch_size: int) -> tuple[Any, Any]:
    batch_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
    index = jax.random.randint(batch_key, (batch_size,), 0, len(points))
    return step(state, points[index], noise_key)


def ema_update(mean: Any, new: Any, step: Array, half_life: float) -> Any:
    """A running average of weights, by `halving_rate`."""
    rate = halving_rate(step, half_life)
    return jax.tree.map(
        lambda old, latest: old + rate.astype(old.dtype) * (latest - old), mean, new
    )


def check_images(caller: str, points: ArrayLike, key: Key) -> tuple[Array, Key]:
    """The points as an array, and the key, if they can be trained on.

    Raises:
        TypeError: if the points are not of a floating dtype, or `key` is not a typed key.
        ValueError: if there is no point, or one is not finite.
    """
    key = check_key(caller, key)
    points = jnp.asarray(points)
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(points=...)` has dtype {points.dtype}; points are in real data units. "
            "Convert them, for example `x.astype(float) / 255`."
        )
    if points.ndim < 2 or points.size == 0 or not bool(jnp.all(jnp.isfinite(points))):
        raise ValueError(
            f"`{caller}(points=...)` has shape {points.shape}, or a value that is not finite; it "
            "takes (N, *shape), finite."
        )
    return points, key
