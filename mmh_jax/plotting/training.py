"""What training does: losses, and the onset of memorization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmh_jax.evaluation import LossCurve, loss_gap
from mmh_jax.plotting.style import OKABE_ITO, STYLE

__all__ = ["loss_figure", "onset_figure"]


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
    with mpl.rc_context(STYLE):
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
    with mpl.rc_context(STYLE):
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
