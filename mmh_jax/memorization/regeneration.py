r"""Regeneration: add noise to a point, sample again from there, and see how far off it ends.

The sampler's way down T from x + sigma z ends near x if the model knows x and nothing near it, and
anywhere on the manifold within about sigma otherwise.  In units of sigma^2

    R(x; sigma) = E_z |T(x + sigma z) - x|^2 / sigma^2
    S(x; sigma) = E_z |T(x + sigma z) - E_z T(x + sigma z)|^2 / sigma^2

are dimensions: for a Gaussian of variances l_i the probability flow multiplies each coordinate by
sqrt(g_i), g_i = l_i / (l_i + sigma^2), so that S is the sum of g_i, the trace term of FLIPD, and

    R = sum_i g_i + (1 - sqrt g_i)^2 y_i^2 / sigma^2,        y = x - mean.

Both tend to the dimension as sigma -> 0.  They are for *larger* noise: a memorized point comes back
from noise of about the distance to the next point that the model knows, which is what makes its
share of copies d_1 / d_2 small.  Where the data are dense every point comes back; the same quantity
of a model that has not memorized (an early checkpoint, a twin trained on other data) says how far
it would come back then, and log R_other / R is the detector.

R is small where what comes back is x, S where it is one point at all.  Their geometric mean asks
for both, with the same evaluations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.denoised_spread import geometric_mean
from mmh_jax.linalg.operator import check_positive, in_chunks, mean_and_stderr
from mmh_jax.sample import solve
from mmh_jax.typing import (
    Array,
    ArrayLike,
    Denoiser,
    Estimate,
    Key,
    check_key,
    check_point,
    is_traced,
)

__all__ = ["Regeneration", "regeneration"]


class Regeneration(NamedTuple):
    """What came back; see `regeneration`.

    Attributes:
        dimension: R, an `Estimate`.
        spread: S, an `Estimate`.
        ends: (K, *shape) the points that came back.
    """

    dimension: Estimate
    spread: Estimate
    ends: Any

    @property
    def mean(self) -> Estimate:
        """The geometric mean of both; its error is an upper bound, that of perfect correlation."""
        return geometric_mean(self.dimension, self.spread)


def regeneration(
    denoiser: Denoiser,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    key: Key,
    num_samples: int = 16,
    chunk_size: int = 16,
) -> Regeneration:
    """Noise and regenerate one point K times.

    Args:
        denoiser: the model.
        x: one clean point, of any shape.
        sigmas: (S,) decreasing noise levels in data units, such as `sample.karras_levels`: the
            first is that of the noise, sigma; the last should be small beside it.
        key: draws the noise.
        num_samples: K, at least 2.
        chunk_size: of them at once.

    Returns:
        `Regeneration`.

    Cost: K (2 S - 1) evaluations.  Bias: none for R and S but that of Heun's steps, of order
    1 / S^2; R less the dimension is O(sigma^2).

    Raises:
        TypeError, ValueError: as `lid.flipd`; or if the levels do not decrease.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> levels = jnp.geomspace(0.1, 0.001, 16)
    >>> found = regeneration(line, jnp.zeros(3), levels, key=jax.random.key(0), num_samples=4096)
    >>> bool(abs(found.dimension.value - 1) < 3 * found.dimension.stderr)
    True
    """
    x, levels = check_point("regeneration", denoiser, x, sigmas, levels=1)
    key = check_key("regeneration", key)
    check_positive("regeneration", "num_samples", num_samples, least=2)
    check_positive("regeneration", "chunk_size", chunk_size)
    down = is_traced(levels) or bool(np.all(np.diff(levels) < 0))
    if levels.size < 2 or not down:
        raise ValueError(
            "`regeneration(sigmas=...)` must be at least 2 decreasing noise levels: the first is "
            "that of the noise. Did you mean `sigmas[::-1]`?"
        )

    def end(sample_key: Key) -> Array:
        noise = jax.random.normal(sample_key, x.shape, x.dtype)
        return solve(denoiser, x + levels[0] * noise, levels)

    ends = in_chunks(end, jax.random.split(key, num_samples), chunk_size)
    center = jnp.mean(ends, axis=0)
    spread = _squares(ends - center, levels[0]) * (num_samples / (num_samples - 1))
    return Regeneration(
        mean_and_stderr(_squares(ends - x, levels[0])), mean_and_stderr(spread), ends
    )


def _squares(away: Array, sigma: Array) -> Array:
    """The squared length of each, in units of sigma^2."""
    return jnp.sum((away.reshape(away.shape[0], -1) / sigma) ** 2, axis=1)
