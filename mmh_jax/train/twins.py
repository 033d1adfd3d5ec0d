"""Twin models: one on each of two disjoint halves of a data set, trained alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmh_jax.data.splits import Halves, disjoint_halves
from mmh_jax.denoise import Affine
from mmh_jax.train.recipe import Recipe
from mmh_jax.train.run import train_model
from mmh_jax.typing import ArrayLike

__all__ = ["Twins", "train_twins"]


class Twins(NamedTuple):
    """Two models, and which points each of them saw.

    Attributes:
        first, second: denoisers trained on `points[halves.first]` and `points[halves.second]`.
        halves: rows of the points.
    """

    first: Affine
    second: Affine
    halves: Halves


def train_twins(
    points: np.ndarray,
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int,
    groups: ArrayLike | None = None,
    save_every: float = 10.0,
    budget: float | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> Twins:
    """Split the points in two, and train the same model on either half; for `cross_fit`.

    The twins have the same recipe and the same seed: they begin with the same weights.  The split
    is drawn from the seed, too, so that a call with the same arguments continues where one was cut
    off, or loads what is finished.

    Args:
        points: (N, *shape), real numbers in data units.
        recipe: sizes, of either twin.
        folder: where the models go, `folder/first` and `folder/second`.
        seed: of the split, and of weights, order and noise.
        groups: (N,) numbers of what belongs together, as for `data.splits.disjoint_halves`: the
            clusters of near-duplicates.  Equal points are kept together in any case.
        save_every, mesh: as for `train_model`.
        budget: minutes for each twin, in place of the recipe's number of steps; they may then take
            a different number of them.
        progress: called as `progress(twin, step, total_steps, loss)`, `twin` being "first" or
            "second".

    Cost: two trainings of the recipe's number of steps.

    Raises:
        TypeError, ValueError, MemoryError: as `disjoint_halves` and `train_model`.
    """
    halves = disjoint_halves(points, key=jax.random.key(seed), groups=groups)
    models = []
    for name, rows in zip(("first", "second"), halves, strict=True):
        report = None if progress is None else _named(progress, name)
        models.append(
            train_model(
                points[rows], recipe, Path(folder) / name, seed=seed, save_every=save_every,
                budget=budget, mesh=mesh, progress=report,
            )
        )  # fmt: skip
    return Twins(models[0], models[1], halves)


def _named(
    progress: Callable[[str, int, int, float], None], name: str
) -> Callable[[int, int, float], None]:
    return lambda step, total, loss: progress(name, step, total, loss)
