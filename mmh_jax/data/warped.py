r"""Mixtures of warped pieces: images of flat ones under diffeomorphisms of R^D.

A **warped mixture** is K pieces of dimensions d_1 ... d_K in R^D, each drawn with probability
1 / K,

    x = mode_k + (f_k(frame_k z) - shift_k) / scale_k,       z ~ latent^(d_k),

with `frame_k` a (D, d_k) matrix of orthonormal columns, uniform over all such, and f_k a
diffeomorphism of R^D.  Its differential is invertible everywhere, so the dimension of a piece is
d_k exactly.  The modes are those of the affine mixtures (`manifolds`); `shift_k` and `scale_k` are
the mean and the standard deviation of f_k(frame_k z), the latter only where it exceeds 1.  They
have no closed form and are estimated once, from draws of the same law.

The two kinds of f_k, sine waves (`squiggly`) and splines (`spline_flow`), are in
`diffeomorphisms`.  Public code for both: Kamkari et al. 2024 (2406.03537).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmh_jax.data.diffeomorphisms import sine_map, spline_map
from mmh_jax.data.manifolds import (
    AffineMixture,
    Labelled,
    Latent,
    _check_count,
    _check_pieces,
    affine_mixture,
    uniform,
)
from mmh_jax.typing import Array, Key, check_key

__all__ = ["WarpedMixture", "spline_flow", "squiggly"]


@struct.dataclass
class WarpedMixture:
    """K equally likely pieces x = mode_k + (f_k(frame_k z) - shift_k) / scale_k; see the module.

    Attributes:
        frames: K matrices (D, d_k) of orthonormal columns.
        warps: K diffeomorphisms, pytrees that take (..., D) to (..., D).
        modes: (K, D).
        shifts: (K, D).
        scales: (K, D), positive.
        latent: the law of each coordinate of z.
    """

    frames: tuple[Array, ...]
    warps: tuple[Any, ...]
    modes: Array
    shifts: Array
    scales: Array
    latent: Latent = struct.field(pytree_node=False)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimension d_k of each piece."""
        return tuple(frame.shape[1] for frame in self.frames)

    def piece(self, k: int, z: Array) -> Array:
        """The chart of piece k: latent coordinates z (..., d_k) -> x (..., D)."""
        warped = self.warps[k](z.astype(self.modes.dtype) @ self.frames[k].T)
        return self.modes[k] + (warped - self.shifts[k]) / self.scales[k]

    def sample(self, num: int, *, key: Key) -> Labelled:
        """`num` independent points with their dimension and piece.

        Cost: every piece is evaluated at every point, K * L products of (num, D) with (D, D); it
        can be jitted with `num` static.

        Raises:
            ValueError: if `num` is not a positive integer.
        """
        _check_count("WarpedMixture.sample", "num", num, least=1)
        component_key, latent_key = jax.random.split(check_key("WarpedMixture.sample", key))
        component = jax.random.randint(component_key, (num,), 0, len(self.frames))
        z = self.latent.draw(latent_key, (num, max(self.dims)))
        points = jnp.zeros((num, self.modes.shape[1]), self.modes.dtype)
        for k, dim in enumerate(self.dims):
            points = jnp.where((component == k)[:, None], self.piece(k, z[:, :dim]), points)
        return Labelled(points, jnp.asarray(self.dims)[component], component)


def _warped(
    flat: AffineMixture, make_warp: Callable[[Key], Any], num_calibration: int, key: Key
) -> WarpedMixture:
    """The pieces of `flat`, each under a warp of its own, with the moments of a sample of each."""
    warps, shifts, scales = [], [], []
    for piece_key, frame in zip(jax.random.split(key, len(flat.frames)), flat.frames, strict=True):
        warp_key, latent_key = jax.random.split(piece_key)
        warp = make_warp(warp_key)
        points = warp(flat.latent.draw(latent_key, (num_calibration, frame.shape[1])) @ frame.T)
        warps.append(warp)
        shifts.append(points.mean(axis=0))
        scales.append(jnp.maximum(points.std(axis=0), 1))
    return WarpedMixture(
        frames=flat.frames,
        warps=tuple(warps),
        modes=flat.modes,
        shifts=jnp.stack(shifts),
        scales=jnp.stack(scales),
        latent=flat.latent,
    )


def squiggly(
    dims: Sequence[int],
    ambient_dim: int,
    *,
    key: Key,
    frequency: float = 10.0,
    kappa: float = 1e-4,
    num_layers: int = 5,
    latent: Latent = uniform,
    separation: float = 10.0,
    num_calibration: int = 1024,
) -> WarpedMixture:
    """Flat pieces wrinkled by sine waves of high frequency, as "squiggly" in the public code.

    The public sets have frequencies 0.5, 1, 5 and 10, `kappa` 1e-4 and five layers.  Their random
    signs are here part of the rotations; their calibration takes 128 draws.  A small `kappa`
    squeezes some tangents hard: for 8 dimensions of 10 at frequency 10 the least singular value of
    the chart is about 0.04, and 1e-4 at some points (that of the warp is at least
    kappa^num_layers); a direction squeezed so far looks, at larger scales, like no dimension.

    Args:
        dims: the dimension of each piece, at most `ambient_dim`; 0 makes an atom.
        ambient_dim: D, at least the number of pieces.
        key: draws the frames, the warps and the draws for `shifts` and `scales`.
        frequency: omega, in radians per data unit; a piece has width about 1.
        kappa: the least slope of a wave.
        num_layers: waves in a row, each followed by a rotation.
        latent: the law of the coordinates within a piece.
        separation: the distance between the modes.
        num_calibration: draws from which the mean and the deviation of a piece are estimated.

    Raises:
        ValueError: if the dimensions are impossible, a number is not a positive integer,
            `frequency` is not positive or `kappa` not in (0, 1].

    >>> mixture = squiggly((2, 4, 8), 10, key=jax.random.key(0), frequency=5.0)
    >>> points, lid, component = mixture.sample(1000, key=jax.random.key(1))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 10), [2, 4, 8])
    """
    dims = _check_pieces("squiggly", dims, ambient_dim)
    _check_count("squiggly", "num_layers", num_layers, least=1)
    _check_count("squiggly", "num_calibration", num_calibration, least=1)
    if not (0 < frequency < float("inf") and 0 < kappa <= 1):
        raise ValueError(
            f"`squiggly(frequency={frequency}, kappa={kappa})` needs a finite positive frequency "
            "and kappa in (0, 1], or the waves fold over."
        )
    flat_key, warp_key = jax.random.split(check_key("squiggly", key))
    flat = affine_mixture(dims, ambient_dim, key=flat_key, latent=latent, separation=separation)

    def make_warp(key: Key) -> Any:
        return sine_map(
            ambient_dim, key=key, num_layers=num_layers, frequency=frequency, kappa=kappa
        )

    return _warped(flat, make_warp, num_calibration, warp_key)


def spline_flow(
    dims: Sequence[int],
    ambient_dim: int,
    *,
    key: Key,
    num_layers: int = 5,
    num_bins: int = 8,
    bound: float = 3.0,
    roughness: float = 0.25,
    latent: Latent = uniform,
    separation: float = 10.0,
    num_calibration: int = 1024,
) -> WarpedMixture:
    """Flat pieces under random spline flows, after the "RQNSF" sets of Kamkari et al. 2024.

    There the splines are those of an untrained coupling network; here their knots are drawn, and
    rotations between the layers mix the coordinates.  So the family is the same in kind, a chain of
    five rational-quadratic layers, but not in law.  At the default roughness the chart of 8
    dimensions in R^10 has singular values from about 0.2 to 2.

    Args:
        dims: the dimension of each piece, at most `ambient_dim`; 0 makes an atom.
        ambient_dim: D, at least the number of pieces.
        key: draws the frames, the warps and the draws for `shifts` and `scales`.
        num_layers: splines in a row, each followed by a rotation.
        num_bins: bins of each spline.
        bound: each spline is the identity outside [-bound, bound].
        roughness: the standard deviation of the logarithms of the gaps between knots and of the
            slopes at them; at 0 the flow is a rotation.
        latent: the law of the coordinates within a piece.
        separation: the distance between the modes.
        num_calibration: draws from which the mean and the deviation of a piece are estimated.

    Raises:
        ValueError: if the dimensions are impossible, a number is not a positive integer, `bound` is
            not positive or `roughness` negative.

    >>> mixture = spline_flow((2, 4, 8), 10, key=jax.random.key(0))
    >>> points, lid, component = mixture.sample(1000, key=jax.random.key(1))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 10), [2, 4, 8])
    """
    dims = _check_pieces("spline_flow", dims, ambient_dim)
    _check_count("spline_flow", "num_layers", num_layers, least=1)
    _check_count("spline_flow", "num_bins", num_bins, least=1)
    _check_count("spline_flow", "num_calibration", num_calibration, least=1)
    if not (0 < bound < float("inf") and 0 <= roughness < float("inf")):
        raise ValueError(
            f"`spline_flow(bound={bound}, roughness={roughness})` needs a finite positive bound "
            "and a finite roughness of at least 0."
        )
    flat_key, warp_key = jax.random.split(check_key("spline_flow", key))
    flat = affine_mixture(dims, ambient_dim, key=flat_key, latent=latent, separation=separation)

    def make_warp(key: Key) -> Any:
        return spline_map(
            ambient_dim,
            key=key,
            num_layers=num_layers,
            num_bins=num_bins,
            bound=bound,
            roughness=roughness,
        )

    return _warped(flat, make_warp, num_calibration, warp_key)
