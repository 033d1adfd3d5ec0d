"""LID of trained models on sets of known dimension, at a scale that each point finds itself.

Trains a residual MLP on each set (100,000 points; kept in `--models`, continued if interrupted),
takes the spectrum of its Jacobian at 16 noise levels and test points, reads every dimension from
it, and lets `lid.at_plateau` choose the level: no ground truth enters.  Beside the error there are
those of the best single noise level, chosen with the truth, and of the FLIPD paper's knee; and the
exact denoiser's, where there is one.

    python benchmarks/lid_accuracy.py --preset cpu --sets "uniform 10+30+90 in 100"
    python benchmarks/lid_accuracy.py --preset cpu            # every set: hours on 2 cores

Set OPENBLAS_NUM_THREADS=1 on a CPU: eigenproblems of batches are several times faster.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from common import concordance, console, finish, header, table
from known_dimensions import TEST_KEY, TRAIN_KEY, Case, cases, recipes

from mmh_jax import lid, mapping, train

NUM_LEVELS = 16
SMOKE = ("Gaussian 5 in 10",)


def readings(model: Any, points: np.ndarray, sigmas: np.ndarray) -> tuple[dict[str, Any], Any]:
    """Every dimension at N points and S levels, (N, S) each; and the median asymmetry, (S,)."""
    chunk = int(np.clip(2**22 // points[0].size ** 2, 1, 64))
    spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None), chunk_size=chunk)
    columns: dict[str, list[np.ndarray]] = {}
    asymmetry = []
    for sigma in sigmas:
        spectrum = spectra(model, points, np.float32(sigma))
        values = {
            "FLIPD": spectrum.flipd,
            "projected": spectrum.projected_flipd,
            "thresholded": spectrum.thresholded_flipd,
            "count > 1/2": lid.rank_by_threshold(spectrum.eigenvalues),
            "gap": lid.rank_by_gap(spectrum.eigenvalues, ceiling=1.0),
            "soft count": lid.soft_rank(spectrum.eigenvalues),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(np.asarray(value, float))
        asymmetry.append(np.median(spectrum.asymmetry))
    return {name: np.stack(column, axis=1) for name, column in columns.items()}, asymmetry


def judge(name: str, curves: np.ndarray, sigmas: np.ndarray, truth: np.ndarray, dim: int) -> dict:
    """Errors of one reading, at the plateau and by the other rules."""
    zero = np.zeros_like(curves)
    chosen = lid.at_plateau(lid.Curve(sigmas, curves, zero, zero), ambient_dim=dim)
    error = chosen.value - truth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kneed divides 0 by 0 on a constant curve
        knees = [lid.knee(lid.Curve(sigmas, row, 0 * row, 0 * row)) for row in curves]
    fixed = np.abs(curves - truth[:, None]).mean(axis=0)
    at_knee = np.abs(np.array(knees) - truth)
    return {
        "reading": name,
        "MAE": float(np.abs(error).mean()),
        "bias": float(error.mean()),
        "concordance": concordance(truth, chosen.value),
        "in interval %": float(100 * np.mean(np.abs(error) <= 1.96 * chosen.stderr)),
        "no plateau %": float(100 * np.mean(chosen.num_plateaus == 0)),
        "median sigma": float(np.median(chosen.sigma)),
        "MAE best sigma": float(fixed.min()),
        "MAE knee": float(np.nanmean(at_knee)) if np.isfinite(at_knee).any() else None,
    }


def trained(case: Case, recipe: train.Recipe, models: Path, preset: str) -> tuple[Any, float]:
    """The model, in data units, and the seconds its training took (0 if it was there)."""
    num = 5_000 if preset == "smoke" else 100_000
    points = np.asarray(case.draw(num, TRAIN_KEY).points)
    start = time.perf_counter()

    def progress(step: int, total: int, loss: float) -> None:
        print(f"\r{case.name}: step {step} of {total}, loss {loss:.3f}", end="", file=sys.stderr)

    folder = models / preset / case.name.replace(" ", "_")
    model = train.train_model(points, recipe, folder, seed=0, progress=progress)
    print(file=sys.stderr)
    return model, time.perf_counter() - start


def evaluate(case: Case, model: Any, sigmas: np.ndarray, num: int) -> list[dict[str, Any]]:
    test = jax.tree.map(np.asarray, case.draw(num, TEST_KEY))
    curves, asymmetry = readings(model, test.points, sigmas)
    rows = [judge(name, c, sigmas, test.lid, case.ambient_dim) for name, c in curves.items()]
    for row in rows:
        row["asymmetry"] = float(np.median(asymmetry))
    return rows


def fault(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    if case.largest_mae is None:
        return []
    by_name = {row["reading"]: row["MAE"] for row in rows}
    names = ("thresholded", "count > 1/2")
    return [
        f"{case.name}: {name} MAE {by_name[name]:.3f} above {most}"
        for name, most in zip(names, case.largest_mae, strict=True)
        if not by_name[name] <= most
    ]


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    sets: tuple[str, ...] = (),
    num_points: int | None = None,
    models: Path = Path("results/models"),
    out: Path = Path("results/lid_accuracy.json"),
) -> int:
    about = header()
    every = cases()
    chosen = sets or (SMOKE if preset == "smoke" else tuple(every))
    if unknown := sorted(set(chosen) - set(every)):
        raise SystemExit(f"--sets: no set is called {unknown}; there are {sorted(every)}.")
    results, failures = [], []
    for name in chosen:
        case, recipe = every[name], recipes(preset)[every[name].recipe]
        num = num_points or (16 if preset == "smoke" else 256 if case.ambient_dim <= 256 else 32)
        model, seconds = trained(case, recipe, models, preset)
        sigmas = np.geomspace(recipe.sigma_min, 1.0, NUM_LEVELS) * float(model.scale)
        rows = evaluate(case, model, sigmas, num)
        table(f"{name}: trained network, {seconds:.0f} s, {num} test points", rows)
        exact_rows = []
        if case.exact is not None:
            exact_rows = evaluate(case, case.exact(), sigmas, num)
            table(f"{name}: exact denoiser", exact_rows)
        if preset != "smoke":
            failures += fault(case, rows)
        results.append(
            {"set": name, "seconds": seconds, "recipe": dataclasses.asdict(recipe)}
            | {"trained": rows, "exact": exact_rows}
        )
    summary = [
        {"set": result["set"]}
        | {row["reading"]: row["MAE"] for row in result["trained"]}
        | {"best sigma": result["trained"][2]["MAE best sigma"]}
        | {"knee": result["trained"][2]["MAE knee"]}
        for result in results
    ]
    table("MAE at the plateau; the last two columns for the thresholded reading", summary)
    console.print("levels and points as above; the best single sigma is chosen with the truth")
    return finish(out, about, {"preset": preset, "results": results}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
