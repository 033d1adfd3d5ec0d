r"""`UNet2DConditionModel` of diffusers: the U-Net of Stable Diffusion 1, 2 and XL.

    e = MLP(sines of t) [+ embedding of a label] [+ MLP(pooled text, sines of sizes)]
    F(x, t, c) = conv_out(act(norm(up(middle(down(conv_in(x), e, c), e, c), e, c))))

with x a latent (H, W, C), t a timestep from 0 to 999, and c the text, (L, E), which spatial
transformers look at (Rombach et al. 2022, 2112.10752; Podell et al. 2023, 2307.01952).  What F
predicts, noise or v, is said by the scheduler's configuration, not by that of the network.

The options are those of the published `config.json`, all those of Stable Diffusion and more; what
is not here (Kandinsky, DeepFloyd, GLIGEN, dual attention) is refused by name.  The option
`attention_head_dim` is the number of heads of the cross-attentions: the published name is wrong,
and stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained import block_names, blocks
from mmh_jax.pretrained.attention import SpatialTransformer
from mmh_jax.pretrained.conditional_options import IGNORED, UNet2DConditionModelOptions, check
from mmh_jax.pretrained.config import options, per_block
from mmh_jax.pretrained.embeddings import FourierProjection, TimestepEmbedding, timestep_embedding
from mmh_jax.pretrained.layers import Conv, Embedding, GroupNorm, Linear, activation
from mmh_jax.pretrained.resnet import Style
from mmh_jax.typing import Array, ArrayLike

__all__ = ["Condition", "UNet2DConditionModel"]

_NAME = "UNet2DConditionModel"


class Condition(NamedTuple):
    """What a network is conditioned on; all None but the context where it takes nothing else.

    Attributes:
        context: (L, E), the text encoder's states.
        text_embeds: (P,), the pooled text of SDXL.
        time_ids: (6,), original size, crop and target size of SDXL, (height, width) each.
        label: a class, or a vector where `class_embed_type` is a projection or the identity.
        guidance: (G,), the embedded guidance scale of distilled networks (`time_cond_proj_dim`).
    """

    context: Array
    text_embeds: Array | None = None
    time_ids: Array | None = None
    label: ArrayLike | None = None
    guidance: Array | None = None


class UNet2DConditionModel(nnx.Module):
    """F(x, t, c) for one latent x (H, W, C) and one condition c.

    Args:
        config: the object in a published `config.json`.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {
    ...     "block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1,
    ...     "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    ...     "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    ...     "attention_head_dim": 2, "cross_attention_dim": 5}
    >>> import jax
    >>> def answer(x, context):
    ...     return UNet2DConditionModel(config, rngs=nnx.Rngs(0))(x, 10, context)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 4)), jnp.ones((3, 5))).shape
    (8, 8, 4)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: UNet2DConditionModelOptions = options(
            UNet2DConditionModelOptions, config, ignored=IGNORED
        )
        check(o)
        widths, act = o.block_out_channels, activation(o.act_fn, _NAME)
        fourier = o.time_embedding_type == "fourier"
        size = o.time_embedding_dim or (2 if fourier else 4) * widths[0]
        inner = size * (2 if o.class_embeddings_concat else 1)
        style = Style(
            _NAME, inner, o.norm_num_groups, o.norm_eps, act, o.resnet_time_scale_shift,
            attention_chunk, rngs,
        )  # fmt: skip
        self.options = o
        self.act = act
        self.conv_in = Conv(o.in_channels, widths[0], size=o.conv_in_kernel, rngs=rngs)
        self._build_embeddings(o, size, rngs)
        specs = _specs(o)
        self.down_blocks, kept = _downs(style, o, specs)
        self.mid_block: Any = _mid(style, o)
        self.up_blocks = _ups(style, o, kept)
        self.conv_norm_out = GroupNorm(o.norm_num_groups, widths[0], eps=o.norm_eps)
        self.conv_out = Conv(widths[0], o.out_channels, size=o.conv_out_kernel, rngs=rngs)

    def _build_embeddings(self, o: UNet2DConditionModelOptions, size: int, rngs: nnx.Rngs) -> None:
        fourier, post = o.time_embedding_type == "fourier", o.timestep_post_act
        inner = size if fourier else o.block_out_channels[0]
        added = o.projection_class_embeddings_input_dim or 0
        self.time_proj: Any = (
            FourierProjection(size // 2, log=False, flip_sin_to_cos=o.flip_sin_to_cos, rngs=rngs)
            if fourier
            else None  # the sines, which have no parameters
        )
        self.time_embedding = TimestepEmbedding(
            inner, size, act=self.act, post_act=None if post is None else activation(post, _NAME),
            condition_size=o.time_cond_proj_dim, rngs=rngs,
        )  # fmt: skip
        self.class_embedding = _class_embedding(o, inner, size, self.act, rngs)
        timed = o.addition_embed_type == "text_time"
        self.add_embedding: Any = TimestepEmbedding(added, size, rngs=rngs) if timed else None
        hidden = o.encoder_hid_dim
        self.encoder_hid_proj: Any = (
            None if hidden is None else Linear(hidden, o.context_size, rngs=rngs)
        )

    def _sines(self, t: Array, size: int) -> Array:
        o = self.options
        return timestep_embedding(
            t, size, flip_sin_to_cos=o.flip_sin_to_cos, freq_shift=o.freq_shift
        )

    def _project(self, t: Array) -> Array:
        if self.time_proj is not None:
            return self.time_proj(t)
        return self._sines(t, self.options.block_out_channels[0])

    def _embed(self, t: Array, cond: Condition) -> Array:
        """The embedding of the time and of all that is added to it."""
        o = self.options
        labelled = self.class_embedding is not None or o.class_embed_type is not None
        _check_given("label", cond.label, labelled)
        for name in ("text_embeds", "time_ids"):
            _check_given(name, getattr(cond, name), self.add_embedding is not None)
        if cond.guidance is not None and o.time_cond_proj_dim is None:
            _check_given("guidance", cond.guidance, False)
        embedding = self.time_embedding(self._project(t), cond.guidance)
        if cond.label is not None:
            label = jnp.asarray(cond.label)
            label = self._project(label) if o.class_embed_type == "timestep" else label
            more = label if self.class_embedding is None else self.class_embedding(label)
            more = more.astype(embedding.dtype)
            joined = o.class_embeddings_concat
            embedding = jnp.concatenate([embedding, more]) if joined else embedding + more
        if cond.text_embeds is not None and cond.time_ids is not None:
            sines = self._sines(jnp.asarray(cond.time_ids), o.addition_time_embed_dim or 0)
            parts = [jnp.asarray(cond.text_embeds, jnp.float32), sines.reshape(-1)]
            embedding = embedding + self.add_embedding(jnp.concatenate(parts))
        if o.time_embedding_act_fn is None:
            return embedding
        return activation(o.time_embedding_act_fn, _NAME)(embedding)

    def __call__(self, x: Array, t: ArrayLike, cond: Array | Condition) -> Array:
        """F, for one latent, one time and one condition.

        Args:
            x: (H, W, in_channels).
            t: a scalar.
            cond: the context (L, E), or a `Condition` with more.

        Returns:
            (H, W, out_channels), in the wider dtype of x and the parameters.

        Raises:
            ValueError: if x or the condition has another shape, or lacks what the network takes.
        """
        o = self.options
        cond = cond if isinstance(cond, Condition) else Condition(cond)
        dtype = self.conv_in.weight[...].dtype
        x, context = _checked(o, x, cond.context)
        inside, context = x.astype(dtype), context.astype(dtype)
        inside = 2 * inside - 1 if o.center_input_sample else inside
        embedding = self._embed(jnp.asarray(t), cond)
        context = context if self.encoder_hid_proj is None else self.encoder_hid_proj(context)
        h = self.conv_in(inside)
        kept = [h]
        for block in self.down_blocks:
            h, more, _ = block(h, embedding, context, inside)
            kept += more
        h = h if self.mid_block is None else self.mid_block(h, embedding, context)
        for block in self.up_blocks:
            taken = [kept.pop() for _ in block.resnets]
            size = (kept[-1].shape[0], kept[-1].shape[1]) if kept else None
            h, _ = block(h, taken, embedding, context, None, size)
        h = self.conv_out(self.act(self.conv_norm_out(h)))
        return h.astype(jnp.result_type(h, x))


def _class_embedding(
    o: UNet2DConditionModelOptions, inner: int, size: int, act: Any, rngs: nnx.Rngs
) -> Any:
    """The module that embeds a label, or None where there is no label or nothing to learn."""
    added = o.projection_class_embeddings_input_dim or 0
    if o.class_embed_type is None and o.num_class_embeds is not None:
        return Embedding(o.num_class_embeds, size, rngs=rngs)
    if o.class_embed_type == "timestep":
        return TimestepEmbedding(inner, size, act=act, rngs=rngs)
    if o.class_embed_type == "projection":
        return TimestepEmbedding(added, size, rngs=rngs)
    if o.class_embed_type == "simple_projection":
        return Linear(added, size, rngs=rngs)
    return None


def _check_given(name: str, value: Any, takes: bool) -> None:
    if takes == (value is not None):
        return
    if takes:
        raise ValueError(f"`{_NAME}(cond=...)` has no {name}; pass `Condition(..., {name}=...)`.")
    raise ValueError(f"`{_NAME}(cond=...)` has {name}, which this network does not take.")


def _checked(o: UNet2DConditionModelOptions, x: Any, context: Any) -> tuple[Array, Array]:
    x, context = jnp.asarray(x), jnp.asarray(context)
    if x.ndim != 3 or x.shape[2] != o.in_channels:
        cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one latent, channels last."
        raise ValueError(
            f"`{_NAME}(x=...)` has shape {x.shape}; it takes (H, W, {o.in_channels}). {cure}"
        )
    width = o.given_size
    if context.ndim != 2 or context.shape[1] != width:
        cure = "Did you mean `jax.vmap`?" if context.ndim == 3 else "Pass one text's states."
        raise ValueError(
            f"`{_NAME}(cond=...)` has a context of shape {context.shape}; it takes (L, {width}). "
            f"{cure}"
        )
    return x, context


def _specs(o: UNet2DConditionModelOptions) -> list[blocks.Spec]:
    """The blocks of the way down."""
    num = len(o.block_out_channels)

    def each(name: str, layers: bool = False) -> tuple:
        return per_block(_NAME, name, getattr(o, name), num, layers=layers)

    layers = each("layers_per_block", layers=True)
    depths = each("transformer_layers_per_block", layers=True)
    heads, contexts = each("attention_head_dim"), each("cross_attention_dim")
    only = each("only_cross_attention")
    return [
        blocks.Spec(
            kind, layers[i], i < num - 1, head_size=heads[i], num_heads=heads[i],
            context_size=contexts[i], transformer_layers=_depths(depths[i], layers[i]),
            linear=o.use_linear_projection, only_cross=only[i], padding=o.downsample_padding,
            skip_time_act=o.resnet_skip_time_act, rescale=o.resnet_out_scale_factor,
        )
        for i, kind in enumerate(map(block_names.plain_kind, o.down_block_types))
    ]  # fmt: skip


def _depths(value: int | tuple[int, ...], num: int) -> tuple[int, ...]:
    """The number of transformer layers behind each residual block."""
    return per_block(_NAME, "transformer_layers_per_block", value, num, layers=True)


def _downs(
    style: Style, o: UNet2DConditionModelOptions, specs: list[blocks.Spec]
) -> tuple[nnx.List, list[int]]:
    """The blocks of the way down, and the channels of what they keep."""
    found, here, kept = [], o.block_out_channels[0], [o.block_out_channels[0]]
    for spec, width in zip(specs, o.block_out_channels, strict=True):
        found.append(block_names.down(style, spec, here, width))
        kept += [width] * (spec.num_layers + spec.resamples)
        here = width
    return nnx.List(found), kept


def _mid(style: Style, o: UNet2DConditionModelOptions) -> blocks.Mid | None:
    width, spec = o.block_out_channels[-1], _specs(o)[-1]
    if o.mid_block_type is None:
        return None
    if o.mid_block_type == "UNetMidBlock2D":
        return blocks.Mid(style, width, [], rescale=o.mid_block_scale_factor)
    depth = per_block(
        _NAME, "transformer_layers_per_block", o.transformer_layers_per_block,
        len(o.block_out_channels),
    )[-1]  # fmt: skip
    transformer = SpatialTransformer(
        style, width, spec.num_heads, spec.context_size, num_layers=_depths(depth, 1)[0],
        linear=o.use_linear_projection,
    )  # fmt: skip
    return blocks.Mid(style, width, [transformer], rescale=o.mid_block_scale_factor)


def _ups(style: Style, o: UNet2DConditionModelOptions, kept: list[int]) -> nnx.List:
    """The blocks of the way up; takes the channels of what was kept from the list."""
    found, here = [], o.block_out_channels[-1]
    num = len(o.block_out_channels)
    depths = per_block(_NAME, "transformer_layers_per_block", o.transformer_layers_per_block, num)
    turned = o.reverse_transformer_layers_per_block
    turned = depths[::-1] if turned is None else turned
    turned = per_block(_NAME, "reverse_transformer_layers_per_block", turned, num, layers=True)
    for i, below in enumerate(reversed(_specs(o))):
        spec = dataclasses.replace(
            below, kind=block_names.plain_kind(o.up_block_types[i]),
            num_layers=below.num_layers + 1, resamples=i < num - 1,
            transformer_layers=_depths(turned[i], below.num_layers + 1),
        )  # fmt: skip
        width = o.block_out_channels[num - 1 - i]
        taken = [kept.pop() for _ in range(spec.num_layers)]
        found.append(block_names.up(style, spec, here, width, taken))
        here = width
    return nnx.List(found)
