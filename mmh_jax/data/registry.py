"""Every named set of known dimension, in one place: how to draw it and which dimensions occur.

    sets()["string in doughnut"].sample(1000, key=jax.random.key(registry.TEST_SEED))

A set is a law on R^D, fixed once and for all: frames, modes and warps are drawn from
`jax.random.key(FRAME_SEED)`, so that samples for training and for a test, drawn with other keys,
are of the same law.  The families:

    affine      mixtures of flat pieces, in units of standard deviation 1      `manifolds`
    curved      shapes of the plane and of space                               `curved`
    warped      flat pieces under diffeomorphisms                              `warped`
    sphere      S^10 in R^11                                                   `benchmark`
    embedded    the benchmark of Yeats et al. 2025, each set in one frame      `embedded`
    toy         the von Mises toy                                              `manifolds`
    benchmark   M1 to M13, Mbeta, Mn and Mp                                    `benchmark`

The first five are the sets of `benchmarks/lid_accuracy.py`.  Where the posterior mean of a set is a
closed form, `analytic.denoiser_of` makes it: that room is above this one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmh_jax.data import curved, embedded, manifolds, warped
from mmh_jax.data.benchmark import MANIFOLDS
from mmh_jax.data.manifolds import AffineMixture, Labelled, _check_count
from mmh_jax.data.warped import WarpedMixture
from mmh_jax.typing import Array, Key, check_key

__all__ = ["FRAME_SEED", "TEST_SEED", "TRAIN_SEED", "KnownSet", "sets"]

FRAME_SEED, TRAIN_SEED, TEST_SEED = 0, 1, 2
"""Of the frames of the sets, and of the samples that the benchmarks train on and judge."""

Mixture = AffineMixture | WarpedMixture

_LAWS = {"uniform": manifolds.uniform, "Gaussian": manifolds.gaussian, "Laplace": manifolds.laplace}
_AFFINE = (
    ((5,), 10),
    ((2, 4, 8), 10),
    ((10,), 100),
    ((30,), 100),
    ((80,), 100),
    ((90,), 100),
    ((10, 25, 50), 100),
    ((10, 30, 90), 100),
    ((200,), 800),
    ((400,), 800),
    ((10, 80, 200), 800),
    ((100,), 1000),
    ((500,), 1000),
    ((900,), 1000),
)
_EMBEDDED = (  # with the number of coordinates that the manifold itself needs
    ("hypersphere", embedded.hypersphere, 16, 64, 17),
    ("hyperball", embedded.hyperball, 16, 64, 16),
    ("twin peaks", embedded.twin_peaks, 128, 256, 129),
    ("Clifford torus", embedded.clifford_torus, 32, 128, 64),
    ("nonlinear", embedded.nonlinear, 32, 128, 128),
)


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """A named law on R^D whose local dimension is known at every point.

    Attributes:
        name: as in the literature.
        ambient_dim: D.
        dims: the dimensions that occur, increasing.
        sample: `sample(num, *, key)`, `num` points with their dimension and piece.
        family: which of the families of the module.
        mixture: makes the mixture that is sampled, with its modes and maps; None if it is not one.

    >>> lollipop = sets()["lollipop"]
    >>> lollipop.ambient_dim, lollipop.dims
    (2, (0, 1, 2))
    >>> lollipop.sample(5, key=jax.random.key(TEST_SEED)).points.shape
    (5, 2)
    """

    name: str
    ambient_dim: int
    dims: tuple[int, ...]
    sample: Callable[..., Labelled]
    family: str
    mixture: Callable[[], Mixture] | None = None


def _fixed(make: Callable[[Key], Any]) -> Callable[[], Any]:
    """What `make` makes of the key of the frames: made at the first call, in each precision once.

    Inside `jit` too the arrays are concrete ones, or they could not be kept.
    """

    @functools.cache
    def made(_: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return make(jax.random.key(FRAME_SEED))

    return lambda: made(jnp.result_type(float))


def _mixture_set(
    name: str, ambient_dim: int, dims: tuple[int, ...], family: str, make: Callable[[Key], Mixture]
) -> KnownSet:
    mixture = _fixed(make)

    def sample(num: int, *, key: Key) -> Labelled:
        return mixture().sample(num, key=key)

    return KnownSet(name, ambient_dim, tuple(sorted(set(dims))), sample, family, mixture)


def _affine(law: str, dims: tuple[int, ...], ambient_dim: int) -> KnownSet:
    def make(key: Key) -> AffineMixture:
        mixture = manifolds.affine_mixture(dims, ambient_dim, key=key, latent=_LAWS[law])
        return mixture.standardized()

    name = f"{law} {'+'.join(map(str, dims))} in {ambient_dim}"
    return _mixture_set(name, ambient_dim, dims, "affine", make)


def _warped(
    kind: str, make: Callable[..., WarpedMixture], dims: tuple[int, ...], ambient_dim: int
) -> KnownSet:
    name = f"{kind} {'+'.join(map(str, dims))} in {ambient_dim}"
    return _mixture_set(
        name, ambient_dim, dims, "warped", lambda key: make(dims, ambient_dim, key=key)
    )


def _curved(
    name: str, draw: Callable[..., Labelled], ambient_dim: int, dims: tuple[int, ...], scale: float
) -> KnownSet:
    """A shape in units of `scale`."""

    def sample(num: int, *, key: Key) -> Labelled:
        return curved.rescale(draw(num, key=key), shift=0.0, scale=scale)

    return KnownSet(name, ambient_dim, dims, sample, "curved")


def _embedded(
    kind: str, draw: Callable[..., Labelled], dim: int, ambient_dim: int, size: int
) -> KnownSet:
    """A manifold of `size` natural coordinates, mixed by one frame for every sample."""

    def make(key: Key) -> Array:
        return jax.random.orthogonal(key, ambient_dim, m=size)

    frame = _fixed(make)

    def sample(num: int, *, key: Key) -> Labelled:
        return draw(num, dim, ambient_dim, key=key, frame=frame())

    return KnownSet(f"{kind} {dim} in {ambient_dim}", ambient_dim, (dim,), sample, "embedded")


def _von_mises_toy(num: int, *, key: Key) -> Labelled:
    """Half of the points on the circle, half at the origin; first those on the circle."""
    _check_count("von Mises toy", "num", num, least=1)
    key = check_key("von Mises toy", key)
    return manifolds.von_mises_toy(num - num // 2, key=key, num_atom=num // 2)


@functools.cache
def sets() -> Mapping[str, KnownSet]:
    """Every set, by name.  Nothing is drawn before a set is sampled.

    >>> from collections import Counter
    >>> Counter(known.family for known in sets().values())["benchmark"]
    24
    >>> sets()["M3 concentrated"].dims, sets()["uniform 2+4+8 in 10"].dims
    ((4,), (2, 4, 8))
    """
    found = [_affine(law, dims, ambient_dim) for dims, ambient_dim in _AFFINE for law in _LAWS]
    found += [
        _curved("string in doughnut", curved.string_in_doughnut, 3, (1, 2), 5.0),
        _curved("lollipop", curved.lollipop, 2, (0, 1, 2), 1.0),
        _curved("swiss roll", curved.swiss_roll, 3, (2,), 5.0),
        _curved("torus and circle", curved.torus_and_circle, 3, (1, 2), 1.0),
        _warped("squiggly", warped.squiggly, (2, 4, 8), 10),
        _warped("spline flow", warped.spline_flow, (2, 4, 8), 10),
        _warped("spline flow", warped.spline_flow, (10, 30, 90), 100),
        KnownSet("sphere 10 in 11", 11, (10,), MANIFOLDS["M1 sphere"].sample, "sphere"),
    ]
    found += [_embedded(*known) for known in _EMBEDDED]
    found.append(KnownSet("von Mises toy", 2, (0, 1), _von_mises_toy, "toy"))
    found += [
        KnownSet(known.name, known.ambient_dim, (known.dim,), known.sample, "benchmark")
        for known in MANIFOLDS.values()
    ]
    return types.MappingProxyType({known.name: known for known in found})
