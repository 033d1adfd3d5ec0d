r"""Uniform and von Mises-Fisher distributions on the sphere S^dim of radius R in R^n, n = dim + 1.

The density on the sphere is proportional to exp(tilt . x0 / R).  Given x = x0 + sigma eps, x0 is
again von Mises-Fisher, with c = tilt + R x / sigma^2 in place of tilt.  With nu = n/2 - 1, k = |c|,
the ratio A = I_{nu+1}(k) / I_nu(k) and G(k) = log[Gamma(nu+1) (k/2)^-nu I_nu(k)],

    D(x; sigma)      = R A(k) c / k
    F(x; sigma)      = (|x|^2 + R^2 - 2 x . D) / sigma^2
    log rho_sigma(x) = -(|x|^2 + R^2) / (2 sigma^2) - n/2 log(2 pi sigma^2) + G(k) - G(|tilt|).

D = R h c, with h = A / k a smooth function of |c|^2, is accurate to the last digits at every sigma.
For small sigma F and log rho are differences of large numbers.  They are evaluated through u = x +
sigma^2 tilt / R, which makes k = R |u| / sigma^2, its direction e = u / |u|, and B = 1 - A:

    F       = (|x - R e|^2 + 2 R B x . e) / sigma^2
    log rho = -(|u| - R)^2 / (2 sigma^2) + [G(k) - k] + x . tilt / R + sigma^2 |tilt|^2 / (2 R^2)
              - G(|tilt|) - n/2 log(2 pi sigma^2).

For k < nu + 1, where A is below one half, nothing cancels in the first forms; they are smooth at
c = 0, where e is not.  Where the tilt outweighs x, sigma^2 |tilt| > R^2, u is far from x, and the
first form of log rho serves again.
"""

# ruff: noqa: D102 -- a method that overrides one of `Distribution` is documented there.

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.analytic import bessel
from mmh_jax.analytic.base import Distribution, floating, is_concrete, norm
from mmh_jax.analytic.gaussian import LinearGaussian
from mmh_jax.analytic.mixture import Mixture
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Sphere", "von_mises", "von_mises_with_atom"]


class _Posterior(NamedTuple):
    """What the closed forms share; see the module docstring for u, c, e, k and B."""

    diffuse: Array  # whether k < nu + 1
    leaning: ArrayLike  # whether sigma^2 |tilt| > R^2
    lean: ArrayLike  # u - x
    c: Array
    w: Array  # |c|^2
    length: Array  # |u| and, from it, e and k; anything positive where diffuse
    e: Array
    k: Array


@struct.dataclass
class Sphere(Distribution):
    """The sphere S^dim of radius `radius` in R^(dim + 1), uniform or tilted (von Mises-Fisher).

    Points are vectors of dim + 1 coordinates; the sphere is centred at the origin.

    Cost of every method: O(D), and about 4,000 operations for the Bessel functions.
    Relative error of F: a few hundred units in the last place, at every sigma.

    Attributes:
        dim: the dimension of the sphere, at least 1 (static).
        radius: in data units.
        tilt: (dim + 1,), concentration times mean direction of a von Mises-Fisher distribution, a
            pure number; None or zeros for the uniform one.

    Raises:
        ValueError: if `dim < 1`, `radius` is not positive, or `tilt` has not dim + 1 entries.

    >>> Sphere(10).flipd(jnp.ones(11) / 11**0.5, 0.174).round(3)  # about 10 - 20 sigma^2
    Array(9.378, dtype=float32)
    >>> Sphere(2, radius=3.0)(jnp.array([0.0, 0.0, 3.0]), 0.01)
    Array([0.       , 0.       , 2.9999666], dtype=float32)
    """

    dim: int = struct.field(pytree_node=False)
    radius: ArrayLike = 1.0
    tilt: Array | None = None

    def _check(self) -> dict[str, Any]:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(
                f"`Sphere(dim={self.dim!r})` must be an integer of at least 1; for a single point "
                "take `LinearGaussian.atom(point)`."
            )
        radius = self.radius
        if is_concrete(radius) and not (np.ndim(radius) == 0 and 0 < np.asarray(radius) < np.inf):
            raise ValueError(f"`Sphere(radius={radius!r})` must be a finite positive number.")
        if self.tilt is None:
            return {}
        tilt = floating("Sphere(tilt", self.tilt, 1, "a vector (dim + 1,)")
        if tilt.size != self.dim + 1:
            raise ValueError(
                f"`Sphere(tilt=...)` has shape {tilt.shape}; the sphere S^{self.dim} lies in "
                f"R^{self.dim + 1}, so it must be {(self.dim + 1,)}."
            )
        return {"tilt": tilt}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim + 1,)

    @property
    def _order(self) -> float:
        """nu = n/2 - 1."""
        return (self.dim - 1) / 2

    def _dimension(self) -> float:
        return float(self.dim)

    def _posterior(self, x: Array, sigma: ArrayLike) -> _Posterior:
        rate = jnp.asarray(self.radius / sigma**2)
        lean = 0 if self.tilt is None else self.tilt / rate
        leaning = False if self.tilt is None else jnp.sum(lean**2) > self.radius**2
        u = x + lean
        c, square = rate * u, jnp.sum(u * u)
        w = rate**2 * square
        diffuse = w < (self._order + 1) ** 2
        # Where diffuse, |u| may be 0: any positive number does, and keeps gradients finite.
        length = jnp.sqrt(jnp.where(diffuse, 1, square))
        return _Posterior(diffuse, leaning, lean, c, w, length, u / length, rate * length)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        post = self._posterior(self._point(x), sigma)
        return self.radius * bessel.ratio(self._order, post.w) * post.c

    def flipd(self, x: Array, sigma: ArrayLike) -> Array:
        x = self._point(x)
        post = self._posterior(x, sigma)
        dot = 2 * self.radius * bessel.ratio(self._order, post.w) * jnp.sum(x * post.c)
        direct = jnp.sum(x * x) + self.radius**2 - dot
        shortfall = self.radius * bessel.complement(self._order, post.k)
        offset = x - self.radius * post.e
        near = jnp.sum(offset * offset) + 2 * shortfall * jnp.sum(x * post.e)
        return jnp.where(post.diffuse, direct, near) / sigma**2

    def log_density(self, x: Array, sigma: ArrayLike) -> Array:
        x = self._point(x)
        post = self._posterior(x, sigma)
        direct = bessel.log_normaliser(self._order, post.w)
        direct -= (jnp.sum(x * x) + self.radius**2) / (2 * sigma**2)
        near = bessel.scaled_log_normaliser(self._order, post.k)
        near -= ((post.length - self.radius) / sigma) ** 2 / 2
        constant = self.ambient_dim * (jnp.log(2 * jnp.pi) / 2 + jnp.log(sigma))
        if self.tilt is not None:
            near += jnp.sum((x + post.lean / 2) * self.tilt) / self.radius
            constant += bessel.log_normaliser(self._order, jnp.sum(self.tilt**2))
        return jnp.where(post.diffuse | post.leaning, direct, near) - constant

    def distance(self, x: Array) -> Array:
        return jnp.abs(norm(self._point(x)) - jnp.asarray(self.radius))

    def sample(self, num: int, *, key: Key) -> Array:
        """`num` independent points of the sphere, (num, dim + 1).

        Uniform: normalised Gaussians.  Tilted: rejection (Ulrich 1984; Wood 1994), exact; at most
        1.6 proposals for each point, on average, at any concentration.
        """
        radius = jnp.asarray(self.radius)
        dtype = jnp.result_type(float, *([radius] if self.tilt is None else [radius, self.tilt]))
        if self.tilt is None:
            normals = jax.random.normal(key, (num, self.dim + 1), dtype)
            return radius * normals / jnp.linalg.norm(normals, axis=-1, keepdims=True)
        tilt, keys = self.tilt.astype(dtype), jax.random.split(key, num)
        return radius * jax.vmap(lambda key: _von_mises_fisher(key, tilt))(keys)


def _von_mises_fisher(key: Key, tilt: Array) -> Array:
    """One unit vector of density proportional to exp(tilt . x) on the sphere.

    The cosine W to the mean direction is drawn by rejection from Ulrich's envelope: with m = n - 1,
    Z ~ Beta(m/2, m/2) and W = (1 - (1 + b) Z) / (1 - (1 - b) Z).  Written in T = 1 - W, which keeps
    its relative precision however concentrated the distribution is.
    """
    m = tilt.size - 1
    kappa = norm(tilt)
    north = jnp.zeros_like(tilt).at[0].set(1)
    mean = jnp.where(kappa > 0, tilt / jnp.where(kappa > 0, kappa, 1), north)
    b = m / (2 * kappa + jnp.sqrt(4 * kappa**2 + m**2))
    gap = 2 * b / (1 + b)  # 1 - W0, with W0 = (1 - b) / (1 + b) the mode of the envelope

    def propose(state: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        key, beta_key, accept_key = jax.random.split(state[0], 3)
        chi_squares = jnp.sum(jax.random.normal(beta_key, (2, m), tilt.dtype) ** 2, axis=1)
        z = chi_squares[0] / jnp.sum(chi_squares)
        fall = 2 * b * z / (1 - (1 - b) * z)
        # log(1 - W0 W) - log(1 - W0^2), with W = 1 - fall.
        envelope = jnp.log((gap + (1 - gap) * fall) / (gap * (2 - gap)))
        log_ratio = kappa * (gap - fall) + m * envelope
        uniform = jax.random.uniform(accept_key, (), tilt.dtype)
        return key, fall, jnp.log(uniform) <= log_ratio

    loop_key, tangent_key = jax.random.split(key)
    start = (loop_key, jnp.zeros((), tilt.dtype), jnp.zeros((), bool))
    _, fall, _ = jax.lax.while_loop(lambda state: ~state[2], propose, start)
    tangent = jax.random.normal(tangent_key, tilt.shape, tilt.dtype)
    tangent -= jnp.sum(tangent * mean) * mean
    tangent /= jnp.maximum(norm(tangent), jnp.finfo(tilt.dtype).tiny)
    point = (1 - fall) * mean + jnp.sqrt(fall * (2 - fall)) * tangent
    return point / norm(point)


def von_mises(loc: ArrayLike, kappa: ArrayLike, radius: ArrayLike = 1.0) -> Sphere:
    """The von Mises distribution on the circle of radius `radius` in the plane.

    Args:
        loc: the angle of its mode, in radians.
        kappa: its concentration; 0 is uniform.
        radius: in data units.

    >>> von_mises(0.0, 2.0)(jnp.zeros(2), 1e3).round(4)   # the mean, I_1(2) / I_0(2) = .6978
    Array([0.6978, 0.    ], dtype=float32)
    """
    return Sphere(1, radius, jnp.asarray(kappa) * jnp.stack([jnp.cos(loc), jnp.sin(loc)]))


def von_mises_with_atom(
    loc: ArrayLike = 0.0, kappa: ArrayLike = 2.0, atom_weight: ArrayLike = 0.5
) -> Mixture:
    """A von Mises distribution on the unit circle with a point mass at the origin.

    Dimension 1 on the circle and 0 at the origin: the toy on which a generative model can be seen
    to memorize rightly (the atom) and wrongly (a training point on the circle).  See Ross et al.
    2024, 2411.00113, section 4.

    Args:
        loc: the angle of the mode, in radians.
        kappa: the concentration.
        atom_weight: the probability of the origin.

    >>> toy = von_mises_with_atom()
    >>> toy.lid(jnp.array([0.0, 0.0])), toy.lid(jnp.array([0.0, 1.0]))
    (Array(0., dtype=float32), Array(1., dtype=float32))
    """
    weight = jnp.asarray(atom_weight, float)
    parts = (von_mises(loc, kappa), LinearGaussian.atom(jnp.zeros(2)))
    return Mixture(parts, jnp.stack([1 - weight, weight]))
