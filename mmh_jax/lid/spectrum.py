r"""The spectrum of a denoiser's Jacobian: what one Jacobian says about dimension, and how surely.

The exact denoiser of a distribution on a d-dimensional manifold has, at a point of it and at a
small noise level, a Jacobian close to the orthogonal projection on the tangent space: d eigenvalues
near 1, D - d near 0 (Ventura et al. 2024, 2410.05898; Horvat & Pfister 2024, 2406.04933).  The
spectrum is the expensive part; what is read from it, here and in `jacobian_rank`, is free.

A trained network's Jacobian is that projection plus an error, and D is off the manifold by another
one.  Both are seen beside the tangent space, where an exact denoiser has next to nothing: in
eigenvalues below one half, in the normal part of x - D, and in the skew part of the Jacobian.
Hence *tangential FLIPD*, a sum over the tangent space only,

    F_t = sum_{l_i > 1/2} l_i + |S(J)(x - D)|^2 / sigma^2,     S(l) = 3 l^2 - 2 l^3 on [0, 1],

S being 0 below and 1 above, a projection on the tangents without a jump; and an estimate of the
error, `Spectrum.network_error`: what F_t leaves out of FLIPD, and what the skew part stands for.
On a manifold, where all l_i -> 0 or 1, F_t has the limit and the order of the bias of FLIPD.  It
loses directions narrower than sigma, and off a flat manifold it does not grow with the distance.

What a network has learned wrongly lies along its tangents, too, and that residual is the larger
part of the error of F_t.  Its mean over the points of a Gaussian is sum l (1 - l): put in, it gives
*expected FLIPD*, F_e = sum_{l_i > 1/2} l_i (2 - l_i), from the eigenvalues alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.denoise import is_guided, outside_training
from mmh_jax.lid.flipd import Curve, linearized, squared_residual
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.linalg.spectral import above_noise_edge
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_point

__all__ = ["Spectrum", "TangentSpace", "jacobian_spectrum", "spectral_curve", "tangent_space"]


class Spectrum(NamedTuple):
    """What one Jacobian of a denoiser says about dimension.

    Attributes:
        eigenvalues: (D,) of the symmetrised Jacobian, largest first.
        residual: |x - D(x; sigma)|^2 / sigma^2, at most about d / 4 on the model's manifold and
            large off it.
        asymmetry: |J - J^T|_F / (2 |J|_F), 0 for a denoiser that is a gradient, as the exact one
            is, and 1 for a skew Jacobian.  What it measures is network error, or guidance.
        tangential_residual: the part of `residual` along tangents.
    """

    eigenvalues: Any
    residual: Any
    asymmetry: Any
    tangential_residual: Any

    @property
    def flipd(self) -> Array:
        """FLIPD: the sum of all eigenvalues, plus the residual."""
        return jnp.sum(self.eigenvalues, axis=-1) + self.residual

    @property
    def off_manifold(self) -> Array:
        """Whether x is not on the model's manifold: no reading is a dimension then.

        At a point of a Gaussian with these eigenvalues g the residual is sum g (1 - g) z^2, z
        standard normal; x is off if it exceeds the mean of that by three standard deviations and
        one half more, the dimension by which FLIPD is then off.
        """
        # Without the noise of a network, of which each eigenvalue would raise the bound.
        kept = above_noise_edge(self.eigenvalues, self.eigenvalues[..., -1:])
        between = jnp.maximum(kept * (1 - kept), 0)
        mean, variance = between.sum(axis=-1), 2 * jnp.sum(between**2, axis=-1)
        return self.residual > mean + 3 * jnp.sqrt(variance) + 0.5

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

    @property
    def tangential_flipd(self) -> Array:
        """FLIPD of the tangent space alone: eigenvalues above one half, tangential residual."""
        kept = jnp.where(self.eigenvalues > 0.5, self.eigenvalues, 0)
        return jnp.sum(kept, axis=-1) + self.tangential_residual

    @property
    def expected_flipd(self) -> Array:
        """What FLIPD is on average over points with this tangent space: sum g (2 - g), g > 1/2.

        At a point of a Gaussian of the scales that give eigenvalues g the residual is a sum of
        g (1 - g) z^2, z standard normal; this puts in its mean, and reads eigenvalues alone.  The
        bias is then - sum (1 - g)^2, of the order of sigma^4 in place of sigma^2, and neither the
        place of the point nor an error of the network along its tangents is in the value.  NaN
        where the residual is not finite.
        """
        kept = jnp.where(self.eigenvalues > 0.5, self.eigenvalues, 0)
        value = jnp.sum(kept * (2 - kept), axis=-1)
        # NaN is not above one half, and the Jacobian of a linear denoiser is finite everywhere.
        return jnp.where(jnp.isfinite(self.residual), value, jnp.nan)

    @property
    def network_error(self) -> Array:
        """Standard error of `thresholded_flipd` and `tangential_flipd` from the network's errors.

        Three parts, in quadrature.  The difference of the two readings: it is 0 for an exact
        denoiser at a point of a flat manifold and a small sigma.  And with s the standard deviation
        of an entry of the Jacobian's error, were its entries independent: sqrt(d) s, the spread of
        the sum of d eigenvalues, and d (D - d) s^2 / 2, by which the others push them up.  The skew
        part, all error, then has the squared norm D (D - 1) s^2 / 2, and so tells s.  An estimate
        from one Jacobian, not a bound; what a network has learned wrongly but consistently is not
        in it.  A network that is a gradient by construction has no skew part, and only the first.
        """
        size = self.eigenvalues.shape[-1]
        share = jnp.minimum(jnp.asarray(self.asymmetry) ** 2, 1 - 1e-6)
        skew2 = share / (1 - share) * jnp.sum(self.eigenvalues**2, axis=-1)
        entry2 = 2 * skew2 / max(size * (size - 1), 1)
        rank = jnp.sum(self.eigenvalues > 0.5, axis=-1)
        difference = self.thresholded_flipd - self.tangential_flipd
        push = rank * (size - rank) * entry2 / 2
        return safe_sqrt(difference**2 + rank * entry2 + push**2)


@jax.custom_jvp
def _projected(symmetric: Array, vector: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and S(symmetric) vector, S(l) = 3 l^2 - 2 l^3 on [0, 1]."""
    eigenvalues, vectors = jnp.linalg.eigh(symmetric)
    return eigenvalues[::-1], vectors @ (_smooth_step(eigenvalues) * (vectors.T @ vector))


def _smooth_step(eigenvalues: Array) -> Array:
    inside = jnp.clip(eigenvalues, 0, 1)
    return inside**2 * (3 - 2 * inside)


@_projected.defjvp
def _projected_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # The derivative of `eigh` is infinite at equal eigenvalues, which a projection has; that of a
    # function of the matrix is not (Daleckii & Krein): divided differences of S, without division.
    (symmetric, vector), (d_symmetric, d_vector) = primals, tangents
    eigenvalues, vectors = jnp.linalg.eigh(symmetric)
    inside = jnp.clip(eigenvalues, 0, 1)
    a, b = inside[:, None], inside[None, :]
    gap = eigenvalues[:, None] - eigenvalues[None, :]
    share = jnp.where(gap == 0, 1, (a - b) / jnp.where(gap == 0, 1, gap))
    divided = share * (3 * (a + b) - 2 * (a**2 + a * b + b**2))
    turned = vectors.T @ d_symmetric @ vectors
    step, coordinates = _smooth_step(eigenvalues), vectors.T @ vector
    along = vectors @ (step * coordinates)
    d_along = vectors @ ((divided * turned) @ coordinates + step * (vectors.T @ d_vector))
    return (eigenvalues[::-1], along), (jnp.diagonal(turned)[::-1], d_along)


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
    denoised, matvec = linearized("jacobian_spectrum", denoiser, x, sigma)
    matrix = linalg.jacobian(matvec, x, chunk_size=chunk_size)
    vector = ((x - denoised) / sigma).reshape(-1)
    eigenvalues, along = _projected((matrix + matrix.T) / 2, vector)
    residual = squared_residual(x, denoised, sigma)
    return Spectrum(eigenvalues, residual, _asymmetry(matrix), jnp.sum(along**2))


def spectral_curve(
    denoiser: Denoiser, x: ArrayLike, sigmas: ArrayLike, *, chunk_size: int = 32
) -> Curve:
    """Expected FLIPD at a grid of noise levels, with the network's error: for `plateaus`.

    For trained networks with up to a few thousand coordinates.  For other readings, or the
    diagnostics, take `jacobian_spectrum` itself at each level.

    Args:
        denoiser, x, chunk_size: as in `jacobian_spectrum`.
        sigmas: (S,) noise levels, in data units.

    Returns:
        `Curve`, its fields (S,) each: value `Spectrum.expected_flipd`, stderr
        `Spectrum.network_error`, which is large for it.

    Cost: S times that of `jacobian_spectrum`.

    Raises:
        TypeError, ValueError: as `flipd_curve`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.01]) / (1 + sigma**2)
    >>> curve = spectral_curve(line, jnp.zeros(3), jnp.array([0.1, 0.2]))
    >>> [(round(float(d), 2), round(float(se), 2)) for d, se in zip(curve.value, curve.stderr)]
    [(1.0, 0.01), (1.0, 0.01)]
    """
    x, sigmas = check_point("spectral_curve", denoiser, x, sigmas, levels=1)

    def at(sigma: Array) -> Curve:
        spectrum = jacobian_spectrum(denoiser, x, sigma, chunk_size=chunk_size)
        return Curve(
            sigma,
            spectrum.expected_flipd,
            spectrum.network_error,
            spectrum.residual,
            jnp.asarray(is_guided(denoiser), int),
            outside_training(denoiser, sigma),
        )

    return jax.lax.map(at, sigmas)


def _asymmetry(matrix: Array) -> Array:
    norm2 = jnp.sum(matrix**2)
    skew2 = jnp.sum(((matrix - matrix.T) / 2) ** 2)
    return safe_sqrt(skew2 / jnp.where(norm2 > 0, norm2, 1))


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

    Cost: that of `jacobian_spectrum`.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> line = lambda x, sigma: jnp.array([0.6, 0.8]) * (jnp.array([0.6, 0.8]) @ x)
    >>> tangent = tangent_space(line, jnp.zeros(2), 0.1).directions[0]
    >>> jnp.abs(tangent).round(3)
    Array([0.6, 0.8], dtype=float32)
    """
    x, sigma = check_point("tangent_space", denoiser, x, sigma)
    _, matvec = linearized("tangent_space", denoiser, x, sigma)
    matrix = linalg.jacobian(matvec, x, chunk_size=chunk_size)
    eigenvalues, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return TangentSpace(eigenvalues[::-1], vectors.T[::-1].reshape(-1, *x.shape))
