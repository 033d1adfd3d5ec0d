"""The estimators that read data, by name: for a command line, a benchmark, or scikit-learn.

Everything here is in the modules of the estimators; this is the list.  A method reads the
neighbourhoods that `nearest_neighbors` found once, and answers for every point and for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.angles import abid, ess
from mmh_jax.lid.closed_form import closed_form_curve
from mmh_jax.lid.concentration import danco_statistics
from mmh_jax.lid.correlation import correlation_dimension, takens
from mmh_jax.lid.danco import danco, danco_calibration, nearest_ball
from mmh_jax.lid.jacobian_rank import participation_ratio
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
from mmh_jax.lid.mle import mle, mle_mean
from mmh_jax.lid.neighborhoods import over_neighborhoods
from mmh_jax.lid.neighbors import Neighbors
from mmh_jax.lid.pairs import pair_distances
from mmh_jax.lid.plateau import at_plateau
from mmh_jax.lid.radii import gride, mada, mom, two_nn, two_nn_regression
from mmh_jax.lid.separability import fisher_s
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
            is more than a median.
        whole: `whole(points, neighbors)`, the same where it reads the points: an estimator of a
            set, for which `at_points` takes each neighbourhood as one.
    """

    least: int
    at_points: Callable[[ArrayLike, Neighbors], Estimate]
    pooled: Callable[[Array], Estimate] | None = None
    whole: Callable[[ArrayLike, Neighbors], Estimate] | None = None

    def overall(
        self, neighbors: Neighbors, found: Estimate, points: ArrayLike | None = None
    ) -> Estimate:
        """One dimension for all points.

        Args:
            neighbors: of the points.
            found: what `at_points` found.
            points: for a method that has `whole`.

        Returns:
            The pooled estimate or that of the whole, or else the median over the points where the
            value is finite, which no single point moves far; its standard error is 1.2533 standard
            deviations of a normal distribution with the same quartiles, over the square root of the
            number of neighbourhoods, one in k of them taken as independent.  NaN if none is finite.

        Raises:
            ValueError: if the method has `whole` and there are no points.
        """
        if self.whole is not None:
            if points is None:
                raise ValueError("`overall(points=None)`: this method reads the points; pass them.")
            return Estimate(*map(float, self.whole(points, neighbors)))
        if self.pooled is not None:
            return Estimate(*map(float, self.pooled(jnp.asarray(neighbors.distances))))
        value = found.value[np.isfinite(found.value)]
        if not len(value):
            return Estimate(float("nan"), float("nan"))
        independent = max(len(value) / neighbors.indices.shape[1], 1.0)
        low, middle, high = np.quantile(value, [0.25, 0.5, 0.75])
        spread = 1.2533 * (high - low) / 1.349
        return Estimate(float(middle), float(spread / independent**0.5))


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
        if isinstance(found, Estimate):
            return found
        # Counts are -1 where there is none.
        value = jnp.where(found < 0, jnp.nan, jnp.asarray(found, float))
        return Estimate(value, jnp.asarray(jnp.nan))

    mapped = over_neighborhoods(estimate)
    return lambda points, neighbors: mapped(points, neighbors.indices)


def _unitless_spectrum(offsets: Array) -> Array:
    """In units of the largest coordinate: squares of very small or large ones have no number."""
    largest = jnp.max(jnp.abs(offsets))
    return local_spectrum(offsets / jnp.where(largest == 0, 1, largest))


def _of_spectra(rule: Callable[[Array], Array]) -> Any:
    return _of_offsets(lambda offsets: rule(_unitless_spectrum(offsets)))


def _minka(offsets: Array) -> Array:
    num_samples, ambient_dim = offsets.shape
    return minka(_unitless_spectrum(offsets), num_samples=num_samples, ambient_dim=ambient_dim)


def _ca_pca(offsets: Array) -> Array:
    """Of all but the last neighbour, which is needed for the radius."""
    largest = jnp.max(jnp.abs(offsets))
    offsets = offsets / jnp.where(largest == 0, 1, largest)
    radius = jnp.mean(jnp.linalg.norm(offsets[-2:], axis=1))
    return ca_pca(local_spectrum(offsets[:-1]), radius=radius)


# Of a plateau of the closed form: the curve of a few points is never flat to 10% an e-fold.
_MAX_SLOPE = 0.25


def _closed_form(points: ArrayLike, neighbors: Neighbors) -> Estimate:
    """Each point left out, at its plateau over noise levels of the size of the radii.

    It reads all points, not the neighbours alone.  At an atom 0, the limit of small noise; NaN
    where there is no plateau.
    """
    nearest, farthest = np.asarray(neighbors.distances, float)[:, [0, -1]].T
    apart = nearest > 0
    if not apart.any():
        return Estimate(np.zeros(len(apart)), np.zeros(len(apart)))
    low, high = float(np.median(nearest[apart])) / 2, 2 * float(np.median(farthest[apart]))
    # In a unit of the radii: squares of very small or large ones have no number.
    unit = 2.0 ** float(np.frexp(high)[1])
    curve = closed_form_curve(np.asarray(points) / unit, np.geomspace(low, high, 16) / unit)
    found = at_plateau(curve, max_slope=_MAX_SLOPE)
    value = np.where(found.num_plateaus > 0, found.value, np.nan)
    return Estimate(np.where(apart, value, 0), np.where(apart, found.stderr, 0))


# The estimators of a set, at a point, take its k neighbours as one.


def _pair_ranks(k: int, *, of_all: bool) -> tuple[int, int]:
    """The two ranks, whose distances are the radii; in a neighbourhood, far from its edge."""
    inner, outer = (k // 4, k // 2) if of_all else (k // 10, k // 4)
    return max(inner, 1), max(outer, inner + 1, 2)


def _corr_int(offsets: Array) -> Estimate:
    inner, outer = _pair_ranks(len(offsets), of_all=False)
    return correlation_dimension(pair_distances(offsets), inner=inner, outer=outer)


def _corr_int_of_all(points: ArrayLike, neighbors: Neighbors) -> Estimate:
    inner, outer = _pair_ranks(neighbors.indices.shape[1], of_all=True)
    distances = jnp.asarray(neighbors.distances)
    return correlation_dimension(distances, inner=inner, outer=outer, points=points)


def _takens(offsets: Array) -> Estimate:
    distances = pair_distances(offsets)
    _, outer = _pair_ranks(len(offsets), of_all=False)
    return takens(distances, radius=jnp.median(distances[:, outer - 1]))


def _fisher_s_of_all(points: ArrayLike, neighbors: Neighbors) -> Estimate:
    return Estimate(fisher_s(points).value, float("nan"))


@functools.lru_cache(maxsize=32)
def _ball_statistics(num_points: int, num_neighbors: int, upto: int, repeats: int) -> Any:
    return danco_calibration(
        num_points, num_neighbors, upto=upto, repeats=repeats, key=jax.random.key(0)
    )


def _danco(points: ArrayLike, neighbors: Neighbors) -> Estimate:
    """Against the mean of 64 balls of k points; k points cannot span k dimensions."""
    k, ambient_dim = neighbors.indices.shape[1], np.asarray(points)[0].size
    calibration = _ball_statistics(k, min(10, k - 2), min(ambient_dim, k), 64)
    mapped = _of_offsets(lambda offsets: danco(offsets, calibration).value)
    return mapped(points, neighbors)


def _danco_of_all(points: ArrayLike, neighbors: Neighbors) -> Estimate:
    """Against balls of up to as many dimensions as are needed."""
    k, ambient_dim = min(10, neighbors.indices.shape[1] - 1), np.asarray(points)[0].size
    found = danco_statistics(points, k)
    norm = float(found.norm) if np.isfinite(found.norm) else ambient_dim
    upto, value = 0, jnp.zeros(())
    while value >= upto and upto < ambient_dim:
        upto = min(max(int(2 * norm) + 5, 2 * upto), ambient_dim)
        value = nearest_ball(found, _ball_statistics(len(np.asarray(points)), k, upto, 1)).value
    return Estimate(value, float("nan"))


DATA_METHODS = {
    "mle": DataMethod(4, _of_distances(mle), mle_mean),
    "mom": DataMethod(3, _of_distances(mom)),
    "mada": DataMethod(2, _of_distances(mada)),
    "two_nn": DataMethod(4, _of_ratios(two_nn), two_nn),
    "two_nn_regression": DataMethod(4, _of_ratios(two_nn_regression), two_nn_regression),
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
    "ca_pca": DataMethod(4, _of_offsets(_ca_pca)),
    "participation_ratio": DataMethod(3, _of_spectra(participation_ratio)),
    "closed_form": DataMethod(3, _closed_form),
    "corr_int": DataMethod(4, _of_offsets(_corr_int), whole=_corr_int_of_all),
    "takens": DataMethod(4, _of_offsets(_takens), takens),
    "fisher_s": DataMethod(
        4, _of_offsets(lambda offsets: fisher_s(offsets).value), whole=_fisher_s_of_all
    ),
    "danco": DataMethod(5, _danco, whole=_danco_of_all),
}
