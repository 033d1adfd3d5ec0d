"""Judging a generator: by its samples (against data, in features) and by its losses."""

from mmh_jax.evaluation.classifier import (
    Certainty,
    Classifier,
    certainty,
    fashion_mnist_classifier,
    label_agreement,
    load_classifier,
    mnist_classifier,
    save_classifier,
    untrained_classifier,
)
from mmh_jax.evaluation.frechet import frechet_distance, frechet_of_moments, kernel_distance
from mmh_jax.evaluation.loss_gap import LossCurve, loss_curve, loss_gap, paired_difference
from mmh_jax.evaluation.prdc import Prdc, expected_coverage, prdc

__all__ = [
    "Certainty",
    "Classifier",
    "LossCurve",
    "Prdc",
    "certainty",
    "expected_coverage",
    "fashion_mnist_classifier",
    "frechet_distance",
    "frechet_of_moments",
    "kernel_distance",
    "label_agreement",
    "load_classifier",
    "loss_curve",
    "loss_gap",
    "mnist_classifier",
    "paired_difference",
    "prdc",
    "save_classifier",
    "untrained_classifier",
]
