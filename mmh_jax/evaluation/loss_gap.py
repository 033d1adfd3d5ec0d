r"""The denoising loss on training and on held-out points: where in scale a model has memorized.

At noise level sigma a denoiser errs at a point x0 by

    L(x0; sigma) = E_eps |D(x0 + sigma eps; sigma) - x0|^2 / sigma^2,

the squared error of its noise prediction, in units of dimensions: for points of the law that it has
learned the mean of L tends to the dimension as sigma -> 0.  The exact denoiser of N(m, S), S of
eigenvalues l_i, has the mean sum_i l_i / (l_i + sigma^2).

A model that has learned the law errs alike on points that it was trained on and on others.  The
exact denoiser of a *data set* does not: below the distance of its points it returns the nearest of
them, so that L is 0 at them and |x - nearest|^2 / sigma^2 elsewhere.  The gap

    G(sigma) = mean L(held out) - mean L(trained)

says at which scales a model is nearer to the second than to the first.  Its standard error has that
of both means, as the two sets are drawn independently.  Two models, or two times in a training, are
compared on the same points with the same noise: the difference point by point has far less spread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import lid
from mmh_jax.linalg.operator import check_positive, t_factor
from mmh_jax.mapping import Progress, over_points
from mmh_jax.typing import Array, ArrayLike, Denoiser, Estimate, Key, check_key, check_level

__all__ = ["LossCurve", "loss_curve", "loss_gap", "paired_difference"]


class LossCurve(NamedTuple):
    """The denoising loss of one set of points over noise levels.

    Attributes:
        sigmas: (S,), in data units.
        losses: (N, S), of each point, averaged over its draws of noise; in units of dimensions.
        value: (S,), their mean.
        stderr: (S,), its standard error over points and noise.
    """

    sigmas: Any
    losses: Any
    value: Any
    stderr: Any


def loss_curve(
    denoiser: Denoiser,
    points: ArrayLike,
    sigmas: ArrayLike,
    *,
    key: Key,
    num_noises: int = 16,
    chunk_size: int = 64,
    progress: Progress | None = None,
) -> LossCurve:
    """The denoising loss at every point and noise level, with the same noise at all levels.

    The noise of a point is a function of the key and the point's position: with one key, point i of
    two sets, and of two models, has the same noise.

    Args:
        denoiser: the model, in data units.
        points: (N, *shape), at least 2.
        sigmas: (S,), noise levels in data units.
        key: draws the noise.
        num_noises: K draws for each point.
        chunk_size: points at once; it does not change the result.
        progress: called as `progress(done, total)` after each chunk.

    Returns:
        `LossCurve` of NumPy arrays.

    Cost: N S K evaluations.  No bias.

    Raises:
        TypeError: if `key` is not a typed key, or the points are not of a floating dtype.
        ValueError: if a level is not positive, the points have not the denoiser's shape, or there
            are fewer than 2.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> points = jnp.zeros((200, 3)).at[:, 0].set(jnp.linspace(-1.0, 1.0, 200))
    >>> curve = loss_curve(line, points, jnp.array([0.1, 1.0]), key=jax.random.key(0))
    >>> bool(np.all(abs(curve.value - 1) < 3 * curve.stderr))
    True
    """
    key = check_key("loss_curve", key)
    check_positive("loss_curve", "num_noises", num_noises)
    points = jnp.asarray(points)
    if points.ndim < 2 or len(points) < 2:
        raise ValueError(
            f"`loss_curve(points=...)` has shape {points.shape}; it takes (N, *shape) with at "
            "least 2 points. For one point, `lid.denoising_loss`."
        )
    levels = check_level("loss_curve", sigmas, points.dtype)
    if levels.ndim != 1:
        raise ValueError(
            f"`loss_curve(sigmas=...)` has shape {levels.shape}; it takes a vector of noise levels."
        )

    losses = _losses_of(denoiser, num_noises, chunk_size)(
        levels, points, key=key, progress=progress
    )
    return LossCurve(np.asarray(levels), losses, *_mean(losses))


def loss_gap(trained: LossCurve, held_out: LossCurve) -> Estimate:
    """Held-out loss less training loss at each noise level; the two sets are independent.

    Args:
        trained: of points that the model was trained on.
        held_out: of points of the same law that it was not trained on, of any number.

    Returns:
        `Estimate(value, stderr)` of (S,) arrays, in units of dimensions.  Positive: the model knows
        its training points.

    Raises:
        ValueError: if the curves are not of the same noise levels.

    >>> points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    >>> from mmh_jax import analytic
    >>> model = analytic.Empirical(jnp.asarray(points[:20]))
    >>> trained = loss_curve(model, points[:20], [0.1], key=jax.random.key(0))
    >>> gap = loss_gap(trained, loss_curve(model, points[20:], [0.1], key=jax.random.key(1)))
    >>> bool(gap.value[0] > 3 * gap.stderr[0])
    True
    """
    _check_levels("loss_gap", trained, held_out)
    return Estimate(held_out.value - trained.value, np.hypot(trained.stderr, held_out.stderr))


def paired_difference(first: LossCurve, second: LossCurve) -> Estimate:
    """The second loss less the first at each noise level, of the same points with the same noise.

    For two models, two checkpoints of one, or a point and its counterpart (an edited copy).  What
    the points share drops out of the standard error.

    Args:
        first, second: from `loss_curve` with the same key, noise levels and `num_noises`, and as
            many points.

    Returns:
        `Estimate(value, stderr)` of (S,) arrays, in units of dimensions.

    Raises:
        ValueError: if the curves differ in their levels or their number of points.
    """
    _check_levels("paired_difference", first, second)
    if np.shape(first.losses) != np.shape(second.losses):
        raise ValueError(
            f"`paired_difference` got {len(first.losses)} and {len(second.losses)} points; pairs "
            "are of the same points. For two independent sets, `loss_gap`."
        )
    return Estimate(*_mean(np.asarray(second.losses) - np.asarray(first.losses)))


def _losses_of(denoiser: Denoiser, num_noises: int, chunk_size: int) -> Callable[..., Any]:
    """`mapped(levels, points)`; what is compiled for a pytree is kept for others of its shape."""
    if all(eqx.is_array_like(leaf) for leaf in jax.tree.leaves(denoiser)):
        return functools.partial(_losses_of_any(num_noises, chunk_size), denoiser)
    at_point = functools.partial(_at_point, num_noises, denoiser)
    return over_points(at_point, (None, 0), chunk_size=chunk_size)


@functools.cache
def _losses_of_any(num_noises: int, chunk_size: int) -> Callable[..., Any]:
    at_point = functools.partial(_at_point, num_noises)
    return over_points(at_point, (None, None, 0), chunk_size=chunk_size)


def _at_point(num_noises: int, denoiser: Denoiser, levels: Array, x: Array, *, key: Key) -> Array:
    def at_level(sigma: Array) -> Array:
        return lid.denoising_loss(
            denoiser, x, sigma, key=key, num_samples=num_noises, ratio=None
        ).value

    return jax.lax.map(at_level, levels)


def _mean(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = len(losses)
    spread = losses.std(axis=0, ddof=1, dtype=np.float64)
    return losses.mean(axis=0, dtype=np.float64), t_factor(count) * spread / np.sqrt(count)


def _check_levels(caller: str, first: LossCurve, second: LossCurve) -> None:
    if not np.array_equal(first.sigmas, second.sigmas):
        raise ValueError(
            f"`{caller}` got curves over the noise levels {first.sigmas} and {second.sigmas}; take "
            "both over the same."
        )
