"""The exact trace, column by column, traces from random probes, and diagonals in both ways."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mmh_jax.linalg.operator import (
    Diagonal,
    Trace,
    check_positive,
    in_chunks,
    mean_and_stderr,
    mean_of_forms,
    product_with_unit,
)
from mmh_jax.typing import Array, ChiSquareEstimate, Estimate, Key, Matvec, check_key

__all__ = ["exact", "exact_diagonal", "hutchpp", "rademacher", "rademacher_diagonal"]


@dataclasses.dataclass(frozen=True)
class _Exact:
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        if not like.size:  # the sum of nothing
            return Estimate(*jnp.zeros((2,), like.dtype))

        def diagonal(index: Array) -> Array:
            return product_with_unit(matvec, like, index)[index]

        value = in_chunks(diagonal, jnp.arange(like.size), self.chunk_size).sum()
        return Estimate(value, jnp.zeros_like(value))

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return size


@dataclasses.dataclass(frozen=True)
class _Rademacher:
    num_probes: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> ChiSquareEstimate:
        keys = jax.random.split(check_key(f"rademacher({self.num_probes})", key), self.num_probes)

        def quadratic_form(probe_key: Key) -> Array:
            probe = jax.random.rademacher(probe_key, like.shape, like.dtype)
            image = matvec(probe)
            # Not `vdot`: a matrix product may be rounded to 8 or 10 bits on an accelerator.
            form = jnp.sum(probe * image)
            return jnp.stack([form, jnp.sum((image - form / like.size * probe) ** 2)])

        forms, around = in_chunks(quadratic_form, keys, self.chunk_size).T
        return mean_of_forms(forms, around)

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return self.num_probes


@dataclasses.dataclass(frozen=True)
class _HutchPP:
    num_products: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        key = check_key(f"hutchpp({self.num_products})", key)
        rank = self.num_products // 3
        num_probes = self.num_products - 2 * rank
        if self.num_products >= like.size:
            return _Exact(self.chunk_size)(matvec, like)
        sketch_key, probe_key = jax.random.split(key)

        def product(row: Array) -> Array:
            return matvec(row.reshape(like.shape)).reshape(-1)

        signs = jax.random.rademacher(sketch_key, (rank, like.size), like.dtype)
        sketch = jax.lax.stop_gradient(in_chunks(product, signs, self.chunk_size))
        probes = jax.random.rademacher(probe_key, (num_probes, like.size), like.dtype)
        with jax.default_matmul_precision("highest"):
            basis = jnp.linalg.qr(sketch.T)[0].T  # rows
            probes -= probes @ basis.T @ basis
        images = in_chunks(product, jnp.concatenate([basis, probes]), self.chunk_size)
        inside = jnp.sum(basis * images[:rank])
        outside = mean_and_stderr(jnp.sum(probes * images[rank:], axis=1))
        return Estimate(inside + outside.value, outside.stderr)

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return min(self.num_products, size)


@dataclasses.dataclass(frozen=True)
class _ExactDiagonal:
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        def entry(index: Array) -> Array:
            return product_with_unit(matvec, like, index)[index]

        value = in_chunks(entry, jnp.arange(like.size), self.chunk_size).reshape(like.shape)
        return Estimate(value, jnp.zeros_like(value))

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return size


@dataclasses.dataclass(frozen=True)
class _RademacherDiagonal:
    num_probes: int
    chunk_size: int

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        caller = f"rademacher_diagonal({self.num_probes})"
        keys = jax.random.split(check_key(caller, key), self.num_probes)

        def entries(probe_key: Key) -> Array:
            probe = jax.random.rademacher(probe_key, like.shape, like.dtype)
            return (probe * matvec(probe)).reshape(-1)

        samples = in_chunks(entries, keys, self.chunk_size)
        value, stderr = jax.vmap(mean_and_stderr, in_axes=1)(samples)
        return Estimate(value.reshape(like.shape), stderr.reshape(like.shape))

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return self.num_probes


def exact(chunk_size: int = 32) -> _Exact:
    """The exact trace: D products, `chunk_size` at a time.

    Cost: D products (about .6 to 1 network evaluations each).  Memory: `chunk_size` tangents; where
    there is room for more of them, larger chunks are faster.  Bias 0, standard error 0.

    >>> exact()(lambda v: 2 * v, jnp.zeros(5)).value
    Array(10., dtype=float32)
    """
    check_positive("exact", "chunk_size", chunk_size)
    return _Exact(chunk_size)


def rademacher(num_probes: int, chunk_size: int = 16) -> Trace:
    """Hutchinson's estimator with random signs (Hutchinson 1989).

    Unbiased.  The variance is 4 sum_{i<j} S_ij^2 / K, S the symmetrised operator: at most
    2 |S|_F^2 / K, about 2d/K for a denoiser Jacobian of rank d.  Of all probe distributions with
    independent entries, signs have the least variance.

    The error is that of a chi-square with d K degrees of freedom: far from normal at small d, and
    larger where the trace is.  So the answer is a `ChiSquareEstimate`: its `typing.interval` covers
    93-97% of keys for projections on 1 to 10 random directions, decaying spectra and noisy ones,
    from 8 probes on.  It covers more where the operator is nearly diagonal, or not symmetric: the
    standard error is then too large; and less (92%) where all but one of the directions are kept.

    Cost: K products, `chunk_size` at a time; memory does not grow with K.

    Args:
        num_probes: K.
        chunk_size: probes pushed through the network at once.
    """
    check_positive("rademacher", "num_probes", num_probes)
    check_positive("rademacher", "chunk_size", chunk_size)
    return _Rademacher(num_probes, chunk_size)


def hutchpp(num_products: int, chunk_size: int = 32) -> Trace:
    """Hutch++ (Meyer, Musco, Musco & Woodruff 2021, 2010.09649): sketch, then probe the rest.

    A third of the products sketches the range of the operator, a third takes the trace inside it,
    a third probes what is outside with random signs.  Unbiased, and simpler than XTrace, whose
    products all do both: for the same number of them XTrace has the smaller error.  The standard
    error is that of the probes outside, which are independent of the sketch and of each other.
    Its intervals cover 93-95% on decaying spectra and 92% where a sketch almost reaches the rank.
    When
    `num_products >= D` the exact trace costs no more and is returned.

    The derivative holds the sketch's basis fixed, as that of XTrace.

    Cost: `num_products` products, `chunk_size` at a time; about `num_products` D floats.

    Args:
        num_products: products with the operator, at least 6 (for 2 probes outside).
        chunk_size: vectors pushed through the network at once.

    >>> matrix = jnp.zeros((100, 100)).at[0, 0].set(2.0)         # rank 1: the sketch has it all
    >>> estimate = hutchpp(6)(lambda v: matrix @ v, jnp.zeros(100), key=jax.random.key(0))
    >>> round(float(estimate.value), 4), bool(estimate.stderr < 1e-4)
    (2.0, True)
    """
    check_positive("hutchpp", "num_products", num_products, least=6)
    check_positive("hutchpp", "chunk_size", chunk_size)
    return _HutchPP(num_products, chunk_size)


def exact_diagonal(chunk_size: int = 32) -> Diagonal:
    """The exact diagonal, of the shape of `like`: D products, as for the exact trace.

    >>> exact_diagonal()(lambda v: jnp.arange(3.0) * v, jnp.zeros(3)).value
    Array([0., 1., 2.], dtype=float32)
    """
    check_positive("exact_diagonal", "chunk_size", chunk_size)
    return _ExactDiagonal(chunk_size)


def rademacher_diagonal(num_probes: int, chunk_size: int = 16) -> Diagonal:
    """A diagonal from random signs: the mean of v * (J v) (Bekas, Kokiopoulou & Saad 2007).

    Unbiased, entry by entry.  The variance of entry i is sum_{j != i} J_ij^2 / K: no error for a
    diagonal operator, and far more for one entry than for the trace, relative to its value.

    Cost: K products; K D numbers of memory, for the standard errors.

    Args:
        num_probes: K.
        chunk_size: probes pushed through the network at once.

    >>> estimate = rademacher_diagonal(2)(lambda v: 3 * v, jnp.zeros(2), key=jax.random.key(0))
    >>> estimate.value, estimate.stderr
    (Array([3., 3.], dtype=float32), Array([0., 0.], dtype=float32))
    """
    check_positive("rademacher_diagonal", "num_probes", num_probes)
    check_positive("rademacher_diagonal", "chunk_size", chunk_size)
    return _RademacherDiagonal(num_probes, chunk_size)
