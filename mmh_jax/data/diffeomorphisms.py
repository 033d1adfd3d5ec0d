r"""Diffeomorphisms of R^D: chains of increasing functions of one coordinate and rotations.

Each is a chain of layers x -> Q g(x), with Q an orthogonal matrix, uniform over all such when drawn
at random, and g an increasing function in each coordinate:

    sine wave    g(x) = x + (1 - kappa) sin(omega x) / omega     or x, each with probability 1 / 2
    spline       g rational-quadratic between knots and the identity beyond the outermost

Since g has positive slopes, the differential of the chain is invertible everywhere, so the image of
a set has the dimension of the set.

A sine wave has slopes from kappa to 2 - kappa: wrinkles of length 2 pi / omega and height about
1 / omega.  A dimension is what one sees well below that scale.

A monotone rational-quadratic spline (Durkan et al. 2019, 1906.04032) passes through knots
(x_j, y_j) with slopes s_j > 0.  Between two of them, with xi = (x - x_0) / (x_1 - x_0),
h = y_1 - y_0 and m = h / (x_1 - x_0),

    g = y_0 + h (m xi^2 + s_0 xi (1 - xi)) / (m + (s_0 + s_1 - 2 m) xi (1 - xi)),

which is increasing, has a continuous derivative and is inverted by solving a quadratic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["SineMap", "SplineMap", "sine_map", "spline_map"]


@struct.dataclass
class SineMap:
    """The chain of layers x -> Q_l g_l(x), g_l a sine wave in some coordinates and x in the others.

    Attributes:
        rotations: (L, D, D), orthogonal.
        waved: (L, D), whether a layer acts on a coordinate.
        frequency: omega, positive, in radians per data unit.
        kappa: the least slope, in (0, 1].
    """

    rotations: Array
    waved: Array
    frequency: ArrayLike
    kappa: ArrayLike

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D)."""

        def layer(x: Array, rotation_and_waved: tuple[Array, Array]) -> tuple[Array, None]:
            rotation, waved = rotation_and_waved
            wave = (1 - self.kappa) * jnp.sin(self.frequency * x) / self.frequency
            return jnp.where(waved, x + wave, x) @ rotation.T, None

        return jax.lax.scan(layer, x, (self.rotations, self.waved))[0]


def _bin(edges: Array, value: Array, *tables: Array) -> list[tuple[Array, Array]]:
    """The two entries of each (D, B + 1) table at either end of the bin of `edges` with `value`."""
    inner = edges[:, 1:-1]
    index = jnp.sum(value[..., None] >= inner, axis=-1)
    row = jnp.arange(edges.shape[0])
    return [(table[row, index], table[row, index + 1]) for table in tables]


def _spline(x: Array, knots: Array, values: Array, slopes: Array) -> Array:
    """g(x), coordinate by coordinate, of x (..., D); tables (D, B + 1)."""
    (x0, x1), (y0, y1), (s0, s1) = _bin(knots, x, knots, values, slopes)
    inside = (x > knots[:, 0]) & (x < knots[:, -1])
    m = (y1 - y0) / (x1 - x0)
    xi = jnp.where(inside, (x - x0) / (x1 - x0), 0.5)
    cross = xi * (1 - xi)
    inner = y0 + (y1 - y0) * (m * xi**2 + s0 * cross) / (m + (s0 + s1 - 2 * m) * cross)
    return jnp.where(inside, inner, x)


def _spline_inverse(y: Array, knots: Array, values: Array, slopes: Array) -> Array:
    """x with g(x) = y: the root in [0, 1] of a xi^2 + b xi - c = 0, in its stable form."""
    (x0, x1), (y0, y1), (s0, s1) = _bin(values, y, knots, values, slopes)
    inside = (y > values[:, 0]) & (y < values[:, -1])
    m = (y1 - y0) / (x1 - x0)
    up = jnp.where(inside, y - y0, 0)
    bend = up * (s0 + s1 - 2 * m)
    a, b, c = (y1 - y0) * (m - s0) + bend, (y1 - y0) * s0 - bend, m * up
    xi = 2 * c / (b + jnp.sqrt(b**2 + 4 * a * c))
    return jnp.where(inside, x0 + xi * (x1 - x0), y)


@struct.dataclass
class SplineMap:
    """The chain of layers x -> Q_l g_l(x), g_l a monotone spline with B bins in each coordinate.

    Attributes:
        rotations: (L, D, D), orthogonal.
        knots: (L, D, B + 1), increasing.
        values: (L, D, B + 1), increasing, with the end points of `knots`.
        slopes: (L, D, B + 1), positive, 1 at both ends.
    """

    rotations: Array
    knots: Array
    values: Array
    slopes: Array

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D)."""

        def layer(x: Array, weights: tuple[Array, ...]) -> tuple[Array, None]:
            rotation, *tables = weights
            return _spline(x, *tables) @ rotation.T, None

        weights = (self.rotations, self.knots, self.values, self.slopes)
        return jax.lax.scan(layer, x, weights)[0]

    def inverse(self, y: Array) -> Array:
        """(..., D) -> (..., D), the point that the map takes to y."""

        def layer(y: Array, weights: tuple[Array, ...]) -> tuple[Array, None]:
            rotation, *tables = weights
            return _spline_inverse(y @ rotation, *tables), None

        weights = (self.rotations, self.knots, self.values, self.slopes)
        return jax.lax.scan(layer, y, weights, reverse=True)[0]


def _random_knots(
    key: Key, shape: tuple[int, ...], bound: ArrayLike, roughness: ArrayLike
) -> Array:
    """(..., B + 1), from -bound to bound, the logarithms of the gaps normal with that deviation."""
    gaps = jax.nn.softmax(roughness * jax.random.normal(key, shape), axis=-1)
    inner = jnp.cumsum(gaps, axis=-1)[..., :-1]
    zero = jnp.zeros((*shape[:-1], 1), gaps.dtype)
    return jnp.multiply(bound, 2 * jnp.concatenate([zero, inner, zero + 1], axis=-1) - 1)


def sine_map(
    ambient_dim: int, *, key: Key, num_layers: int, frequency: ArrayLike, kappa: ArrayLike
) -> SineMap:
    """A random `SineMap` of R^ambient_dim, in which half of the coordinates are waved by a layer.

    >>> warp = sine_map(3, key=jax.random.key(0), num_layers=2, frequency=10.0, kappa=1e-4)
    >>> warp(jnp.ones((5, 3))).shape
    (5, 3)
    """
    rotation_key, waved_key = jax.random.split(key)
    return SineMap(
        rotations=jax.random.orthogonal(rotation_key, ambient_dim, shape=(num_layers,)),
        waved=jax.random.bernoulli(waved_key, shape=(num_layers, ambient_dim)),
        frequency=frequency,
        kappa=kappa,
    )


def spline_map(
    ambient_dim: int,
    *,
    key: Key,
    num_layers: int,
    num_bins: int,
    bound: ArrayLike,
    roughness: ArrayLike,
) -> SplineMap:
    """A random `SplineMap` of R^ambient_dim, of `num_bins` bins on [-bound, bound].

    The logarithms of the gaps between knots, of the gaps between values (each up to the constant
    that makes them fill the interval) and of the slopes are normal with deviation `roughness`.

    >>> warp = spline_map(
    ...     3, key=jax.random.key(0), num_layers=2, num_bins=8, bound=3.0, roughness=0.5
    ... )
    >>> bool(jnp.allclose(warp.inverse(warp(jnp.ones(3))), 1, atol=1e-5))
    True
    """
    rotation_key, knot_key, value_key, slope_key = jax.random.split(key, 4)
    shape = (num_layers, ambient_dim, num_bins)
    slopes = jax.random.normal(slope_key, (num_layers, ambient_dim, num_bins - 1))
    return SplineMap(
        rotations=jax.random.orthogonal(rotation_key, ambient_dim, shape=(num_layers,)),
        knots=_random_knots(knot_key, shape, bound, roughness),
        values=_random_knots(value_key, shape, bound, roughness),
        slopes=jnp.exp(jnp.pad(roughness * slopes, ((0, 0), (0, 0), (1, 1)))),
    )
