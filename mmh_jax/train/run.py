"""From points to a trained model in one call: normalise, build, train, save, and resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmh_jax.denoise import Affine
from mmh_jax.train.checkpoint import Checkpoints, run_fingerprint
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.log import JsonLines
from mmh_jax.train.loop import Metrics, fit
from mmh_jax.train.memory import out_of_memory_explained
from mmh_jax.train.recipe import Recipe
from mmh_jax.train.step import init_state
from mmh_jax.train.store import ModelConfig, build, check_config, load, load_config, save

__all__ = ["check_trainable", "normalisation", "train_model"]

METRICS = "metrics.jsonl"
# A label beyond these, and the number of points, is no class but a damaged number.
MOST_CLASSES = 2**16


def normalisation(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean point, and the standard deviation of all coordinates around it.

    One number scales every coordinate, so that noise stays isotropic in data units.

    Raises:
        ValueError: if the points are all the same.
    """
    shift = points.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean((points - shift) ** 2)))
    if not scale > 0:
        raise ValueError(
            "all points are equal: there is nothing to learn from a constant data set."
        )
    return shift.astype(np.float32), scale


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
            after a trial of some seconds.  A run that is continued keeps its number of steps.
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
    points, folder = _checked_points(points), Path(folder)
    _warn_if_narrow(recipe, math.prod(points.shape[1:]))
    labels, num_classes = _checked_labels(labels, len(points), recipe)
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
        steps = _steps_within(budget, began, work, fingerprint, config, trial)
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
    points = _checked_points(points)
    _, num_classes = _checked_labels(labels, len(points), recipe)
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


def _warn_if_narrow(recipe: Recipe, size: int) -> None:
    if recipe.network == "ResidualMLP" and recipe.width < size:
        warnings.warn(
            f"a network of width {recipe.width} on points of {size} coordinates: its Jacobian has "
            f"at least {size - recipe.width} eigenvalues near 1 at small noise levels, so that no "
            f"LID below {size - recipe.width} will be found.  Use `recipe.wide_enough({size})`.",
            stacklevel=3,
        )


def _checked_points(points: np.ndarray) -> np.ndarray:
    """The points as float32."""
    points = np.asarray(points)
    if not np.issubdtype(points.dtype, np.floating):
        raise TypeError(
            f"`train_model(points=...)` has dtype {points.dtype}; it takes real numbers in data "
            "units: bytes become such by `points / np.float32(255)`, as `data.load` reads them."
        )
    points = points.astype(np.float32, copy=False)
    if points.ndim < 2 or points.size == 0:
        raise ValueError(
            f"`train_model(points=...)` has shape {points.shape}; it takes (N, *shape), N points."
        )
    bad = ~np.isfinite(points).reshape(len(points), -1).all(axis=1)
    if bad.any():
        raise ValueError(
            f"`train_model(points=...)` has NaN or infinite values in {bad.sum()} of "
            f"{len(points)} rows, row {np.argmax(bad)} the first; remove them."
        )
    return points


def _checked_labels(
    labels: np.ndarray | None, num: int, recipe: Recipe
) -> tuple[np.ndarray | None, int | None]:
    """The labels as int32, and how many classes there are."""
    if labels is None:
        return None, None
    labels = np.asarray(labels)
    if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`train_model(labels=...)` has shape {labels.shape} and dtype {labels.dtype}; it "
            f"takes one whole number, from 0, for each of the {num} points."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= max(num, MOST_CLASSES):
        wrong, row = (low, labels.argmin()) if low < 0 else (high, labels.argmax())
        raise ValueError(
            f"`train_model(labels=...)` is out of range: label {wrong} in row {row}; classes are "
            f"counted from 0, and there are at most {max(num, MOST_CLASSES)}. "
            "`np.unique(labels, return_inverse=True)[1]` counts those that occur."
        )
    if recipe.network in ("ResidualMLP", "GradientMLP"):
        raise ValueError(
            f"`train_model(labels=...)`: a {recipe.network} takes no condition; use a recipe with "
            "the network `UNet` or `DiT`."
        )
    return labels.astype(np.int32), high + 1


def _steps_within(
    budget: float,
    began: float,
    work: Path,
    fingerprint: str,
    config: TrainConfig,
    train: Callable[[TrainConfig], Iterator[Metrics]],
) -> int:
    """How many steps fit into so many minutes since `began`; of a run begun before, as many."""
    if not 0 < budget < float("inf"):
        raise ValueError(f"`train_model(budget={budget})` must be positive, in minutes.")
    path = work.with_name(work.name + "_steps.json")
    if path.exists():
        found = json.loads(path.read_text())
        if found.get("fingerprint") == fingerprint:
            return int(found["num_steps"])
    # Short rounds, for a step may take a second; of very short steps too few are promised.
    rounds = train(dataclasses.replace(config, steps_per_round=5, num_steps=10**9))
    compiled = next(rounds).step
    now = start = time.monotonic()
    done = compiled
    while now - start < min(5.0, 3 * budget):
        done, now = next(rounds).step, time.monotonic()
    # The same again to compile with the right number of steps.
    left = 60 * budget - 2 * (start - began) - (now - start)
    num_steps = max(int(left * (done - compiled) / (now - start)), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"fingerprint": fingerprint, "num_steps": num_steps}))
    os.replace(partial, path)
    return num_steps
