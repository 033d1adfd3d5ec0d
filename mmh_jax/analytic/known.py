"""Exact denoisers of the named sets of `data.registry`, where there is a closed form.

A mixture of flat Gaussian pieces is one of `LinearGaussian`: piece k has mean mode_k and the
covariance A_k A_k^T, and the singular value decomposition A_k = U S V^T gives its basis U and its
scales S.  The uniform spheres, the isotropic Gaussian and the von Mises toy are distributions of
this room by themselves.
"""

from __future__ import annotations

import jax.numpy as jnp

from mmh_jax.analytic.base import Distribution
from mmh_jax.analytic.gaussian import LinearGaussian
from mmh_jax.analytic.mixture import Mixture
from mmh_jax.analytic.sphere import Sphere, von_mises_with_atom
from mmh_jax.data.manifolds import AffineMixture, gaussian
from mmh_jax.data.registry import KnownSet

__all__ = ["denoiser_of"]

_BY_NAME = {
    "sphere 10 in 11": lambda: Sphere(10),
    "M1 sphere": lambda: Sphere(10),
    "M12 Gaussian": lambda: LinearGaussian(jnp.zeros(20), jnp.eye(20), jnp.ones(20)),
    "von Mises toy": von_mises_with_atom,
}


def _flat(mixture: AffineMixture) -> Mixture:
    pieces = []
    for mode, matrix in zip(mixture.modes, mixture.maps, strict=True):
        basis, scales, _ = jnp.linalg.svd(matrix, full_matrices=False)
        pieces.append(LinearGaussian(mode, basis, scales))
    return Mixture(tuple(pieces), jnp.full(len(pieces), 1 / len(pieces)))


def denoiser_of(known: KnownSet) -> Distribution | None:
    """The distribution of a named set, which is its exact denoiser; None if none is known.

    Args:
        known: a set of `data.registry.sets()`.

    >>> from mmh_jax.data import registry
    >>> denoiser_of(registry.sets()["M1 sphere"]).dim, denoiser_of(registry.sets()["M2 affine"])
    (10, None)
    """
    if known.name in _BY_NAME:
        return _BY_NAME[known.name]()
    # A uniform or Laplace piece has one too, but not among the distributions of this room.
    if known.family == "affine" and known.mixture is not None:
        mixture = known.mixture()
        if isinstance(mixture, AffineMixture) and mixture.latent is gaussian:
            return _flat(mixture)
    return None
