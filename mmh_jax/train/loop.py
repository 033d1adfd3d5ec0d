r"""The training loop: whole epochs inside one compiled scan, with an average of the weights.

`fit` is a generator.  It yields after every round (a few epochs) and never prints; the caller shows
progress, saves checkpoints, or stops.  Every random number is a function of the seed and the epoch,
so a run that continues from a saved state ends with the same weights, bit for bit, as one that was
never interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.train.loss import NoiseLevels, denoising_loss, log_uniform, symmetry_loss
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Metrics", "TrainConfig", "TrainState", "fit", "init_state"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; noise levels are in units of normalised data (`sigma_data`).

    Attributes:
        num_steps: optimiser steps (rounded up to whole epochs).
        batch_size: points per step; every point of a smaller data set appears several times.
        learning_rate: of Adam, reached after `warmup_steps`, then lowered to 0 along a cosine.
        warmup_steps: steps of linear warm-up.
        max_grad_norm: gradients are clipped to this global norm.
        ema_half_life: steps after which a weight's share in the running average has halved; the
            average starts faster, so that early weights do not linger.
        noise_levels: the law of sigma.
        sigma_data: the standard deviation of the (normalised) data.
        steps_per_round: optimiser steps between two yields, rounded to whole epochs.
        symmetry: the weight of `symmetry_loss`, taken at every fourth point of a batch.
    """

    num_steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_half_life: float = 500.0
    noise_levels: NoiseLevels = log_uniform(0.003, 5.0)  # noqa: RUF009 (a frozen value)
    sigma_data: float = 1.0
    steps_per_round: int = 250
    # Not in the repr, which is in the fingerprints of runs begun before this field was here.
    symmetry: float = dataclasses.field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "steps_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"`TrainConfig({name}={getattr(self, name)})` must be at least 1.")
        if not 0 <= self.symmetry < float("inf"):
            raise ValueError(
                f"`TrainConfig(symmetry={self.symmetry})` must be 0, for none, or positive."
            )

    def steps_per_epoch(self, num_points: int) -> int:
        """Optimiser steps in one pass over `num_points` points."""
        return max(1, num_points // self.batch_size)

    def num_epochs(self, num_points: int) -> int:
        """Epochs in the whole run."""
        return -(-self.num_steps // self.steps_per_epoch(num_points))

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with clipping, warm-up and cosine decay."""
        warmup = min(self.warmup_steps, self.num_steps // 10)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.num_steps, warmup + 1)
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(rate))


@struct.dataclass
class TrainState:
    """All that a run needs to continue: weights, their average, the optimiser, the epoch."""

    params: Any
    ema: Any
    opt_state: Any
    step: Array
    epoch: Array


class Metrics(NamedTuple):
    """What `fit` yields after a round."""

    step: int
    loss: float
    state: TrainState


def init_state(denoiser: NetworkDenoiser, config: TrainConfig) -> TrainState:
    """The state before the first step."""
    params = denoiser.params
    zero = jnp.zeros((), jnp.int32)
    opt_state = config.optimizer().init(params)
    # A copy: the state's buffers are donated to the next round.
    return jax.tree.map(jnp.array, TrainState(params, params, opt_state, zero, zero))


def _batches(num_points: int, config: TrainConfig, key: Key) -> Array:
    """One epoch's point indices, (steps, batch), in random order; every point equally often."""
    size = config.batch_size
    steps = config.steps_per_epoch(num_points)
    copies = -(-steps * size // num_points)
    order = jax.random.permutation(key, jnp.tile(jnp.arange(num_points), copies))
    return order[: steps * size].reshape(steps, size)


def _step(
    config: TrainConfig, denoiser: NetworkDenoiser, state: TrainState, x0: Array, key: Key
) -> tuple[TrainState, Array]:
    level_key, noise_key = jax.random.split(key)
    sigma = config.noise_levels(x0.shape[0], key=level_key).astype(x0.dtype)
    keys = jax.random.split(noise_key, x0.shape[0])

    def batch_loss(params: Any) -> Array:
        model = denoiser.replace(params=params)  # pyright: ignore[reportAttributeAccessIssue]

        def mean_of(loss: Callable[..., Array], every: int) -> Array:
            one = functools.partial(loss, model, sigma_data=config.sigma_data)
            inputs = (x0[::every], sigma[::every], keys[::every])
            return jnp.mean(jax.vmap(lambda x, s, k: one(x, s, key=k))(*inputs))

        total = mean_of(denoising_loss, 1)
        if config.symmetry > 0:
            # Levels rise along a batch: every fourth point has all of them.
            total += config.symmetry * mean_of(symmetry_loss, 4)
        return total

    loss, grads = jax.value_and_grad(batch_loss)(state.params)
    updates, opt_state = config.optimizer().update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # min(1 - 2^(-1/h), 9 / (10 + step)): the warm-up of the average.
    rate = jnp.minimum(1 - 0.5 ** (1 / config.ema_half_life), 9 / (10 + state.step))
    ema = jax.tree.map(lambda mean, new: mean + rate * (new - mean), state.ema, params)
    return TrainState(params, ema, opt_state, state.step + 1, state.epoch), loss


@functools.partial(jax.jit, static_argnames=("config", "num_epochs"), donate_argnames="state")
def _round(
    config: TrainConfig,
    denoiser: NetworkDenoiser,
    state: TrainState,
    points: Array,
    key: Key,
    num_epochs: int,
) -> tuple[TrainState, Array]:
    def one_step(state: TrainState, inputs: tuple[Array, Key]) -> tuple[TrainState, Array]:
        indices, step_key = inputs
        return _step(config, denoiser, state, points[indices], step_key)

    def one_epoch(state: TrainState, _: None) -> tuple[TrainState, Array]:
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, state.epoch))
        indices = _batches(points.shape[0], config, order_key)
        keys = jax.random.split(noise_key, indices.shape[0])
        state, losses = jax.lax.scan(one_step, state, (indices, keys))
        return dataclasses.replace(state, epoch=state.epoch + 1), losses.mean()

    state, losses = jax.lax.scan(one_epoch, state, None, length=num_epochs)
    return state, losses.mean()


def fit(
    denoiser: NetworkDenoiser,
    points: ArrayLike,
    config: TrainConfig,
    *,
    key: Key,
    state: TrainState | None = None,
) -> Iterator[Metrics]:
    """Train a denoiser on points, yielding after every round.

    Args:
        denoiser: the untrained model (`denoise.precondition`), in normalised units.
        points: (N, *shape), normalised.
        config: the settings.
        key: orders the points and draws the noise.
        state: where to continue; None starts from `denoiser.params`.

    Yields:
        `Metrics(step, loss, state)`.  The state given to one round is consumed by the next: save it
        or copy it before asking for another.  `denoiser.replace(params=state.ema)` is the model.

    Raises:
        ValueError: if a point has not the denoiser's shape.
        FloatingPointError: if the loss stops being finite.
    """
    points = jnp.asarray(points)
    if denoiser.shape is not None and points.shape[1:] != tuple(denoiser.shape):
        raise ValueError(
            f"`fit(points=...)` holds points of shape {points.shape[1:]}; "
            f"this denoiser takes {tuple(denoiser.shape)}."
        )
    num_points = points.shape[0]
    total = config.num_epochs(num_points)
    per_round = max(1, config.steps_per_round // config.steps_per_epoch(num_points))
    state = init_state(denoiser, config) if state is None else state
    epoch = int(state.epoch)
    while epoch < total:
        # Rounds end at multiples of `per_round`, wherever a run continues.
        num_epochs = min(per_round - epoch % per_round, total - epoch)
        state, loss = _round(config, denoiser, state, points, key, num_epochs)
        assert state is not None  # for the type checker, which does not see through jit
        epoch += num_epochs
        value = float(loss)
        if not value < float("inf"):
            raise FloatingPointError(
                f"the loss became {value} by step {int(state.step)}; lower the learning rate "
                f"({config.learning_rate}) or look for outliers in the data."
            )
        yield Metrics(int(state.step), value, state)
