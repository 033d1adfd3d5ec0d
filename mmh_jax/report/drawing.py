"""A saved model as a sampler: what it is steered by, what is usual there, and samples in blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import train
from mmh_jax.data import sources
from mmh_jax.mitigation import DenoisedLid, Target
from mmh_jax.report import samples
from mmh_jax.report.files import hash_of
from mmh_jax.report.guiding import MAX_TRIES, STEPS, SampleOptions
from mmh_jax.report.measure import Progress
from mmh_jax.report.model import load_model
from mmh_jax.report.reference import draw_reference
from mmh_jax.typing import Key

__all__ = ["Sampler", "find_baseline", "find_training"]

Judge = Callable[[np.ndarray], samples.Judged | None]


def find_baseline(
    folder: str | Path | None, config: train.ModelConfig, options: SampleOptions
) -> Any | None:
    """The model to compare with, if one is given; callers check that there is use for it."""
    if folder is None:
        return None
    there = train.load_config(folder)
    if there.shape != config.shape:
        raise ValueError(
            f"--baseline {folder} takes points of shape {there.shape}, and the model those of "
            f"shape {config.shape}."
        )
    known, asked = (each.network_options.get("num_classes") for each in (there, config))
    if options.label is not None and known != asked:
        raise ValueError(f"--baseline {folder}: its labels are not those of the model.")
    return load_model(folder, config.shape)[0]


def find_training(data: str | Path | None, config: train.ModelConfig) -> sources.Source | None:
    """The training data that were given, or that the model names and are still the same."""
    if data is not None:
        found = sources.load(data)
        if found.points.shape[1:] != config.shape:
            raise ValueError(
                f"--data {data} has points of shape {found.points.shape[1:]}, and the model takes "
                f"points of shape {config.shape}."
            )
        return found
    named = config.training.get("path", config.training.get("source"))
    try:
        found = None if named is None else sources.load(named)
    except (ValueError, OSError):
        return None
    if found is None or hash_of(found.points) != config.training.get("data"):
        return None
    return found


class Sampler(NamedTuple):
    """A model and how it is sampled from; the same seed starts from the same noise always."""

    model: Any
    baseline: Any | None
    config: train.ModelConfig
    options: SampleOptions
    seed: int

    @property
    def keys(self) -> Key:
        """Of the samples, of the reference runs, and of the measure."""
        return jax.random.split(jax.random.key(self.seed), 3)

    @property
    def measure(self) -> DenoisedLid:
        """The dimension on the way."""
        return self.options.measure(self.config, self.baseline, key=self.keys[2])

    def labels(self, num: int) -> np.ndarray | None:
        """(num,) the condition of each sample, or None."""
        return self.options.conditions(self.config, num, seed=self.seed)

    def target(
        self, judge: Judge, *, folder: Path, progress: Progress | None = None
    ) -> tuple[Target, dict[str, Any]]:
        """What is usual, and what the reference runs say.

        Args:
            judge: which of their ends are copies, or None if that is not known.
            folder: for the runs; those found there are not drawn again.
            progress: called as `progress(done, total)`.
        """
        runs = draw_reference(
            self.model, self.config, self.options, key=self.keys[1], measure=self.measure,
            folder=folder, progress=progress,
        )  # fmt: skip
        judged = judge(runs.samples)
        is_copy = None if judged is None else judged.memorized
        target, kept = runs.target(self.options, self.config, is_copy)
        rule = "finite, and no copy of the training data"
        return target, {
            "num": self.options.references,
            "kept": kept,
            "copies": None if is_copy is None else int(is_copy.sum()),
            "rule": rule if judged else "finite; no training data are known, copies are among them",
            "measured_at": float(np.asarray(self.measure.sigma)),
            "is_relative": self.baseline is not None,
            "sigmas": np.asarray(target.sigmas).tolist(),
            "target": np.asarray(target.values).tolist(),
        }

    def draw(
        self,
        num: int,
        target: Target | None,
        *,
        folder: Path,
        progress: Progress | None = None,
    ) -> samples.Drawn:
        """Samples; without rejection all are accepted at the first try."""
        shared = {
            "key": self.keys[0], "conditions": self.labels(num),
            "step": STEPS[self.options.step](), "folder": folder, "progress": progress,
        }  # fmt: skip
        if target is not None and self.options.guidance == "reject":
            return samples.draw_selected(
                self.model, self.config, num, sigmas=self.options.sigmas(self.config),
                places=self.options.places(self.config), measure=self.measure, target=target,
                max_tries=MAX_TRIES, **shared,
            )  # fmt: skip
        drawn = samples.draw(
            self._guided(target), self.config, num, num_levels=self.options.levels, **shared
        )
        return samples.Drawn(drawn, np.ones(num, bool), np.ones(num, int))

    def _guided(self, target: Target | None) -> Any:
        """The denoiser to sample with."""
        if self.options.guidance == "cfg":
            return self.options.cfg_guided(self.model, self.config)
        if target is None:
            return self.model
        return self.options.lid_guided(self.model, self.config, target, self.measure)

    def evaluations(self, drawn: samples.Drawn) -> dict[str, float]:
        """Of networks, for one sample."""
        measure = self.measure if self.options.has_target else None
        return self.options.evaluations(self.config, measure, tries=float(drawn.tries.mean()))
