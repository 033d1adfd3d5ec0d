"""The estimators that read data, by name: for a command line, a benchmark, or scikit-learn.

Everything here is in the modules of the estimators; this is the list.  A method reads the
neighbourhoods that `nearest_neighbors` found once, and answers for every point and for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.angles import abid, ess
from mmh_jax.lid.jacobian_rank import participation_ratio
from mmh_jax.lid.local_pca import (
    broken_stick,
    explained_variance,
    fan,
    fukunaga_olsen,
    kaiser,
    local_spectrum,
    minka,
    rank_by_ratio,
)
from mmh_jax.lid.mle import mle, mle_mean
from mmh_jax.lid.neighborhoods import over_neighborhoods
from mmh_jax.lid.neighbors import Neighbors
from mmh_jax.lid.radii import gride, mada, mom, two_nn
from mmh_jax.lid.tle import tle
from mmh_jax.mapping import over_points
from mmh_jax.typing import Array, ArrayLike, Estimate

__all__ = ["DATA_METHODS", "DataMethod"]


@dataclasses.dataclass(frozen=True)
class DataMethod:
    """An estimator of the dimension of data.

    Attributes:
        least: the fewest neighbours it can be asked for.
        at_points: `at_points(points, neighbors)`, an `Estimate` of NumPy arrays (N,); the standard
            error is NaN where there is no theory of it.
        pooled: the estimate of one dimension for all points from their distances (N, k), where that
            is more than a mean.
    """

    least: int
    at_points: Callable[[ArrayLike, Neighbors], Estimate]
    pooled: Callable[[Array], Estimate] | None = None

    def overall(self, neighbors: Neighbors, found: Estimate) -> Estimate:
        """One dimension for all points.

        Args:
            neighbors: of the points.
            found: what `at_points` found.

        Returns:
            The pooled estimate, or else the mean over the points where the value is finite, its
            standard error as if one of k neighbourhoods were independent; NaN if none is finite.
        """
        if self.pooled is not None:
            return Estimate(*map(float, self.pooled(jnp.asarray(neighbors.distances))))
        value = found.value[np.isfinite(found.value)]
        if not len(value):
            return Estimate(float("nan"), float("nan"))
        independent = max(len(value) / neighbors.indices.shape[1], 1.0)
        return Estimate(float(value.mean()), float(value.std() / independent**0.5))


def _of_distances(estimator: Callable[[Array], Estimate]) -> Any:
    mapped = over_points(estimator, chunk_size=4096)
    return lambda points, neighbors: mapped(neighbors.distances)


def _of_ratios(estimator: Callable[[Array], Estimate]) -> Any:
    """At each point from the ratios of its neighbours."""
    mapped = over_points(lambda all_of, index: estimator(all_of[index]), (None, 0), chunk_size=256)
    return lambda points, neighbors: mapped(jnp.asarray(neighbors.distances), neighbors.indices)


def _of_offsets(estimator: Callable[[Array], Any]) -> Any:
    def estimate(offsets: Array) -> Estimate:
        found = estimator(offsets)
        known = isinstance(found, Estimate)
        return found if known else Estimate(jnp.asarray(found, float), jnp.asarray(jnp.nan))

    mapped = over_neighborhoods(estimate)
    return lambda points, neighbors: mapped(points, neighbors.indices)


def _of_spectra(rule: Callable[[Array], Array]) -> Any:
    return _of_offsets(lambda offsets: rule(local_spectrum(offsets)))


def _minka(offsets: Array) -> Array:
    num_samples, ambient_dim = offsets.shape
    return minka(local_spectrum(offsets), num_samples=num_samples, ambient_dim=ambient_dim)


DATA_METHODS = {
    "mle": DataMethod(4, _of_distances(mle), mle_mean),
    "mom": DataMethod(3, _of_distances(mom)),
    "mada": DataMethod(2, _of_distances(mada)),
    "two_nn": DataMethod(4, _of_ratios(two_nn), two_nn),
    "gride": DataMethod(
        4,
        _of_ratios(functools.partial(gride, inner=2, outer=4)),
        functools.partial(gride, inner=2, outer=4),
    ),
    "tle": DataMethod(3, _of_offsets(tle)),
    "abid": DataMethod(3, _of_offsets(abid)),
    "ess": DataMethod(3, _of_offsets(ess)),
    "local_pca": DataMethod(3, _of_spectra(fukunaga_olsen)),
    "local_pca_gap": DataMethod(3, _of_spectra(rank_by_ratio)),
    "local_pca_variance": DataMethod(3, _of_spectra(explained_variance)),
    "local_pca_kaiser": DataMethod(3, _of_spectra(kaiser)),
    "local_pca_broken_stick": DataMethod(3, _of_spectra(broken_stick)),
    "local_pca_fan": DataMethod(3, _of_spectra(fan)),
    "local_pca_minka": DataMethod(3, _of_offsets(_minka)),
    "participation_ratio": DataMethod(3, _of_spectra(participation_ratio)),
}
