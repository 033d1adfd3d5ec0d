"""The report of an audit as one HTML file that needs nothing else, and the table beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmh_jax.memorization import DoseResponse
from mmh_jax.report.files import replacing, write_csv

__all__ = ["Exhibit", "Page", "data_uri", "write_page", "write_table"]

# Rows of the table in the page; all are in `points.csv`.
MOST_ROWS = 500
_SIZE = 96  # of a picture, in pixels, at least


class Exhibit(NamedTuple):
    """One memorized picture.

    Attributes:
        row: of the table.
        picture: data URI.
        samples: data URIs of samples that copy it.
        nearest: data URI of the nearest other picture.
        caption: what is said of it.
    """

    row: int
    picture: str
    samples: Sequence[str]
    nearest: str
    caption: str


class Page(NamedTuple):
    """The content of a report.

    Attributes:
        title: of the page.
        verdict: one sentence.
        evidence, limits: sentences.
        noun: what a point is called.
        counts: points by verdict.
        agreement: by verdict, how many were extracted and not.
        dose: of the positive controls, or None.
        columns: the table, in the order of rows to be shown; see `MOST_ROWS`.
        sigmas: (S,) noise levels of the curves.
        theta, star: (N, S) of the rows of the table, model and data.
        exhibits: memorized pictures.
        complexity: its name and the number of the column that has it.
        tables: further tables of two columns by title: settings, versions, cost.
    """

    title: str
    verdict: str
    evidence: Sequence[str]
    limits: Sequence[str]
    noun: str
    counts: Mapping[str, int]
    agreement: Mapping[str, Mapping[str, int]]
    dose: DoseResponse | None
    columns: Mapping[str, np.ndarray]
    sigmas: np.ndarray
    theta: np.ndarray
    star: np.ndarray
    exhibits: Sequence[Exhibit]
    complexity: str | None
    tables: Mapping[str, Mapping[str, Any]]


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W) or (H, W, 3) in [0, 1] as a PNG within an address, enlarged if it is small.

    >>> data_uri(np.zeros((2, 2)))[:22]
    'data:image/png;base64,'
    """
    levels = np.clip(np.nan_to_num(np.asarray(picture, float)) * 255, 0, 255).round()
    image = Image.fromarray(levels.astype(np.uint8))
    times = max(1, _SIZE // max(image.size))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_table(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write `points.csv` and `points.parquet`, the same rows and columns."""
    write_csv(folder / "points.csv", columns)
    arrays = {name: pa.array(np.asarray(column).tolist()) for name, column in columns.items()}
    with replacing(folder / "points.parquet") as partial:
        pq.write_table(pa.table(arrays), partial)


def write_page(path: Path, page: Page) -> None:
    """Write a report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmh_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = [dict(zip(page.columns, row, strict=True)) for row in _rows(page.columns)]
    text = environment.get_template("page.html.j2").render(
        page=page,
        rows=rows,
        cell=_cell,
        dose=None if page.dose is None else _dose(page.dose),
        scatter=_scatter(page),
        curves=_curves(page, len(rows)),
        total=len(next(iter(page.columns.values()))),
    )
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _rows(columns: Mapping[str, np.ndarray]) -> list[tuple[Any, ...]]:
    return list(zip(*(np.asarray(c)[:MOST_ROWS].tolist() for c in columns.values()), strict=True))


def _cell(value: Any) -> str:
    """A value as text; no number where there is none."""
    if isinstance(value, float):
        if np.isnan(value):
            return "\N{EN DASH}"
        return f"{value:.3g}" if np.isfinite(value) else "\N{INFINITY}"
    return str(value)


def _curves(page: Page, num: int) -> str:
    """The curves of the rows, as JSON that no closing tag can end."""

    def short(values: np.ndarray) -> list[list[float | None]]:
        return [
            [float(f"{v:.4g}") if np.isfinite(v) else None for v in row] for row in values[:num]
        ]

    content = {
        "sigmas": [float(f"{v:.4g}") for v in page.sigmas],
        "theta": short(page.theta),
        "star": short(page.star),
        "separation": [float(v) for v in np.asarray(page.columns["separation"][:num])],
        "sigma_mem": [float(v) for v in np.asarray(page.columns["sigma_mem"][:num])],
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _dose(dose: DoseResponse) -> list[dict[str, float]]:
    """Positions of the figure of the dose-response, in percent, and its numbers."""
    number = len(dose.copies)
    return [
        {
            "x": 100 * (position + 0.5) / number,
            "share": hits / planted,
            "copies": copies,
            "planted": planted,
            "found": hits,
            "low": low,
            "high": high,
        }
        for position, (copies, planted, hits, low, high) in enumerate(zip(*dose, strict=True))
    ]


def _scatter(page: Page) -> dict[str, Any] | None:
    """Complexity against LID_theta, in a square of 100."""
    if page.complexity is None or page.complexity not in page.columns:
        return None
    x = np.asarray(page.columns[page.complexity], float)
    y = np.asarray(page.columns["lid_theta"], float)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return None
    verdicts = np.asarray(page.columns["verdict"])
    ends = [(float(v[known].min()), float(v[known].max())) for v in (x, y)]
    points = []
    for row in np.flatnonzero(known)[:2000]:
        at = [
            100 * (v[row] - low) / max(high - low, 1e-12)
            for v, (low, high) in zip((x, y), ends, strict=True)
        ]
        points.append((round(float(at[0]), 1), round(100 - float(at[1]), 1), str(verdicts[row])))
    return {"points": points, "x": ends[0], "y": ends[1]}
