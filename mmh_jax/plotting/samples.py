"""Samples: pictures side by side, points in the plane, and what copies cost to avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmh_jax.plotting.style import OKABE_ITO, STYLE

__all__ = ["frontier_figure", "image_grid", "plane_figure", "tradeoff_figure"]

MARKERS = ("o", "s", "^", "D", "v", "P")


def image_grid(
    images: Any, *, num_columns: int | None = None, labels: Any = None, title: str = ""
) -> Figure:
    """Images side by side, each pixel a square: samples of a generator, neighbours of a point.

    Args:
        images: (N, H, W), (N, H, W, 1) or (N, H, W, 3); shown between 0 and 1, values outside are
            cut off.
        num_columns: by default about as many as rows.
        labels: N texts or numbers, written under the images, or None.
        title: written above.

    Raises:
        ValueError: if `images` is no set of images, or the labels are not N.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(
            f"`image_grid(images=...)` has shape {images.shape}; it takes (N, H, W), (N, H, W, 1) "
            "or (N, H, W, 3), at least one."
        )
    count = len(images)
    if labels is not None and len(labels) != count:
        raise ValueError(f"`image_grid(labels=...)` has {len(labels)} labels for {count} images.")
    if num_columns is not None and num_columns < 1:
        raise ValueError(f"`image_grid(num_columns={num_columns})` must be at least 1.")
    columns = min(num_columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    height, width = images.shape[1:3]
    side = 0.7
    tall = (side * height / width + 0.16 * (labels is not None)) * rows + 0.3 * bool(title)
    pads = {f"figure.constrained_layout.{axis}_pad": 0.01 for axis in "hw"}
    with mpl.rc_context(STYLE | pads):
        figure = Figure(figsize=(side * columns, tall), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        cells = figure.subplots(rows, columns, squeeze=False)
        for cell in cells.flat:
            cell.set_axis_off()
        for number, (image, cell) in enumerate(zip(images, cells.flat, strict=False)):
            shown = np.clip(np.nan_to_num(image.astype(float)), 0, 1)
            shown = shown[..., 0] if shown.shape[-1] == 1 else shown
            cell.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if labels is not None:
                text = labels[number]
                text = text if isinstance(text, str) else f"{text:.3g}"
                cell.text(0.5, -0.04, text, transform=cell.transAxes, ha="center", va="top",
                          fontsize=6)  # fmt: skip
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def plane_figure(samples: Any, is_copy: Any, *, data: Any = None) -> Figure:
    """Samples in the plane, those that are copies marked, over the training data.

    Args:
        samples: (M, 2).
        is_copy: (M,) booleans.
        data: (N, 2), or None.

    Raises:
        ValueError: if the samples are not of two coordinates.
    """
    samples, is_copy = np.asarray(samples), np.asarray(is_copy, bool)
    if samples.ndim != 2 or samples.shape[1] != 2 or is_copy.shape != samples.shape[:1]:
        raise ValueError(
            f"`plane_figure(samples=..., is_copy=...)` have shapes {samples.shape} and "
            f"{is_copy.shape}; it takes (M, 2) and (M,)."
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        groups = [] if data is None else [("training data", np.asarray(data), "0.7", ".")]
        groups += [("samples", samples[~is_copy], "#0072B2", "o")]
        groups += [("copies", samples[is_copy], "#D55E00", "v")] if is_copy.any() else []
        for name, points, color, marker in groups:
            text = f"{name} ({len(points):,})"
            axes.scatter(*points.T, s=14, color=color, marker=marker, linewidths=0, label=text)
        axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.1)
    return figure


def frontier_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Copies against quality and cost, a line for each way and a point for each strength.

    Args:
        rows: of `report.mitigate_model`: each with `way`, `strength`, `share` with `share_low` and
            `share_high`, `frechet`, `recall` and `evaluations`; what is None is not drawn.
    """
    panels = (("frechet", "Fréchet distance"), ("recall", "recall"),
              ("evaluations", "evaluations for a sample"))  # fmt: skip
    ways = list(dict.fromkeys(row["way"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (field, name) in zip(figure.subplots(1, 3), panels, strict=True):
            for color, way in zip(["0.3", "0.6", *OKABE_ITO * len(ways)], ways, strict=False):
                own = [row for row in rows if row["way"] == way and row[field] is not None]
                x, y = [[row[key] for row in own] for key in ("share", field)]
                ends = [[row["share"] - row["share_low"] for row in own],
                        [row["share_high"] - row["share"] for row in own]]  # fmt: skip
                axes.errorbar(x, y, xerr=ends, color=color, label=way, marker="o", markersize=4,
                              linewidth=1.2, elinewidth=0.5, alpha=0.9)  # fmt: skip
            axes.set(xlabel="share of copies", ylabel=name)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(ways), frameon=False)
    return figure


def tradeoff_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What is left of memory against what is left of a prompt, a line for each way.

    Args:
        rows: of `report.mitigate_prompts`: each with `way`, `strength`, `cosine`, `cfg_norm`,
            `radius` and `to_image`; what is None is not drawn, and a panel without points is left
            out.
    """
    names = {"cfg_norm": "CFG norm at the first level", "radius": "radius of the pictures",
             "to_image": "distance to the training picture"}  # fmt: skip
    panels = [name for name in names if any(row[name] is not None for row in rows)]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.9 * len(panels), 3.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, field in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                               strict=True):  # fmt: skip
            for number, way in enumerate(ways):
                own = [row for row in rows if row["way"] == way and None not in
                       (row[field], row["cosine"])]  # fmt: skip
                # The colour of what is plain is that of `frontier_figure`.
                color = "0.3" if not number else OKABE_ITO[(number - 1) % len(OKABE_ITO)]
                marker = "*" if not number else MARKERS[(number - 1) % len(MARKERS)]
                axes.plot([row["cosine"] for row in own], [row[field] for row in own], color=color,
                          label=way, marker=marker, markersize=9 if not number else 5,
                          linewidth=1.0, alpha=0.85, zorder=2 if number else 3)  # fmt: skip
            axes.set(xlabel="cosine to the prompt", ylabel=names[field])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(ways), 4),
                      frameon=False)  # fmt: skip
    return figure
