"""Sizes of a network and of its training, as presets.

The same code runs in a minute of continuous integration (`smoke`), in minutes on a laptop (`cpu`)
and for as long as it takes on an accelerator.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mmh_jax.train.config import Augmentation, TrainConfig, stable_name
from mmh_jax.train.loss import NoiseLevels, Weight, edm_weight, log_normal, log_uniform

__all__ = ["IMAGE_RECIPES", "RECIPES", "Recipe"]

# Beyond, the layers of an MLP grow out of proportion, and another architecture is called for.
WIDEST = 2048


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of a network and of its training.

    Attributes:
        width: of the network.
        depth, num_frequencies: of `nn.ResidualMLP`.
        num_steps, batch_size, learning_rate, ema_half_life: of `TrainConfig`.
        sigma_min, sigma_max: the trained noise levels, relative to the spread of the data.
        noise_levels: their law, in the same unit; None for log-uniform between the two.
        network: `ResidualMLP`, `GradientMLP` for a conservative model at 3 times the cost, or for
            images `UNet` or `DiT`.
        symmetry, accumulate, augment, ema_widths, weight, steps_per_round: of `TrainConfig`.
        options: further keyword arguments of the network, as pairs of name and value.
        objective: `edm`, a network with EDM preconditioning, or `vp`, one that predicts the noise
            on the VP schedule (with `uniform_time` and `noise_weight`).
        condition_dropout: of `TrainConfig`, where there are labels.
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
    options: tuple[tuple[str, Any], ...] = ()
    objective: str = "edm"
    condition_dropout: float = 0.1
    accumulate: int = 1
    augment: Augmentation | None = None
    ema_widths: tuple[float, ...] = ()
    weight: Weight = edm_weight
    steps_per_round: int = 250

    def settings(self) -> dict[str, Any]:
        """All fields by name, for a fingerprint or a record.

        Those added later are left out at their defaults: a run begun before them is still the same.
        """
        names = [field.name for field in dataclasses.fields(self)]
        later = names[names.index("network") :]
        plain = Recipe()
        kept = [n for n in names if n not in later or getattr(self, n) != getattr(plain, n)]
        fields = dataclasses.asdict(dataclasses.replace(self, augment=None, weight=edm_weight))
        named = {name: stable_name(getattr(self, name)) for name in ("augment", "weight")}
        return {name: named.get(name, fields[name]) for name in kept}

    def network_options(self, num_classes: int | None = None) -> dict[str, Any]:
        """The keyword arguments of the network; `num_classes` of its labels, if it has any."""
        if self.network in ("ResidualMLP", "GradientMLP"):
            names = ("width", "depth", "num_frequencies")
            return {name: getattr(self, name) for name in names} | dict(self.options)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        return {"width": self.width} | dict(self.options) | classes

    def train_config(self, num_classes: int | None = None) -> TrainConfig:
        """The settings of the training, in units of normalised data."""
        return TrainConfig(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            ema_half_life=self.ema_half_life,
            noise_levels=self.noise_levels or log_uniform(self.sigma_min, self.sigma_max),
            symmetry=self.symmetry,
            accumulate=self.accumulate,
            augment=self.augment,
            ema_widths=self.ema_widths,
            weight=self.weight,
            steps_per_round=self.steps_per_round,
            condition_dropout=0.0 if num_classes is None else self.condition_dropout,
            null_condition=num_classes,
        )

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

# About a million parameters at 28 x 28: half an hour on two cores is some 4,000 steps.
IMAGE_RECIPES = {
    "smoke": Recipe(
        network="UNet", width=8, options=(("multipliers", (1, 2)), ("num_blocks", 1)),
        num_steps=20, batch_size=16, ema_half_life=5.0, sigma_max=20.0,
        noise_levels=log_normal(-1.0, 1.4), steps_per_round=20,
    ),
    "cpu": Recipe(
        network="UNet", width=32, options=(("multipliers", (1, 2, 2)), ("num_blocks", 1)),
        num_steps=4_000, batch_size=64, learning_rate=1e-3, ema_half_life=200.0, sigma_max=20.0,
        noise_levels=log_normal(-1.0, 1.4), steps_per_round=25,
    ),
    "accelerator": Recipe(
        network="UNet", width=128, options=(("multipliers", (1, 2, 2)), ("num_blocks", 3)),
        num_steps=200_000, batch_size=512, learning_rate=3e-4, ema_half_life=5_000.0,
        sigma_max=40.0, noise_levels=log_normal(-1.0, 1.4),
    ),
}  # fmt: skip
