r"""Between the parameters of a network and the tensors of a published file.

The path of a parameter in the network is its published name (`layers`), so that conversion is one
rule: a kernel (h, w, in, out) is published as (out, in, h, w), all else as it is.  Nothing is
guessed: a tensor that is missing, left over or of another shape is an error that lists it.

    network = restore(lambda: UNet2DModel(config, rngs=nnx.Rngs(0)), open_weights(folder, ...), ...)
    save("diffusion_pytorch_model.safetensors", network)

`restore` builds the network without allocating it and reads one tensor at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.data.files import PathLike
from mmh_jax.pretrained.layers import abstract
from mmh_jax.typing import Array

__all__ = ["flatten", "layout", "restore", "save"]

_Network = TypeVar("_Network", bound=nnx.Module)
_TO_PUBLISHED = (3, 2, 0, 1)  # (h, w, in, out) to (out, in, h, w)
_FROM_PUBLISHED = (2, 3, 1, 0)
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MOST_LISTED = 10


def _parameters(network: nnx.Module) -> dict[str, nnx.Variable]:
    """The parameters by published name."""
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def layout(network: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The published shape of every parameter by its published name.

    Args:
        network: may be abstract, from `abstract`.

    >>> from mmh_jax.pretrained import layers
    >>> layout(layers.abstract(lambda: layers.Conv(3, 8, rngs=nnx.Rngs(0))))
    {'bias': (8,), 'weight': (8, 3, 3, 3)}
    """
    found = {}
    for name, variable in _parameters(network).items():
        shape = variable.get_value().shape
        found[name] = tuple(shape[i] for i in _TO_PUBLISHED) if len(shape) == 4 else tuple(shape)
    return found


def flatten(network: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters in the published layout by published name.

    >>> from mmh_jax.pretrained import layers
    >>> flatten(layers.Linear(2, 3, rngs=nnx.Rngs(0)))["weight"].shape
    (3, 2)
    """
    return {name: _published(v) for name, v in _parameters(network).items()}


def _published(variable: nnx.Variable) -> np.ndarray:
    array = np.asarray(variable.get_value())
    return array.transpose(_TO_PUBLISHED) if array.ndim == 4 else array


def restore(
    build: Callable[[], _Network],
    tensors: Mapping[str, np.ndarray],
    *,
    caller: str,
    path: PathLike = "...",
    dtype: str = "float32",
    rename: Callable[[str], str | None] | None = None,
    place: Callable[[str, np.ndarray], Array] | None = None,
) -> _Network:
    """The network that `build` makes, with these tensors for its parameters.

    Args:
        build: makes the network; it is traced, not run, so that nothing is allocated.
        tensors: by published name, such as those of `open_weights`.
        caller: the function to name in an error.
        path: where the tensors come from, for an error.
        dtype: of all parameters, and so of the computation: "float32" or "bfloat16".
        rename: of a name in `tensors` to that in the network; None drops the tensor.
        place: puts an array, given its name, on a device or over a mesh; `jnp.asarray` if not
            given.

    Raises:
        TypeError: if a tensor is not of a floating dtype.
        ValueError: if tensors are missing, unknown, there twice or of another shape: at most ten
            are listed.

    >>> from mmh_jax.pretrained import layers
    >>> tensors = {"weight": np.ones((2, 3)), "bias": np.zeros(2)}
    >>> layer = restore(lambda: layers.Linear(3, 2, rngs=nnx.Rngs(0)), tensors, caller="load")
    >>> layer(jnp.ones(3))
    Array([3., 3.], dtype=float32)
    """
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"`{caller}(dtype={dtype!r})` must be 'float32' or 'bfloat16'.")
    empty = abstract(build)
    expected = layout(empty)
    sources = _sources(tensors, rename, caller, path)
    _check_names(expected, sources, tensors, caller, path)
    graph, params, rest = nnx.split(empty, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise TypeError(f"`{caller}`: {type(empty).__name__} has state that is no parameter.")
    put = (lambda _, array: jnp.asarray(array)) if place is None else place
    flat = []
    for keys, variable in nnx.to_flat_state(params):
        name = ".".join(map(str, keys))
        array = tensors[sources[name]]
        array = array.transpose(_FROM_PUBLISHED) if array.ndim == 4 else array
        # A copy: a view would keep the file's memory map, and its pages, alive.
        array = np.array(array, dtype=jnp.dtype(dtype), order="C")
        flat.append((keys, variable.replace(put(name, array))))
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def _sources(
    tensors: Mapping[str, Any],
    rename: Callable[[str], str | None] | None,
    caller: str,
    path: PathLike,
) -> dict[str, str]:
    """For each parameter's name, that of its tensor."""
    found: dict[str, str] = {}
    for source in tensors:
        name = source if rename is None else rename(source)
        if name is None:
            continue
        if name in found:
            raise ValueError(
                f"`{caller}(path={os.fspath(path)!r})` holds both {source!r} and {found[name]!r}, "
                "an old and a new name of the same parameter; remove one."
            )
        found[name] = source
    return found


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:200] for name in names[:_MOST_LISTED]) + more


def _check_names(
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, str],
    tensors: Mapping[str, Any],
    caller: str,
    path: PathLike,
) -> None:
    entries = getattr(tensors, "entries", tensors)  # shapes without reading the tensors
    faults = []
    if missing := expected.keys() - sources.keys():
        faults.append(f"{len(missing)} tensors are missing: {_listed(missing)}")
    if extra := sources.keys() - expected.keys():
        faults.append(f"{len(extra)} are not of this network: {_listed(extra)}")
    shapes = {
        name: tuple(entries[sources[name]].shape) for name in expected.keys() & sources.keys()
    }
    if wrong := [
        f"{name} has shape {shapes[name]} instead of {expected[name]}"
        for name in shapes
        if shapes[name] != expected[name]
    ]:
        faults.append(_listed(wrong))
    if faults:
        raise ValueError(
            f"`{caller}(path={os.fspath(path)!r})` does not fit its config.json: "
            f"{'; '.join(faults)}. Use the config.json that was published with these weights."
        )
    for name, source in sources.items():
        if not jnp.issubdtype(entries[source].dtype, jnp.floating):
            raise TypeError(
                f"`{caller}(path={os.fspath(path)!r})`: {name} is of dtype "
                f"{entries[source].dtype}; weights are floating. Use those that are not quantised."
            )


def save(path: PathLike, network: nnx.Module) -> None:
    """Write the parameters as a safetensors file in the published layout.

    One tensor is copied at a time.  The file has a temporary name until it is complete.

    Args:
        path: of the file, such as `unet/diffusion_pytorch_model.safetensors`; one that is there is
            replaced.
        network: its parameters are written in their own dtype.
    """
    path = Path(path)
    parameters = dict(sorted(_parameters(network).items()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in layout(network).items():
        dtype = jnp.dtype(parameters[name].get_value().dtype)
        header[name] = {"dtype": _NAMES[dtype.name], "shape": shape}
    for name, variable in parameters.items():
        value = variable.get_value()
        end = place + value.size * value.dtype.itemsize
        header[name]["data_offsets"] = [place, end]
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for variable in parameters.values():
            file.write(np.ascontiguousarray(_published(variable)).tobytes())
    os.replace(partial, path)
