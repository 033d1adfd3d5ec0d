"""Output folders: whose they are, what may be replaced, and where a killed run left off.

    folder/<final>              written last: its presence means that the work is finished
    folder/<products>
    folder/.work/settings.json  written first: which run the partial results beside it belong to

Only files with these names are ever replaced or deleted, and only where one of the two JSON files
says that this package wrote them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mmh_jax.report.files import read_json, replacing, write_json
from mmh_jax.train import store

__all__ = [
    "AUDIT",
    "DATA_MEASUREMENT",
    "DETECTION",
    "MEASUREMENT",
    "MITIGATION",
    "MODEL",
    "PROMPTS",
    "SAMPLING",
    "Kind",
    "check_file",
    "check_output",
    "check_writable",
    "claim",
    "is_begun",
    "replace",
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a folder is for.

    Attributes:
        name: in messages.
        format: the value of `format` in the final file.
        final: the JSON file that is written last.
        products: the other files and folders.
        replaced_last: whether finished work stays until what replaces it is finished, too.
    """

    name: str
    format: str
    final: str
    products: tuple[str, ...]
    replaced_last: bool = False


AUDIT = Kind(
    "audit",
    "mmh_jax.audit/2",
    "summary.json",
    ("points.csv", "points.parquet", "report.html", "samples.npz", "lid.png", "model"),
)
SAMPLING = Kind(
    "sampling",
    "mmh_jax.sampling/1",
    "summary.json",
    ("samples.csv", "samples.npz", "grid.png"),
)
MITIGATION = Kind(
    "mitigation",
    "mmh_jax.mitigation/1",
    "summary.json",
    ("frontier.csv", "frontier.png", "samples"),
)
PROMPTS = Kind(
    "mitigation",
    "mmh_jax.mitigation_of_prompts/1",
    "summary.json",
    ("table.csv", "tradeoff.png", "pictures"),
)
# Of a file, in a folder beside it that is gone when the file is there.
MEASUREMENT = Kind("measurement", "mmh_jax.lid/1", "finished.json", ())
DATA_MEASUREMENT = Kind("measurement", "mmh_jax.lid_data/1", "finished.json", ())
DETECTION = Kind("detection", "mmh_jax.detection/1", "finished.json", ())
MODEL = Kind(
    "model",
    store.FORMAT,
    "config.json",
    ("params.safetensors", "metrics.jsonl"),
    replaced_last=True,
)


def _is_finished(folder: Path, kind: Kind) -> bool:
    return read_json(folder / kind.final).get("format") == kind.format


def _settings_path(folder: Path) -> Path:
    return folder / ".work" / "settings.json"


def is_begun(folder: Path, kind: Kind) -> bool:
    """Whether the folder holds partial results of this kind."""
    return read_json(_settings_path(folder)).get("format") == kind.format


def check_output(folder: Path, kind: Kind, *, overwrite: bool) -> None:
    """Look at an output folder before any work is done; change nothing.

    Raises:
        ValueError: if it is a file, holds finished work (unless `overwrite`), or files of the
            names to be written that are not this package's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the output is a folder. Choose another name.")
    if _is_finished(folder, kind):
        if not overwrite:
            raise ValueError(
                f"{folder} holds a finished {kind.name}; pass --overwrite or choose another folder."
            )
    elif not is_begun(folder, kind):
        names = [name for name in (kind.final, *kind.products) if (folder / name).exists()]
        if names:
            raise ValueError(
                f"{folder} holds {names[0]}, which is not of an unfinished {kind.name} of mmh-jax; "
                "choose another folder."
            )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError if a file to be written is a folder, or is there and may not be replaced."""
    if path.is_dir() or (path.exists() and not overwrite):
        cure = "it is a folder" if path.is_dir() else "pass --overwrite or choose another file"
        raise ValueError(f"{path} exists; {cure}.")


def check_writable(folder: Path) -> None:
    """Make a folder and write a probe file in it; remove both again if that fails.

    Raises:
        OSError: if the folder cannot be made, or the file not be written.
    """
    existed = folder.exists()
    probe = folder / ".probe.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(1 << 16))
        probe.unlink()
    except OSError as error:
        if error.filename in (None, str(probe)):
            error.filename = str(folder)
        with contextlib.suppress(OSError):
            probe.unlink()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def claim(folder: Path, kind: Kind, settings: dict[str, Any], *, overwrite: bool) -> Path:
    """Take the folder for a run with these settings, and return where its partial results go.

    Partial results of the same settings stay, to be used; those of others, and finished work, are
    deleted if `overwrite`; finished work not here but by `replace`, if the kind says so.

    Raises:
        ValueError: as `check_output`, and if unfinished work has other settings.
        OSError: if nothing can be written there.
    """
    check_output(folder, kind, overwrite=overwrite)
    # As they are read back: JSON has lists for tuples.
    settings = json.loads(json.dumps({"format": kind.format} | settings))
    found = read_json(_settings_path(folder))
    finished = _is_finished(folder, kind)
    others = bool(found) and found != settings
    if others and not finished and not overwrite:
        names = [key.replace("_", " ") for key in settings if found.get(key) != settings[key]]
        raise ValueError(
            f"{folder} holds an unfinished {kind.name} with another {', '.join(names)}; repeat "
            "its command to finish it, pass --overwrite to replace it, or choose another folder."
        )
    check_writable(folder)
    if others and finished and kind.replaced_last:
        shutil.rmtree(folder / ".work")
    elif others or (finished and not kind.replaced_last):
        _clear(folder, kind)
    work = folder / ".work"
    work.mkdir(exist_ok=True)
    write_json(_settings_path(folder), settings)
    return work


def replace(folder: Path, kind: Kind, source: Path) -> None:
    """Put finished work that is in `source` in the place of that in `folder`.

    The old final file goes first and the new one comes last, so that what a kill leaves between is
    unfinished.  `source` stays, to repeat this.
    """
    (folder / kind.final).unlink(missing_ok=True)
    for name in (*kind.products, kind.final):
        with replacing(folder / name) as partial:
            shutil.copyfile(source / name, partial)


def _clear(folder: Path, kind: Kind) -> None:
    """Delete what was written; what says whose it is comes last, so that this can be repeated."""
    work = folder / ".work"
    partial_results = [path for path in work.glob("*") if path != _settings_path(folder)]
    for path in (*(folder / name for name in kind.products), *partial_results):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    (folder / kind.final).unlink(missing_ok=True)
