"""Models in folders: train one, load one, measure one at the points of a data set."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import train
from mmh_jax.data import sources
from mmh_jax.report import measure, output
from mmh_jax.report.files import hash_of, write_csv
from mmh_jax.report.stages import (
    Progress,
    Stages,
    check_count,
    check_seed,
    check_sigma,
    find_preset,
)

__all__ = ["hash_of_model", "lid_theta", "load_model", "points_like", "train_model"]


def load_model(folder: str | Path, shape: tuple[int, ...]) -> tuple[Any, train.ModelConfig]:
    """A saved model and its configuration.

    Raises:
        FileNotFoundError, ValueError: as `train.load`; or if it is not for points of `shape`.
    """
    model, config = train.load(folder), train.load_config(folder)
    if config.shape != tuple(shape):
        raise ValueError(
            f"the model in {folder} takes points of shape {config.shape}, "
            f"but those of the source have shape {tuple(shape)}."
        )
    return model, config


def hash_of_model(folder: str | Path | None) -> str | None:
    """Of its weights; None of no model."""
    return None if folder is None else hash_of(Path(folder) / "params.safetensors")


def points_like(source: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Points held out of a model's training.

    Raises:
        ValueError: if they are not of `shape`; or as `data.sources.load`.
    """
    points = sources.load(source).points
    if points.shape[1:] != shape:
        raise ValueError(
            f"--held-out {source} has points of shape {points.shape[1:]}, and those of the source "
            f"have {shape}."
        )
    return points


def train_model(
    source: str | Path,
    out: str | Path,
    *,
    seed: int,
    preset: str = "cpu",
    num_steps: int | None = None,
    network: str = "ResidualMLP",
    by_label: bool = False,
    budget: float | None = None,
    tensorboard: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Train a model on a data set and save it; continue an unfinished run of the same settings.

    Args:
        source: what `data.sources.load` reads.
        out: the folder of the model.
        seed: of weights, order and noise.
        preset: a key of `PRESETS`.
        num_steps: instead of the preset's.
        network: `ResidualMLP`, or for images `UNet` or `DiT`.
        by_label: whether to train a conditional model on the labels of the source.
        budget: minutes of training, in place of a number of steps.
        tensorboard: a folder for TensorBoard's event files.
        overwrite: whether a model in the folder may be replaced, once the new one is finished.
        progress: called as `progress("model", step, total_steps, note)`.

    Raises:
        ValueError: for settings, a source or a folder that cannot be used; before any work.
        OSError: if the folder cannot be written.
        FloatingPointError: if the training diverges.
        MemoryError: if model or step do not fit on the device.
        ImportError: if TensorBoard is asked for and `tensorboardX` is not there.
    """
    out, chosen = Path(out), find_preset(preset)
    check_count("--num-steps", num_steps)
    check_seed(seed)
    output.check_output(out, output.MODEL, overwrite=overwrite)
    data = sources.load(source)
    labels = _labels(data, network) if by_label else None
    if budget is not None and (num_steps is not None or not 0 < budget < float("inf")):
        raise ValueError(
            f"--budget is {budget}; it must be positive, in minutes, without --num-steps."
        )
    recipe = _recipe(preset, network, data.points)
    if num_steps is not None:
        recipe = dataclasses.replace(recipe, num_steps=num_steps)
    # Before anything is written.
    train.check_trainable(data.points, recipe, labels=labels)
    log = None if tensorboard is None else train.tensorboard(tensorboard)
    settings = {"source": str(source), "data": hash_of(data.points), "seed": seed}
    settings |= {"by_label": True} if by_label else {}
    settings |= {} if budget is None else {"budget": budget}
    settings |= recipe.settings()
    work = output.claim(out, output.MODEL, settings, overwrite=overwrite)
    # A model that is there stays until this one is finished.
    aside = work / "model"
    target = aside if aside.exists() or (out / output.MODEL.final).exists() else out
    with Stages(progress)("model") as report:
        train.train_model(
            data.points,
            recipe,
            target,
            seed=seed,
            work=work / "checkpoints",
            labels=labels,
            budget=budget,
            save_every=chosen.save_every,
            progress=_with_rate(report, recipe.batch_size),
            log=log,
            about={"source": data.name, "path": str(source), "data": settings["data"]},
        )
    if target != out:
        output.replace(out, output.MODEL, target)
    shutil.rmtree(work, ignore_errors=True)


def _labels(data: sources.Source, network: str) -> np.ndarray:
    """Those of the source, if a network can use them."""
    if data.labels is None:
        raise ValueError(f"--by-label: the source {data.name} has no labels.")
    if network == "ResidualMLP":
        raise ValueError("--by-label needs --network UNet or --network DiT.")
    return data.labels


def _recipe(preset: str, network: str, points: np.ndarray) -> train.Recipe:
    """The preset's sizes of a network, for points of this shape."""
    if network == "ResidualMLP":
        return find_preset(preset).recipe.wide_enough(points[0].size)
    if points.ndim not in (3, 4):
        raise ValueError(
            f"--network {network} is for images, (H, W) or (H, W, C); the points of this source "
            f"have shape {points.shape[1:]}."
        )
    recipe = train.IMAGE_RECIPES[preset]
    if network == "DiT":
        return dataclasses.replace(recipe, network=network, width=4 * recipe.width, options=())
    return recipe


def _with_rate(report: Any, batch_size: int) -> Any:
    """`progress(step, total, loss)`, with points per second since the first call."""
    first: list[tuple[int, float]] = []

    def progress(step: int, total: int, loss: float) -> None:
        first.append((step, time.monotonic()))
        (start, began), (_, now) = first[0], first[-1]
        del first[1:]
        rate = (step - start) * batch_size / (now - began) if now > began else 0.0
        note = f", {rate:,.0f} points/s" if rate else ""
        report(step, total, f"loss {loss:.3f}{note}")

    return progress


def lid_theta(
    model: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    seed: int,
    sigma: float | None = None,
    methods: Sequence[str] = ("expected",),
    num_points: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """LID_theta of a saved model at the points of a data set, as a CSV file.

    Partial results are kept beside it, in `<out>.work`, until it is written: a call that is killed
    continues there.

    Args:
        model: the folder of the model.
        source: what `data.sources.load` reads.
        out: the file to write.
        seed: of the choice of points.
        sigma: the noise level in data units; None chooses it for each point, at a plateau of
            the curve of its expected FLIPD.
        methods: of `expected`, `tangential`, `flipd`, `projected`, `thresholded` and `rank`; a
            column each.
        num_points: how many points, chosen at random; None for all.
        overwrite: whether the file may be replaced.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        `(columns, diagnostics)`: what was written, and what says whether to believe it (see
        `measure.diagnostics`).

    Raises:
        ValueError, OSError: for what cannot be used or written; before any work.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.work")
    check_sigma(sigma)
    check_count("--num-points", num_points)
    check_seed(seed)
    output.check_file(out, overwrite=overwrite)
    data = sources.load(source)
    points = data.points
    denoiser, config = load_model(model, points.shape[1:])
    settings = {
        "source": str(source),
        "data": hash_of(points),
        "model": hash_of_model(model),
        "sigma": sigma,
        "num_points": num_points,
        "seed": seed,
    }
    output.check_writable(out.parent)
    work = output.claim(partial, output.MEASUREMENT, settings, overwrite=overwrite)
    spectra = measure.spectra(points.shape[1:])
    stages = Stages(progress)
    levels = np.asarray([sigma])
    if sigma is None:
        with stages("sigma") as report:
            levels = measure.choose_levels(
                denoiser, config, points, seed=seed, spectra=spectra,
                folder=work / "sigma", progress=report,
            )  # fmt: skip
    index = measure.random_subset(len(points), num_points or len(points), seed=seed)
    with stages("lid_theta") as report:
        measured = measure.measure(
            denoiser, points[index], levels, spectra=spectra,
            folder=work / "lid_theta", progress=report,
        )  # fmt: skip
    if sigma is None:
        chosen = measure.at_plateau(measured, levels, points[0].size)
    else:
        chosen = measure.at_level(measured, sigma)
    columns = {"index": index}
    if data.labels is not None:
        columns["label"] = np.asarray(data.labels)[index]
    columns["sigma"] = chosen.sigma
    if sigma is None:
        columns["num_plateaus"] = chosen.num_plateaus
    for name in (*methods, "residual", "off_manifold"):
        values = getattr(chosen.measured, name)
        columns[name] = values.astype(int) if name in ("rank", "off_manifold") else values
        if name == "expected":
            columns["stderr"] = chosen.lid.stderr
    write_csv(out, columns)
    shutil.rmtree(partial)
    return columns, measure.diagnostics(chosen, denoiser, points[0].size)
