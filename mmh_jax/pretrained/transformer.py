r"""DiT (Peebles & Xie 2023, 2212.09748) as published: `DiTTransformer2DModel`.

    h = patches(x) + positions
    h <- h + g_1 attention(norm(h) (1 + c_1) + b_1)
    h <- h + g_2 MLP(norm(h) (1 + c_2) + b_2)                     `num_layers` times
    F = unpatch(W (norm(h) (1 + c) + b))

with b, c and g linear in silu(e), and e the embedding of time and class, which in the published
layout each block has for itself; the end takes that of the first block.  The class `num_classes` is
the null class.  Where the network has twice as many channels out as in, the second half is a
variance (Nichol & Dhariwal 2021), and `DiTTransformer2DModel.__call__` answers with the first.
Older files call the same network `Transformer2DModel` with `norm_type` "ada_norm_zero".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.pretrained import patches
from mmh_jax.pretrained.attention import Attention
from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.embeddings import TimestepEmbedding, timestep_embedding
from mmh_jax.pretrained.layers import Embedding, LayerNorm, Linear
from mmh_jax.pretrained.patches import FeedForward, Modulation, Patches, modulated
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = ["DiTTransformer2DModel", "DiTTransformer2DModelOptions"]

CALLER = "DiTTransformer2DModel"
_SINES = 256
# Of no effect here: of training, of another numerics, or of layers that this network has not.
_IGNORED = ("dropout", "norm_num_groups", "upcast_attention", "use_linear_projection")


@dataclasses.dataclass(frozen=True)
class DiTTransformer2DModelOptions:
    """The options of a published `config.json`; all but the last are those of diffusers."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    attention_type: str = "default"
    double_self_attention: bool = False
    only_cross_attention: bool = False


class _ClassEmbedder(nnx.Module):
    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.embedding_table = Embedding(num_classes + 1, width, rngs=rngs)


class _Embedder(nnx.Module):
    """Of time and class."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(_SINES, width, rngs=rngs)
        self.class_embedder = _ClassEmbedder(num_classes, width, rngs=rngs)

    def __call__(self, sines: Array, label: Array) -> Array:
        return self.timestep_embedder(sines) + self.class_embedder.embedding_table(label)


class _Norm(Modulation):
    """The modulation of a block, and the embedding that it has for itself."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.emb = _Embedder(num_classes, width, rngs=rngs)
        super().__init__(width, 6, rngs=rngs)


class _Block(nnx.Module):
    def __init__(
        self, o: DiTTransformer2DModelOptions, width: int, chunk: int | None, *, rngs: nnx.Rngs
    ):
        self.norm1 = _Norm(o.num_embeds_ada_norm, width, rngs=rngs)
        self.attn1 = Attention(
            width,
            o.num_attention_heads,
            o.attention_head_dim,
            bias=o.attention_bias,
            chunk=chunk,
            rngs=rngs,
        )
        self.norm3 = LayerNorm(width, eps=o.norm_eps, affine=o.norm_elementwise_affine)
        self.ff = FeedForward(width, o.activation_fn, rngs=rngs)

    def __call__(self, h: Array, sines: Array, label: Array) -> Array:
        embedding = self.norm1.emb(sines, label)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(embedding)
        h = h + gate * self.attn1(modulated(h, shift, scale))
        return h + mlp_gate * self.ff(self.norm3(h) * (1 + mlp_scale) + mlp_shift)


class DiTTransformer2DModel(nnx.Module):
    """F(x, t[, label]) for one image x (H, W, C).

    Args:
        config: the object in a published `config.json`, of `DiTTransformer2DModel` or of a
            `Transformer2DModel` that is the same.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
    >>> config |= {"in_channels": 3, "sample_size": 8, "num_embeds_ada_norm": 10}
    >>> def answer(x):
    ...     return DiTTransformer2DModel(config, rngs=nnx.Rngs(0))(x, 500.0, 7)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 3))).shape
    (8, 8, 3)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: DiTTransformer2DModelOptions = options(
            DiTTransformer2DModelOptions, config, ignored=_IGNORED
        )
        for name, known in (
            ("norm_type", ("ada_norm_zero",)),
            ("activation_fn", tuple(patches.MLP_ACTIVATIONS)),
            ("attention_type", ("default",)),
            ("double_self_attention", (False,)),
            ("only_cross_attention", (False,)),
        ):
            one_of(CALLER, name, getattr(o, name), known)
        width = patches.head_width(CALLER, o.num_attention_heads, o.attention_head_dim)
        base = patches.grid_base(CALLER, o.sample_size, o.patch_size)
        if not 1 <= o.num_layers <= 1024:
            raise ValueError(f"`{CALLER}(num_layers={o.num_layers})` must be at least 1.")
        self.options = o
        self.out_channels = o.out_channels or o.in_channels
        self.null_class = o.num_embeds_ada_norm
        self.pos_embed = Patches(o.in_channels, width, size=o.patch_size, base=base, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(o, width, attention_chunk, rngs=rngs) for _ in range(o.num_layers)]
        )
        self.proj_out_1 = Linear(width, 2 * width, rngs=rngs)
        self.proj_out_2 = Linear(width, o.patch_size**2 * self.out_channels, rngs=rngs)

    def whole(self, x: Array, t: ArrayLike, label: ArrayLike | None = None) -> Array:
        """All output channels, (H, W, out_channels); arguments as for a call."""
        o = self.options
        x = patches.checked_image(CALLER, x, o.in_channels, o.patch_size)
        label = _checked_label(self.null_class if label is None else label, self.null_class)
        h = self.pos_embed(x)
        sines = timestep_embedding(jnp.asarray(t), _SINES, flip_sin_to_cos=True, freq_shift=1.0)
        for block in self.transformer_blocks:
            h = block(h, sines, label)
        embedding = self.transformer_blocks[0].norm1.emb(sines, label)
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(embedding)), 2)
        h = self.proj_out_2(modulated(h, shift, scale))
        answer = patches.image_of(h, x.shape[0] // o.patch_size, o.patch_size)
        return answer.astype(jnp.result_type(answer, x))

    def __call__(self, x: Array, t: ArrayLike, label: ArrayLike | None = None) -> Array:
        """F, for one image, one time and one class.

        Args:
            x: (H, W, in_channels), H and W multiples of `patch_size`.
            t: a scalar, 0 to 999.
            label: a class; None for the null class, `num_embeds_ada_norm`.

        Returns:
            (H, W, in_channels) where the output is twice as deep as the input, all of it where
            not.
        """
        answer = self.whole(x, t, label)
        learns_variance = self.out_channels == 2 * self.options.in_channels
        return answer[..., : self.options.in_channels] if learns_variance else answer


def _checked_label(label: ArrayLike, null: int) -> Array:
    found = jnp.asarray(label)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(
            f"`{CALLER}(label=...)` is of shape {found.shape} and dtype {found.dtype}; it takes "
            "one class, an integer. For several, `jax.vmap`."
        )
    if not is_traced(label) and not 0 <= int(np.asarray(label)) <= null:
        raise ValueError(
            f"`{CALLER}(label={int(np.asarray(label))})` is no class; there are 0 to {null - 1}, "
            f"and {null} for none."
        )
    # One that is traced gives NaN outside the range, never another class.
    return jnp.where((found < 0) | (found > null), null + 1, found)
