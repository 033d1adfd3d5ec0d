"""Execute notebooks in place, and print what their cells print.

python notebooks/execute.py                       # full size, outputs kept
python notebooks/execute.py --preset smoke --no-write    # as continuous integration does
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Literal

import nbformat
import tyro
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, write: bool) -> None:
    """Run one notebook from top to bottom; a cell that raises stops everything."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which only make noise in a diff
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                print(output.text, end="")
    if write:
        partial = path.with_suffix(".partial")
        nbformat.write(notebook, partial)
        os.replace(partial, path)
    print(f"== {path.name}: {time.perf_counter() - start:.0f} s")


def main(
    notebooks: tuple[Path, ...] = (),
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    write: bool = True,
) -> int:
    """Execute notebooks.

    Args:
        notebooks: which; all in this folder by default.
        preset: how much they do.
        write: keep the outputs in the file.
    """
    os.environ["MMH_JAX_PRESET"] = preset
    for path in notebooks or sorted(FOLDER.glob("*.ipynb")):
        execute(path, write)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
