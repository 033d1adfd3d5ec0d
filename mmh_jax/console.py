"""What the command line prints: tables and numbers to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "agreement",
    "copied",
    "detection",
    "diagnosis",
    "doses",
    "median",
    "number",
    "print_error",
    "print_table",
    "progress",
]

_STAGES = {
    "duplicates": "duplicates",
    "neighbors": "nearest neighbours",
    "model": "training",
    "folds": "training without each point",
    "separation": "distances",
    "regeneration": "regenerating",
    "lid_star": "LID_* of the data",
    "sigma": "choosing sigma",
    "lid_theta": "LID_theta of the model",
    "reference": "sampling without guidance",
    "samples": "sampling",
    "copies": "looking for copies",
    "detectors": "detectors",
    "figure": "figure",
    "report": "report",
}


def print_error(markup: str) -> None:
    """One line on stderr, in Rich's markup."""
    Console(stderr=True).print(markup, soft_wrap=True, highlight=False)


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Two columns on stdout: what, and its value."""
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    Console().print(table)


def median(values: Any, form: str = ".2f") -> str:
    """Of the finite values, as text."""
    finite = sorted(value for value in map(float, values) if math.isfinite(value))
    return f"{finite[len(finite) // 2]:{form}}" if finite else "none is finite"


def number(value: float | None) -> str:
    """With two digits, or `none`."""
    return "none" if value is None else f"{value:.2f}"


def diagnosis(found: dict[str, Any]) -> str:
    """`measure.diagnostics` as one line."""
    parts = [
        f"{found[name]} of {found['num_points']} points {what}"
        for name, what in (
            ("not_finite", "not finite"),
            ("no_plateau", "without a plateau"),
            ("full", "of the dimension of the space"),
            ("off_manifold", "off the model's manifold"),
            ("negative_flipd", "with negative FLIPD"),
        )
        if name not in ("not_finite", "full") or found[name]
    ]
    if found["asymmetry"] is not None:
        parts.append(f"asymmetry of the Jacobian {found['asymmetry']:.2f}")
    if found["sigma_outside_training"]:
        parts.append("sigma outside the trained range")
    return "; ".join(parts)


def agreement(found: dict[str, dict[str, int]]) -> str:
    """Verdicts against extraction, a line each."""
    return "\n".join(
        f"{title}: {of['extracted']:,} extracted, {of['not extracted']:,} not"
        for title, of in found.items()
        if sum(of.values())
    )


def doses(found: Any) -> str:
    """A dose-response as one line."""
    parts = [
        f"{of['found']:.0f} of {of['planted']:.0f} there {of['copies']:.0f} times" for of in found
    ]
    return ", ".join(parts) or "nothing was planted"


def copied(found: dict[str, Any]) -> str:
    """`samples.Judged.summary` as one line."""
    if found["fraction"] is None:
        return f"none of {found['num']} samples is finite"
    text = f"{found['memorized']} of {found['num']} samples"
    text += f" ({100 * found['fraction']:.1f} +- {100 * found['fraction_stderr']:.1f}%)"
    text += f", of {found['extracted_points']} training points"
    return text + (f"; {found['not_finite']} not finite" if found["not_finite"] else "")


def detection(found: dict[str, Any] | None) -> str:
    """`detectors.detection_of` as one line, with the ends of intervals."""
    if found is None:
        return "too few copies, or others, to say"
    names = {"AUROC": "auroc", "AUPRC": "auprc", "TPR at 1% FPR": "tpr_at_1%_fpr"}
    intervals = {title: found[name] for title, name in names.items()}
    return ", ".join(
        f"{title} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        for title, one in intervals.items()
    )


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Bars on stderr, one for each stage; `report(stage, done, total, note)` moves them."""
    display = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True),
    )
    tasks: dict[str, bars.TaskID] = {}

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        display.start()  # not before there is something to show: an error is then one line
        if stage not in tasks:
            tasks[stage] = display.add_task(_STAGES.get(stage, stage), total=None, note="")
        display.update(tasks[stage], completed=done, total=total or None, note=note)

    try:
        yield report
    finally:
        if tasks:
            display.stop()
