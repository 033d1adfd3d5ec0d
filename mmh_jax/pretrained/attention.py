r"""Attention in published U-Nets and autoencoders: of pixels to each other, and to a text.

    SelfAttention    y = (x + W_o attend(q, k, v)) / rescale          q, k, v from norm(x)
    SpatialTransformer   x -> proj_in -> blocks of (attn1, attn2, ff), each added -> proj_out, + x

The keys and values of `attn2` are of the context (L, E), those of `attn1` of the pixels themselves.
`ff` is W_2 (a * gelu(b)) with (a, b) = W_1 h (Shazeer 2020, 2002.05202).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained.layers import Conv, GroupNorm, LayerNorm, Linear, Nothing, attend
from mmh_jax.pretrained.resnet import Style
from mmh_jax.typing import Array

__all__ = ["Attention", "SelfAttention", "SpatialTransformer"]


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to a context.

    Args:
        width: C, of the sequence.
        num_heads, head_size: of heads.
        context_size: E, of the context; None for attention to itself.
        bias: whether queries, keys and values have one.
        chunk: queries at a time, which bounds the memory; see `layers.attend`.
        rngs: the source of the initial weights.

    >>> def answer(x, context):
    ...     return Attention(8, 2, 4, context_size=5, rngs=nnx.Rngs(0))(x, context)
    >>> jax.eval_shape(answer, jnp.ones((6, 8)), jnp.ones((3, 5))).shape
    (6, 8)
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_size: int,
        *,
        context_size: int | None = None,
        bias: bool = False,
        chunk: int | None = None,
        rngs: nnx.Rngs,
    ):
        inner, source = num_heads * head_size, context_size or width
        self.to_q = Linear(width, inner, bias=bias, rngs=rngs)
        self.to_k = Linear(source, inner, bias=bias, rngs=rngs)
        self.to_v = Linear(source, inner, bias=bias, rngs=rngs)
        self.to_out = nnx.List([Linear(inner, width, rngs=rngs), Nothing()])
        self.num_heads = num_heads
        self.chunk = chunk

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """(L, C)."""
        source = x if context is None else context
        q, k, v = (
            layer(value).reshape(value.shape[0], self.num_heads, -1)
            for layer, value in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        found = attend(q, k, v, chunk=self.chunk)
        return self.to_out[0](found.reshape(x.shape[0], -1))


class SelfAttention(Attention):
    """Attention of the pixels of an image (H, W, C) to each other, with norm and residual.

    Args:
        style: of the network.
        width: C.
        head_size: of a head; there are `width // head_size` of them.
        norm: whether there is a group norm.
        rescale: by which the answer is divided.

    >>> def answer(x):
    ...     style = Style("Net", None, 2, 1e-5, jax.nn.silu, "default", None, nnx.Rngs(0))
    ...     return SelfAttention(style, 8, 4)(x)
    >>> jax.eval_shape(answer, jnp.ones((3, 2, 8))).shape
    (3, 2, 8)
    """

    def __init__(
        self,
        style: Style,
        width: int,
        head_size: int | None,
        *,
        norm: bool = True,
        groups: int | None = None,
        rescale: float = 1.0,
    ):
        head_size = width if head_size is None else head_size
        if not 1 <= head_size <= width:
            raise ValueError(
                f"`{style.caller}(attention_head_dim={head_size})` must be between 1 and the "
                f"{width} channels of each block with attention."
            )
        super().__init__(
            width, width // head_size, head_size, bias=True, chunk=style.chunk, rngs=style.rngs
        )
        groups = style.groups_of(width) if groups is None else groups
        self.group_norm: Any = GroupNorm(groups, width, eps=style.eps) if norm else None
        self.rescale = rescale

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """(H, W, C); a context is not for it."""
        h = x if self.group_norm is None else self.group_norm(x)
        y = x + super().__call__(h.reshape(-1, x.shape[2])).reshape(x.shape)
        return y if self.rescale == 1 else y / self.rescale


class _Gated(nnx.Module):
    """a * gelu(b) with (a, b) = W h."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * inner, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        value, gate = jnp.split(self.proj(h), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class _FeedForward(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        inner = 4 * width
        self.net = nnx.List(
            [_Gated(width, inner, rngs=rngs), Nothing(), Linear(inner, width, rngs=rngs)]
        )

    def __call__(self, h: Array) -> Array:
        return self.net[2](self.net[0](h))


class _TransformerBlock(nnx.Module):
    def __init__(
        self, style: Style, width: int, num_heads: int, context_size: int, only_cross: bool
    ):
        head_size, rngs = width // num_heads, style.rngs
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(
            width, num_heads, head_size, context_size=context_size if only_cross else None,
            chunk=style.chunk, rngs=rngs,
        )  # fmt: skip
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(
            width, num_heads, head_size, context_size=context_size, chunk=style.chunk, rngs=rngs
        )
        self.norm3 = LayerNorm(width)
        self.ff = _FeedForward(width, rngs=rngs)
        self.only_cross = only_cross

    def __call__(self, h: Array, context: Array) -> Array:
        h = h + self.attn1(self.norm1(h), context if self.only_cross else None)
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff(self.norm3(h))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of an image, with cross-attention to a context.

    Args:
        style: of the network.
        width: C.
        num_heads: a divisor of it.
        context_size: E.
        num_layers: of blocks.
        linear: whether the projections are linear layers (SD 2, SDXL) or 1 x 1 convolutions (SD 1);
            the same function, in another layout.
        only_cross: whether the first attention of each block is to the context, too.

    Raises:
        ValueError: if the channels do not divide into heads.

    >>> def answer(x, context):
    ...     style = Style("Net", None, 2, 1e-5, jax.nn.silu, "default", None, nnx.Rngs(0))
    ...     return SpatialTransformer(style, 8, 2, 5)(x, context)
    >>> jax.eval_shape(answer, jnp.ones((3, 2, 8)), jnp.ones((4, 5))).shape
    (3, 2, 8)
    """

    def __init__(
        self,
        style: Style,
        width: int,
        num_heads: int,
        context_size: int,
        *,
        num_layers: int = 1,
        linear: bool = False,
        only_cross: bool = False,
    ):
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"`{style.caller}(attention_head_dim={num_heads})` must divide the {width} "
                "channels of each block with attention; here it is the number of heads."
            )

        def projection() -> Linear | Conv:
            if linear:
                return Linear(width, width, rngs=style.rngs)
            return Conv(width, width, size=1, rngs=style.rngs)

        self.norm = GroupNorm(style.groups_of(width), width, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                _TransformerBlock(style, width, num_heads, context_size, only_cross)
                for _ in range(num_layers)
            ]
        )
        self.proj_out = projection()

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """(H, W, C)."""
        if context is None:
            raise ValueError("a network with cross-attention needs a context (L, E).")
        h = self.proj_in(self.norm(x)).reshape(-1, x.shape[2])
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.proj_out(h.reshape(x.shape)) + x
