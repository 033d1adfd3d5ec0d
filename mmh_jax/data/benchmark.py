r"""The manifolds on which estimators of intrinsic dimension are compared.

A set is the image of a chart x = phi(u), u drawn from a law on R^m, whose differential has the rank
d, the dimension of the set, at almost every u.  With p uniform on [0, 1]^d unless something else is
said, i' = d + 1 - i, p_{d+1} = p_1 and c, s the cosine and the sine of 2 pi times their argument:

    M1    sphere        z / |z|, z normal in R^11                                        10 in 11
    M2    affine        A p + b, p on [0, 4]^3                                            3 in 5
    M3    concentrated  (p_2^2 c(p_1), p_3^2 s(p_1), p_2 + p_3 + (p_2 - p_4)^2,
                        p_2 - 2 p_3 + (p_1 - p_4)^2, -p_2 - 2 p_3 + (p_3 - p_4)^2,
                        p_1^2 - p_2^2 + p_3^2 - p_4^2)                                    4 in 6
    M4    nonlinear     (p_{i+1} c(p_i), p_{i+1} s(p_i)), i = 1 ... d                     4 in 8
    M5a   helix         ((2 + cos 8t) cos t, (2 + cos 8t) sin t, sin 8t), t on [0, 2 pi]  1 in 3
    M5b   helicoid      (r sin t, r cos t, t), r on [-pi, pi], t on [0, 2 pi]             2 in 3
    M6    nonlinear     the chart of M4, three times                                      6 in 36
    M7    roll          (t sin 2.5t, h, t cos 2.5t), h on [-pi, pi], t on [0, 2 pi]       2 in 3
    M8    nonlinear     the chart of M4, three times                                     12 in 72
    M9    affine        p on [-2.5, 2.5]^20                                              20 in 20
    M10   cube          (p, 0), with d = 10, 17, 24, 70 in M10a to M10d              d in d + 1
    M11   Moebius       ((1 + r/2 cos 5t) cos t, (1 + r/2 cos 5t) sin t, r/2 sin 5t),
                        r on [-1, 1], t on [0, 2 pi]                                      2 in 3
    M12   Gaussian      z normal in R^20                                                 20 in 20
    M13a  S-curve       (sin t, h, sign(t) (cos t - 1)), t on 1.5 pi [-1, 1], h on [0, 2] 2 in 3
    M13b  curve         x_j = (t / 2 pi + sum_{k<j} sin k t) / j, t on [0, 2 pi]          1 in 13
    Mbeta               (a, b, a, b), a_i = p_i sin c(p_i), b_i = p_i cos s(p_i),
                        each p_i of law Beta(10, 1/2)                                    10 in 40
    Mn    nonlinear     (a, b, a, b), a_i = tan(p_i cos p_i'), b_i = arctan(p_i' sin p_i),
                        with d = 18, 24 in Mn1 and Mn2                               d in 4 d
    Mp    paraboloid    (y, sin y, y^2), y = (q, |q|^2), q_i = e_0 / (e_0 + e_i), e_j
                        exponential, with d = 3, 6, 9 in Mp1 to Mp3                  d in 3 (d + 1)

M1, M2, M9, M10 and M13a are uniform in volume, the others not.  Along an edge, as of M9 or M10,
estimates are biased though the dimension is the same.  Ten half turns make M11 two-sided.

**Where they come from.**  M1 to M13 are the data sets 1 to 13 of Hein & Audibert (2005), with the
constants of the generator that they published; M5a is the toroidal helix and M13a scikit-learn's
S-curve, which scikit-dimension adds under these numbers.  Mp is of Brito, Quiroz & Yukich (2013);
the law of q is a multivariate Burr law.  Campadelli et al. (2015) made a benchmark of these and of
Mbeta and Mn, the charts of which are taken from scikit-dimension.  (The R package
`intrinsicDimension` gives the chart of Mbeta, with p uniform, to the sets of 18 and 24 dimensions
of Rozza et al. 2012.)

**Where scikit-dimension has another set under the same number.**  The dimensions are the same in
both; all of its labels are right.

    M2    A with its rows 2 and 5 on other columns: (.5, .9, 0) and (1.1, -.3, 0)
    M5b   (r cos t, r sin t, t / 2), r and t on [0, 10 pi]: wider, with five turns
    M7    scikit-learn's roll, which is `curved.swiss_roll`
    M10   the surface of the cube of d + 1 dimensions, with too few points on its last faces
    M13b  the circular helix (100 cos t, 100 sin t, t, 0, ...), t on [0, 10 pi]
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mmh_jax.data.embedded import _nonlinear, _sphere
from mmh_jax.data.manifolds import Labelled, _check_count
from mmh_jax.typing import Array, Key, check_key

__all__ = ["MANIFOLDS", "BenchmarkManifold"]


@dataclasses.dataclass(frozen=True)
class BenchmarkManifold:
    """A set of one dimension, the image of a chart; see the module.

    Attributes:
        name: the number in the literature and a word.
        dim: the dimension d, which is the rank of the differential of the chart.
        ambient_dim: D.
        draw: `draw(key, num)`, points (num, m) of the domain of the chart.
        chart: (..., m) -> (..., D).

    >>> roll = MANIFOLDS["M7 roll"]
    >>> points, lid, component = roll.sample(1000, key=jax.random.key(0))
    >>> points.shape, set(lid.tolist())
    ((1000, 3), {2})
    """

    name: str
    dim: int
    ambient_dim: int
    draw: Callable[[Key, int], Array]
    chart: Callable[[Array], Array]

    def sample(self, num: int, *, key: Key) -> Labelled:
        """`num` independent points; it can be jitted with `num` static.

        Raises:
            ValueError: if `num` is not a positive integer.
        """
        _check_count(f"{self.name}.sample", "num", num, least=1)
        points = self.chart(self.draw(check_key(f"{self.name}.sample", key), num))
        return Labelled(points, jnp.full(num, self.dim), jnp.zeros(num, int))


# Laws


def _box(*ranges: tuple[float, float]) -> Callable[[Key, int], Array]:
    """Uniform on a product of intervals."""
    low, width = [a for a, _ in ranges], [b - a for a, b in ranges]

    def draw(key: Key, num: int) -> Array:
        unit = jax.random.uniform(key, (num, len(ranges)))
        return jnp.asarray(low, unit.dtype) + jnp.asarray(width, unit.dtype) * unit

    return draw


def _cube(dim: int, low: float = 0.0, high: float = 1.0) -> Callable[[Key, int], Array]:
    return _box(*[(low, high)] * dim)


def _normal(dim: int) -> Callable[[Key, int], Array]:
    return lambda key, num: jax.random.normal(key, (num, dim))


def _beta(dim: int) -> Callable[[Key, int], Array]:
    return lambda key, num: jax.random.beta(key, 10.0, 0.5, (num, dim))


def _exponential(dim: int) -> Callable[[Key, int], Array]:
    return lambda key, num: jax.random.exponential(key, (num, dim))


# Charts


def _identity(u: Array) -> Array:
    return u


def _affine(u: Array) -> Array:
    a, b, c = jnp.moveaxis(u, -1, 0)
    rows = [
        1.2 * a - 0.5 * b + 3,
        0.5 * a + 0.9 * c - 1,
        -0.5 * a - 0.2 * b + c,
        0.4 * a - 0.9 * b - 0.1 * c,
        1.1 * a - 0.3 * c + 8,
    ]
    return jnp.stack(rows, axis=-1)


def _concentrated(u: Array) -> Array:
    p, q, r, s = jnp.moveaxis(u, -1, 0)
    rows = [
        q**2 * jnp.cos(2 * jnp.pi * p),
        r**2 * jnp.sin(2 * jnp.pi * p),
        q + r + (q - s) ** 2,
        q - 2 * r + (p - s) ** 2,
        -q - 2 * r + (r - s) ** 2,
        p**2 - q**2 + r**2 - s**2,
    ]
    return jnp.stack(rows, axis=-1)


def _chained_circles(times: int) -> Callable[[Array], Array]:
    """The chart of M4, M6 and M8: each coordinate is an angle and the radius of the circle before.

    Pair i is (p_{i+1}, p_i) in polar coordinates: the differential has rank d unless a p_i is 0.
    """

    def chart(p: Array) -> Array:
        angle, radius = 2 * jnp.pi * p, jnp.roll(p, -1, axis=-1)
        pairs = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
        once = pairs.reshape(*p.shape[:-1], -1)
        return jnp.concatenate([once] * times, axis=-1)

    return chart


def _toroidal_helix(u: Array) -> Array:
    t = u[..., 0]
    radius = 2 + jnp.cos(8 * t)
    return jnp.stack([radius * jnp.cos(t), radius * jnp.sin(t), jnp.sin(8 * t)], axis=-1)


def _helicoid(u: Array) -> Array:
    radius, t = u[..., 0], u[..., 1]
    return jnp.stack([radius * jnp.sin(t), radius * jnp.cos(t), t], axis=-1)


def _roll(u: Array) -> Array:
    height, t = u[..., 0], u[..., 1]
    return jnp.stack([t * jnp.sin(2.5 * t), height, t * jnp.cos(2.5 * t)], axis=-1)


def _padded(u: Array) -> Array:
    return jnp.concatenate([u, jnp.zeros_like(u[..., :1])], axis=-1)


def _moebius(u: Array) -> Array:
    half, t = u[..., 0] / 2, u[..., 1]
    radius = 1 + half * jnp.cos(5 * t)
    return jnp.stack([radius * jnp.cos(t), radius * jnp.sin(t), half * jnp.sin(5 * t)], axis=-1)


def _s_curve(u: Array) -> Array:
    t, height = u[..., 0], u[..., 1]
    return jnp.stack([jnp.sin(t), height, jnp.sign(t) * (jnp.cos(t) - 1)], axis=-1)


def _curve(u: Array) -> Array:
    index = jnp.arange(1, 14)
    waves = jnp.cumsum(jnp.sin(index[:-1] * u), axis=-1)
    sums = u / (2 * jnp.pi) + jnp.concatenate([jnp.zeros_like(u), waves], axis=-1)
    return sums / index


def _beta_chart(p: Array) -> Array:
    a = p * jnp.sin(jnp.cos(2 * jnp.pi * p))
    b = p * jnp.cos(jnp.sin(2 * jnp.pi * p))
    return jnp.concatenate([a, b, a, b], axis=-1)


def _paraboloid(e: Array) -> Array:
    q = e[..., :1] / (e[..., :1] + e[..., 1:])
    y = jnp.concatenate([q, jnp.sum(q**2, axis=-1, keepdims=True)], axis=-1)
    return jnp.concatenate([y, jnp.sin(y), y**2], axis=-1)


_TURN = (0.0, 2 * jnp.pi)
_MANIFOLDS = (
    BenchmarkManifold("M1 sphere", 10, 11, _normal(11), _sphere),
    BenchmarkManifold("M2 affine", 3, 5, _cube(3, 0.0, 4.0), _affine),
    BenchmarkManifold("M3 concentrated", 4, 6, _cube(4), _concentrated),
    BenchmarkManifold("M4 nonlinear", 4, 8, _cube(4), _chained_circles(1)),
    BenchmarkManifold("M5a helix", 1, 3, _box(_TURN), _toroidal_helix),
    BenchmarkManifold("M5b helicoid", 2, 3, _box((-jnp.pi, jnp.pi), _TURN), _helicoid),
    BenchmarkManifold("M6 nonlinear", 6, 36, _cube(6), _chained_circles(3)),
    BenchmarkManifold("M7 roll", 2, 3, _box((-jnp.pi, jnp.pi), _TURN), _roll),
    BenchmarkManifold("M8 nonlinear", 12, 72, _cube(12), _chained_circles(3)),
    BenchmarkManifold("M9 affine", 20, 20, _cube(20, -2.5, 2.5), _identity),
    BenchmarkManifold("M10a cube", 10, 11, _cube(10), _padded),
    BenchmarkManifold("M10b cube", 17, 18, _cube(17), _padded),
    BenchmarkManifold("M10c cube", 24, 25, _cube(24), _padded),
    BenchmarkManifold("M10d cube", 70, 71, _cube(70), _padded),
    BenchmarkManifold("M11 Moebius", 2, 3, _box((-1.0, 1.0), _TURN), _moebius),
    BenchmarkManifold("M12 Gaussian", 20, 20, _normal(20), _identity),
    BenchmarkManifold(
        "M13a S-curve", 2, 3, _box((-1.5 * jnp.pi, 1.5 * jnp.pi), (0.0, 2.0)), _s_curve
    ),
    BenchmarkManifold("M13b curve", 1, 13, _box(_TURN), _curve),
    BenchmarkManifold("Mbeta", 10, 40, _beta(10), _beta_chart),
    BenchmarkManifold("Mn1 nonlinear", 18, 72, _cube(18), _nonlinear),
    BenchmarkManifold("Mn2 nonlinear", 24, 96, _cube(24), _nonlinear),
    BenchmarkManifold("Mp1 paraboloid", 3, 12, _exponential(4), _paraboloid),
    BenchmarkManifold("Mp2 paraboloid", 6, 21, _exponential(7), _paraboloid),
    BenchmarkManifold("Mp3 paraboloid", 9, 30, _exponential(10), _paraboloid),
)

MANIFOLDS: Mapping[str, BenchmarkManifold] = types.MappingProxyType(
    {manifold.name: manifold for manifold in _MANIFOLDS}
)
"""The 24 of the table, by name; `MANIFOLDS["M1 sphere"].sample(num, key=key)`."""
