"""XTrace: deflate with all random vectors but one, probe the rest with that one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mmh_jax.linalg.hutchinson import exact
from mmh_jax.linalg.operator import Trace, check_positive, in_chunks, safe_sqrt, t_factor
from mmh_jax.typing import Array, Estimate, Key, Matvec, check_key

__all__ = ["xtrace"]


@dataclasses.dataclass(frozen=True)
class _XTrace:
    num_products: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        key = check_key(f"xtrace({self.num_products})", key)
        num_probes = self.num_products // 2
        if 2 * num_probes >= like.size:
            return exact(self.chunk_size)(matvec, like)

        def product(row: Array) -> Array:
            return matvec(row.reshape(like.shape)).reshape(-1)

        # Uniform on the sphere of radius sqrt(D); one probe per row.
        probes = jax.random.normal(key, (num_probes, like.size), like.dtype)
        probes *= jnp.sqrt(like.size) / jnp.linalg.norm(probes, axis=1, keepdims=True)
        sketch = in_chunks(product, probes, self.chunk_size)
        basis, factor = jnp.linalg.qr(jax.lax.stop_gradient(sketch).T)
        images = in_chunks(product, basis.T, self.chunk_size)
        return _exchangeable_trace(probes.T, sketch.T, basis, factor, images.T)

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return min(2 * (self.num_products // 2), size)


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
    return Estimate(value, safe_sqrt(t_factor(m) ** 2 * variance + rounding**2))


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
    check_positive("xtrace", "num_products", num_products, least=4)
    check_positive("xtrace", "chunk_size", chunk_size)
    return _XTrace(num_products, chunk_size)
