r"""A published folder as a whole: `load(path)` reads `model_index.json` and what stands beside it.

A pipeline gives denoisers; their points are what the network was trained on: images in [-1, 1], or
scaled latents.  `encode` and `decode` lead there from images in [0, 1], and back.

| pipeline in the index                                      | class              |
|------------------------------------------------------------|--------------------|
| `DDPMPipeline`, `DDIMPipeline`, `PNDMPipeline`             | `Unconditional`    |
| `DiTPipeline`                                              | `ClassConditional` |
| `StableDiffusionPipeline` (1, 2), `...XLPipeline`          | `StableDiffusion`  |
| `StableDiffusion3Pipeline` (3, 3.5), without T5            | `StableDiffusion3` |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmh_jax import nn, sample
from mmh_jax.data.files import PathLike
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.pretrained.autoencoder import AutoencoderKL
from mmh_jax.pretrained.class_conditional import ClassConditional
from mmh_jax.pretrained.conditional_unet import UNet2DConditionModel
from mmh_jax.pretrained.files import shown
from mmh_jax.pretrained.folder import Folder, divided
from mmh_jax.pretrained.run import carried
from mmh_jax.pretrained.schedules import Process
from mmh_jax.pretrained.sd3 import SD3Transformer2DModel
from mmh_jax.pretrained.stable_diffusion import StableDiffusion, StableDiffusion3
from mmh_jax.pretrained.text_to_image import Text
from mmh_jax.pretrained.transformer import DiTTransformer2DModel
from mmh_jax.pretrained.unet import UNet2DModel
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key

__all__ = ["Unconditional", "load"]


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """A network on images without a condition, such as google/ddpm-cifar10-32; made by `load`.

    Attributes:
        model: its denoiser, on images in [-1, 1].
        process: that of the training.
        shape: (H, W, C) of a point.
    """

    model: NetworkDenoiser
    process: Process
    shape: tuple[int, ...]

    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser of images in [-1, 1], of the noise levels of its training."""
        return self.model

    def encode(self, image: ArrayLike) -> Array:
        """A point of the denoiser for an image (H, W, C) in [0, 1]: 2 image - 1."""
        return 2 * jnp.asarray(image) - 1

    def decode(self, x: ArrayLike) -> Array:
        """The image of a point, in [0, 1]; what is beyond is cut off."""
        return jnp.clip((jnp.asarray(x) + 1) / 2, 0, 1)

    def sample(
        self,
        num: int = 1,
        *,
        key: Key | None = None,
        noise: ArrayLike | None = None,
        num_steps: int = 50,
        step: sample.Step | None = None,
        clip: bool = True,
        chunk_size: int = 16,
    ) -> Array:
        """Images (num, H, W, C) in [0, 1], at the times of the published scheduler.

        Args:
            num: how many, if there is no noise.
            key: draws the noise, and that of a stochastic step.
            noise: (num, H, W, C) of unit variance, in place of a draw.
            num_steps: evaluations of the network.
            step: by default `sample.ancestral()`, the DDPM sampler, for which few steps are not
                enough; `sample.ddim()` takes them.
            clip: whether x0 is clipped on the way, if the scheduler says so.
            chunk_size: at once.

        Raises:
            TypeError, ValueError: without key or noise, or for a wrong shape or number.
        """
        step = sample.ancestral() if step is None else step
        model: Denoiser = self.model
        if clip and self.process.clip is not None:
            model = _Clipped(model, self.process.clip)
        found = carried(
            "sample", model, self.process, self.shape, num, key=key, noise=noise,
            num_steps=num_steps, step=step, chunk_size=chunk_size,
        )  # fmt: skip
        return self.decode(found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Clipped:
    inner: Any
    limit: float

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        return jnp.clip(self.inner(x, sigma), -self.limit, self.limit)


def load(
    path: PathLike,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    skip_t5: bool = False,
) -> Unconditional | ClassConditional | StableDiffusion | StableDiffusion3:
    """Read a published folder, as diffusers writes it.

    Args:
        path: of the folder with `model_index.json`: a download, or what `save_pretrained` wrote.
            Nothing is downloaded here.
        dtype: of parameters and computation, "float32" or "bfloat16".
        variant: such as "fp16", for files such as `diffusion_pytorch_model.fp16.safetensors`.
        mesh: devices over whose first axis every large parameter is divided; by default all are on
            one.
        skip_t5: of Stable Diffusion 3: read a folder that names the third text encoder, T5, as if
            it did not, as `text_encoder_3=None` in diffusers does.  Its files need not be there.

    Returns:
        `Unconditional` for DDPMPipeline and its kin, `ClassConditional` for DiTPipeline,
        `StableDiffusion` for StableDiffusionPipeline and StableDiffusionXLPipeline,
        `StableDiffusion3` for StableDiffusion3Pipeline.

    Memory: of the parameters; weights are read one tensor at a time.

    Raises:
        FileNotFoundError: if a component or its weights are missing.
        ValueError: if a file is wrong or a pickle, names an unknown class or option, or weights and
            configuration do not fit: missing and unknown tensors are listed.  If T5 is named, and
            not skipped.
    """
    found = Folder(path, dtype, variant, None if mesh is None else divided(mesh))
    if found.kind not in _READERS:
        raise found.wrong(
            f"is of a {shown(found.kind)}, which is not read here",
            f"Read are {', '.join(sorted(_READERS))}.",
        )
    if not skip_t5 and found.kind == "StableDiffusion3Pipeline":
        _refuse_t5(found)
    return _READERS[found.kind](found)


def _unconditional(found: Folder) -> Unconditional:
    process = found.process()
    network, config = found.network("unet", UNet2DModel)
    shape = (*_sides(config, found), config.get("in_channels", 3))
    apply, params = nn.split(network)
    return Unconditional(process.denoiser(apply, params, shape=shape), process, shape)


def _class_conditional(found: Folder) -> ClassConditional:
    process = found.process()  # first: it is small
    vae, _ = found.network("vae", AutoencoderKL)
    # In older folders it has the name of the class from which it was split off.
    network, _ = found.network("transformer", DiTTransformer2DModel, "Transformer2DModel")
    return ClassConditional(
        nn.split(vae), process, _latent_shape(network), nn.split(network),
        _labels(found, network.null_class),
    )  # fmt: skip


def _labels(found: Folder, num_classes: int) -> dict[int, str]:
    """The names of classes in the index, which need not be there."""
    given: Any = found.index.get("id2label")
    given = {} if given is None else given
    classes = {str(place): place for place in range(num_classes)}
    if not isinstance(given, dict) or not all(
        key in classes and isinstance(text, str) for key, text in given.items()
    ):
        raise found.wrong(
            f"has the id2label {shown(given)}",
            f'It is an object of a name for each class, "0" to "{num_classes - 1}".',
        )
    return {classes[key]: text for key, text in given.items()}


def _stable_diffusion(found: Folder) -> StableDiffusion:
    process = found.process()
    texts = tuple(found.text(end) for end in ("", "_2") if found.has(f"text_encoder{end}"))
    if not texts:
        found.component("text_encoder")  # says what is missing
    vae, _ = found.network("vae", AutoencoderKL)
    unet, config = found.network("unet", UNet2DConditionModel)
    shape = (*_sides(config, found), config.get("in_channels", 4))
    return StableDiffusion(
        nn.split(vae), process, shape, texts, nn.split(unet),
        is_xl=found.kind == "StableDiffusionXLPipeline",
        empty_is_zero=bool(found.index.get("force_zeros_for_empty_prompt", True)),
    )  # fmt: skip


def _stable_diffusion_3(found: Folder) -> StableDiffusion3:
    process = found.process()
    texts = (found.text(""), found.text("_2"))
    vae, _ = found.network("vae", AutoencoderKL)
    network, _ = found.network("transformer", SD3Transformer2DModel)
    _check_widths(found, texts, network)
    return StableDiffusion3(
        nn.split(vae), process, _latent_shape(network), texts, nn.split(network)
    )


def _refuse_t5(found: Folder) -> None:
    if found.has("text_encoder_3"):
        raise found.wrong(
            "names a text_encoder_3, T5, which is not read here",
            "Pass `skip_t5=True` to go without, or save the pipeline without it: "
            "`StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, "
            "tokenizer_3=None).save_pretrained(...)`.",
        )


def _check_widths(found: Folder, texts: tuple[Text, ...], network: SD3Transformer2DModel) -> None:
    """That the text encoders give what the transformer takes."""
    widths = [text.widths for text in texts]
    context, pooled = (sum(width) for width in zip(*widths, strict=True))
    o = network.options
    if context > o.joint_attention_dim or pooled != o.pooled_projection_dim:
        raise found.wrong(
            f"has text encoders that are {context} wide and project to {pooled}, and a transformer "
            f"that takes at most {o.joint_attention_dim}, and {o.pooled_projection_dim}",
            "Its text encoders have a projection; copy the whole folder of one model.",
        )


def _latent_shape(network: DiTTransformer2DModel | SD3Transformer2DModel) -> tuple[int, ...]:
    o = network.options
    return (o.sample_size, o.sample_size, o.in_channels)


def _sides(config: dict[str, Any], found: Folder) -> tuple[int, int]:
    """Height and width of what the network was trained on."""
    size = config.get("sample_size", 64)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise found.wrong(
            f"has the sample_size {shown(size)}", "It is one whole number, or height and width.",
            at="unet/config.json",
        )  # fmt: skip
    return sides[0], sides[1]


_READERS: dict[Any, Callable[[Folder], Any]] = {
    **dict.fromkeys(("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"), _unconditional),
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionXLPipeline"), _stable_diffusion),
    "DiTPipeline": _class_conditional,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
}
