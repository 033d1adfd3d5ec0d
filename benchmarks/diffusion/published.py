"""The networks of Stable Diffusion: of a published folder, or with random weights.

What a network costs does not depend on its weights.  Random ones are slices of one random vector,
divided by the root of what comes in, so that values neither vanish nor overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn, pretrained
from mmh_jax.pretrained import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
NUM_TOKENS = 77

SD1 = {
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280], "norm_num_groups": 32,
    "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "up_block_types": [UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS],
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": SD1,
    "Stable Diffusion 2": SD1 | {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "Stable Diffusion XL": SD1 | {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "use_linear_projection": True,
        "down_block_types": [PLAIN, CROSS, CROSS], "up_block_types": [UP_CROSS, UP_CROSS, UP_PLAIN],
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# As Stable Diffusion 1, with a twentieth of the channels and half of the layers.
TINY = SD1 | {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": [16, 32, 64, 64],
    "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 2,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}  # fmt: skip
TINY_VAE = VAE | {
    "layers_per_block": 1,
    "block_out_channels": [16, 32, 64, 64],
    "norm_num_groups": 8,
    "sample_size": 64,
}
TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "projection_dim": 768,
}  # fmt: skip
TINY_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
    "projection_dim": 32,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


class Drawn(Mapping[str, np.ndarray]):
    """Random tensors of a layout, each made when it is asked for."""

    def __init__(self, layout: Mapping[str, tuple[int, ...]]):
        self.layout = dict(layout)
        most = max(map(math.prod, self.layout.values()))
        self.pool = np.random.default_rng(0).standard_normal(most, np.float32)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.layout[name]
        drawn = self.pool[: math.prod(shape)].reshape(shape)
        if len(shape) == 1:
            return 1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn
        return drawn / np.float32(math.sqrt(math.prod(shape[1:])))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def network(build: Callable[[], Any], dtype: str = "float32") -> Any:
    """The network with random weights."""
    layout = pretrained.layout(pretrained.abstract(build))
    return pretrained.restore(build, Drawn(layout), caller="restore", dtype=dtype)


def unet(config: Mapping[str, Any], **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(config, rngs=nnx.Rngs(0), **options)


def condition(config: Mapping[str, Any], shaped: Callable[[tuple[int, ...]], Any]) -> Any:
    """What the network takes beside x and t, its arrays made by `shaped`."""
    context = shaped((NUM_TOKENS, config["cross_attention_dim"]))
    if "addition_embed_type" not in config:
        return context
    num_pooled = config["projection_class_embeddings_input_dim"]
    num_pooled -= 6 * config["addition_time_embed_dim"]
    return pretrained.Condition(context, shaped((num_pooled,)), shaped((6,)))


class Parts(NamedTuple):
    """A pipeline and one condition.

    Attributes:
        conditional, unconditional: denoisers of latents.
        vae, text: autoencoder and text encoder, split into a function and its parameters.
        process: of the training.
        shape: of a latent.
        what: in the title of a table.
    """

    conditional: Any
    unconditional: Any
    vae: tuple[nn.Apply, Any]
    text: tuple[nn.Apply, Any]
    process: pretrained.Process
    shape: tuple[int, ...]
    what: str


def of_folder(folder: Path, dtype: str) -> Parts:
    """A published pipeline, asked for one picture."""
    sd = pretrained.load(folder, dtype=dtype)
    if not isinstance(sd, pretrained.StableDiffusion):
        raise SystemExit(f"{folder} is no Stable Diffusion.")
    found = sd.denoiser("a photograph of an astronaut riding a horse"), sd.denoiser()
    text = sd.texts[0]
    return Parts(*found, sd.vae, (text.apply, text.params), sd.process, sd.shape, folder.name)


def at_random(is_tiny: bool, dtype: str) -> Parts:
    """Stable Diffusion 1 with random weights, of full size or tiny."""
    config, vae, text = (TINY, TINY_VAE, TINY_TEXT) if is_tiny else (SD1, VAE, TEXT)
    process = pretrained.process_of(SCHEDULER)
    apply, params = nn.split(network(functools.partial(unet, config), dtype))
    side = config["sample_size"]
    shape = (side, side, 4)
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def drawn(shape: tuple[int, ...]) -> Any:
        return jax.random.normal(next(keys), shape)

    null = process.denoiser(apply, params, shape=shape, cond=condition(config, drawn))
    coder = network(lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0)), dtype)
    encoder = network(lambda: CLIPTextModel(text, rngs=nnx.Rngs(0)), dtype)
    what = f"{'tiny ' if is_tiny else ''}Stable Diffusion 1, random weights"
    return Parts(
        null.condition(condition(config, drawn)), null, nn.split(coder), nn.split(encoder),
        process, shape, what,
    )  # fmt: skip


def num_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def image_of(vae: tuple[nn.Apply, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the image of a latent."""
    module = nnx.merge(vae[0].graph, vae[1])
    return jax.eval_shape(module.decode, jax.ShapeDtypeStruct(shape, jnp.float32)).shape  # pyright: ignore
