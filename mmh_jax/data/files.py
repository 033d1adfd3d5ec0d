"""What every reader of a file needs: errors that name the file, gzip, and a limit on what unpacks.

Everything that is read is treated as data: a reader never unpickles and never runs anything, and
what a library raises on a bad file becomes one `ValueError` that says what is wrong with the file
and what to do.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias, cast

import numpy as np
from PIL import Image

__all__ = ["MAX_UNPACKED_BYTES", "PathLike", "Read", "check_unpacked", "damage_reported"]
__all__ += ["fault_of", "is_pickle", "open_unpacked", "refuse_split"]

PathLike: TypeAlias = str | os.PathLike[str]

MAX_UNPACKED_BYTES = 16 * 2**30
"""A compressed file may not expand beyond this: a few kilobytes could otherwise fill the memory."""


class Read(NamedTuple):
    """What a reader found, before it is brought to data units.

    Attributes:
        array: (N, ...) bytes, or floats in data units.
        labels: (N,), or None.
        class_names: the name of each label 0, 1, ..., or None.
        coarse_labels: (N,), or None.
        verified: as in `Source`.
    """

    array: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    coarse_labels: np.ndarray | None = None
    verified: bool | None = None


def fault_of(source: PathLike, fault: str, cure: str) -> ValueError:
    """The error that every reader raises: `load(source=...)`, the fault, the cure."""
    return ValueError(f"`load(source={os.fspath(source)!r})` {fault}. {cure}")


def refuse_split(path: Path, split: str | None, what: str) -> None:
    """Say that a source has no splits, if one is asked for.

    Raises:
        ValueError: if `split` is not None.
    """
    if split is not None:
        raise fault_of(
            path,
            f"is {what}, which has no split {split!r}",
            "Pass the folder in which both parts of a published set lie, or leave `split` out.",
        )


@contextlib.contextmanager
def damage_reported(path: PathLike, fault: str, cure: str) -> Iterator[None]:
    """Turn what libraries raise on a bad file into one error that says what to do."""
    try:
        yield
    except PermissionError:
        raise
    except (
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        SyntaxError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        text = str(error).strip() or type(error).__name__
        raise fault_of(path, f"{fault} ({text.splitlines()[0].rstrip('.')})", cure) from error


def check_unpacked(path: PathLike, num_bytes: int) -> None:
    """Refuse a file that would take more memory than `MAX_UNPACKED_BYTES`."""
    if num_bytes > MAX_UNPACKED_BYTES:
        raise fault_of(
            path,
            f"unpacks to {num_bytes / 2**30:.3g} GiB, above the limit of "
            f"{MAX_UNPACKED_BYTES / 2**30:.3g} GiB",
            "If it is what you expect, save it as a .npy file, which is not compressed.",
        )


def open_unpacked(path: Path) -> IO[bytes]:
    """The file, through gzip if it is gzipped, whatever its name."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else path.open("rb")


def is_pickle(path: Path) -> bool:
    """Whether a file begins as pickles of protocol 2 to 5 do."""
    with path.open("rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5
