r"""Running averages of weights by powers of time, and any other width of them afterwards.

With theta(tau) the weights after tau steps, Karras et al. (2024, 2312.02696, section 3) average

    mean_gamma(t) = (gamma + 1) / t^(gamma + 1) int_0^t tau^gamma theta(tau) dtau,

which forgets the start without a warm-up, and at every t has the same *relative width*

    s^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)),

the standard deviation of the profile over t.  A step updates it with the rate 1 - (1 - 1/t)^(gamma
+ 1).  Two widths kept at a few moments of a run are enough to rebuild any other: the profiles p_i
of the snapshots are a basis, and the coefficients that are nearest to a wanted profile p solve

    sum_j <p_i, p_j> c_j = <p_i, p>,
    <p_a, p_b> = (g_a + 1) (g_b + 1) (t_a / t_b)^g_b / ((g_a + g_b + 1) t_b),    t_a <= t_b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.typing import Array, ArrayLike

__all__ = [
    "WIDEST_PROFILE",
    "average_rate",
    "exponent",
    "halving_rate",
    "profile_coefficients",
    "reconstruct",
]

# gamma = 0, the plain mean of all weights.
WIDEST_PROFILE = 1 / math.sqrt(12)


def exponent(width: float) -> float:
    """gamma of a relative width, between 0 and 1 / sqrt(12) = .2887.

    Raises:
        ValueError: if the width is out of this range.

    >>> round(exponent(0.05), 2), round(exponent(0.10), 2)      # of the EDM2 models
    (16.97, 6.94)
    """
    if not 0 < width <= WIDEST_PROFILE:
        raise ValueError(
            f"the relative width {width!r} of an average must lie between 0 and "
            f"{WIDEST_PROFILE:.4f}, that of the plain mean."
        )
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(float(roots[np.argmax(roots.real)].real), 0.0)


def average_rate(step: ArrayLike, gamma: float) -> Array:
    """The share of the new weights in the average after step `step`, counted from 1.

    >>> float(average_rate(1, 6.94)), round(float(average_rate(4, 0.0)), 6)
    (1.0, 0.25)
    """
    # Without cancellation: after a million steps the rate is a few roundings of 1.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.asarray(step, float)))


def halving_rate(step: ArrayLike, half_life: float) -> Array:
    """The share of the new weights in an average of a half-life, at step `step`, counted from 0.

    At first it is larger, 9 / (10 + step), so that a short run does not keep its random start,
    which after n steps weighs at most (10 / (10 + n))^9.

    >>> round(float(halving_rate(0, 500.0)), 6), round(float(halving_rate(1_000_000, 1.0)), 6)
    (0.9, 0.5)
    """
    return jnp.maximum(1 - 0.5 ** (1 / half_life), 9 / (10 + jnp.asarray(step, float)))


def _products(gammas_a: Any, steps_a: Any, gammas_b: Any, steps_b: Any) -> np.ndarray:
    """<p_a, p_b> for every pair, (A, B)."""
    ga, ta = np.asarray(gammas_a)[:, None], np.asarray(steps_a, float)[:, None]
    gb, tb = np.asarray(gammas_b)[None, :], np.asarray(steps_b, float)[None, :]
    late = np.maximum(ta, tb)
    ratio = (np.minimum(ta, tb) / late) ** np.where(ta <= tb, gb, ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * late)


def profile_coefficients(
    steps: Sequence[int], widths: Sequence[float], *, step: int, width: float
) -> np.ndarray:
    """The combination of snapshots that is nearest to the average of another width.

    Args:
        steps: when each snapshot was taken, (S,), counted from 1.
        widths: the relative width of each, (S,).
        step: when the wanted average ends, at most the last of `steps`.
        width: its relative width.

    Returns:
        (S,) float64, with sum 1 up to the error of the approximation.

    Raises:
        ValueError: if steps and widths do not match, or `step` is beyond the last snapshot.

    >>> abs(profile_coefficients([50, 100], [0.1, 0.1], step=100, width=0.1)).round(6).tolist()
    [0.0, 1.0]
    """
    if len(steps) != len(widths) or not len(steps):
        raise ValueError(
            f"`profile_coefficients(steps=..., widths=...)` have {len(steps)} and {len(widths)} "
            "entries; pass one step and one width for each snapshot, at least one."
        )
    if step > max(steps) or min(steps) < 1 or step < 1:
        raise ValueError(
            f"`profile_coefficients(step={step})` must lie between 1 and the last snapshot, "
            f"{max(steps)}; the future is not known."
        )
    gammas = np.array([exponent(width) for width in widths])
    gram = _products(gammas, steps, gammas, steps)
    wanted = _products(gammas, steps, [exponent(width)], [step])[:, 0]
    # Snapshots close in time are nearly the same vector.
    return np.linalg.lstsq(gram, wanted, rcond=1e-13)[0]


def reconstruct(
    averages: Iterable[Any], steps: Sequence[int], widths: Sequence[float], *, step: int,
    width: float,
) -> Any:  # fmt: skip
    """The average of another relative width, from snapshots of averages.

    Args:
        averages: pytrees of weights, one for each snapshot; read one at a time.
        steps, widths, step, width: as in `profile_coefficients`.

    Returns:
        A pytree like each of `averages`.

    >>> reconstruct([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], [5, 10], [0.1, 0.1], step=10,
    ...             width=0.1)["w"].round(3).tolist()
    [1.0, 1.0]
    """
    found = profile_coefficients(steps, widths, step=step, width=width)

    total, like = None, None
    for coefficient, average in zip(found, averages, strict=True):
        part = jax.tree.map(lambda leaf, c=coefficient: c * np.asarray(leaf, np.float64), average)
        total = part if total is None else jax.tree.map(np.add, total, part)
        like = average
    return jax.tree.map(lambda leaf, old: jnp.asarray(leaf, jnp.result_type(old)), total, like)
