"""What `lid_accuracy` asks of the sets of `data.registry`: the recipe and what must be reached."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from mmh_jax import analytic, train
from mmh_jax.data import manifolds, registry

TRAIN_KEY, TEST_KEY = (jax.random.key(s) for s in (registry.TRAIN_SEED, registry.TEST_SEED))
# The others are run by name.
JUDGED_BY_DEFAULT = ("affine", "curved", "warped", "sphere", "embedded")
# What a trained model must reach at the plateau: by projected and expected FLIPD, and by the count
# of eigenvalues.
TARGETS = {
    "Laplace 5 in 10": (0.15, 0.02),
    "Gaussian 90 in 100": (0.5, 0.02),
    "uniform 10+30+90 in 100": (0.4, 0.02),
    "string in doughnut": (0.1, float("inf")),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A set of known dimension, and how a model of it is trained and judged.

    Attributes:
        known: the set.
        recipe: a key of `recipes()`.
        largest_mae: as in `TARGETS`, or None.
    """

    known: registry.KnownSet
    recipe: str
    largest_mae: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """As in the literature."""
        return self.known.name

    @property
    def ambient_dim(self) -> int:
        """D."""
        return self.known.ambient_dim

    @property
    def by_default(self) -> bool:
        """Whether it is run unless sets are named."""
        return self.known.family in JUDGED_BY_DEFAULT

    def draw(self, num: int, key: Any) -> manifolds.Labelled:
        """`num` labelled points."""
        return self.known.sample(num, key=key)

    def exact(self) -> analytic.Distribution | None:
        """The exact denoiser in the units of the points, or None."""
        return analytic.denoiser_of(self.known)


def _case(known: registry.KnownSet) -> Case:
    largest_mae = TARGETS.get(known.name)
    recipe = "low" if known.ambient_dim <= 10 else "middle"
    if known.family == "affine" and known.ambient_dim > 100:
        recipe = "high"
    if recipe == "middle" and largest_mae is not None:
        recipe = "judged"
    return Case(known, recipe, largest_mae)


def cases() -> dict[str, Case]:
    """Every set, by name."""
    return {name: _case(known) for name, known in registry.sets().items()}


Training = Literal["plain", "symmetric", "conservative"]


def recipes(preset: str, training: Training = "plain") -> dict[str, train.Recipe]:
    """Sizes for a preset, by the recipe's name.

    The noise levels are log-normal around .3 (.14 in low dimension), not log-uniform: below about
    .03 of the spread of the data a network of this size learns nothing in minutes, and samples
    there are lost.  On a CPU the sets that are judged train longest among those of their size.
    A step of the other kinds of training takes twice as long: they make half as many.
    """
    width, depth, batch, judged_steps, steps, high_steps = {
        "smoke": (64, 2, 128, 300, 300, 150),
        "cpu": (384, 3, 512, 16_000, 8_000, 4_000),
        "accelerator": (1024, 4, 2048, 200_000, 200_000, 100_000),
    }[preset]
    judged = train.Recipe(
        width=width,
        depth=depth,
        num_steps=judged_steps,
        batch_size=batch,
        ema_half_life=50.0 if preset == "smoke" else 500.0,
        sigma_min=0.02,
        sigma_max=3.0,
        noise_levels=train.log_normal(-1.2, 1.2),
    )
    low = dataclasses.replace(
        judged,
        width=256 if preset == "cpu" else width,
        sigma_min=0.005,
        noise_levels=train.log_normal(-2.0, 1.5),
    )
    middle = dataclasses.replace(judged, num_steps=steps)
    # Wider than D - d, or the normal directions do not fit (`train.Recipe.wide_enough`).
    high = dataclasses.replace(judged, width=1024, num_steps=high_steps)
    if preset == "cpu":
        high = dataclasses.replace(high, depth=1, batch_size=batch // 2)
    found = {"low": low, "judged": judged, "middle": middle, "high": high}
    if training == "plain":
        return found
    options = {"symmetric": {"symmetry": 1.0}, "conservative": {"network": "GradientMLP"}}[training]
    return {
        name: dataclasses.replace(recipe, num_steps=recipe.num_steps // 2, **options)
        for name, recipe in found.items()
    }
