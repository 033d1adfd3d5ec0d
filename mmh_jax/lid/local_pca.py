r"""Local principal components: the spectrum of a neighbourhood, and rules that count in it.

The k neighbours of a point of a smooth d-dimensional set lie near its tangent space.  Of their
covariance d eigenvalues are of the order of r_k^2, the others, by curvature, of r_k^4: large
against small, and every rule below is a way to say where the one ends and the other begins.  All
of them read the same vector, `local_spectrum`, at no further cost.

| rule | counts |
|---|---|
| `fukunaga_olsen` | l_i > fraction * l_1 (Fukunaga & Olsen 1971) |
| `rank_by_ratio` | up to the largest l_i / l_{i+1} |
| `explained_variance` | as many as hold `fraction` of the sum |
| `kaiser` | l_i above the mean |
| `broken_stick` | the first l_i / sum above the i-th longest piece of a stick broken at random |
| `fan` | where a gap or the explained variance is large, above a noise floor (Fan et al. 2010) |
| `minka` | the largest Laplace evidence of probabilistic PCA (Minka 2000) |
| `ca_pca` | the ball of R^d whose spectrum is nearest, after curvature (Gilbert & O'Neill 2023) |
| `lid.participation_ratio` | (sum l)^2 / sum l^2, not an integer |

Counting needs more neighbours than dimensions: k points have a covariance of rank k - 1.  A
spectrum with NaN has no count: the whole numbers are -1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmh_jax.lid.jacobian_rank import counted
from mmh_jax.lid.neighborhoods import check_offsets
from mmh_jax.typing import Array, ArrayLike

__all__ = [
    "broken_stick",
    "ca_pca",
    "explained_variance",
    "fan",
    "fukunaga_olsen",
    "kaiser",
    "local_spectrum",
    "minka",
    "rank_by_ratio",
]


def local_spectrum(offsets: ArrayLike) -> Array:
    """The eigenvalues of the covariance of the neighbours of one point.

    Singular values, squared: through the covariance itself the small ones would be lost.  The mean
    of the neighbours is taken off, so that they may be relative to any point.

    Cost: a triangular factor of a (k, D) matrix, max(k, D) min(k, D)^2 operations, and the singular
    values of it, a square matrix of min(k, D) rows.

    Args:
        offsets: (k, *shape), k at least 3.

    Returns:
        (min(k - 1, D),), descending, in squared data units; normalised by k - 1.

    Raises:
        TypeError: if `offsets` are not of a floating dtype.
        ValueError: if there are fewer than 3.

    >>> local_spectrum(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])).tolist()
    [0.666..., 0.166...]
    """
    offsets = check_offsets("local_spectrum", offsets, least=3)
    k, ambient_dim = offsets.shape
    centred = offsets - jnp.mean(offsets, axis=0)
    values = _singular_values(centred) ** 2 / (k - 1)
    return values[: min(k - 1, ambient_dim)]


@jax.custom_jvp
def _singular_values(matrix: Array) -> Array:
    """Those of the triangular factor: as exact, and faster for few rows of many columns."""
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    return jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)


@_singular_values.defjvp
def _singular_values_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    # Through the factor it would divide by singular values, of which some may be 0.
    return jax.jvp(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), primals, tangents)


def fukunaga_olsen(spectrum: ArrayLike, *, fraction: float = 0.05) -> Array:
    """How many eigenvalues exceed a fraction of the largest; 0 if all are 0.

    >>> fukunaga_olsen(jnp.array([1.0, 0.5, 0.04]))
    Array(2, dtype=int32)
    """
    spectrum = _checked("fukunaga_olsen", spectrum)
    return counted(spectrum, jnp.sum(spectrum > fraction * spectrum[0]))


def rank_by_ratio(spectrum: ArrayLike) -> Array:
    """The place of the largest ratio of an eigenvalue to the next; 0 if all are 0.

    Unlike `rank_by_gap` it is never the whole spectrum, whose end is only where the data end.
    Eigenvalues below rounding, `eps` times the largest, count as equal to it: their ratios mean
    nothing.  A spectrum without a next one (D = 1) has all of its directions.

    >>> rank_by_ratio(jnp.array([1.0, 0.5, 0.01, 0.002]))
    Array(2, dtype=int32)
    """
    spectrum = _checked("rank_by_ratio", spectrum)
    if len(spectrum) == 1:
        return counted(spectrum, jnp.sum(spectrum > 0))
    least = jnp.maximum(spectrum[0] * jnp.finfo(spectrum.dtype).eps, jnp.finfo(spectrum.dtype).tiny)
    floored = jnp.maximum(spectrum, least)
    place = jnp.argmax(floored[:-1] / floored[1:]) + 1
    return counted(spectrum, jnp.where(spectrum[0] > 0, place, 0))


def explained_variance(spectrum: ArrayLike, *, fraction: float = 0.95) -> Array:
    """How many of the largest eigenvalues hold a fraction of their sum; 0 if all are 0.

    >>> explained_variance(jnp.array([8.0, 1.0, 1.0]), fraction=0.85)
    Array(2, dtype=int32)
    """
    spectrum = _checked("explained_variance", spectrum)
    held = jnp.cumsum(spectrum)
    count = jnp.sum(held < fraction * held[-1]) + 1
    return counted(spectrum, jnp.where(spectrum[0] > 0, count, 0))


def kaiser(spectrum: ArrayLike) -> Array:
    """How many eigenvalues exceed their mean (Kaiser 1960).

    >>> kaiser(jnp.array([3.0, 2.0, 0.5, 0.5]))
    Array(2, dtype=int32)
    """
    spectrum = _checked("kaiser", spectrum)
    return counted(spectrum, jnp.sum(spectrum > jnp.mean(spectrum)))


def broken_stick(spectrum: ArrayLike) -> Array:
    """How many of the first shares exceed those of a stick broken at random (Frontier 1976).

    0 if the first does not, as in a spectrum of nearly equal eigenvalues: no direction stands out.

    Of p pieces the i-th longest is on average sum_{j >= i} 1 / (p j).

    >>> broken_stick(jnp.array([0.7, 0.2, 0.1]))               # .61, .28, .11
    Array(1, dtype=int32)
    """
    spectrum = _checked("broken_stick", spectrum)
    p = len(spectrum)
    pieces = jnp.cumsum(1 / jnp.arange(p, 0, -1, dtype=spectrum.dtype))[::-1] / p
    above = spectrum > pieces * jnp.sum(spectrum)
    return counted(spectrum, jnp.sum(jnp.cumprod(above)))


def fan(
    spectrum: ArrayLike, *, gap: float = 10.0, fraction: float = 0.8, signal: float = 0.95
) -> Array:
    """The first place with a large gap or a large share, above a noise floor (Fan et al. 2010).

    The mean of the eigenvalues beyond those that hold `signal` of the variance is the floor, taken
    off all; then the first i with l_i / l_{i+1} > `gap`, or with more than `fraction` of the sum
    in the first i.

    >>> fan(jnp.array([1.0, 0.9, 0.5, 0.1, 0.01]))
    Array(2, dtype=int32)
    """
    spectrum = _checked("fan", spectrum)
    total, places = jnp.sum(spectrum), jnp.arange(len(spectrum))
    start = jnp.argmax(jnp.cumsum(spectrum) > signal * total)
    beyond = places >= start
    floor = jnp.sum(jnp.where(beyond, spectrum, 0)) / jnp.sum(beyond)
    clean = spectrum - floor
    # Without division: l_i > gap l_{i+1} for positive l_{i+1}; a negative one is noise itself, and
    # its ratio is negative.
    following = jnp.append(clean[1:], clean[-1])
    large_gap = (following > 0) & (clean > gap * following)
    large_share = jnp.cumsum(clean) > fraction * jnp.sum(clean)
    first = jnp.argmax(large_gap | large_share)
    return counted(spectrum, jnp.where(spectrum[0] > 0, first + 1, 0))


def minka(spectrum: ArrayLike, *, num_samples: int, ambient_dim: int) -> Array:
    """The dimension of largest evidence under probabilistic PCA (Minka 2000, eq. 30).

    Args:
        spectrum: from `local_spectrum`.
        num_samples: k.
        ambient_dim: D, of which `spectrum` holds the eigenvalues that are not 0.

    Returns:
        An integer below the length of the spectrum, or, if some of it is 0 to rounding, the number
        of the others: without noise the likelihood of that dimension is infinite.

    >>> spectrum = jnp.array([1.0, 0.9, 0.8, 0.01, 0.009, 0.008])
    >>> minka(spectrum, num_samples=50, ambient_dim=6)
    Array(3, dtype=int32)
    """
    spectrum = _checked("minka", spectrum)
    p, n, dim = len(spectrum), float(num_samples), ambient_dim
    unit = jnp.where(spectrum[0] > 0, spectrum[0], 1)
    tiny = jnp.finfo(spectrum.dtype).tiny
    values = spectrum / unit
    rank = jnp.sum(values > dim * jnp.finfo(spectrum.dtype).eps)

    def log(x: Array) -> Array:
        return jnp.log(jnp.maximum(x, tiny))

    index = jnp.arange(p)
    counts = jnp.arange(1, p + 1)

    # log of the density of the prior on frames, sum_{i <= k} log Gamma((D - i + 1) / 2) - ...
    halves = (dim - index) / 2
    prior = jnp.cumsum(jax.scipy.special.gammaln(halves) - jnp.log(jnp.pi) * halves)
    # Pairs i < j: log (l_i - l_j), over the zeros beyond the spectrum as well.
    later = index[None, :] > index[:, None]
    differences = jnp.where(later, log(values[:, None] - values[None, :]), 0)
    rows = jnp.sum(differences, axis=1) + (dim - p) * log(values)
    differ = jnp.cumsum(rows)
    inverse = jnp.where(
        later.T, log((values[None, :] - values[:, None]) / (values[None, :] * values[:, None])), 0
    )
    inverses = jnp.cumsum(jnp.sum(inverse, axis=1))

    def evidence(k: Array) -> Array:
        signal = index < k
        noise = jnp.sum(jnp.where(signal, 0, values)) / (dim - k)
        to_noise = jnp.sum(jnp.where(signal, log((values - noise) / (values * noise)), 0))
        size = dim * k - k * (k + 1) / 2
        curvature = size * jnp.log(n) + differ[k - 1] + inverses[k - 1] + (dim - k) * to_noise
        fit = jnp.sum(jnp.where(signal, log(values), 0)) + (dim - k) * log(noise)
        return (
            prior[k - 1] - k * jnp.log(2.0) - n / 2 * fit
            + jnp.log(2 * jnp.pi) * (size + k) / 2 - curvature / 2 - k * jnp.log(n) / 2
        )  # fmt: skip

    found = jnp.where(counts < rank, jax.vmap(evidence)(counts), -jnp.inf)
    place = jnp.argmax(found) + 1
    return counted(spectrum, jnp.where((rank < 2) | (rank < p), rank, place))


def ca_pca(spectrum: ArrayLike, *, radius: ArrayLike) -> Array:
    r"""The dimension of the ball with the nearest spectrum, after curvature (CA-PCA).

    Points uniform in a d-dimensional ball of radius r have d eigenvalues r^2 / (d + 2).  On a
    manifold that is quadratic to second order, curvature takes from each of these a part of what
    it puts into the normal directions, t_d = sum_{i > d} l_i.  Gilbert & O'Neill (2023,
    2309.13478) give it back, and take the d that minimises

        |(l_i + (3 d + 4) / (d (d + 4)) t_d - r^2 / (d + 2))_{i <= d}| + 2 t_d.

    Unlike the rules that count, it uses the size of the eigenvalues: it wants points of constant
    density, and a true radius.

    Args:
        spectrum: from `local_spectrum`.
        radius: of the ball that holds the neighbours: the authors take the mean of the distances
            of the last neighbour and of the first that is left out.

    Returns:
        An integer, at most the length of the spectrum; 0 if all eigenvalues are 0.

    >>> ca_pca(jnp.array([0.2, 0.2, 0.2, 0.0]), radius=1.0)    # a ball of three dimensions
    Array(3, dtype=int32)
    """
    spectrum = _checked("ca_pca", spectrum)
    radius = jnp.asarray(radius, spectrum.dtype)
    unit = jnp.where(radius > 0, radius, 1) ** 2
    values = spectrum / unit
    d = jnp.arange(1, len(values) + 1)
    inside = d[None, :] <= d[:, None]
    normal = jnp.sum(jnp.where(inside, 0, values), axis=1)
    adjusted = values + ((3 * d + 4) / (d * (d + 4)) * normal)[:, None]
    missed = jnp.where(inside, adjusted - (1 / (d + 2))[:, None], 0)
    place = jnp.argmin(jnp.linalg.norm(missed, axis=1) + 2 * normal)
    return counted(spectrum, jnp.where(spectrum[0] > 0, place + 1, 0))


def _checked(caller: str, spectrum: ArrayLike) -> Array:
    spectrum = jnp.asarray(spectrum)
    if not jnp.issubdtype(spectrum.dtype, jnp.floating) or spectrum.ndim != 1 or not spectrum.size:
        raise ValueError(
            f"`{caller}(spectrum=...)` has shape {spectrum.shape} and dtype {spectrum.dtype}; it "
            "takes the eigenvalues of one neighbourhood, (p,), as from `local_spectrum`."
        )
    return spectrum
