r"""Tensors of safetensors files, every byte of the header checked, read when they are used.

A safetensors file is

    8 bytes, n little-endian | n bytes, a JSON object | the tensors' bytes, one after the other

where the object gives each tensor `{"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}`,
relative to the end of the header.  A large model is split, and `*.safetensors.index.json` says in
its `weight_map` which file holds which tensor.

The length of the header is checked against the file's size and a limit, offsets against the size of
the data, against each other and against dtype and shape; names in an index may not leave the
folder.  Tensors are views of a memory map, so that the memory taken does not depend on what a file
claims.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax.data.files import PathLike
from mmh_jax.pretrained.files import (
    AGAIN,
    PICKLES,
    absent,
    fault,
    parsed,
    pickled,
    read_json,
    shown,
    within,
)

__all__ = ["MAX_HEADER_BYTES", "Entry", "Tensors", "open_safetensors", "open_weights"]

MAX_HEADER_BYTES = 8 * 2**20
"""Of a safetensors header; that of Stable Diffusion XL's U-Net has 0.2 MiB."""

_MAX_NESTING = 32
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        path: of the file.
        dtype: of its elements.
        shape: its shape.
        begin, end: its bytes, from the start of the file.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files by name, read when they are asked for.

    Each is a read-only view of a memory map, valid for as long as it is referenced.

    Args:
        entries: where each tensor lies.
        metadata: the texts in `__metadata__` of the (first) file.
    """

    def __init__(self, entries: dict[str, Entry], metadata: dict[str, str] | None = None):
        self.entries = entries
        self.metadata = metadata or {}
        self._maps: dict[Path, np.memmap] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.begin == entry.end:
            return np.zeros(entry.shape, entry.dtype)
        if entry.path not in self._maps:
            self._maps[entry.path] = np.memmap(entry.path, np.uint8, "r")
        data = self._maps[entry.path][entry.begin : entry.end]
        return data.view(np.ndarray).view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} in {len({e.path for e in self.entries.values()})} files)"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(name: str, said: Any, path: Path, start: int, size: int, caller: str) -> Entry:
    """One tensor of a header, checked against the size of the file."""
    wrong = functools.partial(fault, caller, path, cure=AGAIN)
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(said, dict) or said.keys() != fields:
        raise wrong(f"has no dtype, shape and data_offsets for {shown(name)} in its header")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(
            caller, path, f"holds {shown(name)} as {shown(dtype, 40)}, which is not read here",
            f"Convert it; read are {', '.join(_DTYPES)}.",
        )  # fmt: skip
    if not isinstance(shape, list) or len(shape) > _MAX_NESTING or not all(map(_is_size, shape)):
        raise wrong(f"gives {shown(name)} the shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"gives {shown(name)} the offsets {shown(offsets)}")
    begin, end = offsets
    if not begin <= end:
        raise wrong(f"gives {shown(name)} the offsets {offsets}, of which the second is smaller")
    if start + end > size:
        raise wrong(
            f"is truncated: {shown(name)} ends at byte {start + end:,}, the file at {size:,}"
        )
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if needed != end - begin:
        raise wrong(
            f"gives {shown(name)} {end - begin:,} bytes; {dtype} of shape {shape} takes {needed:,}"
        )
    return Entry(path, _DTYPES[dtype], tuple(shape), start + begin, start + end)


def _check_tiling(
    entries: dict[str, Entry], path: Path, start: int, size: int, caller: str
) -> None:
    """Tensors follow each other without overlap or gap, to the end of the file."""
    place, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < place:
            raise fault(caller, path, f"lets {shown(name)} overlap with {before}", AGAIN)
        if entry.begin > place:
            raise fault(caller, path, f"has a gap between {before} and {shown(name)}", AGAIN)
        place, before = entry.end, shown(name)
    if place != size:
        raise fault(caller, path, f"has {size - place:,} bytes after its last tensor", AGAIN)


def open_safetensors(path: PathLike, *, caller: str) -> Tensors:
    """The tensors of one file, all of whose header is checked; none is read yet.

    Args:
        path: of the file.
        caller: the function to name in an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated, or its header does not fit it.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise pickled(path, caller)
    if not path.is_file():
        raise absent(caller, path, "does not exist", "Copy the whole folder of the model.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise fault(
                caller, path,
                f"is truncated or no safetensors file: it has {size:,} bytes, and claims a header "
                f"of {length:,}", AGAIN,
            )  # fmt: skip
        if length > MAX_HEADER_BYTES:
            raise fault(
                caller, path, f"claims a header of {length:,} bytes, above {MAX_HEADER_BYTES:,}",
                "No published model has such a one; do not use this file.",
            )  # fmt: skip
        header = parsed(file.read(length), path, caller, "has a damaged header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fault(caller, path, "has `__metadata__` that are no texts", AGAIN)
    start = 8 + length
    entries = {name: _entry(name, said, path, start, size, caller) for name, said in header.items()}
    _check_tiling(entries, path, start, size, caller)
    return Tensors(entries, metadata)


def open_weights(
    folder: PathLike,
    *,
    caller: str,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
) -> Tensors:
    """The tensors of a component's folder, in one file or in several with an index.

    Args:
        folder: such as `stable-diffusion/unet`.
        caller: the function to name in an error.
        stem: of the file's name; `model` for text encoders.
        variant: such as "fp16", for `diffusion_pytorch_model.fp16.safetensors`.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if there are pickles only, or a file is wrong.
    """
    folder = Path(folder)
    middle = "" if variant is None else f".{variant}"
    single = within(folder, f"{stem}{middle}.safetensors", caller=caller)
    if single.is_file():
        return open_safetensors(single, caller=caller)
    index = within(folder, f"{stem}.safetensors.index{middle}.json", caller=caller)
    if index.is_file():
        return _open_sharded(folder, index, caller)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in found if name.lower().endswith(PICKLES)]
    others = [name for name in found if name.endswith(".safetensors")]
    if pickles and not others:
        raise pickled(folder / pickles[0], caller)
    cure = f"There is {shown(others[0])}; name its variant." if others else "Copy it there."
    raise absent(caller, folder, f"has no {single.name}", cure)


def _open_sharded(folder: Path, index: Path, caller: str) -> Tensors:
    """All tensors that an index lists, each from the file that it names, and no others."""
    where = read_json(index, caller=caller).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise fault(caller, index, "has no `weight_map` from tensors to files", AGAIN)
    shards: dict[str, Tensors] = {}
    for name in dict.fromkeys(where.values()):
        path = within(folder, name, caller=caller)
        if not name.endswith(".safetensors"):
            raise (pickled(path, caller) if name.lower().endswith(PICKLES) else fault(
                caller, index, f"names {shown(name)}, no safetensors file", AGAIN
            ))  # fmt: skip
        shards[name] = open_safetensors(path, caller=caller)
    for shard, tensors in shards.items():
        listed = {name for name, place in where.items() if place == shard}
        if wrong := sorted(listed ^ tensors.keys()):
            side = "does not list" if wrong[0] in tensors else "lists in vain"
            raise fault(caller, index, f"{side} {shown(wrong[0])} of {shown(shard)}", AGAIN)
    entries = {name: shards[place].entries[name] for name, place in where.items()}
    return Tensors(entries, next(iter(shards.values())).metadata if shards else {})
