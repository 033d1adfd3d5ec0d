"""What every benchmark prints and writes: machine, versions, command, a table, JSON."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mmh_jax.report.files import write_json
from mmh_jax.report.summary import environment

console = Console(width=130)


def header() -> dict[str, Any]:
    """Machine, versions and command; printed as a line."""
    about = environment() | {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(["python", *sys.argv]),
    }
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim")
    return about


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows that share their keys; real numbers four significant digits, None as a dash."""
    result = Table(title=title, title_justify="left")
    for name, first in rows[0].items():
        is_text = isinstance(first, str)
        result.add_column(name, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows:
        result.add_row(*map(_text, row.values()))
    console.print(result)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def number(value: Any) -> float | None:
    """A number as JSON holds it: None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def clock(run: Callable[[], Any]) -> float:
    """Seconds until what `run` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compared(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds of two, run in turn, after one round that does not count; and their ratio."""
    first(), second()
    seconds = np.array([[clock(first), clock(second)] for _ in range(rounds)])
    medians = np.median(seconds, axis=0)
    # Of rounds, each with the other at its side: what else the machine does hits both alike.
    ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
    return {"ours": float(medians[0]), "theirs": float(medians[1]), "ratio": ratio}


def finish(out: Path, about: dict[str, Any], content: dict[str, Any], failures: list[str]) -> int:
    """Write the JSON file, say what failed, and return the exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"about": about} | content | {"failures": failures})
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red")
    console.print(f"{'failed' if failures else 'passed'}; written to {out}")
    return 1 if failures else 0


def concordance(truth: np.ndarray, estimate: np.ndarray) -> float:
    """1 minus the share of all pairs that the estimate puts in the wrong order (dgm convention)."""
    truth, estimate = np.asarray(truth), np.asarray(estimate)
    wrong = (truth[:, None] > truth) & (estimate[:, None] < estimate)
    return 1 - wrong.sum() / (len(truth) * (len(truth) - 1) / 2)
