"""Records of a training run: a line of JSON for each round, and TensorBoard if asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["JsonLines", "read_json_lines", "tensorboard"]


class JsonLines:
    """Rows of numbers appended to a file, one JSON object in a line.

    A row is written in one piece.  What a run that was cut off wrote beyond the state it continues
    from is dropped, so that no step has two rows.

    Args:
        path: the file; made if it does not exist.
        step: the step the run continues from: rows beyond it are removed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> log = JsonLines(path)
    >>> log({"step": 10, "loss": 0.5}); log({"step": 20, "loss": 0.4})
    >>> JsonLines(path, step=10)({"step": 20, "loss": 0.3})
    >>> [row["loss"] for row in read_json_lines(path)]
    [0.5, 0.3]
    """

    def __init__(self, path: str | Path, *, step: int = 0):
        self.path = Path(path)
        rows = read_json_lines(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)

    def __call__(self, row: dict[str, Any]) -> None:
        """Append a row, which has a `step`; NaN and infinity, which JSON lacks, become null."""
        plain = {name: v.item() if hasattr(v, "item") else v for name, v in row.items()}
        if not isinstance(plain.get("step"), int):
            raise ValueError(f"`JsonLines(row=...)` has the step {row.get('step')!r}, no integer.")
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in plain.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off is passed over.

    Raises:
        ValueError: if another line is not a JSON object with a `step`.
    """
    lines = Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
            if row is not None and not isinstance(row.get("step"), int):
                raise ValueError("it has no whole number `step`")
        except (AttributeError, ValueError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number} is no row of metrics: {error}.") from None
        if row is not None:
            rows.append(row)
    return rows


def tensorboard(folder: str | Path) -> Any:
    """A function like `JsonLines`, which writes TensorBoard's event files.

    Raises:
        ImportError: if `tensorboardX` is not there; `pip install 'mmh-jax[tensorboard]'`.
    """
    try:
        # Its own `flush` does not wait for what is still queued, so: to disk within a second.
        writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder), flush_secs=1)
    except ImportError as error:
        raise ImportError(
            "`tensorboard` needs tensorboardX: `pip install 'mmh-jax[tensorboard]'`."
        ) from error

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])

    return log
