"""Which ways to keep a model from copying are compared, and at which strengths."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from mmh_jax.report.guiding import SampleOptions

__all__ = ["MitigationPlan", "Way"]

# Of the ways by dimension.  Rejection at .3 loses a fifth of quality (docs/mitigation.md).
_QUANTILES = {"lid": (0.1, 0.2, 0.3), "reject": (0.1, 0.15, 0.2)}
# What is read without a scale and with one, and what it is if not given; of quantiles and probes
# each way has its own.
_BY_DIMENSION: dict[str, Any] = {"quantiles": None, "probes": None, "references": 256}
_BY_SCALE: dict[str, Any] = {"begins": (4.0, 2.0, 1.0), "scales": ()}


class Way(NamedTuple):
    """One of them at one strength."""

    name: str
    strength: float
    options: SampleOptions

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"{self.name}_{self.strength:g}".replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class MitigationPlan:
    """Which ways are tried, at which strengths; an empty tuple leaves a way out.

    What is not given has the default of the way; what only other ways read must not be given.

    Attributes:
        quantiles: of LID guidance (`lid`) and of rejection (`reject`), if there is no scale.
        scale: of the classifier-free guidance to be tamed; None for a model without labels, or to
            sample it without.
        begins: with a scale: where guidance begins (`late`), in spreads of the data.
        scales: with a scale: lower ones (`weaker`).
        label: as in `SampleOptions`.
        levels, step: as in `SampleOptions`, of all ways.
        references, probes: as in `SampleOptions`, if there is no scale.
    """

    quantiles: tuple[float, ...] | None = None
    scale: float | None = None
    begins: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    label: int | None = None
    levels: int = 32
    step: str = "heun"
    references: int | None = None
    probes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (_BY_DIMENSION if self.scale is None else _BY_SCALE).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def check(self, baseline: Any = None) -> None:
        """Raise ValueError for what none of the ways reads, or if there are none."""
        given = dataclasses.asdict(self) | {"baseline": baseline}
        ignored, fault = _BY_SCALE, "is read with --scale only; add --scale, or leave it out."
        if self.scale is not None:
            ignored = (*_BY_DIMENSION, "baseline")
            fault = (
                "is of ways by dimension, and there are none with --scale; leave one of them out."
            )
        for name in ignored:
            if given[name] is not None:
                raise ValueError(f"--{name} {fault}")
        if not self.ways():
            raise ValueError(
                "there is nothing to try; name quantiles, or with --scale where to begin."
            )

    def settings(self) -> dict[str, Any]:
        """For JSON: what holds for each way, not what was given."""
        found, ways = dataclasses.asdict(self), self.ways()
        if self.scale is None:
            found["quantiles"] = {
                name: [way.strength for way in ways if way.name == name] for name in _QUANTILES
            }
            found["probes"] = {way.name: way.options.probes for way in ways}
        return found

    @property
    def plain(self) -> SampleOptions:
        """Without mitigation."""
        shared: dict[str, Any] = {"levels": self.levels, "step": self.step, "label": self.label}
        if self.scale is None:
            return SampleOptions("none", **shared)
        return SampleOptions("cfg", scale=self.scale, **shared)

    def ways(self) -> list[Way]:
        """All of them."""
        if self.scale is None:
            more = {"references": self.references, "probes": self.probes}
            return [
                Way(name, share, dataclasses.replace(self.plain, guidance=name, quantile=share,
                                                     **more))
                for name, usual in _QUANTILES.items()
                for share in (usual if self.quantiles is None else self.quantiles)
            ]  # fmt: skip
        late = [
            Way("late", level, dataclasses.replace(self.plain, begin=level))
            for level in self.begins or ()
        ]
        weaker = [
            Way("weaker", scale, dataclasses.replace(self.plain, scale=scale))
            for scale in self.scales or ()
        ]
        return late + weaker
