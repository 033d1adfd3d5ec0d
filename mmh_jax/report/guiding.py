"""How samples are drawn: levels, step, and the guidance on the way, with what it costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mmh_jax import linalg, sample
from mmh_jax.denoise import Guided
from mmh_jax.mitigation import LidGuided
from mmh_jax.report.stages import check_count
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Key

__all__ = ["STEPS", "SampleOptions"]

STEPS = {
    "heun": sample.heun,
    "ddim": sample.ddim,
    "ancestral": sample.ancestral,
    "dpm2m": sample.dpm_solver_2m,
}
MAX_EXACT = 100
NUM_PROBES = 8
# The options that one guidance alone reads.
_OF = {
    "cfg": ("scale",),
    "lid": ("quantile", "strength", "trust", "low", "high", "probes", "references"),
}


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to draw samples; what a field means is said in `mmh-jax sample --help`.

    Attributes:
        guidance: `none`, `lid` (`mitigation.LidGuided`) or `cfg` (`denoise.Guided`).
        levels: noise levels of the sampler.
        step: a key of `STEPS`.
        scale: of classifier-free guidance.
        label: the condition of all samples; None for none, or with `cfg` for random ones.
        quantile: of the dimensions of the reference runs, the target.
        strength, trust: of LID guidance.
        low, high: where it acts, in spreads of the data.
        probes: for the trace: `exact`, so many random ones, or `auto`.
        references: reference runs.
    """

    guidance: str = "none"
    levels: int = 32
    step: str = "heun"
    scale: float = 1.0
    label: int | None = None
    quantile: float = 0.1
    strength: float = 1.0
    trust: float = 0.3
    low: float = 0.2
    high: float = 0.8
    probes: Literal["auto", "exact"] | int = "auto"
    references: int = 128

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for what is out of range, has no effect, or does not fit the model."""
        self._check_choices()
        self._check_label(config)
        if not math.isfinite(self.scale):
            raise ValueError(f"--scale is {self.scale:g}; it must be finite.")
        check_count("--levels", self.levels, least=2)
        if self.guidance == "lid":
            self._check_lid(config)

    def _check_choices(self) -> None:
        guidances = ("none", *_OF)
        for name, there in (("guidance", guidances), ("step", STEPS)):
            value = getattr(self, name)
            if value not in there:
                raise ValueError(f"--{name} is {value!r}; choose one of {', '.join(there)}.")
        for guidance, names in _OF.items():
            changed = [name for name in names if getattr(self, name) != getattr(_DEFAULTS, name)]
            if changed and self.guidance != guidance:
                raise ValueError(
                    f"--{changed[0]} is of --guidance {guidance}, and this is --guidance "
                    f"{self.guidance}; leave it out."
                )

    def _check_label(self, config: ModelConfig) -> None:
        num_classes = config.network_options.get("num_classes")
        if num_classes is None and (self.guidance == "cfg" or self.label is not None):
            option = "--label" if self.guidance != "cfg" else "--guidance cfg"
            raise ValueError(
                f"{option}: the model takes no labels; leave it out, or train one with `mmh-jax "
                "train --by-label`."
            )
        if self.label is not None and not 0 <= self.label < num_classes:  # pyright: ignore
            raise ValueError(
                f"--label is {self.label}; the model knows 0 to {num_classes - 1}."  # pyright: ignore
            )

    def _check_lid(self, config: ModelConfig) -> None:
        for name in ("strength", "trust"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name} is {getattr(self, name):g}; it must be finite and at least 0."
                )
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"--low is {self.low:g} and --high {self.high:g}; --low must be at least 0 and "
                "below --high."
            )
        check_count("--references", self.references)
        if not 0 < self.quantile < 1 or self.references < self.least_references:
            raise ValueError(
                f"--quantile is {self.quantile:g}, of --references {self.references}; it must lie "
                "between 1 / (references + 1) and 1."
            )
        if isinstance(self.probes, int):
            check_count("--probes", self.probes)
        if not self.is_inside(self.sigmas(config), config).any():
            low, high = self.interval(config)
            raise ValueError(
                f"--low {self.low:g} --high {self.high:g}: none of the {self.levels} noise levels "
                f"is between {low:.3g} and {high:.3g}; raise --levels or widen the interval."
            )

    @property
    def least_references(self) -> int:
        """Of which the quantile is at least the smallest."""
        return math.ceil(1 / self.quantile - 1e-9) - 1 if self.quantile > 0 else 0

    def sigmas(self, config: ModelConfig) -> np.ndarray:
        """(levels,) the noise levels of the sampler, decreasing."""
        return np.asarray(
            sample.karras_levels(
                self.levels, sigma_min=config.sigma_min, sigma_max=config.sigma_max
            )
        )

    def interval(self, config: ModelConfig) -> tuple[float, float]:
        """Between which noise levels LID guidance acts, in data units."""
        spread = config.scale * config.sigma_data
        return self.low * spread, self.high * spread

    def is_inside(self, sigmas: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Whether it acts at a level."""
        low, high = np.asarray(self.interval(config), sigmas.dtype)
        return (low <= sigmas) & (sigmas <= high)

    def trace(self, config: ModelConfig) -> linalg.Trace:
        """How the trace is taken."""
        if isinstance(self.probes, int):
            return linalg.rademacher(self.probes)
        if self.probes == "exact" or math.prod(config.shape) <= MAX_EXACT:
            return linalg.exact()
        return linalg.rademacher(NUM_PROBES)

    def conditions(self, config: ModelConfig, num: int, *, seed: int) -> np.ndarray | None:
        """(num,) a label for each sample, or None."""
        if self.label is not None:
            return np.full(num, self.label, np.int32)
        if self.guidance == "cfg":
            num_classes = config.network_options["num_classes"]
            return np.random.default_rng(seed).integers(num_classes, size=num).astype(np.int32)
        return None

    def lid_guided(self, model: Any, config: ModelConfig, target: Any, *, key: Key) -> LidGuided:
        """The model under LID guidance, towards a target; None where it is only measured."""
        # Arrays: another value is not another program.
        low, high = map(jnp.asarray, self.interval(config))
        return LidGuided(
            model,
            target,
            jnp.asarray(self.strength),
            jnp.asarray(self.trust),
            low,
            high,
            key,
            trace=self.trace(config),
        )

    def cfg_guided(self, model: Any) -> Guided:
        """The model under classifier-free guidance, a condition yet to be bound."""
        return Guided(model, model, self.scale)

    def evaluations(self, config: ModelConfig) -> dict[str, float]:
        """Of the network, for one sample, with guidance, without, and for a reference run."""
        sigmas, products = self.sigmas(config), 0.0
        # Where the steps ask, and the end.
        asked = [sigmas[:-1], *[sigmas[1:]] * (STEPS[self.step]().evaluations - 1), sigmas[-1:]]
        plain = float(sum(map(len, asked)))
        found = {"guided": plain, "unguided": plain}
        if self.guidance == "cfg":
            found["guided"] = 2 * plain
        if self.guidance == "lid":
            products = linalg.products_of(self.trace(config), math.prod(config.shape))
            inside = int(self.is_inside(np.concatenate(asked), config).sum())
            found["guided"] = plain + inside * (3 * (products + 1) + 1)
            found["reference"] = plain + products * int(self.is_inside(sigmas, config).sum())
        return found


_DEFAULTS = SampleOptions()
