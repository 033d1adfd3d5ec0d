r"""The distribution of a finite data set: N points x_i, each with probability 1/N.

With the squared distances q_i = |x - x_i|^2 and p_i = softmax_i(-q_i / (2 sigma^2)),

    D(x; sigma)      = x + sum_i p_i (x_i - x)
    F(x; sigma)      = sum_i p_i q_i / sigma^2
    log rho_sigma(x) = log (1/N) sum_i exp(-q_i / (2 sigma^2)) - D/2 log(2 pi sigma^2).

F is the closed-form diffusion estimator of a data set's local intrinsic dimension.  At a training
point it tends to 0 with sigma; elsewhere it diverges as distance^2 / sigma^2.

The points are read in chunks, once, with a running minimum of the squares (an online softmax).
Distances are sums of squared differences: |x|^2 - 2 x . x_i + |x_i|^2 would lose the digits of
nearby points, which carry all of the weight.  Derivatives are written out rather than traced: with
e_i = x_i - D, and for a motion (dx, dsigma, dx_i) of the arguments, up to a constant in i,

    dlog p_i = e_i . dx / sigma^2 + (q_i - E q) dsigma / sigma^3 + (x - x_i) . dx_i / sigma^2
    dD       = sum_i p_i (dlog p_i e_i + dx_i),

one more pass over the points, whose batched form is two matrix products per chunk.
"""

# ruff: noqa: D102 -- a method that overrides one of `Distribution` is documented there.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero

from mmh_jax.analytic.base import Distribution, safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Empirical"]


class _Moments(NamedTuple):
    """Posterior expectations over the points, at one x and sigma."""

    log_sum: Array  # log sum_i exp(-q_i / (2 sigma^2))
    mean: Array  # sum_i p_i x_i, (D,)
    shift: Array  # the same minus x, kept apart for its digits
    square: Array  # sum_i p_i q_i


def _sweep(
    update: Callable[..., Any], carry: Any, num_points: int, chunk_size: int, *stacks: Array
) -> Any:
    """Fold `update(carry, is_new, *chunks)` over chunks of the rows of `stacks`, without a copy.

    The last chunk starts early enough to be full; `is_new` is False for its rows already seen.
    """
    chunk = min(chunk_size, num_points)

    # Recomputing a chunk is cheaper than keeping all: saved for a derivative, they are N x D.
    @jax.checkpoint
    def body(carry: Any, index: Array) -> tuple[Any, None]:
        start = jnp.minimum(index * chunk, num_points - chunk)
        chunks = [jax.lax.dynamic_slice_in_dim(stack, start, chunk) for stack in stacks]
        return update(carry, start + jnp.arange(chunk) >= index * chunk, *chunks), None

    return jax.lax.scan(body, carry, jnp.arange(-(-num_points // chunk)))[0]


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _squares(rows: Array) -> Array:
    return jnp.sum(rows * rows, axis=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3)
def _moments(points: Array, x: Array, sigma: Array, chunk_size: int) -> _Moments:
    """One pass over `points` (N, D), at `x` (D,), all of one dtype."""

    def update(carry: tuple[Array, ...], is_new: Array, rows: Array) -> tuple[Array, ...]:
        least, total, shift, square = carry
        steps = rows - x
        squares = jnp.where(is_new, _squares(steps), jnp.inf)
        new_least = jnp.minimum(least, jnp.min(squares))
        # Squares are subtracted, not exponents: a product fused with a subtraction is not rounded,
        # and the largest exponent then differs from itself by any amount where sigma is small.
        keep, weights = (jnp.exp((new_least - each) / (2 * sigma**2)) for each in (least, squares))
        squares = jnp.where(is_new, squares, 0)
        return (
            new_least,
            keep * total + jnp.sum(weights),
            keep * shift + _dot(weights, steps),
            keep * square + jnp.sum(weights * squares),
        )

    zero = jnp.zeros((), x.dtype)
    start = (jnp.full((), jnp.inf, x.dtype), zero, jnp.zeros_like(x), zero)
    least, total, shift, square = _sweep(update, start, points.shape[0], chunk_size, points)
    shift = shift / total
    log_sum = jnp.log(total) - least / (2 * sigma**2)
    return _Moments(log_sum, x + shift, shift, square / total)


@functools.partial(jax.jit, static_argnums=6)
def _moments_tangent(
    points: Array,
    x: Array,
    sigma: Array,
    moments: _Moments,
    dx: Array,
    dsigma: Array,
    chunk_size: int,
    dpoints: Array | None,
) -> _Moments:
    """The derivative of `_moments`; `dpoints` is None if the points do not move."""
    precision = 1 / sigma**2
    stacks = (points,) if dpoints is None else (points, dpoints)

    def update(carry: tuple[Array, ...], is_new: Array, rows: Array, *drows: Array) -> Any:
        dlog_sum, dmean, dsquare = carry
        steps = rows - x
        squares = _squares(steps)
        weights = jnp.exp(jnp.minimum(-squares * precision / 2 - moments.log_sum, 0))
        weights = jnp.where(is_new, weights, 0)
        centred, excess = steps - moments.shift, squares - moments.square
        change = _dot(centred, dx) * precision + excess * (dsigma * precision / sigma)
        if drows:
            approach = jnp.sum(steps * drows[0], axis=1)
            change = change - approach * precision
            dlog_sum = dlog_sum - jnp.sum(weights * approach) * precision
            dmean = dmean + _dot(weights, drows[0])
            dsquare = dsquare + 2 * jnp.sum(weights * approach)
        rates = weights * change
        return dlog_sum, dmean + _dot(rates, centred), dsquare + jnp.sum(rates * excess)

    dlog_sum = jnp.sum(moments.shift * dx) * precision + moments.square * dsigma * precision / sigma
    dsquare = -2 * jnp.sum(moments.shift * dx)
    start = (dlog_sum, jnp.zeros_like(x), dsquare)
    dlog_sum, dmean, dsquare = _sweep(update, start, points.shape[0], chunk_size, *stacks)
    return _Moments(dlog_sum, dmean, dmean - dx, dsquare)


def _moments_jvp(
    chunk_size: int, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[_Moments, _Moments]:
    points, x, sigma = primals
    dpoints, dx, dsigma = tangents
    moments = _moments(points, x, sigma, chunk_size)
    dx, dsigma = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in ((x, dx), (sigma, dsigma))
    )
    # A zero (N, D) tangent is never made: only a derivative in the points themselves needs one.
    dpoints = None if isinstance(dpoints, SymbolicZero) else dpoints
    return moments, _moments_tangent(points, x, sigma, moments, dx, dsigma, chunk_size, dpoints)


_moments.defjvp(_moments_jvp, symbolic_zeros=True)


def _flat(points: Array, dtype: Any) -> Array:
    """The points as rows (N, D); inside `jit` only, where a reshape costs nothing."""
    return points.reshape(points.shape[0], -1).astype(dtype)


@functools.partial(jax.jit, static_argnums=2)
def _smallest_square(points: Array, x: Array, chunk_size: int) -> Array:
    dtype = jnp.result_type(points, x)
    points, x = _flat(points, dtype), x.reshape(-1).astype(dtype)

    def update(smallest: Array, is_new: Array, rows: Array) -> Array:
        return jnp.minimum(smallest, jnp.min(_squares(rows - x)))

    start = jnp.full((), jnp.inf, x.dtype)
    return _sweep(update, start, points.shape[0], chunk_size, points)


@functools.partial(jax.jit, static_argnums=3)
def _moments_at(points: Array, x: Array, sigma: ArrayLike, chunk_size: int) -> _Moments:
    dtype = jnp.result_type(points, x)
    return _moments(
        _flat(points, dtype), x.reshape(-1).astype(dtype), jnp.asarray(sigma, dtype), chunk_size
    )


@struct.dataclass
class Empirical(Distribution):
    """The empirical distribution of a data set: the denoiser that has memorized it.

    Cost of every method: one pass over the data, about 3 N D operations; a JVP costs about two.
    Memory: the data, never copied, and `chunk_size` x D numbers for each point that is evaluated at
    once (under `jax.vmap`, times the batch).

    Attributes:
        points: (N, *shape), floating, in data units.
        chunk_size: rows read at a time (static); results do not depend on it beyond rounding.

    Raises:
        TypeError: if `points` are not of a floating dtype.
        ValueError: if there are none, or `chunk_size < 1`.

    >>> data = Empirical(jnp.array([[0.0, 0.0], [2.0, 0.0]]))
    >>> data(jnp.array([1.0, 5.0]), 1.0)
    Array([1., 0.], dtype=float32)
    >>> data.flipd(jnp.array([2.0, 0.0]), 0.1), data.flipd(jnp.array([2.0, 1.0]), 0.1).round(2)
    (Array(0., dtype=float32), Array(100., dtype=float32))
    """

    points: Array
    chunk_size: int = struct.field(pytree_node=False, default=256)

    def _check(self) -> dict[str, Any]:
        points = jnp.asarray(self.points)
        if not jnp.issubdtype(points.dtype, jnp.floating):
            raise TypeError(
                f"`Empirical(points=...)` has dtype {points.dtype}; points are in real data units. "
                "Convert them, for example `points.astype(np.float32) / 255`."
            )
        if points.ndim < 1 or points.shape[0] < 1:
            raise ValueError(
                f"`Empirical(points=...)` has shape {points.shape}; it takes (N, *shape), N >= 1."
            )
        chunk_size = self.chunk_size
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"`Empirical(chunk_size={chunk_size!r})` must be at least 1.")
        return {"points": points}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.points.shape[1:])

    def _dimension(self) -> float:
        return 0.0

    def _moments(self, x: Array, sigma: ArrayLike) -> _Moments:
        return _moments_at(self.points, self._point(x), sigma, self.chunk_size)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        return self._moments(x, sigma).mean.reshape(self.shape)

    def log_density(self, x: Array, sigma: ArrayLike) -> Array:
        log_sum = self._moments(x, sigma).log_sum
        log_volume = self.ambient_dim * (jnp.log(2 * jnp.pi) / 2 + jnp.log(sigma))
        return log_sum - jnp.log(self.points.shape[0]) - log_volume

    def flipd(self, x: Array, sigma: ArrayLike) -> Array:
        return self._moments(x, sigma).square / sigma**2

    def distance(self, x: Array) -> Array:
        return safe_sqrt(_smallest_square(self.points, self._point(x), self.chunk_size))

    def sample(self, num: int, *, key: Key) -> Array:
        """`num` points of the data set, with replacement, (num, *shape)."""
        return self.points[jax.random.randint(key, (num,), 0, self.points.shape[0])]
