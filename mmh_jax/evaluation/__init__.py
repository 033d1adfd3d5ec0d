"""Judging a generator: by its samples (against data, in features) and by its losses."""

from mmh_jax.evaluation.frechet import frechet_distance, frechet_of_moments, kernel_distance
from mmh_jax.evaluation.loss_gap import LossCurve, loss_curve, loss_gap, paired_difference
from mmh_jax.evaluation.prdc import Prdc, expected_coverage, prdc

__all__ = [
    "LossCurve",
    "Prdc",
    "expected_coverage",
    "frechet_distance",
    "frechet_of_moments",
    "kernel_distance",
    "loss_curve",
    "loss_gap",
    "paired_difference",
    "prdc",
]
