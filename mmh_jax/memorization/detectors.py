r"""Detectors of memorization, by name: a score for each point, larger = more memorized.

| detectors                                                              | read                   |
|------------------------------------------------------------------------|------------------------|
| `flipd`, `projected_`, `thresholded_`, `tangential_`, `expected_flipd`,|                        |
| `projected_trace`, `eigenvalue_count`, `soft_count`, `normal_bundle`,  |                        |
| `denoising_loss`, `denoised_spread`, `denoised_mean`, `residual`,      | the model at the point |
| `score_norm`                                                           |                        |
| `regeneration`, `regeneration_spread`, `regeneration_mean`             | its sampler from there |
| `*_unconditional`, `*_difference`, `*_log_ratio`; `cfg_norm` and its   |                        |
| kin, `sharpness`, `curvature_difference`, `anisotropy`, ...            | a conditional pair     |
| `*_baseline`                                                           | an earlier model       |
| `cfg_norm_along`, `step_stability`                                     | a run of the sampler   |
| `spikiness`, `attention_entropy`, `bright_ending`, `local_cfg_norm`    | inside the network     |
| `pairwise_radius`                                                      | generations            |
| `danger_zone`, `nearest_distance`                                      | the training data      |
| `pixel_variance`, `png_bytes`, `zlib_bytes` (of values from 0 to 1)    | the point alone        |

A dimension is small where something is memorized, and its detector is minus it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax import lid
from mmh_jax.memorization import inside
from mmh_jax.memorization.complexity import png_bytes, zlib_bytes
from mmh_jax.memorization.evidence import QUANTITIES, evaluations_of, with_needs
from mmh_jax.memorization.subject import Settings
from mmh_jax.typing import Array, Estimate

__all__ = ["DETECTORS", "Detector"]


@dataclasses.dataclass(frozen=True)
class Detector:
    """A score, larger = more memorized.

    Attributes:
        name: in tables.
        quantities: what it reads, of `QUANTITIES`.
        score: `score(found)` of these quantities at one point, an `Estimate` of scalars.
        on_host: in place of `score`, `on_host(points)` of NumPy arrays (M, *shape), for what JAX
            cannot do, such as the bytes of a compressed file; it returns (M,).
    """

    name: str
    quantities: tuple[str, ...] = ()
    score: Callable[[Mapping[str, Any]], Estimate] | None = None
    on_host: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Subject` and `Settings` that it needs, beyond points and denoiser."""
        names = with_needs(self.quantities)
        return tuple(dict.fromkeys(field for name in names for field in QUANTITIES[name].reads))

    def evaluations(self, ambient_dim: int, settings: Settings) -> float:
        """Network evaluations for one point, JVPs and VJPs counted as one each.

        NaN if a trace strategy does not say its cost.

        >>> DETECTORS["eigenvalue_count"].evaluations(100, Settings(0.1))
        101
        """
        return evaluations_of(self.quantities, ambient_dim, settings)


# From quantities to scores.


def _sure(value: Any) -> Estimate:
    value = jnp.asarray(value, float)
    return Estimate(value, jnp.zeros_like(value))


def _minus(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, estimate.stderr)


def _log_ratio(above: Estimate, below: Estimate) -> Estimate:
    """log above / below, infinite where one is 0 and NaN where one is negative."""
    stderr = jnp.hypot(above.stderr / above.value, below.stderr / below.value)
    return Estimate(jnp.log(above.value) - jnp.log(below.value), stderr)


def _difference(above: Estimate, below: Estimate) -> Estimate:
    """With the error of independent draws, an upper bound where they have probes in common."""
    return Estimate(above.value - below.value, jnp.hypot(above.stderr, below.stderr))


def _dimension(count: Array) -> Array:
    """A count as a real number, NaN where there is none (-1)."""
    return jnp.where(count < 0, jnp.nan, jnp.asarray(count, float))


def _projected_trace(spectrum: lid.Spectrum) -> Estimate:
    return _sure(jnp.sum(jnp.maximum(spectrum.eigenvalues, 0)))


def _count(spectrum: lid.Spectrum) -> Estimate:
    return _sure(_dimension(lid.rank_by_threshold(spectrum.eigenvalues)))


def _flipd(found: lid.Flipd) -> Estimate:
    return Estimate(found.value, found.stderr)


Combine = Callable[[Estimate, Estimate], Estimate]


def _of_two(
    name: str, what: str, read: Callable[[Any], Estimate], combine: Combine, other: str
) -> Detector:
    """Of the other model's quantity and the model's own, in this order."""
    names = (f"{what}_of_{other}", f"{what}_of_denoiser")
    return Detector(name, names, lambda found: combine(*(read(found[each]) for each in names)))


def _of_one(name: str, quantity: str, read: Callable[[Any], Estimate]) -> Detector:
    return Detector(name, (quantity,), lambda found: read(found[quantity]))


def _spectral(name: str) -> Detector:
    return _of_one(name, "spectrum_of_denoiser", lambda s: _minus(_sure(getattr(s, name))))


def _bundle_rank(values: Array) -> Estimate:
    rank = values.shape[-1] - _dimension(lid.rank_by_threshold(values))
    return _sure(-rank)


DETECTORS: dict[str, Detector] = {
    detector.name: detector
    for detector in (
        # Dimensions of the model at the point.
        _of_one("flipd", "flipd_of_denoiser", lambda f: _minus(_flipd(f))),
        _spectral("projected_flipd"),
        _spectral("thresholded_flipd"),
        _spectral("tangential_flipd"),
        _spectral("expected_flipd"),
        _of_one("projected_trace", "spectrum_of_denoiser", lambda s: _minus(_projected_trace(s))),
        _of_one("eigenvalue_count", "spectrum_of_denoiser", lambda s: _minus(_count(s))),
        _of_one("soft_count", "soft_count", _minus),
        _of_one("normal_bundle", "normal_bundle", _bundle_rank),
        _of_one("denoising_loss", "denoising_loss", _minus),
        _of_one("denoised_spread", "spread_of_denoiser", lambda r: _minus(r.spread)),
        _of_one("denoised_mean", "spread_of_denoiser", lambda r: _minus(r.mean)),
        _of_one("regeneration", "regeneration_of_denoiser", lambda r: _minus(r.dimension)),
        _of_one("regeneration_spread", "regeneration_of_denoiser", lambda r: _minus(r.spread)),
        _of_one("regeneration_mean", "regeneration_of_denoiser", lambda r: _minus(r.mean)),
        _of_one("residual", "residual", lambda value: _sure(-value)),
        _of_one("score_norm", "score_norm", _sure),
        # Dimensions with and without the condition, now and before.
        _of_one("flipd_unconditional", "flipd_of_unconditional", lambda f: _minus(_flipd(f))),
        _of_two("flipd_difference", "flipd", _flipd, _difference, "unconditional"),
        _of_two("flipd_log_ratio", "flipd", _flipd, _log_ratio, "unconditional"),
        _of_two(
            "projected_trace_difference", "spectrum", _projected_trace, _difference, "unconditional"
        ),
        _of_two(
            "projected_trace_log_ratio", "spectrum", _projected_trace, _log_ratio, "unconditional"
        ),
        _of_two("eigenvalue_count_difference", "spectrum", _count, _difference, "unconditional"),
        _of_two(
            "projected_trace_log_ratio_baseline",
            "spectrum",
            _projected_trace,
            _log_ratio,
            "baseline",
        ),
        _of_two(
            "denoised_spread_log_ratio_baseline",
            "spread",
            lambda r: r.spread,
            _log_ratio,
            "baseline",
        ),
        _of_two(
            "denoised_mean_log_ratio_baseline", "spread", lambda r: r.mean, _log_ratio, "baseline"
        ),
        _of_two(
            "regeneration_log_ratio_baseline",
            "regeneration",
            lambda r: r.dimension,
            _log_ratio,
            "baseline",
        ),
        _of_two(
            "regeneration_spread_log_ratio_baseline",
            "regeneration",
            lambda r: r.spread,
            _log_ratio,
            "baseline",
        ),
        _of_two(
            "regeneration_mean_log_ratio_baseline",
            "regeneration",
            lambda r: r.mean,
            _log_ratio,
            "baseline",
        ),
        # A conditional pair.
        _of_one("cfg_norm", "cfg_norm", _sure),
        _of_one("cfg_norm_first", "cfg_norm_first", _sure),
        _of_one("cfg_norm_along", "cfg_norm_along", lambda values: _sure(jnp.mean(values))),
        _of_one("cfg_norm_encoded", "cfg_norm_encoded", _sure),
        _of_one("sharpness", "sharpness", _sure),
        _of_one("anisotropy", "anisotropy", _sure),
        _of_one(
            "curvature_difference", "curvature_difference_of_unconditional", lambda found: found
        ),
        _of_one(
            "curvature_difference_baseline", "curvature_difference_of_baseline", lambda found: found
        ),
        _of_one("squared_difference", "squared_difference", lambda image: _sure(jnp.sum(image))),
        # A run of the sampler, the inside of the network, generations, data, the point alone.
        _of_one("step_stability", "step_stability", _sure),
        _of_one("spikiness", "inside", lambda found: _sure(inside.spikiness(found))),
        _of_one(
            "attention_entropy", "inside", lambda found: _sure(inside.attention_entropy(found))
        ),
        _of_one("bright_ending", "bright_ending", lambda image: _sure(jnp.mean(image))),
        _of_one("local_cfg_norm", "local_cfg_norm", _sure),
        _of_one("pairwise_radius", "pairwise_radius", lambda value: _sure(-value)),
        _of_one("danger_zone", "danger_zone", lambda found: found),
        _of_one("nearest_distance", "nearest_distance", lambda value: _sure(-value)),
        _of_one("pixel_variance", "pixel_variance", lambda value: _sure(-value)),
        Detector("png_bytes", on_host=lambda points: -png_bytes(points)),
        Detector("zlib_bytes", on_host=lambda points: -zlib_bytes(points)),
    )
}
