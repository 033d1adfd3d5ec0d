r"""The normal-bundle estimator: scores near a point span the directions out of the manifold.

At a noisy point x + sigma eps the score points back to the manifold, along the normals.  Stacked
over many draws and centred, sigma * score has singular values near 1 (after division by
sqrt(K - 1), as in a covariance) for each normal direction and near 0 for each tangent one, so that
the dimension is D minus the number of large ones (Stanczuk et al., ICML 2024, 2212.12611, whose
code centres, too): not centred, the mean score, which lies along the tangents, is counted as a
normal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_answer, check_key, check_point

__all__ = ["normal_bundle_spectrum"]


def normal_bundle_spectrum(
    denoiser: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    key: Key,
    num_samples: int | None = None,
    chunk_size: int = 64,
) -> Array:
    """Singular values of normalised scores around a point, largest first.

    The rows of the matrix are (D(x + sigma eps) - x - sigma eps) / sigma, less their mean, so the
    values are those of the noise seen along the normals: about 1 for a normal direction, about 0
    for a tangent one.  The dimension is `x.size - rank_by_threshold(values)`, or by the authors'
    rule `x.size - rank_by_largest_difference(values)`.

    Args:
        denoiser: the model.
        x: one point, of any shape with D entries.
        sigma: the noise level, in data units.
        key: draws the noise.
        num_samples: K, by default 4 D as in the paper; more than D.
        chunk_size: noisy points evaluated at once.

    Cost: K network evaluations and an SVD of a K x D matrix; no derivatives.  Prefer the Jacobian's
    spectrum, which is cheaper and has no sampling noise, unless derivatives are not to be had.

    Raises:
        TypeError, ValueError: as `flipd`; also if `num_samples <= D`.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> values = normal_bundle_spectrum(line, jnp.zeros(3), 0.1, key=jax.random.key(0))
    >>> int(3 - jnp.sum(values > 0.5))
    1
    """
    x, sigma = check_point("normal_bundle_spectrum", denoiser, x, sigma)
    key = check_key("normal_bundle_spectrum", key)
    num_samples = 4 * x.size if num_samples is None else num_samples
    if num_samples <= x.size:
        raise ValueError(
            f"`normal_bundle_spectrum(num_samples={num_samples})` must exceed the dimension of "
            f"the ambient space, {x.size}; otherwise missing rows look like tangents."
        )

    def normalised_score(sample_key: Key) -> Array:
        noisy = x + sigma * jax.random.normal(sample_key, x.shape, x.dtype)
        denoised = denoiser(noisy, sigma)
        check_answer("normal_bundle_spectrum", denoised, x)
        return ((denoised - noisy) / sigma).reshape(-1)

    keys = jax.random.split(key, num_samples)
    rows = jax.lax.map(normalised_score, keys, batch_size=min(chunk_size, num_samples))
    centred = rows - jnp.mean(rows, axis=0)
    return jnp.linalg.svd(centred / jnp.sqrt(num_samples - 1), compute_uv=False)
