r"""A published folder as a whole: `load(path)` reads `model_index.json` and what stands beside it.

    model_index.json          the class of the pipeline, and of each component
    unet/                     config.json, diffusion_pytorch_model.safetensors
    scheduler/                scheduler_config.json
    vae/, text_encoder/, tokenizer/, text_encoder_2/, tokenizer_2/     of Stable Diffusion

Older folders of one network hold these files themselves.  What is no part of sampling (the safety
checker, the image encoder) is not read.  A pipeline gives denoisers; their points are what the
network was trained on: images in [-1, 1], or scaled latents.  `encode` and `decode` lead there from
images in [0, 1], and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn, sample
from mmh_jax.data.files import PathLike
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.pretrained.autoencoder import AutoencoderKL
from mmh_jax.pretrained.block_names import current_name
from mmh_jax.pretrained.clip import load_text_encoder
from mmh_jax.pretrained.conditional_unet import UNet2DConditionModel
from mmh_jax.pretrained.files import fault, read_json, shown, within
from mmh_jax.pretrained.run import carried
from mmh_jax.pretrained.schedules import Process, load_process
from mmh_jax.pretrained.stable_diffusion import StableDiffusion, Text
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.tokenizer_files import load_tokenizer
from mmh_jax.pretrained.unet import UNet2DModel
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key

__all__ = ["Unconditional", "load"]

Place = Callable[[str, np.ndarray], Array]
_Module = TypeVar("_Module", bound=nnx.Module)
_CALLER = "load"


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


class _Folder:
    """A pipeline's folder, its index read; components are read when they are asked for."""

    def __init__(self, path: PathLike, dtype: str, variant: str | None, place: Place | None):
        self.path, self.dtype, self.variant, self.place = Path(path), dtype, variant, place
        self.index = read_json(self.path / "model_index.json", caller=_CALLER)
        self.kind = self.index.get("_class_name")

    def has(self, name: str) -> bool:
        """Whether the index names the component."""
        said = self.index.get(name)
        return isinstance(said, list) and len(said) == 2 and said[1] is not None

    def folder(self, name: str, classes: tuple[str, ...] = ()) -> Path:
        """Of a component, which is of one of these classes."""
        said: Any = self.index.get(name)
        at = self.path / "model_index.json"
        if not self.has(name):
            raise fault(
                _CALLER, at, f"names no {name}, but {shown(said)}",
                f"A {self.kind} needs one; copy the whole folder of the model.",
            )  # fmt: skip
        if classes and said[1] not in classes:
            raise fault(
                _CALLER, at, f"has the {name} {shown(said[1])}, which is not read here",
                f"Read are {', '.join(classes)}.",
            )  # fmt: skip
        inside = within(self.path, name, caller=_CALLER)
        if inside.is_dir():
            return inside
        # Old folders of one network have its files beside the index.
        beside = {"unet": "config.json", "scheduler": "scheduler_config.json"}
        if name in beside and (self.path / beside[name]).is_file():
            return self.path
        raise FileNotFoundError(
            str(fault(_CALLER, inside, "does not exist", "Copy the whole folder of the model."))
        )

    def network(self, name: str, build: Callable[..., _Module]) -> tuple[_Module, dict[str, Any]]:
        """A component with its weights, and its configuration."""
        folder = self.folder(name, (build.__name__,))
        config = read_json(folder / "config.json", caller=_CALLER)
        made = restore(
            lambda: build(config, rngs=nnx.Rngs(0)),
            open_weights(folder, caller=_CALLER, variant=self.variant),
            caller=_CALLER, path=folder, dtype=self.dtype, rename=current_name, place=self.place,
        )  # fmt: skip
        return made, config

    def process(self) -> Process:
        """Of the scheduler."""
        return load_process(self.folder("scheduler"), caller=_CALLER)

    def text(self, end: str) -> Text:
        """A tokenizer with its encoder; `end` is "" or "_2"."""
        encoder = load_text_encoder(
            self.folder(f"text_encoder{end}"), dtype=self.dtype, variant=self.variant,
            place=self.place, caller=_CALLER,
        )  # fmt: skip
        return Text(
            load_tokenizer(self.folder(f"tokenizer{end}"), caller=_CALLER), *nn.split(encoder)
        )


def load(
    path: PathLike,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Unconditional | StableDiffusion:
    """Read a published folder, as diffusers writes it.

    Args:
        path: of the folder with `model_index.json`: a download, or what `save_pretrained` wrote.
            Nothing is downloaded here.
        dtype: of parameters and computation, "float32" or "bfloat16".
        variant: such as "fp16", for files such as `diffusion_pytorch_model.fp16.safetensors`.
        mesh: devices over whose first axis every large parameter is divided; by default all are on
            one.

    Returns:
        `Unconditional` for DDPMPipeline and its kin, `StableDiffusion` for StableDiffusionPipeline
        and StableDiffusionXLPipeline.

    Memory: of the parameters; weights are read one tensor at a time.

    Raises:
        FileNotFoundError: if a component or its weights are missing.
        ValueError: if a file is wrong or a pickle, names an unknown class or option, or weights and
            configuration do not fit: missing and unknown tensors are listed.
    """
    found = _Folder(path, dtype, variant, None if mesh is None else _over(mesh))
    if found.kind not in _READERS:
        raise fault(
            _CALLER, found.path / "model_index.json",
            f"is of a {shown(found.kind)}, which is not read here",
            f"Read are {', '.join(sorted(_READERS))}.",
        )  # fmt: skip
    return _READERS[found.kind](found)


def _unconditional(found: _Folder) -> Unconditional:
    process = found.process()
    network, config = found.network("unet", UNet2DModel)
    shape = (*_sides(config, found), config.get("in_channels", 3))
    apply, params = nn.split(network)
    return Unconditional(process.denoiser(apply, params, shape=shape), process, shape)


def _stable_diffusion(found: _Folder) -> StableDiffusion:
    process = found.process()
    texts = tuple(found.text(end) for end in ("", "_2") if found.has(f"text_encoder{end}"))
    if not texts:
        found.folder("text_encoder")  # says what is missing
    vae, _ = found.network("vae", AutoencoderKL)
    unet, config = found.network("unet", UNet2DConditionModel)
    shape = (*_sides(config, found), config.get("in_channels", 4))
    return StableDiffusion(
        texts, nn.split(vae), nn.split(unet), process, shape,
        is_xl=found.kind == "StableDiffusionXLPipeline",
        empty_is_zero=bool(found.index.get("force_zeros_for_empty_prompt", True)),
    )  # fmt: skip


def _sides(config: dict[str, Any], found: _Folder) -> tuple[int, int]:
    """Height and width of what the network was trained on."""
    size = config.get("sample_size", 64)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise fault(
            _CALLER, found.path / "unet" / "config.json", f"has the sample_size {shown(size)}",
            "It is one whole number, or height and width.",
        )  # fmt: skip
    return sides[0], sides[1]


_READERS: dict[Any, Callable[[_Folder], Any]] = {
    **dict.fromkeys(("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"), _unconditional),
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionXLPipeline"), _stable_diffusion),
}


def _over(mesh: jax.sharding.Mesh) -> Place:
    """Divides the longest axis that the mesh divides, and copies what is small or indivisible."""
    axis = mesh.axis_names[0]
    num = mesh.shape[axis]

    def place(name: str, array: np.ndarray) -> Array:
        del name
        divisible = [i for i, size in enumerate(array.shape) if size % num == 0]
        spec: list[Any] = [None] * array.ndim
        if array.ndim > 1 and divisible:
            spec[max(divisible, key=lambda i: array.shape[i])] = axis
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.device_put(array, sharding)

    return place
