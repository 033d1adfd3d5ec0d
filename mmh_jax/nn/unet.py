r"""A U-Net for images, in the design of ADM and EDM.

Dhariwal & Nichol 2021 (2105.05233), Karras et al. 2022 (2206.00364).  A residual block is

    h <- silu(norm(x)),  h <- conv(h),  h <- silu(norm(h) (1 + scale(e)) + shift(e)),
    x <- skip(x) + conv(dropout(h)),                           the last convolution 0 at the start

with e the embedding of noise level and label; where asked for, attention of the pixels to each
other and to the tokens of the condition follows.  On the way down the image is halved by strided
convolutions, on the way up doubled (nearest neighbour, convolution), and every feature map of the
way down is given to its counterpart on the way up.  The last layer starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.nn import layers
from mmh_jax.nn.condition import Conditioning
from mmh_jax.nn.conv import Conv
from mmh_jax.nn.layers import Attention, Features, GroupNorm, NoiseEmbedding
from mmh_jax.typing import Array, Key

__all__ = ["UNet"]


class _SpatialAttention(nnx.Module):
    """Of the pixels to each other, then to the tokens."""

    def __init__(
        self, width: int, num_heads: int, token_size: int | None, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.norm = GroupNorm(width)
        self.itself = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        if token_size is None:
            self.cross_norm = self.cross = None
            return
        self.cross_norm = GroupNorm(width)
        self.cross = Attention(width, num_heads, context_size=token_size, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, tokens: Array | None) -> tuple[Array, Array | None]:
        pixels = (-1, h.shape[2])
        h = h + self.itself(self.norm(h).reshape(pixels))[0].reshape(h.shape)
        if self.cross is None or self.cross_norm is None:
            return h, None
        found, weights = self.cross(self.cross_norm(h).reshape(pixels), tokens)
        return h + found.reshape(h.shape), weights.reshape(-1, *h.shape[:2], weights.shape[-1])


class _Block(nnx.Module):
    """A residual block, and attention if it has heads."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        embedding_size: int,
        *,
        num_heads: int | None,
        token_size: int | None,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm_in = GroupNorm(num_in)
        self.conv_in = Conv(num_in, num_out, dtype=dtype, rngs=rngs)
        self.modulate = nnx.Linear(embedding_size, 2 * num_out, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(num_out)
        self.conv_out = Conv(num_out, num_out, zero=True, dtype=dtype, rngs=rngs)
        changes = num_in != num_out
        self.skip = Conv(num_in, num_out, size=1, dtype=dtype, rngs=rngs) if changes else None
        self.attention = (
            None
            if num_heads is None
            else _SpatialAttention(num_out, num_heads, token_size, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, x: Array, embedding: Array, tokens: Array | None, key: Key | None
    ) -> tuple[Array, Array | None]:
        h = self.conv_in(nnx.silu(self.norm_in(x)))
        scale, shift = jnp.split(self.modulate(embedding), 2)
        h = nnx.silu(self.norm_out(h) * (1 + scale) + shift)
        h = self.conv_out(layers.dropped_out(h, self.dropout, key))
        h = h + (x if self.skip is None else self.skip(x))
        return (h, None) if self.attention is None else self.attention(h, tokens)


class _Doubled(nnx.Module):
    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(h, 2, 0), 2, 1))


class UNet(nnx.Module):
    """F(x, c_noise[, cond]) for one image x of shape (H, W, C).

    The default has 1.2 million parameters for (28, 28, 1), on maps of 28, 14 and 7 pixels.  Every
    option is a plain value that JSON can hold.

    Args:
        shape: of an image, (H, W, C), or (H, W) if it is grey.
        width: channels on the finest level.
        multipliers: channels of each level, in units of `width`; each level halves the image.
        num_blocks: residual blocks on each level (one more on the way up).
        attention_resolutions: sizes of the feature maps (their longer side) with attention; None
            for the coarsest alone.
        num_heads, head_size: of attention; one of the two, or neither for one head.
        num_classes: for labels as conditions; see `Conditioning`.
        token_size, num_tokens: for tokens as conditions, used by cross-attention.
        dropout: its rate, where `key=` is given to a call.
        remat: recompute each block in the gradient: less memory, a third more time.
        dtype: in which to compute, such as "bfloat16"; None for that of the input.  Parameters are
            float32, and so are statistics and softmax.
        rngs: the source of the initial weights.

    Raises:
        ValueError: if a size cannot be halved, a resolution does not occur, or an option is wrong.

    >>> network = UNet((8, 8, 3), width=8, multipliers=(1, 2), num_classes=4, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((8, 8, 3)), jnp.array(0.1), 2).shape
    (8, 8, 3)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 1,
        attention_resolutions: Sequence[int] | None = None,
        num_heads: int | None = None,
        head_size: int | None = None,
        num_classes: int | None = None,
        token_size: int | None = None,
        num_tokens: int = 1,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        full = layers.with_channels(tuple(shape))
        sizes = _sizes(full, width, tuple(multipliers), num_blocks, dropout)
        attended = _attended(sizes, attention_resolutions, token_size)
        self.shape = tuple(shape)
        channels = full[2]
        self.dtype = layers.compute_dtype("UNet", dtype)
        self.remat = remat
        embedding_size = 4 * width
        self.conditioning = Conditioning(
            embedding_size,
            num_classes=num_classes,
            token_size=token_size,
            num_tokens=num_tokens,
            rngs=rngs,
        )
        self.embed = NoiseEmbedding(embedding_size, dtype=self.dtype, rngs=rngs)

        def block(num_in: int, num_out: int, level: int) -> _Block:
            heads = layers.heads_of("UNet", num_out, num_heads, head_size)
            return _Block(
                num_in,
                num_out,
                embedding_size,
                num_heads=heads if sizes[level] in attended else None,
                token_size=token_size,
                dropout=dropout,
                dtype=self.dtype,
                rngs=rngs,
            )

        widths = [width * factor for factor in multipliers]
        here = width
        self.enter = Conv(channels, here, dtype=self.dtype, rngs=rngs)
        down, kept = [], [here]
        for level, wide in enumerate(widths):
            if level > 0:
                down.append(Conv(here, here, stride=2, dtype=self.dtype, rngs=rngs))
                kept.append(here)
            for _ in range(num_blocks):
                down.append(block(here, wide, level))
                here = wide
                kept.append(here)
        self.down = nnx.List(down)
        last = len(widths) - 1
        self.middle = nnx.List([block(here, here, last) for _ in range(2)])
        up = []
        for level, wide in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):
                up.append(block(here + kept.pop(), wide, level))
                here = wide
            if level > 0:
                up.append(_Doubled(here, dtype=self.dtype, rngs=rngs))
        self.up = nnx.List(up)
        self.norm = GroupNorm(here)
        self.leave = Conv(here, channels, zero=True, dtype=self.dtype, rngs=rngs)

    def features(
        self, x: Array, c_noise: Array, cond: Any = None, *, key: Key | None = None
    ) -> tuple[Array, Features]:
        """The answer and what is inside; see `nn.features`."""
        x = layers.checked_point("UNet", x, self.shape)
        vector, tokens = self.conditioning(cond)
        embedding = self.embed(c_noise, vector)
        maps = []

        def step(index: int, module: Any, h: Array) -> Array:
            if not isinstance(module, _Block):
                return module(h)
            own = None if key is None else jax.random.fold_in(key, index)
            h, weights = layers.call(module, h, embedding, tokens, own, remat=self.remat)
            if weights is not None:
                maps.append(weights)
            return h

        image = x.reshape(layers.with_channels(self.shape))
        h = self.enter(image if self.dtype is None else image.astype(self.dtype))
        kept, index = [h], 0
        for module in self.down:
            h = step(index, module, h)
            kept.append(h)
            index += 1
        for module in self.middle:
            h = step(index, module, h)
            index += 1
        bottleneck = h
        for module in self.up:
            if isinstance(module, _Block):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
            h = step(index, module, h)
            index += 1
        answer = self.leave(nnx.silu(self.norm(h)))
        dtype = jnp.result_type(answer, x)
        return answer.reshape(self.shape).astype(dtype), Features(bottleneck, tuple(maps))

    def __call__(
        self, x: Array, c_noise: Array, cond: Any = None, *, key: Key | None = None
    ) -> Array:
        """F, of x's shape, for one image, one scalar `c_noise` and one condition or none.

        Args:
            x: of the network's shape.
            c_noise: a scalar.
            cond: a label, tokens (L, token_size), or None for the null condition.
            key: draws the dropout; without it there is none.
        """
        return self.features(x, c_noise, cond, key=key)[0]


def _sizes(
    shape: tuple[int, ...], width: int, multipliers: tuple[int, ...], num_blocks: int, rate: float
) -> list[int]:
    """The longer side of the feature maps of each level."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"`UNet(shape={shape})` must be that of an image, (H, W, C) or (H, W).")
    if width < 1 or not multipliers or min(multipliers) < 1 or num_blocks < 1:
        raise ValueError(
            f"`UNet(width={width}, multipliers={multipliers}, num_blocks={num_blocks})` must all "
            "be at least 1, with one multiplier for each level."
        )
    if not 0 <= rate < 1:
        raise ValueError(f"`UNet(dropout={rate})` must be at least 0 and less than 1.")
    halvings = len(multipliers) - 1
    if any(side % 2**halvings for side in shape[:2]):
        possible = min((side & -side).bit_length() for side in shape[:2])
        raise ValueError(
            f"`UNet(shape={shape})` cannot be halved {halvings} times; give at most {possible} "
            f"multipliers, or pad the image to multiples of {2**halvings}."
        )
    return [max(shape[:2]) >> level for level in range(len(multipliers))]


def _attended(sizes: list[int], wanted: Sequence[int] | None, token_size: int | None) -> set[int]:
    """The sizes of feature maps with attention."""
    attended = {sizes[-1]} if wanted is None else set(wanted)
    if unknown := attended - set(sizes):
        raise ValueError(
            f"`UNet(attention_resolutions={sorted(attended)})`: there is no feature map of size "
            f"{sorted(unknown)}; this network has {sizes}."
        )
    if token_size is not None and not attended:
        raise ValueError(
            "`UNet(token_size=..., attention_resolutions=[])` could not see its tokens; give "
            f"at least one of {sizes}."
        )
    return attended
