"""Tier C2, the hard half: which *samples* of an overfitting model are copies?

A residual MLP is trained on few pictures without any duplicate until it memorizes, and drawn from;
a sample is memorized if it is a copy of a training picture, d1 / d2 < 1/3.  All samples look
alike to the model, and are of its own manifold: what tells copies is only how little is around
them.  The baseline is the model's own checkpoint after a quarter of the training.

The noise levels are chosen on another training, that of seed 0, which no table contains: the one
of `SIGMAS` and the one of `REGENERATE_FROM` where the spread of the denoised and the mean of what
comes back, each in relation to the baseline, have the largest AUROC.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import console, number, table

from ladder.pictures import draw_beside, pictures
from ladder.trained import (
    Trained,
    Training,
    detected,
    kept,
    longer,
    ranked,
    samples_of,
    scores_of,
    spoken,
    trained,
)
from mmh_jax import memorization as mem

LID_DETECTORS = (
    "flipd", "projected_flipd", "expected_flipd", "projected_trace", "eigenvalue_count",
    "soft_count", "denoising_loss", "denoised_spread", "denoised_mean", "regeneration",
    "regeneration_spread",
    "projected_trace_log_ratio_baseline", "denoised_spread_log_ratio_baseline",
    "denoised_mean_log_ratio_baseline", "regeneration_log_ratio_baseline",
    "regeneration_spread_log_ratio_baseline",
    "regeneration_mean", "regeneration_mean_log_ratio_baseline",
)  # fmt: skip
OTHERS = ("residual", "score_norm", "png_bytes", "zlib_bytes", "pixel_variance")
# Reads the training pictures that the label is made of: printed, and not compared with.
ORACLE = "nearest_distance"
GIVEN_SIZE = "regeneration given PNG size"
# Sums of two logarithms of ratios: of the same dimension by small steps and by large ones.
SMALL_STEPS = "denoised_spread_log_ratio_baseline"
SUMS = {
    "the spreads' log ratios": (SMALL_STEPS, "regeneration_spread_log_ratio_baseline"),
    "spread's and mean's log ratios": (SMALL_STEPS, "regeneration_mean_log_ratio_baseline"),
}
SIGMAS, REGENERATE_FROM = (0.05, 0.1, 0.2, 0.4), (0.1, 0.2, 0.5)
BARS = {"AUROC": 0.90, "TPR at 1% FPR": 0.40}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: pictures to train on, held out (the reference of sizes), samples.

    Pictures of more than 100 pixels are memorized later: `longer` times the steps.
    """

    training: Training
    longer: float
    num_points: int
    num_held_out: int
    num_samples: int
    chooses: bool = True


SIZES = {
    "smoke": Sizes(Training(192, 1_200, 64), 1, 24, 40, 100, chooses=False),
    "cpu": Sizes(Training(384, 4_000), 5, 300, 300, 3_000),
    "accelerator": Sizes(Training(1_024, 12_000), 5, 300, 300, 20_000),
}


def one(source: str, seed: int, preset: str, out: Path) -> dict[str, Any]:
    """Train, draw, label and score, or read what was found; the scores of all samples."""
    sizes = SIZES[preset]
    points = pictures(source, 28 if preset == "accelerator" else 14)[0]
    about = longer(sizes.training, points, sizes.longer)
    name = f"{Path(source).name}_{about.width}_{about.num_steps}"
    levels: dict[str, float] = {}
    if sizes.chooses:
        other = out / f"{name}_0"
        levels = kept(other / "levels.json", lambda: chosen_levels(points, about, sizes, other))
    folder = out / f"{name}_{seed}"
    kind = "_".join(f"{level:g}" for level in levels.values())
    path = folder / (f"found_{kind}.json" if kind else "found.json")
    found = kept(path, lambda: _found(points, about, seed, sizes, folder, levels))
    labels = np.array(found["labels"], bool)
    console.print(f"{folder.name}: {labels.mean():.3f} of the samples are copies", style="dim")
    raw = {name: np.array(value, float) for name, value in found["values"].items()}
    raw |= {name: raw[one] + raw[other] for name, (one, other) in SUMS.items()}
    cost = dict(found["evaluations"])
    cost |= {name: cost[one] + cost[other] for name, (one, other) in SUMS.items()}
    values = {name: ranked(value) for name, value in raw.items()}
    return found | {"values": values, "evaluations": cost, "labels": labels, "levels": levels}


class _Drawn(NamedTuple):
    data: np.ndarray
    held_out: np.ndarray
    found: Trained
    samples: np.ndarray
    copied: mem.Copies


def _drawn(points: np.ndarray, about: Training, seed: int, sizes: Sizes, folder: Path) -> _Drawn:
    """Of a trained model, samples and labels."""
    order = np.random.default_rng(seed).permutation(len(points))
    data = points[order[: sizes.num_points]]
    held_out = points[order[sizes.num_points :][: sizes.num_held_out]]
    found = trained(data, about, seed, folder)
    samples = samples_of(found, sizes.num_samples, seed)
    copied = mem.copies(samples, data)
    if copied.memorized.all() or not copied.memorized.any():
        raise SystemExit(f"{folder.name}: no two kinds of samples; train for longer, or less long.")
    return _Drawn(data, held_out, found, samples, copied)


def chosen_levels(
    points: np.ndarray, about: Training, sizes: Sizes, folder: Path
) -> dict[str, float]:
    """The noise levels at which the training of seed 0 gives its copies away best."""
    drawn = _drawn(points, about, 0, sizes, folder)

    def auroc(detector: str, **level: float) -> float:
        scored = scores_of((detector,), drawn.samples, drawn.found, drawn.data, 0, **level)
        found = detected(ranked(scored.value[detector]), drawn.copied.memorized).auroc.value
        console.print(f"{folder.name}, {detector}, {level}: AUROC {found:.3f}", style="dim")
        return found

    return {
        "sigma": max(SIGMAS, key=lambda level: auroc(SMALL_STEPS, sigma=level)),
        "regenerate_from": max(
            REGENERATE_FROM,
            key=lambda level: auroc("regeneration_mean_log_ratio_baseline", regenerate_from=level),
        ),
    }


def _found(
    points: np.ndarray, about: Training, seed: int, sizes: Sizes, folder: Path,
    levels: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    data, held_out, found, samples, copied = _drawn(points, about, seed, sizes, folder)
    scored = scores_of((*LID_DETECTORS, *OTHERS, ORACLE), samples, found, data, seed, **levels)
    given = given_size(scored, held_out, found, data, seed, levels)
    values = dict(scored.value) | {GIVEN_SIZE: given}
    best = max(
        LID_DETECTORS,
        key=lambda name: detected(ranked(values[name]), copied.memorized).auroc.value,
    )
    rows = np.argsort(-ranked(values[best]))[:24]
    draw_beside(
        samples[rows], data[copied.nearest[rows]], [f"{each:.2f}" for each in copied.ratio[rows]],
        f"highest {best}, with d1 / d2", folder,
    )  # fmt: skip
    return {
        "evaluations": scored.evaluations | {GIVEN_SIZE: scored.evaluations["regeneration"]},
        "values": {name: list(map(number, value)) for name, value in values.items()},
        "labels": copied.memorized.tolist(),
    }


def given_size(
    scored: mem.Scores, held_out: np.ndarray, found: Trained, data: np.ndarray, seed: int,
    levels: dict[str, float],
) -> np.ndarray:  # fmt: skip
    """Regeneration less what is usual for the size of the picture as PNG, among held-out ones."""
    names = ("regeneration", "png_bytes")
    known = scores_of(names, held_out, found, data, seed, **levels).value
    lids = [np.log(-scores["regeneration"]) for scores in (scored.value, known)]
    sizes = [-scores["png_bytes"] for scores in (scored.value, known)]
    return -mem.complexity_residual(lids[0], sizes[0], lids[1], sizes[1])


def rows_of(runs: list[dict[str, Any]], num_resamples: int) -> list[dict[str, Any]]:
    """A row for each detector: metrics over the seeds of one source."""
    rows = []
    for name in runs[0]["values"]:
        found = [
            mem.detection(run["values"][name], run["labels"], seed=0, num_resamples=num_resamples)
            for run in runs
        ]
        kind = "LID" if name in (*LID_DETECTORS, *SUMS, GIVEN_SIZE) else "-"
        kind = "data" if name == ORACLE else kind
        rows.append({
            "detector": name, "kind": kind, "evaluations": runs[0]["evaluations"][name],
            "AUROC": [each.auroc.value for each in found],
            "AUPRC": [each.auprc.value for each in found],
            "TPR at 1% FPR": [each.tpr.value for each in found],
            "intervals of TPR": [[each.tpr.low, each.tpr.high] for each in found],
        })  # fmt: skip
    return rows


def best_of(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """By the mean AUROC."""
    return max((row for row in rows if row["kind"] == kind), key=lambda row: np.mean(row["AUROC"]))


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds."""
    content, failures = {}, []
    for source in images:
        # Not 0: the scales were found on that one.
        runs = [one(source, seed, preset, out) for seed in range(1, seeds + 1)]
        rows = rows_of(runs, 100 if preset == "smoke" else 1_000)
        shown = [
            {name: row[name] for name in ("detector", "kind", "evaluations")}
            | {name: spoken(row[name]) for name in ("AUROC", "AUPRC", "TPR at 1% FPR")}
            for row in rows
        ]
        counts = ", ".join(f"{run['labels'].sum()}" for run in runs)
        samples = SIZES[preset].num_samples
        table(f"C2, {Path(source).name}: which samples are copies ({counts} of {samples})", shown)
        if runs[0]["levels"]:
            console.print(f"noise levels, relative to the spread: {runs[0]['levels']}")
        best, other = best_of(rows, "LID"), best_of(rows, "-")
        compared = [
            mem.compare(
                run["values"][best["detector"]], run["values"][other["detector"]], run["labels"],
                seed=0, num_resamples=100 if preset == "smoke" else 1_000,
            )
            for run in runs
        ]  # fmt: skip
        console.print(
            f"{best['detector']} is better than {other['detector']} by "
            f"{spoken([each.auroc.value for each in compared])} in AUROC and "
            f"{spoken([each.tpr.value for each in compared])} in TPR"
        )
        content[Path(source).name] = {
            "rows": rows, "memorized": [float(run["labels"].mean()) for run in runs],
            "levels": runs[0]["levels"], "best": best["detector"], "best other": other["detector"],
            "differences of AUROC": [each.auroc for each in compared],
            "differences of TPR": [each.tpr for each in compared],
        }  # fmt: skip
        if preset != "smoke":
            for metric, least in BARS.items():
                if not np.mean(best[metric]) >= least:
                    failures.append(
                        f"{Path(source).name}: {best['detector']} has {metric} "
                        f"{spoken(best[metric])}, below {least}"
                    )
    return content, failures
