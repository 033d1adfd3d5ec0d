"""Tier E, template memory: a part of the picture is copied, the rest varies.

A quarter of the images share the values within a rectangle (`data.planting.plant_template`).  At
such a point the model has lost the dimensions of the rectangle and no others, and a map over the
pixels should say where, larger = memorized:

    curvature difference   diag(J_base - J), at one noise level;
    energy lost            sum of v_i^2 per pixel over the tangents v_i of the baseline, less that
                           over those of the model; tangents have eigenvalues above one half;
    no energy              1 less that of the model, without a baseline: pixels that never vary,
                           such as a black border, have none either;
    squared difference     (D_base - D)^2 / sigma^2, without derivatives;
    data variance          minus the variance of a pixel over the training set: no model at all.

The baseline is a model trained on the images before the template was put in, or one that was
trained for a sixteenth of the steps.  A map is cut where Otsu's variance between the two parts is
largest, without the mask.

The noise level is the one of `SIGMAS` at which the curvature difference to the model without the
template has the largest AUROC in another training, that of seed 0, which no table contains.  The
plateau of the dimension, a hundredth of the spread here, is no level for this: at noise that the
network has hardly learned to remove, no pixel has lost anything.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console, number, table
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import roc_auc_score

from ladder.pictures import pictures
from ladder.trained import kept
from mmh_jax import lid, linalg, mapping, train
from mmh_jax import memorization as mem
from mmh_jax.data.planting import Template, plant_template, rectangle
from mmh_jax.typing import Array

# Relative to the spread of the data.
SIGMAS, SIGMA = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6), 0.8
SHARE, EARLY = 0.25, 16
WITHOUT, SHORT = "without template", "short training"
CURVATURE, VARIANCE = "curvature difference", "data variance"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: pixels, training images, hidden units, steps, points at which maps are made."""

    side: int
    most: int
    width: int
    steps: int
    num_points: int

    def recipe(self, share: int = 1) -> train.Recipe:
        """Of a training with a part of the steps."""
        return train.Recipe(
            width=self.width, depth=3, num_steps=self.steps // share, batch_size=128,
            learning_rate=5e-4, ema_half_life=self.steps / share / 40,
            sigma_min=0.02, sigma_max=8.0,
        ).wide_enough(self.side**2)  # fmt: skip


SIZES = {
    "smoke": Sizes(8, 400, 80, 160, 4),
    "cpu": Sizes(16, 5_000, 512, 8_000, 48),
    "accelerator": Sizes(16, 60_000, 1_024, 100_000, 512),
}


def planted(source: str, sizes: Sizes, seed: int) -> tuple[np.ndarray, Template]:
    """The images, and the same with the template: a rectangle in the middle part of the picture."""
    points, _ = pictures(source, sizes.side)
    rng = np.random.default_rng(seed)
    points = points[rng.permutation(len(points))[: sizes.most]]
    side = points.shape[1]
    top, left = side // 4 + rng.integers(side // 8 + 1, size=2)
    mask = rectangle(
        points.shape[1:], top=int(top), left=int(left), height=3 * side // 8, width=3 * side // 8
    )
    num = round(SHARE * len(points))
    return points, plant_template(points, mask=mask, num_planted=num, key=jax.random.key(seed))


def _energy(denoiser: Any, x: Array, sigma: Array) -> Array:
    """Of each pixel in the tangent space: the diagonal of the projection on it."""
    space = lid.tangent_space(denoiser, x, sigma)
    is_tangent = (space.eigenvalues > 0.5).reshape(-1, *(1,) * x.ndim)
    return jnp.sum(jnp.where(is_tangent, space.directions**2, 0), axis=0)


def _maps(model: Any, baseline: Any, x: Array, sigma: Array) -> dict[str, Array]:
    # One after the other: two decompositions that could run at once have hung on two cores.
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), model, baseline)
    energy, energy_before = jax.lax.map(lambda one: _energy(one, x, sigma), both)
    diagonal = linalg.exact_diagonal()
    return {
        CURVATURE: mem.curvature_map(model, baseline, x, sigma, diagonal=diagonal).value,
        "energy lost": energy_before - energy,
        "no energy": 1 - energy,
        "squared difference": mem.squared_difference(model, baseline, x, sigma),
    }


_maps_at = mapping.over_points(_maps, (None, None, 0, None), chunk_size=4)


def otsu(values: np.ndarray) -> float:
    """The threshold of the largest variance between what is below and what is above (1979)."""
    ordered = np.sort(values, axis=None).astype(float)
    num, total = len(ordered), np.cumsum(ordered)
    below = np.arange(1, num)
    gap = total[:-1] / below - (total[-1] - total[:-1]) / (num - below)
    best = int(np.argmax(below * (num - below) * gap**2))
    return float(ordered[best : best + 2].mean())


def overlap(found: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of the pixels above Otsu's threshold and the mask."""
    marked = found > otsu(found)
    return float(np.sum(marked & mask) / np.sum(marked | mask))


def judged(maps: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """IoU and AUROC over pixels, the mean over points, and of the mean map."""
    mean, flat = maps.mean(axis=0), mask.reshape(-1)
    each = [roc_auc_score(flat, one.reshape(-1)) for one in maps]
    return {
        "IoU": float(np.mean([overlap(one, mask) for one in maps])),
        "AUROC": float(np.mean(each)),
        "IoU of mean": overlap(mean, mask),
        "AUROC of mean": float(roc_auc_score(flat, mean.reshape(-1))),
    }


class _Models(NamedTuple):
    found: Template
    model: Any
    baselines: dict[str, Any]

    def asked(self, num: int) -> np.ndarray:
        """Points that have the template; the first of them lent it."""
        return self.found.points[self.found.rows[1 : 1 + num]]


def models_of(source: str, seed: int, sizes: Sizes, folder: Path) -> _Models:
    """Train three models, or read them."""
    points, found = planted(source, sizes, seed)
    options: Any = {"seed": seed, "save_every": 60}
    model = train.train_model(found.points, sizes.recipe(), folder / "template", **options)
    return _Models(found, model, {
        WITHOUT: train.train_model(points, sizes.recipe(), folder / "without", **options),
        SHORT: train.train_model(found.points, sizes.recipe(EARLY), folder / "short", **options),
    })  # fmt: skip


def chosen_level(source: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """The noise level at which the training of seed 0 gives its template away best."""
    models = models_of(source, 0, sizes, folder)
    asked = models.asked(sizes.num_points)

    def auroc(level: float) -> float:
        sigma = jnp.float32(level * float(models.model.scale))
        maps = _maps_at(models.model, models.baselines[WITHOUT], asked, sigma)
        found = judged(maps[CURVATURE], models.found.mask)["AUROC"]
        console.print(f"{folder}, {level:g} of the spread: AUROC {found:.3f}", style="dim")
        return found

    return {"sigma": max(SIGMAS, key=auroc)}


def measured(source: str, seed: int, sizes: Sizes, folder: Path, level: float) -> dict[str, Any]:
    """The maps at points that have the template, and how good they are."""
    found, model, baselines = models = models_of(source, seed, sizes, folder)
    asked = models.asked(sizes.num_points)
    sigma = jnp.float32(level * float(model.scale))
    rows, means = [], {}
    for name, baseline in baselines.items():
        maps = _maps_at(model, baseline, asked, sigma)
        if name == WITHOUT:
            maps[VARIANCE] = -np.var(found.points, axis=0)[None]
        else:
            maps.pop("no energy")  # it has no baseline
        for kind, each in maps.items():
            no_baseline = kind in ("no energy", VARIANCE)
            rows.append({"map": kind, "baseline": "-" if no_baseline else name})
            rows[-1] |= judged(each, found.mask)
        if name == WITHOUT:
            means = {kind: each.mean(axis=0).tolist() for kind, each in maps.items()}
    return {
        "seed": seed, "sigma": number(sigma), "share of mask": float(found.mask.mean()),
        "points": len(found.points), "planted": len(found.rows), "rows": rows,
        "example": asked[0].tolist(), "mask": found.mask.astype(int).tolist(), "means": means,
    }  # fmt: skip


def figure(found: dict[str, Any], path: Path) -> None:
    """A point with the template, the mask, and the maps against the model without it."""
    panels = {"a point": found["example"], "mask": found["mask"]} | found["means"]
    drawn = Figure(figsize=(1.7 * len(panels), 2.0), layout="constrained")
    rows, columns = np.nonzero(np.array(found["mask"]))
    for axes, (name, image) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(np.array(image), cmap="gray" if name in ("a point", "mask") else "viridis")
        corner = (columns.min() - 0.5, rows.min() - 0.5)
        size = (np.ptp(columns) + 1, np.ptp(rows) + 1)
        axes.add_patch(_frame(corner, *size))
        axes.set_title(name, fontsize=8)
        axes.set_axis_off()
    drawn.savefig(path, dpi=150)


def _frame(corner: tuple[float, float], width: int, height: int) -> Rectangle:
    return Rectangle(corner, width, height, fill=False, edgecolor="#D55E00", linewidth=1.2)


def over_seeds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, averaged, with what makes a 95% interval of 1.96 of it for the first two."""
    result = []
    for rows in zip(*(each["rows"] for each in found), strict=True):
        line = {name: rows[0][name] for name in ("map", "baseline")}
        for name in ("IoU", "AUROC", "IoU of mean", "AUROC of mean"):
            mean = mem.over_seeds([row[name] for row in rows])
            line[name] = float(mean.value)
            if not name.endswith("mean"):
                line[f"+- {name}"] = number(mean.stderr)
        result.append(line)
    return result


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """All seeds of each source of images; a smoke run is too short to learn anything."""
    sizes, content, failures = SIZES[preset], {}, []
    for source in images:
        name, found, level = Path(source).name, [], SIGMA
        folder = out / f"templates_{name}_{sizes.side}_{sizes.width}_{sizes.steps}"
        if preset != "smoke":
            choose = functools.partial(chosen_level, source, sizes, folder / "0")
            level = kept(folder / "0" / "levels.json", choose)["sigma"]
        for seed in range(1, 1 + (1 if preset == "smoke" else seeds)):
            make = functools.partial(measured, source, seed, sizes, folder / str(seed), level)
            found.append(kept(folder / str(seed) / f"found_{level:g}.json", make))
            console.print(f"E: {name}, seed {seed} is done", style="dim")
        rows = over_seeds(found)
        share = found[0]["share of mask"]
        table(
            f"E: {name}, noise {level:g} of the spread; the mask is {share:.0%} of the pixels, an "
            f"IoU of {share:.2f} for all",
            rows,
        )
        figure(found[0], out / f"templates_{name}.png")
        console.print(f"figure: {out / f'templates_{name}.png'}")
        content[name] = {"seeds": found, "maps": rows}
        trivial = next(row for row in rows if row["map"] == VARIANCE)
        failures += [
            f"{name}: {row['map']} ({row['baseline']}) has an AUROC of {row['AUROC']:.2f}, "
            f"{VARIANCE} {trivial['AUROC']:.2f}"
            for row in rows
            if row["map"] in (CURVATURE, "energy lost")
            and row["baseline"] == WITHOUT
            and row["AUROC"] <= trivial["AUROC"]
        ]
    return content, [] if preset == "smoke" else failures
