r"""A Gaussian on an affine subspace of R^D, x0 = mean + basis (scales * z), z ~ N(0, I_d).

With y = basis^T (x - mean), the remainder n = x - mean - basis y, and l_i = scales_i^2,

    D(x; sigma)      = mean + basis [l_i y_i / (l_i + sigma^2)]
    F(x; sigma)      = sum_i [ l_i / (l_i + sigma^2) + sigma^2 y_i^2 / (l_i + sigma^2)^2 ]
                       + |n|^2 / sigma^2
    log rho_sigma(x) = -1/2 sum_i [ log 2 pi (l_i + sigma^2) + y_i^2 / (l_i + sigma^2) ]
                       - (D - d)/2 log(2 pi sigma^2) - |n|^2 / (2 sigma^2).

The remainder is formed as a vector: as |x - mean|^2 - |y|^2 it would cancel, and be divided by
sigma^2.  No D x D matrix is formed.
"""

# ruff: noqa: D102 -- a method that overrides one of `Distribution` is documented there.

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.analytic.base import Distribution, floating, is_concrete, norm
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["LinearGaussian"]


def _matvec(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


@struct.dataclass
class LinearGaussian(Distribution):
    """N(mean, basis diag(scales^2) basis^T): a d-dimensional Gaussian in R^D, 0 <= d <= D.

    Points are vectors.  Cost of every method: O(D d).

    Attributes:
        mean: (D,), in data units.
        basis: (D, d), orthonormal columns; d = 0 is an atom, a point mass at `mean`.
        scales: (d,), positive standard deviations along the columns, in data units.

    Raises:
        ValueError: if the shapes disagree, a scale is not positive, or the columns are not
            orthonormal (values are looked at outside `jit` and `vmap` only).

    >>> line = LinearGaussian(jnp.zeros(2), jnp.array([[1.0], [0.0]]), jnp.array([2.0]))
    >>> line(jnp.array([5.0, 1.0]), 1.0)       # E[x0 | x] = 4/5 x along the line, 0 across it
    Array([4., 0.], dtype=float32)
    >>> line.flipd(jnp.array([0.0, 0.0]), 0.01).round(3), line.lid(jnp.array([3.0, 0.0]))
    (Array(1., dtype=float32), Array(1., dtype=float32))
    """

    mean: Array
    basis: Array
    scales: Array

    @classmethod
    def atom(cls, point: ArrayLike) -> LinearGaussian:
        """A point mass at `point`, (D,): dimension 0, and F = |x - point|^2 / sigma^2.

        >>> float(LinearGaussian.atom(jnp.zeros(3)).flipd(jnp.array([0.0, 0.0, 2.0]), 1.0))
        4.0
        """
        point = floating("LinearGaussian.atom(point", point, 1, "a vector (D,)")
        return cls(point, jnp.zeros((point.size, 0), point.dtype), jnp.zeros(0, point.dtype))

    def _check(self) -> dict[str, Array]:
        mean = floating("LinearGaussian(mean", self.mean, 1, "a vector (D,)")
        basis = floating("LinearGaussian(basis", self.basis, 2, "a matrix (D, d)")
        scales = floating("LinearGaussian(scales", self.scales, 1, "a vector (d,)")
        if basis.shape != (mean.size, scales.size):
            raise ValueError(
                f"`LinearGaussian(basis=...)` has shape {basis.shape}; with mean {mean.shape} and "
                f"scales {scales.shape} it must be {(mean.size, scales.size)}: one column per "
                "scale."
            )
        if is_concrete(scales) and not np.all(np.asarray(scales) > 0):
            raise ValueError(
                "`LinearGaussian(scales=...)` must be positive standard deviations; drop the "
                "columns of `basis` along which the distribution does not vary."
            )
        if is_concrete(basis):
            columns = np.asarray(basis, np.float64)
            defect = np.abs(columns.T @ columns - np.eye(scales.size)).max(initial=0.0)
            if not defect <= float(jnp.finfo(basis.dtype).eps) ** 0.5:
                raise ValueError(
                    f"`LinearGaussian(basis=...)` has columns that are not orthonormal: "
                    f"|V^T V - I| reaches {defect:.1e}. Take `jnp.linalg.qr(basis)[0]`, or for a "
                    "factor A of a covariance A A^T, U and s of `jnp.linalg.svd(A)`."
                )
        return {"mean": mean, "basis": basis, "scales": scales}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mean.shape[0],)

    def _dimension(self) -> float:
        return float(self.scales.shape[0])

    def _split(self, x: ArrayLike) -> tuple[Array, Array]:
        """Coordinates of x - mean along the basis, (d,), and its remainder across it, (D,)."""
        delta = self._point(x) - self.mean
        along = _matvec(self.basis.T, delta)
        return along, delta - _matvec(self.basis, along)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        along, _ = self._split(x)
        variances = self.scales**2
        return self.mean + _matvec(self.basis, along * variances / (variances + sigma**2))

    def log_density(self, x: Array, sigma: ArrayLike) -> Array:
        along, across = self._split(x)
        totals = self.scales**2 + sigma**2
        num_across = self.ambient_dim - self.scales.size
        return -0.5 * (
            jnp.sum(jnp.log(2 * jnp.pi * totals) + along**2 / totals)
            + num_across * (jnp.log(2 * jnp.pi) + 2 * jnp.log(sigma))
            + jnp.sum((across / sigma) ** 2)
        )

    def flipd(self, x: Array, sigma: ArrayLike) -> Array:
        along, across = self._split(x)
        variances = self.scales**2
        totals = variances + sigma**2
        spread = jnp.sum(variances / totals + (sigma * along / totals) ** 2)
        return spread + jnp.sum((across / sigma) ** 2)

    def distance(self, x: Array) -> Array:
        return norm(self._split(x)[1])

    def sample(self, num: int, *, key: Key) -> Array:
        normals = jax.random.normal(key, (num, self.scales.size), self.scales.dtype)
        return self.mean + _matvec(normals * self.scales, self.basis.T)
