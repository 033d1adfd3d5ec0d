"""Tier C5, verdicts: overfitting told from the data, for each source of LID_*.

The set: *singles*, pictures that are there once; *duplicates*, others that are there many times;
and *shapes*, a spot that moves along a line, of one dimension.  A residual MLP is trained until it
memorizes.  Singles that its samples extract (d1 / d2 < 1/3) have lost dimensions that the law has:
OD-Mem.  Duplicates and shapes are low in the data: DD-Mem, `small` being 1.5 dimensions here.

LID_theta is the trace of the model's Jacobian, eigenvalues below 0 left out, at the noise level
that `lid.choose_scale` takes for all training points, its error the spread over this level and its
two neighbours.  LID_* is by neighbours, by the closed-form diffusion, and by twins on halves.  A
twin that has memorized its half knows no other point.  So it is asked at several moments of its
training, and each point that it never saw takes the moment at which it is denoised best; the two
moments beside it are in the error.  An undecided verdict counts as wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import console, number, table

from ladder.pictures import pictures
from ladder.trained import Training, checkpoints, kept, samples_of, spoken, trained
from mmh_jax import lid, mapping
from mmh_jax import memorization as mem
from mmh_jax.data.splits import deduplicated, disjoint_halves
from mmh_jax.typing import Array, Denoiser, Estimate, Key

SINGLE, DUPLICATE, SHAPE = "singles, extracted", "duplicates", "shapes"
RIGHT = {
    SINGLE: mem.Label.OD_MEM, DUPLICATE: mem.Label.DD_MEM, SHAPE: mem.Label.DD_MEM,
}  # fmt: skip
SMALL, LEAST = 1.5, 0.9
# Relative to the spread of the data.
SIGMAS = np.geomspace(0.03, 0.4, 9)
NUM_MOMENTS, NUM_NOISES = 10, 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset."""

    training: Training
    num_singles: int
    num_duplicates: int
    copies: int
    num_shapes: int
    num_samples: int


SIZES = {
    "smoke": Sizes(Training(192, 2_000, 64), 16, 2, 8, 40, 200),
    "cpu": Sizes(Training(384, 10_000), 50, 10, 8, 100, 2_000),
    "accelerator": Sizes(Training(1_024, 60_000), 1_000, 50, 64, 1_000, 20_000),
}


def spots(num: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """(num, side, side): a round spot at random places of a line, smooth in its place."""
    rows, columns = np.mgrid[:side, :side]
    along = rng.uniform(0, 1, (num, 1, 1))
    top, left = side * (0.3 + 0.4 * along), side * (0.2 + 0.6 * along)
    distance = (rows - top) ** 2 + (columns - left) ** 2
    return np.exp(-distance / (2 * (side / 6) ** 2)).astype(np.float32)


def dimension(denoiser: Denoiser, x: Array, *, sigmas: Array) -> lid.Flipd:
    """The trace at the middle one of three noise levels, their spread as its error."""

    def at(sigma: Array) -> tuple[Array, Array]:
        found = lid.jacobian_spectrum(denoiser, x, sigma)
        return jnp.sum(jnp.maximum(found.eigenvalues, 0)), found.residual

    traces, residuals = jax.lax.map(at, sigmas)
    return lid.Flipd(traces[1], jnp.std(traces, ddof=1), residuals[1])


_middle = mapping.over_points(lambda model, x, sigmas: jax.lax.map(
    lambda sigma: jnp.sum(jnp.maximum(lid.jacobian_spectrum(model, x, sigma).eigenvalues, 0)),
    sigmas,
), (None, 0, None))  # fmt: skip


def at_best_moment(moments: Any, x: Array, *, sigmas: Array, key: Key) -> lid.Flipd:
    """`dimension` by the model, of several with their numbers stacked, that denoises x best."""
    noise = jax.random.normal(key, (NUM_NOISES, *x.shape), x.dtype)

    def at(model: Denoiser) -> tuple[Array, lid.Flipd]:
        def loss(sigma: Array) -> Array:
            errors = jax.vmap(lambda z: model(x + sigma * z, sigma) - x)(noise)
            return jnp.mean(errors**2) / sigma**2

        return jnp.mean(jax.lax.map(loss, sigmas)), dimension(model, x, sigmas=sigmas)

    losses, found = jax.lax.map(at, moments)
    best = jnp.argmin(losses)
    around = jnp.clip(best + jnp.arange(-1, 2), 0, len(losses) - 1)
    stderr = jnp.hypot(found.stderr[best], jnp.std(found.value[around]))
    return lid.Flipd(found.value[best], stderr, found.residual[best])


def moments_of(points: np.ndarray, about: Training, seed: int, folder: Path) -> Any:
    """A model of the points at several moments of its training, the numbers stacked."""
    steps = np.unique(np.geomspace(0.01, 1, NUM_MOMENTS) * about.num_steps // 1).astype(int)
    folders = {int(step): folder / str(step) for step in steps}
    models = checkpoints(points, about, seed, folders, half_life=float(steps[0]))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def measured(source: str, seed: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Train, extract, measure, judge."""
    images, _ = pictures(source, 8)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    singles = images[order[: sizes.num_singles]]
    doubles = images[order[sizes.num_singles :][: sizes.num_duplicates]]
    shapes = spots(sizes.num_shapes, images.shape[1], rng)
    points = np.concatenate([singles, np.repeat(doubles, sizes.copies, axis=0), shapes])
    kinds = np.repeat(list(RIGHT), [len(singles), len(doubles) * sizes.copies, len(shapes)])
    found = trained(points, sizes.training, seed, folder)
    samples = samples_of(found, sizes.num_samples, seed)
    extracted = mem.extraction(mem.copies(samples, points)).memorized
    first = np.unique(deduplicated(points).cluster, return_index=True)[1]
    rows = np.sort(first[(kinds[first] != SINGLE) | extracted[first]])
    if not np.any(kinds[rows] == SINGLE):
        raise SystemExit(f"{folder.name}: no single picture was extracted; train for longer.")

    levels = jnp.asarray(SIGMAS * found.scale, jnp.float32)
    middle = lid.choose_scale(
        levels, _middle(found.model, points[first], levels), ambient_dim=points[0].size
    )
    around = slice(middle - 1, middle + 2)
    measure = functools.partial(dimension, sigmas=levels[around])
    theta = mapping.over_points(measure, (None, 0))(found.model, points[rows])
    lid_theta = Estimate(theta.value, theta.stderr)

    halves = disjoint_halves(points, key=jax.random.key(seed))
    twins = [
        moments_of(points[half], sizes.training, seed, folder / name)
        for name, half in zip(("first", "second"), halves, strict=True)
    ]
    crossed = mem.cross_fit(
        *twins, points, halves, functools.partial(at_best_moment, sigmas=levels[around]),
        rows=rows, max_residual=None, key=jax.random.key(seed),
    )  # fmt: skip
    stars = {
        "neighbours": mem.neighbor_lid(points, rows=rows),
        "diffusion": mem.diffusion_lid(points, rows=rows),
        "diffusion, any slope": mem.diffusion_lid(points, rows=rows, max_slope=2.0),
        "twins": crossed.lid_star,
    }
    judged = {
        name: (star, mem.verdict(lid_theta, star, small=SMALL)) for name, star in stars.items()
    }
    return {
        "seed": seed, "sigma": float(SIGMAS[middle]), "kinds": kinds[rows].tolist(),
        "single pictures extracted": int(extracted[: len(singles)].sum()),
        "lid_theta": list(map(number, lid_theta.value)),
        "sources": {
            name: {
                "lid_star": list(map(number, star.value)),
                "stderr": list(map(number, star.stderr)),
                "labels": np.asarray(verdict.label).tolist(),
            }
            for name, (star, verdict) in judged.items()
        },
    }  # fmt: skip


def balanced(found: dict[str, Any], source: str) -> dict[str, float]:
    """The share of right verdicts of each kind, and the mean of OD's and DD's."""
    kinds, labels = np.array(found["kinds"]), np.array(found["sources"][source]["labels"])
    right = np.array([RIGHT[kind] for kind in kinds])
    shares = {kind: float(np.mean(labels[kinds == kind] == RIGHT[kind])) for kind in RIGHT}
    of_each = [np.mean(labels[right == one] == one) for one in (mem.Label.OD_MEM, mem.Label.DD_MEM)]
    undecided = float(np.mean(labels == mem.Label.UNDECIDED))
    return shares | {"balanced accuracy": float(np.mean(of_each)), "undecided": undecided}


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds."""
    sizes, content, failures = SIZES[preset], {}, []
    for source in images:
        name, runs = Path(source).name, []
        for seed in range(1, seeds + 1):
            about = sizes.training
            folder = out / f"{name}_verdicts_{about.width}_{about.num_steps}_{seed}"
            make = functools.partial(measured, source, seed, sizes, folder)
            runs.append(kept(folder / "found.json", make))
            console.print(f"C5: {name}, seed {seed} is done", style="dim")
        rows = []
        for star in runs[0]["sources"]:
            scored = [balanced(run, star) for run in runs]
            row: dict[str, Any] = {"LID_* by": star}
            row |= {key: spoken([each[key] for each in scored]) for key in scored[0]}
            rows.append(row)
            least = np.mean([each["balanced accuracy"] for each in scored])
            if least < LEAST:
                failures.append(f"{name}, {star}: a balanced accuracy of {least:.2f}, not {LEAST}")
        extracted = ", ".join(str(run["single pictures extracted"]) for run in runs)
        table(f"C5, {name}: right verdicts ({extracted} singles extracted)", rows)
        medians = []
        for kind in RIGHT:
            line: dict[str, Any] = {"points": kind}
            for of in ("LID_theta", *runs[0]["sources"]):
                values = [value for run in runs if (value := _median(run, kind, of)) is not None]
                line[of] = spoken(values) if values else "-"
            medians.append(line)
        table(f"C5, {name}: median dimensions", medians)
        content[name] = {"seeds": runs, "verdicts": rows}
    return content, [] if preset == "smoke" else failures


def _median(run: dict[str, Any], kind: str, of: str) -> float | None:
    values = run["lid_theta"] if of == "LID_theta" else run["sources"][of]["lid_star"]
    own = np.array(values, float)[np.array(run["kinds"]) == kind]
    own = own[np.isfinite(own)]
    return float(np.median(own)) if len(own) else None
