r"""The blocks of published U-Nets by the names that configurations use.

| name                      | attention           | resampling                           |
|---------------------------|---------------------|--------------------------------------|
| `DownBlock2D`             | none                | convolution                          |
| `ResnetDownsampleBlock2D` | none                | residual block                       |
| `AttnDownBlock2D`         | of pixels           | convolution or residual block        |
| `CrossAttnDownBlock2D`    | spatial transformer | convolution                          |
| `SkipDownBlock2D`         | none                | residual block, the image beside it  |
| `AttnSkipDownBlock2D`     | of pixels           | the same                             |

The names of the way up are the same with `Up`.  What is not in the table is refused by name.
"""

from __future__ import annotations

from typing import Any

from mmh_jax.pretrained.blocks import Down, Spec, Up
from mmh_jax.pretrained.resnet import Style
from mmh_jax.pretrained.skip_blocks import SkipDown, SkipUp

__all__ = ["current_name", "down", "plain_kind", "up"]

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name: str) -> str:
    """The present name of a parameter of an attention that an old file names differently.

    For `weights.restore(rename=...)`.

    >>> current_name("mid_block.attentions.0.proj_attn.weight")
    'mid_block.attentions.0.to_out.0.weight'
    """
    parts = name.split(".")
    if "attentions" in parts[:-2] and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def plain_kind(kind: str) -> str:
    """The name of a block without the prefix that old configurations have.

    >>> plain_kind("UNetResDownBlock2D")
    'DownBlock2D'
    """
    return kind.removeprefix("UNetRes")


def down(style: Style, spec: Spec, num_in: int, num_out: int) -> Down | SkipDown:
    """A block of the way down.

    Raises:
        ValueError: if there is none of this name.
    """
    known = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
    skip = ("SkipDownBlock2D", "AttnSkipDownBlock2D")
    if spec.kind in skip:
        return SkipDown(style, spec, num_in, num_out)
    if spec.kind not in known:
        raise _unknown(style, "down_block_types", spec.kind, known + skip)
    return Down(style, spec, num_in, num_out)


def up(style: Style, spec: Spec, num_in: int, num_out: int, kept: list[int]) -> Up | SkipUp:
    """A block of the way up, which takes the last of the answers that were kept.

    Args:
        style, spec: of the network, and of the block.
        num_in, num_out: channels.
        kept: channels of the kept answers, in the order in which they are taken.

    Raises:
        ValueError: if there is none of this name.
    """
    known = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")
    skip = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
    if spec.kind in skip:
        return SkipUp(style, spec, num_in, num_out, kept)
    if spec.kind not in known:
        raise _unknown(style, "up_block_types", spec.kind, known + skip)
    return Up(style, spec, num_in, num_out, kept)


def _unknown(style: Style, option: str, kind: Any, known: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"`{style.caller}({option}=...)` asks for {str(kind)[:80]!r}, which is not read here; "
        f"known: {', '.join(known)}."
    )
