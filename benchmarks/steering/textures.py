"""Chaotic pictures: what plain ascent of the dimension makes of samples, and what keeps it away.

Noise has the largest dimension of all.  A sampler that climbs the dimension without end, at every
sample and without a bound on the step, leaves the pictures for textures; one that acts only below
what is usual (hinge) and moves by no more than the denoising step (trust region), along the model's
own tangent space, does not.  Both start from the same noise, on the model of the frontier, at
strengths a factor of ten apart; total variation is the mean difference of neighbouring pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import console, table
from ladder.pictures import pictures
from ladder.trained import kept
from matplotlib.figure import Figure

from mmh_jax import memorization as mem
from mmh_jax import mitigation, plotting
from steering.frontier import FIRST_SEED, HIGH, LOW, SIZES, World, runs, world
from steering.quality import quality

STRENGTHS = {"plain ascent": (1.0, 10.0, 100.0, 1e3), "hinge and trust": (10.0, 1e2, 1e3, 1e4)}
SHOWN = 12
# Of the plain samples' total variation: beyond that the pictures are textures.
CHAOTIC, KEPT = 1.25, 1.05


def steered(at: World, kind: str, strength: float) -> mitigation.LidGuided:
    """Ascent without hinge, bound or projection, or guidance as it should be."""
    scale = at.found.scale
    low, high = jnp.float32(LOW * scale), jnp.float32(HIGH * scale)
    if kind == "plain ascent":
        # Never reached: the logarithm of a dimension far above that of the space.
        never = mitigation.Target(jnp.asarray(at.levels), jnp.full(len(at.levels), 10.0))
        return mitigation.LidGuided(
            at.found.model, never, at.measures["dimension"], jnp.float32(strength),
            jnp.float32(1e9), low, high, tangential=False,
        )  # fmt: skip
    return mitigation.LidGuided(
        at.found.model, at.target("dimension", 0.2), at.measures["dimension"],
        jnp.float32(strength), jnp.float32(1.0), low, high,
    )  # fmt: skip


def of_seed(source: str, seed: int, preset: str, out: Path) -> list[dict[str, Any]]:
    """A row for each kind and strength; a figure of the samples."""
    sizes, side = SIZES[preset], 28 if preset == "accelerator" else 14
    folder = out / f"textures_{Path(source).name}_{sizes.training.num_steps}" / str(seed)

    def make() -> dict[str, Any]:
        at = world(source, seed, sizes, side, out)
        points = pictures(source, side)[0]
        order = np.random.default_rng(seed).permutation(len(points))
        judge = quality(points[order[sizes.num_points :]])
        starts = at.starts[: 100 if preset == "smoke" else 500]
        samples = {("plain", 0.0): runs(at.found.model, starts, at.levels)}
        for kind, strengths in STRENGTHS.items():
            for strength in strengths:
                samples[kind, strength] = runs(steered(at, kind, strength), starts, at.levels)
        rows = [
            {"kind": kind, "strength": strength,
             "copies": float(mem.copies(each, at.data).memorized.mean()), **judge(each)}
            for (kind, strength), each in samples.items()
        ]  # fmt: skip
        draw(samples, folder / "samples.png")
        return {"rows": rows}

    return kept(folder / "found.json", make)["rows"]


def draw(samples: dict[tuple[str, float], np.ndarray], path: Path) -> None:
    """A row of pictures for each kind and strength, all of the same noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = []
    for kind, strength in samples:
        text = kind if not strength else f"{kind}, {strength:g}"
        labels += [text, *[""] * (SHOWN - 1)]
    shown = np.concatenate([each[:SHOWN] for each in samples.values()])
    drawn = plotting.image_grid(
        np.clip(shown, 0, 1), num_columns=SHOWN, labels=labels,
        title="samples of the same noise, by strength",
    )  # fmt: skip
    drawn.savefig(path, dpi=110)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Total variation and precision by strength."""
    drawn = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, field in zip(drawn.subplots(1, 2), ("total variation", "precision"), strict=True):
        plain = np.mean([row[field] for row in rows if row["kind"] == "plain"])
        axes.axhline(float(plain), color="#777777", lw=0.8, label="plain sampler")
        for kind, color in zip(STRENGTHS, plotting.OKABE_ITO, strict=False):
            strengths = STRENGTHS[kind]
            means = [
                np.mean([
                    row[field] for row in rows if (row["kind"], row["strength"]) == (kind, each)
                ])
                for each in strengths
            ]  # fmt: skip
            axes.plot(strengths, means, "o-", color=color, label=kind)
        axes.set_xscale("log")
        axes.set_xlabel("strength")
        axes.set_title(field)
    drawn.axes[0].legend(frameon=False)
    drawn.savefig(path, dpi=150)


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Plain ascent becomes chaotic, guidance does not."""

    def most(kind: str) -> float:
        plain = np.mean([row["total variation"] for row in rows if row["kind"] == "plain"])
        found = [
            np.mean([
                row["total variation"] for row in rows
                if (row["kind"], row["strength"]) == (kind, strength)
            ])
            for strength in STRENGTHS[kind]
        ]  # fmt: skip
        return float(max(found) / plain)

    failures = []
    if most("plain ascent") < CHAOTIC:
        failures.append(f"plain ascent raises total variation to {most('plain ascent'):.2f} only")
    if most("hinge and trust") > KEPT:
        failures.append(f"guidance raises total variation to {most('hinge and trust'):.2f}")
    return failures


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds."""
    content, failures = {}, []
    for source in images:
        numbers = range(FIRST_SEED, FIRST_SEED + (1 if preset == "smoke" else seeds))
        rows = [row for seed in numbers for row in of_seed(source, seed, preset, out)]
        name = Path(source).name
        num = len(rows) // len(numbers)
        means = [
            {key: value if isinstance(value, str)
             else float(np.mean([other[key] for other in rows[place::num]]))
             for key, value in row.items()}
            for place, row in enumerate(rows[:num])
        ]  # fmt: skip
        table(f"textures, {name}", means)
        figure(rows, out / f"textures_{name}.png")
        console.print(f"figure: {out / f'textures_{name}.png'}")
        content[name] = rows
        failures += [f"{name}: {failure}" for failure in bars(rows)]
    return content, [] if preset == "smoke" else failures
