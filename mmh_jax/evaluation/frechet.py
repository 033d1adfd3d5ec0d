r"""How far two sets of features are apart: the Frechet distance, and a kernel distance.

Of two Gaussians N(m1, S1) and N(m2, S2) the squared 2-Wasserstein distance is

    F = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2}).

With S1 = A^T A and S2 = B^T B, where A and B are the centred features over sqrt(n - 1), the last
trace is a nuclear norm: the product S1 S2 has the eigenvalues of (B A^T)(B A^T)^T, so that

    tr (S1 S2)^{1/2} = |A B^T|_* = sum of the singular values of R_A R_B^T,

R_A and R_B the triangular factors of A and B.  Nothing is squared and rooted again, no matrix is
non-symmetric, and features that do not vary, or too few of them, are no special case.  As the
optimal map from the first Gaussian to the second is linear, x -> m2 + T (x - m1) with S1 T S1 =
(S1 S2)^{1/2} S1, F moves with an added point x by

    2 (m1 - m2).(x - m1) + (x - m1)^T (I - T) (x - m1) - tr((I - T) S1),

whose spread over the points is the standard error.

The kernel distance is the squared maximum mean discrepancy of k(x, y) = (x.y / d + 1)^3,

    E k(x, x') + E k(y, y') - 2 E k(x, y),

taken over pairs of different points: without bias at any number of points.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmh_jax.lid.points import check_finite, check_points
from mmh_jax.linalg.operator import check_positive
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["frechet_distance", "frechet_of_moments", "kernel_distance"]


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> Estimate:
    """The Frechet distance between Gaussians fitted to two sets of features.

    Biased upwards: with n points in each set by about c / n, where c grows with the square of the
    number of features; two samples of one law are not at distance 0.  Compare sets of one size
    only, better by `kernel_distance`, or go on to n = infinity along a line in 1 / n (Chong &
    Forsyth 2020, 1911.07023).  It sees means and covariances, nothing else.

    Args:
        features: (N, d) of samples, N at least 2; `jax.vmap(classifier.features)(images)`.
        reference: (M, d) of data, M at least 2.

    Returns:
        `Estimate(value, stderr)` of floats, in squared units of the features.  The standard error
        is of first order in 1 / sqrt(n); it does not contain the bias, and where both laws are
        equal, so that the first order vanishes, it says nothing.

    Cost: QR of both sets, (N + M) d^2, and an SVD, d^3; on the host in float64.

    Raises:
        TypeError: if the features are not of a floating dtype.
        ValueError: if they are not two matrices (N, d) and (M, d) of finite numbers with at least
            2 rows.

    References: Dowson & Landau 1982; Heusel et al. 2017 (1706.08500), eq. 6.

    >>> rng = np.random.default_rng(0)
    >>> distance = frechet_distance(rng.normal(size=(9999, 2)) + 3, rng.normal(size=(9999, 2)))
    >>> bool(abs(distance.value - 18) < 3 * distance.stderr)
    True
    """
    features, reference = _checked("frechet_distance", features, reference)
    both = (features, reference)
    means = [rows.mean(axis=0) for rows in both]
    centred = [rows - mean for rows, mean in zip(both, means, strict=True)]
    factors = [np.linalg.qr(c, mode="r") / np.sqrt(len(c) - 1) for c in centred]
    # F = |m1 - m2|^2 + |R_A|^2 + |R_B|^2 - 2 |R_A R_B^T|_*.
    left, singular, right = np.linalg.svd(factors[0] @ factors[1].T, full_matrices=False)
    shift = means[0] - means[1]
    value = shift @ shift + sum((f**2).sum() for f in factors) - 2 * singular.sum()
    # The derivatives of the nuclear norm along the covariances: T / 2, and that of the way back.
    polar = left @ right
    maps = (
        np.linalg.pinv(factors[0]) @ polar @ factors[1],
        np.linalg.pinv(factors[1]) @ polar.T @ factors[0],
    )
    variance = 0.0
    for c, map_, sign in zip(centred, maps, (1, -1), strict=True):
        moves = 2 * sign * (c @ shift) + (c**2).sum(axis=1) - np.einsum("ni,ij,nj->n", c, map_, c)
        variance += moves.var(ddof=1) / len(c)
    # Rounding alone can make it negative.
    return Estimate(max(float(value), 0.0), float(np.sqrt(variance)))


def frechet_of_moments(
    mean: ArrayLike, covariance: ArrayLike, other_mean: ArrayLike, other_covariance: ArrayLike
) -> float:
    """The Frechet distance between two Gaussians, from published means and covariances.

    Prefer `frechet_distance` where the features are at hand: a covariance has already lost half
    of the digits of its small eigenvalues.

    Args:
        mean, other_mean: (d,).
        covariance, other_covariance: (d, d), symmetric; eigenvalues below 0 are taken for 0.

    Cost: two symmetric eigenproblems and an SVD, d^3 each; on the host in float64.

    Raises:
        ValueError: if the shapes disagree, a matrix is not symmetric or a number not finite.

    References: as for `frechet_distance`.

    >>> frechet_of_moments([0.0, 0.0], np.diag([1.0, 4.0]), [3.0, 0.0], np.diag([1.0, 1.0]))
    10.0
    """
    means = [np.asarray(m, np.float64) for m in (mean, other_mean)]
    roots = []
    for m, given in zip(means, (covariance, other_covariance), strict=True):
        matrix = np.asarray(given, np.float64)
        if m.ndim != 1 or matrix.shape != (m.size, m.size) or m.shape != means[0].shape:
            raise ValueError(
                f"`frechet_of_moments` got a mean of shape {m.shape} and a covariance of "
                f"{matrix.shape}; it takes (d,) and (d, d) twice, with one d."
            )
        finite = np.isfinite(m).all() and np.isfinite(matrix).all()
        if not finite or not np.allclose(
            matrix, matrix.T, rtol=1e-5, atol=1e-8 * abs(matrix).max()
        ):
            raise ValueError(
                "`frechet_of_moments(covariance=...)` is not symmetric, or a number is not finite; "
                "pass `numpy.cov(features, rowvar=False)`."
            )
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        roots.append(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)
    shift = means[0] - means[1]
    singular = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False)
    value = shift @ shift + sum((root**2).sum() for root in roots) - 2 * singular.sum()
    return max(float(value), 0.0)


def kernel_distance(
    features: ArrayLike, reference: ArrayLike, *, degree: int = 3, block_size: int = 1024
) -> Estimate:
    """The kernel distance (KID): an unbiased squared MMD of a polynomial kernel.

    Prefer it to `frechet_distance` for few points: its mean does not depend on their number.  It
    can be negative.

    Args:
        features: (N, d) of samples, N at least 3.
        reference: (M, d) of data, M at least 3.
        degree: of the kernel (x.y / d + 1)^degree, which sees moments up to this order.
        block_size: rows of the kernel matrix in memory at once, against as many columns.

    Returns:
        `Estimate(value, stderr)` of floats.  The standard error is the jackknife's, of all points
        and not of subsets: right where the laws differ, up to sqrt(2) too large where they agree.

    Cost: (N + M)^2 d multiplications in matrix products; on the host in float64.

    Raises:
        TypeError, ValueError: as `frechet_distance`; or if a size is not a positive integer.

    References: Gretton et al. 2012, JMLR 13, eq. 3; Binkowski et al. 2018 (1801.01401), sec. 4.

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(2, 500, 4))
    >>> distance = kernel_distance(x, y)
    >>> bool(abs(distance.value) < 3 * distance.stderr)
    True
    """
    check_positive("kernel_distance", "degree", degree)
    check_positive("kernel_distance", "block_size", block_size)
    x, y = _checked("kernel_distance", features, reference, least=3)
    within_x, _ = _kernel_sums(x, x, degree, block_size)
    within_y, _ = _kernel_sums(y, y, degree, block_size)
    from_x, from_y = _kernel_sums(x, y, degree, block_size)
    n, m = len(x), len(y)
    within_x -= _kernel(np.einsum("ij,ij->i", x, x), x, degree)
    within_y -= _kernel(np.einsum("ij,ij->i", y, y), y, degree)
    parts = within_x.sum() / (n * (n - 1)), within_y.sum() / (m * (m - 1)), from_x.sum() / (n * m)
    value = parts[0] + parts[1] - 2 * parts[2]
    # Leaving out point i: the sums of its row (and column) leave with it.
    without_x = (within_x.sum() - 2 * within_x) / ((n - 1) * (n - 2))
    without_x += parts[1] - 2 * (from_x.sum() - from_x) / ((n - 1) * m)
    without_y = (within_y.sum() - 2 * within_y) / ((m - 1) * (m - 2))
    without_y += parts[0] - 2 * (from_y.sum() - from_y) / ((m - 1) * n)
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return Estimate(float(value), float(np.sqrt(variance)))


def _kernel(products: np.ndarray, x: np.ndarray, degree: int) -> np.ndarray:
    return (products / x.shape[1] + 1) ** degree


def _kernel_sums(
    x: np.ndarray, y: np.ndarray, degree: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the rows and of the columns of the kernel matrix of x and y."""
    rows, columns = np.zeros(len(x)), np.zeros(len(y))
    for i in range(0, len(x), block_size):
        for j in range(0, len(y), block_size):
            block = _kernel(x[i : i + block_size] @ y[j : j + block_size].T, x, degree)
            rows[i : i + block_size] += block.sum(axis=1)
            columns[j : j + block_size] += block.sum(axis=0)
    return rows, columns


def _checked(
    caller: str, features: Any, reference: Any, *, least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64."""
    sets = {"features": features, "reference": reference}
    for name, given in sets.items():
        rows = check_points(caller, name, given)
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(
                f"`{caller}({name}=...)` has shape {rows.shape}; it takes features (N, d) of at "
                f"least {least} points. Flatten images: `x.reshape(len(x), -1)`."
            )
        check_finite(caller, name, rows)
        sets[name] = rows.astype(np.float64)
    features, reference = sets.values()
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`{caller}` got {features.shape[1]} features for the samples and "
            f"{reference.shape[1]} for the reference; take both from the same network."
        )
    return features, reference
