r"""The U-Net of improved DDPM (Nichol & Dhariwal 2021, 2102.09672), code openai/improved-diffusion.

The published files are state dicts without a configuration: `config.json` holds the flags with
which they are sampled, by the names of that code (`image_size`, `num_channels`, `num_res_blocks`,
`noise_schedule`, ...); `docs/pretrained.md` has the recipe.

    betas     "linear", from .1 / T to 20 / T;  "cosine", as `squaredcos_cap_v2` of diffusers
    told      1000 t / T with `rescale_timesteps`, t without;  t = 0 ... T - 1
    output    eps (or x0 with `predict_xstart`); with `learn_sigma` a variance after it, not used
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn
from mmh_jax.data.files import PathLike
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.embeddings import timestep_embedding
from mmh_jax.pretrained.files import read_json
from mmh_jax.pretrained.layers import (
    Conv,
    Embedding,
    GroupNorm,
    Linear,
    Nothing,
    attend,
    initial,
)  # fmt: skip
from mmh_jax.pretrained.schedules import Process, process_of
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = ["IDDPMOptions", "IDDPMUNet", "iddpm_denoiser", "load_iddpm"]

_MULTIPLIERS = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
_NUM_CLASSES = 1000
# Of training, or of numerics: these change nothing of the answer.
_IGNORED = (
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "sigma_small",
    "use_kl",
    "rescale_learned_sigmas",
)
_IGNORED += ("timestep_respacing", "clip_denoised")


@dataclasses.dataclass(frozen=True)
class IDDPMOptions:
    """The flags of a model; `channel_mult` is that of the code for 32, 64 and 256 if not given."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int | None = None
    attention_resolutions: str = "16,8"
    channel_mult: tuple[int, ...] | None = None
    learn_sigma: bool = False
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool = True
    predict_xstart: bool = False


class _Conv1d(nnx.Module):
    """A linear layer over pixels, published as a convolution of length 1."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs):
        def draw(key: Any, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / np.sqrt(num_in)

        self.weight = initial(draw, rngs, (num_out, num_in, 1))
        self.bias = nnx.Param(jnp.zeros(num_out))

    def __call__(self, h: Array) -> Array:
        return h @ self.weight[...][..., 0].T + self.bias[...]


class _Res(nnx.Module):
    def __init__(self, num_in: int, num_out: int, size: int, modulates: bool, *, rngs: nnx.Rngs):
        self.modulates = modulates
        first = [GroupNorm(32, num_in), Nothing(), Conv(num_in, num_out, rngs=rngs)]
        self.in_layers = nnx.List(first)
        width = num_out * (1 + modulates)
        self.emb_layers = nnx.List([Nothing(), Linear(size, width, rngs=rngs)])
        last = [GroupNorm(32, num_out), Nothing(), Nothing(), Conv(num_out, num_out, rngs=rngs)]
        self.out_layers = nnx.List(last)
        same = num_in == num_out
        self.skip_connection: Any = None if same else Conv(num_in, num_out, size=1, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        h = self.in_layers[2](jax.nn.silu(self.in_layers[0](x)))
        found = self.emb_layers[1](jax.nn.silu(embedding))
        if self.modulates:
            scale, shift = jnp.split(found, 2)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + found)
        h = self.out_layers[3](jax.nn.silu(h))
        return h + (x if self.skip_connection is None else self.skip_connection(x))


class _Attention(nnx.Module):
    def __init__(self, width: int, num_heads: int, chunk: int | None, *, rngs: nnx.Rngs):
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`IDDPMUNet(num_heads={num_heads})` must divide {width} channels.")
        self.num_heads, self.chunk = num_heads, chunk
        self.norm = GroupNorm(32, width)
        self.qkv = _Conv1d(width, 3 * width, rngs=rngs)
        self.proj_out = _Conv1d(width, width, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        h = self.norm(x).reshape(-1, x.shape[2])
        parts = self.qkv(h).reshape(h.shape[0], self.num_heads, 3, -1)
        q, k, v = (parts[:, :, index] for index in range(3))
        found = attend(q, k, v, chunk=self.chunk).reshape(h.shape)
        return x + self.proj_out(found).reshape(x.shape)


class _Down(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.op = Conv(width, width, stride=2, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        return self.op(x)


class _Up(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 0), 2, 1))


class IDDPMUNet(nnx.Module):
    """F(x, t[, label]) for one image x (H, W, 3).

    Args:
        config: the flags of the model.
        attention_chunk: queries of attention at a time, which bounds the memory; None for all.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if a flag is unknown, not of its type, or does not fit.

    >>> config = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
    >>> def answer(x):
    ...     more = {"learn_sigma": True, "attention_resolutions": "4"}
    ...     return IDDPMUNet(config | more, rngs=nnx.Rngs(0))(x, 10.0)
    >>> jax.eval_shape(answer, jnp.ones((8, 8, 3))).shape
    (8, 8, 6)
    """

    def __init__(
        self, config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
    ):
        o: IDDPMOptions = options(IDDPMOptions, config, ignored=_IGNORED)
        factors, attended = _checked(o)
        self.options = o
        width, size = o.num_channels, 4 * o.num_channels

        def block(num_in: int, num_out: int, rate: int, heads: int) -> list[Any]:
            found: list[Any] = [_Res(num_in, num_out, size, o.use_scale_shift_norm, rngs=rngs)]
            if rate in attended:
                found.append(_Attention(num_out, heads, attention_chunk, rngs=rngs))
            return found

        self.time_embed = nnx.List(
            [Linear(width, size, rngs=rngs), Nothing(), Linear(size, size, rngs=rngs)]
        )
        self.label_emb = Embedding(_NUM_CLASSES, size, rngs=rngs) if o.class_cond else None
        blocks: list[Any] = [nnx.List([Conv(3, width, rngs=rngs)])]
        kept, here, rate = [width], width, 1
        for level, factor in enumerate(factors):
            for _ in range(o.num_res_blocks):
                blocks.append(nnx.List(block(here, factor * width, rate, o.num_heads)))
                here = factor * width
                kept.append(here)
            if level < len(factors) - 1:
                blocks.append(nnx.List([_Down(here, rngs=rngs)]))
                kept.append(here)
                rate *= 2
        self.input_blocks = nnx.List(blocks)
        middle = _Attention(here, o.num_heads, attention_chunk, rngs=rngs)
        res = [_Res(here, here, size, o.use_scale_shift_norm, rngs=rngs) for _ in range(2)]
        self.middle_block = nnx.List([res[0], middle, res[1]])
        blocks, heads = [], o.num_heads_upsample or o.num_heads
        for level, factor in reversed(list(enumerate(factors))):
            for index in range(o.num_res_blocks + 1):
                found = block(here + kept.pop(), factor * width, rate, heads)
                here = factor * width
                if level and index == o.num_res_blocks:
                    found.append(_Up(here, rngs=rngs))
                    rate //= 2
                blocks.append(nnx.List(found))
        self.output_blocks = nnx.List(blocks)
        last = Conv(width, 6 if o.learn_sigma else 3, rngs=rngs)
        self.out = nnx.List([GroupNorm(32, here), Nothing(), last])

    def __call__(self, x: Array, t: ArrayLike, label: ArrayLike | None = None) -> Array:
        """F, for one image.

        Args:
            x: (H, W, 3) of `image_size`.
            t: a scalar, what the network is told.
            label: one of 1,000 classes, where the model has classes.

        Returns:
            (H, W, 3), or (H, W, 6) with `learn_sigma`.
        """
        x, shape = jnp.asarray(x), (self.options.image_size,) * 2 + (3,)
        if x.shape != shape:
            cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one such image."
            raise ValueError(f"`IDDPMUNet(x=...)` has shape {x.shape}; it takes {shape}. {cure}")
        first: Any = self.input_blocks[0][0]
        dtype = first.weight[...].dtype
        sines = timestep_embedding(
            jnp.asarray(t), self.options.num_channels, flip_sin_to_cos=True, freq_shift=0.0
        )
        embedding = self.time_embed[2](jax.nn.silu(self.time_embed[0](sines.astype(dtype))))
        embedding = embedding + self._of_label(label, dtype)
        h = first(x.astype(dtype))
        kept = [h]
        for block in list(self.input_blocks)[1:]:
            for layer in block:
                h = layer(h, embedding)
            kept.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for block in self.output_blocks:
            h = jnp.concatenate([h, kept.pop()], -1)
            for layer in block:
                h = layer(h, embedding)
        answer = self.out[2](jax.nn.silu(self.out[0](h)))
        return answer.astype(jnp.result_type(answer, x))

    def _of_label(self, label: ArrayLike | None, dtype: Any) -> Array:
        if (self.label_emb is None) != (label is None):
            cure = "Leave the label out." if self.label_emb is None else "Pass its label."
            raise ValueError(f"`IDDPMUNet(label={label})`: class_cond says otherwise. {cure}")
        if label is None or self.label_emb is None:
            return jnp.zeros((), dtype)
        if not is_traced(label) and not 0 <= int(np.asarray(label)) < _NUM_CLASSES:
            raise ValueError(f"`IDDPMUNet(label={label})` is no class; there are 0 to 999.")
        index = jnp.asarray(label)
        return self.label_emb(jnp.where(index < 0, _NUM_CLASSES, index))


def _checked(o: IDDPMOptions) -> tuple[tuple[int, ...], set[int]]:
    """The multipliers of the levels, and by how much the images with attention are smaller."""
    one_of("load_iddpm", "noise_schedule", o.noise_schedule, ("linear", "cosine"))
    factors = o.channel_mult or _MULTIPLIERS.get(o.image_size)
    if factors is None:
        raise ValueError(
            f"`IDDPMUNet(image_size={o.image_size})`: the code knows 32, 64 and 256; give "
            "channel_mult for another."
        )
    if o.image_size % 2 ** (len(factors) - 1) or not 1 <= o.num_res_blocks <= 64:
        raise ValueError(
            f"`IDDPMUNet(image_size={o.image_size}, num_res_blocks={o.num_res_blocks})`: the "
            f"image cannot be halved {len(factors) - 1} times, or there are no blocks."
        )
    sizes = [part.strip() for part in o.attention_resolutions.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) <= o.image_size for part in sizes):
        raise ValueError(
            f"`IDDPMUNet(attention_resolutions={o.attention_resolutions[:80]!r})` must be sizes, "
            "such as '16,8'."
        )
    return factors, {o.image_size // int(part) for part in sizes}


@dataclasses.dataclass(frozen=True)
class _First:
    """The first three channels of a network's answer."""

    apply: Callable[..., Array]

    def __call__(self, params: Any, x: Array, t: Array, *cond: Any) -> Array:
        return self.apply(params, x, t, *cond)[..., :3]


def _process(o: IDDPMOptions) -> Process:
    total = o.diffusion_steps
    config: dict[str, Any] = {"_class_name": "DDPMScheduler", "num_train_timesteps": total}
    config["prediction_type"] = "sample" if o.predict_xstart else "epsilon"
    if o.noise_schedule == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    else:
        config |= {"beta_start": 0.1 / max(total, 1), "beta_end": 20 / max(total, 1)}
    process = process_of(config, caller="load_iddpm", path="config.json")
    scale = 1000 / total if o.rescale_timesteps else 1.0
    return dataclasses.replace(process, time_scale=scale, learned_variance=o.learn_sigma)


def iddpm_denoiser(network: IDDPMUNet) -> NetworkDenoiser:
    """The network as a denoiser of images (H, W, 3) in -1 to 1; `.condition(label)` for a class."""
    o, (apply, params) = network.options, nn.split(network)
    first = _First(apply) if o.learn_sigma else apply
    return _process(o).denoiser(first, params, shape=(o.image_size, o.image_size, 3))


def load_iddpm(
    folder: PathLike,
    *,
    dtype: str = "float32",
    attention_chunk: int | None = 1024,
    place: Callable[[str, np.ndarray], Array] | None = None,
) -> NetworkDenoiser:
    """Read an exported model into a denoiser of images (H, W, 3) in -1 to 1.

    Args:
        folder: with `config.json`, the flags, and `model.safetensors`.
        dtype: of parameters and computation, "float32" or "bfloat16".
        attention_chunk: as for `IDDPMUNet`.
        place: as in `restore`.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError, ValueError: if a file is wrong, asks for what is not here, or the two do not fit.
    """
    config = read_json(Path(folder) / "config.json", caller="load_iddpm")
    return iddpm_denoiser(
        restore(
            lambda: IDDPMUNet(config, attention_chunk=attention_chunk, rngs=nnx.Rngs(0)),
            open_weights(folder, caller="load_iddpm", stem="model"),
            caller="load_iddpm",
            path=folder,
            dtype=dtype,
            place=place,
        )
    )
