"""From points to a trained model in one call: normalise, build, train, save, and resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmh_jax.denoise import Affine
from mmh_jax.train.budget import steps_within
from mmh_jax.train.checkpoint import Checkpoints, run_fingerprint
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.inputs import (
    checked_labels,
    checked_points,
    normalisation,
    warn_if_narrow,
)
from mmh_jax.train.log import JsonLines
from mmh_jax.train.loop import fit
from mmh_jax.train.memory import out_of_memory_explained
from mmh_jax.train.recipe import Recipe
from mmh_jax.train.step import init_state
from mmh_jax.train.store import ModelConfig, build, check_config, load, load_config, save

__all__ = ["check_trainable", "normalisation", "train_model"]

METRICS = "metrics.jsonl"


def train_model(
    points: np.ndarray,
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int,
    labels: np.ndarray | None = None,
    work: str | Path | None = None,
    save_every: float = 10.0,
    keep_every: int | None = None,
    budget: float | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    mesh: Mesh | None = None,
    shard_params: bool = False,
    about: dict[str, Any] | None = None,
) -> Affine:
    """Train a score model on points and save it; continue where an earlier call was cut off.

    Beside the model, `metrics.jsonl` has a row for each round: step, loss, seconds since this call
    began and points per second.

    Args:
        points: (N, *shape), real numbers in data units.
        recipe: sizes.
        folder: where the model goes.  If a finished model of the same run is there, it is loaded.
        seed: of weights, order and noise.
        labels: (N,) whole numbers from 0, for a conditional model (`recipe.network` `UNet` or
            `DiT`); None for an unconditional one.
        work: where checkpoints go, by default `folder / "checkpoints"`.
        save_every: seconds between checkpoints.
        keep_every: keep the states at multiples of so many steps; see `Checkpoints`.
        budget: minutes, in place of the recipe's number of steps: about as many are taken as fit,
            after a trial of some seconds.  Compiling, twice, is in it: a shorter budget gives one
            step.  A run that is continued keeps its number of steps.
        progress: called as `progress(step, total_steps, loss)` after each round.
        log: called with each row of the metrics, too, such as `train.tensorboard(folder)`.
        mesh, shard_params: devices that share the work; as for `fit`.
        about: anything to keep in the model's `config.json`.

    Returns:
        The trained denoiser, in data units.

    Raises:
        TypeError: if the points are not of a floating dtype.
        ValueError: if a point is not finite; if the folder holds a model or checkpoints of another
            run; if the labels do not fit; if the budget is not positive; if the network cannot be
            built for such points, or has dropout, which is not trained.
        MemoryError: if model or step do not fit on the device.

    Warns:
        UserWarning: if the network is narrower than a point: see `Recipe.wide_enough`.
    """
    began = time.monotonic()
    points, folder = checked_points(points), Path(folder)
    warn_if_narrow(recipe, math.prod(points.shape[1:]))
    labels, num_classes = checked_labels(labels, len(points), recipe)
    shift, scale = normalisation(points)
    config = recipe.train_config(num_classes)
    fingerprint = _fingerprint(points, config, recipe, seed, labels, budget)
    training = {"fingerprint": fingerprint, "seed": seed, "num_points": len(points)}
    training |= recipe.settings()
    training |= ({} if budget is None else {"budget": budget}) | (about or {})
    model_config = _model_config(recipe, points.shape[1:], num_classes, scale, training)
    if (folder / "config.json").exists():
        if load_config(folder).training.get("fingerprint") == fingerprint:
            return load(folder)
        raise ValueError(
            f"{folder} holds a model of another run; choose another folder, or delete it."
        )
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    with out_of_memory_explained(config):
        model = build(model_config, shift, key=init_key)
    work = folder / "checkpoints" if work is None else Path(work)
    normalised = (points - shift) / np.float32(scale)
    if budget is not None:
        trial = functools.partial(
            fit, model.inner, normalised, key=fit_key, conditions=labels, mesh=mesh,
            shard_params=shard_params,
        )  # fmt: skip
        steps = steps_within(budget, began, work, fingerprint, config, trial)
        config = dataclasses.replace(config, num_steps=steps)
        model_config.training["num_steps"] = steps
    total = config.total_steps(len(points))
    folder.mkdir(parents=True, exist_ok=True)
    with (
        out_of_memory_explained(config),
        Checkpoints(work, fingerprint, keep_every=keep_every) as checkpoints,
    ):
        state = checkpoints.latest(init_state(model.inner, config))
        first = 0 if state is None else int(state.step)
        lines = JsonLines(folder / METRICS, step=first)
        start = last_save = time.monotonic()
        training = fit(
            model.inner, normalised, config, key=fit_key, conditions=labels, state=state,
            mesh=mesh, shard_params=shard_params, pause_every=keep_every,
        )  # fmt: skip
        for metrics in training:
            state, now = metrics.state, time.monotonic()
            rate = (metrics.step - first) * config.batch_size / max(now - start, 1e-9)
            row = {"step": metrics.step, "loss": metrics.loss}
            row |= {"seconds": now - start, "points_per_second": rate}
            for write in (lines, *(() if log is None else (log,))):
                write(row)
            if progress is not None:
                progress(metrics.step, total, metrics.loss)
            due = keep_every is not None and metrics.step % keep_every == 0
            if due or (now - last_save >= save_every and metrics.step < total):
                checkpoints.save(state)
                last_save = time.monotonic()
        assert state is not None
    model = dataclasses.replace(model, inner=dataclasses.replace(model.inner, params=state.ema))
    save(folder, model_config, model)
    return model


def check_trainable(
    points: np.ndarray, recipe: Recipe, *, labels: np.ndarray | None = None
) -> None:
    """Raise what `train_model` raises of such points, labels and recipe, before any work.

    Args:
        points, recipe, labels: as for `train_model`.

    Raises:
        TypeError, ValueError: as `train_model`; and if the network cannot be built for such points.

    >>> from mmh_jax.train import IMAGE_RECIPES
    >>> try:
    ...     check_trainable(np.random.default_rng(0).uniform(size=(9, 7, 7)), IMAGE_RECIPES["cpu"])
    ... except ValueError as error:
    ...     print(str(error)[:46])
    `UNet(shape=(7, 7, 1))` cannot be halved 2 tim
    """
    points = checked_points(points)
    _, num_classes = checked_labels(labels, len(points), recipe)
    _, scale = normalisation(points)
    check_config(_model_config(recipe, points.shape[1:], num_classes, scale, {}))


def _model_config(
    recipe: Recipe,
    shape: tuple[int, ...],
    num_classes: int | None,
    scale: float,
    training: dict[str, Any],
) -> ModelConfig:
    return ModelConfig(
        network=recipe.network,
        network_options=recipe.network_options(num_classes),
        shape=shape,
        scale=scale,
        sigma_data=recipe.train_config(num_classes).sigma_data,
        sigma_min=recipe.sigma_min * scale,
        sigma_max=recipe.sigma_max * scale,
        training=training,
        objective=recipe.objective,
    )


def _fingerprint(
    points: np.ndarray,
    config: TrainConfig,
    recipe: Recipe,
    seed: int,
    labels: np.ndarray | None,
    budget: float | None,
) -> str:
    settings: dict[str, Any] = {"recipe": recipe.settings(), "seed": seed}
    if labels is not None:
        settings["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
    if budget is not None:
        # Not the number of steps, which is not known yet.
        config = dataclasses.replace(config, num_steps=1)
        settings["budget"] = budget
    return run_fingerprint(points, config, **settings)
