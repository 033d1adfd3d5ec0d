"""Figures, drawn with matplotlib's objects: no `pyplot`, no window, no global state.

A function returns a `Figure`; save it with `figure.savefig(path)`.  Colours are those of Okabe and
Ito (2008), told apart under every common colour blindness; each verdict also has its own marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure

from mmh_jax.evaluation import LossCurve, loss_gap
from mmh_jax.memorization import Label
from mmh_jax.typing import Estimate

__all__ = [
    "dimension_figure",
    "frontier_figure",
    "image_grid",
    "loss_figure",
    "onset_figure",
    "plane_figure",
]

_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.03,
}
_MAX_ERROR_BARS = 150
_MAX_MARKERS = 3_000


class _Look(NamedTuple):
    color: str
    marker: str


_LOOKS = {
    Label.NOT_MEMORIZED: _Look("#0072B2", "o"),
    Label.OD_MEM: _Look("#D55E00", "v"),
    Label.DD_MEM: _Look("#009E73", "s"),
    Label.UNDECIDED: _Look("#7F7F7F", "x"),
}


def dimension_figure(
    lid_theta: Estimate,
    lid_star: Estimate,
    labels: Any,
    *,
    images: Any = None,
    num_images: int = 12,
    title: str = "",
) -> Figure:
    """LID_theta against LID_*, with both distributions, and the images at both ends of LID_theta.

    Points below the diagonal have lost dimensions in the model.  Up to 150 points have error bars
    of one standard error each; beyond, one black bar at the median shows the median error.  Beyond
    3,000 points those that are not memorized are shown as a density.  The axes leave out values
    more than four interquartile ranges away; how many is written on the figure.

    Args:
        lid_theta: of the model, (N,).
        lid_star: of the data, (N,).
        labels: (N,) codes of `memorization.Label`.
        images: (N, H, W) or (N, H, W, 3) in [0, 1], or None to leave the strips out.
        num_images: in each of the two strips.
        title: written above.

    Raises:
        ValueError: if the arrays differ in length or hold no finite pair.
    """
    theta, star = (np.asarray(estimate.value, float) for estimate in (lid_theta, lid_star))
    labels = np.asarray(labels)
    if not theta.shape == star.shape == labels.shape or theta.ndim != 1:
        raise ValueError(
            f"`dimension_figure` got LID_theta of shape {theta.shape}, LID_* of {star.shape} and "
            f"labels of {labels.shape}; it takes three vectors of the same length."
        )
    if not np.any(np.isfinite(theta) & np.isfinite(star)):
        raise ValueError("`dimension_figure` has no point at which both dimensions are finite.")
    with mpl.rc_context(_STYLE):
        strips_height = 0.0 if images is None or len(theta) < 2 else 1.7
        figure = Figure(figsize=(7.0, 4.9 + strips_height), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        upper: Figure | SubFigure = figure
        if strips_height:
            grid = figure.add_gridspec(2, 1, height_ratios=(4.9, strips_height))
            upper = figure.add_subfigure(grid[0])
            _draw_strips(figure.add_subfigure(grid[1]), theta, np.asarray(images), num_images)
        _draw_joint(upper, lid_theta, lid_star, labels)
        if title:
            upper.suptitle(title, fontsize=10, fontweight="bold")
    return figure


def _draw_joint(
    figure: Figure | SubFigure, lid_theta: Estimate, lid_star: Estimate, labels: np.ndarray
) -> None:
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1.25), height_ratios=(1, 4))
    joint = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=joint)
    beside = figure.add_subplot(grid[1, 1], sharey=joint)
    corner = figure.add_subplot(grid[0, 1])
    theta, star = np.asarray(lid_theta.value, float), np.asarray(lid_star.value, float)
    x_limits, y_limits = _limits(star), _limits(theta)
    # Upward the range of both, so that the diagonal is always in sight.
    y_limits = (min(x_limits[0], y_limits[0]), max(x_limits[1], y_limits[1]))
    joint.set(
        xlim=x_limits,
        ylim=y_limits,
        xlabel=r"LID$_\ast$ of the data (number of dimensions)",
        ylabel=r"LID$_\theta$ of the model (number of dimensions)",
    )
    joint.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--", zorder=1)
    _draw_points(joint, lid_theta, lid_star, labels)
    _draw_marginals(above, beside, theta, star, labels)
    outside = np.sum((theta < y_limits[0]) | (theta > y_limits[1]) | (star < x_limits[0]))
    outside += np.sum((star > x_limits[1]) & (theta >= y_limits[0]) & (theta <= y_limits[1]))
    if outside:
        text = f"{outside} of {len(theta)} points lie outside"
        joint.set_title(text, loc="right", fontsize=7.5, color="0.35", pad=3)
    handles, names = joint.get_legend_handles_labels()
    corner.set_axis_off()
    corner.legend(handles, names, loc="center", frameon=False, handletextpad=0.4, borderpad=0)
    figure.align_labels()


def _limits(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    quarter, three_quarters = np.quantile(finite, [0.25, 0.75])
    reach = 4 * (three_quarters - quarter)
    kept = finite[(finite >= quarter - reach) & (finite <= three_quarters + reach)]
    pad = 0.06 * (kept.max() - kept.min()) or 0.5
    return float(kept.min() - pad), float(kept.max() + pad)


def _draw_points(axes: Axes, lid_theta: Estimate, lid_star: Estimate, labels: np.ndarray) -> None:
    theta, star = np.asarray(lid_theta.value, float), np.asarray(lid_star.value, float)
    theta_error, star_error = np.asarray(lid_theta.stderr), np.asarray(lid_star.stderr)
    for label, look in _LOOKS.items():
        chosen = labels == label
        count = int(chosen.sum())
        if not count:
            continue
        name = f"{label.title} ({count:,})"
        if label is Label.NOT_MEMORIZED and count > _MAX_MARKERS:
            extent = (*axes.get_xlim(), *axes.get_ylim())
            axes.hexbin(
                star[chosen], theta[chosen], gridsize=45, extent=extent, mincnt=1,
                norm=LogNorm(vmin=0.2), cmap="Blues", linewidths=0.1, zorder=0,
            )  # fmt: skip
            axes.scatter([], [], s=30, color=look.color, marker="h", label=name)
            continue
        size, alpha = (22, 0.85) if len(labels) <= _MAX_ERROR_BARS else (11, 0.6)
        edge: dict[str, Any] = {} if look.marker == "x" else {"edgecolors": "white"}
        axes.scatter(
            star[chosen], theta[chosen], s=size, alpha=alpha, color=look.color,
            marker=look.marker, linewidths=0.3, label=name, zorder=3, **edge,
        )  # fmt: skip
        if len(labels) <= _MAX_ERROR_BARS:
            axes.errorbar(
                star[chosen], theta[chosen], theta_error[chosen], star_error[chosen],
                fmt="none", ecolor=look.color, elinewidth=0.6, alpha=0.45, zorder=2,
            )  # fmt: skip
    if len(labels) > _MAX_ERROR_BARS:
        medians = [np.nanmedian(values) for values in (star, theta, theta_error, star_error)]
        axes.errorbar(
            *medians, fmt="none", ecolor="black", elinewidth=1.2, capsize=2.5, zorder=4,
            label="median, ±1 standard error",
        )  # fmt: skip
    axes.plot([], [], color="black", linewidth=0.8, linestyle="--", label="equal")


def _draw_marginals(
    above: Axes, beside: Axes, theta: np.ndarray, star: np.ndarray, labels: np.ndarray
) -> None:
    present = [label for label in _LOOKS if np.any(labels == label)]
    colors = [_LOOKS[label].color for label in present]
    sides: Sequence[tuple[Axes, np.ndarray, tuple[float, float], Any]] = (
        (above, star, above.get_xlim(), "vertical"),
        (beside, theta, beside.get_ylim(), "horizontal"),
    )
    for axes, values, limits, orientation in sides:
        groups = [values[(labels == label) & np.isfinite(values)] for label in present]
        bins = np.linspace(*limits, 36).tolist()
        axes.hist(groups, bins, stacked=True, color=colors, orientation=orientation)
        axes.set_ylabel("points") if axes is above else axes.set_xlabel("points")
        axes.tick_params(labelbottom=axes is beside, labelleft=axes is above)


def _draw_strips(figure: SubFigure, theta: np.ndarray, images: np.ndarray, count: int) -> None:
    order = np.argsort(theta, kind="stable")
    order = order[np.isfinite(theta[order])]
    shown = min(count, len(order) // 2)
    rows = {"lowest": order[:shown], "highest": order[len(order) - shown :]}
    axes = figure.subplots(2, count, squeeze=False)
    for cell in axes[:, shown:].flat:
        cell.set_axis_off()
    for (name, row), row_axes in zip(rows.items(), axes, strict=True):
        row_axes[0].set_ylabel(f"{name}\nLID$_\\theta$", rotation=0, ha="right", va="center")
        for index, cell in zip(row, row_axes, strict=False):
            cell.imshow(images[index], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.set_xlabel(f"{theta[index]:.1f}", fontsize=7.5, labelpad=2)
            for spine in cell.spines.values():
                spine.set_visible(False)


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
    with mpl.rc_context(_STYLE | pads):
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
    with mpl.rc_context(_STYLE):
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


def loss_figure(trained: LossCurve, held_out: LossCurve, *, title: str = "") -> Figure:
    """Denoising losses of trained and held-out points over noise levels, and their gap below.

    Bands are two standard errors each way.  Where the gap's band leaves zero upwards, the model
    knows its training points at that scale.

    Args:
        trained, held_out: from `evaluation.loss_curve`, over the same noise levels.
        title: written above.

    Raises:
        ValueError: if the curves are over different noise levels.
    """
    gap = loss_gap(trained, held_out)
    curves = (("trained on", trained, "#D55E00"), ("held out", held_out, "#0072B2"))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 4.4), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for name, curve, color in curves:
            text = f"{name} ({len(curve.losses):,})"
            _draw_band(above, curve.sigmas, curve.value, curve.stderr, color, text)
        _draw_band(below, trained.sigmas, gap.value, gap.stderr, "#009E73", "")
        below.axhline(0, color="black", linewidth=0.8, linestyle="--", zorder=1)
        above.set(xscale="log", ylabel="denoising loss\n(number of dimensions)")
        below.set(xlabel="noise level $\\sigma$ (data units)", ylabel="held out\nless trained")
        above.legend(frameon=False)
        figure.align_labels()
        if title:
            figure.suptitle(title, fontsize=10, fontweight="bold")
    return figure


OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def frontier_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Copies against quality and cost, a line for each way and a point for each strength.

    Args:
        rows: of `report.mitigate_model`: each with `way`, `strength`, `share` with `share_low` and
            `share_high`, `frechet`, `recall` and `evaluations`; what is None is not drawn.
    """
    panels = (("frechet", "Fréchet distance"), ("recall", "recall"),
              ("evaluations", "evaluations for a sample"))  # fmt: skip
    ways = list(dict.fromkeys(row["way"] for row in rows))
    with mpl.rc_context(_STYLE):
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


def onset_figure(rows: Sequence[Mapping[str, Any]], *, level: int = 0, title: str = "") -> Figure:
    """Memorization over training time, for several sizes of the training set.

    From above: the share of memorized samples, LID_theta of training points (solid) and held-out
    ones (dashed), held-out loss less training loss.  A colour for each size; thin lines are seeds,
    the thick one is their mean.

    Args:
        rows: of `report.onset.Moment.row`, each with `n` and `seed`.
        level: which of the noise levels of the losses.
        title: written above.
    """
    rows = [dict(row) | {"gap": row["gap"][level]} for row in rows]
    sizes = sorted({row["n"] for row in rows})
    panels = (
        ("share of samples\nmemorized", (("memorized", "-"),)),
        ("LID$_\\theta$", (("lid_train", "-"), ("lid_held_out", "--"))),
        ("loss: held out\nless trained", (("gap", "-"),)),
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 5.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(3, 1, sharex=True)
        for axes, (name, fields) in zip(all_axes, panels, strict=True):
            for color, size in zip(OKABE_ITO * len(sizes), sizes, strict=False):
                own = [row for row in rows if row["n"] == size]
                for field, style in fields:
                    _draw_seeds(axes, own, field, style, color)
            axes.set(ylabel=name)
        all_axes[0].set(ylim=(-0.03, 1.03), xscale="log")
        all_axes[2].axhline(0, color="black", linewidth=0.8, linestyle="--", zorder=1)
        all_axes[2].set(xlabel="steps of training")
        for color, size in zip(OKABE_ITO * len(sizes), sizes, strict=False):
            all_axes[0].plot([], [], color=color, label=f"n = {size:,}")
        for style, text in (("-", "training points"), ("--", "held-out points")):
            all_axes[1].plot([], [], color="black", linestyle=style, label=text)
        for axes in all_axes[:2]:
            axes.legend(frameon=False)
        figure.align_labels()
        if title:
            figure.suptitle(title, fontsize=10, fontweight="bold")
    return figure


def _draw_seeds(axes: Axes, rows: list[dict[str, Any]], field: str, style: str, color: str) -> None:
    """Each seed, and their mean at the steps that all of them have."""
    seeds = sorted({row["seed"] for row in rows})
    curves = [{r["step"]: r[field] for r in rows if r["seed"] == seed} for seed in seeds]
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), style, color=color, linewidth=0.5, alpha=0.5)
    common = [step for step in curves[0] if all(step in curve for curve in curves)]
    means = [float(np.mean([curve[step] for curve in curves])) for step in common]
    axes.plot(common, means, style, color=color, linewidth=1.6, marker=".", markersize=4)


def _draw_band(axes: Axes, x: Any, value: Any, stderr: Any, color: str, label: str) -> None:
    value, stderr = np.asarray(value), np.asarray(stderr)
    axes.plot(x, value, color=color, linewidth=1.2, marker=".", markersize=4, label=label)
    low, high = value - 2 * stderr, value + 2 * stderr
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
