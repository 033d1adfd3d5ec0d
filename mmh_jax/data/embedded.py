r"""Manifolds of any dimension d, carried isometrically into R^D.

A set is the image of a chart x = E phi(u), from an open set of R^d into R^D, whose differential has
rank d.  The charts are

    hypersphere     z / |z|, z in R^(d + 1)                          in R^(d + 1)
    hyperball       u, |u| < 1                                       in R^d
    twin peaks      (u, height * prod_i sin(2 pi u_i))               in R^(d + 1)
    Clifford torus  (cos a_1, sin a_1, ..., cos a_d, sin a_d)        in R^(2 d)
    nonlinear       (p, q, p, q), p_i = tan(u_i cos u_i'),
                                  q_i = arctan(u_i' sin u_i)         in R^(4 d)

with i' = d + 1 - i.  For a pair (i, i') the differential of (u_i cos u_i', u_i' sin u_i) has the
determinant sin u_i cos u_i' + u_i u_i' cos u_i sin u_i', positive inside the unit cube, so that
the last chart too has rank d.

E, the `frame`, is a (D, n) matrix of orthonormal columns: it keeps distances and so dimensions.
Drawn from the key it mixes all coordinates, and each call draws its own; to take several samples
from one manifold, draw them in one call and split them, or pass the `frame`.

These five are the benchmark of Yeats et al. 2025 (2510.12975); the dimensions of its run are the
defaults here.  It draws them with scikit-dimension, pads the points with zeros, `frame=jnp.eye(D,
n)`, and divides all coordinates by the largest standard deviation among them (`curved.rescale`).
A mixing frame lowers that deviation, by (n / D)^(1/2) for the sphere or the ball, so to work at its
noise levels use its frame.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.data.manifolds import Labelled, _check_count
from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = ["clifford_torus", "hyperball", "hypersphere", "nonlinear", "twin_peaks"]


def _sphere(z: Array) -> Array:
    """(..., d + 1), not 0 -> (..., d + 1), of length 1."""
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def _twin_peaks(u: Array, height: ArrayLike) -> Array:
    """(..., d) in the unit cube -> (..., d + 1)."""
    peak = height * jnp.prod(jnp.sin(2 * jnp.pi * u), axis=-1, keepdims=True)
    return jnp.concatenate([u, peak], axis=-1)


def _clifford_torus(angles: Array) -> Array:
    """(..., d) angles -> (..., 2 d)."""
    circles = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return circles.reshape(*angles.shape[:-1], -1)


def _nonlinear(u: Array) -> Array:
    """(..., d) in the unit cube -> (..., 4 d)."""
    mirrored = u[..., ::-1]
    p, q = jnp.tan(u * jnp.cos(mirrored)), jnp.arctan(mirrored * jnp.sin(u))
    return jnp.concatenate([p, q, p, q], axis=-1)


def _embed(
    caller: str, points: Array, dim: int, ambient_dim: int, frame: Array | None, key: Key
) -> Labelled:
    """`points` (num, n) of a manifold of dimension `dim`, carried into R^ambient_dim."""
    num, natural = points.shape
    if frame is None:
        if ambient_dim == natural:
            frame = jnp.eye(natural, dtype=points.dtype)
        else:
            frame = jax.random.orthogonal(key, ambient_dim, m=natural)
    elif jnp.shape(frame) != (ambient_dim, natural):
        raise ValueError(
            f"`{caller}(frame=...)` has shape {jnp.shape(frame)}; for this manifold in "
            f"R^{ambient_dim} it must be ({ambient_dim}, {natural}), of orthonormal columns."
        )
    return Labelled(points @ frame.T, jnp.full(num, dim), jnp.zeros(num, int))


def _check(caller: str, num: int, dim: int, ambient_dim: int, natural: int) -> None:
    _check_count(caller, "num", num, least=1)
    _check_count(caller, "dim", dim, least=1)
    _check_count(caller, "ambient_dim", ambient_dim, least=1)
    if ambient_dim < natural:
        raise ValueError(
            f"`{caller}(dim={dim}, ambient_dim={ambient_dim})` needs {natural} coordinates; "
            f"raise `ambient_dim` to {natural} or lower `dim`."
        )


def hypersphere(
    num: int, dim: int = 16, ambient_dim: int = 64, *, key: Key, frame: Array | None = None
) -> Labelled:
    """The unit sphere S^dim, uniform.

    Args:
        num: points.
        dim: the dimension of the sphere; it spans dim + 1 coordinates.
        ambient_dim: D, at least dim + 1.
        key: draws the points, and the frame if D > dim + 1 and none is given.
        frame: (D, dim + 1) of orthonormal columns; see the module.

    Raises:
        ValueError: if a number is not a positive integer, `ambient_dim` is too small or `frame` has
            another shape.

    >>> points, lid, component = hypersphere(100, 2, 5, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist()), bool(jnp.allclose((points**2).sum(1), 1))
    ((100, 5), {2}, True)
    """
    _check("hypersphere", num, dim, ambient_dim, natural=dim + 1)
    point_key, frame_key = jax.random.split(check_key("hypersphere", key))
    points = _sphere(jax.random.normal(point_key, (num, dim + 1)))
    return _embed("hypersphere", points, dim, ambient_dim, frame, frame_key)


def hyperball(
    num: int, dim: int = 16, ambient_dim: int = 64, *, key: Key, frame: Array | None = None
) -> Labelled:
    """The unit ball of R^dim, uniform: |x|^dim is uniform on [0, 1].

    Half of the points lie within log(2) / dim of the boundary, beyond which there is nothing; the
    dimension is `dim` at all of them, but estimates are biased there.

    Args:
        num: points.
        dim: the dimension of the ball.
        ambient_dim: D, at least dim.
        key: draws the points, and the frame if D > dim and none is given.
        frame: (D, dim) of orthonormal columns; see the module.

    Raises:
        ValueError: if a number is not a positive integer, `ambient_dim` is too small or `frame` has
            another shape.

    >>> points, lid, component = hyperball(100, 2, 5, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist()), bool(jnp.all((points**2).sum(1) < 1))
    ((100, 5), {2}, True)
    """
    _check("hyperball", num, dim, ambient_dim, natural=dim)
    direction_key, radius_key, frame_key = jax.random.split(check_key("hyperball", key), 3)
    directions = _sphere(jax.random.normal(direction_key, (num, dim)))
    points = jax.random.uniform(radius_key, (num, 1)) ** (1 / dim) * directions
    return _embed("hyperball", points, dim, ambient_dim, frame, frame_key)


def twin_peaks(
    num: int,
    dim: int = 128,
    ambient_dim: int = 256,
    *,
    key: Key,
    height: ArrayLike = 1.0,
    frame: Array | None = None,
) -> Labelled:
    """The graph of height * prod_i sin(2 pi u_i) over the unit cube, u uniform.

    A typical product is about 2^-dim, so that above dim = 20 or so this is a flat cube; what is
    hard about it is its dimension.

    Args:
        num: points.
        dim: the dimension of the cube.
        ambient_dim: D, at least dim + 1.
        key: draws the points, and the frame if D > dim + 1 and none is given.
        height: of the peaks, in units of the side of the cube.
        frame: (D, dim + 1) of orthonormal columns; see the module.

    Raises:
        ValueError: if a number is not a positive integer, `ambient_dim` is too small or `frame` has
            another shape.

    >>> points, lid, component = twin_peaks(100, 2, 5, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist())
    ((100, 5), {2})
    """
    _check("twin_peaks", num, dim, ambient_dim, natural=dim + 1)
    point_key, frame_key = jax.random.split(check_key("twin_peaks", key))
    points = _twin_peaks(jax.random.uniform(point_key, (num, dim)), height)
    return _embed("twin_peaks", points, dim, ambient_dim, frame, frame_key)


def clifford_torus(
    num: int, dim: int = 32, ambient_dim: int = 128, *, key: Key, frame: Array | None = None
) -> Labelled:
    """The flat torus, a product of `dim` unit circles, uniform; it lies on a sphere.

    Args:
        num: points.
        dim: the number of circles; the torus spans 2 * dim coordinates.
        ambient_dim: D, at least 2 * dim.
        key: draws the points, and the frame if D > 2 * dim and none is given.
        frame: (D, 2 * dim) of orthonormal columns; see the module.

    Raises:
        ValueError: if a number is not a positive integer, `ambient_dim` is too small or `frame` has
            another shape.

    >>> points, lid, component = clifford_torus(100, 2, 5, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist()), bool(jnp.allclose((points**2).sum(1), 2))
    ((100, 5), {2}, True)
    """
    _check("clifford_torus", num, dim, ambient_dim, natural=2 * dim)
    point_key, frame_key = jax.random.split(check_key("clifford_torus", key))
    angles = jax.random.uniform(point_key, (num, dim), maxval=2 * jnp.pi)
    return _embed("clifford_torus", _clifford_torus(angles), dim, ambient_dim, frame, frame_key)


def nonlinear(
    num: int, dim: int = 32, ambient_dim: int = 128, *, key: Key, frame: Array | None = None
) -> Labelled:
    """The manifold Mn of scikit-dimension (Campadelli et al. 2015), u uniform on the unit cube.

    It is (p, q, p, q), in which each coordinate occurs twice; see the module.

    Args:
        num: points.
        dim: the dimension; the set lies in 4 * dim coordinates.
        ambient_dim: D, at least 4 * dim.
        key: draws the points, and the frame if D > 4 * dim and none is given.
        frame: (D, 4 * dim) of orthonormal columns; see the module.

    Raises:
        ValueError: if a number is not a positive integer, `ambient_dim` is too small or `frame` has
            another shape.

    >>> points, lid, component = nonlinear(100, 2, 8, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist())
    ((100, 8), {2})
    """
    _check("nonlinear", num, dim, ambient_dim, natural=4 * dim)
    point_key, frame_key = jax.random.split(check_key("nonlinear", key))
    points = _nonlinear(jax.random.uniform(point_key, (num, dim)))
    return _embed("nonlinear", points, dim, ambient_dim, frame, frame_key)
