"""Memorization: detectors, labels by sampling, and from two local dimensions to a verdict."""

from mmh_jax.memorization.against import (
    danger_zone,
    nearest_distance,
    pairwise_radius,
    pixel_variance,
    tiled_distance,
)
from mmh_jax.memorization.along_path import (
    StepReference,
    cfg_norm_along,
    encoded_cfg_norm,
    step_reference,
    step_sizes,
    step_stability,
)
from mmh_jax.memorization.conditional import anisotropy, cfg_norm, score_norm, sharpness
from mmh_jax.memorization.curvature import (
    curvature_difference,
    curvature_map,
    squared_difference,
)
from mmh_jax.memorization.detectors import DETECTORS, Detector
from mmh_jax.memorization.evidence import QUANTITIES, Quantity
from mmh_jax.memorization.inside import (
    attention_entropy,
    bright_ending,
    inside_at,
    local_cfg_norm,
    spikiness,
)
from mmh_jax.memorization.labels import Copies, copies
from mmh_jax.memorization.scoring import Scores, scores
from mmh_jax.memorization.subject import Settings, Subject
from mmh_jax.memorization.verdict import Label, Verdict, verdict

__all__ = [
    "DETECTORS",
    "QUANTITIES",
    "Copies",
    "Detector",
    "Label",
    "Quantity",
    "Scores",
    "Settings",
    "StepReference",
    "Subject",
    "Verdict",
    "anisotropy",
    "attention_entropy",
    "bright_ending",
    "cfg_norm",
    "cfg_norm_along",
    "copies",
    "curvature_difference",
    "curvature_map",
    "danger_zone",
    "encoded_cfg_norm",
    "inside_at",
    "local_cfg_norm",
    "nearest_distance",
    "pairwise_radius",
    "pixel_variance",
    "score_norm",
    "scores",
    "sharpness",
    "spikiness",
    "squared_difference",
    "step_reference",
    "step_sizes",
    "step_stability",
    "tiled_distance",
    "verdict",
]
