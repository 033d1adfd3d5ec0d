r"""Counting in a spectrum: of a denoiser's Jacobian, or of a normal bundle.

    rank_by_threshold   #{l_i > threshold}
    rank_by_gap         the i with the largest ratio l_i / l_{i+1}
    participation_ratio (sum l_i)^2 / sum l_i^2
    soft_rank           sum_i 1 / (1 + (|1 - l_i| / c)^p)      (smooth; LHSD 2026)

Of the singular values of a normal bundle they count the normal directions.  A spectrum with NaN
has no count: the two whole numbers are -1, the two smooth ones NaN.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from mmh_jax import linalg
from mmh_jax.lid.flipd import linearized
from mmh_jax.typing import Array, ArrayLike, ChiSquareEstimate, Denoiser, Estimate, Key, check_point

__all__ = [
    "counted",
    "participation_ratio",
    "rank_by_gap",
    "rank_by_largest_difference",
    "rank_by_threshold",
    "soft_rank",
    "soft_rank_lanczos",
]


def rank_by_threshold(spectrum: ArrayLike, threshold: float = 0.5) -> Array:
    """How many values exceed the threshold.

    One half separates the eigenvalues l / (l + sigma^2) of directions wider than sigma from those
    of narrower ones.

    >>> rank_by_threshold(jnp.array([0.99, 0.9, 0.1, 0.0]))
    Array(2, dtype=int32)
    """
    values = jnp.asarray(spectrum)
    return counted(values, jnp.sum(values > threshold, axis=-1))


def rank_by_largest_difference(spectrum: ArrayLike) -> Array:
    """Where the spectrum, largest first, falls most; the rule of 2212.12611 for normal bundles.

    Never 0, nor the whole spectrum: `rank_by_threshold` can say both.

    >>> rank_by_largest_difference(jnp.array([1.1, 0.9, 0.2, 0.1]))
    Array(2, dtype=int32)
    """
    values = jnp.asarray(spectrum)
    return counted(values, 1 + jnp.argmax(values[..., :-1] - values[..., 1:], axis=-1))


def rank_by_gap(spectrum: ArrayLike, *, floor: float = 1e-2, ceiling: float | None = None) -> Array:
    """Where the spectrum, largest first, falls by the largest factor.

    Ratios, not differences: a gap from 1 to .5 between two tangents must not beat one from .5 to
    .01.  Values below `floor` times the largest count as that floor, so that no gap is found in the
    noise of the tail, and a spectrum that never falls has full rank.

    Args:
        spectrum: (..., D), largest first.
        floor: relative to the largest value (or to `ceiling`).
        ceiling: a value known to be reached by significant directions (1 for a denoiser's
            Jacobian).  With it rank 0 is possible: a spectrum far below it has no tangents.

    >>> rank_by_gap(jnp.array([0.99, 0.7, 0.02, 0.0]))
    Array(2, dtype=int32)
    >>> rank_by_gap(jnp.array([0.03, 0.02, 0.02]), ceiling=1.0)
    Array(0, dtype=int32)
    """
    values = jnp.asarray(spectrum, float)
    top = values[..., :1] if ceiling is None else jnp.full_like(values[..., :1], ceiling)
    least = floor * top
    inner = jnp.maximum(values, least)
    start = inner[..., :1] if ceiling is None else jnp.maximum(top, inner[..., :1])
    levels = jnp.log(jnp.concatenate([start, inner, least], axis=-1))
    return counted(values, jnp.argmax(levels[..., :-1] - levels[..., 1:], axis=-1))


def counted(values: Array, count: Array) -> Array:
    """The count, or -1 if one of the values (last axis) is NaN."""
    return jnp.where(jnp.any(jnp.isnan(values), axis=-1), -1, count)


def soft_rank(spectrum: ArrayLike, *, width: float = 0.2, power: float = 4.0) -> Array:
    """A smooth count of the eigenvalues near 1: sum 1 / (1 + (|1 - l| / width)^power).

    With H = (J - I) / sigma^2 the Hessian of log rho_sigma this is tr f(H) with
    f(h) = 1 / (1 + (|h| sigma^2 / width)^power) of LHSD (2026).  An eigenvalue 0 still counts
    width^power / (1 + width^power), .0016 by default; keep that times D in mind.

    >>> round(float(soft_rank(jnp.array([1.0, 0.8, 0.0]))), 3)
    1.502
    """
    return jnp.sum(_soft_indicator(jnp.asarray(spectrum), width, power), axis=-1)


def _soft_indicator(eigenvalues: Array, width: float, power: float) -> Array:
    return 1 / (1 + (jnp.abs(1 - eigenvalues) / width) ** power)


def soft_rank_lanczos(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_probes: int = 8,
    order: int = 16,
    width: float = 0.2,
    power: float = 4.0,
) -> ChiSquareEstimate | Estimate:
    """`soft_rank` of the symmetrised Jacobian without forming it, by Lanczos quadrature.

    For images and latents, where `jacobian_spectrum` is too large (LHSD 2026).

    Args:
        denoiser, x, sigma: as in `flipd`.
        key: draws the probes.
        num_probes, order: of `linalg.function_lanczos`.
        width, power: of `soft_rank`.

    Returns:
        `ChiSquareEstimate`; the error is that of the probes, about sqrt(2 d / num_probes).

    Cost: `num_probes * order` JVPs and as many VJPs; `order * D` numbers for each of 4 probes.

    Raises:
        TypeError, ValueError: as `flipd`.

    >>> import jax
    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> soft_rank_lanczos(line, jnp.zeros(3), 0.1, key=jax.random.key(0)).value.round(2)
    Array(1., dtype=float32)
    """
    x, sigma = check_point("soft_rank_lanczos", denoiser, x, sigma)
    _, matvec = linearized("soft_rank_lanczos", denoiser, x, sigma)
    indicator = functools.partial(_soft_indicator, width=width, power=power)
    return linalg.function_lanczos(indicator, num_probes, order)(matvec, x, key=key)


def participation_ratio(spectrum: ArrayLike) -> Array:
    """(sum l)^2 / sum l^2 over the positive values: d for d equal values, less for unequal ones.

    A smooth count that needs neither threshold nor scale; it undercounts unequal directions, and
    reads a spectrum of noise alone as a large dimension.  0 where no value is positive.

    >>> participation_ratio(jnp.array([1.0, 1.0, 0.0, -0.1]))
    Array(2., dtype=float32)
    """
    values = jnp.maximum(jnp.asarray(spectrum), 0)
    squares = jnp.sum(values**2, axis=-1)
    return jnp.sum(values, axis=-1) ** 2 / jnp.where(squares > 0, squares, 1)
