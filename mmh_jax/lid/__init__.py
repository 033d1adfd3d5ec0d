"""Local intrinsic dimension: of a model (through its denoiser) and of data (through neighbours)."""

from mmh_jax.lid.decoder_rank import Inverse, decoder_spectrum, invert, rank_at_noise
from mmh_jax.lid.flipd import Curve, flipd, flipd_curve
from mmh_jax.lid.jacobian_rank import (
    Spectrum,
    jacobian_spectrum,
    rank_by_gap,
    rank_by_threshold,
    soft_rank,
)
from mmh_jax.lid.mle import mle, mle_mean
from mmh_jax.lid.neighbors import Neighbors, nearest_neighbors
from mmh_jax.lid.normal_bundle import normal_bundle_spectrum
from mmh_jax.lid.scale import choose_scale, relative_slope

__all__ = [
    "Curve",
    "Inverse",
    "Neighbors",
    "Spectrum",
    "choose_scale",
    "decoder_spectrum",
    "flipd",
    "flipd_curve",
    "invert",
    "jacobian_spectrum",
    "mle",
    "mle_mean",
    "nearest_neighbors",
    "normal_bundle_spectrum",
    "rank_at_noise",
    "rank_by_gap",
    "rank_by_threshold",
    "relative_slope",
    "soft_rank",
]
