"""Tier D, conditional models: one condition tied to one image (`conditions`).

A condition is dropped with probability .2, samples are drawn with guidance 5, eight of each
condition.  *Detectors* score these samples; a sample is memorized if it is a copy of a training
image by d1 / d2 < 1/3, duplicates counted as one, whatever was asked.  *Attribution*: how often the
token that a detector blames most is the trigger.  *Mechanism*: LID(x|c) <= LID(x), for training
images with their own conditions, in pairs.

The noise level is that of the other tiers, and runs of conditions drawn from the training set are
the reference of step stability: no label is used.  Samples of one condition are not independent, so
that the interval of one seed is too narrow; that over seeds is not.  FLIPD holds the residual,
which is large for a sample off the model's manifold, as guided ones are, and is no dimension: it is
in the table apart, and so is the trace without it.  The mechanism is told by traces, at three
levels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import console, number, table

from ladder import attribution
from ladder.conditions import Task, classes, tokens
from ladder.trained import SIGMA, kept, ranked
from mmh_jax import denoise, lid, linalg, mapping, sample, train
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key

GUIDANCE, DROPPED, EACH = 5.0, 0.2, 8
DETECTORS = (
    "flipd", "flipd_unconditional", "flipd_difference", "flipd_log_ratio", "expected_flipd",
    "projected_trace", "projected_trace_difference", "projected_trace_log_ratio",
    "eigenvalue_count", "eigenvalue_count_difference", "denoised_spread", "residual", "score_norm",
    "cfg_norm", "cfg_norm_first", "cfg_norm_along", "cfg_norm_encoded", "sharpness",
    "curvature_difference", "anisotropy", "squared_difference", "step_stability", "spikiness",
    "pairwise_radius", "nearest_distance", "pixel_variance", "png_bytes",
)  # fmt: skip
OF_TOKENS = ("attention_entropy", "bright_ending", "local_cfg_norm")
# Of those that attribute, the two that must do better than chance.
BLAMING = ("cfg_norm", "flipd")
# Of LID(x): by so much LID(x|c) may be above it.  A network is no density, and where the condition
# takes nothing away the two differ by its errors, which are the same for most points.
ALLOWED = 0.02
# Relative to the spread of the data.
SIGMA_MIN, SIGMA_MAX, SIGMAS = 0.02, 20.0, (0.1, SIGMA, 0.4)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: pixels, the network, its training, conditions asked, levels, points measured."""

    side: int
    width: int
    depth: int
    steps: int
    num_asked: int
    num_levels: int
    num_points: int
    most: int


SIZES = {
    "smoke": Sizes(8, 32, 1, 600, 10, 6, 8, 200),
    "cpu": Sizes(8, 64, 3, 4_000, 160, 12, 128, 1_000),
    "accelerator": Sizes(16, 192, 6, 40_000, 640, 24, 512, 60_000),
}


def trained(task: Task, sizes: Sizes, seed: int, folder: Path) -> denoise.Affine:
    """The model, from the folder if it is there."""
    if (folder / "config.json").exists():
        return train.load(folder)
    shift, scale = train.normalisation(task.points)
    options = {"patch_size": 2, "width": sizes.width, "depth": sizes.depth, "num_heads": 2}
    config = train.ModelConfig(
        "DiT", options | task.options, task.points.shape[1:], scale, 1.0, SIGMA_MIN * scale,
        SIGMA_MAX * scale, {"set": task.about, "seed": seed, "num_steps": sizes.steps},
    )  # fmt: skip
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    model = train.build(config, shift, key=init_key)
    settings = train.TrainConfig(
        num_steps=sizes.steps, batch_size=64, noise_levels=train.log_normal(-1.0, 1.4),
        ema_half_life=sizes.steps / 20, steps_per_round=200, condition_dropout=DROPPED,
        null_condition=task.options.get("num_classes"),
    )  # fmt: skip
    normalised = (task.points - shift) / np.float32(scale)
    for metrics in train.fit(
        model.inner, normalised, settings, key=fit_key, conditions=task.conditions
    ):
        state = metrics.state
    model = dataclasses.replace(model, inner=model.inner.replace(params=state.ema))
    train.save(folder, config, model)
    return model


def _draw(model: Any, cond: Any, levels: Array, scale: Array, *, key: Key) -> Array:
    guided = denoise.Guided(model.condition(cond), model.condition(None), scale)
    return sample.solve(guided, levels[0] * jax.random.normal(key, model.shape), levels)


def _sizes_of_steps(model: Any, cond: Any, levels: Array, *, key: Key) -> Array:
    start = levels[0] * jax.random.normal(key, model.shape)
    return mem.step_sizes(sample.solve_path(model.condition(cond), start, levels).states)


def _traces(model: Any, x: Array, cond: Any, sigmas: Array) -> tuple[Array, Array]:
    """The dimension with the condition and without it, at each noise level, both (S,)."""

    def of(denoiser: Any, sigma: Array) -> Array:
        found = lid.flipd(denoiser, x, sigma, trace=linalg.exact())
        return found.value - found.residual

    given, without = model.condition(cond), model.condition(None)
    pairs = jax.lax.map(lambda sigma: jnp.stack([of(given, sigma), of(without, sigma)]), sigmas)
    return pairs[:, 0], pairs[:, 1]


_drawn = mapping.over_points(_draw, (None, 0, None, None), chunk_size=128)
_steps_of = mapping.over_points(_sizes_of_steps, (None, 0, None), chunk_size=32)
_traces_at = mapping.over_points(_traces, (None, 0, 0, None), chunk_size=16)


def settings_for(scale: float, num_levels: int) -> mem.Settings:
    """Noise levels and sizes; nothing in it depends on labels."""
    return mem.Settings(
        SIGMA * scale,
        levels=sample.karras_levels(
            num_levels, sigma_min=SIGMA_MIN * scale, sigma_max=SIGMA_MAX * scale
        ),
        encode_levels=np.geomspace(SIGMA * scale, 3 * scale, num_levels),
        spread=scale,
        trace=linalg.positive_exact(),
    )


def mechanism(task: Task, model: Any, rows: np.ndarray) -> dict[str, dict[str, float | None]]:
    """LID(x) - LID(x|c) in pairs, by noise level relative to the spread."""
    sigmas = jnp.asarray(SIGMAS, jnp.float32) * float(model.scale)
    given, without = _traces_at(model, task.points[rows], task.conditions[rows], sigmas)
    found = {}
    for place, sigma in enumerate(SIGMAS):
        change = without[:, place] - given[:, place]
        found[f"{sigma:g}"] = {
            "LID(x|c)": number(given[:, place].mean()), "LID(x)": number(without[:, place].mean()),
            "difference": number(change.mean()),
            "stderr": number(change.std(ddof=1) / len(change) ** 0.5),
            "share not above": float(np.mean(change >= 0)),
        }  # fmt: skip
    return found


def detections(found: mem.Scores, memorized: np.ndarray) -> dict[str, Any]:
    """AUROC, AUPRC and TPR with their intervals; a score that is NaN ranks as not memorized."""
    result = {}
    for name, value in found.value.items():
        judged = mem.detection(ranked(value), memorized, seed=0)
        result[name] = {
            "auroc": list(judged.auroc), "auprc": list(judged.auprc), "tpr": list(judged.tpr),
            "unknown": int(np.isnan(value).sum()), "evaluations": number(found.evaluations[name]),
        }  # fmt: skip
    return result


def measured(task: Task, model: Any, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Everything of one model."""
    draw_key, score_key, blame_key, step_key = jax.random.split(jax.random.key(100 + seed), 4)
    rng = np.random.default_rng(seed)
    different = np.unique(task.points, axis=0, return_index=True)[1]
    rows = rng.permutation(different)[: sizes.num_points]
    settings = settings_for(float(model.scale), sizes.num_levels)
    conditions = np.repeat(task.asked, EACH, axis=0)
    draws = _drawn(model, conditions, settings.levels, jnp.float32(GUIDANCE), key=draw_key)
    copied = mem.copies(draws, task.points)
    normal = task.conditions[rng.integers(len(task.points), size=64)]
    reference = mem.step_reference(_steps_of(model, normal, settings.levels, key=step_key))
    groups = np.repeat(draws.reshape(-1, EACH, *draws.shape[1:]), EACH, axis=0)
    subject = mem.Subject(
        draws, model, data=task.points, conditions=conditions, generations=groups,
        reference=reference,
    )  # fmt: skip
    names = (*DETECTORS, *(OF_TOKENS if task.name == "tokens" else ()))
    found = mem.scores(names, subject, settings, key=score_key)
    num = int(copied.memorized.sum())
    result = {
        "task": task.name, "seed": seed, "set": task.about, "sigma": settings.sigma,
        "samples": len(draws), "copies": num,
        "copies by calibrated l2": int(mem.calibrated_copies(draws, task.points).memorized.sum()),
        "mechanism": mechanism(task, model, rows), "detections": None, "hits": None,
    }  # fmt: skip
    if 0 < num < len(draws):
        result["detections"] = detections(found, copied.memorized)
    tied = np.flatnonzero(task.trigger >= 0)
    if len(tied):
        hit = attribution.hits(
            model, task.asked[tied], task.trigger[tied], settings.levels, GUIDANCE, key=blame_key
        )
        result["hits"] = {name: float(each.mean()) for name, each in hit.items()}
        result["chance"] = 1 / task.asked.shape[1]
    return result


def folder_of(kind: str, source: str, seed: int, sizes: Sizes, out: Path) -> Path:
    """Where the model of a seed is kept, and what was found."""
    shape = f"{sizes.side}_{sizes.width}_{sizes.steps}_{sizes.num_asked}_{sizes.most}"
    return out / f"conditional_{kind}_{Path(source).name}_{shape}" / str(seed)


def of_seed(kind: str, source: str, seed: int, sizes: Sizes, out: Path) -> dict[str, Any]:
    """Train and measure, or read what was found."""
    folder = folder_of(kind, source, seed, sizes, out)

    def make() -> dict[str, Any]:
        if kind == "classes":
            task = classes(source, sizes.side, sizes.num_asked, seed)
        else:
            task = tokens(source, sizes.side, sizes.num_asked, seed, sizes.most)
        return measured(task, trained(task, sizes, seed, folder), sizes, seed)

    return {"source": Path(source).name} | kept(folder / "found.json", make)


def detector_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over seeds of each detector, with what makes a 95% interval of 1.96 of it."""
    known = [each["detections"] for each in found if each["detections"]]
    rows = []
    for name in known[0] if known else ():
        row = {"detector": name}
        for metric in ("auroc", "auprc", "tpr"):
            mean = mem.over_seeds([each[name][metric][0] for each in known])
            row |= {metric: number(mean.value), f"+- {metric}": number(mean.stderr)}
        row["NaN"] = sum(each[name]["unknown"] for each in known)
        rows.append(row | {"evaluations": known[0][name]["evaluations"]})
    return sorted(rows, key=lambda row: -row["auroc"])


def bars(kind: str, found: list[dict[str, Any]]) -> list[str]:
    """What does not hold: no copies to be found, a condition that raises the dimension, chance."""
    failures = [
        f"{kind}, {each['source']}, seed {each['seed']}: {each['copies']} of {each['samples']} "
        "samples are copies, so that no detector can be judged"
        for each in found if each["detections"] is None
    ]  # fmt: skip
    for each in found:
        change = each["mechanism"][f"{SIGMA:g}"]
        least = -ALLOWED * change["LID(x)"]
        if change["difference"] is None or change["difference"] < least:
            failures.append(f"{kind}, seed {each['seed']}: LID(x|c) is above LID(x): {change}")
    for name in BLAMING if found[0]["hits"] else ():
        mean = float(np.mean([each["hits"][name] for each in found]))
        if mean <= found[0]["chance"]:
            failures.append(f"{kind}: {name} blames the trigger in {mean:.0%}, no more than chance")
    return failures


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Both sets, of each source of images; a smoke run is too short to learn anything."""
    sizes, content, failures = SIZES[preset], {}, []
    for source in images:
        for kind in ("classes", "tokens"):
            found = []
            for seed in range(1 if preset == "smoke" else seeds):
                found.append(of_seed(kind, source, seed, sizes, out))
                console.print(f"D: {kind}, {source}, seed {seed} is done", style="dim")
            title = f"D: {kind}, {Path(source).name}: {found[0]['set']}"
            if rows := detector_rows(found):
                table(f"{title}; samples scored, copies are positive", rows)
            table(f"{title}; by seed", [
                {key: each[key] for key in ("seed", "sigma", "samples", "copies")}
                | {"by calibrated l2": each["copies by calibrated l2"]}
                | {f"hit@1, {name}": share for name, share in (each["hits"] or {}).items()}
                for each in found
            ])  # fmt: skip
            table("LID(x|c) and LID(x) of training images, by noise level", [
                {"seed": each["seed"], "sigma / spread": sigma} | change
                for each in found for sigma, change in each["mechanism"].items()
            ])  # fmt: skip
            content[f"{kind}, {Path(source).name}"] = {"seeds": found, "detectors": rows}
            failures += bars(kind, found)
    return content, [] if preset == "smoke" else failures
