"""Local intrinsic dimension: of a model (through its denoiser) and of data (through neighbours)."""

from mmh_jax.lid.angles import abid, ess, expected_skewness, simplex_skewness
from mmh_jax.lid.approximate_search import approximate, nn_descent
from mmh_jax.lid.closed_form import closed_form_curve
from mmh_jax.lid.concentration import DancoStatistics, danco_statistics
from mmh_jax.lid.correlation import correlation_dimension, takens
from mmh_jax.lid.danco import (
    Danco,
    DancoCalibration,
    danco,
    danco_calibration,
    nearest_ball,
)
from mmh_jax.lid.decoder_rank import Inverse, decoder_spectrum, invert, rank_at_noise
from mmh_jax.lid.denoised_spread import Returned, denoised_return, denoised_spread
from mmh_jax.lid.denoising_loss import denoising_loss
from mmh_jax.lid.duplicates import Duplicates, find_duplicates
from mmh_jax.lid.flipd import Curve, Flipd, flipd, flipd_curve, residual_bound
from mmh_jax.lid.jacobian_rank import (
    participation_ratio,
    rank_by_gap,
    rank_by_largest_difference,
    rank_by_threshold,
    soft_rank,
    soft_rank_lanczos,
)
from mmh_jax.lid.local_pca import (
    broken_stick,
    ca_pca,
    explained_variance,
    fan,
    fukunaga_olsen,
    kaiser,
    local_spectrum,
    minka,
    rank_by_ratio,
)
from mmh_jax.lid.methods import DATA_METHODS, DataMethod
from mmh_jax.lid.mle import mle, mle_mean
from mmh_jax.lid.multiscale import lidl, lidl_from_density, lidl_weights, richardson
from mmh_jax.lid.neighborhoods import over_neighborhoods
from mmh_jax.lid.neighbors import Neighbors, nearest_neighbors
from mmh_jax.lid.normal_bundle import normal_bundle_spectrum
from mmh_jax.lid.over_k import neighbor_curve
from mmh_jax.lid.pairs import correlation_integral, pair_distances
from mmh_jax.lid.plateau import AtPlateau, Plateau, at_plateau, knee, plateaus
from mmh_jax.lid.radii import gride, mada, mom, two_nn, two_nn_regression
from mmh_jax.lid.scale import choose_scale, relative_slope
from mmh_jax.lid.separability import FisherS, fisher_s, inseparable_dimension
from mmh_jax.lid.spectrum import (
    Spectrum,
    TangentSpace,
    jacobian_spectrum,
    spectral_curve,
    tangent_space,
)
from mmh_jax.lid.tle import tle

__all__ = [
    "DATA_METHODS",
    "AtPlateau",
    "Curve",
    "Danco",
    "DancoCalibration",
    "DancoStatistics",
    "DataMethod",
    "Duplicates",
    "FisherS",
    "Flipd",
    "Inverse",
    "Neighbors",
    "Plateau",
    "Returned",
    "Spectrum",
    "TangentSpace",
    "abid",
    "approximate",
    "at_plateau",
    "broken_stick",
    "ca_pca",
    "choose_scale",
    "closed_form_curve",
    "correlation_dimension",
    "correlation_integral",
    "danco",
    "danco_calibration",
    "danco_statistics",
    "decoder_spectrum",
    "denoised_return",
    "denoised_spread",
    "denoising_loss",
    "ess",
    "expected_skewness",
    "explained_variance",
    "fan",
    "find_duplicates",
    "fisher_s",
    "flipd",
    "flipd_curve",
    "fukunaga_olsen",
    "gride",
    "inseparable_dimension",
    "invert",
    "jacobian_spectrum",
    "kaiser",
    "knee",
    "lidl",
    "lidl_from_density",
    "lidl_weights",
    "local_spectrum",
    "mada",
    "minka",
    "mle",
    "mle_mean",
    "mom",
    "nearest_ball",
    "nearest_neighbors",
    "neighbor_curve",
    "nn_descent",
    "normal_bundle_spectrum",
    "over_neighborhoods",
    "pair_distances",
    "participation_ratio",
    "plateaus",
    "rank_at_noise",
    "rank_by_gap",
    "rank_by_largest_difference",
    "rank_by_ratio",
    "rank_by_threshold",
    "relative_slope",
    "residual_bound",
    "richardson",
    "simplex_skewness",
    "soft_rank",
    "soft_rank_lanczos",
    "spectral_curve",
    "takens",
    "tangent_space",
    "tle",
    "two_nn",
    "two_nn_regression",
]
