r"""One step of training, as a pure function of the state, a batch and a key.

The gradient is the mean over the batch, taken in `accumulate` parts; on a mesh the batch is spread
over all devices and XLA adds the gradients up.  Every random number is a function of the key and of
a point's place in the batch, never of the number of parts or devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmh_jax import nn
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.ema import average_rate, exponent, halving_rate
from mmh_jax.train.loss import denoising_loss, symmetry_loss
from mmh_jax.train.sharding import Placement
from mmh_jax.typing import Array, Key

__all__ = ["TrainState", "init_state", "step"]


@struct.dataclass
class TrainState:
    """All that a run needs to continue.

    Attributes:
        params: the weights.
        ema: their running average.
        opt_state: the optimiser's.
        step: steps done.
        epoch: epochs done.
        averages: one for each of `TrainConfig.ema_widths`.
    """

    params: Any
    ema: Any
    opt_state: Any
    step: Array
    epoch: Array
    averages: tuple[Any, ...] = ()


def init_state(denoiser: NetworkDenoiser, config: TrainConfig) -> TrainState:
    """The state before the first step."""
    params = denoiser.params
    zero = jnp.zeros((), jnp.int32)
    opt_state = config.optimizer().init(params)
    averages = (params,) * len(config.ema_widths)
    # A copy: the state's buffers are donated to the next round.
    return jax.tree.map(jnp.array, TrainState(params, params, opt_state, zero, zero, averages))


def _inputs(
    config: TrainConfig, x0: Array, condition: Any, key: Key
) -> tuple[Array, Array, tuple[Array, Array], Any]:
    """The batch after augmentation, its noise levels, its keys of noise and of dropped conditions,
    and its conditions."""
    level_key, noise_key, augment_key, drop_key = jax.random.split(key, 4)
    num = x0.shape[0]
    sigma = config.noise_levels(num, key=level_key).astype(x0.dtype)
    if config.augment is not None:
        augment_keys = jax.random.split(augment_key, num)
        augment = config.augment
        x0 = jax.vmap(lambda x, k: augment(x, key=k))(x0, augment_keys)
    keys = (jax.random.split(noise_key, num), jax.random.split(drop_key, num))
    return x0, sigma, keys, condition


def _batch_loss(
    config: TrainConfig, denoiser: NetworkDenoiser, params: Any, batch: tuple[Any, ...]
) -> Array:
    """The mean over the batch."""
    model = denoiser.replace(params=params)  # pyright: ignore[reportAttributeAccessIssue]

    def kept(condition: Any, key: Key) -> Any:
        if config.condition_dropout == 0:
            return condition
        # Here and not before: a learned null condition is a parameter, and gets its gradient.
        null = config.null_condition
        network: Any = getattr(denoiser.apply, "apply", denoiser.apply)
        null = nn.null_condition(network, params) if null is None else null
        return nn.drop_condition(condition, config.condition_dropout, key=key, null=null)

    def mean_of(loss: Callable[..., Array], every: int) -> Array:
        def at_one(x: Array, sigma: Array, keys: tuple[Key, Key], condition: Any) -> Array:
            noise_key, drop_key = keys
            bound = model if condition is None else model.condition(kept(condition, drop_key))
            return loss(bound, x, sigma, config.sigma_data, key=noise_key)

        return jnp.mean(jax.vmap(at_one)(*jax.tree.map(lambda leaf: leaf[::every], batch)))

    total = mean_of(functools.partial(denoising_loss, weight=config.weight), 1)
    if config.symmetry > 0:
        # Levels rise along a batch: every fourth point has all of them.
        total += config.symmetry * mean_of(symmetry_loss, 4)
    return total


def _gradient(
    config: TrainConfig, denoiser: NetworkDenoiser, params: Any, batch: Any, place: Placement | None
) -> tuple[Array, Any]:
    def value_and_grad(part: Any) -> tuple[Array, Any]:
        if place is not None:
            part = place.spread(part)
        return jax.value_and_grad(lambda p: _batch_loss(config, denoiser, p, part))(params)

    parts = config.accumulate
    if parts == 1:
        return value_and_grad(batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(part)), None

    # Strided: noise levels rise along a batch, and each part has all of them.
    split = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), batch
    )
    zero = (jnp.zeros((), jax.tree.leaves(batch)[0].dtype), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def step(
    config: TrainConfig,
    denoiser: NetworkDenoiser,
    state: TrainState,
    batch: tuple[Array, Any],
    key: Key,
    place: Placement | None = None,
) -> tuple[TrainState, Array]:
    """The state after one batch, and the loss.

    Args:
        config: the settings.
        denoiser: the model; its weights are those of the state.
        state: before the step.
        batch: points (B, *shape), and their conditions, with a leading axis of B, or None.
        key: draws noise levels, noise, augmentation and dropped conditions.
        place: where arrays live on a mesh, or None.
    """
    inputs = _inputs(config, *batch, key)
    loss, grads = _gradient(config, denoiser, state.params, inputs, place)
    updates, opt_state = config.optimizer().update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def toward(mean: Any, rate: Array) -> Any:
        return jax.tree.map(
            lambda old, new: old + rate.astype(old.dtype) * (new - old), mean, params
        )

    ema = toward(state.ema, halving_rate(state.step, config.ema_half_life))
    averages = tuple(
        toward(mean, average_rate(state.step + 1, exponent(width)))
        for mean, width in zip(state.averages, config.ema_widths, strict=True)
    )
    state = TrainState(params, ema, opt_state, state.step + 1, state.epoch, averages)
    return state if place is None else place.keep(state), loss
