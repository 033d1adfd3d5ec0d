"""What the tiers on images share: pictures, trainings that are kept, and a table of detectors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console

from mmh_jax import denoise, sample, train
from mmh_jax import memorization as mem
from mmh_jax.report.files import write_json

# Relative to the spread of the data; C2 chooses its own, on a training that no table contains.
SIGMA, REGENERATE_FROM = 0.2, 0.5
# Of the training, where the baseline is taken.
EARLY = 0.25


@dataclasses.dataclass(frozen=True)
class Training:
    """Of a residual MLP, small enough for two cores and large enough to memorize."""

    width: int
    num_steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3


def longer(about: Training, points: np.ndarray, times: float) -> Training:
    """Pictures of more than 100 pixels are memorized later, and trained on for longer."""
    if points[0].size <= 100:
        return about
    return dataclasses.replace(about, num_steps=round(times * about.num_steps))


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, or returned in an earlier call: a file keeps it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


class Trained(NamedTuple):
    """A model, its own early checkpoint, and the spread of its data."""

    model: Any
    early: Any
    scale: float


def trained(points: np.ndarray, about: Training, seed: int, folder: Path) -> Trained:
    """Train, or read what an earlier call trained into the folder."""
    folders = {round(EARLY * about.num_steps): folder / "early", about.num_steps: folder / "model"}
    early, model = checkpoints(points, about, seed, folders, half_life=about.num_steps / 40)
    return Trained(model, early, train.normalisation(points)[1])


def checkpoints(
    points: np.ndarray, about: Training, seed: int, folders: dict[int, Path], *, half_life: float
) -> list[denoise.Affine]:
    """One model after each of some numbers of steps, in rising order, kept in a folder each.

    What an earlier call finished is read.  Half-life, in steps, of the average of the weights; a
    checkpoint is taken where a round of about so many steps ends.
    """
    wanted = sorted(folders)
    if not all((folder / "config.json").exists() for folder in folders.values()):
        shift, scale = train.normalisation(points)
        options = {"width": about.width, "depth": 3}
        model_config = train.ModelConfig(
            "ResidualMLP", options, points.shape[1:], scale, 1.0, 0.01 * scale, 8.0 * scale
        )
        init_key, fit_key = jax.random.split(jax.random.key(seed))
        model = train.build(model_config, shift, key=init_key)
        config = train.TrainConfig(
            num_steps=about.num_steps, batch_size=min(about.batch_size, len(points)),
            steps_per_round=max(1, round(half_life)), ema_half_life=half_life,
            noise_levels=train.log_normal(-1.0, 1.2), learning_rate=about.learning_rate,
        )  # fmt: skip
        left = list(wanted)
        for metrics in train.fit(model.inner, (points - shift) / scale, config, key=fit_key):
            inner = dataclasses.replace(model.inner, params=metrics.state.ema)
            while left and metrics.step >= left[0]:
                folder = folders[left.pop(0)]
                train.save(folder, model_config, dataclasses.replace(model, inner=inner))
                console.print(
                    f"{folder}: step {metrics.step}, loss {metrics.loss:.3f}", style="dim"
                )
    return [train.load(folders[step]) for step in wanted]


def samples_of(found: Trained, num: int, seed: int) -> np.ndarray:
    """Of the trained model, in parts for memory."""
    key = jax.random.key(1_000 + seed)

    def part(start: int) -> Any:
        return sample.sample(
            found.model, min(500, num - start), key=jax.random.fold_in(key, start),
            sigma_min=0.02 * found.scale, sigma_max=8 * found.scale, num_levels=24,
        )  # fmt: skip

    return np.concatenate([part(start) for start in range(0, num, 500)])


def settings_for(
    scale: float, *, sigma: float = SIGMA, regenerate_from: float = REGENERATE_FROM
) -> mem.Settings:
    """Of all detectors, the noise levels relative to the spread."""
    levels = sample.karras_levels(9, sigma_min=0.02 * scale, sigma_max=regenerate_from * scale)
    return mem.Settings(jnp.float32(sigma * scale), spread=scale, regeneration_levels=levels)


def scores_of(
    detectors: tuple[str, ...],
    points: np.ndarray,
    found: Trained,
    data: np.ndarray,
    seed: int,
    **levels: float,
) -> mem.Scores:
    """All detectors at all points; `levels` as for `settings_for`.

    All points see the same noise: what a draw adds to all alike does not change their order.
    """
    subject = mem.Subject(points, found.model, baseline=found.early, data=data)
    settings = settings_for(found.scale, **levels)
    keys = jnp.broadcast_to(jax.random.key(seed), (len(points),))
    return mem.scores(detectors, subject, settings, key=keys, chunk_size=64)


def ranked(values: np.ndarray) -> np.ndarray:
    """A score that could not be had does not accuse: it is the lowest."""
    values = np.asarray(values, float)
    return np.where(np.isnan(values), -np.inf, values)


def detected(values: np.ndarray, labels: np.ndarray) -> mem.Detection:
    """Of which the values alone are read: no more resamples than there must be."""
    return mem.detection(values, labels, seed=0, num_resamples=100)


def spoken(values: list[float]) -> str:
    """Mean and standard error over seeds, in a cell of a table."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    found = mem.over_seeds(np.array(values))
    return f"{found.value:.3f} +- {found.stderr:.3f}"
