r"""Arrays in files: NumPy's `.npy` and `.npz`, and idx, in which MNIST is published.

An idx file is two zero bytes, a byte for the type of the numbers, a byte for the number of axes,
the length of each axis as four bytes, the most significant first, then the numbers.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mmh_jax.data.files import (
    Read,
    check_unpacked,
    damage_reported,
    fault_of,
    open_unpacked,
    refuse_split,
)
from mmh_jax.data.hashes import verify

__all__ = ["is_idx", "read_idx", "read_npy", "read_npz", "with_faces"]

_POINT_KEYS = ("points", "images", "x")
_LABEL_KEYS = ("labels", "y")
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_npy(path: Path, max_points: int | None, split: str | None) -> Read:
    """The array (N, ...), mapped: only the rows that are kept are read.

    `lfw_subset.npy` of scikit-image is known by its content; label 1 are its faces.
    """
    refuse_split(path, split, "a .npy file")
    cure = "Write numbers, with `np.save`."
    with damage_reported(path, "is truncated, holds Python objects, or is no .npy file", cure):
        # Mapped also so that nothing can be unpickled, and that a header which promises more than
        # the file holds is found before memory is taken.
        array = np.lib.format.open_memmap(path, mode="r")
    return with_faces(array, verify((path,)))


def with_faces(array: np.ndarray, verified: bool | None) -> Read:
    """An array, with labels if it is `lfw_subset.npy`: its first 100 are faces, the others not."""
    if not verified:
        return Read(array, verified=verified)
    is_face = (np.arange(len(array)) < 100).astype(np.int64)
    return Read(array, is_face, ("other", "face"), verified=True)


def read_npz(path: Path, max_points: int | None, split: str | None) -> Read:
    """Key `points`, `images` or `x`, or the only array; labels under `labels` or `y`.

    With a split also `x_train` and `y_train`, `train_images` and `train_labels`; an archive that
    has no other points is read at its training part.
    """
    fault = "is truncated, holds Python objects, or is no .npz file"
    cure = "Write numbers, with `np.savez`."
    with damage_reported(path, fault, cure), zipfile.ZipFile(path) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    check_unpacked(path, num_bytes)
    with damage_reported(path, fault, cure), np.load(path, allow_pickle=False) as arrays:
        found = _keys(arrays.files, split)
        if found is not None:
            points, labels = found
            return Read(
                np.asarray(arrays[points]), None if labels is None else np.asarray(arrays[labels])
            )
        keys = sorted(arrays.files)
    if split is not None:
        raise fault_of(
            path,
            f"holds the arrays {keys}, no split {split!r}",
            f"Save its points under `x_{split}` and its labels under `y_{split}`.",
        )
    raise fault_of(
        path,
        f"holds the arrays {keys}, none of them called {' or '.join(_POINT_KEYS)}",
        "Save the points under the key `points`.",
    )


def _keys(keys: list[str], split: str | None) -> tuple[str, str | None] | None:
    """The key of the points and that of the labels."""
    part = split or "train"
    of_split = ((f"x_{part}", f"y_{part}"), (f"{part}_images", f"{part}_labels"))
    for point_key, label_key in of_split:
        if point_key in keys and (split or not set(_POINT_KEYS) & set(keys)):
            return point_key, label_key if label_key in keys else None
    if split is not None:
        return None
    point_key = next((key for key in _POINT_KEYS if key in keys), None)
    if point_key is None and len(keys) == 1:
        point_key = keys[0]
    if point_key is None:
        return None
    return point_key, next((key for key in _LABEL_KEYS if key in keys and key != point_key), None)


def is_idx(path: Path) -> bool:
    """Whether a file, perhaps gzipped, begins as an idx file does."""
    try:
        with open_unpacked(path) as file:
            magic = file.read(4)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _IDX_TYPES and magic[3] > 0


def read_idx(path: Path, max_points: int | None, split: str | None = None) -> Read:
    """An idx array, and the labels that lie beside it: `...labels-idx1...` by `...images-idx3...`.

    MNIST and FashionMNIST are compared with their published hashes.
    """
    refuse_split(path, split, "an idx file")
    points = _read_idx_array(path, max_points)
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name)
    beside = [path.with_name(name), path.with_name(f"{name}.gz")]
    beside.append(path.with_name(name.removesuffix(".gz")))
    labels_path = next((file for file in beside if file != path and file.is_file()), None)
    if name == path.name or labels_path is None:
        return Read(points, verified=verify((path,)))
    labels = _read_idx_array(labels_path, max_points)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise fault_of(
            labels_path,
            f"has {labels.ndim} axes of {labels.dtype}; labels are a vector of integers from 0",
            "Download it or write it again.",
        )
    return Read(points, labels.astype(np.int64), verified=verify((path, labels_path)))


def _read_idx_array(path: Path, max_points: int | None) -> np.ndarray:
    fault, cure = "is truncated or damaged", "Download it or write it again."
    with damage_reported(path, fault, cure), open_unpacked(path) as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not magic[3]:
            raise ValueError("it does not begin as an idx file does")
        dtype = np.dtype(_IDX_TYPES[magic[2]])
        shape = tuple(int(size) for size in np.frombuffer(file.read(4 * magic[3]), ">u4", magic[3]))
    kept = (min(shape[0], max_points or shape[0]), *shape[1:])
    num_bytes = math.prod(kept) * dtype.itemsize
    check_unpacked(path, num_bytes)
    with damage_reported(path, fault, cure), open_unpacked(path) as file:
        file.seek(4 + 4 * magic[3])
        array = np.frombuffer(file.read(num_bytes), dtype).reshape(kept)
        # Only a reader that meets the end of a gzip file compares its checksum.
        if kept == shape and file.read(1):
            raise ValueError("it is longer than its header says")
    return array
