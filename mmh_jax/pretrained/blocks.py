r"""The blocks of published U-Nets: down, middle and up.

On the way down a block is a sequence of residual blocks, each perhaps with an attention behind it,
and a halving; every intermediate answer is kept.  On the way up, residual blocks that each take one
of the kept answers beside their input, and a doubling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained.attention import SelfAttention, SpatialTransformer
from mmh_jax.pretrained.resnet import Downsample, Resnet, Style, Upsample
from mmh_jax.typing import Array

__all__ = ["Down", "Mid", "Spec", "Up", "joined"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What distinguishes one block from another.

    Attributes:
        kind: its name in a configuration.
        num_layers: residual blocks.
        resamples: whether the resolution changes at its end.
        head_size: of attention of pixels, None for one head.
        num_heads: of cross-attention.
        context_size: of cross-attention.
        transformer_layers: of each spatial transformer.
        linear, only_cross: of the spatial transformers.
        padding: of the halving convolution.
        resample: "conv" or "resnet", of blocks with attention of pixels.
        skip_time_act, rescale: of `ResnetDownsampleBlock2D` and `ResnetUpsampleBlock2D`.
    """

    kind: str
    num_layers: int
    resamples: bool
    head_size: int | None = None
    num_heads: int = 1
    context_size: int = 0
    transformer_layers: tuple[int, ...] = (1,)
    linear: bool = False
    only_cross: bool = False
    padding: int = 1
    resample: str | None = "conv"
    skip_time_act: bool = False
    rescale: float = 1.0

    def attention(self, style: Style, width: int, layer: int) -> nnx.Module:
        """The attention behind residual block number `layer`."""
        if not self.kind.startswith("CrossAttn"):
            return SelfAttention(style, width, self.head_size)
        return SpatialTransformer(
            style, width, self.num_heads, self.context_size, linear=self.linear,
            num_layers=self.transformer_layers[layer], only_cross=self.only_cross,
        )  # fmt: skip

    @property
    def attends(self) -> bool:
        """Whether there is any."""
        return "Attn" in self.kind

    @property
    def by_resnet(self) -> bool:
        """Whether the resolution is changed by a residual block."""
        return self.kind.startswith("Resnet") or (
            self.kind.startswith("Attn") and self.resample == "resnet"
        )


def _attentions(style: Style, spec: Spec, width: int) -> Any:
    """One behind each residual block, or None."""
    if not spec.attends:
        return None
    return nnx.List([spec.attention(style, width, i) for i in range(spec.num_layers)])


class Down(nnx.Module):
    """A block of the way down; see `down`."""

    def __init__(self, style: Style, spec: Spec, num_in: int, num_out: int):
        common: Any = {"skip_time_act": spec.skip_time_act, "rescale": spec.rescale}
        common = common if spec.kind.startswith("Resnet") else {}
        self.resnets = nnx.List(
            [
                Resnet(style, num_in if i == 0 else num_out, num_out, **common)
                for i in range(spec.num_layers)
            ]
        )
        self.attentions = _attentions(style, spec, num_out)
        last: Any = None
        if spec.resamples and spec.by_resnet:
            last = Resnet(style, num_out, num_out, resample="down", **common)
        elif spec.resamples:
            last = Downsample(num_out, spec.padding, rngs=style.rngs)
        self.downsamplers: Any = None if last is None else nnx.List([last])

    def __call__(
        self, h: Array, embedding: Array | None, context: Array | None, image: Array
    ) -> tuple[Array, list[Array], Array]:
        """The answer, what is kept, and the small image, which passes by."""
        kept = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            if self.attentions is not None:
                h = self.attentions[i](h, context)
            kept.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h, embedding)
            kept.append(h)
        return h, kept, image


class Up(nnx.Module):
    """A block of the way up; see `up`."""

    def __init__(self, style: Style, spec: Spec, num_in: int, num_out: int, kept: list[int]):
        common: Any = {"skip_time_act": spec.skip_time_act, "rescale": spec.rescale}
        common = common if spec.kind.startswith("Resnet") else {}
        self.resnets = nnx.List(
            [
                Resnet(style, (num_in if i == 0 else num_out) + beside, num_out, **common)
                for i, beside in enumerate(kept)
            ]
        )
        self.attentions = _attentions(style, spec, num_out)
        last: Any = None
        if spec.resamples and spec.by_resnet:
            last = Resnet(style, num_out, num_out, resample="up", **common)
        elif spec.resamples:
            last = Upsample(num_out, rngs=style.rngs)
        self.upsamplers: Any = None if last is None else nnx.List([last])

    def __call__(
        self,
        h: Array,
        kept: list[Array],
        embedding: Array | None,
        context: Array | None,
        image: Array | None,
        size: tuple[int, int] | None,
    ) -> tuple[Array, Array | None]:
        """The answer, of resolution `size` if it is not twice the input's; and the small image."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(joined(h, kept[i]), embedding)
            if self.attentions is not None:
                h = self.attentions[i](h, context)
        if self.upsamplers is not None:
            last = self.upsamplers[0]
            h = last(h, embedding, size) if isinstance(last, Upsample) else last(h, embedding)
        return h, image


def joined(h: Array, kept: Array) -> Array:
    """Two feature maps, one behind the other.

    Raises:
        ValueError: if they differ in height or width.
    """
    if h.shape[:2] != kept.shape[:2]:
        raise ValueError(
            f"a feature map of {h.shape[:2]} pixels meets one of {kept.shape[:2]}: height and "
            "width of x must be multiples of 2 for each halving of this network."
        )
    return jnp.concatenate([h, kept], axis=-1)


class Mid(nnx.Module):
    """The block in the middle: residual blocks with attentions between them.

    Args:
        style: of the network.
        width: channels.
        attentions: the attention behind each residual block but the last; None for none there.
        rescale: of the residual blocks.
    """

    def __init__(
        self,
        style: Style,
        width: int,
        attentions: Sequence[SelfAttention | SpatialTransformer | None],
        *,
        rescale: float = 1.0,
    ):
        count = 1 + len(attentions)
        self.resnets = nnx.List(
            [Resnet(style, width, width, rescale=rescale) for _ in range(count)]
        )
        self.attentions = nnx.List([a for a in attentions if a is not None])

    def __call__(
        self, h: Array, embedding: Array | None = None, context: Array | None = None
    ) -> Array:
        """Of the same shape."""
        h = self.resnets[0](h, embedding)
        for i in range(1, len(self.resnets)):
            if len(self.attentions) > 0:
                h = self.attentions[i - 1](h, context)
            h = self.resnets[i](h, embedding)
        return h
