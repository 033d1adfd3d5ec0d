r"""`UNet2DModel` of diffusers: the U-Net of DDPM (Ho et al. 2020) and NCSN++ (Song et al. 2021).

    e = MLP(sines of t) [+ embedding of the label]
    h = conv_in(x); down blocks, each answer kept; middle; up blocks, each taking kept answers
    F(x, t) = conv_out(silu(norm(h))) [+ the image of the skip blocks] [/ t]

with x of shape (H, W, C) and t a timestep, 0 to 999 for DDPM, or a noise level where the embedding
of the time is `fourier`; there the answer is divided by t, and is the score.

The options are those of the published `config.json`; read are all of version 0.42 of diffusers,
except those that are named in an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained import block_names, blocks
from mmh_jax.pretrained.attention import SelfAttention
from mmh_jax.pretrained.config import check_blocks, one_of, options, per_block
from mmh_jax.pretrained.embeddings import FourierProjection, TimestepEmbedding, timestep_embedding
from mmh_jax.pretrained.layers import Conv, Embedding, GroupNorm, activation, wide
from mmh_jax.pretrained.resnet import Style
from mmh_jax.typing import Array, ArrayLike

__all__ = ["UNet2DModel", "UNet2DModelOptions"]

_SHIFTS = ("default", "scale_shift")


@dataclasses.dataclass(frozen=True)
class UNet2DModelOptions:
    """The options of a `config.json`, with the defaults that hold where one is missing."""

    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None


class UNet2DModel(nnx.Module):
    """F(x, t[, label]) for one image x (H, W, C).

    Args:
        config: the object in a published `config.json`.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {
    ...     "block_out_channels": [4, 8], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    ...     "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 2,
    ...     "layers_per_block": 1, "attention_head_dim": None}
    >>> def answer(x):
    ...     return UNet2DModel(config, rngs=nnx.Rngs(0))(x, 10)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 3))).shape
    (8, 8, 3)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: UNet2DModelOptions = options(
            UNet2DModelOptions, config, ignored=("sample_size", "dropout")
        )
        _check(o)
        widths = o.block_out_channels
        size = o.time_embedding_dim or 4 * widths[0]
        style = Style(
            "UNet2DModel", size, o.norm_num_groups, o.norm_eps,
            activation(o.act_fn, "UNet2DModel"), o.resnet_time_scale_shift, attention_chunk, rngs,
        )  # fmt: skip
        self.options = o
        self.conv_in = Conv(o.in_channels, widths[0], rngs=rngs)
        self._build_embeddings(o, size, rngs)
        self.down_blocks, kept = _downs(style, o)
        self.mid_block: Any = None if o.mid_block_type is None else _mid(style, o)
        self.up_blocks = _ups(style, o, kept)
        self.conv_norm_out = GroupNorm(style.groups_of(widths[0]), widths[0], eps=o.norm_eps)
        self.conv_out = Conv(widths[0], o.out_channels, rngs=rngs)

    def _build_embeddings(self, o: UNet2DModelOptions, size: int, rngs: nnx.Rngs) -> None:
        width = o.block_out_channels[0]
        project: Any = None  # the sines, which have no parameters
        if o.time_embedding_type == "fourier":
            project = FourierProjection(width, scale=16.0, rngs=rngs)
        elif o.time_embedding_type == "learned":
            project = Embedding(o.num_train_timesteps or 0, width, rngs=rngs)
        inner = 2 * width if o.time_embedding_type == "fourier" else width
        classes: Any = None
        if o.class_embed_type is None and o.num_class_embeds is not None:
            classes = Embedding(o.num_class_embeds, size, rngs=rngs)
        elif o.class_embed_type == "timestep":
            classes = TimestepEmbedding(inner, size, rngs=rngs)
        self.time_proj = project
        self.time_embedding = TimestepEmbedding(inner, size, rngs=rngs)
        self.class_embedding = classes

    def _project(self, t: Array) -> Array:
        o = self.options
        if o.time_embedding_type == "learned":
            return self.time_proj(t.astype(int))
        if self.time_proj is not None:
            return self.time_proj(t)
        return timestep_embedding(
            t, o.block_out_channels[0], flip_sin_to_cos=o.flip_sin_to_cos, freq_shift=o.freq_shift
        )

    def _embed(self, t: Array, label: ArrayLike | None) -> Array:
        """The embedding of the time, with that of the label."""
        embedding = self.time_embedding(self._project(t))
        takes = self.class_embedding is not None or self.options.class_embed_type is not None
        if takes != (label is not None):
            cure = "Pass its label." if takes else "Leave the label out."
            raise ValueError(
                f"`UNet2DModel(label={label})`: this network is "
                f"{'' if takes else 'not '}conditional on a class. {cure}"
            )
        if label is None:
            return embedding
        label = jnp.asarray(label)
        if self.options.class_embed_type == "timestep":
            label = self._project(label)
        more = label if self.class_embedding is None else self.class_embedding(label)
        return embedding + more.astype(embedding.dtype)

    def __call__(self, x: Array, t: ArrayLike, label: ArrayLike | None = None) -> Array:
        """F, for one image and one time.

        Args:
            x: (H, W, in_channels), H and W multiples of 2 for each halving.
            t: a scalar.
            label: a class, or for `class_embed_type="identity"` its embedding; None if the network
                has none.

        Returns:
            (H, W, out_channels), in the wider dtype of x and the parameters.
        """
        o, t = self.options, jnp.asarray(t)
        dtype = self.conv_in.weight[...].dtype
        inside = _checked("UNet2DModel", x, o.in_channels).astype(dtype)
        inside = 2 * inside - 1 if o.center_input_sample else inside
        embedding = self._embed(t, label)
        h, image = self.conv_in(inside), inside
        kept = [h]
        for block in self.down_blocks:
            h, more, image = block(h, embedding, None, image)
            kept += more
        h = h if self.mid_block is None else self.mid_block(h, embedding)
        answer = None
        for block in self.up_blocks:
            taken = [kept.pop() for _ in block.resnets]
            h, answer = block(h, taken, embedding, None, answer, None)
        h = self.conv_out(jax.nn.silu(self.conv_norm_out(h)))
        h = h if answer is None else h + answer
        h = h.astype(jnp.result_type(h, x))
        return h / wide(t).astype(h.dtype) if o.time_embedding_type == "fourier" else h


def _checked(caller: str, x: Array, channels: int) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[2] != channels:
        cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one image, channels last."
        raise ValueError(
            f"`{caller}(x=...)` has shape {x.shape}; it takes (H, W, {channels}). {cure}"
        )
    return x


def _check(o: UNet2DModelOptions) -> None:
    """Refuse what is not here, by name."""
    name = "UNet2DModel"
    check_blocks(name, o.block_out_channels, o.down_block_types, o.up_block_types)
    one_of(name, "time_embedding_type", o.time_embedding_type, ("positional", "fourier", "learned"))
    one_of(name, "resnet_time_scale_shift", o.resnet_time_scale_shift, _SHIFTS)
    one_of(name, "mid_block_type", o.mid_block_type, ("UNetMidBlock2D", None))
    one_of(name, "downsample_type", o.downsample_type, ("conv", "resnet"))
    one_of(name, "upsample_type", o.upsample_type, ("conv", "resnet"))
    one_of(name, "downsample_padding", o.downsample_padding, (0, 1))
    one_of(name, "class_embed_type", o.class_embed_type, (None, "timestep", "identity"))
    if o.time_embedding_type == "learned" and not o.num_train_timesteps:
        raise ValueError(
            f"`{name}(num_train_timesteps=...)` must be given for a learned embedding."
        )
    per_block(name, "layers_per_block", o.layers_per_block, 1, layers=True)


def _downs(style: Style, o: UNet2DModelOptions) -> tuple[nnx.List, list[int]]:
    """The blocks of the way down, and the channels of what they keep."""
    found, here, kept = [], o.block_out_channels[0], [o.block_out_channels[0]]
    last = len(o.block_out_channels) - 1
    for i, (kind, width) in enumerate(zip(o.down_block_types, o.block_out_channels, strict=True)):
        spec = blocks.Spec(
            block_names.plain_kind(kind), o.layers_per_block, i < last,
            head_size=o.attention_head_dim, padding=o.downsample_padding,
            resample=o.downsample_type,
        )  # fmt: skip
        found.append(block_names.down(style, spec, here, width))
        kept += [width] * (o.layers_per_block + (i < last))
        here = width
    return nnx.List(found), kept


def _mid(style: Style, o: UNet2DModelOptions) -> blocks.Mid:
    width, rescale = o.block_out_channels[-1], o.mid_block_scale_factor
    normed = o.attn_norm_num_groups is not None or o.resnet_time_scale_shift == "default"
    attention = None
    if o.add_attention:
        attention = SelfAttention(
            style, width, o.attention_head_dim, norm=normed, groups=o.attn_norm_num_groups,
            rescale=rescale,
        )  # fmt: skip
    return blocks.Mid(style, width, [attention], rescale=rescale)


def _ups(style: Style, o: UNet2DModelOptions, kept: list[int]) -> nnx.List:
    """The blocks of the way up; takes the channels of what was kept from the list."""
    found, here = [], o.block_out_channels[-1]
    last = len(o.block_out_channels) - 1
    widths = o.block_out_channels[::-1]
    for i, (kind, width) in enumerate(zip(o.up_block_types, widths, strict=True)):
        spec = blocks.Spec(
            block_names.plain_kind(kind), o.layers_per_block + 1, i < last,
            head_size=o.attention_head_dim, resample=o.upsample_type,
        )  # fmt: skip
        taken = [kept.pop() for _ in range(spec.num_layers)]
        found.append(block_names.up(style, spec, here, width, taken))
        here = width
    return nnx.List(found)
