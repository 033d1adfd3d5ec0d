r"""A time-conditioned residual MLP: the score network for points, and for images of a few pixels.

    h  = W_in x (and sin, cos of random projections of x, if asked for)
    h += W_2 silu(W_1 norm(h) + W_t e(c_noise))        `depth` times
    F  = W_out norm(h),    W_out = 0 at the start

with e a sinusoidal embedding of the noise level.  The last layer starts at zero, so that with EDM
preconditioning the untrained network is the best linear denoiser of white data.

`GradientMLP` is the gradient of a scalar built from it, and so has a symmetric Jacobian.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.typing import Array

__all__ = ["GradientMLP", "ResidualMLP", "sinusoidal_embedding"]


def sinusoidal_embedding(value: Array, size: int, *, max_frequency: float = 64.0) -> Array:
    """Sines and cosines of a scalar at `size // 2` frequencies, geometric from 1 to the maximum.

    >>> sinusoidal_embedding(jnp.array(0.0), 4)
    Array([0., 0., 1., 1.], dtype=float32)
    """
    frequencies = jnp.geomspace(1.0, max_frequency, size // 2, dtype=value.dtype)
    angles = value * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class _Block(nnx.Module):
    def __init__(self, width: int, embedding_size: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.time = nnx.Linear(embedding_size, width, use_bias=False, rngs=rngs)
        self.outer = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, h: Array, embedding: Array) -> Array:
        return h + self.outer(nnx.silu(self.inner(self.norm(h)) + self.time(embedding)))


class ResidualMLP(nnx.Module):
    """F(x, c_noise) for one point x of any shape, flattened inside.

    Args:
        shape: the shape of a point.
        width: hidden units.
        depth: residual blocks of two layers each.
        num_frequencies: random Fourier features of x, fed beside x (Tancik et al. 2020,
            2006.10739): with them a network can bend on small scales, and so memorize, much sooner.
        frequency_scale: the standard deviation of their frequencies, per unit of x.
        rngs: the source of the initial weights.

    >>> network = ResidualMLP((2, 3), width=16, depth=1, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((2, 3)), jnp.array(0.1)).shape
    (2, 3)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 256,
        depth: int = 3,
        num_frequencies: int = 0,
        frequency_scale: float = 4.0,
        embedding_size: int = 64,
        rngs: nnx.Rngs,
    ):
        size = math.prod(shape)
        self.shape = tuple(shape)
        self.embedding_size = embedding_size
        directions = frequency_scale * jax.random.normal(rngs.params(), (num_frequencies, size))
        self.directions = nnx.Variable(directions) if num_frequencies > 0 else None
        self.embed = nnx.Linear(embedding_size, embedding_size, rngs=rngs)
        self.enter = nnx.Linear(size + 2 * num_frequencies, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, embedding_size, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.leave = nnx.Linear(width, size, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array, c_noise: Array) -> Array:
        """F, of x's shape, for one point and one scalar `c_noise`."""
        flat = x.reshape(-1)
        features = [flat]
        if self.directions is not None:
            # The projections are fixed: no gradient reaches them.
            angles = jax.lax.stop_gradient(self.directions[...]) @ flat
            features += [jnp.sin(angles), jnp.cos(angles)]
        embedding = nnx.silu(self.embed(sinusoidal_embedding(c_noise, self.embedding_size)))
        h = self.enter(jnp.concatenate(features))
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(self.norm(h)).reshape(self.shape)


class GradientMLP(nnx.Module):
    """F(x, c_noise) = grad_x <x, N(x, c_noise)> with N a `ResidualMLP`: a conservative network.

    The exact score is a gradient; this network's is one, too, whatever its weights, so that the
    Jacobian of its denoiser is symmetric (energy-based parametrisation, Salimans & Ho 2021).  An
    evaluation is one of N and a VJP, a step of training costs about two of N's; what is gained by
    it is measured in `docs/which_estimator.md`.

    Args:
        shape, rngs: as in `ResidualMLP`.
        **options: those of `ResidualMLP`.

    >>> network = GradientMLP((3,), width=16, depth=1, rngs=nnx.Rngs(0))
    >>> network(jnp.ones(3), jnp.array(0.1)).shape
    (3,)
    """

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, **options: Any):
        self.inner = ResidualMLP(shape, rngs=rngs, **options)

    def __call__(self, x: Array, c_noise: Array) -> Array:
        """F, of x's shape, for one point and one scalar `c_noise`."""
        value, pull_back = jax.vjp(lambda point: self.inner(point, c_noise), x)
        return value + pull_back(x)[0]
