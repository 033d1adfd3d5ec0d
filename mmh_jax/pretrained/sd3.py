r"""The transformer of Stable Diffusion 3 (Esser et al. 2024, 2403.03206): `SD3Transformer2DModel`.

Pixels h and text c are two streams, each with its own weights, that attend to both:

    h <- h + g_1 A_h,   c <- c + d_1 A_c,   (A_h, A_c) = attention of [norm(h), norm(c)] to the same
    h <- h + g_2 MLP(norm(h)),   c <- c + d_2 MLP'(norm(c))             `num_layers` times
    F = unpatch(W (norm(h) (1 + scale) + shift))

where every norm is modulated, and gates and modulations are linear in silu of the embedding of time
and pooled text.  The last block drops c after its attention.  Stable Diffusion 3.5 normalises
queries and keys of each head (`qk_norm`), and its medium network has a further attention of h to
itself in the first blocks (`dual_attention_layers`).  F is the velocity eps - x0, t is 0 to 1000.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained import patches
from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.embeddings import TimestepEmbedding, timestep_embedding
from mmh_jax.pretrained.layers import Linear, Nothing, attend
from mmh_jax.pretrained.patches import FeedForward, Modulation, Patches, RMSNorm, modulated
from mmh_jax.typing import Array, ArrayLike

__all__ = ["JointCondition", "SD3Transformer2DModel", "SD3Transformer2DModelOptions"]

CALLER = "SD3Transformer2DModel"
_SINES = 256


@dataclasses.dataclass(frozen=True)
class SD3Transformer2DModelOptions:
    """The options of a published `config.json`."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    qk_norm: str | None = None


class JointCondition(NamedTuple):
    """What the network knows of a text.

    Attributes:
        context: (L, joint_attention_dim), its tokens.
        pooled: (pooled_projection_dim,).
    """

    context: Array
    pooled: Array


class _Attention(nnx.Module):
    """Of two streams to both, or of one to itself."""

    def __init__(
        self,
        o: SD3Transformer2DModelOptions,
        width: int,
        chunk: int | None,
        *,
        joint: bool,
        last: bool = False,
        rngs: nnx.Rngs,
    ):
        def linear() -> Linear:
            return Linear(width, width, rngs=rngs)

        self.num_heads, self.chunk = o.num_attention_heads, chunk
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear(), Nothing()])
        norms = o.qk_norm is not None
        self.norm_q: Any = RMSNorm(o.attention_head_dim) if norms else None
        self.norm_k: Any = RMSNorm(o.attention_head_dim) if norms else None
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q: Any = RMSNorm(o.attention_head_dim) if norms else None
            self.norm_added_k: Any = RMSNorm(o.attention_head_dim) if norms else None
            self.to_add_out: Any = None if last else linear()

    def _heads(self, layer: Linear, norm: Any, h: Array) -> Array:
        found = layer(h).reshape(h.shape[0], self.num_heads, -1)
        return found if norm is None else norm(found)

    def __call__(self, h: Array, context: Array | None = None) -> tuple[Array, Any]:
        parts = [
            self._heads(layer, norm, h)
            for layer, norm in (
                (self.to_q, self.norm_q),
                (self.to_k, self.norm_k),
                (self.to_v, None),
            )
        ]
        if context is not None:
            added = (
                (self.add_q_proj, self.norm_added_q),
                (self.add_k_proj, self.norm_added_k),
                (self.add_v_proj, None),
            )
            parts = [
                jnp.concatenate([part, self._heads(layer, norm, context)])
                for part, (layer, norm) in zip(parts, added, strict=True)
            ]
        q, k, v = parts
        found = attend(q, k, v, chunk=self.chunk).reshape(q.shape[0], -1)
        of_context = None
        if context is not None and self.to_add_out is not None:
            of_context = self.to_add_out(found[h.shape[0] :])
        return self.to_out[0](found[: h.shape[0]]), of_context


class _Block(nnx.Module):
    """Both streams; `dual` for a further attention of the pixels, `last` without text after."""

    def __init__(
        self,
        o: SD3Transformer2DModelOptions,
        width: int,
        chunk: int | None,
        *,
        dual: bool,
        last: bool,
        rngs: nnx.Rngs,
    ):
        self.norm1 = Modulation(width, 9 if dual else 6, rngs=rngs)
        self.norm1_context = Modulation(width, 2 if last else 6, rngs=rngs)
        self.attn = _Attention(o, width, chunk, joint=True, last=last, rngs=rngs)
        self.attn2: Any = _Attention(o, width, chunk, joint=False, rngs=rngs) if dual else None
        self.ff = FeedForward(width, "gelu-approximate", rngs=rngs)
        self.ff_context: Any = None if last else FeedForward(width, "gelu-approximate", rngs=rngs)

    def __call__(self, h: Array, c: Array, embedding: Array) -> tuple[Array, Array]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = self.norm1(embedding)
        of_text = self.norm1_context(embedding)
        if self.ff_context is None:  # in this norm the scale is first
            of_text = of_text[::-1]
        found, found_c = self.attn(modulated(h, shift, scale), modulated(c, *of_text[:2]))
        more = 0.0
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            more = gate2 * self.attn2(modulated(h, shift2, scale2))[0]
        h = h + gate * found + more
        h = h + mlp_gate * self.ff(modulated(h, mlp_shift, mlp_scale))
        if self.ff_context is not None:
            c_gate, c_shift, c_scale, c_mlp_gate = of_text[2:]
            c = c + c_gate * found_c
            c = c + c_mlp_gate * self.ff_context(modulated(c, c_shift, c_scale))
        return h, c


class _Embedder(nnx.Module):
    """Of time and pooled text."""

    def __init__(self, pooled: int, width: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(_SINES, width, rngs=rngs)
        self.text_embedder = TimestepEmbedding(pooled, width, rngs=rngs)

    def __call__(self, t: Array, pooled: Array) -> Array:
        sines = timestep_embedding(t, _SINES, flip_sin_to_cos=True, freq_shift=0.0)
        return self.timestep_embedder(sines) + self.text_embedder(pooled)


class SD3Transformer2DModel(nnx.Module):
    """F(x, t, condition) for one latent image x (H, W, C).

    Args:
        config: the object in a published `config.json`.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    >>> config |= {"caption_projection_dim": 8, "joint_attention_dim": 5, "sample_size": 8}
    >>> config |= {"pooled_projection_dim": 6, "in_channels": 4, "out_channels": 4}
    >>> condition = JointCondition(jnp.ones((3, 5)), jnp.ones(6))
    >>> def answer(x):
    ...     return SD3Transformer2DModel(config, rngs=nnx.Rngs(0))(x, 500.0, condition)
    >>> nnx.eval_shape(answer, jnp.ones((8, 8, 4))).shape
    (8, 8, 4)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        dual = config.get("dual_attention_layers") or ()
        rest = {k: v for k, v in config.items() if k != "dual_attention_layers"}
        o: SD3Transformer2DModelOptions = options(SD3Transformer2DModelOptions, rest)
        width = _checked(o, dual)
        self.options = o
        out = o.out_channels or o.in_channels
        self.pos_embed = Patches(
            o.in_channels,
            width,
            size=o.patch_size,
            base=patches.grid_base(CALLER, o.sample_size, o.patch_size),
            table=o.pos_embed_max_size,
            rngs=rngs,
        )
        self.time_text_embed = _Embedder(o.pooled_projection_dim, width, rngs=rngs)
        self.context_embedder = Linear(o.joint_attention_dim, width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                _Block(
                    o,
                    width,
                    attention_chunk,
                    dual=index in dual,
                    last=index == o.num_layers - 1,
                    rngs=rngs,
                )
                for index in range(o.num_layers)
            ]
        )
        self.norm_out = Modulation(width, 2, rngs=rngs)
        self.proj_out = Linear(width, o.patch_size**2 * out, rngs=rngs)

    def __call__(self, x: Array, t: ArrayLike, condition: JointCondition) -> Array:
        """F, for one image, one time and one text.

        Args:
            x: (H, W, in_channels), H and W multiples of `patch_size`.
            t: a scalar, 0 to 1000.
            condition: tokens and pooled vector of the text.

        Returns:
            (H, W, out_channels).
        """
        o = self.options
        x = patches.checked_image(CALLER, x, o.in_channels, o.patch_size)
        context, pooled = (jnp.asarray(value) for value in condition)
        if context.ndim != 2 or pooled.ndim != 1:
            raise ValueError(
                f"`{CALLER}(condition=...)` has a context of shape {context.shape} and a pooled "
                f"vector of shape {pooled.shape}; they are (L, {o.joint_attention_dim}) and "
                f"({o.pooled_projection_dim},). For several, `jax.vmap`."
            )
        h, c = self.pos_embed(x), self.context_embedder(context)
        embedding = self.time_text_embed(jnp.asarray(t), pooled)
        for block in self.transformer_blocks:
            h, c = block(h, c, embedding)
        scale, shift = self.norm_out(embedding)
        h = self.proj_out(modulated(h, shift, scale))
        answer = patches.image_of(h, x.shape[0] // o.patch_size, o.patch_size)
        return answer.astype(jnp.result_type(answer, x))


def _checked(o: SD3Transformer2DModelOptions, dual: Any) -> int:
    """The width, if the options fit."""
    one_of(CALLER, "qk_norm", o.qk_norm, (None, "rms_norm"))
    width = patches.head_width(CALLER, o.num_attention_heads, o.attention_head_dim)
    if o.caption_projection_dim != width:
        raise ValueError(
            f"`{CALLER}(caption_projection_dim={o.caption_projection_dim})` must be the width, "
            f"num_attention_heads * attention_head_dim = {width}."
        )
    if not 1 <= o.num_layers <= 1024 or not 1 <= o.pos_embed_max_size <= 1024:
        raise ValueError(
            f"`{CALLER}(num_layers={o.num_layers}, pos_embed_max_size={o.pos_embed_max_size})` "
            "must be from 1 to 1024."
        )
    if not isinstance(dual, list | tuple) or not set(dual) <= set(range(o.num_layers)):
        raise ValueError(
            f"`{CALLER}(dual_attention_layers={str(dual)[:80]})` must be layers, 0 to "
            f"{o.num_layers - 1}."
        )
    return width
