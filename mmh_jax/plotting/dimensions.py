"""Dimensions of model and data against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure

from mmh_jax.memorization import Label
from mmh_jax.plotting.style import OKABE_ITO, STYLE
from mmh_jax.typing import Estimate

__all__ = ["curves_figure", "dimension_figure"]


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
    with mpl.rc_context(STYLE):
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


def curves_figure(sigmas: Any, curves: Mapping[str, Any], *, is_marked: Any = None) -> Figure:
    """Dimensions of many points over noise levels, a panel for each model, medians in bold.

    Args:
        sigmas: (S,) noise levels.
        curves: (M, S) dimensions by the title of their panel.
        is_marked: (M,) booleans: which points are known to be memorized; None if that is not known.
    """
    marked = None if is_marked is None else np.asarray(is_marked, bool)
    groups = {"": slice(None)} if marked is None else {"others": ~marked, "memorized": marked}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(curves), 2.9), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
        for (title, values), panel in zip(curves.items(), axes, strict=True):
            for (name, rows), color in zip(groups.items(), OKABE_ITO, strict=False):
                own = np.asarray(values, float)[rows]
                if not len(own):
                    continue
                share = max(0.05, min(0.5, 10 / len(own)))
                panel.plot(sigmas, own.T, color=color, linewidth=0.6, alpha=share)
                panel.plot(sigmas, np.nanmedian(own, axis=0), color=color, linewidth=2, label=name)
            panel.set_xscale("log")
            panel.set_xlabel(r"$\sigma$")
            panel.set_title(title.replace("_", " "))
        axes[0].set_ylabel("dimension")
        if marked is not None:
            axes[0].legend(frameon=False)
    return figure
