r"""Reading a published folder as data: its JSON files, and names that may not leave it.

Nothing that a file says is believed before it is checked: a JSON file has a limit on its length,
and a name that stands in a file (a component, a part of the weights) must be one in the folder.
Pickles are refused unread, with a recipe of how to convert them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmh_jax.data.files import PathLike

__all__ = ["MAX_JSON_BYTES", "fault", "read_json", "within"]

MAX_JSON_BYTES = 16 * 2**20
"""Of a configuration, a vocabulary or an index; the largest published ones have about 4 MiB."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "Download it again, and compare its size with that of the source."


def fault(caller: str, path: PathLike, what: str, cure: str) -> ValueError:
    """The error of every reader here: "`load(path='unet/config.json')` is ...; <cure>".

    >>> print(fault("load", "config.json", "is empty", "Download it again."))
    `load(path='config.json')` is empty. Download it again.
    """
    return ValueError(f"`{caller}(path={shown(os.fspath(path))})` {what}. {cure}")


def shown(value: Any, limit: int = 200) -> str:
    """What stands in a file, for a message: quoted, and not longer than a line or two."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def absent(caller: str, path: PathLike, what: str, cure: str) -> FileNotFoundError:
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
            caller, folder, f"names a file {shown(name)}, which is no plain name in the folder",
            "Names may not contain separators; do not use this folder if you did not write it.",
        )  # fmt: skip
    path = folder / name
    if path.is_symlink() or folder.is_symlink():
        try:
            target = path.resolve(strict=path.is_symlink())  # a loop is an error
            roots = _allowed(folder.resolve())
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
        raise absent(caller, path, "does not exist", "Copy the whole folder of the model.")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise fault(
            caller, path, f"has more than {max_bytes:,} bytes", "It is no file of a model's folder."
        )
    return parsed(content, path, caller, "is no JSON object")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def parsed(content: bytes, path: Path, caller: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        text = shown(str(error))[1:-1]
        raise fault(caller, path, f"{what} ({text})", AGAIN) from None
    if not isinstance(found, dict):
        raise fault(caller, path, f"{what}, but a {type(found).__name__}", AGAIN)
    return found


# Pickles


def pickled(path: Path, caller: str) -> ValueError:
    return fault(
        caller, path,
        "is a pickle, which can run any program when it is read, and is not read here",
        "Convert it where you trust it: `from safetensors.torch import save_file; "
        "save_file({k: v.contiguous() for k, v in torch.load(path, weights_only=True).items()}, "
        f"'{path.stem[:80]}.safetensors')`, or look for a published .safetensors file.",
    )  # fmt: skip
