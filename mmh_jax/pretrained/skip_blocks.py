r"""Blocks that carry a small image along (Song et al. 2021, 2011.13456, NCSN++).

On the way down the image is halved by the filter (1, 3, 3, 1) / 8, and its projection added to the
features; on the way up the answer is built as a sum of images of growing resolution.  All sums are
divided by sqrt(2), and norms have a quarter of their channels for groups.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from mmh_jax.pretrained.attention import SelfAttention
from mmh_jax.pretrained.blocks import Spec, joined
from mmh_jax.pretrained.layers import Conv, GroupNorm
from mmh_jax.pretrained.resnet import Resnet, Style, fir_doubled, fir_halved
from mmh_jax.typing import Array

__all__ = ["SkipDown", "SkipUp"]

_ROOT2 = math.sqrt(2.0)


class SkipDown(nnx.Module):
    """A block of the way down that adds a projection of the small image."""

    def __init__(self, style: Style, spec: Spec, num_in: int, num_out: int):
        style = dataclasses.replace(style, groups=None)
        self.resnets = nnx.List(
            [
                Resnet(style, num_in if i == 0 else num_out, num_out, rescale=_ROOT2)
                for i in range(spec.num_layers)
            ]
        )
        count = spec.num_layers if spec.attends else 0
        layers = [_skip_attention(style, spec, num_out) for _ in range(count)]
        self.attentions: Any = nnx.List(layers) if layers else None
        if not spec.resamples:
            self.resnet_down: Any = None
            return
        self.resnet_down = Resnet(
            style, num_out, num_out, resample="fir_down", rescale=_ROOT2, shortcut=True
        )
        self.skip_conv = Conv(3, num_out, size=1, rngs=style.rngs)

    def __call__(
        self, h: Array, embedding: Array | None, context: Array | None, image: Array
    ) -> tuple[Array, list[Array], Array]:
        """The answer, what is kept, and the small image, halved if the answer is."""
        kept = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            if self.attentions is not None:
                h = self.attentions[i](h)
            kept.append(h)
        if self.resnet_down is not None:
            h = self.resnet_down(h, embedding)
            image = fir_halved(image)
            h = self.skip_conv(image) + h
            kept.append(h)
        return h, kept, image


def _skip_attention(style: Style, spec: Spec, width: int) -> SelfAttention:
    return SelfAttention(style, width, spec.head_size, groups=32, rescale=_ROOT2)


class SkipUp(nnx.Module):
    """A block of the way up that adds to the image of the answer."""

    def __init__(self, style: Style, spec: Spec, num_in: int, num_out: int, kept: list[int]):
        style = dataclasses.replace(style, groups=None)
        widths = [(num_in if i == 0 else num_out, beside) for i, beside in enumerate(kept)]
        self.resnets = nnx.List(
            [
                Resnet(
                    style,
                    ours + beside,
                    num_out,
                    rescale=_ROOT2,
                    # As in the reference, where the quarter is of the second summand alone.
                    groups_in=min(ours + beside // 4, 32) if spec.attends else None,
                )
                for ours, beside in widths
            ]
        )
        self.attentions: Any = (
            nnx.List([_skip_attention(style, spec, num_out)]) if spec.attends else None
        )
        if not spec.resamples:
            self.resnet_up: Any = None
            return
        self.resnet_up = Resnet(
            style, num_out, num_out, resample="fir_up", rescale=_ROOT2, shortcut=True
        )
        self.skip_conv = Conv(num_out, 3, rngs=style.rngs)
        self.skip_norm = GroupNorm(style.groups_of(num_out), num_out, eps=style.eps)

    def __call__(
        self,
        h: Array,
        kept: list[Array],
        embedding: Array | None,
        context: Array | None,
        image: Array | None,
        size: tuple[int, int] | None,
    ) -> tuple[Array, Array | None]:
        """The answer, and the image so far."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(joined(h, kept[i]), embedding)
        if self.attentions is not None:
            h = self.attentions[0](h)
        image = None if image is None else fir_doubled(image)
        if self.resnet_up is not None:
            more = self.skip_conv(jax.nn.silu(self.skip_norm(h)))
            image = more if image is None else image + more
            h = self.resnet_up(h, embedding)
        return h, image
