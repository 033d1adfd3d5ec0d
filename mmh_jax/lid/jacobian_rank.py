r"""The spectrum of a denoiser's Jacobian, and ways to count in a spectrum.

The exact denoiser of a distribution on a d-dimensional manifold has, at a point of it and at a
small noise level, a Jacobian close to the orthogonal projection on the tangent space: d eigenvalues
near 1, D - d near 0 (Ventura et al. 2024, 2410.05898; Horvat & Pfister 2024, 2406.04933).  The
spectrum is the expensive part; the rules that read a dimension from it are free:

    rank_by_threshold   #{l_i > threshold}
    rank_by_gap         the i with the largest ratio l_i / l_{i+1}
    participation_ratio (sum l_i)^2 / sum l_i^2
    soft_rank           sum_i 1 / (1 + (|1 - l_i| / c)^p)      (smooth; LHSD 2026)

They also read singular values of a normal bundle, where they count the normal directions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.lid.flipd import residual_bound, squared_residual
from mmh_jax.linalg.spectral import above_noise_edge
from mmh_jax.typing import Array, ArrayLike, Denoiser, Estimate, Key, check_point

__all__ = [
    "Spectrum",
    "TangentSpace",
    "jacobian_spectrum",
    "participation_ratio",
    "rank_by_gap",
    "rank_by_threshold",
    "soft_rank",
    "soft_rank_lanczos",
    "tangent_space",
]


class Spectrum(NamedTuple):
    """What one Jacobian of a denoiser says about dimension.

    Attributes:
        eigenvalues: (D,) of the symmetrised Jacobian, largest first.
        residual: |x - D(x; sigma)|^2 / sigma^2, at most about d / 4 on the model's manifold and
            large off it.
        asymmetry: |J - J^T|_F / (2 |J|_F), 0 for a denoiser that is a gradient, as the exact one
            is, and 1 for a skew Jacobian.  What it measures is network error, or guidance.
    """

    eigenvalues: Any
    residual: Any
    asymmetry: Any = 0.0

    @property
    def flipd(self) -> Array:
        """FLIPD: the sum of all eigenvalues, plus the residual."""
        return jnp.sum(self.eigenvalues, axis=-1) + self.residual

    @property
    def off_manifold(self) -> Array:
        """Whether x is not on the model's manifold, as `Flipd.off_manifold`."""
        return self.residual > residual_bound(jnp.sum(jnp.maximum(self.eigenvalues, 0), axis=-1))

    @property
    def projected_flipd(self) -> Array:
        """FLIPD with the negative eigenvalues, which are network error, left out."""
        return jnp.sum(jnp.maximum(self.eigenvalues, 0), axis=-1) + self.residual

    @property
    def thresholded_flipd(self) -> Array:
        """FLIPD from the eigenvalues that exceed in size the most negative one.

        Projected FLIPD without the rectified noise; see `linalg.positive_exact(above_noise=True)`.
        """
        kept = above_noise_edge(self.eigenvalues, self.eigenvalues[..., -1:])
        return jnp.sum(kept, axis=-1) + self.residual


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
    matrix = linalg.jacobian(matvec, x, chunk_size=chunk_size)
    eigenvalues = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    return Spectrum(eigenvalues, squared_residual(x, denoised, sigma), _asymmetry(matrix))


def _asymmetry(matrix: Array) -> Array:
    norm2 = jnp.sum(matrix**2)
    skew2 = jnp.sum(((matrix - matrix.T) / 2) ** 2)
    return jnp.sqrt(skew2 / jnp.where(norm2 > 0, norm2, 1))


class TangentSpace(NamedTuple):
    """Directions at a point, and how much of each the denoiser lets through.

    Attributes:
        eigenvalues: (D,) of the symmetrised Jacobian, largest first; near 1 along tangents.
        directions: (D, *shape), orthonormal; the first d of them span the tangent space, with d
            from `rank_by_gap(eigenvalues, ceiling=1.0)` or another count.
    """

    eigenvalues: Any
    directions: Any


def tangent_space(
    denoiser: Denoiser, x: ArrayLike, sigma: ArrayLike, *, chunk_size: int = 32
) -> TangentSpace:
    """The eigenvectors of the symmetrised Jacobian dD/dx, as directions in data space.

    Args:
        denoiser, x, sigma, chunk_size: as in `jacobian_spectrum`.

    Cost: that of `jacobian_spectrum`; the eigenvectors add about as much as the eigenvalues.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> line = lambda x, sigma: jnp.array([0.6, 0.8]) * (jnp.array([0.6, 0.8]) @ x)
    >>> tangent = tangent_space(line, jnp.zeros(2), 0.1).directions[0]
    >>> jnp.abs(tangent).round(3)
    Array([0.6, 0.8], dtype=float32)
    """
    x, sigma = check_point("tangent_space", denoiser, x, sigma)
    _, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
    matrix = linalg.jacobian(matvec, x, chunk_size=chunk_size)
    eigenvalues, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return TangentSpace(eigenvalues[::-1], vectors.T[::-1].reshape(-1, *x.shape))


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
    return jnp.sum(_soft_indicator(jnp.asarray(spectrum), width, power), axis=-1)


def _soft_indicator(eigenvalues: Array, width: float, power: float) -> Array:
    return 1 / (1 + (jnp.abs(1 - eigenvalues) / width) ** power)


def soft_rank_lanczos(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_probes: int = 8,
    order: int = 16,
    width: float = 0.2,
    power: float = 4.0,
) -> Estimate:
    """`soft_rank` of the symmetrised Jacobian without forming it, by Lanczos quadrature.

    For images and latents, where `jacobian_spectrum` is too large (LHSD 2026).

    Args:
        denoiser, x, sigma: as in `flipd`.
        key: draws the probes.
        num_probes, order: of `linalg.function_lanczos`.
        width, power: of `soft_rank`.

    Returns:
        `Estimate(value, stderr)`; the error is that of the probes, about sqrt(2 d / num_probes).

    Cost: `num_probes * order` JVPs and as many VJPs; `order * D` numbers for each of 4 probes.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> soft_rank_lanczos(line, jnp.zeros(3), 0.1, key=jax.random.key(0)).value.round(2)
    Array(1., dtype=float32)
    """
    x, sigma = check_point("soft_rank_lanczos", denoiser, x, sigma)
    _, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
    indicator = functools.partial(_soft_indicator, width=width, power=power)
    return linalg.function_lanczos(indicator, num_probes, order)(matvec, x, key=key)


def participation_ratio(spectrum: ArrayLike) -> Array:
    """(sum l)^2 / sum l^2 over the positive values: d for d equal values, less for unequal ones.

    A smooth count that needs neither threshold nor scale; it undercounts unequal directions, and
    reads a spectrum of noise alone as a large dimension.  0 where no value is positive.

    >>> participation_ratio(jnp.array([1.0, 1.0, 0.0, -0.1]))
    Array(2., dtype=float32)
    """
    values = jnp.maximum(jnp.asarray(spectrum), 0)
    squares = jnp.sum(values**2, axis=-1)
    return jnp.sum(values, axis=-1) ** 2 / jnp.where(squares > 0, squares, 1)
