r"""Data sets from files: one word or path in, points in data units out.

| source                        | points                                           | units        |
|-------------------------------|--------------------------------------------------|--------------|
| the word `digits`             | 1,797 digits of 8 x 8 pixels                     | levels / 16  |
| a `.npy` file                 | the array (N, ...)                               | see below    |
| a `.npz` file                 | key `points`, `images` or `x`, or the only array | see below    |
| an idx file, plain or gzipped | the array (N, ...), as MNIST is published        | see below    |
| a folder of images            | (N, H, W) if grey, (N, H, W, 3) if in colour     | bytes / 255  |

Arrays of bytes are divided by 255, arrays of floats are taken as they are.  Everything that is read
is treated as data: pickles are refused, images are read by a short list of decoders, and compressed
files may not expand without limit.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias, cast

import numpy as np
from PIL import Image

__all__ = ["Source", "load"]

_Read: TypeAlias = tuple[np.ndarray, np.ndarray | None]

# Named, so that a file that only pretends to be a PNG never reaches Pillow's PostScript decoder,
# which starts another program.
_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff")
_IMAGE_SUFFIXES += (".webp",)
_POINT_KEYS = ("points", "images", "x")
_LABEL_KEYS = ("labels", "y")
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_UNPACKED_BYTES = 16 * 2**30


class Source(NamedTuple):
    """A data set in host memory.

    Attributes:
        points: (N, *shape) float32, in data units.
        name: the word `digits`, or the name of the file or folder, without extension.
        labels: (N,) as the source has them, or None.
        is_image: whether a point is a picture: shape (H, W) or (H, W, 3), values in [0, 1].
        value_range: (0, 1) for pictures and bytes; otherwise the least and the largest value found.
    """

    points: np.ndarray
    name: str
    labels: np.ndarray | None
    is_image: bool
    value_range: tuple[float, float]


def load(source: str | os.PathLike[str], *, max_points: int | None = None) -> Source:
    """Read a data set: the word `digits`, a `.npy`, `.npz` or idx file, or a folder of images.

    Labels come with `digits`, with an `.npz` file that has a key `labels` or `y`, and with an idx
    file `...images-idx3...` beside which lies `...labels-idx1...`.

    Args:
        source: the word or the path.  The word wins over a folder of that name; `./digits` is the
            folder.  In a folder of images those whose name begins with a dot are passed over,
            folders within it are not searched, and what is transparent is shown on white.
        max_points: keep only so many points, at least 2: the first in the file, or in the
            alphabetical order of the images.  Except from an `.npz` file, no more are read.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the source is of an unknown kind, damaged or truncated; if it holds Python
            objects, integers other than bytes, NaN or infinite values, fewer than 2 points, or the
            same point throughout; if the images of a folder differ in size or in colour.

    >>> digits = load("digits", max_points=100)
    >>> digits.points.shape, digits.value_range, digits.is_image
    ((100, 8, 8), (0.0, 1.0), True)
    """
    if max_points is not None and (not isinstance(max_points, int) or max_points < 2):
        raise ValueError(f"`load(max_points={max_points!r})` must be None or an integer above 1.")
    if source == "digits":
        name, (array, labels) = "digits", _read_digits()
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"`load(source={os.fspath(source)!r})` does not exist; it was looked for in "
                f"{os.getcwd()!r}. Correct the path, or pass the word 'digits'."
            )
        array, labels = _reader(path)(path, max_points)
        name = _name(path)
    if array.ndim < 2 or array.size == 0:
        raise _error(
            source,
            f"has shape {array.shape}; a data set is an array (N, ...) of N points",
            "Save N points, or N numbers as (N, 1).",
        )
    if labels is not None and labels.shape != array.shape[:1]:
        raise _error(
            source,
            f"has {len(array)} points but labels of shape {labels.shape}",
            "Save one label for each point, or none.",
        )
    points = _in_data_units(source, array[:max_points])
    _check_points(source, points)
    low, high = float(points.min()), float(points.max())
    is_picture = points.ndim == 3 or (points.ndim == 4 and points.shape[-1] == 3)
    is_image = is_picture and low >= 0 and high <= 1
    value_range = (0.0, 1.0) if is_image or array.dtype == np.uint8 else (low, high)
    return Source(
        points, name, None if labels is None else labels[:max_points], is_image, value_range
    )


def _error(source: str | os.PathLike[str], fault: str, cure: str) -> ValueError:
    return ValueError(f"`load(source={os.fspath(source)!r})` {fault}. {cure}")


@contextlib.contextmanager
def _damage_reported(path: Path, fault: str, cure: str) -> Iterator[None]:
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
        raise _error(path, f"{fault} ({text.splitlines()[0].rstrip('.')})", cure) from error


def _name(path: Path) -> str:
    path = path.resolve()
    if path.is_dir():
        return path.name
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def _reader(path: Path) -> Callable[[Path, int | None], _Read]:
    if path.is_dir():
        return _read_folder
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _read_npy
    if suffix == ".npz":
        return _read_npz
    if path.is_file() and _is_idx(path):
        return _read_idx
    cure = "Pass a .npy, .npz or idx file, a folder of images, or the word 'digits'."
    if suffix in _IMAGE_SUFFIXES:
        cure = "For a set of images pass the folder that holds them."
    raise _error(path, "is of an unknown kind", cure)


def _in_data_units(source: str | os.PathLike[str], array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # what overflows is reported as infinite afterwards
            return array.astype(np.float32)
    raise _error(
        source,
        f"has dtype {array.dtype}, so its units are not known",
        "Save it as uint8 if it holds bytes 0 ... 255, otherwise as float32 in the units you mean.",
    )


def _check_points(source: str | os.PathLike[str], points: np.ndarray) -> None:
    """Refuse what no estimator could use."""
    if len(points) < 2:
        raise _error(source, "has only 1 point", "Dimension needs others around: at least 2.")
    bad = ~np.isfinite(points).reshape(len(points), -1)
    if bad.any():
        rows = np.flatnonzero(bad.any(axis=1))
        raise _error(
            source,
            f"has {bad.sum()} values that are NaN or infinite in float32, in {len(rows)} of "
            f"{len(points)} rows, row {rows[0]} the first",
            "Remove these rows, or mend the program that wrote them.",
        )
    if np.all(points == points[0]):
        raise _error(
            source,
            f"is constant: its {len(points)} points are all the same",
            "Check how it was written; there is nothing to learn from it.",
        )


def _read_digits() -> _Read:
    from sklearn.datasets import load_digits  # here, because the import takes a second

    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16, np.asarray(labels)


def _read_npy(path: Path, max_points: int | None) -> _Read:
    cure = "Write numbers, with `np.save`."
    with _damage_reported(path, "is truncated, holds Python objects, or is no .npy file", cure):
        # Mapped, so that only the rows that are kept are read, that nothing can be unpickled, and
        # that a header which promises more than the file holds is found before memory is taken.
        return np.lib.format.open_memmap(path, mode="r"), None


def _read_npz(path: Path, max_points: int | None) -> _Read:
    fault = "is truncated, holds Python objects, or is no .npz file"
    cure = "Write numbers, with `np.savez`."
    with _damage_reported(path, fault, cure), zipfile.ZipFile(path) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    _check_unpacked(path, num_bytes)
    with _damage_reported(path, fault, cure), np.load(path, allow_pickle=False) as arrays:
        keys = arrays.files
        point_key = next((key for key in _POINT_KEYS if key in keys), None)
        if point_key is None and len(keys) == 1:
            point_key = keys[0]
        label_key = next((key for key in _LABEL_KEYS if key in keys and key != point_key), None)
        if point_key is not None:
            labels = None if label_key is None else np.asarray(arrays[label_key])
            return np.asarray(arrays[point_key]), labels
    raise _error(
        path,
        f"holds the arrays {sorted(keys)}, none of them called {' or '.join(_POINT_KEYS)}",
        "Save the points under the key `points`.",
    )


def _check_unpacked(path: Path, num_bytes: int) -> None:
    if num_bytes > _MAX_UNPACKED_BYTES:
        raise _error(
            path,
            f"unpacks to {num_bytes / 2**30:.3g} GiB, above the limit of "
            f"{_MAX_UNPACKED_BYTES / 2**30:.3g} GiB",
            "If it is what you expect, save it as a .npy file, which is not compressed.",
        )


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else path.open("rb")


def _is_idx(path: Path) -> bool:
    try:
        with _open(path) as file:
            magic = file.read(4)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _IDX_TYPES and magic[3] > 0


def _read_idx(path: Path, max_points: int | None) -> _Read:
    points = _read_idx_array(path, max_points)
    labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if labels_path == path or not labels_path.is_file():
        return points, None
    return points, _read_idx_array(labels_path, max_points).astype(np.int64)


def _read_idx_array(path: Path, max_points: int | None) -> np.ndarray:
    """An idx array: two zero bytes, the type, the number of axes, the axes, then the numbers."""
    fault, cure = "is truncated or damaged", "Download it or write it again."
    with _damage_reported(path, fault, cure), _open(path) as file:
        magic = file.read(4)
        dtype = np.dtype(_IDX_TYPES[magic[2]])
        shape = tuple(int(size) for size in np.frombuffer(file.read(4 * magic[3]), ">u4", magic[3]))
    kept = (min(shape[0], max_points or shape[0]), *shape[1:])
    num_bytes = math.prod(kept) * dtype.itemsize
    _check_unpacked(path, num_bytes)
    with _damage_reported(path, fault, cure), _open(path) as file:
        file.seek(4 + 4 * magic[3])
        array = np.frombuffer(file.read(num_bytes), dtype).reshape(kept)
        # Only a reader that meets the end of a gzip file compares its checksum.
        if kept == shape and file.read(1):
            raise ValueError("it is longer than its header says")
    return array


def _read_folder(path: Path, max_points: int | None) -> _Read:
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in _IMAGE_SUFFIXES and file.name[0] != "." and file.is_file()
    )[:max_points]
    if not files:
        raise _error(
            path,
            "is a folder without images",
            f"Put in it files that end in {' '.join(_IMAGE_SUFFIXES)}; folders within it are not "
            "searched.",
        )
    first = _read_image(files[0])
    points = np.empty((len(files), *first.shape), np.uint8)
    for index, file in enumerate(files):
        image = _read_image(file)
        if image.shape != first.shape:
            raise _error(
                path,
                f"mixes images: {files[0].name!r} is {_describe(first)}, {file.name!r} is "
                f"{_describe(image)}",
                "Bring all to one size, and make all grey or all colour.",
            )
        points[index] = image
    return points, None


def _describe(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]} {'grey' if image.ndim == 2 else 'colour'}"


def _read_image(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 3) bytes."""
    cure = "Remove it from the folder, or save it again as an 8-bit PNG."
    with (
        _damage_reported(path, "cannot be read as an image", cure),
        Image.open(path, formats=_IMAGE_FORMATS) as image,
    ):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}, more than 8 bits in a channel")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert(mode))
        return np.asarray(image.convert(mode))
