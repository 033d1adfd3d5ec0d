r"""Shapes in the plane and in space whose local dimension is known at every point.

A set of dimension d is the image of a chart, x = phi(u), from an open set of R^d, whose
differential has rank d; a law of u makes it a law on the set.  The charts here are

    circle        (R cos a, R sin a, 0)                                         d = 1
    torus         ((R + r cos b) cos a, (R + r cos b) sin a, r sin b)           d = 2
    Swiss roll    (t cos t, h, t sin t)                                         d = 2

and the flat pieces of a lollipop.  Where two pieces lie side by side, as the string runs inside its
doughnut, an estimate of the dimension depends on the scale at which it is made: at scales well
below the gap it sees one piece, above it both.  Noise is isotropic, so a change of units divides
every coordinate by the same number (`rescale`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmh_jax.data.manifolds import Labelled, _check_count
from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = [
    "lollipop",
    "rescale",
    "string_in_doughnut",
    "swiss_roll",
    "torus_and_circle",
]


def rescale(labelled: Labelled, *, shift: ArrayLike, scale: ArrayLike) -> Labelled:
    """The points (x - shift) / scale, with the dimensions they had.

    Args:
        labelled: points (N, D) with their dimensions.
        shift: a scalar or (D,), in data units.
        scale: one positive number: noise of one size in every coordinate has to stay so.

    Raises:
        ValueError: if `scale` is not one finite positive number.

    >>> roll = swiss_roll(1000, key=jax.random.key(0))
    >>> units = {"shift": roll.points.mean(0), "scale": roll.points.std(0).max()}
    >>> float(rescale(roll, **units).points.std(0).max())
    1.0...
    """
    if jnp.shape(scale) != ():
        raise ValueError(
            f"`rescale(scale=...)` has shape {jnp.shape(scale)}; it must be one number for all "
            "coordinates, for example `points.std(0).max()`."
        )
    if not isinstance(scale, Tracer) and not 0 < float(np.asarray(scale)) < float("inf"):
        raise ValueError(f"`rescale(scale={scale})` must be finite and positive.")
    return labelled._replace(points=(labelled.points - shift) / scale)


def _angles(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, maxval=2 * jnp.pi)


def _torus(angles: Array, major: float, minor: float) -> Array:
    """(..., 2) angles, along the core and around it -> (..., 3); a circle if `minor` is 0."""
    along, around = angles[..., 0], angles[..., 1]
    radius = major + minor * jnp.cos(around)
    return jnp.stack(
        [radius * jnp.cos(along), radius * jnp.sin(along), minor * jnp.sin(around)], axis=-1
    )


def _swiss_roll(u: Array) -> Array:
    """(..., 2) in the unit square -> (..., 3)."""
    t = 1.5 * jnp.pi * (1 + 2 * u[..., 0])
    return jnp.stack([t * jnp.cos(t), 21 * u[..., 1], t * jnp.sin(t)], axis=-1)


def _check_radii(caller: str, major: float, minor: float) -> None:
    if not 0 < minor < major < float("inf"):
        raise ValueError(
            f"`{caller}(major={major}, minor={minor})` needs 0 < minor < major, "
            "or the tube meets itself."
        )


def string_in_doughnut(num: int, *, key: Key, major: float = 10.0, minor: float = 1.0) -> Labelled:
    """A circle of dimension 1 inside a torus, a surface of dimension 2, in R^3.

    The circle (component 0) is the core of the tube: it keeps the distance `minor` from the surface
    (component 1).  The two are equally likely and their angles uniform, so that the surface is not
    uniform in area: its density is proportional to 1 / (major + minor cos b).  So it is in the
    public code (Kamkari et al. 2024, 2406.03537), from which the radii come.

    Args:
        num: points.
        key: draws them.
        major: the radius of the circle.
        minor: the radius of the tube, less than `major`.

    Raises:
        ValueError: if `num` is not a positive integer, or not 0 < `minor` < `major`.

    >>> points, lid, component = string_in_doughnut(1000, key=jax.random.key(0))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 3), [1, 2])
    """
    _check_count("string_in_doughnut", "num", num, least=1)
    _check_radii("string_in_doughnut", major, minor)
    component_key, angle_key = jax.random.split(check_key("string_in_doughnut", key))
    component = jax.random.randint(component_key, (num,), 0, 2)
    angles = _angles(angle_key, (num, 2))
    string, doughnut = _torus(angles, major, 0.0), _torus(angles, major, minor)
    points = jnp.where((component == 0)[:, None], string, doughnut)
    return Labelled(points, component + 1, component)


def torus_and_circle(num: int, *, key: Key, major: float = 2.0, minor: float = 0.5) -> Labelled:
    """A torus and a circle that goes through its hole, like two links of a chain, in R^3.

    The circle (component 0, dimension 1) lies in the plane y = 0 with centre (major, 0, 0) and
    radius `major`: it passes through the centre of the torus (component 1, dimension 2) and comes
    no nearer to its surface than `major - minor`.  The two are equally likely, their angles
    uniform.  The public benchmarks know only the circle inside the tube, `string_in_doughnut`;
    these linked rings are defined here, to tell that set from one in which the pieces stay far
    from each other.

    Args:
        num: points.
        key: draws them.
        major: the radius of the circle and of the core of the torus.
        minor: the radius of the tube, less than `major`.

    Raises:
        ValueError: if `num` is not a positive integer, or not 0 < `minor` < `major`.

    >>> points, lid, component = torus_and_circle(1000, key=jax.random.key(0))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 3), [1, 2])
    """
    _check_count("torus_and_circle", "num", num, least=1)
    _check_radii("torus_and_circle", major, minor)
    component_key, angle_key = jax.random.split(check_key("torus_and_circle", key))
    component = jax.random.randint(component_key, (num,), 0, 2)
    angles = _angles(angle_key, (num, 2))
    x, z, y = jnp.moveaxis(_torus(angles, major, 0.0), -1, 0)
    circle = jnp.stack([major + x, y, z], axis=-1)
    points = jnp.where((component == 0)[:, None], circle, _torus(angles, major, minor))
    return Labelled(points, component + 1, component)


def lollipop(num: int, *, key: Key, weights: Sequence[float] = (4, 2, 1)) -> Labelled:
    """A disc (dimension 2), its stick (1) and a dot (0), in R^2.

    The disc (component 0) has centre (3, 3) and radius 1; the stick (component 1) is the segment
    from its rim towards the origin that ends in (1.5, 1.5); the dot (component 2) is the origin.
    Each is uniform.  Sizes and weights are those of the public code (Kamkari et al. 2024,
    2406.03537).

    Args:
        num: points.
        key: draws them.
        weights: of disc, stick and dot, at least 0 and not all 0; (2, 1, 0) leaves the dot out.

    Raises:
        ValueError: if `num` is not a positive integer, or `weights` are not three such numbers.

    >>> points, lid, component = lollipop(1000, key=jax.random.key(0))
    >>> points.shape, sorted(set(lid.tolist()))
    ((1000, 2), [0, 1, 2])
    """
    _check_count("lollipop", "num", num, least=1)
    weights = tuple(weights)
    if len(weights) != 3 or not min(weights) >= 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(
            f"`lollipop(weights={weights})` must be three finite numbers, for disc, stick and dot, "
            "none negative and not all 0."
        )
    component_key, radius_key, angle_key = jax.random.split(check_key("lollipop", key), 3)
    component = jax.random.categorical(component_key, jnp.log(jnp.array(weights)), shape=(num,))
    u = jax.random.uniform(radius_key, (num, 1))
    angle = _angles(angle_key, (num,))
    disc = 3 + jnp.sqrt(u) * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    rim = 3 - 0.5**0.5
    stick = jnp.broadcast_to(1.5 + (rim - 1.5) * u, (num, 2))
    points = jnp.stack([disc, stick, jnp.zeros((num, 2))])[component, jnp.arange(num)]
    return Labelled(points, 2 - component, component)


def swiss_roll(num: int, *, key: Key) -> Labelled:
    """The Swiss roll (t cos t, h, t sin t), t uniform on [1.5 pi, 4.5 pi], h on [0, 21], in R^3.

    The constants are scikit-learn's, which the public benchmark (Kamkari et al. 2024, 2406.03537)
    uses.  The density with respect to area is proportional to 1 / sqrt(1 + t^2).

    Args:
        num: points.
        key: draws them.

    Raises:
        ValueError: if `num` is not a positive integer.

    >>> points, lid, component = swiss_roll(1000, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist())
    ((1000, 3), {2})
    """
    _check_count("swiss_roll", "num", num, least=1)
    u = jax.random.uniform(check_key("swiss_roll", key), (num, 2))
    return Labelled(_swiss_roll(u), jnp.full(num, 2), jnp.zeros(num, int))
