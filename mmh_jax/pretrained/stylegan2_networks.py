r"""The two halves of StyleGAN2's generator (Karras et al. 2020, 2006.06676): latent to w to image.

    w = (fc_n o ... o fc_1)(z / rms(z)[, e / rms(e)])      e the embedding of a class
    w_avg + truncation (w - w_avg)
    image = sum over resolutions 4, 8, ..., of what its block adds, doubled to the last

`stylegan2` has the generator and the reader, `stylegan2_blocks` the layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.edm import label_vector
from mmh_jax.pretrained.stylegan2_blocks import Common, Dense, SynthesisBlock, unit
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = [
    "MappingNetwork",
    "MappingNetworkOptions",
    "StyleGAN2GeneratorOptions",
    "SynthesisNetwork",
    "SynthesisNetworkOptions",
]


@dataclasses.dataclass(frozen=True)
class StyleGAN2GeneratorOptions:
    """The arguments of a model."""

    z_dim: int
    c_dim: int
    w_dim: int
    img_resolution: int
    img_channels: int
    mapping_kwargs: dict = dataclasses.field(default_factory=dict)
    synthesis_kwargs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MappingNetworkOptions:
    """Those in `mapping_kwargs`."""

    num_layers: int = 8
    embed_features: int | None = None
    layer_features: int | None = None
    activation: str = "lrelu"
    lr_multiplier: float = 0.01
    w_avg_beta: float | None = 0.995


@dataclasses.dataclass(frozen=True)
class SynthesisNetworkOptions:
    """Those in `synthesis_kwargs`."""

    channel_base: int = 32768
    channel_max: int = 512
    architecture: str = "skip"
    resample_filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    conv_clamp: float | None = None
    use_noise: bool = True
    activation: str = "lrelu"


HALF = ("num_fp16_res", "fp16_channels_last")  # of float16, which is not used here


class MappingNetwork(nnx.Module):
    """w = f(z[, label]).

    Args:
        o: the arguments of the model.
        rngs: the source of the initial weights.
    """

    def __init__(self, o: StyleGAN2GeneratorOptions, *, rngs: nnx.Rngs):
        own: MappingNetworkOptions = options(MappingNetworkOptions, o.mapping_kwargs)
        one_of("MappingNetwork", "activation", own.activation, ("lrelu",))
        inner = o.w_dim if own.layer_features is None else own.layer_features
        embedded = o.w_dim if own.embed_features is None else own.embed_features
        if not 1 <= own.num_layers <= 64 or min(inner, embedded) < 1 or own.lr_multiplier <= 0:
            raise ValueError(
                f"`MappingNetwork(num_layers={own.num_layers}, layer_features={inner}, "
                f"embed_features={embedded}, lr_multiplier={own.lr_multiplier})` must be positive, "
                "and at most 64 layers."
            )
        self.z_dim, self.c_dim, self.num_layers = o.z_dim, o.c_dim, own.num_layers
        self.embed = Dense(o.c_dim, embedded, rngs=rngs) if o.c_dim else None
        widths = [o.z_dim + embedded * (o.c_dim > 0)]
        widths += [inner] * (own.num_layers - 1) + [o.w_dim]
        for index in range(own.num_layers):
            sizes = widths[index], widths[index + 1]
            layer = Dense(*sizes, rate=own.lr_multiplier, activate=True, rngs=rngs)
            setattr(self, f"fc{index}", layer)
        has_average = own.w_avg_beta is not None
        self.w_avg = nnx.Param(jnp.zeros(o.w_dim)) if has_average else None

    def __call__(
        self, z: ArrayLike, label: ArrayLike | None = None, *, truncation: ArrayLike = 1.0
    ) -> Array:
        """w, for one latent.

        Args:
            z: (z_dim,), of N(0, I).
            label: one class or a vector of c_dim, where the model has classes.
            truncation: psi: 1 leaves w as it is, smaller pulls it towards the mean of all w: images
                less varied, and better.

        Returns:
            (w_dim,).

        Raises:
            ValueError: if a shape or the label is wrong, or the model has no mean to truncate to.
        """
        dtype = getattr(self, "fc0").weight[...].dtype  # noqa: B009
        z = _checked("MappingNetwork", "z", z, ((self.z_dim,),))
        if self.c_dim and label is None:
            raise ValueError("`MappingNetwork(label=None)`: the model has classes. Pass its label.")
        vector = label_vector("MappingNetwork", label, self.c_dim)
        h = unit(z.astype(dtype))
        if self.embed is not None:
            h = jnp.concatenate([h, unit(self.embed(vector.astype(dtype)))])
        for index in range(self.num_layers):
            h = getattr(self, f"fc{index}")(h)
        if self.w_avg is not None:
            mean = self.w_avg[...]
            return mean + jnp.asarray(truncation, h.dtype) * (h - mean)
        if is_traced(truncation) or np.any(np.asarray(truncation) != 1):
            raise ValueError(
                f"`MappingNetwork(truncation={truncation})`: w_avg_beta is null, and the model has "
                "no mean of w. Leave it out."
            )
        return h


class SynthesisNetwork(nnx.Module):
    """An image of w.

    Args:
        o: the arguments of the model.
        noise_mode: "const" or "none".
        rngs: the source of the initial weights.
    """

    def __init__(self, o: StyleGAN2GeneratorOptions, *, noise_mode: str = "const", rngs: nnx.Rngs):
        own: SynthesisNetworkOptions = options(
            SynthesisNetworkOptions, o.synthesis_kwargs, ignored=HALF
        )
        _check(o, own, noise_mode)
        self.w_dim, self.taps = o.w_dim, own.resample_filter
        self.sizes = tuple(2**k for k in range(2, o.img_resolution.bit_length()))
        self.num_ws = 2 * len(self.sizes)
        adds = noise_mode == "const"
        rest = self.taps, own.conv_clamp, own.use_noise, adds, rngs
        common, below = Common(o.w_dim, o.img_channels, *rest), 0
        for size in self.sizes:
            width = min(own.channel_base // size, own.channel_max)
            setattr(self, f"b{size}", SynthesisBlock(common, below, width, size))
            below = width

    def __call__(self, w: ArrayLike) -> Array:
        """The image, (img_resolution, img_resolution, img_channels), in -1 to 1 as published.

        Args:
            w: (w_dim,), or one for each layer: (num_ws, w_dim), num_ws = 2 log2(resolution) - 2.

        Raises:
            ValueError: if the shape is wrong.
        """
        shape = (self.num_ws, self.w_dim)
        w = _checked("SynthesisNetwork", "w", w, (shape[1:], shape))
        dtype = getattr(self, "b4").const[...].dtype  # noqa: B009
        ws = jnp.broadcast_to(w.astype(dtype), shape)
        x, image, place = None, None, 0
        for size in self.sizes:
            block = getattr(self, f"b{size}")
            # The w of the image is that of the next block's first layer, too.
            x, image = block(x, image, ws[place : place + block.num_layers + 1])
            place += block.num_layers
        return jnp.asarray(image).astype(jnp.result_type(dtype, w))


def _check(o: StyleGAN2GeneratorOptions, own: SynthesisNetworkOptions, noise_mode: str) -> None:
    caller, size, taps = "SynthesisNetwork", o.img_resolution, own.resample_filter
    if noise_mode == "random":
        raise ValueError(
            "`StyleGAN2Generator(noise_mode='random')` is not offered: an image would be no "
            "function of its latent, and have no Jacobian. Take 'const' or 'none'."
        )
    one_of("StyleGAN2Generator", "noise_mode", noise_mode, ("const", "none"))
    one_of(caller, "architecture", own.architecture, ("skip",))
    one_of(caller, "activation", own.activation, ("lrelu",))
    if size < 4 or size & (size - 1):
        raise ValueError(
            f"`StyleGAN2Generator(img_resolution={size})` must be a power of 2, at least 4."
        )
    if own.channel_base < size or own.channel_max < 1:
        raise ValueError(
            f"`{caller}(channel_base={own.channel_base}, channel_max={own.channel_max})` leaves no "
            f"channels at a resolution of {size}."
        )
    # From 8 taps on the published code stores the taps, and not their outer product.
    if len(taps) % 2 or len(taps) > 6 or sum(taps) == 0:
        raise ValueError(
            f"`{caller}(resample_filter={taps})` must have 2, 4 or 6 taps that do not sum to 0."
        )
    if own.conv_clamp is not None and own.conv_clamp < 0:
        raise ValueError(f"`{caller}(conv_clamp={own.conv_clamp})` must not be negative.")


def _checked(caller: str, name: str, value: ArrayLike, shapes: tuple[Any, ...]) -> Array:
    value = jnp.asarray(value)
    if value.shape not in shapes:
        cure = "Did you mean `jax.vmap`?" if value.shape[1:] in shapes else "Pass one such vector."
        listed = " or ".join(map(str, shapes))
        raise ValueError(
            f"`{caller}({name}=...)` has shape {value.shape}; it takes {listed}. {cure}"
        )
    return value
