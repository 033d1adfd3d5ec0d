r"""The memorization scale of a point, read off its basin of attraction.

In P = (1 - w) Q + w delta_x the posterior weight of the atom at the noisy point x + sigma z, pi,
falls from 1 to 0 as sigma grows, and dimensions follow: F_P = (1 - pi) F_Q.  The *memorization
scale* sigma_mem is the noise level at which F_P = F_Q / 2, where half of the noisy points still
belong to the atom.  The sampler shows it directly: it is run down from x + sigma z, and an end
that lies at x belongs to the atom, one that lies as far away as Q would have put it does not
(Biroli et al. 2024, 2402.18491, call the transition collapse, and the set of noisy points that end
at x its basin of attraction).  As in `regeneration`, ends and not single steps are looked at: the
iteration makes 0 or 1 of a weight.

    returned      an end at most half as far from x as a model that never saw x ends, in the median;
    sigma_mem     the noise level up to which half of the ends have returned.

"Half as far" needs no unit and no dimension; the share that returns by chance, .26 where both
models are locally flat of dimension 1, .16 of 2, .02 of 5, is taken out.  For an atom in a Gaussian
this sigma_mem is larger than where E_z pi = 1/2, by a factor that depends on the dimension alone
(1.45, 1.32, 1.16 and 1.11 for d = 1, 2, 5 and 10, whatever w): the flow draws in what lies near.
Its logarithm therefore rises with log w at the slope 1 / d, as the law has it.

Every model that has been trained on x knows it better than one that has not: it returns from a
little noise.  That is membership.  Memorization is to return from noise that hides the point: the
*separation scale* of the data at x is the noise level at which x is still told from the other
points with probability 3/4 by one who knows them all and nothing else,

    E_z  1 / (1 + sum_j exp(-(|x + sigma z - x_j|^2 - |sigma z|^2) / (2 sigma^2)))  =  3 / 4.

A model with sigma_mem above the separation scale holds x as the bare list of training points does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import chdtri

from mmh_jax.data.splits import deduplicated
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.mapping import over_points
from mmh_jax.memorization.extraction import rate_interval
from mmh_jax.memorization.regeneration import regeneration
from mmh_jax.memorization.verdict import Label
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key

__all__ = [
    "BasinScale",
    "Separation",
    "basin_scale",
    "basin_verdict",
    "flat_distances",
    "regeneration_distances",
    "returned",
    "separation",
]

# Neighbours that take part in a posterior; those farther away weigh nothing at such noise.
_NUM_NEIGHBORS = 256
_NUM_DRAWS = 64
_STEPS = 24
# Of the regeneration: the number of its noise levels, and the last relative to the first.
_NUM_LEVELS = 9
_LAST = 0.02


class Separation(NamedTuple):
    """How far M points stand from the others; each field is (M,).

    Attributes:
        scale: the noise level, in data units, up to which a point is told from the others.
        distance: to the nearest other point, in data units.
        nearest: its row.
    """

    scale: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray


def separation(
    points: ArrayLike,
    queries: ArrayLike,
    *,
    key: Key,
    probability: float = 0.75,
    progress: Callable[[int, int], None] | None = None,
) -> Separation:
    """The separation scale of data at some points.

    Args:
        points: (N, *shape), the data.  Equal points count as one.
        queries: (M, *shape), of the points or not.  What equals a query is not among the others.
        key: draws the noise, the same for all queries.
        probability: with which a query is told from the others at the scale; above 0, below 1.
        progress: called as `progress(done, total)`.

    Returns:
        `Separation`; it has the dimension of a length, and scales with the data.

    Cost: the distances of M points to N, and 64 x 256 products of length D for each query.
    Bias: upwards, where others than the 256 nearest points matter; the integral over the noise is
    a mean over 64 draws.

    Raises:
        TypeError, ValueError: as `lid.nearest_neighbors`; if there are not two different points.

    >>> two = np.array([[0.0], [1.0]])
    >>> found = separation(two, two, key=jax.random.key(0))
    >>> found.distance.tolist(), found.nearest.tolist(), bool(np.all(abs(found.scale - 0.55) < 0.1))
    ([1.0, 1.0], [1, 0], True)
    """
    key = check_key("separation", key)
    if not 0 < probability < 1:
        raise ValueError(f"`separation(probability={probability})` must lie between 0 and 1.")
    unique = deduplicated(points)
    others = unique.points
    if len(others) < 2:
        raise ValueError("`separation(points=...)` has one point, with copies; there is no other.")
    num = min(_NUM_NEIGHBORS + 1, len(others))
    found = nearest_neighbors(others, num, queries=queries)
    distances, indices = np.asarray(found.distances), np.asarray(found.indices)
    is_other = distances > 0
    first = np.argmax(is_other, axis=1)[:, None]
    noise = jax.random.normal(key, (_NUM_DRAWS, others[0].size), jnp.float32)
    flat = others.reshape(len(others), -1)
    solved = over_points(
        functools.partial(_scale, probability=probability), (None, None, 0, 0, 0), chunk_size=16
    )
    asked = np.asarray(queries).reshape(len(distances), -1)
    scale = solved(flat, noise, asked, indices, is_other, progress=progress)
    nearest = np.take_along_axis(indices, first, 1)[:, 0]
    return Separation(
        np.asarray(scale, float),
        np.take_along_axis(distances, first, 1)[:, 0].astype(float),
        unique.first[nearest],
    )


def _scale(
    points: Array, noise: Array, x: Array, index: Array, is_other: Array, *, probability: float
) -> Array:
    """The noise level at which the posterior weight of x is `probability`, by bisection."""
    away = x - points[index]
    unit = jnp.sqrt(jnp.min(jnp.where(is_other, jnp.sum(away**2, axis=1), jnp.inf)))
    away = away / unit
    squares, along = jnp.sum(away**2, axis=1), noise @ away.T

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        odds = jnp.where(is_other, -(squares / middle + 2 * along) / (2 * middle), -jnp.inf)
        told = jnp.mean(jax.nn.sigmoid(-jax.nn.logsumexp(odds, axis=1))) > probability
        return jnp.where(told, middle, low), jnp.where(told, high, middle)

    ends = (jnp.asarray(1e-3, noise.dtype), jnp.asarray(10.0, noise.dtype))
    low, high = jax.lax.fori_loop(0, _STEPS, halve, ends)
    return unit * jnp.sqrt(low * high)


def regeneration_distances(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_samples: int = 16,
    sigma_min: float = 0.0,
) -> Array:
    """How far from x the sampler ends that starts at x + sigma z; (K,), in data units.

    Args:
        denoiser: the model.
        x: one point, of any shape.
        sigma: the noise level, in data units.
        key: draws the noise; two models that are compared are given the same.
        num_samples: K.
        sigma_min: the smallest noise level that the model was trained at, in data units.

    Cost: 17 K evaluations: `regeneration` at 9 levels down to sigma / 50, or `sigma_min` if that is
    larger, but at least by a half.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0])
    >>> regeneration_distances(line, jnp.zeros(2), 0.1, key=jax.random.key(0)).shape
    (16,)
    """
    sigma = jnp.asarray(sigma)
    last = jnp.clip(sigma_min / sigma, _LAST, 0.5)
    levels = sigma * last ** np.linspace(0, 1, _NUM_LEVELS, dtype=np.float32)
    ends = regeneration(
        denoiser, x, levels, key=key, num_samples=num_samples, chunk_size=num_samples
    ).ends
    return jnp.sqrt(jnp.sum((ends - jnp.asarray(x)).reshape(num_samples, -1) ** 2, axis=1))


def flat_distances(sigma: ArrayLike, dimension: ArrayLike, num: int = 16) -> np.ndarray:
    """The distances of the ends where the distribution is locally flat; (..., num), ascending.

    In place of a model that never saw the points, if there is none.

    Args:
        sigma: (...) the noise level.
        dimension: d, of a shape that broadcasts; the ends are sigma chi_d from where they began.
        num: quantiles of this distribution.

    >>> flat_distances(0.1, 1.0, 1).round(4).tolist()
    [0.0674]
    """
    rank = (np.arange(num) + 0.5) / num
    chi = np.sqrt(chdtri(np.asarray(dimension, float)[..., None], 1 - rank))
    return np.asarray(sigma)[..., None] * chi


def returned(distances: ArrayLike, unseen: ArrayLike) -> np.ndarray:
    """The share of the ends that returned to the point, beyond chance; (...), 0 to 1.

    With B of the model's ends near, at most half as far as the median of the other model's, and C
    of those, (B - C) / (1 - C).

    Args:
        distances: (..., K) of the model, from `regeneration_distances`; what is not finite has not
            returned.
        unseen: (..., K) of a model that never saw the point, from the same noise.

    >>> returned([[0.1, 0.2, 0.6, 0.9]], [[1.0, 1.0, 1.0, 1.2]]).tolist()
    [0.5]
    """
    distances, unseen = np.asarray(distances, float), np.asarray(unseen, float)
    radius = np.median(unseen, axis=-1, keepdims=True) / 2

    def near(ends: np.ndarray) -> np.ndarray:
        return np.mean((ends <= radius) & np.isfinite(ends), axis=-1)

    chance = near(unseen)
    return np.maximum((near(distances) - chance) / (1 - chance), 0.0)


class BasinScale(NamedTuple):
    """The memorization scale of N points; each field is (N,), in units of the levels.

    Attributes:
        value: 0 where less than half returned at the first level; at most the largest level, which
            then is a lower bound.
        low, high: ends of a 95% interval; `high` is infinite where the largest level is in it.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def basin_scale(levels: ArrayLike, share: ArrayLike, num_samples: int) -> BasinScale:
    """The memorization scale from the shares that returned.

    The crossing of one half is interpolated in the logarithm of the level.  The interval has the
    crossings of the ends of Clopper-Pearson intervals of the shares, which are independent from
    level to level only if the draws are.

    Args:
        levels: (L,) noise levels, ascending, in any unit.
        share: (N, L), from `returned`.
        num_samples: K, of how many ends.

    Raises:
        ValueError: if the levels do not ascend, or shapes differ.

    >>> basin_scale([1.0, 2.0, 4.0], np.array([[1.0, 0.75, 0.25]]), 100).value.round(3).tolist()
    [2.828]
    """
    levels, share = np.asarray(levels, float), np.asarray(share, float)
    if levels.ndim != 1 or share.shape[1:] != levels.shape or np.any(np.diff(levels) <= 0):
        raise ValueError(
            f"`basin_scale(levels=..., share=...)`: {levels.shape} ascending levels, and "
            f"{share.shape} shares; there must be one for each point and level, (N, L)."
        )
    low, high = rate_interval(np.round(share * num_samples).astype(int), num_samples)
    upper = _crossing(levels, high)
    return BasinScale(
        _crossing(levels, share),
        _crossing(levels, low),
        np.where(upper >= levels[-1], np.inf, upper),
    )


def basin_verdict(
    scale: ArrayLike,
    separation: ArrayLike,
    *,
    repeated: ArrayLike,
    discovered: ArrayLike | bool = True,
    known: ArrayLike | bool = True,
) -> np.ndarray:
    """Which points are memorized, and why; codes of `Label`, elementwise.

    Memorized is a point whose memorization scale is at least the separation scale of the data and
    that the controls do not explain.  One that the data repeat is an atom of the data, DD-Mem;
    another is one that the model has made, OD-Mem.

    Args:
        scale: sigma_mem of the model.
        separation: of the data, in the same unit.
        repeated: whether the point occurs more than once.
        discovered: whether it is a discovery beside the controls; a large scale that is none is
            undecided.
        known: whether the model has a dimension there: where it has none, the point is undecided
            unless it is memorized.

    >>> [Label(int(code)).title for code in basin_verdict([2, 2, 0], [1, 1, 1], repeated=[0, 1, 0])]
    ['OD-Mem', 'DD-Mem', 'not memorized']
    """
    large = np.asarray(scale) >= np.asarray(separation)
    memorized = large & np.asarray(discovered)
    kind = np.where(np.asarray(repeated, bool), Label.DD_MEM, Label.OD_MEM)
    other = np.where(~large & np.asarray(known), Label.NOT_MEMORIZED, Label.UNDECIDED)
    return np.where(memorized, kind, other)


def _crossing(levels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Up to which level the share is at least one half at all; 0 if not at the first."""
    fallen = share < 0.5
    stop = np.where(fallen.any(axis=1), np.argmax(fallen, axis=1), len(levels))
    last, after = np.maximum(stop - 1, 0), np.minimum(stop, len(levels) - 1)
    rows = np.arange(len(share))
    before, behind = share[rows, last], share[rows, after]
    fall = np.where(before > behind, before - behind, 1.0)
    log = np.log(levels)
    crossed = np.exp(log[last] + (log[after] - log[last]) * (before - 0.5) / fall)
    return np.where(stop > 0, crossed, 0.0)
