r"""Models of Karras et al. (2022, 2206.00364), exported from their pickles, as denoisers.

| `_class_name`   | D(x; sigma), with F the network                                               |
|-----------------|-------------------------------------------------------------------------------|
| `EDMPrecond`    | c_skip x + c_out F(c_in x, log(sigma) / 4), see `denoise.precondition`        |
| `VPPrecond`     | x - sigma F(x / sqrt(1 + sigma^2), (M - 1) t(sigma)), t of `noise.VP`         |
| `VEPrecond`     | x + sigma F(x, log(sigma / 2))                                                |
| `iDDPMPrecond`  | x - sigma F(x / sqrt(1 + sigma^2), t(sigma)), t of a table of M noise levels  |

In the last, F has twice as many channels, of which the first half counts; and the reference rounds
sigma to the table, where here t lies between its steps: at the steps both are the same.

A model is a folder with `config.json`, the arguments with which it was made, and
`model.safetensors`; `docs/pretrained.md` has the recipe that exports them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import denoise, nn
from mmh_jax.data.files import PathLike
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.noise import DDPM, EDM, VP
from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.edm import DhariwalUNet, SongUNet
from mmh_jax.pretrained.edm_blocks import check_filters
from mmh_jax.pretrained.files import read_json
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array

__all__ = ["EDMOptions", "edm_denoiser", "edm_network", "load_edm"]

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
KINDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")


@dataclasses.dataclass(frozen=True)
class EDMOptions:
    """The arguments of a model that are not of its network."""

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    use_fp16: bool = False
    model_type: str = "SongUNet"
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5
    C_1: float = 0.001
    C_2: float = 0.008


_NAMES = {field.name for field in dataclasses.fields(EDMOptions)}


def _options(config: Mapping[str, Any]) -> tuple[str, EDMOptions]:
    kind = one_of("load_edm", "_class_name", config.get("_class_name"), KINDS)
    default = "DhariwalUNet" if kind in ("EDMPrecond", "iDDPMPrecond") else "SongUNet"
    given = {"model_type": default} | {k: v for k, v in config.items() if k in _NAMES}
    for name in ("img_resolution", "img_channels"):
        if name not in given:
            raise ValueError(f"`load_edm(config=...)` has no {name}; export it as documented.")
    # JSON has no infinity, the default of `sigma_max`.
    given = {k: None if v == float("inf") else v for k, v in given.items()}
    return kind, options(EDMOptions, given)


def edm_network(
    config: Mapping[str, Any], *, attention_chunk: int | None = 1024, rngs: nnx.Rngs
) -> SongUNet | DhariwalUNet:
    """The network of a model.

    Args:
        config: the arguments of the model, with its class as `_class_name`.
        attention_chunk: as for `SongUNet`.
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an argument is unknown, not of its type, or names what is not
            here.

    >>> config = {"_class_name": "EDMPrecond", "img_resolution": 8, "img_channels": 3}
    >>> config |= {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1]}
    >>> from mmh_jax.pretrained import abstract
    >>> network = abstract(lambda: edm_network(config, rngs=nnx.Rngs(0)))
    >>> network.options.out_channels
    3
    """
    kind, o = _options(config)
    one_of("load_edm", "model_type", o.model_type, tuple(NETWORKS))
    own = {k: v for k, v in config.items() if k not in _NAMES and not k.startswith("_")}
    own |= {"img_resolution": o.img_resolution, "in_channels": o.img_channels}
    own |= {"out_channels": o.img_channels * (1 + (kind == "iDDPMPrecond"))}
    own |= {"label_dim": o.label_dim}
    return NETWORKS[o.model_type](own, attention_chunk=attention_chunk, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class _Times:
    """A network that is told a multiple of t, and of whose answer the first channels count."""

    apply: Callable[..., Array]
    factor: float
    channels: int

    def __call__(self, params: Any, x: Array, t: Array, *cond: Any) -> Array:
        return self.apply(params, x, self.factor * t, *cond)[..., : self.channels]


@dataclasses.dataclass(frozen=True)
class _Exploding:
    """x + sigma F(x, log(sigma / 2))."""

    apply: Callable[..., Array]

    def __call__(self, params: Any, x: Array, sigma: Array, *cond: Any) -> Array:
        return x + sigma * self.apply(params, x, jnp.log(sigma / 2), *cond)


def _table(o: EDMOptions) -> np.ndarray:
    """The noise levels of improved DDPM, rising: M numbers."""
    angles = 0.5 * np.pi * np.arange(o.M + 1) / o.M / (o.C_2 + 1)
    ratios = np.maximum(np.sin(angles[:-1]) ** 2 / np.sin(angles[1:]) ** 2, o.C_1)
    squares = [0.0]
    for ratio in reversed(ratios):
        squares.append((squares[-1] + 1) / ratio - 1)
    return np.sqrt(squares[1:])


def edm_denoiser(network: SongUNet | DhariwalUNet, config: Mapping[str, Any]) -> NetworkDenoiser:
    """The network as a denoiser of images (H, W, C) in -1 to 1; `.condition(label)` for a class.

    Args:
        network: from `edm_network`, with its weights.
        config: as for `edm_network`.
    """
    kind, o = _options(config)
    if not 2 <= o.M <= 100_000 or min(o.sigma_data, o.beta_d, o.beta_min, o.C_1) <= 0:
        raise ValueError(
            f"`load_edm(config=...)` has M={o.M}, sigma_data={o.sigma_data}, beta_d={o.beta_d}, "
            f"beta_min={o.beta_min}, C_1={o.C_1}; all are positive."
        )
    apply, params = nn.split(network)
    shape = (o.img_resolution, o.img_resolution, o.img_channels)
    if kind == "EDMPrecond":
        # The noise levels of the training, log sigma ~ N(-1.2, 1.2^2), are not in the file.
        limits = (o.sigma_min or 0.002, o.sigma_max or 80.0)
        return denoise.precondition(
            apply, params, sigma_data=o.sigma_data, shape=shape, sigma_range=limits
        )
    common: dict[str, Any] = {"shape": shape, "prediction": denoise.eps}
    if kind == "VEPrecond":
        limits = (o.sigma_min or 0.02, o.sigma_max or 100.0)
        common |= {"prediction": denoise.x0, "sigma_range": limits}
        return NetworkDenoiser(params, EDM(), apply=_Exploding(apply), **common)
    if kind == "VPPrecond":
        schedule = VP(o.beta_min, o.beta_min + o.beta_d)
        limits = (float(schedule.sigma(o.epsilon_t)), float(schedule.sigma(1.0)))
        told = _Times(apply, o.M - 1.0, o.img_channels)
        return NetworkDenoiser(params, schedule, apply=told, sigma_range=limits, **common)
    schedule = DDPM(jnp.asarray(np.log(_table(o))))
    return NetworkDenoiser(params, schedule, apply=_Times(apply, 1.0, o.img_channels), **common)


def load_edm(
    folder: PathLike,
    *,
    dtype: str = "float32",
    attention_chunk: int | None = 1024,
    place: Callable[[str, np.ndarray], Array] | None = None,
) -> NetworkDenoiser:
    """Read an exported model into a denoiser of images (H, W, C) in -1 to 1.

    Args:
        folder: with `config.json` and `model.safetensors`, as `docs/pretrained.md` exports them.
        dtype: of parameters and computation, "float32" or "bfloat16".
        attention_chunk: as for `SongUNet`.
        place: as in `restore`.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError, ValueError: if a file is wrong, asks for what is not here, or the two do not fit.
    """
    config = read_json(Path(folder) / "config.json", caller="load_edm")
    tensors = open_weights(folder, caller="load_edm", stem="model")
    check_filters("load_edm", folder, tensors, config.get("resample_filter", [1.0, 1.0]))
    network = restore(
        lambda: edm_network(config, attention_chunk=attention_chunk, rngs=nnx.Rngs(0)),
        tensors,
        caller="load_edm",
        path=folder,
        dtype=dtype,
        rename=parameter_name,
        place=place,
    )
    return edm_denoiser(network, config)


def parameter_name(name: str) -> str | None:
    """The name in the network of a tensor of the model; None for what is no parameter.

    >>> parameter_name("model.enc.8x8_down.conv0.weight")
    'enc.8x8_down.conv0.weight'
    >>> parameter_name("model.enc.8x8_down.conv0.resample_filter")
    """
    name = name.removeprefix("model.")
    return None if name == "u" or name.endswith(".resample_filter") else name
