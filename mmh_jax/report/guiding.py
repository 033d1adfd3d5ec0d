"""How samples are drawn: levels, step, and the guidance on the way, with what it costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax import sample
from mmh_jax.denoise import Guided
from mmh_jax.mitigation import DenoisedLid, LidGuided, Measure
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
MAX_TRIES = 8
# Where the dimension is looked at, in spreads of the data: on the way, alone and relative to a
# baseline, and at what rejection decides on, which is finished.
LOOK_AT, LOOK_AT_RELATIVE, LOOK_AT_FINISHED = 0.3, 0.5, 0.4
# The options that a guidance reads, and what they are if not given; with a quantile it has a
# target.  Rejection by default is the way that comes closest to the goal of docs/mitigation.md.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lid": {
        "quantile": 0.2, "strength": 1e4, "trust": 1.0, "low": 0.2, "high": 1.0, "probes": 8,
        "references": 128,
    },
    "reject": {"quantile": 0.1, "low": 0.0, "back_to": 2.0, "probes": 32, "references": 128},
    "cfg": {"scale": 1.0, "begin": math.inf},
}  # fmt: skip
# Of type Any, so that fields keep theirs: where they are read it gave way to a default.
_NOT_GIVEN: Any = None


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to draw samples; what a field means is said in `mmh-jax sample --help`.

    What is not given has the default of the guidance; what that does not read is None, and must
    not be given.

    Attributes:
        guidance: `none`, `lid` (`mitigation.LidGuided`), `reject` (`mitigation.sample_selected`) or
            `cfg` (`denoise.Guided`).
        levels: noise levels of the sampler.
        step: a key of `STEPS`.
        scale: of classifier-free guidance.
        begin: the noise level, in spreads of the data, from which on it acts; before, samples are
            drawn without a label.
        label: the condition of all samples; None for none, or with `cfg` for random ones.
        quantile: of the dimensions of the reference runs, the target.
        strength, trust: of LID guidance.
        low, high: where it acts, in spreads of the data; rejection decides at the last level that
            is not below `low`.
        back_to: where a refused state goes, in spreads of the data.
        probes: draws of noise of the dimension.
        references: reference runs.
    """

    guidance: str = "none"
    levels: int = 32
    step: str = "heun"
    scale: float = _NOT_GIVEN
    begin: float = _NOT_GIVEN
    label: int | None = None
    quantile: float = _NOT_GIVEN
    strength: float = _NOT_GIVEN
    trust: float = _NOT_GIVEN
    low: float = _NOT_GIVEN
    high: float = _NOT_GIVEN
    back_to: float = _NOT_GIVEN
    probes: int = _NOT_GIVEN
    references: int = _NOT_GIVEN

    def __post_init__(self) -> None:
        for name, value in _DEFAULTS.get(self.guidance, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def has_target(self) -> bool:
        """Whether it steers by dimension."""
        return "quantile" in _DEFAULTS.get(self.guidance, {})

    def settings(self) -> dict[str, Any]:
        """For JSON, which has no infinite numbers: None, as for what is not read."""
        return {
            name: None if value == math.inf else value
            for name, value in dataclasses.asdict(self).items()
        }

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for what is out of range, has no effect, or does not fit the model."""
        self._check_choices()
        self._check_label(config)
        check_count("--levels", self.levels, least=2)
        if self.has_target:
            self._check_target()
        if self.guidance == "lid":
            self._check_lid(config)
        if self.guidance == "reject":
            self._check_reject(config)
        if self.guidance == "cfg":
            self._check_cfg()

    def _check_choices(self) -> None:
        for name, there in (("guidance", _DEFAULTS), ("step", STEPS)):
            value = getattr(self, name)
            if value not in there:
                raise ValueError(f"--{name} is {value!r}; choose one of {', '.join(there)}.")
        for name in {name: None for of in _DEFAULTS.values() for name in of}:
            readers = [guidance for guidance, of in _DEFAULTS.items() if name in of]
            if getattr(self, name) is not None and self.guidance not in readers:
                self._refuse(name, readers)

    def check_baseline(self, baseline: Any) -> None:
        """Raise ValueError for a model to compare with that nothing is compared with."""
        if baseline is not None and not self.has_target:
            self._refuse("baseline", [name for name, of in _DEFAULTS.items() if "quantile" in of])

    def _refuse(self, name: str, readers: list[str]) -> None:
        raise ValueError(
            f"--{name.replace('_', '-')} is of --guidance {' or '.join(readers)}, and this is "
            f"--guidance {self.guidance}; leave it out."
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

    def _check_target(self) -> None:
        check_count("--references", self.references)
        if not 0 < self.quantile < 1 or self.references < self.least_references:
            raise ValueError(
                f"--quantile is {self.quantile:g}, of --references {self.references}; it must lie "
                "between 1 / (references + 1) and 1."
            )
        # A spread is taken of two at least.
        check_count("--probes", self.probes, least=2 if self.guidance == "reject" else 1)

    def _check_cfg(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"--scale is {self.scale:g}; it must be finite.")
        if not self.begin > 0:
            raise ValueError(f"--begin is {self.begin:g}; it must be positive.")

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
        if not self.is_inside(self.sigmas(config), config).any():
            low, high = self.interval(config)
            raise ValueError(
                f"--low {self.low:g} --high {self.high:g}: none of the {self.levels} noise levels "
                f"is between {low:.3g} and {high:.3g}; raise --levels or widen the interval."
            )

    def _check_reject(self, config: ModelConfig) -> None:
        if not 0 <= self.low < self.back_to:
            raise ValueError(
                f"--low is {self.low:g} and --back-to {self.back_to:g}; --low must be at least 0 "
                "and below --back-to."
            )
        back, decide = self.places(config)
        if not back < decide:
            sigmas, spread = self.sigmas(config), _spread(config)
            raise ValueError(
                f"--low {self.low:g} --back-to {self.back_to:g}: the {self.levels} noise levels, "
                f"from {sigmas[0] / spread:.3g} to {sigmas[-1] / spread:.3g} spreads of the data, "
                "have none to decide at and a higher one to go back to; raise --levels or widen "
                "the interval."
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

    def places(self, config: ModelConfig) -> tuple[int, int]:
        """The numbers of the levels to which rejection goes back, and at which it decides."""
        sigmas, spread = self.sigmas(config), _spread(config)
        back = int(np.sum(sigmas > self.back_to * spread))
        return back, int(np.sum(sigmas >= self.low * spread)) - 1

    def interval(self, config: ModelConfig) -> tuple[float, float]:
        """Between which noise levels the dimension counts, in data units."""
        if self.guidance == "reject":
            level = float(self.sigmas(config)[self.places(config)[1]])
            return level, level
        return self.low * _spread(config), self.high * _spread(config)

    def is_inside(self, sigmas: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Whether the dimension counts at a level."""
        low, high = np.asarray(self.interval(config), sigmas.dtype)
        return (low <= sigmas) & (sigmas <= high)

    def measure(self, config: ModelConfig, baseline: Any, *, key: Key) -> DenoisedLid:
        """The dimension on the way or at the end, relative to a baseline's if there is one."""
        is_last = self.guidance == "reject"
        share = LOOK_AT if baseline is None else LOOK_AT_RELATIVE
        # An array: another value is not another program.
        level = jnp.asarray((LOOK_AT_FINISHED if is_last else share) * _spread(config))
        return DenoisedLid(level, key, baseline, num_samples=self.probes, spread=is_last)

    def conditions(self, config: ModelConfig, num: int, *, seed: int) -> np.ndarray | None:
        """(num,) a label for each sample, or None."""
        if self.label is not None:
            return np.full(num, self.label, np.int32)
        if self.guidance == "cfg":
            num_classes = config.network_options["num_classes"]
            return np.random.default_rng(seed).integers(num_classes, size=num).astype(np.int32)
        return None

    def lid_guided(
        self, model: Any, config: ModelConfig, target: Any, measure: Measure
    ) -> LidGuided:
        """The model under LID guidance, towards a target."""
        numbers = (self.strength, self.trust, *self.interval(config))
        return LidGuided(model, target, measure, *map(jnp.asarray, numbers), tangential=True)

    def cfg_guided(self, model: Any, config: ModelConfig) -> Guided:
        """The model under classifier-free guidance, a condition yet to be bound."""
        scale, begin = jnp.asarray(self.scale), jnp.asarray(self.begin * _spread(config))
        return Guided(model, model, scale, high=begin, outside=jnp.zeros(()))

    def evaluations(
        self, config: ModelConfig, measure: Measure | None = None, *, tries: float = 1.0
    ) -> dict[str, float]:
        """Of networks, for one sample, with guidance, without, and for a reference run.

        Args:
            config: for the noise levels.
            measure: by which samples are steered.
            tries: of rejection, on average.
        """
        sigmas, each = self.sigmas(config), STEPS[self.step]().evaluations
        # Where the steps ask, and the end.
        asked = [sigmas[:-1], *[sigmas[1:]] * (each - 1), sigmas[-1:]]
        plain = float(sum(map(len, asked)))
        found = {"guided": plain, "unguided": plain}
        if self.guidance == "cfg":
            found["guided"] = 2 * plain
        if measure is not None:
            cost = measure.evaluations(math.prod(config.shape))
            found["reference"] = plain + cost * int(self.is_inside(sigmas, config).sum())
            if self.guidance == "lid":
                inside = int(self.is_inside(np.concatenate(asked), config).sum())
                found["guided"] = plain + inside * (3 * cost + 1)
            else:
                back, decide = self.places(config)
                again = each * (decide - back) + 1 + cost
                found["guided"] = plain + 1 + cost + (tries - 1) * again
        return found


def _spread(config: ModelConfig) -> float:
    """Of the data, in their units."""
    return config.scale * config.sigma_data
