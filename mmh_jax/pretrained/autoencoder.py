r"""`AutoencoderKL` of diffusers: from images to latents and back (Rombach et al. 2022, 2112.10752).

    encode   (mean, log-variance) = quant_conv(encoder(x))      of q(z | x), a Gaussian
    decode   x = decoder(post_quant_conv(z))

x is in [-1, 1], of shape (H, W, 3), z of (H / f, W / f, latent channels), f = 8 for Stable
Diffusion.  Diffusion is in scaled latents, (z - shift_factor) scaling_factor: `scale` and `unscale`
convert, and `encode` and `decode` themselves do not scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained.attention import SelfAttention
from mmh_jax.pretrained.blocks import Mid
from mmh_jax.pretrained.config import check_blocks, one_of, options, per_block
from mmh_jax.pretrained.layers import Conv, GroupNorm, activation
from mmh_jax.pretrained.resnet import Downsample, Resnet, Style, Upsample
from mmh_jax.typing import Array

__all__ = ["AutoencoderKL", "AutoencoderKLOptions", "Posterior"]

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderKLOptions:
    """The options of a `config.json`, with the defaults that hold where one is missing."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class Posterior(NamedTuple):
    """q(z | x) = N(mean, exp(log_variance)), elementwise; both (h, w, latent channels)."""

    mean: Array
    log_variance: Array


class _Block(nnx.Module):
    """Residual blocks, each perhaps with an attention behind it, and a change of resolution."""

    def __init__(
        self, style: Style, num_in: int, num_out: int, num_layers: int, attends: bool, last: Any
    ):
        self.resnets = nnx.List(
            [Resnet(style, num_in if i == 0 else num_out, num_out) for i in range(num_layers)]
        )
        layers = [SelfAttention(style, num_out, num_out) for _ in range(num_layers * attends)]
        self.attentions: Any = nnx.List(layers) if attends else None
        self.downsamplers: Any = nnx.List([last]) if isinstance(last, Downsample) else None
        self.upsamplers: Any = nnx.List([last]) if isinstance(last, Upsample) else None

    def __call__(self, h: Array) -> Array:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[i](h)
        h = h if self.downsamplers is None else self.downsamplers[0](h)
        return h if self.upsamplers is None else self.upsamplers[0](h)


def _mid(style: Style, o: AutoencoderKLOptions) -> Mid:
    width = o.block_out_channels[-1]
    return Mid(
        style, width, [SelfAttention(style, width, width) if o.mid_block_add_attention else None]
    )


class _Encoder(nnx.Module):
    def __init__(self, style: Style, o: AutoencoderKLOptions):
        widths, rngs = o.block_out_channels, style.rngs
        self.conv_in = Conv(o.in_channels, widths[0], rngs=rngs)
        found, here = [], widths[0]
        for i, (kind, width) in enumerate(zip(o.down_block_types, widths, strict=True)):
            last = Downsample(width, 0, rngs=rngs) if i < len(widths) - 1 else None
            attends = kind.startswith("Attn")
            found.append(_Block(style, here, width, o.layers_per_block, attends, last))
            here = width
        self.down_blocks = nnx.List(found)
        self.mid_block = _mid(style, o)
        self.conv_norm_out = GroupNorm(style.groups_of(here), here, eps=_EPS)
        self.conv_out = Conv(here, 2 * o.latent_channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(h))))


class _Decoder(nnx.Module):
    def __init__(self, style: Style, o: AutoencoderKLOptions):
        widths, rngs = o.block_out_channels[::-1], style.rngs
        self.conv_in = Conv(o.latent_channels, widths[0], rngs=rngs)
        self.mid_block = _mid(style, o)
        found, here = [], widths[0]
        for i, (kind, width) in enumerate(zip(o.up_block_types, widths, strict=True)):
            last = Upsample(width, rngs=rngs) if i < len(widths) - 1 else None
            attends = kind.startswith("Attn")
            found.append(_Block(style, here, width, o.layers_per_block + 1, attends, last))
            here = width
        self.up_blocks = nnx.List(found)
        self.conv_norm_out = GroupNorm(style.groups_of(here), here, eps=_EPS)
        self.conv_out = Conv(here, o.out_channels, rngs=rngs)

    def __call__(self, z: Array) -> Array:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(nnx.Module):
    """Images (H, W, 3) in [-1, 1] to latents and back; calling it decodes.

    Args:
        config: the object in a published `config.json`.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {
    ...     "block_out_channels": [4, 8], "norm_num_groups": 2,
    ...     "down_block_types": ["DownEncoderBlock2D"] * 2,
    ...     "up_block_types": ["UpDecoderBlock2D"] * 2}
    >>> def encoded(x):
    ...     return AutoencoderKL(config, rngs=nnx.Rngs(0)).encode(x)
    >>> jax.eval_shape(encoded, jnp.ones((8, 8, 3))).mean.shape
    (4, 4, 4)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        # `force_upcast` is about float16, which is not computed in here.
        o: AutoencoderKLOptions = options(
            AutoencoderKLOptions, config, ignored=("sample_size", "force_upcast")
        )
        _check(o)
        act = activation(o.act_fn, "AutoencoderKL")
        style = Style(
            "AutoencoderKL", None, o.norm_num_groups, _EPS, act, "default", attention_chunk, rngs
        )
        self.options = o
        self.encoder = _Encoder(style, o)
        self.decoder = _Decoder(style, o)
        both, one = 2 * o.latent_channels, o.latent_channels
        self.quant_conv: Any = Conv(both, both, size=1, rngs=rngs) if o.use_quant_conv else None
        self.post_quant_conv: Any = (
            Conv(one, one, size=1, rngs=rngs) if o.use_post_quant_conv else None
        )

    def encode(self, x: Array) -> Posterior:
        """q(z | x); the log-variance is between -30 and 20.

        Args:
            x: (H, W, in_channels), H and W multiples of 2 for each halving.
        """
        inside = self._checked("x", x, self.options.in_channels)
        h = self.encoder(inside)
        h = h if self.quant_conv is None else self.quant_conv(h)
        mean, log_variance = jnp.split(h.astype(jnp.result_type(h, x)), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """The image of a latent, (f h, f w, out_channels); not clipped to [-1, 1].

        Args:
            z: (h, w, latent_channels), not scaled; see `unscale`.
        """
        inside = self._checked("z", z, self.options.latent_channels)
        h = inside if self.post_quant_conv is None else self.post_quant_conv(inside)
        y = self.decoder(h)
        return y.astype(jnp.result_type(y, z))

    def __call__(self, z: Array) -> Array:
        """`decode(z)`."""
        return self.decode(z)

    def scale(self, z: Array) -> Array:
        """The latent in units of the diffusion model, (z - shift_factor) scaling_factor."""
        return (z - (self.options.shift_factor or 0.0)) * self.options.scaling_factor

    def unscale(self, z: Array) -> Array:
        """The inverse of `scale`."""
        return z / self.options.scaling_factor + (self.options.shift_factor or 0.0)

    def _checked(self, name: str, x: Array, channels: int) -> Array:
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[2] != channels:
            cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one, channels last."
            raise ValueError(
                f"`AutoencoderKL({name}=...)` has shape {x.shape}; it takes (H, W, {channels}). "
                f"{cure}"
            )
        return x.astype(self.encoder.conv_in.weight[...].dtype)


def _check(o: AutoencoderKLOptions) -> None:
    name = "AutoencoderKL"
    check_blocks(name, o.block_out_channels, o.down_block_types, o.up_block_types)
    for kind in o.down_block_types:
        one_of(name, "down_block_types", kind, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))
    for kind in o.up_block_types:
        one_of(name, "up_block_types", kind, ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))
    per_block(name, "layers_per_block", o.layers_per_block, 1, layers=True)
    if o.scaling_factor == 0:
        raise ValueError(f"`{name}(scaling_factor=0)` cannot be; see the published config.json.")
