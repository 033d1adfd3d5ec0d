r"""The spectrum of a denoiser's Jacobian, and ways to count in a spectrum.

The exact denoiser of a distribution on a d-dimensional manifold has, at a point of it and at a
small noise level, a Jacobian close to the orthogonal projection on the tangent space: d eigenvalues
near 1, D - d near 0 (Ventura et al. 2024, 2410.05898; Horvat & Pfister 2024, 2406.04933).  The
spectrum is the expensive part; the rules that read a dimension from it are free:

    rank_by_threshold   #{l_i > threshold}
    rank_by_gap         the i with the largest ratio l_i / l_{i+1}
    soft_rank           sum_i 1 / (1 + (|1 - l_i| / c)^p)      (smooth; LHSD 2026)

They also read singular values of a normal bundle, where they count the normal directions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.lid.flipd import squared_residual
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_point

__all__ = ["Spectrum", "jacobian_spectrum", "rank_by_gap", "rank_by_threshold", "soft_rank"]


class Spectrum(NamedTuple):
    """What one Jacobian of a denoiser says about dimension.

    Attributes:
        eigenvalues: (D,) of the symmetrised Jacobian, largest first.
        residual: |x - D(x; sigma)|^2 / sigma^2, at most about d on the model's manifold and large
            off it.
    """

    eigenvalues: Array
    residual: Array

    @property
    def flipd(self) -> Array:
        """FLIPD: the sum of all eigenvalues, plus the residual."""
        return jnp.sum(self.eigenvalues, axis=-1) + self.residual

    @property
    def projected_flipd(self) -> Array:
        """FLIPD with the negative eigenvalues, which are network error, left out."""
        return jnp.sum(jnp.maximum(self.eigenvalues, 0), axis=-1) + self.residual


def jacobian_spectrum(
    denoiser: Denoiser, x: ArrayLike, sigma: ArrayLike, *, chunk_size: int = 32
) -> Spectrum:
    """Eigenvalues of the symmetrised Jacobian dD/dx at one point and one noise level.

    Args:
        denoiser: the model.
        x: one point, of any shape with D entries.
        sigma: the noise level, in data units.
        chunk_size: tangents pushed through the network at once.

    Cost: one network evaluation, D JVPs, a D x D symmetric eigenproblem; D^2 numbers of memory.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> jacobian_spectrum(line, jnp.array([0.3, 0.0, 0.0]), 0.1).eigenvalues
    Array([1., 0., 0.], dtype=float32)
    """
    x, sigma = check_point("jacobian_spectrum", denoiser, x, sigma)
    denoised, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
    eigenvalues = linalg.jacobian_spectrum(matvec, x, chunk_size=chunk_size)
    return Spectrum(eigenvalues, squared_residual(x, denoised, sigma))


def rank_by_threshold(spectrum: ArrayLike, threshold: float = 0.5) -> Array:
    """How many values exceed the threshold.

    One half separates the eigenvalues l / (l + sigma^2) of directions wider than sigma from those
    of narrower ones.

    >>> rank_by_threshold(jnp.array([0.99, 0.9, 0.1, 0.0]))
    Array(2, dtype=int32)
    """
    return jnp.sum(jnp.asarray(spectrum) > threshold, axis=-1)


def rank_by_gap(spectrum: ArrayLike, *, floor: float = 1e-2, ceiling: float | None = None) -> Array:
    """Where the spectrum, largest first, falls by the largest factor.

    Ratios, not differences: a gap from 1 to .5 between two tangents must not beat one from .5 to
    .01.  Values below `floor` times the largest count as that floor, so that no gap is found in the
    noise of the tail, and a spectrum that never falls has full rank.

    Args:
        spectrum: (..., D), largest first.
        floor: relative to the largest value (or to `ceiling`).
        ceiling: a value known to be reached by significant directions (1 for a denoiser's
            Jacobian).  With it rank 0 is possible: a spectrum far below it has no tangents.

    >>> rank_by_gap(jnp.array([0.99, 0.7, 0.02, 0.0]))
    Array(2, dtype=int32)
    >>> rank_by_gap(jnp.array([0.03, 0.02, 0.02]), ceiling=1.0)
    Array(0, dtype=int32)
    """
    values = jnp.asarray(spectrum)
    top = values[..., :1] if ceiling is None else jnp.full_like(values[..., :1], ceiling)
    least = floor * top
    inner = jnp.maximum(values, least)
    start = inner[..., :1] if ceiling is None else jnp.maximum(top, inner[..., :1])
    levels = jnp.log(jnp.concatenate([start, inner, least], axis=-1))
    return jnp.argmax(levels[..., :-1] - levels[..., 1:], axis=-1)


def soft_rank(spectrum: ArrayLike, *, width: float = 0.2, power: float = 4.0) -> Array:
    """A smooth count of the eigenvalues near 1: sum 1 / (1 + (|1 - l| / width)^power).

    With H = (J - I) / sigma^2 the Hessian of log rho_sigma this is tr f(H) with
    f(h) = 1 / (1 + (|h| sigma^2 / width)^power) of LHSD (2026).  An eigenvalue 0 still counts
    width^power / (1 + width^power), .0016 by default; keep that times D in mind.

    >>> round(float(soft_rank(jnp.array([1.0, 0.8, 0.0]))), 3)
    1.502
    """
    distance = jnp.abs(1 - jnp.asarray(spectrum)) / width
    return jnp.sum(1 / (1 + distance**power), axis=-1)
