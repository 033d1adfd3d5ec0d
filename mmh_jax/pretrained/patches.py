r"""What published diffusion transformers are made of: patches, positions, modulated norms, MLPs.

    patches    a p x p convolution with stride p, and a fixed encoding of row and column added
    modulated  norm(h) (1 + scale) + shift,    (shift, scale, gate, ...) = W silu(embedding)
    MLP        W_2 gelu(W_1 h)

Row and column are encoded by sines and cosines of (row / s, column / s), where s is the size of the
grid of patches over that of the training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.pretrained.layers import Conv, LayerNorm, Linear, Nothing, wide
from mmh_jax.typing import Array

__all__ = ["FeedForward", "Modulation", "Patches", "RMSNorm", "image_of", "positions"]

MLP_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu-approximate": functools.partial(jax.nn.gelu, approximate=True),
}


def positions(rows: int, columns: int, size: int, base: int) -> np.ndarray:
    """The encoding of a grid of patches: (rows * columns, size), float32.

    The first half is of the column, the second of the row, each sines and then cosines, at
    frequencies 10,000^(-i / (size / 4)).

    Args:
        rows, columns: of the grid.
        size: a multiple of 4.
        base: rows of the grid of the training; a larger grid is encoded as a finer one.

    Raises:
        ValueError: if `size` is no multiple of 4.

    >>> positions(1, 2, 4, 1).round(2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.47999998927116394, 0.8799999952316284, 0.0, 1.0]]
    """
    if size % 4:
        raise ValueError(f"`positions(size={size})` must be a multiple of 4.")
    frequencies = 10_000.0 ** (-np.arange(size // 4) / (size // 4))
    places = np.meshgrid(
        np.arange(columns) * base / columns, np.arange(rows) * base / rows, indexing="xy"
    )
    angles = [place.reshape(-1, 1) * frequencies for place in places]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class Patches(nnx.Module):
    """An image (H, W, C) as a sequence of patches (L, width), with their positions.

    Args:
        channels: C.
        width: of a patch's features, a multiple of 4.
        size: p, of a patch.
        base: rows of the grid of the training.
        table: rows of a table of positions among the parameters, of which the centre is taken;
            None to compute positions for every grid.
        rngs: the source of the initial weights.

    >>> def cut(x):
    ...     return Patches(3, 8, size=2, base=4, rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(cut, jnp.ones((8, 6, 3))).shape
    (12, 8)
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: int,
        base: int,
        table: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.proj = Conv(channels, width, size=size, stride=size, padding=0, rngs=rngs)
        self.size, self.base, self.table = size, base, table
        self.pos_embed = (
            None
            if table is None
            else nnx.Param(jnp.asarray(positions(table, table, width, base)[None]))
        )

    def __call__(self, x: Array) -> Array:
        """The sequence, row by row."""
        h = self.proj(x)
        rows, columns, width = h.shape
        h = h.reshape(-1, width)
        if self.pos_embed is None or self.table is None:
            return h + jnp.asarray(positions(rows, columns, width, self.base), h.dtype)
        if max(rows, columns) > self.table:
            raise ValueError(
                f"an image of shape {x.shape} has {rows} x {columns} patches; this network has "
                f"positions for {self.table} x {self.table}."
            )
        top, left = (self.table - rows) // 2, (self.table - columns) // 2
        table = self.pos_embed[...].reshape(self.table, self.table, width)
        return h + table[top : top + rows, left : left + columns].reshape(-1, width).astype(h.dtype)


def image_of(patches: Array, rows: int, size: int) -> Array:
    """An image of patches (L, size * size * C), the reverse of cutting it.

    >>> image_of(jnp.arange(8.0).reshape(2, 4), 1, 2)[..., 0].tolist()
    [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    columns = patches.shape[0] // rows
    x = patches.reshape(rows, columns, size, size, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(rows * size, columns * size, -1)


class Modulation(nnx.Module):
    """`num` vectors from the embedding: W silu(embedding), and the norm without parameters.

    Args:
        width: of the embedding and of each vector.
        num: of vectors.
        rngs: the source of the initial weights.

    >>> def vectors(embedding):
    ...     return Modulation(4, 2, rngs=nnx.Rngs(0))(embedding)
    >>> [vector.shape for vector in jax.eval_shape(vectors, jnp.ones(4))]
    [(4,), (4,)]
    """

    def __init__(self, width: int, num: int, *, rngs: nnx.Rngs):
        self.linear = Linear(width, num * width, rngs=rngs)
        self.num = num

    def __call__(self, embedding: Array) -> list[Array]:
        """The vectors, (width,) each."""
        return jnp.split(self.linear(jax.nn.silu(embedding)), self.num)


def modulated(h: Array, shift: Array, scale: Array, *, eps: float = 1e-6) -> Array:
    """norm(h) (1 + scale) + shift, the norm over the last axis without parameters."""
    return LayerNorm(h.shape[-1], eps=eps, affine=False)(h) * (1 + scale) + shift


class RMSNorm(nnx.Module):
    """h / sqrt(mean h^2 + eps) * weight over the last axis (Zhang & Sennrich 2019, 1910.07467).

    >>> bool(jnp.allclose(RMSNorm(2)(jnp.array([1.0, 7.0])), jnp.array([0.2, 1.4])))
    True
    """

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, h: Array) -> Array:
        """The normalised array, in h's dtype."""
        h_wide = wide(h)
        scale = jax.lax.rsqrt(jnp.mean(h_wide**2, -1, keepdims=True) + self.eps)
        return (h_wide * scale * self.weight[...]).astype(h.dtype)


class _Activated(nnx.Module):
    def __init__(self, width: int, inner: int, act: str, *, rngs: nnx.Rngs):
        self.proj = Linear(width, inner, rngs=rngs)
        self.act = MLP_ACTIVATIONS[act]

    def __call__(self, h: Array) -> Array:
        return self.act(self.proj(h))


class FeedForward(nnx.Module):
    """W_2 gelu(W_1 h), four times as wide inside.

    Args:
        width: of h.
        act: "gelu", or "gelu-approximate", the one with tanh.
        rngs: the source of the initial weights.

    >>> def answer(h):
    ...     return FeedForward(4, "gelu", rngs=nnx.Rngs(0))(h)
    >>> jax.eval_shape(answer, jnp.ones((3, 4))).shape
    (3, 4)
    """

    def __init__(self, width: int, act: str, *, rngs: nnx.Rngs):
        first = _Activated(width, 4 * width, act, rngs=rngs)
        self.net = nnx.List([first, Nothing(), Linear(4 * width, width, rngs=rngs)])

    def __call__(self, h: Array) -> Array:
        """Of h's shape."""
        return self.net[2](self.net[0](h))


def checked_image(caller: str, x: Array, channels: int, size: int) -> Array:
    """One image of whole patches, or what is wrong with it."""
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[2] != channels or x.shape[0] % size or x.shape[1] % size:
        cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one image, channels last."
        raise ValueError(
            f"`{caller}(x=...)` has shape {x.shape}; it takes (H, W, {channels}) with H and W "
            f"multiples of {size}. {cure}"
        )
    return x


def head_width(caller: str, num_heads: int, head_size: int) -> int:
    """The width of a transformer, if it has one."""
    width = num_heads * head_size
    if not 1 <= width <= 2**16 or width % 4:
        raise ValueError(
            f"`{caller}(num_attention_heads={num_heads}, attention_head_dim={head_size})`: their "
            "product is the width, a multiple of 4."
        )
    return width


def grid_base(caller: str, sample_size: int, patch_size: int) -> int:
    """Rows of the grid of the training, if the sizes fit."""
    if patch_size < 1 or sample_size < patch_size:
        raise ValueError(
            f"`{caller}(sample_size={sample_size}, patch_size={patch_size})` must be at least one "
            "patch of at least one pixel."
        )
    return math.floor(sample_size / patch_size)
