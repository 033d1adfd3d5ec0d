"""Tier C1, the easy half: which *training pictures* does a model give away that saw some often?

Some pictures are repeated, 2 to 64 times in all, exactly; others are there in versions, shifted by
up to a pixel or with noise.  A residual MLP is trained on all; a training picture is memorized if
at least one sample is a copy of it or of one of its versions (d1 / d2 < 1/3, versions counting as
one), never because it was planted.  Those memorized are told from three pools of others: pictures
held out, pictures trained on and not extracted, and held-out pictures of the same size as PNG.

Training pictures against held-out ones, memorized or not, is membership inference; its AUROC is
printed apart.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import console, number, table

from ladder.pictures import pictures
from ladder.trained import (
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
from mmh_jax.data import augment, planting

LID_DETECTORS = (
    "flipd", "expected_flipd", "projected_trace", "eigenvalue_count", "denoising_loss",
    "denoised_spread", "regeneration", "regeneration_log_ratio_baseline",
    "projected_trace_log_ratio_baseline",
)  # fmt: skip
OTHERS = ("residual", "score_norm", "png_bytes", "pixel_variance")
EXACT, SHIFTED, NOISY, SINGLE, HELD_OUT = "exact", "shifted", "noisy", "single", "held out"
POOLS = ("held out", "not extracted", "same size")
BARS = {"exact": {"AUROC": 0.995, "TPR at 1% FPR": 0.95}, "near": {"AUROC": 0.95}}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset.

    Attributes:
        training: of the network.
        longer: times as many steps for pictures of more than 100 pixels, as in C2.
        num_points: pictures before planting.
        copies: how often the exact ones are there.
        num_planted: pictures for each of these numbers.
        num_versions: of each of the pictures with near-duplicates, of which there are twice
            `num_planted`.
        num_singles: other training pictures that are scored.
        num_held_out, num_samples: as they say.
    """

    training: Training
    longer: float
    num_points: int
    copies: tuple[int, ...]
    num_planted: int
    num_versions: int
    num_singles: int
    num_held_out: int
    num_samples: int


SIZES = {
    "smoke": Sizes(Training(192, 1_200, 64), 1, 30, (4, 16), 3, 8, 10, 40, 100),
    "cpu": Sizes(Training(384, 6_000), 2.5, 900, (2, 4, 8, 16, 64), 16, 16, 400, 500, 12_000),
    "accelerator": Sizes(
        Training(1_024, 20_000), 2.5, 10_000, (2, 4, 8, 16, 64, 256), 50, 16, 2_000, 4_000, 20_000
    ),
}


class Planted(NamedTuple):
    """A set to train on: rows with their versions, and what was planted where."""

    points: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    kinds: np.ndarray
    counts: np.ndarray


def planted(points: np.ndarray, sizes: Sizes, seed: int) -> Planted:
    """Exact, shifted and noisy duplicates, in three disjoint parts of the pictures."""
    num = sizes.num_planted
    parts = np.split(points, [len(points) - 4 * num, len(points) - 2 * num])
    keys = jax.random.split(jax.random.key(seed), 3)
    noise = augment.noise(0.1 * float(points.std()))
    found = [
        planting.plant_duplicates(parts[0], copies=sizes.copies, num_planted=num, key=keys[0]),
        *(
            planting.plant_duplicates(
                part, copies=sizes.num_versions, num_planted=num, key=key, perturb=perturb
            )
            for part, key, perturb in zip(
                parts[1:], keys[1:], (augment.shift(1), noise), strict=True
            )
        ),
    ]  # fmt: skip
    starts = np.cumsum([0, *(len(each.points) for each in found)])[:-1]
    groups = [each.origin + start for each, start in zip(found, starts, strict=True)]
    rows = [each.rows + start for each, start in zip(found, starts, strict=True)]
    singles = np.setdiff1d(np.arange(len(parts[0])), found[0].rows)[: sizes.num_singles]
    kinds = np.repeat([EXACT, SHIFTED, NOISY, SINGLE], [*map(len, rows), len(singles)])
    counts = np.concatenate([*(each.counts for each in found), np.ones(len(singles), int)])
    together = np.concatenate([each.points for each in found])
    return Planted(
        together, np.concatenate(groups), np.concatenate([*rows, singles]), kinds, counts
    )


def one(source: str, seed: int, preset: str, out: Path) -> dict[str, Any]:
    """Plant, train, draw, label and score, or read what was found; an entry for each picture."""
    sizes = SIZES[preset]
    points = pictures(source, 28 if preset == "accelerator" else 14)[0]
    points = points[np.random.default_rng(seed).permutation(len(points))]
    data = planted(points[: sizes.num_points], sizes, seed)
    held_out = points[sizes.num_points :][: sizes.num_held_out]
    about = longer(sizes.training, points, sizes.longer)
    name = f"{Path(source).name}_planted_{len(data.points)}_{about.width}_{about.num_steps}_{seed}"
    folder = out / name
    found = kept(folder / "found.json", lambda: _found(data, held_out, about, seed, sizes, folder))
    none = np.zeros(len(held_out), int)
    console.print(f"{name}: {len(np.unique(data.groups))} different pictures", style="dim")
    values = {name: ranked(value) for name, value in found["values"].items()}
    return {
        "kinds": np.concatenate([data.kinds, np.full(len(held_out), HELD_OUT)]),
        "counts": np.concatenate([data.counts, none]),
        "extracted": np.concatenate([found["extracted"], none]),
        "values": values, "dimension": -values["expected_flipd"], "png": -values["png_bytes"],
        "evaluations": found["evaluations"],
    }  # fmt: skip


def _found(
    data: Planted, held_out: np.ndarray, about: Training, seed: int, sizes: Sizes, folder: Path
) -> dict[str, Any]:
    found = trained(data.points, about, seed, folder)
    samples = samples_of(found, sizes.num_samples, seed)
    extracted = mem.extraction(mem.copies(samples, data.points, groups=data.groups))
    asked = np.concatenate([data.points[data.rows], held_out])
    scored = scores_of((*LID_DETECTORS, *OTHERS), asked, found, data.points, seed)
    return {
        "extracted": extracted.counts[data.rows].tolist(), "evaluations": scored.evaluations,
        "values": {name: list(map(number, value)) for name, value in scored.value.items()},
    }  # fmt: skip


def pool_of(pool: str, run: dict[str, Any], positive: np.ndarray) -> np.ndarray:
    """Which points are the negatives."""
    held_out = run["kinds"] == HELD_OUT
    if pool == "held out":
        return held_out
    if pool == "not extracted":
        return ~held_out & (run["extracted"] == 0)
    # The held-out pictures nearest in size to each memorized one, each taken once.
    rows, sizes = np.flatnonzero(held_out), run["png"]
    order = np.argsort(np.abs(sizes[rows] - sizes[positive][:, None]), axis=1)
    chosen = np.zeros(len(held_out), bool)
    chosen[rows[order[:, : max(1, len(rows) // 10)]].ravel()] = True
    return chosen


def positives(run: dict[str, Any], what: str) -> np.ndarray:
    """Extracted ones: of exact duplicates those repeated at least 16 times, or of versions."""
    kinds = run["kinds"]
    of_kind = (kinds == EXACT) & (run["counts"] >= 16)
    if what == "near":
        of_kind = (kinds == SHIFTED) | (kinds == NOISY)
    return of_kind & (run["extracted"] > 0)


def detections(runs: list[dict[str, Any]], what: str, pool: str) -> list[dict[str, Any]]:
    """A row for each detector, over the seeds in which there is something to tell apart."""
    rows = []
    for name in runs[0]["values"]:
        found = []
        for run in runs:
            yes = positives(run, what)
            no = pool_of(pool, run, yes)
            if yes.any() and no.any():
                used = yes | no
                found.append(detected(run["values"][name][used], yes[used]))
        if found:
            rows.append({
                "positives": what, "negatives": pool, "detector": name,
                "kind": "LID" if name in LID_DETECTORS else "-",
                "AUROC": [each.auroc.value for each in found],
                "TPR at 1% FPR": [each.tpr.value for each in found],
            })  # fmt: skip
    return rows


def dose_response(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind and number of copies: how many were extracted, and the dimension."""
    rows = []
    cases = sorted({
        (str(kind), int(count))
        for run in runs for kind, count in zip(run["kinds"], run["counts"], strict=True)
    })  # fmt: skip
    for kind, count in cases:
        own = [(run["kinds"] == kind) & (run["counts"] == count) for run in runs]
        share = [float(np.mean(run["extracted"][o] > 0)) for run, o in zip(runs, own, strict=True)]
        median = [float(np.median(run["dimension"][o])) for run, o in zip(runs, own, strict=True)]
        rows.append({
            "pictures": kind, "copies": count, "of each seed": int(own[0].sum()),
            "extracted": spoken(share), "median LID_theta": spoken(median),
        })  # fmt: skip
    return rows


def membership(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Single training pictures against held-out ones: not memorization."""
    rows = []
    for name in runs[0]["values"]:
        values = []
        for run in runs:
            used = np.isin(run["kinds"], [SINGLE, HELD_OUT])
            labels = run["kinds"][used] == SINGLE
            values.append(detected(run["values"][name][used], labels).auroc.value)
        rows.append({"detector": name, "AUROC of membership": spoken(values)})
    return rows


def failures_of(rows: list[dict[str, Any]], source: str) -> list[str]:
    """The bars, for the best LID detector of each pool."""
    failures = []
    for what, bars in BARS.items():
        for pool in POOLS:
            own = [r for r in rows if (r["positives"], r["negatives"]) == (what, pool)]
            own = [row for row in own if row["kind"] == "LID"]
            if not own:
                failures.append(f"{source}: no {what} duplicate was extracted beside {pool}")
                continue
            best = max(own, key=lambda row: np.mean(row["AUROC"]))
            for metric, least in bars.items():
                if not np.mean(best[metric]) >= least:
                    failures.append(
                        f"{source}, {what} duplicates, {pool}: {best['detector']} has {metric} "
                        f"{spoken(best[metric])}, below {least}"
                    )
    return failures


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds."""
    content, failures = {}, []
    for source in images:
        name = Path(source).name
        runs = [one(source, seed, preset, out) for seed in range(1, seeds + 1)]
        doses, members = dose_response(runs), membership(runs)
        table(f"C1, {name}: copies in the data, and what comes of them", doses)
        rows = [
            row for what in BARS for pool in POOLS for row in detections(runs, what, pool)
        ]  # fmt: skip
        if rows:
            shown = [
                row | {metric: spoken(row[metric]) for metric in ("AUROC", "TPR at 1% FPR")}
                for row in rows
            ]
            table(f"C1, {name}: duplicates that were extracted, against three pools", shown)
        table(f"C1, {name}: trained or held out, which is not memorization", members)
        content[name] = {"dose_response": doses, "detection": rows, "membership": members}
        if preset != "smoke":
            failures += failures_of(rows, name)
    return content, failures
