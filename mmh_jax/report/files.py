"""Files that are either whole or not there: written under a temporary name, then renamed.

A program that is killed, or a disk that fills up, in the middle of a write leaves the old file or
none.  The temporary name is fixed, so that what a killed run left is overwritten by the next.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "hash_of",
    "kept_array",
    "read_array",
    "read_json",
    "replacing",
    "write_array",
    "write_csv",
    "write_json",
]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` if nothing was raised.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "number.txt"
    >>> with replacing(path) as partial:
    ...     _ = partial.write_text("1")
    >>> path.read_text(), partial.exists()
    ('1', False)
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it was full for
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (NaN and infinite numbers are refused), indented."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing or holds anything else."""
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_csv(path: str | Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Write columns of equal length; real numbers with seven significant digits."""

    def text(value: Any) -> str:
        return f"{value:.7g}" if isinstance(value, float | np.floating) else str(value)

    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([text(value) for value in row])


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write one array as `.npy`."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: str | Path) -> np.ndarray | None:
    """Read one array from `.npy`; None if the file is missing or damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None


def kept_array(path: Path, make: Callable[[], Any]) -> np.ndarray:
    """What `make` returns, or returned in an earlier call: kept as `.npy`."""
    found = read_array(path)
    if found is None:
        found = np.asarray(make())
        write_array(path, found)
    return found


def hash_of(content: np.ndarray | Path) -> str:
    """SHA-256 of an array's values, or of a file."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
