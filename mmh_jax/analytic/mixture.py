r"""Mixtures: several distributions, of several dimensions, in one.

With weights w_k and the responsibilities r_k = w_k rho_k(x) / sum_j w_j rho_j(x) at level sigma,

    D = sum_k r_k D_k,      F = sum_k r_k F_k,      rho_sigma = sum_k w_k rho_k,

exactly: D and F are posterior expectations, and r_k is the posterior probability of component k.
"""

# ruff: noqa: D102 -- a method that overrides one of `Distribution` is documented there.

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.analytic.base import Distribution, floating, is_concrete, support_tolerance
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Mixture"]


@struct.dataclass
class Mixture(Distribution):
    """sum_k weights_k components_k.

    Cost of every method: the sum of the components'.

    Attributes:
        components: K exact denoisers of this package over points of the same shape.
        weights: (K,), not negative; divided by their sum.

    Raises:
        ValueError: if there are no components, their shapes differ, or the weights are not K
            numbers of which none is negative and one is positive.

    >>> from mmh_jax.analytic import LinearGaussian
    >>> two = Mixture((LinearGaussian.atom([-1.0]), LinearGaussian.atom([1.0])), [0.5, 0.5])
    >>> two(jnp.array([0.5]), 1.0).round(4), jnp.tanh(0.5).round(4)
    (Array([0.4621], dtype=float32), Array(0.4621, dtype=float32, weak_type=True))
    >>> two.lid(jnp.array([1.0])), two.lid(jnp.array([0.9]))
    (Array(0., dtype=float32), Array(nan, dtype=float32))
    """

    components: tuple[Any, ...]
    weights: Array

    def _check(self) -> dict[str, Any]:
        components = tuple(self.components)
        shapes = {tuple(component.shape) for component in components}
        if len(shapes) != 1:
            raise ValueError(
                f"`Mixture(components=...)` has points of shapes {sorted(shapes)}; a mixture needs "
                "at least one component, and points of one shape."
            )
        weights = floating("Mixture(weights", self.weights, 1, "a vector (K,)")
        if weights.size != len(components):
            raise ValueError(
                f"`Mixture(weights=...)` has {weights.size} entries for {len(components)} "
                "components; give one weight for each."
            )
        if is_concrete(weights):
            values = np.asarray(weights)
            if not (np.all(np.isfinite(values)) and np.all(values >= 0) and np.any(values > 0)):
                raise ValueError(
                    f"`Mixture(weights={values})` must be finite, not negative, and not all 0."
                )
        return {"components": components, "weights": weights}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.components[0].shape)

    def log_joint(self, x: Array, sigma: ArrayLike) -> Array:
        """log w_k rho_k(x), (K,): a component's share of the smoothed density."""
        log_densities = jnp.stack([part.log_density(x, sigma) for part in self.components])
        return jnp.log(self.weights / jnp.sum(self.weights)) + log_densities

    def responsibilities(self, x: Array, sigma: ArrayLike) -> Array:
        """P(component k | x) at noise level `sigma`, (K,)."""
        return jax.nn.softmax(self.log_joint(x, sigma))

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        x = self._point(x)
        shares = self.responsibilities(x, sigma)
        # Summed as displacements from x, so that rounding is relative to |D - x|, not to |D|.
        moves = jnp.stack([component(x, sigma) - x for component in self.components])
        return x + jnp.tensordot(shares, moves, axes=1, precision=jax.lax.Precision.HIGHEST)

    def log_density(self, x: Array, sigma: ArrayLike) -> Array:
        return jax.nn.logsumexp(self.log_joint(self._point(x), sigma))

    def flipd(self, x: Array, sigma: ArrayLike) -> Array:
        x = self._point(x)
        values = jnp.stack([component.flipd(x, sigma) for component in self.components])
        return jnp.sum(self.responsibilities(x, sigma) * values)

    def distance(self, x: Array) -> Array:
        distances = jnp.stack([component.distance(x) for component in self.components])
        return jnp.min(jnp.where(self.weights > 0, distances, jnp.inf))

    def lid(self, x: Array, *, tolerance: ArrayLike | None = None) -> Array:
        """The smallest dimension among the components whose support contains `x`; else NaN.

        Args:
            x: one point.
            tolerance: as for `Distribution.lid`.
        """
        x = self._point(x)
        # On the support of component k, rho_k grows as sigma^(d_k - D).  As sigma -> 0 the
        # smallest exponent takes all of the responsibility, and so F -> d_k.
        tolerance = support_tolerance(x, tolerance)
        dims = jnp.stack([part.lid(x, tolerance=tolerance) for part in self.components])
        return jnp.nanmin(jnp.where(self.weights > 0, dims, jnp.nan))

    def sample(self, num: int, *, key: Key) -> Array:
        choice_key, *keys = jax.random.split(key, len(self.components) + 1)
        choice = jax.random.categorical(choice_key, jnp.log(self.weights), shape=(num,))
        draws = [
            component.sample(num, key=part_key)
            for component, part_key in zip(self.components, keys, strict=True)
        ]
        index = choice.reshape(num, *(1,) * len(self.shape))
        return jnp.select([index == k for k in range(len(draws))], draws)
