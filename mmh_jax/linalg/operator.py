"""Linear operators known through products: the trace protocol, columns in chunks, error bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from scipy import special

from mmh_jax.typing import Array, ChiSquareEstimate, Estimate, Key, Matvec

__all__ = ["Diagonal", "Trace", "jacobian", "jacobian_spectrum", "products_of"]


class Trace(Protocol):
    """A way to take the trace of a linear operator."""

    def __call__(
        self, matvec: Matvec, like: Array, *, key: Key | None = None
    ) -> Estimate | ChiSquareEstimate:
        """The trace of `matvec`, a linear map on arrays of the shape of `like`."""
        ...


class Diagonal(Protocol):
    """A way to take the diagonal of a linear operator, as an array of the shape of `like`."""

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        """The diagonal of `matvec`, a linear map on arrays of the shape of `like`."""
        ...


def products_of(strategy: Any, size: int) -> float:
    """Products that a strategy takes with an operator on `size` coordinates; NaN if unknown.

    A product with the transpose counts as one, too.  A strategy of a user's own says it by a method
    `products(size)`.

    >>> from mmh_jax import linalg
    >>> products_of(linalg.exact(), 10), products_of(linalg.positive_lanczos(4, order=8), 100)
    (10, 64)
    """
    known = getattr(strategy, "products", None)
    return float("nan") if known is None else known(size)


def check_positive(caller: str, name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{caller}({name}={value!r})` must be an integer of at least {least}.")


def in_chunks(function: Callable[[Array], Array], items: Array, chunk_size: int) -> Array:
    """`jax.vmap(function)(items)`, at most `chunk_size` at a time.

    The chunks are of one size, so that `function` is compiled once; the padding repeats the last
    item.  Recomputed in reverse mode: memory does not grow with the number of items there either.
    """
    count = items.shape[0]
    num_chunks = -(-count // chunk_size)
    size = -(-count // num_chunks)
    index = jnp.minimum(jnp.arange(num_chunks * size), count - 1).reshape(num_chunks, size)
    chunk = jax.checkpoint(lambda rows: jax.vmap(function)(items[rows]))
    results = jax.lax.map(chunk, index)
    return results.reshape(-1, *results.shape[2:])[:count]


def product_with_unit(matvec: Matvec, like: Array, index: Array) -> Array:
    """Column `index` of the operator, flat."""
    unit = jax.nn.one_hot(index, like.size, dtype=like.dtype)
    return matvec(unit.reshape(like.shape)).reshape(-1)


def t_factor(num_samples: int) -> float:
    """Student's t quantile over the normal one: 1.09 for 16 samples, 1 in the limit."""
    return float(special.stdtrit(num_samples - 1, 0.975) / special.ndtri(0.975))


def mean_and_stderr(samples: Array) -> Estimate:
    """Mean, and a standard error that makes +-1.96 of it a 95% interval at any sample size.

    With n samples the normal quantile 1.96 under-covers (93.1% at n = 16).  One sample: NaN.
    """
    n = samples.shape[0]
    mean = jnp.mean(samples)
    if n < 2:
        return Estimate(mean, jnp.full_like(mean, jnp.nan))
    return Estimate(mean, t_factor(n) * safe_sqrt(jnp.var(samples, ddof=1) / n))


def mean_of_forms(forms: Array, around: Array) -> ChiSquareEstimate:
    r"""The trace of S from the forms v^T S v of K probes with |v|^2 = D, its number of coordinates.

    For v uniform on that sphere a form is a sum of squares weighted by the eigenvalues of S, of
    variance 2 D / (D + 2) (|S|_F^2 - tr(S)^2 / D): twice the mean of |S v - (v^T S v / D) v|^2,
    which is `around`.  That mean has far less noise than the forms' own variance; for a projection
    it is a function of the trace.  How the variance grows with the trace is told by how `around`
    grows with the form from probe to probe, the eigenvalue sum l^3 / sum l^2: exact where all that
    are not 0 are equal.  It is no larger than the largest quotient of both, as rounding would have
    it where all forms are alike.

    Signs have the same variance in a random basis, and less near that of the coordinates.  Where S
    is not symmetric the variance is that of its symmetric part, and this is an upper bound.  One
    probe: NaN.
    """
    count, value = forms.shape[0], jnp.mean(forms)
    if count < 2:
        return ChiSquareEstimate(value, jnp.full_like(value, jnp.nan), jnp.zeros_like(value))
    forms, around = jax.lax.stop_gradient(forms), jax.lax.stop_gradient(around)
    centred = forms - value
    squares = jnp.sum(centred**2)
    slope = jnp.sum(centred * around) / jnp.where(squares == 0, 1, squares)
    largest = jnp.max(around / jnp.where(forms == 0, 1, jnp.abs(forms)))
    stderr = jnp.sqrt(2 * jnp.mean(around) / count)
    return ChiSquareEstimate(value, stderr, 2 * jnp.clip(slope, 0, largest) / count)


def safe_sqrt(value: Array) -> Array:
    """The square root, with derivative 0 instead of infinity at 0 (no spread, as for J = 1).

    A derivative of the value alone would otherwise turn NaN wherever a loop carries both.
    """
    is_zero = value == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, value)))


def jacobian(matvec: Matvec, like: Array, *, chunk_size: int = 32) -> Array:
    """The operator as a matrix, column j its product with the unit vector e_j.

    Of shape (D, like.size) for an operator whose products have D entries, whatever their shapes.
    """
    check_positive("jacobian", "chunk_size", chunk_size)
    columns = in_chunks(
        lambda index: product_with_unit(matvec, like, index), jnp.arange(like.size), chunk_size
    )
    return columns.T


def jacobian_spectrum(matvec: Matvec, like: Array, *, chunk_size: int = 32) -> Array:
    """The D eigenvalues of the symmetrised operator (J + J^T) / 2, largest first.

    Cost: D products and one D x D symmetric eigenproblem.

    >>> jacobian_spectrum(lambda v: jnp.array([1.0, 3.0]) * v, jnp.zeros(2))
    Array([3., 1.], dtype=float32)
    """
    matrix = jacobian(matvec, like, chunk_size=chunk_size)
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
