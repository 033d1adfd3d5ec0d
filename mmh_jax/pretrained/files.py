r"""Reading a folder of published weights as data: JSON and safetensors, never a pickle.

A safetensors file is

    8 bytes, n little-endian | n bytes, a JSON object | the tensors' bytes, one after the other

where the object gives each tensor `{"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}`,
relative to the end of the header.  A large model is split, and `*.safetensors.index.json` says in
its `weight_map` which file holds which tensor.

Nothing that a file says is believed before it is checked against the file itself: the length of the
header against the file's size and a limit, offsets against the size of the data, against each other
and against dtype and shape; names in an index may not leave the folder.  Tensors are views of a
memory map, read when they are used, so that the memory taken does not depend on what a file claims.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax.data.files import PathLike

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_JSON_BYTES",
    "Entry",
    "Tensors",
    "fault",
    "open_safetensors",
    "open_weights",
    "read_json",
    "within",
]

MAX_JSON_BYTES = 16 * 2**20
"""Of a configuration, a vocabulary or an index; the largest published ones have about 4 MiB."""

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
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_AGAIN = "Download it again, and compare its size with that of the source."


def fault(caller: str, path: PathLike, what: str, cure: str) -> ValueError:
    """The error of every reader here: "`load(path='unet/config.json')` is ...; <cure>".

    >>> print(fault("load", "config.json", "is empty", "Download it again."))
    `load(path='config.json')` is empty. Download it again.
    """
    return ValueError(f"`{caller}(path={_shown(os.fspath(path))})` {what}. {cure}")


def _shown(value: Any, limit: int = 200) -> str:
    """What stands in a file, for a message: quoted, and not longer than a line or two."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _absent(caller: str, path: PathLike, what: str, cure: str) -> FileNotFoundError:
    return FileNotFoundError(str(fault(caller, path, what, cure)))


# Names that a file gives must stay in the folder


def _allowed(folder: Path) -> list[Path]:
    """Where a link in this folder may lead: into it, or to the blobs of its hub cache."""
    roots = [folder]
    for parent in [folder, *folder.parents]:
        if parent.parent.name == "snapshots":
            roots.append(parent.parent.parent / "blobs")
            break
    return roots


def within(folder: PathLike, name: Any, *, caller: str) -> Path:
    """The path of `name` in `folder`, if it stays there; for names that stand in a file.

    A link may lead to another place in the folder, and, in a download cache of the Hugging Face
    hub (`snapshots/<revision>/`), to the `blobs` beside `snapshots`, as all files there do.

    Args:
        folder: the folder.
        name: of a file or a folder directly inside.
        caller: the function to name in an error.

    Raises:
        ValueError: if the name has a separator, is absolute or special, or is a link that leads
            out of the folder.

    >>> within("model", "unet", caller="load").as_posix()
    'model/unet'
    """
    folder = Path(folder)
    plain = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..")
    if not plain or any(c in "/\\:\0" or not c.isprintable() for c in name):
        raise fault(
            caller, folder, f"names a file {_shown(name)}, which is no plain name in the folder",
            "Names may not contain separators; do not use this folder if you did not write it.",
        )  # fmt: skip
    path = folder / name
    if path.is_symlink() or folder.is_symlink():
        try:
            target, roots = path.resolve(), _allowed(folder.resolve())
        except (OSError, RuntimeError) as error:
            raise fault(
                caller, path, f"is a broken link ({error})", "Copy the file here."
            ) from None
        if not any(target.is_relative_to(root) for root in roots):
            raise fault(
                caller, path, "is a link that leads out of its folder", "Copy the file there."
            )
    return path


# JSON


def read_json(path: PathLike, *, caller: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        caller: the function to name in an error.
        max_bytes: a longer file is refused before it is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too long, no JSON, or no object.
    """
    path = Path(path)
    if not path.is_file():
        raise _absent(caller, path, "does not exist", "Copy the whole folder of the model.")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise fault(
            caller, path, f"has more than {max_bytes:,} bytes", "It is no file of a model's folder."
        )
    return _parsed(content, path, caller, "is no JSON object")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_shown(twice)} is there twice")
    return found


def _parsed(content: bytes, path: Path, caller: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        text = _shown(str(error))[1:-1]
        raise fault(caller, path, f"{what} ({text})", _AGAIN) from None
    if not isinstance(found, dict):
        raise fault(caller, path, f"{what}, but a {type(found).__name__}", _AGAIN)
    return found


# Safetensors


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
    wrong = functools.partial(fault, caller, path, cure=_AGAIN)
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(said, dict) or said.keys() != fields:
        raise wrong(f"has no dtype, shape and data_offsets for {_shown(name)} in its header")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(
            caller, path, f"holds {_shown(name)} as {_shown(dtype, 40)}, which is not read here",
            f"Convert it; read are {', '.join(_DTYPES)}.",
        )  # fmt: skip
    if not isinstance(shape, list) or len(shape) > _MAX_NESTING or not all(map(_is_size, shape)):
        raise wrong(f"gives {_shown(name)} the shape {_shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"gives {_shown(name)} the offsets {_shown(offsets)}")
    begin, end = offsets
    if not begin <= end:
        raise wrong(f"gives {_shown(name)} the offsets {offsets}, of which the second is smaller")
    if start + end > size:
        raise wrong(
            f"is truncated: {_shown(name)} ends at byte {start + end:,}, the file at {size:,}"
        )
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if needed != end - begin:
        raise wrong(
            f"gives {_shown(name)} {end - begin:,} bytes; {dtype} of shape {shape} takes {needed:,}"
        )
    return Entry(path, _DTYPES[dtype], tuple(shape), start + begin, start + end)


def _check_tiling(
    entries: dict[str, Entry], path: Path, start: int, size: int, caller: str
) -> None:
    """Tensors follow each other without overlap or gap, to the end of the file."""
    place, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < place:
            raise fault(caller, path, f"lets {_shown(name)} overlap with {before}", _AGAIN)
        if entry.begin > place:
            raise fault(caller, path, f"has a gap between {before} and {_shown(name)}", _AGAIN)
        place, before = entry.end, _shown(name)
    if place != size:
        raise fault(caller, path, f"has {size - place:,} bytes after its last tensor", _AGAIN)


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
    if path.suffix.lower() in _PICKLES:
        raise _pickled(path, caller)
    if not path.is_file():
        raise _absent(caller, path, "does not exist", "Copy the whole folder of the model.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise fault(
                caller, path,
                f"is truncated or no safetensors file: it has {size:,} bytes, and claims a header "
                f"of {length:,}", _AGAIN,
            )  # fmt: skip
        if length > MAX_HEADER_BYTES:
            raise fault(
                caller, path, f"claims a header of {length:,} bytes, above {MAX_HEADER_BYTES:,}",
                "No published model has such a one; do not use this file.",
            )  # fmt: skip
        header = _parsed(file.read(length), path, caller, "has a damaged header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fault(caller, path, "has `__metadata__` that are no texts", _AGAIN)
    start = 8 + length
    entries = {name: _entry(name, said, path, start, size, caller) for name, said in header.items()}
    _check_tiling(entries, path, start, size, caller)
    return Tensors(entries, metadata)


def _pickled(path: Path, caller: str) -> ValueError:
    return fault(
        caller, path,
        "is a pickle, which can run any program when it is read, and is not read here",
        "Convert it where you trust it: `from safetensors.torch import save_file; "
        "save_file({k: v.contiguous() for k, v in torch.load(path, weights_only=True).items()}, "
        f"'{path.stem[:80]}.safetensors')`, or look for a published .safetensors file.",
    )  # fmt: skip


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
    pickles = [name for name in found if name.lower().endswith(_PICKLES)]
    others = [name for name in found if name.endswith(".safetensors")]
    if pickles and not others:
        raise _pickled(folder / pickles[0], caller)
    cure = f"There is {_shown(others[0])}; name its variant." if others else "Copy it there."
    raise _absent(caller, folder, f"has no {single.name}", cure)


def _open_sharded(folder: Path, index: Path, caller: str) -> Tensors:
    """All tensors that an index lists, each from the file that it names, and no others."""
    where = read_json(index, caller=caller).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise fault(caller, index, "has no `weight_map` from tensors to files", _AGAIN)
    shards: dict[str, Tensors] = {}
    for name in dict.fromkeys(where.values()):
        path = within(folder, name, caller=caller)
        if not name.endswith(".safetensors"):
            raise (_pickled(path, caller) if name.lower().endswith(_PICKLES) else fault(
                caller, index, f"names {_shown(name)}, no safetensors file", _AGAIN
            ))  # fmt: skip
        shards[name] = open_safetensors(path, caller=caller)
    for shard, tensors in shards.items():
        listed = {name for name, place in where.items() if place == shard}
        if wrong := sorted(listed ^ tensors.keys()):
            side = "does not list" if wrong[0] in tensors else "lists in vain"
            raise fault(caller, index, f"{side} {_shown(wrong[0])} of {_shown(shard)}", _AGAIN)
    entries = {name: shards[place].entries[name] for name, place in where.items()}
    return Tensors(entries, next(iter(shards.values())).metadata if shards else {})
