"""Folders of pictures, and the data sets of Hugging Face `datasets`.

Pictures are decoded by Pillow, by a short list of its decoders, to bytes: (H, W) if grey,
(H, W, 3) if in colour; what is transparent is shown on white.  All of a set have one size.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from mmh_jax.data.files import PathLike, Read, damage_reported, fault_of, refuse_split

__all__ = [
    "HUGGING_FACE",
    "IMAGE_SUFFIXES",
    "images_in",
    "is_hugging_face",
    "read_folder",
    "read_hugging_face",
    "read_image",
]

# Named, so that a file that only pretends to be a PNG never reaches Pillow's PostScript decoder,
# which starts another program.
_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What a picture in a folder ends in."""

HUGGING_FACE = "hf:"
"""The word before the name of a data set on the Hugging Face hub."""

_Named: TypeAlias = tuple[str, Callable[[], Any]]


def read_folder(path: Path, max_points: int | None, split: str | None) -> Read:
    """The pictures of a folder; or, if it has none itself, those of its subfolders, one a class.

    Labels are the numbers of the subfolders in alphabetical order; those without a picture count.
    With `max_points` the first of all classes are kept, the first class first.
    """
    refuse_split(path, split, "a folder of images")
    files, labels, names = images_in(path), None, None
    if not files:
        classes = sorted(
            (item for item in path.iterdir() if item.is_dir() and item.name[0] != "."),
            key=lambda item: item.name,
        )
        members = [images_in(folder) for folder in classes]
        files = [file for group in members for file in group]
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in members])
        names = tuple(folder.name for folder in classes)
    if not files:
        raise fault_of(
            path,
            "is a folder without images",
            f"Put in it files that end in {' '.join(IMAGE_SUFFIXES)}, or one folder of them for "
            "each class; folders further within are not searched.",
        )
    chosen = files[:max_points]
    named = ((os.path.relpath(file, path), _opener(file)) for file in chosen)
    points = _stack(path, len(chosen), named)
    return Read(points, None if labels is None else labels[: len(chosen)], names)


def images_in(path: Path) -> list[Path]:
    """The pictures that lie in a folder itself, in the order of their names."""
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "." and file.is_file()
    )


def _opener(file: Path) -> Callable[[], Any]:
    return lambda: read_image(file, file)


def _stack(source: PathLike, count: int, images: Iterable[_Named]) -> np.ndarray:
    """All images in one array, or which of them differs from the first."""
    points, first = np.empty(0, np.uint8), ""
    for index, (name, read) in enumerate(images):
        image = read()
        if index == 0:
            first, points = name, np.empty((count, *image.shape), np.uint8)
        if image.shape != points.shape[1:]:
            raise fault_of(
                source,
                f"mixes images: {first!r} is {_describe(points[0])}, {name!r} is "
                f"{_describe(image)}",
                "Bring all to one size, and make all grey or all colour.",
            )
        points[index] = image
    return points


def _describe(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]} {'grey' if image.ndim == 2 else 'colour'}"


def read_image(source: PathLike, file: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) bytes of a picture.

    Args:
        source: to name in an error.
        file: a path, or an open file.

    Raises:
        ValueError: if it cannot be read.
    """
    cure = "Remove it, or save it again as an 8-bit PNG."
    with (
        damage_reported(source, "cannot be read as an image", cure),
        Image.open(file, formats=_IMAGE_FORMATS) as image,
    ):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}, more than 8 bits in a channel")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert(mode))
        return np.asarray(image.convert(mode))


def is_hugging_face(path: Path) -> bool:
    """Whether `datasets` saved this folder, with `save_to_disk`."""
    saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return saved or (path / "dataset_dict.json").is_file()


def read_hugging_face(source: PathLike, max_points: int | None, split: str | None) -> Read:
    """A folder that `datasets` saved, or `hf:NAME` from the hub: its first column of images.

    Labels are the first column of the kind `ClassLabel`.  The images are decoded here, not by
    `datasets`.  From version 4 on `datasets` runs no program that comes with a data set; earlier
    ones are refused.
    """
    datasets = _import_datasets(source)
    name = os.fspath(source)
    fault = "cannot be read by Hugging Face `datasets`"
    with damage_reported(source, fault, "Check its name, and that it can be reached."):
        if name.startswith(HUGGING_FACE):
            data = datasets.load_dataset(name.removeprefix(HUGGING_FACE), split=split or "train")
        else:
            data = datasets.load_from_disk(name)
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise fault_of(
                source, f"has the splits {sorted(data)}, no {split or 'train'!r}", "Pass `split=`."
            )
        data = data[split or "train"]
    elif split is not None and not name.startswith(HUGGING_FACE):
        refuse_split(Path(name), split, "one saved part")
    return _rows_of(source, datasets, data, max_points)


def _import_datasets(source: PathLike) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise fault_of(
            source,
            "needs Hugging Face `datasets`, which is not installed",
            "`pip install 'mmh-jax[hf]'`.",
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise fault_of(
            source,
            f"would be read by `datasets` {datasets.__version__}, which may run programs that come "
            "with a data set",
            "`pip install 'datasets>=4'`.",
        )
    return datasets


def _rows_of(source: PathLike, datasets: Any, data: Any, max_points: int | None) -> Read:
    kinds = data.features
    column = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise fault_of(
            source,
            f"has the columns {sorted(kinds)}, none of them of images",
            "Save the points as a .npz file.",
        )
    if max_points is not None:
        data = data.select(range(min(max_points, len(data))))
    raw = data.cast_column(column, datasets.Image(decode=False))[column]
    named = ((f"row {index}", _cell_reader(source, cell)) for index, cell in enumerate(raw))
    points = _stack(source, len(data), named)
    label = next((name for name in kinds if isinstance(kinds[name], datasets.ClassLabel)), None)
    if label is None:
        return Read(points)
    names = tuple(kinds[label].names)
    labels = np.array([-1 if value is None else value for value in data[label]], np.int64)
    if np.any((labels < 0) | (labels >= len(names))):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(names)))[0])
        raise fault_of(
            source,
            f"has labels out of range: {labels[row]} in row {row}, where 0 to {len(names) - 1} "
            "are known",
            "Leave out the rows without a label, with `filter`.",
        )
    return Read(points, labels, names)


def _cell_reader(source: PathLike, cell: Any) -> Callable[[], Any]:
    """Of `{"bytes": ..., "path": ...}`: the bytes, or the file."""

    def read() -> np.ndarray:
        if cell is None:
            raise fault_of(source, "has a row without an image", "Leave it out, with `filter`.")
        content = cell["bytes"]
        return read_image(source, io.BytesIO(content) if content else Path(cell["path"]))

    return read
