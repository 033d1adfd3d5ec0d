r"""What a condition does to a model at one point: detectors of memorized conditions.

A prompt that is tied to one training image leaves the model no choice, and its answer given the
prompt differs from that without more than another prompt's does.  With D_c and D_0 the denoisers
with and without the condition and J their Jacobians, at one noisy point (x, sigma),

    CFG norm     |D_c - D_0| / sigma  =  |eps_c - eps_0|               Wen et al. 2024, 2407.21720
    score norm   |x - D_c| / sigma    =  |eps_c|                       the baseline
    sharpness    |(J_c - J_0)(D_c - D_0)|^2 / sigma^2                  Jeon et al. 2025, 2412.04140
    anisotropy   cos(s_c - s_0, s_0) at a low noise level, plus |eps_c - eps_0| at a high one, both
                 at the same pure noise

without units: with s = (D - x) / sigma^2 the score and H = (J - I) / sigma^2 its Jacobian,
|s_c - s_0| is the CFG norm over sigma and |(H_c - H_0)(s_c - s_0)|^2 the sharpness over sigma^6.
The norms are of one example: over a batch they would grow with the root of its size.

All are for one example, larger = more memorized; `jax.vmap` or `over_points` for many.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_answer, check_level, check_point

__all__ = ["anisotropy", "cfg_norm", "noise_difference", "score_norm", "sharpness"]


def norm(x: Array) -> Array:
    """The Euclidean norm of all entries, with derivative 0 at 0."""
    return safe_sqrt(jnp.sum(x**2))


def noise_difference(
    conditional: Denoiser, unconditional: Denoiser, x: Array, sigma: Array
) -> Array:
    """(D_c - D_0) / sigma = eps_0 - eps_c, of the shape of x.

    Divided first, so that squares of it do not underflow at a tiny sigma.
    """
    with_condition, without = conditional(x, sigma), unconditional(x, sigma)
    for denoised in (with_condition, without):
        check_answer("a conditional pair", denoised, x)
    return (with_condition - without) / sigma


def cfg_norm(
    conditional: Denoiser, unconditional: Denoiser, x: ArrayLike, sigma: ArrayLike
) -> Array:
    """|eps_c - eps_0|, how far the condition moves the predicted noise (Wen et al. 2024).

    Args:
        conditional: the model with its condition bound.
        unconditional: the model without, `denoiser.condition(None)`.
        x: one noisy point x0 + sigma eps.
        sigma: its noise level, in data units.

    Cost: 2 evaluations.

    Raises:
        TypeError: for an integer `x`.
        ValueError: if `x` has not the denoiser's shape, an answer has not that of `x`, or sigma is
            not positive.

    >>> cfg_norm(lambda x, sigma: 0 * x, lambda x, sigma: x, jnp.array([3.0, 4.0]), 2.0)
    Array(2.5, dtype=float32)
    """
    x, sigma = check_point("cfg_norm", conditional, x, sigma)
    return norm(noise_difference(conditional, unconditional, x, sigma))


def score_norm(denoiser: Denoiser, x: ArrayLike, sigma: ArrayLike) -> Array:
    """|eps_hat| = |x - D(x; sigma)| / sigma, the norm of the predicted noise.

    At a clean point it is the square root of FLIPD's residual: how far the model moves x.

    Args:
        denoiser: the model.
        x: one point, clean or noisy.
        sigma: a noise level, in data units.

    Cost: 1 evaluation.

    Raises:
        TypeError, ValueError: as `cfg_norm`.

    >>> score_norm(lambda x, sigma: 0 * x, jnp.array([3.0, 4.0]), 2.0)
    Array(2.5, dtype=float32)
    """
    x, sigma = check_point("score_norm", denoiser, x, sigma)
    denoised = denoiser(x, sigma)
    check_answer("score_norm", denoised, x)
    return norm((x - denoised) / sigma)


def sharpness(
    conditional: Denoiser, unconditional: Denoiser, x: ArrayLike, sigma: ArrayLike
) -> Array:
    """|(J_c - J_0)(D_c - D_0)|^2 / sigma^2, the sharpness of what the condition adds (Jeon 2025).

    The CFG norm weighted by the curvature along it: near pure noise, where a sampler begins, it
    separates already.  (H_c - H_0)(s_c - s_0), squared, is this over sigma^6.

    Args:
        conditional, unconditional, x, sigma: as for `cfg_norm`.

    Cost: 2 evaluations and 2 JVPs.

    Raises:
        TypeError, ValueError: as `cfg_norm`.

    >>> sharpness(lambda x, sigma: x / 2, lambda x, sigma: x, jnp.array([3.0, 4.0]), 1.0)
    Array(1.5625, dtype=float32)
    """
    x, sigma = check_point("sharpness", conditional, x, sigma)
    difference, along = jax.linearize(
        lambda point: noise_difference(conditional, unconditional, point, sigma), x
    )
    # `along` is (J_c - J_0) / sigma, and the direction is D_c - D_0 = sigma * difference.
    return jnp.sum(along(sigma * difference) ** 2)


def anisotropy(
    conditional: Denoiser,
    unconditional: Denoiser,
    noise: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    spread: ArrayLike = 1.0,
) -> Array:
    """cos(s_c - s_0, s_0) at a low level plus |eps_c - eps_0| at a high one, at pure noise (2026).

    Nothing but the condition is needed: no point, no sampling.  A network sees its pure noise z at
    both times: at the end, where x = high z, and at the start, where x has the spread of the data.
    There it is off the data, and s_0 points back to them; a condition that knows one point pulls
    along.

    Args:
        conditional, unconditional: as for `cfg_norm`.
        noise: z, one draw of N(0, I) of the shape of a point.
        low, high: noise levels, in data units.
        spread: the standard deviation of the data per coordinate; 1 for a variance-preserving model
            in its own units.

    Returns:
        A scalar, the cosine (0 where one of the vectors is 0) plus the norm.

    Cost: 4 evaluations.

    Raises:
        TypeError, ValueError: as `cfg_norm`.

    >>> none, all_ = (lambda x, sigma: 0 * x), (lambda x, sigma: x / 2)
    >>> float(anisotropy(none, all_, jnp.ones(4), 0.1, 1.0))            # cosine 1, norm 1
    2.0
    """
    noise, low = check_point("anisotropy", conditional, noise, low)
    high = check_level("anisotropy", high, noise.dtype)
    start = jnp.asarray(spread, noise.dtype) * noise
    without = unconditional(start, low)
    change = noise_difference(conditional, lambda x, sigma: without, start, low)
    null = (without - start) / low
    product = norm(change) * norm(null)
    cosine = jnp.sum(change * null) / jnp.where(product == 0, 1, product)
    return cosine + norm(noise_difference(conditional, unconditional, high * noise, high))
