"""Tier C3, scale: does what finds copies depend on the size of the model, or of the data?

Tier C2, samples of a model without any duplicate in its data, at three widths of the network by
three numbers of training pictures, the same number of steps for all: how large a share of the
samples is copies, and how well two dimensions and the residual tell them.  Where fewer than
`LEAST` samples are copies, or are none, nothing is said of detectors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from common import console, number, table
from matplotlib.figure import Figure

from ladder.pictures import pictures
from ladder.trained import Training, detected, kept, ranked, samples_of, scores_of, trained
from mmh_jax import memorization as mem
from mmh_jax import plotting

DETECTORS = ("denoised_spread", "expected_flipd", "residual")
LEAST = 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: widths, training pictures, steps, samples, pixels of those with more."""

    widths: tuple[int, ...]
    nums: tuple[int, ...]
    num_steps: int
    num_samples: int
    side: int = 14


SIZES = {
    "smoke": Sizes((96, 192), (24,), 1_200, 100),
    "cpu": Sizes((128, 256, 512), (150, 300, 600), 8_000, 1_500),
    "accelerator": Sizes((512, 1_024, 2_048), (300, 1_000, 3_000), 60_000, 10_000, 28),
}


def one(source: str, width: int, num: int, seed: int, sizes: Sizes, out: Path) -> dict[str, Any]:
    """Train, draw, label and score, or read what was found."""
    name = f"{Path(source).name}_{num}_{width}_{sizes.num_steps}_{seed}"
    folder = out / name
    result = kept(folder / "found.json", lambda: _found(source, width, num, seed, sizes, folder))
    console.print(f"{name}: {result['memorized']:.3f} of the samples are copies", style="dim")
    return result


def _found(
    source: str, width: int, num: int, seed: int, sizes: Sizes, folder: Path
) -> dict[str, Any]:
    points = pictures(source, sizes.side)[0]
    data = points[np.random.default_rng(seed).permutation(len(points))[:num]]
    found = trained(data, Training(width, sizes.num_steps), seed, folder)
    samples = samples_of(found, sizes.num_samples, seed)
    copied = mem.copies(samples, data).memorized
    result: dict[str, Any] = {"width": width, "pictures": num, "seed": seed}
    result |= {"memorized": float(copied.mean()), "detections": None}
    if min(copied.sum(), (~copied).sum()) >= LEAST:
        scored = scores_of(DETECTORS, samples, found, data, seed).value
        judged = {n: detected(ranked(scored[n]), copied) for n in DETECTORS}
        result["detections"] = {
            n: {"AUROC": each.auroc.value, "TPR at 1% FPR": each.tpr.value}
            for n, each in judged.items()
        }
    return result


def cells(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each width and number of pictures: means and standard errors over seeds."""
    rows = []
    for width, num in dict.fromkeys((run["width"], run["pictures"]) for run in runs):
        own = [run for run in runs if (run["width"], run["pictures"]) == (width, num)]
        judged = [run["detections"] for run in own if run["detections"]]
        row: dict[str, Any] = {"width": width, "pictures": num}
        row |= _over_seeds("copies", [run["memorized"] for run in own])
        row["seeds judged"] = len(judged)
        for name in DETECTORS:
            row |= _over_seeds(name, [each[name]["AUROC"] for each in judged])
        rates = [each[DETECTORS[0]]["TPR at 1% FPR"] for each in judged]
        row["TPR"] = float(np.mean(rates)) if rates else None
        rows.append(row)
    return rows


def _over_seeds(name: str, values: list[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {name: values[0] if values else None, f"+- {name}": None}
    found = mem.over_seeds(np.array(values))
    return {name: float(found.value), f"+- {name}": number(found.stderr)}


def _spoken(row: dict[str, Any], name: str) -> str:
    value, error = row[name], row[f"+- {name}"]
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Against the number of pictures, a line for each width: copies, and what finds them."""
    panels = ("copies", *DETECTORS)
    drawn = Figure(figsize=(3.0 * len(panels), 2.8), layout="constrained")
    for axes, panel in zip(drawn.subplots(1, len(panels)), panels, strict=True):
        for width, color in zip(
            dict.fromkeys(row["width"] for row in rows), plotting.OKABE_ITO, strict=False
        ):
            own = [row for row in rows if row["width"] == width and row[panel] is not None]
            axes.errorbar(
                [row["pictures"] for row in own], [row[panel] for row in own],
                [row[f"+- {panel}"] or 0 for row in own], color=color, marker="o", capsize=2,
                label=f"width {width}",
            )  # fmt: skip
        axes.set_xscale("log")
        nums = sorted({row["pictures"] for row in rows})
        axes.set_xticks(nums, [f"{num:,}" for num in nums])
        axes.minorticks_off()
        axes.set_xlabel("training pictures")
        is_share = panel == "copies"
        axes.set_title("share of samples that are copies" if is_share else f"AUROC of {panel}")
        axes.set_ylim(*((-0.03, 1.03) if is_share else (0.45, 1.02)))
    drawn.axes[0].legend(frameon=False)
    drawn.savefig(path, dpi=150)


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images; it fails where no setting has copies to be found."""
    sizes, content, failures = SIZES[preset], {}, []
    for source in images:
        name = Path(source).name
        rows = cells([
            one(source, width, num, seed, sizes, out)
            for width in sizes.widths for num in sizes.nums for seed in range(1, seeds + 1)
        ])  # fmt: skip
        shown = [
            {"width": row["width"], "pictures": row["pictures"]}
            | {panel: _spoken(row, panel) for panel in ("copies", *DETECTORS)}
            | {"TPR": row["TPR"], "seeds judged": row["seeds judged"]}
            for row in rows
        ]
        table(f"C3, {name}: copies, AUROC, and the TPR at 1% FPR of {DETECTORS[0]}", shown)
        figure(rows, out / f"scale_{name}.png")
        console.print(f"figure: {out / f'scale_{name}.png'}")
        content[name] = rows
        if preset != "smoke" and not any(row["seeds judged"] for row in rows):
            failures.append(f"{name}: no setting has {LEAST} copies and as many other samples")
    return content, failures
