r"""The training loop: epochs, or parts of one, inside one compiled loop.

`fit` is a generator.  It yields after every round and never prints; the caller shows
progress, saves checkpoints, or stops.  Every random number is a function of the seed and the epoch
(of a stream: the step), so a run that continues from a saved state ends with the same weights, bit
for bit, as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.train.compiled import compiled
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.inputs import check_labels, known_classes
from mmh_jax.train.memory import out_of_memory_explained
from mmh_jax.train.sharding import Placement
from mmh_jax.train.step import TrainState, init_state, step
from mmh_jax.train.stream import Stream
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Metrics", "fit"]

# Batches of a stream go to the device in chunks of so many numbers.
_CHUNK = 2**24


class Metrics(NamedTuple):
    """What `fit` yields after a round."""

    step: int
    loss: float
    state: TrainState


def _batches(num_points: int, config: TrainConfig, key: Key) -> Array:
    """One epoch's point indices, (steps, batch), in random order; every point equally often."""
    size = config.batch_size
    steps = config.steps_per_epoch(num_points)
    copies = -(-steps * size // num_points)
    order = jax.random.permutation(key, jnp.tile(jnp.arange(num_points), copies))
    return order[: steps * size].reshape(steps, size)


@compiled(static_argnames=("config", "num_epochs", "place"), donate_argnames="state")
def _round(
    config: TrainConfig,
    denoiser: NetworkDenoiser,
    state: TrainState,
    data: tuple[Array, Any],
    key: Key,
    num_epochs: int,
    place: Placement | None = None,
) -> tuple[TrainState, Array]:
    def one_step(state: TrainState, inputs: tuple[Array, Key]) -> tuple[TrainState, Array]:
        indices, step_key = inputs
        batch = jax.tree.map(lambda leaf: leaf[indices], data)
        return step(config, denoiser, state, batch, step_key, place)

    def one_epoch(state: TrainState, _: None) -> tuple[TrainState, Array]:
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, state.epoch))
        indices = _batches(data[0].shape[0], config, order_key)
        keys = jax.random.split(noise_key, indices.shape[0])
        state, losses = jax.lax.scan(one_step, state, (indices, keys))
        return dataclasses.replace(state, epoch=state.epoch + 1), losses.mean()

    state, losses = jax.lax.scan(one_epoch, state, None, length=num_epochs)
    return state, losses.mean()


@compiled(static_argnames=("config", "place"), donate_argnames="state")
def _part(
    config: TrainConfig,
    denoiser: NetworkDenoiser,
    state: TrainState,
    data: tuple[Array, Any],
    key: Key,
    stop: Array,
    place: Placement | None = None,
) -> tuple[TrainState, Array]:
    """The steps of this epoch up to its step `stop`; one program for all parts."""
    steps = config.steps_per_epoch(data[0].shape[0])
    start = state.step - state.epoch * steps
    order_key, noise_key = jax.random.split(jax.random.fold_in(key, state.epoch))
    indices = _batches(data[0].shape[0], config, order_key)
    keys = jax.random.split(noise_key, steps)

    def one_step(number: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        batch = jax.tree.map(lambda leaf: leaf[indices[number]], data)
        state, loss = step(config, denoiser, carry[0], batch, keys[number], place)
        return state, carry[1] + loss.astype(jnp.float32)

    zero = jnp.zeros((), jnp.float32)
    state, total = jax.lax.fori_loop(start, stop, one_step, (state, zero))
    epoch = state.epoch + (stop == steps)
    return dataclasses.replace(state, epoch=epoch), total / (stop - start)


@compiled(static_argnames=("config", "place"), donate_argnames="state")
def _chunk(
    config: TrainConfig,
    denoiser: NetworkDenoiser,
    state: TrainState,
    batches: tuple[Array, Any],
    key: Key,
    place: Placement | None = None,
) -> tuple[TrainState, Array]:
    """Steps over batches (S, B, *shape) of a stream."""

    def one_step(state: TrainState, batch: tuple[Array, Any]) -> tuple[TrainState, Array]:
        return step(config, denoiser, state, batch, jax.random.fold_in(key, state.step), place)

    state, losses = jax.lax.scan(one_step, state, batches)
    return state, losses.sum()


def fit(
    denoiser: NetworkDenoiser,
    points: ArrayLike | Stream,
    config: TrainConfig,
    *,
    key: Key,
    conditions: Any = None,
    state: TrainState | None = None,
    mesh: Mesh | None = None,
    shard_params: bool = False,
    pause_every: int | None = None,
) -> Iterator[Metrics]:
    """Train a denoiser on points, yielding after every round.

    Args:
        denoiser: the untrained model (`denoise.precondition`), in normalised units.
        points: (N, *shape), normalised, kept on the device; or a `Stream` of batches.
        config: the settings.
        key: orders the points and draws the noise.
        conditions: one for each point, a pytree with a leading axis of N; given to the network by
            `denoiser.condition`.  Those of a stream come with its batches.
        state: where to continue; None starts from `denoiser.params`.
        mesh: devices, over which every batch is spread; the result is that of one device but for
            the order of sums.
        shard_params: whether the weights are in pieces over the devices, too (FSDP).
        pause_every: rounds also end at multiples of so many steps.

    Yields:
        `Metrics(step, loss, state)`.  The state given to one round is consumed by the next: save it
        or copy it before asking for another.  `denoiser.replace(params=state.ema)` is the model.

    Raises:
        ValueError: if a point has not the denoiser's shape, if there is not one condition for each
            point, if a label is none of the network's, or if the devices do not divide a batch.
        FloatingPointError: if the loss stops being finite.
        MemoryError: if a step does not fit on the device.
    """
    place = _placement(mesh, shard_params, config)
    if pause_every is not None and pause_every < 1:
        raise ValueError(f"`fit(pause_every={pause_every})` must be at least 1, or None.")
    with out_of_memory_explained(config):
        start = init_state(denoiser, config) if state is None else state
        start = start if place is None else place.put(start)
        if isinstance(points, Stream):
            yield from _fit_stream(denoiser, points, config, key, start, place, pause_every)
        else:
            data = _checked(denoiser, points, conditions, config)
            data = data if place is None else place.copied(data)
            yield from _fit_array(denoiser, data, config, key, start, place, pause_every)


def _fit_array(
    denoiser: NetworkDenoiser, data: tuple[Array, Any], config: TrainConfig, key: Key,
    state: TrainState, place: Placement | None, pause: int | None,
) -> Iterator[Metrics]:  # fmt: skip
    num_points = data[0].shape[0]
    total, per_epoch = config.total_steps(num_points), config.steps_per_epoch(num_points)
    per_round = max(1, config.steps_per_round // per_epoch)
    in_parts = per_epoch > config.steps_per_round or (pause or per_epoch) % per_epoch > 0
    step = int(state.step)
    while step < total:
        # Rounds end at the same steps, wherever a run continues.
        epoch, done = divmod(step, per_epoch)
        if in_parts or done > 0:
            stop = min(done - done % config.steps_per_round + config.steps_per_round, per_epoch)
            stop = min(stop, total - epoch * per_epoch, done + _until(step, pause))
            state, loss = _part(config, denoiser, state, data, key, jnp.int32(stop), place)
            step += stop - done
        else:
            num_epochs = min(per_round - epoch % per_round, total // per_epoch - epoch)
            num_epochs = min(num_epochs, _until(step, pause) // per_epoch)
            state, loss = _round(config, denoiser, state, data, key, num_epochs, place)
            step += num_epochs * per_epoch
        yield _metrics(state, float(loss), config)


def _until(step: int, pause: int | None) -> int:
    """Steps to the next multiple of `pause`."""
    return 2**30 if pause is None else pause - step % pause


def _fit_stream(
    denoiser: NetworkDenoiser, stream: Stream, config: TrainConfig, key: Key,
    state: TrainState, place: Placement | None, pause: int | None,
) -> Iterator[Metrics]:  # fmt: skip
    done, num_classes = int(state.step), known_classes(denoiser, config)
    while done < config.num_steps:
        first = done
        stop = min(done - done % config.steps_per_round + config.steps_per_round, config.num_steps)
        stop = min(stop, done + _until(done, pause))
        losses = []
        while done < stop:
            batch = _batch_of(stream, done, denoiser, config, num_classes)
            size = max(_CHUNK // max(batch[0].size, 1), 1)
            chunk = [batch]
            chunk += [
                _batch_of(stream, index, denoiser, config, num_classes)
                for index in range(done + 1, min(done + size, stop))
            ]
            batches = jax.tree.map(lambda *leaves: np.stack(leaves), *chunk)
            # Not waited for: the next chunk is read meanwhile.
            state, loss = _chunk(config, denoiser, state, batches, key, place)
            losses.append(loss)
            done += len(chunk)
        yield _metrics(state, float(sum(losses)) / (done - first), config)


def _metrics(state: TrainState, loss: float, config: TrainConfig) -> Metrics:
    if not loss < float("inf"):
        raise FloatingPointError(
            f"the loss became {loss} by step {int(state.step)}; lower the learning rate "
            f"({config.learning_rate}) or look for outliers in the data."
        )
    return Metrics(int(state.step), loss, state)


def _placement(mesh: Mesh | None, shard_params: bool, config: TrainConfig) -> Placement | None:
    if mesh is None:
        if shard_params:
            raise ValueError("`fit(shard_params=True)` needs a `mesh` to spread them over.")
        return None
    part = config.batch_size // config.accumulate
    if part % mesh.size:
        raise ValueError(
            f"`fit(mesh=...)` has {mesh.size} devices, which do not divide the {part} points of a "
            "batch (or of one of its accumulated parts); change `batch_size`."
        )
    # The axes of `jax.make_mesh` are explicit, and annotations are for automatic ones.
    return Placement(Mesh(mesh.devices, mesh.axis_names), shard_params)


def _check_shape(points: Any, denoiser: NetworkDenoiser, ndim: int) -> None:
    if denoiser.shape is not None and points.shape[ndim:] != tuple(denoiser.shape):
        raise ValueError(
            f"`fit(points=...)` holds points of shape {points.shape[ndim:]}; "
            f"this denoiser takes {tuple(denoiser.shape)}."
        )


def _checked(
    denoiser: NetworkDenoiser, points: Any, conditions: Any, config: TrainConfig
) -> tuple[Array, Any]:
    points = jnp.asarray(points)
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(
            f"`fit(points=...)` has dtype {points.dtype}; it takes real numbers, normalised: bytes "
            "become such by `x.astype(float) / 255`, less their mean, over their spread."
        )
    if points.ndim == 0 or points.size == 0:
        raise ValueError(f"`fit(points=...)` has shape {points.shape}; pass at least one point.")
    _check_shape(points, denoiser, 1)
    conditions = jax.tree.map(jnp.asarray, conditions)
    for leaf in jax.tree.leaves(conditions):
        if leaf.shape[:1] != points.shape[:1]:
            raise ValueError(
                f"`fit(conditions=...)` has an array of shape {leaf.shape} for {len(points)} "
                "points; pass one condition for each point."
            )
    check_labels("`fit(conditions=...)`", conditions, known_classes(denoiser, config))
    return points, conditions


def _batch_of(
    stream: Stream,
    index: int,
    denoiser: NetworkDenoiser,
    config: TrainConfig,
    num_classes: int | None,
) -> tuple[np.ndarray, Any]:
    points, conditions = stream.batch(index)
    points = np.asarray(points)
    if len(points) != config.batch_size:
        raise ValueError(
            f"`fit(points=...)`: batch {index} of the stream holds {len(points)} points, but "
            f"batch_size is {config.batch_size}; make them agree."
        )
    _check_shape(points, denoiser, 1)
    conditions = jax.tree.map(np.asarray, conditions)
    check_labels(f"`fit(points=...)`: batch {index} of the stream", conditions, num_classes)
    return points, conditions
