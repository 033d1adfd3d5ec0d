r"""The options of `UNet2DConditionModel`, and what of them is not here.

Read are all options of Stable Diffusion 1, 2 and XL and of their variants; what belongs to
Kandinsky, DeepFloyd, GLIGEN and dual attention is refused by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmh_jax.pretrained.config import check_blocks, one_of

__all__ = ["IGNORED", "UNet2DConditionModelOptions", "check"]

_NAME = "UNet2DConditionModel"
_CROSS = "CrossAttnDownBlock2D"

# `upcast_attention` is about float16: the softmax is in float32 at least here.  The number of heads
# of `addition_embed_type="text"` and what is about `UNetMidBlock2DSimpleCrossAttn` belong to blocks
# that are refused.
IGNORED = (
    "sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads",
    "mid_block_only_cross_attention",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UNet2DConditionModelOptions:
    """The options of a `config.json`, with the defaults that hold where one is missing."""

    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (_CROSS, _CROSS, _CROSS, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    cross_attention_norm: str | None = None

    @property
    def context_size(self) -> int:
        """E, of the context that the cross-attentions see."""
        width = self.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    @property
    def given_size(self) -> int:
        """E, of the context that the network is given."""
        return self.context_size if self.encoder_hid_dim is None else self.encoder_hid_dim


def check(o: UNet2DConditionModelOptions) -> None:
    """Refuse what is not here, by name."""
    check_blocks(_NAME, o.block_out_channels, o.down_block_types, o.up_block_types)
    classes = (None, "timestep", "identity", "projection", "simple_projection")
    known: dict[str, tuple[Any, ...]] = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "time_embedding_type": ("positional", "fourier"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": classes,
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "attention_type": ("default",),
        "dual_cross_attention": (False,),
        "num_attention_heads": (None,),
        "cross_attention_norm": (None,),
        "downsample_padding": (0, 1),
    }
    for name, values in known.items():
        one_of(_NAME, name, getattr(o, name), values)
    if (o.encoder_hid_dim is None) and o.encoder_hid_dim_type is not None:
        raise ValueError(f"`{_NAME}(encoder_hid_dim=...)` must be given with its type.")
    needs = o.addition_embed_type == "text_time" or "projection" in (o.class_embed_type or "")
    if needs and not o.projection_class_embeddings_input_dim:
        raise ValueError(f"`{_NAME}(projection_class_embeddings_input_dim=...)` must be given.")
    if o.addition_embed_type == "text_time" and not o.addition_time_embed_dim:
        raise ValueError(f"`{_NAME}(addition_time_embed_dim=...)` must be given.")
