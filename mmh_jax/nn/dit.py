r"""A diffusion transformer (Peebles & Xie 2023, 2212.09748): DiT.

    h = W patches(x) + positions
    h += a_1(e) attention(norm(h) (1 + c_1(e)) + b_1(e))
    h += attention(norm(h); tokens of the condition)          where there are tokens
    h += a_2(e) MLP(norm(h) (1 + c_2(e)) + b_2(e))            `depth` times
    F = unpatch(W_out (norm(h) (1 + c(e)) + b(e)))

with e the embedding of noise level and label, and a, b, c linear in it and zero at the start
("adaLN-Zero"), so that every block starts as the identity; W_out starts at zero.  Attention to
tokens stands where PixArt has it (Chen et al. 2023, 2310.00426).  Positions are sines and cosines
of row and column, not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.nn import layers
from mmh_jax.nn.condition import Conditioning
from mmh_jax.nn.layers import Attention, Features, NoiseEmbedding
from mmh_jax.typing import Array, Key

__all__ = ["DiT", "positions"]


def positions(height: int, width: int, size: int) -> Array:
    """Sines and cosines of row and column, (height * width, size), in the order of pixels.

    The first half encodes the column, the second the row, as in DiT: each `size // 4` sines, then
    as many cosines, of frequencies geometric from 1 down to (almost) 1 / 10,000.

    Raises:
        ValueError: if `size` is no multiple of 4.

    >>> (100 * positions(1, 2, 4)).astype(int).tolist()
    [[0, 100, 0, 100], [84, 54, 0, 100]]
    """
    if size < 4 or size % 4:
        raise ValueError(f"`positions(size={size})` must be a multiple of 4.")
    frequencies = 10_000.0 ** (-jnp.arange(size // 4) / (size // 4))
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=1)


def _normalised(h: Array, scale: Array | float = 0.0, shift: Array | float = 0.0) -> Array:
    """Layer normalisation without parameters of its own, then `(1 + scale) h + shift`."""
    wide = layers.at_least_float32(h)
    centred = wide - wide.mean(-1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return (centred * spread).astype(h.dtype) * (1 + scale) + shift


class _Block(nnx.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        token_size: int | None,
        mlp_ratio: float,
        dropout: float,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        zeros = nnx.initializers.zeros
        self.modulate = nnx.Linear(width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.itself = Attention(width, num_heads, zero=False, dtype=dtype, rngs=rngs)
        self.cross = (
            None
            if token_size is None
            else Attention(width, num_heads, context_size=token_size, dtype=dtype, rngs=rngs)
        )
        hidden = int(width * mlp_ratio)
        self.inner = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, h: Array, embedding: Array, tokens: Array | None, key: Key | None
    ) -> tuple[Array, Array | None]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(self.modulate(embedding), 6)
        h = h + gate * self.itself(_normalised(h, scale, shift))[0]
        weights = None
        if self.cross is not None:
            found, weights = self.cross(_normalised(h), tokens)
            h = h + found
        inner = nnx.gelu(self.inner(_normalised(h, mlp_scale, mlp_shift)), approximate=True)
        return h + mlp_gate * self.outer(layers.dropped_out(inner, self.dropout, key)), weights


class DiT(nnx.Module):
    """F(x, c_noise[, cond]) for one image x of shape (H, W, C), by a transformer of its patches.

    The default has 0.95 million parameters for (28, 28, 1), on 7 x 7 patches.  Every option is a
    plain value that JSON can hold.

    Args:
        shape: of an image, (H, W, C), or (H, W) if it is grey.
        patch_size: of a patch's sides, a divisor of H and W.
        width: of a patch's features, a multiple of 4.
        depth: blocks.
        num_heads, head_size: of attention; one of the two, or neither for one head.
        mlp_ratio: hidden units of the MLP, per unit of `width`.
        num_classes, token_size, num_tokens: conditions, as in `UNet`.
        dropout, remat, dtype: as in `UNet`.
        rngs: the source of the initial weights.

    Raises:
        ValueError: if patches do not fit the image, or an option is wrong.

    >>> network = DiT((8, 8, 3), patch_size=2, width=16, depth=1, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((8, 8, 3)), jnp.array(0.1)).shape
    (8, 8, 3)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch_size: int = 4,
        width: int = 128,
        depth: int = 3,
        num_heads: int | None = None,
        head_size: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        token_size: int | None = None,
        num_tokens: int = 1,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        full = layers.with_channels(self.shape)
        _check(full, patch_size, width, depth, mlp_ratio, dropout)
        heads = layers.heads_of("DiT", width, num_heads, head_size)
        self.patch_size, self.width = patch_size, width
        self.grid = (self.shape[0] // patch_size, self.shape[1] // patch_size)
        self.dtype = layers.compute_dtype("DiT", dtype)
        self.remat = remat
        self.conditioning = Conditioning(
            width,
            num_classes=num_classes,
            token_size=token_size,
            num_tokens=num_tokens,
            rngs=rngs,
        )
        self.embed = NoiseEmbedding(width, dtype=self.dtype, rngs=rngs)
        size = patch_size**2 * full[2]
        self.enter = nnx.Linear(size, width, dtype=self.dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                _Block(width, heads, token_size, mlp_ratio, dropout, dtype=self.dtype, rngs=rngs)
                for _ in range(depth)
            ]
        )
        zero: Any = {"kernel_init": nnx.initializers.zeros, "dtype": self.dtype, "rngs": rngs}
        self.modulate = nnx.Linear(width, 2 * width, **zero)
        self.leave = nnx.Linear(width, size, **zero)

    def _patches(self, x: Array) -> Array:
        (rows, columns), p = self.grid, self.patch_size
        x = x.reshape(rows, p, columns, p, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(rows * columns, -1)

    def _image(self, patches: Array) -> Array:
        (rows, columns), p = self.grid, self.patch_size
        x = patches.reshape(rows, columns, p, p, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(self.shape)

    def features(
        self, x: Array, c_noise: Array, cond: Any = None, *, key: Key | None = None
    ) -> tuple[Array, Features]:
        """The answer and what is inside, the bottleneck after half the blocks; see `features`."""
        x = layers.checked_point("DiT", x, self.shape)
        vector, tokens = self.conditioning(cond)
        embedding = self.embed(c_noise, vector)
        h = self.enter(self._patches(x if self.dtype is None else x.astype(self.dtype)))
        h = h + positions(*self.grid, self.width).astype(h.dtype)
        inside, maps = [h], []
        for index, block in enumerate(self.blocks):
            own = None if key is None else jax.random.fold_in(key, index)
            h, weights = layers.call(block, h, embedding, tokens, own, remat=self.remat)
            inside.append(h)
            if weights is not None:
                maps.append(weights.reshape(-1, *self.grid, weights.shape[-1]))
        shift, scale = jnp.split(self.modulate(embedding), 2)
        answer = self._image(self.leave(_normalised(h, scale, shift)))
        bottleneck = inside[(len(self.blocks) + 1) // 2].reshape(*self.grid, -1)
        answer = answer.astype(jnp.result_type(answer, x))
        return answer, Features(bottleneck, tuple(maps))

    def __call__(
        self, x: Array, c_noise: Array, cond: Any = None, *, key: Key | None = None
    ) -> Array:
        """F, of x's shape; arguments as for `UNet`."""
        return self.features(x, c_noise, cond, key=key)[0]


def _check(
    shape: tuple[int, ...], patch: int, width: int, depth: int, ratio: float, rate: float
) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"`DiT(shape={shape})` must be that of an image, (H, W, C) or (H, W).")
    if patch < 1 or shape[0] % patch or shape[1] % patch:
        raise ValueError(
            f"`DiT(patch_size={patch})` does not divide an image of shape {shape}; choose a "
            "divisor of its sides, or pad it."
        )
    if width < 4 or width % 4:
        raise ValueError(f"`DiT(width={width})` must be a multiple of 4, for the positions.")
    if depth < 1 or int(width * ratio) < 1:
        raise ValueError(f"`DiT(depth={depth}, mlp_ratio={ratio})` must be at least one layer.")
    if not 0 <= rate < 1:
        raise ValueError(f"`DiT(dropout={rate})` must be at least 0 and less than 1.")
