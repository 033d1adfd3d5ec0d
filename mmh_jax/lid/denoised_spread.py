r"""The spread of denoised points as a dimension: how much of the noise a denoiser lets through.

Around x a denoiser keeps the noise in tangent directions and removes it in normal ones, so that

    V(x; sigma) = E_z |D(x + sigma z) - E_z D(x + sigma z)|^2 / sigma^2

tends to the dimension as sigma -> 0.  For a Gaussian of variances l_i it is the sum of g_i^2, with
g_i = l_i / (l_i + sigma^2) the eigenvalues of the Jacobian; in general it lies between |E J|_F^2
and E |J|_F^2 (the Gaussian Poincare inequality).  It is the denoising loss (Yeats et al. 2025,
2510.12975) without the part that moves all answers alike, (1 - g)^2 |x - mean|^2 / sigma^2: the
distance of x itself from where the model puts it says nothing of a dimension.

The loss itself, R = E_z |D(x + sigma z) - x|^2 / sigma^2, is small where what comes back is x; V,
where it is one point at all.  The geometric mean of both asks for both: of 64 draws it tells copies
among the samples of an overfitted model better than either.

The Jacobian of a trained network has details finer than sigma, which a trace adds up and answers
to whole steps of noise average out.  Where a model has memorized a point all steps lead back to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmh_jax.linalg.operator import check_positive, in_chunks, mean_and_stderr
from mmh_jax.typing import (
    Array,
    ArrayLike,
    Denoiser,
    Estimate,
    Key,
    check_answer,
    check_key,
    check_point,
)

__all__ = ["Returned", "denoised_return", "denoised_spread", "geometric_mean"]


class Returned(NamedTuple):
    """What came back of one step of noise; see `denoised_return`.

    Attributes:
        dimension: R, the denoising loss, an `Estimate`.
        spread: V, an `Estimate`.
    """

    dimension: Estimate
    spread: Estimate

    @property
    def mean(self) -> Estimate:
        """The geometric mean of both; its error is an upper bound, that of perfect correlation."""
        return geometric_mean(*self)


def geometric_mean(one: Estimate, other: Estimate) -> Estimate:
    """Of two estimates from the same draws, 0 where one is; with an upper bound of its error.

    >>> found = geometric_mean(Estimate(4.0, 0.4), Estimate(1.0, 0.1))
    >>> float(found.value), round(float(found.stderr), 6)
    (2.0, 0.2)
    """
    value = jnp.sqrt(one.value * other.value)
    parts: Any = one.stderr / one.value + other.stderr / other.value
    return Estimate(value, jnp.where(value == 0, 0.0, value * parts / 2))


def denoised_return(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_samples: int = 64,
    chunk_size: int = 32,
) -> Returned:
    """The denoising loss at a point and the spread of the denoised, from the same draws.

    Args:
        denoiser, x, sigma, key, num_samples, chunk_size: as for `denoised_spread`; with this key
            they are that spread, and `denoising_loss(ratio=None)`.

    Cost: K evaluations.

    Raises:
        TypeError, ValueError: as `denoised_spread`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> found = denoised_return(line, jnp.zeros(3), 0.1, key=jax.random.key(0), num_samples=4096)
    >>> bool(abs(found.mean.value - 1) < 3 * found.mean.stderr)
    True
    """
    x, sigma = check_point("denoised_return", denoiser, x, sigma)
    key = check_key("denoised_return", key)
    check_positive("denoised_return", "num_samples", num_samples, least=2)
    check_positive("denoised_return", "chunk_size", chunk_size)

    def draw(sample_key: Key) -> Array:
        denoised = denoiser(x + sigma * jax.random.normal(sample_key, x.shape, x.dtype), sigma)
        check_answer("denoised_return", denoised, x)
        return denoised

    denoised = in_chunks(draw, jax.random.split(key, num_samples), chunk_size)

    def squares(center: Array) -> Array:
        away = (denoised - center).reshape(num_samples, -1) / sigma
        return jnp.sum(away**2, axis=1)

    spread = squares(jnp.mean(denoised, axis=0)) * num_samples / (num_samples - 1)
    return Returned(mean_and_stderr(squares(x)), mean_and_stderr(spread))


def denoised_spread(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_samples: int = 64,
    chunk_size: int = 32,
) -> Estimate:
    """The variance of the denoised over the noise around x, in units of sigma^2.

    Prefer FLIPD for a dimension: its bias is smaller.  This one is for comparing points, or models
    at a point: no derivatives, and less disturbed by the fine structure of a network.

    Args:
        denoiser: the model.
        x: one point, of any shape.
        sigma: the noise level, in data units.
        key: draws the noise.
        num_samples: K draws of noise, at least 2.
        chunk_size: evaluated at once.

    Returns:
        `Estimate(value, stderr)`, from 0 for a point that has been memorized to about D.

    Cost: K evaluations, and K points of memory.  Bias: none for V; V less the dimension is
    O(sigma^2), -2 sigma^2 sum 1 / l_i for a Gaussian.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> spread = denoised_spread(line, jnp.zeros(3), 0.1, key=jax.random.key(0), num_samples=4096)
    >>> bool(abs(spread.value - 1) < 3 * spread.stderr)
    True
    """
    return denoised_return(
        denoiser, x, sigma, key=key, num_samples=num_samples, chunk_size=chunk_size
    ).spread
