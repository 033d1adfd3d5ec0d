"""A model on disk: a folder with `config.json` and `params.safetensors`, and back to a denoiser.

Both are plain data: loading executes nothing and unpickles nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from mmh_jax import nn
from mmh_jax.denoise import Affine, NetworkDenoiser, eps, precondition
from mmh_jax.noise import VP
from mmh_jax.typing import Key

__all__ = ["ModelConfig", "build", "check_config", "load", "load_config", "named_arrays", "save"]

FORMAT = "mmh_jax.model/1"
OBJECTIVES = ("edm", "vp")
NETWORKS = {
    "DiT": nn.DiT,
    "GradientMLP": nn.GradientMLP,
    "ResidualMLP": nn.ResidualMLP,
    "UNet": nn.UNet,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a model, but for its arrays.

    Attributes:
        network: the name of a network in `NETWORKS`.
        network_options: its keyword arguments.
        shape: the shape of a point.
        scale: data units per unit of the normalised data in which the network works.
        sigma_data: the standard deviation of the normalised data.
        sigma_min, sigma_max: the noise levels of the training, in data units.
        training: anything worth keeping about how it was trained (source, seed, steps ...).
        objective: `edm`, a network preconditioned as in Karras et al. 2022, or `vp`, one that
            predicts the noise from alpha x and t on `noise.VP()`.
    """

    network: str
    network_options: dict[str, Any]
    shape: tuple[int, ...]
    scale: float
    sigma_data: float
    sigma_min: float
    sigma_max: float
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = "edm"


def _module(config: ModelConfig, key: Key | None) -> nnx.Module:
    rngs = nnx.Rngs(0 if key is None else key)
    return NETWORKS[config.network](config.shape, **config.network_options, rngs=rngs)


def _assemble(config: ModelConfig, apply: nn.Apply, params: Any, shift: Any) -> Affine:
    sigma_range = (config.sigma_min / config.scale, config.sigma_max / config.scale)
    common: dict[str, Any] = {"shape": config.shape, "sigma_range": sigma_range}
    if config.objective == "vp":
        inner = NetworkDenoiser(params, VP(), apply=apply, prediction=eps, **common)
    else:
        inner = precondition(apply, params, sigma_data=config.sigma_data, **common)
    return Affine(inner, jnp.asarray(shift), config.scale)


def build(config: ModelConfig, shift: Any, *, key: Key) -> Affine:
    """An untrained model in data units.

    Args:
        config: what to build.
        shift: the origin of the normalised data in data units, of the shape of a point.
        key: draws the initial weights.

    Raises:
        ValueError: if the network is to have dropout, which training does not apply.
    """
    _refuse_dropout(config)
    apply, params = nn.split(_module(config, key))
    return _assemble(config, apply, params, shift)


def check_config(config: ModelConfig) -> None:
    """Raise what `build` raises, without any arrays."""
    _refuse_dropout(config)
    nnx.eval_shape(lambda: _module(config, None))


def _refuse_dropout(config: ModelConfig) -> None:
    if config.network_options.get("dropout", 0.0):
        raise ValueError(
            f"`build(config=...)` asks for dropout {config.network_options['dropout']}: the loss "
            "draws none, so it would have no effect. Leave it out, and use `augment`."
        )


def named_arrays(params: Any) -> dict[str, np.ndarray]:
    """The arrays of a network by name, such as `blocks.0.inner.kernel`."""
    named = _named(params).items()
    return {name.removesuffix(".value"): np.asarray(leaf) for name, leaf in named}


def _named(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def save(folder: str | Path, config: ModelConfig, model: Affine) -> None:
    """Write a model; each file under a temporary name first, `config.json` last.

    Args:
        folder: made if it does not exist; a model already there is replaced.
        config: from which `model` was built.
        model: the denoiser, from `build`, with trained parameters.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in _named(model.inner.params).items()}
    arrays["shift"] = np.asarray(model.shift)
    partial = folder / "params.safetensors.partial"
    # Not `save_file`, which makes a file that only its owner can read.
    partial.write_bytes(to_bytes({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    os.replace(partial, folder / "params.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps({"format": FORMAT} | dataclasses.asdict(config), indent=2) + "\n")
    os.replace(partial, folder / "config.json")


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a model of this package, or of another version.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no model in {folder}: {path.name} is missing. A model is a folder with config.json "
            "and params.safetensors, as `mmh-jax train` writes it."
        )
    try:
        fields = json.loads(path.read_text())
        found = fields.pop("format", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}.")
    try:
        config = ModelConfig(**fields)
        config = dataclasses.replace(config, shape=tuple(int(size) for size in config.shape))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from None
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"{path} has the objective {config.objective!r}; known: {', '.join(OBJECTIVES)}."
        )
    if config.network not in NETWORKS:
        raise ValueError(f"{path} names the network {config.network!r}; known: {sorted(NETWORKS)}.")
    return config


def load(folder: str | Path) -> Affine:
    """Read a model folder into a denoiser in data units.

    Args:
        folder: with `config.json` and `params.safetensors`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is truncated, or its arrays are not those of the model.
    """
    config = load_config(folder)
    path = Path(folder) / "params.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"the model in {folder} has no {path.name}; copy the whole folder.")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None

    try:
        apply, abstract = nn.split(nnx.eval_shape(lambda: _module(config, None)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json does not describe a model: {error}") from None
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(abstract).items()}
    expected["shift"] = (config.shape, jnp.float32)
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if wrong := sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    ):
        raise ValueError(
            f"{path} does not hold the arrays of this {config.network}: {len(wrong)} are missing, "
            f"unknown or of another shape or dtype, the first {wrong[0]!r}."
        )
    leaves = [jnp.asarray(arrays[name]) for name in _named(abstract)]
    params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return _assemble(config, apply, params, arrays["shift"])
