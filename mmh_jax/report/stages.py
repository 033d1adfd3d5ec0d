"""How much work to do, and how far it has come."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator

from mmh_jax import train

__all__ = [
    "PRESETS",
    "Preset",
    "Progress",
    "Stages",
    "check_count",
    "check_matplotlib",
    "check_seed",
    "check_sigma",
    "find_preset",
]

Progress = Callable[[str, int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the whole pipeline.

    Attributes:
        recipe: of the model.
        max_points: at how many points an audit measures, unless told otherwise.
        num_samples: how many samples of the model an audit compares with the data, likewise.
        save_every: seconds between checkpoints of the training.
        num_regenerations: runs of the sampler at each point and noise level of an audit.
    """

    recipe: train.Recipe
    max_points: int
    num_samples: int
    save_every: float
    num_regenerations: int


PRESETS = {
    "smoke": Preset(train.RECIPES["smoke"], 128, 64, 0.0, 4),
    "cpu": Preset(train.RECIPES["cpu"], 2_000, 1_000, 10.0, 16),
    "accelerator": Preset(train.RECIPES["accelerator"], 10_000, 10_000, 60.0, 16),
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_count(option: str, value: int | None, *, least: int = 1) -> None:
    """Raise ValueError if a count, which may be None, is below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{option} is {value}; it must be at least {least}.")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that JAX would cut to 32 bits, and so take for another one."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}; it must be at least 0 and below 2^32.")


def check_sigma(sigma: float | None) -> None:
    """Raise ValueError for what is no noise level; None is chosen."""
    if sigma is not None and not 0 < sigma < float("inf"):
        raise ValueError(f"--sigma is {sigma:g}; it must be a positive number, or `auto`.")


def check_matplotlib(what: str) -> None:
    """Raise ImportError if what is to draw a figure has nothing to draw it with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{what} draws a figure and needs matplotlib: pip install 'mmh-jax[plot]'"
        )


@dataclasses.dataclass
class Stages:
    """Stages of a run, one after the other: reports their progress and keeps their times.

    Attributes:
        progress: called as `progress(stage, done, total, note)`; `total` is 0 while unknown.
        timings: seconds by stage.

    >>> stages = Stages(print)
    >>> with stages("baking") as report:
    ...     report(1, 2)
    baking 0 0
    baking 1 2
    baking 2 2
    """

    progress: Progress | None = None
    timings: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a stage; yields `report(done, total, note="")`."""
        last_total, last_note = 1, ""

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last_total, last_note
            last_total, last_note = total or 1, note
            if self.progress is not None:
                self.progress(name, done, total, note)

        start = time.perf_counter()
        report(0, 0)
        yield report
        # A stage that was found finished reports nothing itself.
        report(last_total, last_total, last_note)
        self.timings[name] = time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """The timings to the millisecond."""
        return {stage: round(seconds, 3) for stage, seconds in self.timings.items()}
