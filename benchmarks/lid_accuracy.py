"""LID of trained models on sets of known dimension, at a scale that each point finds itself.

Trains a residual MLP on each set (100,000 points; kept in `--models`, continued if interrupted),
takes the spectrum of its Jacobian at 16 noise levels and test points, reads every dimension from
it, and lets `lid.at_plateau` choose the level: no ground truth enters.  Columns: the mean absolute
error, the bias, the concordance index, how often the 95% interval holds the truth, how often the
answer is D though the truth is not (the network returns its input: it has learned nothing at that
level) and how often there is no plateau, the median of the chosen noise levels; the errors at the
best single level (`best`, chosen with the truth) and at the FLIPD paper's knee.  Then the same for
the exact denoiser where there is one.

    python benchmarks/lid_accuracy.py --preset cpu --sets "uniform 10+30+90 in 100"
    python benchmarks/lid_accuracy.py --preset cpu            # 55 sets: hours on 2 cores

Any set of `mmh_jax.data.registry` can be named.  Without names those of the public benchmark of
models are run; the 24 on which estimators from data are compared ("M1 sphere" to "Mp3 paraboloid")
and the von Mises toy are not.

`--training conservative` (the gradient of a scalar) and `--training symmetric` (a regulariser) are
two other ways to train, for about as long.

Set OPENBLAS_NUM_THREADS=1 on a CPU: eigenproblems of batches are several times faster.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from common import concordance, console, finish, header, table
from known_dimensions import TEST_KEY, TRAIN_KEY, Case, Training, cases, recipes

from mmh_jax import lid, mapping, train
from mmh_jax.report.files import write_json

NUM_LEVELS = 16
LIDL_LEVELS = 6
# A normal bundle is the singular values of 4 D scores: too dear beyond.
LARGEST_FOR_NORMALS = 256
NORMALS_KEY = jax.random.key(3)
KEPT = "expected"
SUMMARY = {
    "FLIPD": "FLIPD",
    "projected": "proj.",
    "thresholded": "thresh.",
    "tangential": "tang.",
    "expected": "exp.",
    "count > 1/2": "count",
    "gap": "gap",
    "normal bundle": "NB",
    "LIDL": "LIDL",
}
SMOKE = ("Gaussian 5 in 10",)


class Reading(NamedTuple):
    """One way to read a dimension, at N points and S levels.

    Attributes:
        value, stderr: (N, S).
        sigmas: (S,), in data units.
    """

    value: np.ndarray
    stderr: np.ndarray
    sigmas: np.ndarray


def readings(
    model: Any, points: np.ndarray, sigmas: np.ndarray
) -> tuple[dict[str, Reading], np.ndarray]:
    """Every reading; and the asymmetry of the Jacobian, (N, S)."""
    size = points[0].size
    chunk = int(np.clip(2**22 // size**2, 1, 64))
    spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None), chunk_size=chunk)
    normals = mapping.over_points(
        # By threshold: the mean score, which lies along tangents, is taken for a normal by the gap.
        lambda model, x, key, sigma: lid.rank_by_threshold(
            lid.normal_bundle_spectrum(model, x, sigma, key=key)
        ),
        (None, 0, 0, None),
        chunk_size=chunk,
    )
    keys = jax.random.split(NORMALS_KEY, len(points))
    values: dict[str, list[Any]] = {}
    errors, asymmetry = [], []
    for sigma in np.asarray(sigmas, np.float32):
        spectrum = spectra(model, points, sigma)
        rows = {
            "FLIPD": spectrum.flipd,
            "projected": spectrum.projected_flipd,
            "thresholded": spectrum.thresholded_flipd,
            "tangential": spectrum.tangential_flipd,
            "expected": spectrum.expected_flipd,
            "count > 1/2": lid.rank_by_threshold(spectrum.eigenvalues),
            "gap": lid.rank_by_gap(spectrum.eigenvalues, ceiling=1.0),
            "soft count": lid.soft_rank(spectrum.eigenvalues),
        }
        if size <= LARGEST_FOR_NORMALS:
            rows["normal bundle"] = size - normals(model, points, keys, sigma)
        for name, row in rows.items():
            values.setdefault(name, []).append(np.asarray(row, float))
        errors.append(np.asarray(spectrum.network_error, float))
        asymmetry.append(np.asarray(spectrum.asymmetry, float))
    error = np.stack(errors, axis=1)
    found = {
        name: Reading(
            np.stack(rows, axis=1),
            error if name in ("thresholded", "tangential", "expected") else 0 * error,
            sigmas,
        )
        for name, rows in values.items()
    }
    found["LIDL"] = sliding_lidl(found["FLIPD"])
    return found, np.stack(asymmetry, axis=1)


def sliding_lidl(flipd: Reading) -> Reading:
    """LIDL over every run of 6 levels, named by the geometric mean of its noise levels."""
    runs = range(len(flipd.sigmas) - LIDL_LEVELS + 1)
    values = []
    for start in runs:
        part = slice(start, start + LIDL_LEVELS)
        weights = np.asarray(lid.lidl_weights(flipd.sigmas[part]))
        values.append(flipd.value[:, part] @ weights)
    means = [np.exp(np.log(flipd.sigmas[r : r + LIDL_LEVELS]).mean()) for r in runs]
    value = np.stack(values, axis=1)
    return Reading(value, 0 * value, np.array(means))


def judge(name: str, reading: Reading, truth: np.ndarray, dim: int) -> dict[str, Any]:
    """Errors of one reading, at the plateau and by the other rules."""
    value, stderr, sigmas = reading
    chosen = lid.at_plateau(lid.Curve(sigmas, value, stderr, 0 * value), ambient_dim=dim)
    error = chosen.value - truth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kneed divides 0 by 0 on a constant curve
        knees = [lid.knee(lid.Curve(sigmas, row, 0 * row, 0 * row)) for row in value]
    fixed = np.abs(value - truth[:, None]).mean(axis=0)
    at_knee = np.abs(np.array(knees) - truth)
    return {
        "reading": name,
        "MAE": float(np.abs(error).mean()),
        "bias": float(error.mean()),
        "concordance": concordance(truth, chosen.value),
        # To rounding: a count without error is inside its interval of width 0.
        "inside %": float(100 * np.mean(np.abs(error) <= 1.96 * chosen.stderr + 1e-6)),
        "at D %": float(100 * np.mean((chosen.value > 0.95 * dim) & (truth <= 0.95 * dim))),
        "none %": float(100 * np.mean(chosen.num_plateaus == 0)),
        "sigma": float(np.median(chosen.sigma)),
        "best": float(fixed.min()),
        "knee": float(np.nanmean(at_knee)) if np.isfinite(at_knee).any() else None,
    }


def trained(case: Case, recipe: train.Recipe, models: Path, *, num: int) -> tuple[Any, float]:
    """The model, in data units, and the seconds its training took, in this run or an earlier."""
    points = np.asarray(case.draw(num, TRAIN_KEY).points)

    def progress(step: int, total: int, loss: float) -> None:
        print(f"\r{case.name}: step {step} of {total}, loss {loss:.3f}", end="", file=sys.stderr)

    folder = models / case.name.replace(" ", "_")
    clock = folder.with_name(folder.name + ".seconds.json")
    finished = (folder / "config.json").exists()
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    start = time.perf_counter()
    try:
        model = train.train_model(points, recipe, folder, seed=0, progress=progress)
    finally:
        if not finished and folder.exists():
            spent += time.perf_counter() - start
            clock.write_text(json.dumps(spent))
    print(file=sys.stderr)
    return model, spent


def evaluate(case: Case, model: Any, sigmas: np.ndarray, num: int) -> list[dict[str, Any]]:
    test = jax.tree.map(np.asarray, case.draw(num, TEST_KEY))
    found, asymmetry = readings(model, test.points, sigmas)
    rows = [judge(name, curve, test.lid, case.ambient_dim) for name, curve in found.items()]
    console.print(f"{case.name}: median asymmetry of the Jacobians {np.median(asymmetry):.3f}")
    return rows


def fault(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    if case.largest_mae is None:
        return []
    by_name = {row["reading"]: row["MAE"] for row in rows}
    flipd, count = case.largest_mae
    return [
        f"{case.name}: {name} MAE {by_name[name]:.3f} above {most}"
        for name, most in {"projected": flipd, KEPT: flipd, "count > 1/2": count}.items()
        if not by_name[name] <= most
    ]


def by_reading(result: dict[str, Any]) -> dict[str, Any]:
    rows = {row["reading"]: row for row in result["trained"]}
    found = {head: rows[name]["MAE"] if name in rows else None for name, head in SUMMARY.items()}
    return {"set": result["set"]} | found


def by_rule(result: dict[str, Any]) -> dict[str, Any]:
    row = next(row for row in result["trained"] if row["reading"] == KEPT)
    names = ("MAE", "best", "knee", "bias", "concordance", "inside %", "at D %", "none %")
    seconds = {"training, s": round(result["seconds"])}
    return {"set": result["set"]} | {name: row[name] for name in names} | seconds


def _num_points(ambient_dim: int) -> int:
    """Test points: a spectrum costs D^3."""
    return int(np.clip(20_000 // ambient_dim, 24, 256))


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    training: Training = "plain",
    sets: tuple[str, ...] = (),
    num_points: int | None = None,
    models: Path = Path("results/models"),
    out: Path = Path("results/lid_accuracy.json"),
) -> int:
    about = header()
    out.parent.mkdir(parents=True, exist_ok=True)
    every = cases()
    by_default = tuple(name for name, case in every.items() if case.by_default)
    chosen = sets or (SMOKE if preset == "smoke" else by_default)
    if unknown := sorted(set(chosen) - set(every)):
        raise SystemExit(f"--sets: no set is called {unknown}; there are {sorted(every)}.")
    # A set that cannot be drawn is found before the hours of training, not after.
    for name in every if preset == "smoke" else chosen:
        every[name].draw(2, TEST_KEY)
    folder = models / (preset if training == "plain" else f"{preset}-{training}")
    results, failures = [], []
    for name in chosen:
        case, recipe = every[name], recipes(preset, training)[every[name].recipe]
        num = num_points or (16 if preset == "smoke" else _num_points(case.ambient_dim))
        model, seconds = trained(case, recipe, folder, num=5_000 if preset == "smoke" else 100_000)
        sigmas = np.geomspace(recipe.sigma_min, 1.0, NUM_LEVELS) * float(model.scale)
        rows = evaluate(case, model, sigmas, num)
        table(f"{name}: trained network, {seconds:.0f} s, {num} test points", rows)
        exact_rows = []
        if (exact := case.exact()) is not None:
            exact_rows = evaluate(case, exact, sigmas, num)
            table(f"{name}: exact denoiser", exact_rows)
        if preset != "smoke" and training == "plain":
            failures += fault(case, rows)
        results.append(
            {"set": name, "seconds": seconds, "recipe": recipe.settings()}
            | {"trained": rows, "exact": exact_rows}
        )
        # Hours of work: what is finished is on disk.
        write_json(out, {"about": about, "unfinished": True, "results": results})
    table("MAE at the plateau, by reading", [by_reading(result) for result in results])
    table(
        f"the {KEPT} reading: at the plateau, at the best single level, at the knee",
        [by_rule(result) for result in results],
    )
    console.print("levels and points as above; the best single sigma is chosen with the truth")
    return finish(
        out, about, {"preset": preset, "training": training, "results": results}, failures
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
