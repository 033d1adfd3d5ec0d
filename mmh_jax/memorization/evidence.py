r"""What detectors read, computed once for all that ask for it.

A detector is a cheap function of a few *quantities* at a point: FLIPD, a spectrum of the Jacobian,
an answer with and one without the condition, a path of the sampler.  `QUANTITIES` lists them with
their costs in evaluations of the network, a JVP or VJP counted as one; a set of detectors costs
the sum over the quantities it needs, each of them once.

A *noisy point* is x + sigma z and *pure noise* sigma_max z, with one z ~ N(0, I) for each point.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import lid
from mmh_jax.lid.flipd import flipd_at
from mmh_jax.linalg.operator import products_of
from mmh_jax.memorization import against, along_path, conditional, curvature, inside
from mmh_jax.memorization.regeneration import Regeneration, regeneration
from mmh_jax.memorization.subject import At, Settings
from mmh_jax.sample import solve_path
from mmh_jax.typing import Array, Key

__all__ = ["QUANTITIES", "Quantity", "evaluations_of", "gather", "with_needs"]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Something expensive that detectors share.

    Attributes:
        compute: `compute(at, found, key)`, `found` holding the quantities in `needs`.
        evaluations: `evaluations(ambient_dim, settings)`, without those of `needs`.
        reads: fields of `Subject` and `Settings` that must be there.
        needs: other quantities.
    """

    compute: Callable[[At, Mapping[str, Any], Key], Any]
    evaluations: Callable[[int, Settings], float]
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def with_needs(names: Any) -> tuple[str, ...]:
    """The quantities and all that they need, each once, after what it needs."""
    ordered: list[str] = []
    for name in names:
        for each in (*with_needs(QUANTITIES[name].needs), name):
            if each not in ordered:
                ordered.append(each)
    return tuple(ordered)


def evaluations_of(names: Any, ambient_dim: int, settings: Settings) -> float:
    """Network evaluations for one point, each quantity counted once."""
    return sum(QUANTITIES[name].evaluations(ambient_dim, settings) for name in with_needs(names))


def gather(names: Any, at: At, key: Key) -> dict[str, Any]:
    """The quantities and all that they need, at one point.

    A quantity's key depends on its name alone: what else is asked for changes no number.
    """
    found: dict[str, Any] = {}
    for name in with_needs(names):
        at = at._replace(x=_after(at.x, found))
        # The same probes with and without the condition: what is common to both cancels.
        own = jax.random.fold_in(key, zlib.crc32(name.split("_of_")[0].encode()))
        found[name] = QUANTITIES[name].compute(at, found, own)
    return found


def _after(x: Array, done: Any) -> Array:
    """x, once all of `done` is computed.

    Left to itself XLA on CPU computes independent quantities at once, and decompositions of several
    batches of matrices as parallel tasks, each of which waits, in one of as many threads as there
    are cores, for others of the same threads: with as many spectra as cores it waits forever.
    """
    zero = jnp.zeros((), x.dtype)
    for leaf in jax.tree.leaves(done):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size:
            first = jnp.ravel(leaf)[0].astype(x.dtype)
            # Not simplified away: 0 times a number may be NaN, for all that the compiler knows.
            zero = zero + 0 * jnp.where(jnp.isfinite(first), first, 0)
    return x + zero


def _num_levels(levels: Any) -> int:
    return np.shape(levels)[0]


def _flipd_of(which: str) -> Quantity:
    def compute(at: At, found: Mapping[str, Any], key: Key) -> lid.Flipd:
        settings = at.settings
        return flipd_at(getattr(at, which), at.x, at.sigma, trace=settings.trace, key=key)

    reads = () if which == "denoiser" else (which,)
    return Quantity(compute, lambda dim, settings: 1 + products_of(settings.trace, dim), reads)


def _spectrum_of(which: str) -> Quantity:
    def compute(at: At, found: Mapping[str, Any], key: Key) -> lid.Spectrum:
        return lid.jacobian_spectrum(getattr(at, which), at.x, at.sigma)

    reads = () if which == "denoiser" else (which,)
    return Quantity(compute, lambda dim, settings: 1 + dim, reads)


def _spread_of(which: str) -> Quantity:
    def compute(at: At, found: Mapping[str, Any], key: Key) -> Any:
        num_samples = at.settings.num_samples
        model = getattr(at, which)
        return lid.denoised_return(model, at.x, at.sigma, key=key, num_samples=num_samples)

    reads = () if which == "denoiser" else (which,)
    return Quantity(compute, lambda dim, settings: settings.num_samples, reads)


def _regeneration_of(which: str) -> Quantity:
    def compute(at: At, found: Mapping[str, Any], key: Key) -> Regeneration:
        levels, num_samples = at.settings.regeneration_levels, at.settings.num_regenerations
        return regeneration(getattr(at, which), at.x, levels, key=key, num_samples=num_samples)

    def evaluations(dim: int, settings: Settings) -> float:
        return settings.num_regenerations * (2 * _num_levels(settings.regeneration_levels) - 1)

    reads = () if which == "denoiser" else (which,)
    return Quantity(compute, evaluations, (*reads, "regeneration_levels"))


def _curvature_of(which: str) -> Quantity:
    def compute(at: At, found: Mapping[str, Any], key: Key) -> Any:
        trace = at.settings.curvature_trace
        return curvature.curvature_difference(
            at.denoiser, getattr(at, which), at.x, at.sigma, trace=trace, key=key
        )

    def evaluations(dim: int, settings: Settings) -> float:
        return 2 * (1 + products_of(settings.curvature_trace, dim))

    return Quantity(compute, evaluations, (which,))


def _noise(at: At, found: Mapping[str, Any], key: Key) -> Array:
    return jax.random.normal(key, at.x.shape, at.x.dtype)


def _soft_count(at: At, found: Mapping[str, Any], key: Key) -> Any:
    probes, order = at.settings.soft_probes, at.settings.soft_order
    return lid.soft_rank_lanczos(
        at.denoiser, at.x, at.sigma, key=key, num_probes=probes, order=order
    )


def _bundle(at: At, found: Mapping[str, Any], key: Key) -> Array:
    num_samples = at.settings.bundle_samples
    return lid.normal_bundle_spectrum(at.denoiser, at.x, at.sigma, key=key, num_samples=num_samples)


def _danger(at: At, found: Mapping[str, Any], key: Key) -> Any:
    num_samples = at.settings.danger_samples
    return against.danger_zone(at.x, at.sigma, at.data, key=key, num_samples=num_samples)


def _path(at: At, found: Mapping[str, Any], key: Key) -> Any:
    levels = jnp.asarray(at.settings.levels, at.x.dtype)
    return solve_path(at.denoiser, levels[0] * found["noise"], levels)


def _bright(at: At, found: Mapping[str, Any], key: Key) -> Array:
    shape = (at.x.shape[0], at.x.shape[1])
    return inside.bright_ending(found["inside"], token=at.settings.token, shape=shape)


def _free(dim: int, settings: Settings) -> float:
    return 0


def _noisy(at: At, found: Mapping[str, Any]) -> Array:
    return at.x + at.sigma * found["noise"]


PAIR = ("unconditional",)

QUANTITIES: dict[str, Quantity] = {
    "noise": Quantity(_noise, _free),
    "flipd_of_denoiser": _flipd_of("denoiser"),
    "flipd_of_unconditional": _flipd_of("unconditional"),
    "spectrum_of_denoiser": _spectrum_of("denoiser"),
    "spectrum_of_unconditional": _spectrum_of("unconditional"),
    "spectrum_of_baseline": _spectrum_of("baseline"),
    "soft_count": Quantity(
        _soft_count, lambda dim, s: 1 + 2 * s.soft_probes * min(s.soft_order, dim)
    ),
    "normal_bundle": Quantity(_bundle, lambda dim, s: s.bundle_samples or 4 * dim),
    "denoising_loss": Quantity(
        lambda at, found, key: lid.denoising_loss(
            at.denoiser, at.x, at.sigma, key=key, num_samples=at.settings.num_samples
        ),
        lambda dim, s: 2 * s.num_samples,
    ),
    "spread_of_denoiser": _spread_of("denoiser"),
    "spread_of_baseline": _spread_of("baseline"),
    "regeneration_of_denoiser": _regeneration_of("denoiser"),
    "regeneration_of_baseline": _regeneration_of("baseline"),
    "residual": Quantity(
        lambda at, found, key: conditional.score_norm(at.denoiser, at.x, at.sigma),
        lambda dim, s: 1,
    ),
    "score_norm": Quantity(
        lambda at, found, key: conditional.score_norm(at.denoiser, _noisy(at, found), at.sigma),
        lambda dim, s: 1,
        needs=("noise",),
    ),
    "cfg_norm": Quantity(
        lambda at, found, key: conditional.cfg_norm(*at.pair, _noisy(at, found), at.sigma),
        lambda dim, s: 2,
        PAIR,
        ("noise",),
    ),
    "cfg_norm_first": Quantity(
        lambda at, found, key: conditional.cfg_norm(
            *at.pair, at.sigma_max * found["noise"], at.sigma_max
        ),
        lambda dim, s: 2,
        (*PAIR, "levels"),
        ("noise",),
    ),
    "cfg_norm_along": Quantity(
        lambda at, found, key: along_path.cfg_norm_along(*at.pair, found["path"]),
        lambda dim, s: 2 * _num_levels(s.levels),
        (*PAIR, "levels"),
        ("path",),
    ),
    "cfg_norm_encoded": Quantity(
        lambda at, found, key: along_path.encoded_cfg_norm(
            *at.pair, at.x, at.settings.encode_levels
        ),
        lambda dim, s: 2 * _num_levels(s.encode_levels) + 1,
        (*PAIR, "encode_levels"),
    ),
    "sharpness": Quantity(
        lambda at, found, key: conditional.sharpness(
            *at.pair, at.sigma_max * found["noise"], at.sigma_max
        ),
        lambda dim, s: 4,
        (*PAIR, "levels"),
        ("noise",),
    ),
    "anisotropy": Quantity(
        lambda at, found, key: conditional.anisotropy(
            *at.pair, found["noise"], at.sigma, at.sigma_max, spread=at.settings.spread
        ),
        lambda dim, s: 4,
        (*PAIR, "levels"),
        ("noise",),
    ),
    "curvature_difference_of_unconditional": _curvature_of("unconditional"),
    "curvature_difference_of_baseline": _curvature_of("baseline"),
    "squared_difference": Quantity(
        lambda at, found, key: curvature.squared_difference(*at.pair, at.x, at.sigma),
        lambda dim, s: 2,
        PAIR,
    ),
    "path": Quantity(_path, lambda dim, s: 2 * _num_levels(s.levels) - 1, ("levels",), ("noise",)),
    "step_stability": Quantity(
        lambda at, found, key: along_path.step_stability(found["path"].states, at.reference),
        _free,
        ("reference",),
        ("path",),
    ),
    "inside": Quantity(
        lambda at, found, key: inside.inside_at(at.denoiser, _noisy(at, found), at.sigma),
        lambda dim, s: 1,
        needs=("noise",),
    ),
    "bright_ending": Quantity(_bright, _free, needs=("inside",)),
    "local_cfg_norm": Quantity(
        lambda at, found, key: inside.local_cfg_norm(
            *at.pair, _noisy(at, found), at.sigma, found["bright_ending"]
        ),
        lambda dim, s: 2,
        PAIR,
        ("noise", "bright_ending"),
    ),
    "pairwise_radius": Quantity(
        lambda at, found, key: against.pairwise_radius(at.generations, tiles=at.settings.tiles),
        _free,
        ("generations",),
    ),
    "danger_zone": Quantity(_danger, _free, ("data",)),
    "nearest_distance": Quantity(
        lambda at, found, key: against.nearest_distance(at.x, at.data), _free, ("data",)
    ),
    "pixel_variance": Quantity(lambda at, found, key: against.pixel_variance(at.x), _free),
}
