r"""Embeddings of the time in published networks: sines of t, and two linear layers.

    positional    sin(t w_i), cos(t w_i),   w_i = max_period^(-i / (n - shift)),  n = size // 2
    fourier       sin(2 pi w_i log t), cos(2 pi w_i log t),                      w_i ~ N(0, scale^2)

Published versions differ in which comes first, sines or cosines (`flip_sin_to_cos`), in the shift
(`freq_shift`), and in whether the logarithm is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained.layers import Linear, initial, wide
from mmh_jax.typing import Array

__all__ = ["FourierProjection", "TimestepEmbedding", "timestep_embedding"]


def timestep_embedding(
    t: Array,
    size: int,
    *,
    flip_sin_to_cos: bool = False,
    freq_shift: float = 1.0,
    scale: float = 1.0,
    max_period: float = 10_000.0,
) -> Array:
    """Sines and cosines of t at geometric frequencies (Ho et al. 2020), in float32.

    Frequency i of size // 2 is max_period^(-i / (size // 2 - freq_shift)).

    Args:
        t: any shape.
        size: of the embedding; an odd one ends with a zero.
        flip_sin_to_cos: cosines first.
        freq_shift: 1 in DDPM, 0 in later models.
        scale: of the angles.
        max_period: the longest period, over 2 pi.

    Returns:
        (*t.shape, size).

    >>> timestep_embedding(jnp.array(0.0), 4)
    Array([0., 0., 1., 1.], dtype=float32)
    """
    half = size // 2
    t = jnp.asarray(t, jnp.float32)
    exponents = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = scale * t[..., None] * jnp.exp(exponents)
    parts = [jnp.sin(angles), jnp.cos(angles)]
    parts = parts[::-1] if flip_sin_to_cos else parts
    return jnp.concatenate([*parts, jnp.zeros((*t.shape, size % 2), jnp.float32)], -1)


class FourierProjection(nnx.Module):
    """Sines and cosines of log t or t at fixed random frequencies (Song et al. 2021), float32.

    Args:
        num: of frequencies; the embedding has twice as many entries.
        scale: of the random frequencies.
        log: of log t instead of t.
        flip_sin_to_cos: cosines first.
        rngs: the source of the frequencies.

    >>> FourierProjection(3, rngs=nnx.Rngs(0))(jnp.array(1.0)).shape
    (6,)
    """

    def __init__(
        self,
        num: int,
        *,
        scale: float = 1.0,
        log: bool = True,
        flip_sin_to_cos: bool = False,
        rngs: nnx.Rngs,
    ):
        self.weight = initial(
            lambda key, shape: scale * jax.random.normal(key, shape), rngs, (num,)
        )
        self.log = log
        self.flip_sin_to_cos = flip_sin_to_cos

    def __call__(self, t: Array) -> Array:
        """(*t.shape, 2 num)."""
        t = wide(jnp.asarray(t, jnp.result_type(t, jnp.float32)))
        frequencies = jax.lax.stop_gradient(wide(self.weight[...]))  # fixed, never trained
        angles = (jnp.log(t) if self.log else t)[..., None] * frequencies * 2 * jnp.pi
        parts = [jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate(parts[::-1] if self.flip_sin_to_cos else parts, -1)


class TimestepEmbedding(nnx.Module):
    """linear_2(act(linear_1(x [+ cond_proj(condition)]))), then perhaps another activation.

    Args:
        num_in: size of the input.
        width: of the hidden layer and the answer.
        act: the activation between.
        num_out: size of the answer, `width` if not given.
        post_act: the activation at the end, or None.
        condition_size: of a further input, or None.
        rngs: the source of the initial weights.

    >>> TimestepEmbedding(4, 8, rngs=nnx.Rngs(0))(jnp.ones(4)).shape
    (8,)
    """

    def __init__(
        self,
        num_in: int,
        width: int,
        *,
        act: Callable[[Array], Array] = jax.nn.silu,
        num_out: int | None = None,
        post_act: Callable[[Array], Array] | None = None,
        condition_size: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.linear_1 = Linear(num_in, width, rngs=rngs)
        self.cond_proj: Any = (
            None
            if condition_size is None
            else Linear(condition_size, num_in, bias=False, rngs=rngs)
        )
        self.linear_2 = Linear(width, num_out or width, rngs=rngs)
        self.act = act
        self.post_act = post_act

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Of size `num_out`, in the dtype of the weights."""
        x = x.astype(self.linear_1.weight[...].dtype)
        x = x if condition is None else x + self.cond_proj(condition)
        y = self.linear_2(self.act(self.linear_1(x)))
        return y if self.post_act is None else self.post_act(y)
