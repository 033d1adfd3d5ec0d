r"""The networks of Karras et al. (2022, 2206.00364), code NVlabs/edm: `SongUNet`, `DhariwalUNet`.

`SongUNet` is DDPM++ and NCSN++ (Song et al. 2021), `DhariwalUNet` is ADM (Dhariwal & Nichol 2021).
Both are U-Nets of `edm_blocks.Block`s: on the way down one block halves and `num_blocks` follow at
each level; on the way up `num_blocks + 1` at each level take what was kept on the way down.  Beside
them NCSN++ has a second path, of the image itself,

    encoder_type "residual"   x <- (x + conv(aux)) / sqrt 2, aux = x           at each lower level
    encoder_type "skip"       x <- x + conv(aux),  aux halved
    decoder_type "skip"       answer <- conv(silu(norm(x))) + answer doubled   at each level

The names of the layers hold their resolution, `enc.32x32_block0`.  A class is one label or a vector
of `label_dim`; without one the vector is zero.  `augment_dim` is of the training: a network is
asked as for images that are not augmented.  `edm_models` makes denoisers of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.edm_blocks import Block, FusedDown, Group, Resample, Resampled, Style
from mmh_jax.pretrained.embeddings import timestep_embedding
from mmh_jax.pretrained.layers import Conv, Linear, initial, wide
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = ["DhariwalUNet", "DhariwalUNetOptions", "SongUNet", "SongUNetOptions", "label_vector"]

_ROOT_HALF = float(np.sqrt(0.5))
IGNORED = ("dropout", "label_dropout")  # of the training


@dataclasses.dataclass(frozen=True)
class DhariwalUNetOptions:
    """The options of the network."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] | None = (32, 16, 8)


@dataclasses.dataclass(frozen=True)
class SongUNetOptions(DhariwalUNetOptions):
    """The options of the network."""

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] | None = (16,)
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1.0, 1.0)


class _Frequencies(nnx.Module):
    """The random frequencies of NCSN++, never trained."""

    def __init__(self, num: int, *, rngs: nnx.Rngs):
        def draw(key: Any, shape: tuple[int, ...]) -> Array:
            return 16.0 * jax.random.normal(key, shape)

        self.freqs = initial(draw, rngs, (num,))


class _UNet(nnx.Module):
    """What both networks have in common: the order of the blocks."""

    options: Any
    enc: nnx.Dict
    dec: nnx.Dict

    def _build(self, o: DhariwalUNetOptions, style: Style) -> None:
        enc: dict[str, Any] = {}
        rngs, attended = style.rngs, o.attn_resolutions or ()
        here = o.model_channels * (1 if isinstance(o, SongUNetOptions) else o.channel_mult[0])
        kept, aux = [here], o.in_channels
        for level, factor in enumerate(o.channel_mult):
            size = o.img_resolution >> level
            name = f"{size}x{size}"
            if level == 0:
                enc[f"{name}_conv"] = Conv(o.in_channels, here, rngs=rngs)
            else:
                enc[f"{name}_down"] = Block(style, here, here, way="down")
                enc |= self._aux_down(o, style, name, aux, here)
                kept.append(here)
                aux = here if getattr(o, "encoder_type", "") == "residual" else aux
            for index in range(o.num_blocks):
                wide_ = o.model_channels * factor
                enc[f"{name}_block{index}"] = Block(style, here, wide_, attention=size in attended)
                here = wide_
                kept.append(here)
        self.enc, self.order = nnx.Dict(enc), tuple(enc)
        dec = self._decoder(o, style, here, kept)
        self.dec, self.dec_order = nnx.Dict(dec), tuple(dec)

    def _decoder(
        self, o: DhariwalUNetOptions, style: Style, here: int, kept: list[int]
    ) -> dict[str, Any]:
        dec: dict[str, Any] = {}
        attended = o.attn_resolutions or ()
        for level, factor in reversed(list(enumerate(o.channel_mult))):
            size = o.img_resolution >> level
            name = f"{size}x{size}"
            if level == len(o.channel_mult) - 1:
                dec[f"{name}_in0"] = Block(style, here, here, attention=True)
                dec[f"{name}_in1"] = Block(style, here, here)
            else:
                dec[f"{name}_up"] = Block(style, here, here, way="up")
            for index in range(o.num_blocks + 1):
                last = index == o.num_blocks or not isinstance(o, SongUNetOptions)
                wide_ = o.model_channels * factor
                dec[f"{name}_block{index}"] = Block(
                    style, here + kept.pop(), wide_, attention=last and size in attended
                )
                here = wide_
            dec |= self._aux_up(o, style, name, level, here)
        return dec

    def _aux_down(self, o: Any, style: Style, name: str, aux: int, here: int) -> dict[str, Any]:
        return {}

    def _aux_up(self, o: Any, style: Style, name: str, level: int, here: int) -> dict[str, Any]:
        return {}

    def _down(self, x: Array, embedding: Array) -> list[Array]:
        """What is kept on the way down, the last of it the middle."""
        kept: list[Array] = []
        aux = x
        for name in self.order:
            layer = self.enc[name]
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = kept[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = kept[-1] = aux = (x + layer(aux)) * _ROOT_HALF
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
                kept.append(x)
        return kept


class SongUNet(_UNet):
    """F(x, c_noise[, label]) for one image x (H, W, C): DDPM++ and NCSN++.

    Args:
        config: its options; `dropout` and `label_dropout` may be there.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8}
    >>> config |= {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    >>> def answer(x):
    ...     return SongUNet(config, rngs=nnx.Rngs(0))(x, 0.3)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 3))).shape
    (8, 8, 3)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: SongUNetOptions = options(SongUNetOptions, _prepared(config), ignored=IGNORED)
        one_of("SongUNet", "embedding_type", o.embedding_type, ("positional", "fourier"))
        one_of("SongUNet", "encoder_type", o.encoder_type, ("standard", "skip", "residual"))
        one_of("SongUNet", "decoder_type", o.decoder_type, ("standard", "skip"))
        _check("SongUNet", o)
        taps = o.resample_filter
        if len(taps) % 2 or sum(taps) == 0:
            raise ValueError(
                f"`SongUNet(resample_filter={taps})` must have an even number of taps that do not "
                "sum to 0."
            )
        noise, size = o.model_channels * o.channel_mult_noise, o.model_channels * o.channel_mult_emb
        self.options = o
        fourier = o.embedding_type == "fourier"
        self.map_noise = _Frequencies(noise // 2, rngs=rngs) if fourier else None
        self.map_label = Linear(o.label_dim, noise, rngs=rngs) if o.label_dim else None
        self.map_augment = (
            Linear(o.augment_dim, noise, bias=False, rngs=rngs) if o.augment_dim else None
        )
        self.map_layer0 = Linear(noise, size, rngs=rngs)
        self.map_layer1 = Linear(size, size, rngs=rngs)
        style = Style(size, taps, _ROOT_HALF, 1e-6, False, None, True, attention_chunk, rngs)
        self._build(o, style)

    def _aux_down(self, o: Any, style: Style, name: str, aux: int, here: int) -> dict[str, Any]:
        if o.encoder_type == "residual":
            layer = FusedDown(aux, here, style.taps, rngs=style.rngs)
            return {f"{name}_aux_residual": layer}
        if o.encoder_type == "skip":
            return {
                f"{name}_aux_down": Resample("down", style.taps),
                f"{name}_aux_skip": Conv(aux, here, size=1, rngs=style.rngs),
            }
        return {}

    def _aux_up(self, o: Any, style: Style, name: str, level: int, here: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if o.decoder_type == "skip" and level < len(o.channel_mult) - 1:
            found[f"{name}_aux_up"] = Resample("up", style.taps)
        if o.decoder_type == "skip" or level == 0:
            found[f"{name}_aux_norm"] = Group(here, eps=1e-6)
            found[f"{name}_aux_conv"] = Resampled(here, o.out_channels, 3, rngs=style.rngs)
        return found

    def _embedding(self, c_noise: Array, label: ArrayLike | None) -> Array:
        o = self.options
        if self.map_noise is None:
            size = o.model_channels * o.channel_mult_noise
            found = timestep_embedding(c_noise, size, freq_shift=1.0)
        else:
            frequencies = jax.lax.stop_gradient(wide(self.map_noise.freqs[...]))
            angles = 2 * jnp.pi * frequencies * jnp.asarray(c_noise, jnp.float32)
            found = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
        found = found.astype(self.map_layer0.weight[...].dtype)
        vector = label_vector("SongUNet", label, o.label_dim)
        if self.map_label is not None:
            found = found + self.map_label(vector * np.sqrt(o.label_dim))
        return jax.nn.silu(self.map_layer1(jax.nn.silu(self.map_layer0(found))))

    def __call__(self, x: Array, c_noise: ArrayLike, label: ArrayLike | None = None) -> Array:
        """F, for one image.

        Args:
            x: (H, W, in_channels).
            c_noise: a scalar, what stands for the noise level.
            label: one class, a vector of `label_dim`, or None.

        Returns:
            (H, W, out_channels).
        """
        x = _checked_image("SongUNet", x, self.options)
        embedding = self._embedding(jnp.asarray(c_noise), label)
        kept = self._down(x.astype(self.map_layer0.weight[...].dtype), embedding)
        h, answer, pending = kept[-1], None, None
        for name in self.dec_order:
            layer = self.dec[name]
            if name.endswith("aux_up"):
                answer = layer(answer)
            elif name.endswith("aux_norm"):
                pending = jax.nn.silu(layer(h))
            elif name.endswith("aux_conv"):
                pending = layer(pending)
                answer = pending if answer is None else pending + answer
            else:
                h = jnp.concatenate([h, kept.pop()], -1) if h.shape[2] != layer.num_in else h
                h = layer(h, embedding)
        return jnp.asarray(answer).astype(jnp.result_type(h, x))


class DhariwalUNet(_UNet):
    """F(x, c_noise[, label]) for one image x (H, W, C): ADM.

    Args:
        config, attention_chunk, rngs: as for `SongUNet`.

    Raises:
        TypeError, ValueError: if an option is unknown, not of its type, or names what is not here.

    >>> config = {"img_resolution": 8, "in_channels": 3, "out_channels": 6, "model_channels": 8}
    >>> config |= {"channel_mult": [1, 2], "num_blocks": 1, "label_dim": 10}
    >>> def answer(x, label):
    ...     return DhariwalUNet(config, rngs=nnx.Rngs(0))(x, 0.3, label)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 3)), np.int32(3)).shape
    (8, 8, 6)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: DhariwalUNetOptions = options(DhariwalUNetOptions, _prepared(config), ignored=IGNORED)
        _check("DhariwalUNet", o)
        width, size = o.model_channels, o.model_channels * o.channel_mult_emb
        self.options = o
        self.map_augment = (
            Linear(o.augment_dim, width, bias=False, rngs=rngs) if o.augment_dim else None
        )
        self.map_layer0 = Linear(width, size, rngs=rngs)
        self.map_layer1 = Linear(size, size, rngs=rngs)
        self.map_label = Linear(o.label_dim, size, bias=False, rngs=rngs) if o.label_dim else None
        self._build(o, Style(size, (1.0, 1.0), 1.0, 1e-5, True, 64, False, attention_chunk, rngs))
        last = o.model_channels * o.channel_mult[0]
        self.out_norm = Group(last)
        self.out_conv = Conv(last, o.out_channels, rngs=rngs)

    def __call__(self, x: Array, c_noise: ArrayLike, label: ArrayLike | None = None) -> Array:
        """F, for one image; arguments as for `SongUNet`."""
        o = self.options
        x = _checked_image("DhariwalUNet", x, o)
        dtype = self.map_layer0.weight[...].dtype
        sines = timestep_embedding(
            jnp.asarray(c_noise), o.model_channels, flip_sin_to_cos=True, freq_shift=0.0
        )
        embedding = self.map_layer1(jax.nn.silu(self.map_layer0(sines.astype(dtype))))
        vector = label_vector("DhariwalUNet", label, o.label_dim)
        if self.map_label is not None:
            embedding = embedding + self.map_label(vector)
        embedding = jax.nn.silu(embedding)
        kept = self._down(x.astype(dtype), embedding)
        h = kept[-1]
        for name in self.dec_order:
            layer = self.dec[name]
            h = jnp.concatenate([h, kept.pop()], -1) if h.shape[2] != layer.num_in else h
            h = layer(h, embedding)
        answer = self.out_conv(jax.nn.silu(self.out_norm(h)))
        return answer.astype(jnp.result_type(answer, x))


def _prepared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with null for an empty list of resolutions."""
    nowhere = "attn_resolutions" in config and not config["attn_resolutions"]
    return {**config, "attn_resolutions": None} if nowhere else config


def label_vector(caller: str, label: ArrayLike | None, num: int) -> Array:
    """One label as a vector; zeros for none.

    Args:
        caller: to name in an error.
        label: one class, a vector of `num`, or None.
        num: of classes, 0 for a network without.

    Raises:
        ValueError: if it is neither, no class, or there are none; NaN if it is traced.

    >>> label_vector("SongUNet", 1, 3)
    Array([0., 1., 0.], dtype=float32)
    """
    if label is None:
        return jnp.zeros(num)
    if num == 0:
        raise ValueError(
            f"`{caller}(label=...)` was given to a network without classes; leave it out."
        )
    found = jnp.asarray(label)
    if found.shape == (num,):
        return found
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"`{caller}(label=...)` has shape {found.shape} and dtype {found.dtype}; it takes one "
            f"class, 0 to {num - 1}, or a vector of {num}. For several, `jax.vmap`."
        )
    if not is_traced(label) and not 0 <= int(np.asarray(label)) < num:
        raise ValueError(f"`{caller}(label={label})` is no class; there are 0 to {num - 1}.")
    # One that is traced gives NaN outside the range, never another class.
    return jnp.where((found < 0) | (found >= num), jnp.nan, jax.nn.one_hot(found, num))


def _checked_image(caller: str, x: Array, o: DhariwalUNetOptions) -> Array:
    x = jnp.asarray(x)
    shape = (o.img_resolution, o.img_resolution, o.in_channels)
    if x.shape != shape:
        cure = "Did you mean `jax.vmap`?" if x.shape[1:] == shape else "Pass one such image."
        raise ValueError(f"`{caller}(x=...)` has shape {x.shape}; it takes {shape}. {cure}")
    return x


def _check(caller: str, o: DhariwalUNetOptions) -> None:
    levels = len(o.channel_mult)
    if o.img_resolution < 1 or o.img_resolution % 2 ** (levels - 1):
        raise ValueError(
            f"`{caller}(img_resolution={o.img_resolution})` cannot be halved {levels - 1} times, "
            f"as channel_mult={o.channel_mult} asks."
        )
    if not 1 <= o.num_blocks <= 64 or min(o.channel_mult) < 1 or o.model_channels < 4:
        raise ValueError(
            f"`{caller}(num_blocks={o.num_blocks}, channel_mult={o.channel_mult}, "
            f"model_channels={o.model_channels})` must be at least 1, 1 and 4."
        )
