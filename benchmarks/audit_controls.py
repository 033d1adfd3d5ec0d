"""What an audit finds where the truth is known: planted copies, none, an overfitted model.

Whole audits, by the command line, of sets made from digits, FashionMNIST and a mixture of planes:

    planted      some of the points are there 2, 4, 8, 16 and 32 times, the others once
    example      600 digits, 10 of them there 33 times and 10 nine times
    none         every point once, and enough of them
    overfitted   few points, each once

A point is extracted if any of 10,000 samples copies it.  A false discovery is a point that is said
to be memorized, is there once, and is extracted by none.

    python benchmarks/audit_controls.py --preset cpu
    python benchmarks/audit_controls.py --preset cpu --data fashion --fashion-mnist FOLDER
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from common import finish, header, table

from mmh_jax.cli import main as mmh_jax
from mmh_jax.data import manifolds, sources

DOSES = (2, 4, 8, 16, 32)
# Points of the planted set that are there once, and those of each dose; of `none`; of `overfitted`.
SIZES = {"digits": (600, 5, 1797, 100), "fashion": (1200, 5, 4000, 100)}
SIZES |= {"planes": (1500, 5, 4000, 60)}


def points_of(data: str, fashion: Path | None, seed: int) -> np.ndarray:
    """All the points, in an order that depends on the seed."""
    if data == "planes":
        mixture = manifolds.affine_mixture((1, 2, 3, 4, 5), 12, key=jax.random.key(seed))
        return np.asarray(mixture.sample(8_000, key=jax.random.key(seed + 100)).points, np.float32)
    if data == "fashion" and fashion is None:
        raise ValueError("--data fashion needs --fashion-mnist FOLDER.")
    source = "digits" if data == "digits" else str(fashion)
    points = sources.load(source, max_points=8_000).points
    return points[np.random.default_rng(seed).permutation(len(points))]


def sets_of(data: str, points: np.ndarray, part: float) -> dict[str, np.ndarray]:
    """The sets that are audited; `part` of their sizes."""
    single, planted, none, few = (max(int(part * size), 3) for size in SIZES[data])
    of_dose = np.split(points[single:][: planted * len(DOSES)], len(DOSES))
    copies = [np.repeat(p, dose, axis=0) for p, dose in zip(of_dose, DOSES, strict=True)]
    sets = {
        "planted": np.concatenate([points[:single], *copies]),
        "none": points[:none],
        "overfitted": points[: max(few, 30)],
    }
    if data == "digits":
        times = [33] * 10 + [9] * 10 + [1] * (single - 20)
        sets["example"] = np.repeat(points[:single], times, axis=0)
    return sets


def audited(points: np.ndarray, preset: str, seed: int, folder: Path) -> list[dict[str, str]]:
    """The judged rows of `points.csv`."""
    np.save(folder / "points.npy", points)
    num_samples = "10000" if preset != "smoke" else "64"
    command = ["audit", str(folder / "points.npy"), "--out", str(folder / "out")]
    command += [
        "--preset",
        preset,
        "--seed",
        str(seed),
        "--num-samples",
        num_samples,
        "--num-points",
        "4000",
    ]
    if mmh_jax(command):
        raise RuntimeError(f"mmh-jax {' '.join(command)} failed")
    with (folder / "out" / "points.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["role"] == "judged"]


def measured(rows: list[dict[str, str]]) -> dict[str, float]:
    """What was found; NaN where nothing was there to be found."""
    copies = np.array([int(row["copies"]) for row in rows])
    extracted = np.array([int(row["extracted"]) > 0 for row in rows])
    od, dd = (np.array([row["verdict"] == kind for row in rows]) for kind in ("OD-Mem", "DD-Mem"))
    found, single = od | dd, copies == 1

    def share(of: np.ndarray, among: np.ndarray) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    return {
        "judged": len(rows),
        "extracted": int(extracted.sum()),
        "found": int(found.sum()),
        "recall of extracted": share(found, extracted),
        "false discoveries": share(single & ~extracted, found),
        "DD of >= 16 times": share(dd, copies >= 16),
        "DD of 8, 9 times": share(dd, (copies == 8) | (copies == 9)),
        "OD of extracted": share(od, single & extracted),
        "found of single": share(found, single),
        "undecided": share(np.array([row["verdict"] == "undecided" for row in rows]), single),
    }


# What must hold, by set: at least, or at most.
LEAST = {
    "planted": {"recall of extracted": 0.95, "DD of >= 16 times": 0.98},
    "example": {"recall of extracted": 0.95, "DD of >= 16 times": 1.0},
    "overfitted": {"OD of extracted": 0.8},
}
MOST = {
    "planted": {"false discoveries": 0.06},
    "example": {"false discoveries": 0.0},
    "overfitted": {"false discoveries": 0.06},
    "none": {"found of single": 0.01},
}


def faults(name: str, found: dict[str, float]) -> list[str]:
    """What does not hold."""
    least = [(k, v, found[k] < v) for k, v in LEAST.get(name, {}).items()]
    most = [(k, v, found[k] > v) for k, v in MOST.get(name, {}).items()]
    return [f"{name}: {k} is {found[k]:.3f}, not {v}" for k, v, wrong in least + most if wrong]


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    data: tuple[Literal["digits", "fashion", "planes"], ...] = ("digits", "planes"),
    sets: tuple[str, ...] = ("example", "planted", "none", "overfitted"),
    seeds: tuple[int, ...] = (0, 1, 2),
    fashion_mnist: Path | None = None,
    out: Path = Path("results/audit_controls.json"),
) -> int:
    about, rows, shown, failures = header(), [], [], []
    if preset == "smoke":
        data, seeds, sets = ("digits",), (0,), ("planted",)
    for one in data:
        for seed in seeds:
            points = points_of(one, fashion_mnist, seed)
            made = sets_of(one, points, 0.2 if preset == "smoke" else 1.0)
            for name in (name for name in sets if name in made):
                start = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    judged = audited(made[name], preset, seed, Path(folder))
                found = measured(judged)
                rows.append({"data": one, "set": name, "seed": seed} | found)
                rows[-1]["seconds"] = round(time.monotonic() - start)
                if preset != "smoke":
                    failures += [f"{one}, seed {seed}, {f}" for f in faults(name, found)]
                # What was not there to be found has no share.
                shown = [{k: None if v != v else v for k, v in r.items()} for r in rows]
                table("What audits found", shown)
    return finish(out, about, {"preset": preset, "rows": shown}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
