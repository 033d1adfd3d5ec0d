"""Memorization: from two local dimensions to a verdict, and labels by sampling."""

from mmh_jax.memorization.complexity import (
    complexity_residual,
    conformal_p,
    lid_per_bit,
    png_bytes,
    total_variation,
    zlib_bytes,
)
from mmh_jax.memorization.cross_fit import CrossFit, check_halves, cross_fit
from mmh_jax.memorization.data_dimension import diffusion_curve, diffusion_lid, neighbor_lid
from mmh_jax.memorization.explain import Explanation, explain
from mmh_jax.memorization.extraction import Extraction, extraction, rate_interval
from mmh_jax.memorization.labels import Copies, calibrated_copies, copies, feature_copies
from mmh_jax.memorization.metrics import (
    Comparison,
    Detection,
    Interval,
    compare,
    detection,
    over_seeds,
)
from mmh_jax.memorization.verdict import Label, Verdict, verdict

__all__ = [
    "Comparison",
    "Copies",
    "CrossFit",
    "Detection",
    "Explanation",
    "Extraction",
    "Interval",
    "Label",
    "Verdict",
    "calibrated_copies",
    "check_halves",
    "compare",
    "complexity_residual",
    "conformal_p",
    "copies",
    "cross_fit",
    "detection",
    "diffusion_curve",
    "diffusion_lid",
    "explain",
    "extraction",
    "feature_copies",
    "lid_per_bit",
    "neighbor_lid",
    "over_seeds",
    "png_bytes",
    "rate_interval",
    "total_variation",
    "verdict",
    "zlib_bytes",
]
