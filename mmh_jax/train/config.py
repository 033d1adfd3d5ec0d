"""Settings of a training run, as one frozen value that a compiled step can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import optax

from mmh_jax.train.ema import exponent
from mmh_jax.train.loss import NoiseLevels, Weight, edm_weight, log_uniform
from mmh_jax.typing import Array

__all__ = ["Augmentation", "TrainConfig", "stable_name"]

Augmentation: TypeAlias = Callable[..., Array]
"""`augment(x, *, key)` of one point; hashable, as a function or a frozen dataclass is."""


def stable_name(value: Any) -> str:
    """What a setting is, the same in every process: for fingerprints and records.

    Raises:
        ValueError: for a function without a name of its own.

    >>> stable_name(log_uniform(0.1, 2.0)), stable_name(edm_weight), stable_name((1, None))
    ('log_uniform(low=0.1, high=2.0)', 'edm_weight', '(1, None)')
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        inside = ", ".join(f"{name}={stable_name(getattr(value, name))}" for name in names)
        return f"{type(value).__qualname__}({inside})"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(stable_name, value)) + ")"
    if not callable(value):
        return repr(value)
    name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", None) or ""
    if not name or "<" in name:
        raise ValueError(
            f"the setting {value!r} has no name by which another process would know it; define it "
            "at the level of a module, or make it a frozen dataclass."
        )
    return name if module.startswith("mmh_jax.") else f"{module}.{name}"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; noise levels are in units of normalised data (`sigma_data`).

    Attributes:
        num_steps: optimiser steps, rounded up to whole epochs if these are shorter than a round.
        batch_size: points per step; every point of a smaller data set appears several times.
        learning_rate: of Adam, reached after `warmup_steps`, then lowered to 0 along a cosine.
        warmup_steps: steps of linear warm-up.
        max_grad_norm: gradients are clipped to this global norm.
        ema_half_life: steps after which a weight's share in the running average has halved; the
            average starts faster, so that early weights do not linger.
        noise_levels: the law of sigma.
        sigma_data: the standard deviation of the (normalised) data.
        steps_per_round: optimiser steps between two yields, rounded to whole epochs if they are
            shorter.
        symmetry: the weight of `symmetry_loss`, taken at every fourth point of a batch.
        weight: `weight(sigma, sigma_data)` of the squared error: `edm_weight`, `noise_weight`, ...
        accumulate: the gradient of a batch is the mean over so many equal parts, one after the
            other: memory of one part, the same step but for rounding.
        condition_dropout: the probability with which a condition is replaced by the null one, for
            classifier-free guidance (Ho & Salimans 2022, 2207.12598).
        null_condition: what it is replaced by: a hashable scalar, such as the number of classes;
            None for what the network itself says (`nn.null_condition`).
        augment: applied to every point of a batch.
        ema_widths: relative widths of further averages, by powers of time (`train.ema`); two of
            them, kept by `Checkpoints(keep_every=...)`, are enough to rebuild any other.
    """

    num_steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_half_life: float = 500.0
    noise_levels: NoiseLevels = log_uniform(0.003, 5.0)  # noqa: RUF009 (a frozen value)
    sigma_data: float = 1.0
    steps_per_round: int = 250
    # Not in the repr, which is in the fingerprints of runs begun before these fields were here.
    symmetry: float = dataclasses.field(default=0.0, repr=False)
    weight: Weight = dataclasses.field(default=edm_weight, repr=False)
    accumulate: int = dataclasses.field(default=1, repr=False)
    condition_dropout: float = dataclasses.field(default=0.0, repr=False)
    null_condition: Any = dataclasses.field(default=None, repr=False)
    augment: Augmentation | None = dataclasses.field(default=None, repr=False)
    ema_widths: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "steps_per_round", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"`TrainConfig({name}={getattr(self, name)})` must be at least 1.")
        if not 0 <= self.symmetry < float("inf"):
            raise ValueError(
                f"`TrainConfig(symmetry={self.symmetry})` must be 0, for none, or positive."
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"`TrainConfig(accumulate={self.accumulate})` must divide "
                f"batch_size={self.batch_size} into equal parts."
            )
        if self.symmetry > 0 and self.accumulate > 1:
            raise ValueError(
                f"`TrainConfig(symmetry={self.symmetry}, accumulate={self.accumulate})`: the "
                "penalty is taken at every fourth point of a whole batch; use one of the two."
            )
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(
                f"`TrainConfig(condition_dropout={self.condition_dropout})` is a probability."
            )
        for width in self.ema_widths:
            exponent(width)

    def steps_per_epoch(self, num_points: int) -> int:
        """Optimiser steps in one pass over `num_points` points."""
        return max(1, num_points // self.batch_size)

    def num_epochs(self, num_points: int) -> int:
        """Epochs in the whole run, the last of them perhaps cut short."""
        return -(-self.num_steps // self.steps_per_epoch(num_points))

    def total_steps(self, num_points: int) -> int:
        """`num_steps`, rounded up to whole epochs if they are no longer than a round."""
        per_epoch = self.steps_per_epoch(num_points)
        whole = self.num_epochs(num_points) * per_epoch
        return self.num_steps if per_epoch > self.steps_per_round else whole

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with clipping, warm-up and cosine decay."""
        warmup = min(self.warmup_steps, self.num_steps // 10)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.num_steps, warmup + 1)
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(rate))

    def identity(self) -> list[Any]:
        """What decides the result, for a fingerprint: the repr, and later fields that are set."""
        later = [f for f in dataclasses.fields(self) if not f.repr]
        values = {f.name: (getattr(self, f.name), f.default) for f in later}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        symmetry = [changed.pop("symmetry")] if "symmetry" in changed else []
        named = {name: stable_name(value) for name, value in changed.items()}
        return [repr(self), *symmetry, *([named] if named else [])]
