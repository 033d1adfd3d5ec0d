r"""Sets whose local dimension is known at every point.

An **affine mixture** is K flat pieces of dimensions d_1 ... d_K in R^D, each drawn with probability
1 / K,

    x = mode_k + scale_k * (frame_k z),        z ~ latent^(d_k),

with `frame_k` a (D, d_k) matrix of orthonormal columns, uniform over all such, and `scale_k` a
positive number for each coordinate.  The local intrinsic dimension of x is the d_k of its piece.
The modes are 10 (e_k - 1/2) / sqrt(2), vertices of a simplex whose edges have length 10, so that
pieces of width about 1 do not meet.  The family is closed under a change of units in each
coordinate, so the mixture with mean 0 and standard deviation 1 is again one, exactly; from it come
the training set and the test set in the same units.

With a Gaussian latent of unit variance piece k is N(mode_k, A_k A_k^T) with A_k = diag(scale_k)
frame_k, and everything about the mixture is known in closed form.

The **von Mises toy** (Ross et al. 2025, 2411.00113) is a law on the unit circle, of dimension 1,
and an atom at the origin, of dimension 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = [
    "AffineMixture",
    "Labelled",
    "Latent",
    "affine_mixture",
    "gaussian",
    "laplace",
    "uniform",
    "von_mises_toy",
]


class Labelled(NamedTuple):
    """Points with the dimension that is true at each of them.

    Attributes:
        points: (N, D).
        lid: (N,) integers, the local intrinsic dimension.
        component: (N,) integers, the piece from which each point was drawn.
    """

    points: Any
    lid: Any
    component: Any


@dataclasses.dataclass(frozen=True)
class Latent:
    """A law on the real line with mean 0; the coordinates within a piece are independent draws.

    Attributes:
        draw: `draw(key, shape)`, an array of independent draws.
        std: the standard deviation of one draw.
    """

    draw: Callable[[Key, tuple[int, ...]], Array]
    std: float


def _draw_uniform(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _draw_gaussian(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)


def _draw_laplace(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.laplace(key, shape)


uniform = Latent(_draw_uniform, std=3**-0.5)
"""Uniform on [-1, 1]: a piece has an edge, beyond which there is nothing."""

gaussian = Latent(_draw_gaussian, std=1.0)
"""Standard normal."""

laplace = Latent(_draw_laplace, std=2**0.5)
"""Density exp(-|z|) / 2: heavy tails and a kink."""


@struct.dataclass
class AffineMixture:
    """K affine pieces x = mode_k + scale_k * (frame_k z), equally likely; see `affine_mixture`.

    Attributes:
        frames: K matrices (D, d_k) of orthonormal columns.
        modes: (K, D), the mean of each piece.
        scales: (K, D), positive, the units of each coordinate in each piece.
        latent: the law of each coordinate of z.
    """

    frames: tuple[Array, ...]
    modes: Array
    scales: Array
    latent: Latent = struct.field(pytree_node=False)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimension d_k of each piece."""
        return tuple(frame.shape[1] for frame in self.frames)

    @property
    def maps(self) -> tuple[Array, ...]:
        """A_k = diag(scale_k) frame_k, (D, d_k): x = mode_k + A_k z, of covariance std^2 A_k A_k^T.

        `std` is `latent.std`.
        """
        return tuple(
            scale[:, None] * frame for scale, frame in zip(self.scales, self.frames, strict=True)
        )

    @property
    def mean(self) -> Array:
        """(D,) The exact mean of the mixture."""
        return self.modes.mean(axis=0)

    @property
    def std(self) -> Array:
        """(D,) The exact standard deviation of each coordinate of the mixture."""
        within = jnp.stack([jnp.sum(matrix**2, axis=1) for matrix in self.maps]).mean(axis=0)
        return jnp.sqrt(self.latent.std**2 * within + self.modes.var(axis=0))

    def sample(self, num: int, *, key: Key) -> Labelled:
        """`num` independent points with their dimension and piece.

        Cost: K products of (num, d_k) with (d_k, D); it can be jitted with `num` static.

        Raises:
            ValueError: if `num` is not a positive integer.
        """
        _check_count("AffineMixture.sample", "num", num, least=1)
        component_key, latent_key = jax.random.split(check_key("AffineMixture.sample", key))
        component = jax.random.randint(component_key, (num,), 0, len(self.frames))
        z = self.latent.draw(latent_key, (num, max(self.dims)))
        # Every piece is evaluated at every point: gathering a frame for each point would take
        # num * D * d numbers.
        points = jnp.zeros((num, self.modes.shape[1]), self.modes.dtype)
        for k, (matrix, mode) in enumerate(zip(self.maps, self.modes, strict=True)):
            piece = mode + z[:, : matrix.shape[1]].astype(matrix.dtype) @ matrix.T
            points = jnp.where((component == k)[:, None], piece, points)
        return Labelled(points, jnp.asarray(self.dims)[component], component)

    def rescaled(self, *, shift: ArrayLike, scale: ArrayLike) -> AffineMixture:
        """The law of (x - shift) / scale; `shift` and `scale` are scalars or of shape (D,).

        Dimensions do not change.  `rescaled(shift=points.mean(0), scale=points.std(0))` is the
        mixture in the units in which that training set is standardised.
        """
        return dataclasses.replace(
            self, modes=(self.modes - shift) / scale, scales=self.scales / scale
        )

    def standardized(self) -> AffineMixture:
        """The mixture in units in which every coordinate has mean 0 and standard deviation 1.

        The moments are those of the law, not of a sample.  A constant coordinate is only shifted.
        """
        std = self.std
        return self.rescaled(shift=self.mean, scale=jnp.where(std > 0, std, 1))


def _check_count(caller: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{caller}({name}={value!r})` must be an integer of at least {least}.")


def _check_pieces(caller: str, dims: Sequence[int], ambient_dim: int) -> tuple[int, ...]:
    dims = tuple(dims)
    _check_count(caller, "ambient_dim", ambient_dim, least=1)
    for dim in dims:
        _check_count(caller, "dims", dim, least=0)
    if not dims or max(dims) > ambient_dim or len(dims) > ambient_dim:
        raise ValueError(
            f"`{caller}(dims={dims}, ambient_dim={ambient_dim})` needs at least one piece, "
            "none of a dimension above the ambient one, and no more pieces than ambient dimensions."
        )
    return dims


def affine_mixture(
    dims: Sequence[int],
    ambient_dim: int,
    *,
    key: Key,
    latent: Latent = uniform,
    separation: float = 10.0,
) -> AffineMixture:
    """The affine mixtures of the public benchmarks, such as "uniform 2 + 4 + 8 in R^10".

    Within a piece, a coordinate whose standard deviation exceeds 1 is divided by it; only the
    Laplace law ever reaches that.  The public code (Kamkari et al. 2024, 2406.03537) estimates
    these deviations from 128 draws and standardises a training set by its own moments; here both
    are exact, which differs from it by sampling error only.

    Args:
        dims: the dimension of each piece, at most `ambient_dim`; 0 makes an atom.
        ambient_dim: D, at least the number of pieces.
        key: draws the frames.
        latent: the law of the coordinates within a piece: `uniform`, `gaussian`, `laplace`, or any
            `Latent`.
        separation: the distance between the modes.

    Raises:
        ValueError: if there are no `dims`, if one is negative or exceeds `ambient_dim`, or if there
            are more pieces than `ambient_dim`.

    >>> mixture = affine_mixture((2, 4, 8), 10, key=jax.random.key(0)).standardized()
    >>> points, lid, component = mixture.sample(1000, key=jax.random.key(1))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 10), [2, 4, 8])
    """
    dims = _check_pieces("affine_mixture", dims, ambient_dim)
    keys = jax.random.split(check_key("affine_mixture", key), len(dims))
    frames = tuple(
        jax.random.orthogonal(frame_key, ambient_dim, m=dim)
        for frame_key, dim in zip(keys, dims, strict=True)
    )
    deviations = jnp.stack([latent.std * jnp.linalg.norm(frame, axis=1) for frame in frames])
    simplex = (jnp.eye(len(dims), ambient_dim) - 0.5) / 2**0.5
    return AffineMixture(
        frames=frames,
        modes=separation * simplex,
        scales=1 / jnp.maximum(deviations, 1),
        latent=latent,
    )


def _von_mises(key: Key, num: int, kappa: ArrayLike) -> Array:
    """(num,) angles of density proportional to exp(kappa cos angle), by rejection.

    The proposal is the wrapped Cauchy law, tan(angle / 2) = sqrt(b) tan(phi / 2) with phi uniform
    (Best & Fisher 1979).  In h = sin(angle / 2)^2 nothing cancels, neither for kappa = 0 nor for
    a very large one.  At any kappa at least 65.7% of the proposals are accepted.
    """
    b = 1 / (2 * kappa + jnp.sqrt(4 * jnp.square(kappa) + 1))

    def propose(state: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        key, angles, accepted = state
        key, phi_key, accept_key = jax.random.split(key, 3)
        half_phi = jax.random.uniform(phi_key, (num,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
        half = jnp.arctan(jnp.sqrt(b) * jnp.tan(half_phi))
        h = jnp.sin(half) ** 2
        log_ratio = 2 * kappa * (b / (1 + b) - h) + jnp.log((h + b * (1 - h)) * (1 + b) / (2 * b))
        accept = jnp.log(jax.random.uniform(accept_key, (num,))) <= log_ratio
        return key, jnp.where(accepted, angles, 2 * half), accepted | accept

    start = (key, jnp.zeros(num), jnp.zeros(num, bool))
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), propose, start)[1]


def von_mises_toy(
    num: int = 100,
    *,
    key: Key,
    loc: float = 0.0,
    kappa: float = 2.0,
    num_atom: int = 100,
) -> Labelled:
    """Draws of a von Mises law on the unit circle, then copies of the origin.

    The set of Ross et al. 2025 (2411.00113): the circle (component 0) has dimension 1, the origin
    (component 1) dimension 0.  A model that reproduces one isolated point of the circle has
    memorized by overfitting; one that reproduces the origin has learned what the data say.

    Args:
        num: points on the circle.
        key: draws them.
        loc: the angle at which the density is largest, in radians.
        kappa: the concentration, 0 for a uniform circle; the density of an angle is proportional to
            exp(kappa cos(angle - loc)).
        num_atom: copies of the origin.

    Raises:
        ValueError: if `num` or `num_atom` is not an integer of at least 0, or if `kappa` is
            negative.

    >>> points, lid, component = von_mises_toy(3, key=jax.random.key(0), num_atom=2)
    >>> points.shape, lid.tolist()
    ((5, 2), [1, 1, 1, 0, 0])
    """
    _check_count("von_mises_toy", "num", num, least=0)
    _check_count("von_mises_toy", "num_atom", num_atom, least=0)
    if not 0 <= kappa < float("inf"):
        raise ValueError(
            f"`von_mises_toy(kappa={kappa})` must be finite and at least 0; "
            "to concentrate at the opposite side, add pi to `loc`."
        )
    angles = loc + _von_mises(check_key("von_mises_toy", key), num, kappa)
    circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    component = jnp.repeat(jnp.arange(2), jnp.array([num, num_atom]))
    return Labelled(jnp.concatenate([circle, jnp.zeros((num_atom, 2))]), 1 - component, component)
