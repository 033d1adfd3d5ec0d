r"""The denoising loss as a dimension: no derivatives at all.

A denoiser removes the noise in normal directions and cannot in tangent ones, so that around x

    L(x; sigma) = E_eps |eps_hat(x + sigma eps) - eps|^2 = E_eps |D(x + sigma eps) - x|^2 / sigma^2

tends to the dimension as sigma -> 0 (Yeats et al. 2025, 2510.12975).  For a Gaussian of variances
l_i it is sum_i [l_i / (l_i + sigma^2)]^2 (1 + sigma^2 y_i^2 / l_i^2): a bias of first order in
sigma^2, like FLIPD's and in general larger, which a second scale removes.
"""

from __future__ import annotations

import jax

from mmh_jax.lid.flipd import squared_residual
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

__all__ = ["denoising_loss"]


def denoising_loss(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_samples: int = 64,
    ratio: float | None = 2.0,
    chunk_size: int = 32,
) -> Estimate:
    """The mean squared error of the noise prediction around x, extrapolated to sigma = 0.

    Prefer FLIPD where derivatives are to be had: the trace of the Jacobian has less variance for
    the same number of evaluations.  This one works with a model behind an interface.

    Args:
        denoiser: the model.
        x: one point, of any shape.
        sigma: the (smaller) noise level, in data units.
        key: draws the noise.
        num_samples: K draws of noise.
        ratio: r: the loss is taken at sigma and r sigma with the same noise, and the first order
            removed, [r^2 L(sigma) - L(r sigma)] / (r^2 - 1).  None gives the plain L(sigma).
        chunk_size: evaluated at once.

    Returns:
        `Estimate(value, stderr)`; noise of standard deviation about sqrt(2 d / K).

    Cost: K evaluations, 2 K with the correction.  Bias: O(sigma^2), O(sigma^4) with it.

    Raises:
        TypeError, ValueError: as `flipd`; or if `ratio` is not above 1.

    >>> import jax.numpy as jnp
    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> loss = denoising_loss(line, jnp.zeros(3), 0.1, key=jax.random.key(0), num_samples=4096)
    >>> bool(abs(loss.value - 1) < 3 * loss.stderr)
    True
    """
    x, sigma = check_point("denoising_loss", denoiser, x, sigma)
    key = check_key("denoising_loss", key)
    check_positive("denoising_loss", "num_samples", num_samples)
    check_positive("denoising_loss", "chunk_size", chunk_size)
    if ratio is not None and not ratio > 1:
        raise ValueError(f"`denoising_loss(ratio={ratio})` must be above 1, or None.")

    def at(level: Array, noise: Array) -> Array:
        denoised = denoiser(x + level * noise, level)
        check_answer("denoising_loss", denoised, x)
        return squared_residual(x, denoised, level)

    def draw(sample_key: Key) -> Array:
        noise = jax.random.normal(sample_key, x.shape, x.dtype)
        if ratio is None:
            return at(sigma, noise)
        return (ratio**2 * at(sigma, noise) - at(ratio * sigma, noise)) / (ratio**2 - 1)

    return mean_and_stderr(in_chunks(draw, jax.random.split(key, num_samples), chunk_size))
