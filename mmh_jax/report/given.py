"""What detectors are given: models and data that belong together, or what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmh_jax import train
from mmh_jax.data import sources
from mmh_jax.report.files import hash_of
from mmh_jax.report.model import load_model

__all__ = ["Given", "read"]


class Given(NamedTuple):
    """What is looked at.

    Attributes:
        model: a denoiser, without a condition.
        config: its configuration.
        baseline: another denoiser, or None.
        data: the points that are scored, or that samples should be like.
        training: (N, *shape) what the model was trained on, or None if that is not known.
        by_label: whether each point has its label as a condition.
    """

    model: Any
    config: train.ModelConfig
    baseline: Any
    data: sources.Source
    training: np.ndarray | None
    by_label: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """Of `memorization.Subject`, those that detectors can read."""
        there = {
            "unconditional": self.by_label,
            "baseline": self.baseline is not None,
            "data": self.training is not None,
        }
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def bound(self) -> Any:
        """The model, with the first label if points have labels."""
        return self.model.condition(self.labels[0]) if self.by_label else self.model

    @property
    def labels(self) -> np.ndarray:
        """Of the points of `data`, as conditions."""
        return np.asarray(self.data.labels, np.int32)

    @property
    def is_training(self) -> bool:
        """Whether the points of `data` are the training data themselves, row by row."""
        points = self.data.points
        return self.training is points or np.array_equal(self.training, points)  # pyright: ignore


def read(
    model: str | Path,
    data: str | Path,
    baseline: str | Path | None,
    trained_on: str | Path | None,
    by_label: bool,
    *,
    is_generated: bool,
) -> Given:
    """Read models and data, and see that they belong together.

    Args:
        model, baseline: folders, or no baseline.
        data, trained_on: what `data.sources.load` reads; without `trained_on` the training data are
            `data`, if samples are scored or the model says so.
        by_label: whether the labels of the data are conditions of the model.
        is_generated: whether samples are scored.

    Raises:
        FileNotFoundError, ValueError: for what cannot be used.
    """
    source = sources.load(data)
    shape = source.points.shape[1:]
    denoiser, config = load_model(model, shape)
    other = None if baseline is None else load_model(baseline, shape)[0]
    if by_label:
        _check_labels(source, config)
    training = None
    if trained_on is not None:
        training = sources.load(trained_on).points
        if training.shape[1:] != shape:
            raise ValueError(
                f"--trained-on {trained_on} has points of shape {training.shape[1:]}, and --data "
                f"those of shape {shape}."
            )
    elif is_generated or config.training.get("data") == hash_of(source.points):
        training = source.points
    return Given(denoiser, config, other, source, training, by_label)


def _check_labels(source: sources.Source, config: train.ModelConfig) -> None:
    num_classes = config.network_options.get("num_classes")
    if num_classes is None:
        raise ValueError(
            "--label: the model takes no labels; leave it out, or train one with `mmh-jax train "
            "--by-label`."
        )
    if source.labels is None:
        raise ValueError(
            f"--label: the source {source.name} has no labels; leave it out, or pass a .npz file "
            "with `points` and `labels`."
        )
    labels = np.asarray(source.labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"--label: the labels of {source.name} are no whole numbers.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"--label: {source.name} has labels from {labels.min()} to {labels.max()}; the model "
            f"knows 0 to {num_classes - 1}."
        )
