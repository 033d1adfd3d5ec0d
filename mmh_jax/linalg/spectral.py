r"""Traces of functions of the symmetrised operator S = (J + J^T) / 2: tr f(S) = sum_i f(l_i).

By the whole spectrum (D products and an eigenproblem), or by stochastic Lanczos quadrature (Ubaru,
Chen & Saad 2017): for a random probe v of norm sqrt(D), v^T f(S) v = D e_1^T f(T) e_1 up to the
error of a Gauss rule, T the tridiagonal matrix of `order` Lanczos steps from v.  A product with S
is one with J and one with J^T, which JAX transposes from J.

What the projection on the positive part costs.  Let S = S_0 + E, S_0 that of an exact denoiser, of
rank d, and E network error whose spectrum is symmetric about 0, on [-r, r] (as a random matrix's).
Then the positive part holds the rectified noise of the other D - d directions, up to about
(D - d) 2 r / 3 pi for Wigner's semicircle.  It cannot be subtracted by the negative part: that
gives back the raw trace, of which the mean of E is part.  But the negative edge -r is in sight,
and nothing above +r is noise: the sum of the eigenvalues above r = -l_min has none of it.  What is
left is the pull of noise on a large eigenvalue, l -> l + r^2 / 4 l (Benaych-Georges & Nadakuditi
2011), d r^2 / 4 in all, and the loss of directions with l_i < r.  With r = 0, as for every exact
denoiser, all three are the trace.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmh_jax.linalg.operator import (
    Trace,
    check_positive,
    in_chunks,
    jacobian,
    mean_of_forms,
    safe_sqrt,
)
from mmh_jax.typing import Array, ChiSquareEstimate, Estimate, Key, Matvec, check_key

__all__ = ["function_lanczos", "positive_exact", "positive_lanczos", "symmetrised"]


def symmetrised(matvec: Matvec, like: Array) -> Matvec:
    """Products with (J + J^T) / 2: one JVP and one VJP each.

    >>> matrix = jnp.array([[0.0, 2.0], [0.0, 0.0]])
    >>> symmetrised(lambda v: matrix @ v, jnp.zeros(2))(jnp.array([1.0, 0.0]))
    Array([0., 1.], dtype=float32)
    """
    transposed = jax.linear_transpose(matvec, like)
    return lambda v: (matvec(v) + transposed(v)[0]) / 2


def positive_part(eigenvalues: Array) -> Array:
    """max(l, 0)."""
    return jnp.maximum(eigenvalues, 0)


def above_noise_edge(eigenvalues: Array, lowest: Array) -> Array:
    """l where l > -lowest, the negative edge mirrored; 0 elsewhere, and NaN for NaN."""
    dropped = eigenvalues <= jnp.maximum(-lowest, 0)  # not the contrary: NaN is neither
    return jnp.where(dropped, 0, eigenvalues)


# The derivative of `eigvalsh` has a derivative only where no two eigenvalues are equal; those of a
# sum of kept eigenvalues are a projector P, and its divided differences (Daleckii & Krein), which
# vanish within a cluster of kept or of dropped ones.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_kept(symmetric: Array, above_noise: bool) -> Array:
    """The sum of the positive eigenvalues, or of those above the noise edge."""
    return _kept(jnp.linalg.eigvalsh(symmetric), above_noise).sum()


def _kept(eigenvalues: Array, above_noise: bool) -> Array:
    if above_noise:
        return above_noise_edge(eigenvalues, eigenvalues[0])
    return positive_part(eigenvalues)


@_sum_kept.defjvp
def _sum_kept_jvp(above_noise: bool, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    value, projector = _sum_and_projector(*primals, above_noise)
    return value, jnp.sum(projector * tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_and_projector(symmetric: Array, above_noise: bool) -> tuple[Array, Array]:
    eigenvalues, vectors = jnp.linalg.eigh(symmetric)
    kept = _kept(eigenvalues, above_noise)
    return kept.sum(), (vectors * (kept != 0)) @ vectors.T


@_sum_and_projector.defjvp
def _sum_and_projector_jvp(above_noise: bool, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    eigenvalues, vectors = jnp.linalg.eigh(primals[0])
    kept = _kept(eigenvalues, above_noise)
    mask = (kept != 0).astype(kept.dtype)
    turned = vectors.T @ tangents[0] @ vectors
    differ = mask[:, None] != mask[None, :]
    gap = jnp.where(differ, eigenvalues[:, None] - eigenvalues[None, :], 1)
    divided = (mask[:, None] - mask[None, :]) / gap
    projector = (vectors * mask) @ vectors.T
    d_projector = vectors @ (divided * turned) @ vectors.T
    return (kept.sum(), projector), (jnp.sum(mask * jnp.diagonal(turned)), d_projector)


@dataclasses.dataclass(frozen=True)
class _PositiveExact:
    chunk_size: int
    above_noise: bool
    is_linear = False

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> Estimate:
        matrix = jacobian(matvec, like, chunk_size=self.chunk_size)
        value = _sum_kept((matrix + matrix.T) / 2, self.above_noise)
        return Estimate(value, jnp.zeros_like(value))

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates."""
        return size


@dataclasses.dataclass(frozen=True)
class _FunctionLanczos:
    function: Callable[[Array], Array] | None  # None: the eigenvalues above the noise edge
    num_probes: int
    order: int
    chunk_size: int
    is_linear = False

    def __call__(self, matvec: Matvec, like: Array, *, key: Key | None = None) -> ChiSquareEstimate:
        key = check_key("a Lanczos trace", key)
        product = symmetrised(matvec, like)

        def flat_product(v: Array) -> Array:
            return product(v.reshape(like.shape)).reshape(-1)

        def tridiagonal(probe_key: Key) -> Array:
            probe = jax.random.rademacher(probe_key, (like.size,), like.dtype)
            return _lanczos(flat_product, probe, min(self.order, like.size))

        keys = jax.random.split(key, self.num_probes)
        tridiagonals = in_chunks(tridiagonal, keys, self.chunk_size)
        nodes, weights = _gauss_rules(tridiagonals)
        # Extreme eigenvalues converge first: the lowest node of all runs is the noise edge.
        values = (
            above_noise_edge(nodes, jnp.min(nodes))
            if self.function is None
            else self.function(nodes)
        )
        means = jnp.sum(weights * values, axis=-1, keepdims=True)
        around = jnp.sum(weights * (values - means) ** 2, axis=-1)
        return mean_of_forms(like.size * means[:, 0], like.size * around)

    def products(self, size: int) -> int:
        """Products with an operator on `size` coordinates, and with its transpose."""
        return 2 * self.num_probes * min(self.order, size)


# Not matfree's Lanczos: the Jacobian of an exact denoiser has few different eigenvalues, so that
# the Krylov space is exhausted after a few steps as a rule.  A vector that is then orthogonalised
# once only is not orthogonal to the basis at all, and its row spoils the whole rule.


def _lanczos(product: Matvec, start: Array, order: int) -> Array:
    """The tridiagonal matrix, (order, order), of Lanczos steps from `start`, reorthogonalised.

    Where the Krylov space is exhausted the quadrature is exact, and the rest is coupled to nothing:
    nodes of weight 0, each at its own place above the spectrum, for the derivative of an
    eigenproblem is NaN at equal ones.  NaN of the network stays.
    """
    eps = jnp.finfo(start.dtype).eps

    def step(state: tuple[Array, Array, Array, Array], index: Array) -> tuple[Any, Any]:
        basis, v, scale, idle = state
        basis = basis.at[index].set(v)
        image = product(v)
        alpha = jnp.sum(v * image)
        with jax.default_matmul_precision("highest"):
            for _ in range(2):  # twice is enough (Kahan; Parlett)
                image -= (basis @ image) @ basis
        beta = safe_sqrt(jnp.sum(image**2))
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        exhausted = beta <= eps * scale
        beta = jnp.where(exhausted, 0, beta)
        v = jnp.where(exhausted, 0, image / jnp.where(exhausted, 1, beta))
        return (basis, v, scale, idle | exhausted), (alpha, beta, idle)

    basis = jnp.zeros((order, start.size), start.dtype)
    v = start / jnp.sqrt(jnp.sum(start**2))
    state = (basis, v, jnp.zeros((), start.dtype), jnp.zeros((), bool))
    (_, _, scale, _), (diagonal, off, idle) = jax.lax.scan(step, state, jnp.arange(order))
    # No node of the run is above 2 scale (Gershgorin); far enough, and not so far that they round.
    above = jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1)) * (2 + jnp.arange(order) / order)
    diagonal = jnp.where(idle, above.astype(start.dtype), diagonal)
    return jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)


def _gauss_rules(tridiagonals: Array) -> tuple[Array, Array]:
    """Nodes and weights, (K, order) each, from (K, order, order)."""
    nodes, vectors = jnp.linalg.eigh(tridiagonals)
    return nodes, vectors[:, 0, :] ** 2


def positive_exact(chunk_size: int = 32, *, above_noise: bool = False) -> Trace:
    """The trace of the positive part of the symmetrised operator: sum of max(eigenvalue, 0).

    Equal to the trace for a positive semi-definite operator, such as the Jacobian of an exact
    denoiser; never smaller than the trace otherwise.  Zero-mean noise in the Jacobian is rectified:
    it can only add, so where the spectrum's tail is noise the value is biased upward.

    Args:
        chunk_size: products at once.
        above_noise: sum only the eigenvalues that exceed in size the most negative one, which can
            be nothing but error.  Removes the rectified noise; the module's text says what it
            costs.  Still equal to the trace for a positive semi-definite operator.

    Cost: D products and one D x D symmetric eigenproblem.  Standard error 0.  Two derivatives,
    whatever the multiplicities of the eigenvalues.

    >>> matrix = jnp.diag(jnp.array([1.0, 0.5, 0.125, -0.25]))
    >>> positive_exact()(lambda v: matrix @ v, jnp.zeros(4)).value
    Array(1.625, dtype=float32)
    >>> positive_exact(above_noise=True)(lambda v: matrix @ v, jnp.zeros(4)).value
    Array(1.5, dtype=float32)
    """
    check_positive("positive_exact", "chunk_size", chunk_size)
    return _PositiveExact(chunk_size, above_noise)


def function_lanczos(
    function: Callable[[Array], Array], num_probes: int, order: int = 24, *, chunk_size: int = 4
) -> Trace:
    """tr f(S) of the symmetrised operator, by stochastic Lanczos quadrature.

    Args:
        function: f, elementwise; a function of a module (it is part of the compiled program).
        num_probes: random signs, each with a Lanczos run of its own.
        order: Lanczos steps, at most D.  The Gauss rule is exact for polynomials of degree
            2 order - 1, and for any f once the order reaches the number of different eigenvalues.
        chunk_size: probes that run at once.

    Returns:
        A trace strategy; its standard error is that of the probes, at most sqrt(2 / K) |f(S)|_F,
        and does not contain the error of the quadrature.

    Cost: `num_probes * order` JVPs and as many VJPs; order * D numbers for each probe of a chunk.

    >>> matrix = jnp.diag(jnp.array([4.0, 1.0, 0.0]))
    >>> trace = function_lanczos(jnp.square, num_probes=2, order=3)
    >>> trace(lambda v: matrix @ v, jnp.zeros(3), key=jax.random.key(0)).value.round(3)
    Array(17., dtype=float32)
    """
    check_positive("function_lanczos", "num_probes", num_probes)
    check_positive("function_lanczos", "order", order)
    check_positive("function_lanczos", "chunk_size", chunk_size)
    return _FunctionLanczos(function, num_probes, order, chunk_size)


def positive_lanczos(
    num_probes: int, order: int = 24, *, above_noise: bool = False, chunk_size: int = 4
) -> Trace:
    """`positive_exact` without the spectrum: `function_lanczos` of max(l, 0).

    For images and latents, where D products are too many.  The kink at 0 costs the Gauss rule
    little where the spectrum clusters at 0 and 1, as a denoiser's does.

    Args:
        num_probes, order, chunk_size: as in `function_lanczos`.
        above_noise: as in `positive_exact`; the edge is the lowest node of all probes' rules.

    Cost: `num_probes * order` JVPs and as many VJPs.
    """
    check_positive("positive_lanczos", "num_probes", num_probes)
    check_positive("positive_lanczos", "order", order)
    check_positive("positive_lanczos", "chunk_size", chunk_size)
    function = None if above_noise else positive_part
    return _FunctionLanczos(function, num_probes, order, chunk_size)
