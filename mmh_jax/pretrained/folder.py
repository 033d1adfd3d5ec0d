r"""The folder of a pipeline: `model_index.json`, and components that are read when asked for.

    model_index.json          the class of the pipeline, and [library, class] of each component
    unet/ or transformer/     config.json, diffusion_pytorch_model.safetensors
    scheduler/                scheduler_config.json
    vae/, text_encoder/, tokenizer/, text_encoder_2/, tokenizer_2/     where there are such

Older folders of one network hold these files themselves.  What is no part of sampling (the safety
checker, the image encoder) is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from mmh_jax import nn
from mmh_jax.data.files import PathLike
from mmh_jax.pretrained.block_names import current_name
from mmh_jax.pretrained.clip import load_text_encoder
from mmh_jax.pretrained.files import fault, read_json, shown, within
from mmh_jax.pretrained.schedules import Process, load_process
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.text_to_image import Text
from mmh_jax.pretrained.tokenizer_files import load_tokenizer
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array

__all__ = ["Folder", "divided"]

Place = Callable[[str, np.ndarray], Array]
_Module = TypeVar("_Module", bound=nnx.Module)
CALLER = "load"


class Folder:
    """A pipeline's folder, its index read.

    Args:
        path: of the folder.
        dtype: of parameters, "float32" or "bfloat16".
        variant: in the names of files of weights, such as "fp16".
        place: as in `restore`.

    Raises:
        FileNotFoundError, ValueError: if the index is missing or wrong.
    """

    def __init__(
        self, path: PathLike, dtype: str = "float32", variant: str | None = None,
        place: Place | None = None,
    ):  # fmt: skip
        self.path, self.dtype, self.variant, self.place = Path(path), dtype, variant, place
        self.index = read_json(self.path / "model_index.json", caller=CALLER)
        self.kind = self.index.get("_class_name")

    def wrong(self, what: str, cure: str, at: str = "model_index.json") -> ValueError:
        """The error of a fault in a file of the folder."""
        return fault(CALLER, self.path / at, what, cure)

    def has(self, name: str) -> bool:
        """Whether the index names the component."""
        said = self.index.get(name)
        return isinstance(said, list) and len(said) == 2 and said[1] is not None

    def component(self, name: str, classes: tuple[str, ...] = ()) -> Path:
        """The folder of a component, which is of one of these classes.

        Raises:
            FileNotFoundError, ValueError: if it is missing, or of another class.
        """
        said: Any = self.index.get(name)
        if not self.has(name):
            raise self.wrong(
                f"names no {name}, but {shown(said)}",
                f"A {self.kind} needs one; copy the whole folder of the model.",
            )
        if classes and said[1] not in classes:
            raise self.wrong(
                f"has the {name} {shown(said[1])}, which is not read here",
                f"Read are {', '.join(classes)}.",
            )
        inside = within(self.path, name, caller=CALLER)
        if inside.is_dir():
            return inside
        # Old folders of one network have its files beside the index.
        beside = {"unet": "config.json", "scheduler": "scheduler_config.json"}
        if name in beside and (self.path / beside[name]).is_file():
            return self.path
        raise FileNotFoundError(
            str(fault(CALLER, inside, "does not exist", "Copy the whole folder of the model."))
        )

    def network(
        self, name: str, build: Callable[..., _Module], *aliases: str
    ) -> tuple[_Module, dict[str, Any]]:
        """A component with its weights, and its configuration.

        Args:
            name: of the component.
            build: its class, which has the name of the published one.
            aliases: older names of the class.
        """
        folder = self.component(name, (build.__name__, *aliases))
        config = read_json(folder / "config.json", caller=CALLER)
        made = restore(
            lambda: build(config, rngs=nnx.Rngs(0)),
            open_weights(folder, caller=CALLER, variant=self.variant),
            caller=CALLER, path=folder, dtype=self.dtype, rename=current_name, place=self.place,
        )  # fmt: skip
        return made, config

    def process(self) -> Process:
        """Of the scheduler."""
        return load_process(self.component("scheduler"), caller=CALLER)

    def text(self, end: str) -> Text:
        """A tokenizer with its encoder; `end` is "" or "_2"."""
        encoder = load_text_encoder(
            self.component(f"text_encoder{end}"), dtype=self.dtype, variant=self.variant,
            place=self.place, caller=CALLER,
        )  # fmt: skip
        return Text(
            load_tokenizer(self.component(f"tokenizer{end}"), caller=CALLER), *nn.split(encoder)
        )


def divided(mesh: jax.sharding.Mesh) -> Place:
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
