r"""What a published pipeline is asked for: prompts, or pictures, with prompts or without.

A file of prompts, or of pictures, is JSON Lines: on each line an object, or a prompt alone,

    {"prompt": "a dog", "image": "dogs/1.png", "memorized": true}
    "a dog"

`caption` is read as `prompt`; `image` is a file, relative to the folder of the list; `memorized` is
what the user knows, and serves to say how well scores find it.  Other fields are not read.  For
pictures a folder will do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmh_jax.data.pictures import images_in, read_image

__all__ = ["Asked", "picture", "read_pictures", "read_prompts"]

MOST_BYTES = 1 << 20  # of a line


class Asked(NamedTuple):
    """One line.

    Attributes:
        prompt: or None.
        image: a file, or None.
        memorized: whether it is known to be memorized; None where that is not said.
    """

    prompt: str | None
    image: Path | None
    memorized: bool | None


def read_prompts(path: Path) -> list[Asked]:
    """The lines of a file of prompts, each with a prompt.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line that is wrong, with its number.
    """
    found = _lines("--prompts", path)
    for number, asked in found:
        if asked.prompt is None:
            raise _wrong("--prompts", path, number, "has no `prompt`")
    return [asked for _, asked in found]


def read_pictures(path: Path) -> list[Asked]:
    """The lines of a file of pictures, or the pictures of a folder in the order of their names.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: for a line that is wrong, a picture that is missing, or none at all.
    """
    if path.is_dir():
        files = images_in(path)
        if not files:
            raise ValueError(f"--images {path} holds no pictures, such as .png or .jpg files.")
        return [Asked(None, file, None) for file in files]
    found = _lines("--images", path)
    for number, asked in found:
        if asked.image is None:
            raise _wrong("--images", path, number, "has no `image`")
        if not asked.image.is_file():
            raise _wrong("--images", path, number, f"names {asked.image}, which is not there")
    return [asked for _, asked in found]


def _lines(option: str, path: Path) -> list[tuple[int, Asked]]:
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), start=1):
            if len(line) > MOST_BYTES:
                raise _wrong(option, path, number, f"is longer than {MOST_BYTES} bytes")
            if line.strip():
                found.append((number, _parsed(option, path, number, line)))
    if not found:
        raise ValueError(f"{option} {path} is empty; write a JSON object on each line.")
    return found


def _parsed(option: str, path: Path, number: int, line: bytes) -> Asked:
    try:
        said: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise _wrong(option, path, number, "is no JSON") from None
    if isinstance(said, str):
        said = {"prompt": said}
    if not isinstance(said, dict):
        raise _wrong(option, path, number, "is no object")
    prompt, image = said.get("prompt", said.get("caption")), said.get("image")
    for name, value in (("prompt", prompt), ("image", image)):
        if value is not None and not isinstance(value, str):
            raise _wrong(option, path, number, f"has a `{name}` that is no string")
    memorized = said.get("memorized")
    if memorized not in (None, True, False):  # 0 and 1 are equal to these
        raise _wrong(option, path, number, "has a `memorized` that is neither true nor false")
    return Asked(
        prompt,
        None if image is None else path.parent / image,
        None if memorized is None else bool(memorized),
    )


def _wrong(option: str, path: Path, number: int, what: str) -> ValueError:
    return ValueError(
        f"{option} {path}: line {number} {what}; each line is an object such as "
        '{"prompt": "a dog", "image": "1.png", "memorized": false}.'
    )


def picture(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A picture (H, W, C) in [0, 1]: its middle in the proportions of `shape`, brought to its size.

    Raises:
        ValueError: if the file cannot be read as a picture.
    """
    height, width, channels = shape
    image = Image.fromarray(read_image(file, file)).convert("L" if channels == 1 else "RGB")
    scale = min(image.width / width, image.height / height)
    wide, tall = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    # Cut first: `resize` with a box looks beyond it.
    middle = image.crop((left, top, left + wide, top + tall))
    fitted = middle.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32).reshape(shape) / 255
