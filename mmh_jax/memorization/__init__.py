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
from mmh_jax.memorization.basin import (
    BasinScale,
    Separation,
    basin_scale,
    basin_verdict,
    flat_distances,
    regeneration_distances,
    returned,
    separation,
)
from mmh_jax.memorization.complexity import (
    complexity_residual,
    conformal_p,
    lid_per_bit,
    png_bytes,
    total_variation,
    zlib_bytes,
)
from mmh_jax.memorization.conditional import anisotropy, cfg_norm, score_norm, sharpness
from mmh_jax.memorization.controls import (
    Controls,
    DoseResponse,
    conformal_p_values,
    discoveries,
    dose_response,
    plan_controls,
)
from mmh_jax.memorization.cross_fit import CrossFit, check_halves, cross_fit
from mmh_jax.memorization.curvature import curvature_difference, curvature_map, squared_difference
from mmh_jax.memorization.data_dimension import diffusion_curve, diffusion_lid, neighbor_lid
from mmh_jax.memorization.detectors import DETECTORS, Detector
from mmh_jax.memorization.evidence import QUANTITIES, Quantity
from mmh_jax.memorization.explain import Explanation, explain
from mmh_jax.memorization.extraction import Extraction, extraction, rate_interval
from mmh_jax.memorization.inside import (
    attention_entropy,
    bright_ending,
    inside_at,
    local_cfg_norm,
    spikiness,
)
from mmh_jax.memorization.labels import Copies, calibrated_copies, copies, feature_copies
from mmh_jax.memorization.metrics import (
    Comparison,
    Detection,
    Interval,
    compare,
    detection,
    over_seeds,
)
from mmh_jax.memorization.regeneration import Regeneration, regeneration
from mmh_jax.memorization.scoring import Scores, scores
from mmh_jax.memorization.subject import Settings, Subject
from mmh_jax.memorization.verdict import Label, Verdict, verdict

__all__ = [
    "DETECTORS",
    "QUANTITIES",
    "BasinScale",
    "Comparison",
    "Controls",
    "Copies",
    "CrossFit",
    "Detection",
    "Detector",
    "DoseResponse",
    "Explanation",
    "Extraction",
    "Interval",
    "Label",
    "Quantity",
    "Regeneration",
    "Scores",
    "Separation",
    "Settings",
    "StepReference",
    "Subject",
    "Verdict",
    "anisotropy",
    "attention_entropy",
    "basin_scale",
    "basin_verdict",
    "bright_ending",
    "calibrated_copies",
    "cfg_norm",
    "cfg_norm_along",
    "check_halves",
    "compare",
    "complexity_residual",
    "conformal_p",
    "conformal_p_values",
    "copies",
    "cross_fit",
    "curvature_difference",
    "curvature_map",
    "danger_zone",
    "detection",
    "diffusion_curve",
    "diffusion_lid",
    "discoveries",
    "dose_response",
    "encoded_cfg_norm",
    "explain",
    "extraction",
    "feature_copies",
    "flat_distances",
    "inside_at",
    "lid_per_bit",
    "local_cfg_norm",
    "nearest_distance",
    "neighbor_lid",
    "over_seeds",
    "pairwise_radius",
    "pixel_variance",
    "plan_controls",
    "png_bytes",
    "rate_interval",
    "regeneration",
    "regeneration_distances",
    "returned",
    "score_norm",
    "scores",
    "separation",
    "sharpness",
    "spikiness",
    "squared_difference",
    "step_reference",
    "step_sizes",
    "step_stability",
    "tiled_distance",
    "total_variation",
    "verdict",
    "zlib_bytes",
]
