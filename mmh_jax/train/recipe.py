"""From points to a trained model in one call: normalise, build, train, save, and resume.

A recipe is a preset of sizes.  The same code runs in a minute of continuous integration (`smoke`),
in minutes on a laptop (`cpu`) and for as long as it takes on an accelerator.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmh_jax.denoise import Affine
from mmh_jax.train.checkpoint import Checkpoints, run_fingerprint
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.loop import fit
from mmh_jax.train.loss import NoiseLevels, log_uniform
from mmh_jax.train.step import init_state
from mmh_jax.train.store import ModelConfig, build, load, load_config, save

__all__ = ["RECIPES", "Recipe", "normalisation", "train_model"]

# Beyond, the layers of an MLP grow out of proportion, and another architecture is called for.
WIDEST = 2048


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of a network and of its training.

    Attributes:
        width, depth, num_frequencies: of `nn.ResidualMLP`.
        num_steps, batch_size, learning_rate, ema_half_life: of `TrainConfig`.
        sigma_min, sigma_max: the trained noise levels, relative to the spread of the data.
        noise_levels: their law, in the same unit; None for log-uniform between the two.
        network: `ResidualMLP`, or `GradientMLP` for a conservative model at 3 times the cost.
        symmetry: of `TrainConfig`.
    """

    width: int = 256
    depth: int = 3
    num_frequencies: int = 0
    num_steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    ema_half_life: float = 500.0
    sigma_min: float = 0.003
    sigma_max: float = 5.0
    noise_levels: NoiseLevels | None = None
    network: str = "ResidualMLP"
    symmetry: float = 0.0

    def settings(self) -> dict[str, Any]:
        """All fields by name, for a fingerprint or a record.

        Those added later are left out at their defaults: a run begun before them is still the same.
        """
        later = {"network": "ResidualMLP", "symmetry": 0.0}
        fields = dataclasses.asdict(self).items()
        return {name: value for name, value in fields if name not in later or later[name] != value}

    def wide_enough(self, num_coordinates: int) -> Recipe:
        """The recipe with a quarter more hidden units than a point has coordinates, up to 2,048.

        The Jacobian of a narrower network F has rank `width` at most, and that of the denoiser
        c_skip x + c_out F is c_skip on the rest.  Up to sigma_data c_skip is above one half, so
        that at least `num_coordinates - width` directions count as tangent, whatever is learned.
        Layers use some of their width for more than the normal directions: just as many units as
        coordinates still count 17 dimensions for 10 in R^100, a quarter more do not
        (`benchmarks/network_width.py`).

        >>> Recipe(width=256).wide_enough(784).width
        980
        >>> Recipe(width=256).wide_enough(64).width
        256
        """
        wanted = min(math.ceil(1.25 * num_coordinates), WIDEST)
        return dataclasses.replace(self, width=max(self.width, wanted))


RECIPES = {
    "smoke": Recipe(width=96, depth=2, num_steps=400, batch_size=128, ema_half_life=50.0),
    "cpu": Recipe(width=256, depth=3, num_steps=10_000),
    "accelerator": Recipe(
        width=1024, depth=6, num_steps=200_000, batch_size=1024, ema_half_life=5_000.0
    ),
}


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
    work: str | Path | None = None,
    save_every: float = 10.0,
    progress: Callable[[int, int, float], None] | None = None,
    about: dict[str, Any] | None = None,
) -> Affine:
    """Train a score model on points and save it; continue where an earlier call was cut off.

    Args:
        points: (N, *shape), real numbers in data units.
        recipe: sizes.
        folder: where the model goes.  If a finished model of the same run is there, it is loaded.
        seed: of weights, order and noise.
        work: where checkpoints go, by default `folder / "checkpoints"`.
        save_every: seconds between checkpoints.
        progress: called as `progress(step, total_steps, loss)` after each round.
        about: anything to keep in the model's `config.json`.

    Returns:
        The trained denoiser, in data units.

    Raises:
        ValueError: if the folder holds a model or checkpoints of another run.

    Warns:
        UserWarning: if the network is narrower than a point: see `Recipe.wide_enough`.
    """
    points = np.asarray(points, np.float32)
    size = math.prod(points.shape[1:])
    if recipe.network == "ResidualMLP" and recipe.width < size:
        warnings.warn(
            f"a network of width {recipe.width} on points of {size} coordinates: its Jacobian has "
            f"at least {size - recipe.width} eigenvalues near 1 at small noise levels, so that no "
            f"LID below {size - recipe.width} will be found.  Use `recipe.wide_enough({size})`.",
            stacklevel=2,
        )
    shift, scale = normalisation(points)
    config = TrainConfig(
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        ema_half_life=recipe.ema_half_life,
        noise_levels=recipe.noise_levels or log_uniform(recipe.sigma_min, recipe.sigma_max),
        symmetry=recipe.symmetry,
    )
    fingerprint = run_fingerprint(points, config, recipe=recipe.settings(), seed=seed)
    model_config = ModelConfig(
        network=recipe.network,
        network_options={
            "width": recipe.width,
            "depth": recipe.depth,
            "num_frequencies": recipe.num_frequencies,
        },
        shape=points.shape[1:],
        scale=scale,
        sigma_data=config.sigma_data,
        sigma_min=recipe.sigma_min * scale,
        sigma_max=recipe.sigma_max * scale,
        training={"fingerprint": fingerprint, "seed": seed, "num_points": len(points)}
        | recipe.settings()
        | (about or {}),
    )
    if (Path(folder) / "config.json").exists():
        if load_config(folder).training.get("fingerprint") == fingerprint:
            return load(folder)
        raise ValueError(
            f"{folder} holds a model of another run; choose another folder, or delete it."
        )

    init_key, fit_key = jax.random.split(jax.random.key(seed))
    model = build(model_config, shift, key=init_key)
    work = Path(folder) / "checkpoints" if work is None else Path(work)
    normalised = (points - shift) / np.float32(scale)
    total = config.num_epochs(len(points)) * config.steps_per_epoch(len(points))
    with Checkpoints(work, fingerprint) as checkpoints:
        state = checkpoints.latest(init_state(model.inner, config))
        last_save = time.monotonic()
        for metrics in fit(model.inner, normalised, config, key=fit_key, state=state):
            state = metrics.state
            if progress is not None:
                progress(metrics.step, total, metrics.loss)
            if time.monotonic() - last_save >= save_every and metrics.step < total:
                checkpoints.save(state)
                last_save = time.monotonic()
        assert state is not None
    model = dataclasses.replace(model, inner=dataclasses.replace(model.inner, params=state.ema))
    save(folder, model_config, model)
    return model
