r"""Traces and spectra of a Jacobian that is only known through products with vectors.

A *trace strategy* is a value: `trace(matvec, like, key=key) -> Estimate(value, stderr)`, where
`matvec` maps an array of the shape of `like` to another, linearly.  For FLIPD the operator is the
Jacobian of a denoiser, J = dD/dx.  For an exact denoiser J = Cov(x0 | x) / sigma^2 is symmetric and
positive semi-definite, with about d eigenvalues near 1 and the others near 0.  Hence

| strategy         | products  | standard error                   | when                         |
|------------------|-----------|----------------------------------|------------------------------|
| `exact`          | D         | 0                                | whenever probes >= D         |
| `rademacher`     | K         | about sqrt(2 d / K) or less      | D large and d > m / 2        |
| `xtrace`         | m         | tiny once m > 2 d + a few        | D large and d < m / 2        |
| `positive_exact` | D and D^3 | 0                                | trained networks             |

`positive_exact` projects: it sums the positive eigenvalues of the symmetrised Jacobian.  On an
exact denoiser that changes nothing; on a trained one, what it removes is network error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from scipy import special

from mmh_jax.typing import Array, Estimate, Key, Matvec, check_key

__all__ = [
    "Trace",
    "exact",
    "jacobian",
    "jacobian_spectrum",
    "positive_exact",
    "rademacher",
    "xtrace",
]


class Trace(Protocol):
    """A way to take the trace of a linear operator."""

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        """The trace of `matvec`, a linear map on arrays of the shape of `like`."""
        ...


def _check_positive(caller: str, name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{caller}({name}={value!r})` must be an integer of at least {least}.")


def _in_chunks(function: Callable[[Array], Array], items: Array, chunk_size: int) -> Array:
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


def _product_with_unit(matvec: Matvec, like: Array, index: Array) -> Array:
    """Column `index` of the operator, flat."""
    unit = jax.nn.one_hot(index, like.size, dtype=like.dtype)
    return matvec(unit.reshape(like.shape)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Exact:
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        def diagonal(index: Array) -> Array:
            return _product_with_unit(matvec, like, index)[index]

        value = _in_chunks(diagonal, jnp.arange(like.size), self.chunk_size).sum()
        return Estimate(value, jnp.zeros_like(value))


@dataclasses.dataclass(frozen=True)
class _Rademacher:
    num_probes: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        keys = jax.random.split(check_key(f"rademacher({self.num_probes})", key), self.num_probes)

        def quadratic_form(probe_key: Key) -> Array:
            probe = jax.random.rademacher(probe_key, like.shape, like.dtype)
            # Not `vdot`: a matrix product may be rounded to 8 or 10 bits on an accelerator.
            return jnp.sum(probe * matvec(probe))

        return _mean_and_stderr(_in_chunks(quadratic_form, keys, self.chunk_size))


@dataclasses.dataclass(frozen=True)
class _XTrace:
    num_products: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        key = check_key(f"xtrace({self.num_products})", key)
        num_probes = self.num_products // 2
        if 2 * num_probes >= like.size:
            return _Exact(self.chunk_size)(matvec, like)

        def product(row: Array) -> Array:
            return matvec(row.reshape(like.shape)).reshape(-1)

        # Uniform on the sphere of radius sqrt(D); one probe per row.
        probes = jax.random.normal(key, (num_probes, like.size), like.dtype)
        probes *= jnp.sqrt(like.size) / jnp.linalg.norm(probes, axis=1, keepdims=True)
        sketch = _in_chunks(product, probes, self.chunk_size)
        basis, factor = jnp.linalg.qr(jax.lax.stop_gradient(sketch).T)
        images = _in_chunks(product, basis.T, self.chunk_size)
        return _exchangeable_trace(probes.T, sketch.T, basis, factor, images.T)


@dataclasses.dataclass(frozen=True)
class _PositiveExact:
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        eigenvalues = jacobian_spectrum(matvec, like, chunk_size=self.chunk_size)
        value = jnp.sum(jnp.maximum(eigenvalues, 0))
        return Estimate(value, jnp.zeros_like(value))


def _t_factor(num_samples: int) -> float:
    """Student's t quantile over the normal one: 1.09 for 16 samples, 1 in the limit."""
    return float(special.stdtrit(num_samples - 1, 0.975) / special.ndtri(0.975))


def _mean_and_stderr(samples: Array) -> Estimate:
    """Mean, and a standard error that makes +-1.96 of it a 95% interval at any sample size.

    With n samples the normal quantile 1.96 under-covers (93.1% at n = 16).  One sample: NaN.
    """
    n = samples.shape[0]
    mean = jnp.mean(samples)
    if n < 2:
        return Estimate(mean, jnp.full_like(mean, jnp.nan))
    return Estimate(mean, _t_factor(n) * _sqrt(jnp.var(samples, ddof=1) / n))


def _sqrt(value: Array) -> Array:
    """The square root, with derivative 0 instead of infinity at 0 (no spread, as for J = 1).

    A derivative of the value alone would otherwise turn NaN wherever a loop carries both.
    """
    is_zero = value == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, value)))


# XTrace.  Deflating with all probes but the i-th means projecting on the columns of
# basis (1 - s_i s_i^T), where the unit vector s_i is such that basis s_i is orthogonal to every
# column of the sketch but the i-th.  h_i is then the trace inside, plus the quadratic form of probe
# i outside; h_ij the same with probes i and j both left out.  The value is the mean of the h_i.
#
# The h_i share their deflation and are correlated: the textbook s^2 / m underestimates the variance
# of the mean (by up to 10 times just below the rank).  Given all probes but i and j, the mean of
# h_i over probe i is the trace whatever j is; hence Cov(h_i, h_j) = E[(h_i - h_ij) (h_j - h_ji)],
# and s^2 / m + mean over pairs of that product is an unbiased estimate of the variance.  It costs
# no product.  Clipping the covariance to [0, s^2] tames it where the spectrum has a cliff.


def _exchangeable_trace(
    probes: Array, sketch: Array, basis: Array, factor: Array, images: Array
) -> Estimate:
    """XTrace from `sketch = J probes = basis factor` and `images = J basis`, all (D, m)."""
    size, m = probes.shape
    with jax.default_matmul_precision("highest"):
        left_out = _leave_one_out_directions(basis, factor)
        core = basis.T @ images
        coords = basis.T @ probes
        kept = coords - left_out * jnp.sum(left_out * coords, axis=0)
        residuals = probes - basis @ kept
        products = sketch - images @ kept  # J residuals
        forms = jnp.sum(residuals * products, axis=0)
        norms2 = jnp.sum(residuals**2, axis=0)
        quad = left_out.T @ core @ left_out
        inside = jnp.trace(core) - jnp.diag(quad)
        # Dividing by the residual's norm, not its expectation, is the paper's resphering.
        one_out = inside + (size - m + 1) * forms / norms2
        mixed = left_out.T @ (basis.T @ products + images.T @ residuals)
        outside, apart = _without_two(left_out, quad, mixed, left_out.T @ coords, forms, norms2)
        two_out = inside[:, None] + (size - m + 2) * outside[0] / outside[1] - outside[2]
        change = jnp.where(apart, one_out[:, None] - two_out, 0)
        covariance = jnp.sum(change * change.T) / (m * (m - 1))
    value, sample_variance = jnp.mean(one_out), jnp.var(one_out, ddof=1)
    variance = sample_variance / m + jnp.clip(covariance, 0, sample_variance)
    magnitude = jnp.maximum(jnp.abs(value), jnp.linalg.norm(core))
    rounding = jnp.finfo(core.dtype).eps * jnp.sqrt(size) * magnitude
    return Estimate(value, _sqrt(_t_factor(m) ** 2 * variance + rounding**2))


def _without_two(
    left_out: Array, quad: Array, mixed: Array, weights: Array, forms: Array, norms2: Array
) -> tuple[tuple[Array, Array, Array], Array]:
    """What changes when, besides probe i (rows), probe j (columns) is left out as well.

    Returns:
        The quadratic form and the squared norm of the residual of probe i, and the trace that the
        deflation loses; and where s_i and s_j are far enough from parallel to tell.
    """
    m = left_out.shape[1]
    cos = left_out.T @ left_out
    sin2 = 1 - cos**2
    # Rounding of the inner products leaves up to about m eps on the diagonal, where i is j.
    apart = (sin2 > 4 * m * jnp.finfo(sin2.dtype).eps) & ~jnp.eye(m, dtype=bool)
    sin2 = jnp.where(apart, sin2, 1)

    def beside(table: Array) -> Array:
        # Entry [i, j] is table[j, i] with s_j replaced by its unit component orthogonal to s_i.
        return (table.T - cos * jnp.diag(table)[:, None]) / jnp.sqrt(sin2)

    own = jnp.diag(quad)
    lost = (own - cos * (quad + quad.T) + cos**2 * own[:, None]) / sin2
    shift = beside(weights)
    form = forms[:, None] + shift * beside(mixed) + shift**2 * lost
    return (form, norms2[:, None] + shift**2, lost), apart


def _leave_one_out_directions(basis: Array, factor: Array) -> Array:
    """The unit vectors s_i as columns: the normalised columns of factor^-T.

    Where the operator has a lower rank than there are probes, the diagonal of `factor` is rounding
    error or zero.  Raising it to that level is a perturbation no larger than rounding made before,
    and keeps the solve finite.
    """
    pivots = jnp.abs(jnp.diag(factor))
    largest = pivots.max()
    factor = factor / jnp.where(largest == 0, 1, largest)
    floor = jnp.finfo(factor.dtype).eps
    factor += jnp.diag(jnp.where(jnp.abs(jnp.diag(factor)) < floor, floor, 0))
    # The zero makes the solve wait for the basis: jaxlib's LAPACK calls deadlock when two batched
    # ones run at once on a machine with two cores (0.10; mended by 0.12).
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype) + 0 * basis[0, 0]
    columns = jax.scipy.linalg.solve_triangular(factor, identity, trans=1)
    return columns / jnp.linalg.norm(columns, axis=0)


def exact(chunk_size: int = 32) -> Trace:
    """The exact trace: D products, `chunk_size` at a time.

    Cost: D products (about .6 to 1 network evaluations each).  Memory: `chunk_size` tangents;
    chunks of 10 to 100 are fastest.  Bias 0, standard error 0.

    >>> exact()(lambda v: 2 * v, jnp.zeros(5)).value
    Array(10., dtype=float32)
    """
    _check_positive("exact", "chunk_size", chunk_size)
    return _Exact(chunk_size)


def rademacher(num_probes: int, chunk_size: int = 16) -> Trace:
    """Hutchinson's estimator with random signs (Hutchinson 1989).

    Unbiased.  The variance is 4 sum_{i<j} S_ij^2 / K, S the symmetrised operator: at most
    2 |S|_F^2 / K, about 2d/K for a denoiser Jacobian of rank d.  Of all probe distributions with
    independent entries, signs have the least variance.  Intervals of +-1.96 standard errors cover
    94-96% of keys from 16 probes on where many eigenvalues are alike, and fewer where one or two
    dominate (92% at 16 probes for one of 2.5 above others of 1.2 and .5) or the operator is nearly
    diagonal.

    Cost: K products, `chunk_size` at a time; memory does not grow with K.

    Args:
        num_probes: K.
        chunk_size: probes pushed through the network at once.
    """
    _check_positive("rademacher", "num_probes", num_probes)
    _check_positive("rademacher", "chunk_size", chunk_size)
    return _Rademacher(num_probes, chunk_size)


def xtrace(num_products: int, chunk_size: int = 32) -> Trace:
    """XTrace (Epperly, Tropp & Webber 2024, 2301.07825): deflate, then Hutchinson on the rest.

    `num_products // 2` random vectors sketch the range of the operator and are reused, each left
    out in turn, as probes of what remains.  Unbiased.  With more than 2 rank(J) products the error
    is that of the spectrum's tail.  When `num_products >= D` the exact trace costs no more and is
    returned, with standard error 0.

    The standard error accounts for the correlation between the leave-one-out estimates: intervals
    of +-1.96 of it cover 93-97% of keys on the spectra of denoisers, from 8 products on.  It never
    falls below the rounding error, eps |value| sqrt(D), which is all that is left for an operator
    of low rank.  Exceptions.  Where the spectrum ends in a cliff, such as exactly d ones, and
    the number of probes is d, coverage is about 77% (92-94% with d - 2 probes, up to 99% with
    d + 1): take a few more products.  Where each eigenvalue is .8 of the one before or less, it is
    91-93% until the error itself is small; so it is with .8 to 1 probes per rank where the
    spectrum decays without a cliff (92.5% at d = 10, 8 probes, eigenvalues from .74 down to .26).

    The derivative holds the deflating basis fixed: it is the same, unbiased, estimate of the trace
    of the derivative, and finite for an operator of any rank.

    Cost: `num_products` products, `chunk_size` at a time; about 4 `num_products` D floats.

    Args:
        num_products: products with the operator, at least 4.
        chunk_size: vectors pushed through the network at once.

    >>> estimate = xtrace(8)(lambda v: v, jnp.zeros(100), key=jax.random.key(0))
    >>> round(float(estimate.value), 2)
    100.0
    """
    _check_positive("xtrace", "num_products", num_products, least=4)
    _check_positive("xtrace", "chunk_size", chunk_size)
    return _XTrace(num_products, chunk_size)


def positive_exact(chunk_size: int = 32) -> Trace:
    """The trace of the positive part of the symmetrised operator: sum of max(eigenvalue, 0).

    Equal to the trace for a positive semi-definite operator, such as the Jacobian of an exact
    denoiser; never smaller than the trace otherwise.  Zero-mean noise in the Jacobian is rectified:
    it can only add, so where the spectrum's tail is noise the value is biased upward.

    Cost: D products and one D x D symmetric eigenproblem.  Standard error 0.

    >>> matrix = jnp.diag(jnp.array([1.0, 0.5, -0.25]))
    >>> positive_exact()(lambda v: matrix @ v, jnp.zeros(3)).value
    Array(1.5, dtype=float32)
    """
    _check_positive("positive_exact", "chunk_size", chunk_size)
    return _PositiveExact(chunk_size)


def jacobian(matvec: Matvec, like: Array, *, chunk_size: int = 32) -> Array:
    """The operator as a matrix, column j its product with the unit vector e_j.

    Of shape (D, like.size) for an operator whose products have D entries, whatever their shapes.
    """
    _check_positive("jacobian", "chunk_size", chunk_size)
    columns = _in_chunks(
        lambda index: _product_with_unit(matvec, like, index), jnp.arange(like.size), chunk_size
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
