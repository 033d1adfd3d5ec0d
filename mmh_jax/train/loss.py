r"""The denoising loss, and how noise levels are drawn.

    L = E_{x0, eps, sigma} w(sigma) |D(x0 + sigma eps; sigma) - x0|^2 / D

with Karras' weight w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (2206.00364, table 1), which
gives the raw network of an EDM-preconditioned denoiser a target of unit variance at every level.
Its minimiser over all functions is the exact denoiser of the data, whatever the weight and the law
of sigma; these decide where a finite network is good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from mmh_jax.noise import Schedule
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key

__all__ = [
    "NoiseLevels",
    "Weight",
    "denoising_loss",
    "edm_weight",
    "log_normal",
    "log_uniform",
    "min_snr_weight",
    "noise_weight",
    "symmetry_loss",
    "uniform_time",
]

Weight: TypeAlias = Callable[[Array, float], Array]
"""`weight(sigma, sigma_data)` of the squared error of the clean point; hashable."""


class NoiseLevels(Protocol):
    """A law of noise levels."""

    def __call__(self, num: int, *, key: Key) -> Array:
        """`num` noise levels."""
        ...


def _stratified(num: int, key: Key) -> Array:
    """`num` uniforms on (0, 1), one in each of `num` equal strata: each is uniform by itself, and
    their mean has far less variance than that of independent ones."""
    offset = jax.random.uniform(key, (num,), minval=jnp.finfo(float).eps)
    # Of a large batch the last may round to 1, where the normal law has no finite value.
    return jnp.minimum((jnp.arange(num) + offset) / num, 1 - jnp.finfo(offset.dtype).epsneg)


@dataclasses.dataclass(frozen=True)
class log_uniform:  # noqa: N801 (a strategy value, read as a verb)
    """log sigma uniform between the logarithms of two noise levels; stratified over a batch."""

    low: float
    high: float

    def __call__(self, num: int, *, key: Key) -> Array:
        """`num` noise levels."""
        uniform = _stratified(num, key)
        return jnp.exp(jnp.log(self.low) + uniform * jnp.log(self.high / self.low))


@dataclasses.dataclass(frozen=True)
class log_normal:  # noqa: N801
    """log sigma normal (Karras et al. 2022: mean -1.2, std 1.2); stratified over a batch."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, num: int, *, key: Key) -> Array:
        """`num` noise levels."""
        normal = jax.scipy.special.ndtri(_stratified(num, key))
        return jnp.exp(self.mean + self.std * normal)


@dataclasses.dataclass(frozen=True)
class uniform_time:  # noqa: N801
    """sigma of a schedule at times uniform between two; stratified over a batch.

    With `noise_weight` this is the objective of VP models (Ho et al. 2020, 2006.11239, eq. 14; Song
    et al. 2021, 2011.13456).
    """

    schedule: Schedule
    low: float
    high: float

    def __call__(self, num: int, *, key: Key) -> Array:
        """`num` noise levels."""
        return self.schedule.sigma(self.low + (self.high - self.low) * _stratified(num, key))


def edm_weight(sigma: ArrayLike, sigma_data: float) -> Array:
    """w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    >>> edm_weight(1.0, 1.0)
    Array(2., dtype=float32, weak_type=True)
    """
    sigma = jnp.asarray(sigma)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def noise_weight(sigma: ArrayLike, sigma_data: float) -> Array:
    """w(sigma) = 1 / sigma^2: the squared error of the noise, for x = x0 + sigma eps.

    >>> noise_weight(0.5, 1.0)
    Array(4., dtype=float32, weak_type=True)
    """
    return 1 / jnp.asarray(sigma) ** 2


@dataclasses.dataclass(frozen=True)
class min_snr_weight:  # noqa: N801
    """w(sigma) = min(1 / sigma^2, gamma) of the clean point (Hang et al. 2023, 2303.09556).

    >>> min_snr_weight(5.0)(0.1, 1.0)
    Array(5., dtype=float32, weak_type=True)
    """

    gamma: float = 5.0

    def __call__(self, sigma: ArrayLike, sigma_data: float) -> Array:
        """The weight, with the signal-to-noise ratio of data of standard deviation 1."""
        return jnp.minimum(1 / jnp.asarray(sigma) ** 2, self.gamma)


def denoising_loss(
    denoiser: Denoiser | Any,
    x0: Array,
    sigma: Array,
    sigma_data: float,
    *,
    key: Key,
    weight: Weight = edm_weight,
) -> Array:
    """The weighted squared error of one noisy copy of one clean point, averaged over coordinates.

    Args:
        denoiser: the model.
        x0: a clean point.
        sigma: the noise level.
        sigma_data: the standard deviation of the data, for the weight.
        key: draws the noise.
        weight: of the squared error.
    """
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    error = denoiser(x0 + sigma * noise, sigma) - x0
    return weight(sigma, sigma_data) * jnp.mean(error**2)


def symmetry_loss(
    denoiser: Denoiser | Any, x0: Array, sigma: Array, sigma_data: float, *, key: Key
) -> Array:
    """The weighted mean square of (J - J^T) v / 2, J the Jacobian at a noisy copy of a clean point.

    Zero for a denoiser that is a gradient, as the exact one is.  With v of random signs it is an
    unbiased estimate of the squared Frobenius norm of the skew part, over D.  Times
    `edm_weight * sigma_data^2`, so that the raw network of an EDM-preconditioned denoiser is held
    to the same symmetry at every noise level.

    Args:
        denoiser, x0, sigma, sigma_data: as in `denoising_loss`.
        key: draws the noise and v.

    >>> turn = lambda x, sigma: jnp.array([-x[1], x[0]])
    >>> float(symmetry_loss(turn, jnp.ones(2), 1.0, 1.0, key=jax.random.key(0)))
    2.0
    """
    noise_key, probe_key = jax.random.split(key)
    x = x0 + sigma * jax.random.normal(noise_key, x0.shape, x0.dtype)
    probe = jax.random.rademacher(probe_key, x0.shape, x0.dtype)

    def at(point: Array) -> Array:
        return denoiser(point, sigma)

    forward = jax.jvp(at, (x,), (probe,))[1]
    backward = jax.vjp(at, x)[1](probe)[0]
    weight = edm_weight(sigma, sigma_data) * sigma_data**2
    return weight * jnp.mean((forward - backward) ** 2) / 4
