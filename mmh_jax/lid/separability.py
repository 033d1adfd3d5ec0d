r"""The dimension from how well points are separated by hyperplanes: Fisher separability.

In high dimension almost every pair of independent points is nearly orthogonal, and a point x can be
told from y by the simplest hyperplane, Fisher's: x and y are alpha-inseparable if

    <x, y> > alpha <x, x>.

For the uniform law on the unit sphere of R^n that has the probability (Gorban & Tyukin 2017)

    p(alpha, n) = (1 - alpha^2)^{(n - 1)/2} / (alpha sqrt(2 pi n)),

asymptotically in n.  FisherS (Albergante, Bac & Zinovyev 2019) brings data to that case, by
principal components (those with more than 1 / condition of the largest variance), whitening, and a
projection on the sphere; the dimension at alpha is the n at which p(alpha, n) is the share of the
inseparable pairs.  With b = -log(1 - alpha^2) that is n b = W(z), W Lambert's function,

    W(z) = y,   y + log y = log z,   log z = b + log b - log(2 pi) - 2 log(p alpha).

It depends on alpha where the data are not uniform on a sphere: the curve is the result, and the one
number is taken at .9 of the largest alpha for which some pair is inseparable.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.neighborhoods import check_offsets
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = ["ALPHAS", "FisherS", "fisher_s", "inseparable_dimension"]

ALPHAS = tuple((np.arange(30, 50) / 50).tolist())
"""The margins of the paper: .6, .62, ..., .98."""


class FisherS(NamedTuple):
    """The dimension by Fisher separability.

    Attributes:
        value: the one number.
        alpha: where on the curve it was taken.
        curve: (A,), the dimension at each alpha; NaN where all pairs are separable.
        inseparable: (A, N), for each point x the share of the others that are inseparable from it.
        at_points: (N,), the dimension at each point, from its own share at the largest alpha at
            which no point is separable from all others (without one, at the least alpha); a share
            of 0 counts as 1 / N.
    """

    value: Array
    alpha: Array
    curve: Array
    inseparable: Array
    at_points: Array


def fisher_s(
    points: ArrayLike,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    condition: float = 10.0,
    block_size: int = 256,
) -> FisherS:
    """The dimension of a data set, or of one neighbourhood, by Fisher separability.

    It sees the set as a whole, like the other principal component methods: the span of a curved set
    counts, not its tangent spaces.  p(alpha, n) is asymptotic: a uniform circle, n = 2, has 1.97, a
    segment .93.  From few points it is too large: in balls of 20 points 2.1 for 2, 4.8 for 4.

    Duplicates are inseparable, and lower the dimension.  An outlier so far that it alone is a
    principal component hides all others: the value is then below 1; remove it.  Points at the mean
    have no direction and are left out.  Constant coordinates do not matter.  All points equal: 0.
    If all pairs are separable at every alpha, as N points in more than N dimensions are, the
    dimension is too high for N points to tell: NaN, also at the points.

    Cost: a singular value decomposition of (N, D), and N^2 D.  Memory: `block_size` N numbers and
    the (A, N) result.  Under `jit` and `vmap`, too; `alphas` and `condition` are constants.

    Args:
        points: (N, *shape), N at least 3.
        alphas: ascending, between 0 and 1.
        condition: the ratio of the largest variance to the least that is kept.
        block_size: points that are compared with all others at a time.

    Raises:
        TypeError: if `points` are not of a floating dtype.
        ValueError: if there are fewer than 3 points, if one is not finite (under `jit` all is then
            NaN), or for `alphas` or a `condition` out of range.

    >>> sphere = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32)
    >>> sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    >>> fisher_s(sphere).value.round(1)
    Array(5., dtype=float32)
    """
    margins, reference = _checked_alphas(alphas)
    if not condition > 1:
        raise ValueError(f"`fisher_s(condition={condition})` must be above 1.")
    if isinstance(points, np.ndarray) and points.dtype == np.float64 and np.isfinite(points).all():
        points = points - points.mean(axis=0)  # before it is rounded
    points = check_offsets("fisher_s", points, least=3)
    if not is_traced(points) and not jnp.all(jnp.isfinite(points)):
        bad = int(jnp.argmin(jnp.all(jnp.isfinite(points), axis=1)))
        raise ValueError(
            f"`fisher_s(points=...)` has NaN or infinite values, row {bad} the first; remove them."
        )
    return _fisher_s(points, margins, reference, condition, block_size)


@functools.partial(jax.jit, static_argnums=4)
def _fisher_s(
    points: Array, margins: Array, reference: Array, condition: Array, block_size: int
) -> FisherS:
    margins = jnp.asarray(margins, points.dtype)
    sphere, used = _to_sphere(points, condition)
    num = jnp.sum(used)
    share = _inseparable(sphere, used, margins, block_size) / jnp.maximum(num - 1, 1)
    curve = inseparable_dimension(jnp.sum(share, axis=1) / jnp.maximum(num, 1), margins)
    last = jnp.sum(jnp.isfinite(curve)) - 1  # a share that is 0 stays 0
    place = reference[jnp.maximum(last, 0)]
    chosen = jnp.maximum(jnp.sum(jnp.all((share > 0) | ~used, axis=1)) - 1, 0)
    least = jnp.where(last < 0, 0, 1 / len(points))
    each = inseparable_dimension(jnp.maximum(share[chosen], least), margins[chosen])
    # Of a point without direction nothing is known; of points all equal nothing is left.
    each = jnp.where(used, each, 0)
    value, curve = (jnp.where(num == 0, 0, field) for field in (curve[place], curve))
    finite = jnp.all(jnp.isfinite(points))
    value, curve, each = (jnp.where(finite, field, jnp.nan) for field in (value, curve, each))
    return FisherS(value, margins[place], curve, share, each)


def inseparable_dimension(share: ArrayLike, alpha: ArrayLike) -> Array:
    """The n with p(alpha, n) = `share`; NaN for a share of 0.

    >>> inseparable_dimension(0.36**2 / (0.8 * (10 * jnp.pi) ** 0.5), 0.8).round(4)     # n = 5
    Array(5., dtype=float32)
    """
    share, alpha = jnp.asarray(share, float), jnp.asarray(alpha, float)
    positive = share > 0
    b = -jnp.log1p(-(alpha**2))
    log_z = b + jnp.log(b / (2 * jnp.pi)) - 2 * jnp.log(jnp.where(positive, share, 1) * alpha)

    def step(_: int, y: Array) -> Array:
        return y * (1 + log_z - jnp.log(y)) / (1 + y)  # Newton's, which never leaves y > 0

    # log(1 + z), without overflow, is within 40% of W(z) for any z of interest.
    y = jax.lax.fori_loop(0, 8, step, jnp.logaddexp(0, log_z))
    return jnp.where(positive, y / b, jnp.nan)


def _checked_alphas(alphas: tuple[float, ...]) -> tuple[Array, Array]:
    """The margins, and for each as the largest the place nearest to .9 of it."""
    margins = np.asarray(alphas, float)
    if margins.ndim != 1 or not margins.size or margins.min() <= 0 or margins.max() >= 1:
        raise ValueError(
            f"`fisher_s(alphas={alphas})` must be one or more numbers between 0 and 1."
        )
    if np.any(np.diff(margins) <= 0):
        raise ValueError(f"`fisher_s(alphas={alphas})` must be ascending; sort them.")
    distance = np.abs(margins[None, :] - 0.9 * margins[:, None])
    return jnp.asarray(margins), jnp.asarray(np.argmin(np.round(distance, 12), axis=1))


def _to_sphere(points: Array, condition: Array) -> tuple[Array, Array]:
    """Whitened principal components, of length 1; and which points have a direction."""
    largest = jnp.max(jnp.abs(points - jnp.mean(points, axis=0)))
    centred = (points - jnp.mean(points, axis=0)) / jnp.where(largest > 0, largest, 1)
    white, values, _ = jnp.linalg.svd(centred, full_matrices=False)
    white = white * (values**2 * condition > values[0] ** 2)
    norms = jnp.linalg.norm(white, axis=1, keepdims=True)
    used = norms[:, 0] > jnp.finfo(points.dtype).eps
    used = used & (values[0] > 0)
    return jnp.where(used[:, None], white / jnp.where(norms > 0, norms, 1), 0), used


def _inseparable(sphere: Array, used: Array, margins: Array, block_size: int) -> Array:
    """How many others are inseparable from each point, (A, N)."""

    def of_one(x_and_place: tuple[Array, Array]) -> Array:
        x, place = x_and_place
        product = jnp.matmul(sphere, x, precision=jax.lax.Precision.HIGHEST)
        product = jnp.where((jnp.arange(len(sphere)) == place) | ~used, -1, product)
        return jax.vmap(lambda alpha: jnp.sum(product > alpha))(margins)

    counts = jax.lax.map(of_one, (sphere, jnp.arange(len(sphere))), batch_size=block_size)
    return counts.T
