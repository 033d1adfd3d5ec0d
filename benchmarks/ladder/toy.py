"""Tier B, the smallest trained model: a von Mises law on the unit circle, and an atom.

100 draws of the law (kappa 2) and 25 copies of the origin.  One of the draws is alone on the thin
side of the circle: a network that can bend makes it a point of its own, LID_theta = 0 where
LID_* = 1, which is OD-Mem.  The origin is DD-Mem, and the half of the draws whose ten nearest
neighbours are closest is not memorized.  The data are the same for all seeds, the networks are not.

LID_theta is projected FLIPD at the noise level that `lid.choose_scale` takes for all training
points; its error is the spread over this level and its two neighbours.  LID_* has four sources:

    neighbours, data    in the 125 points;
    neighbours, law     with fresh draws of the law beside them, as notebook 01 has it;
    diffusion           in closed form, of the points and the fresh draws;
    twins               trained on halves, for the first seeds; what they disagree about at fresh
                        draws is in the error.

The bar is that of the second.  The others may leave a point undecided, but not call it wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console, number, table

from mmh_jax import lid, linalg, mapping, train
from mmh_jax import memorization as mem
from mmh_jax.data import manifolds
from mmh_jax.typing import Array, Denoiser, Estimate

SIGMAS = np.geomspace(0.01, 0.4, 13).astype(np.float32)
ISOLATED, ATOM, GENERIC = "isolated point", "atom", "generic points"
RIGHT = {
    ISOLATED: mem.Label.OD_MEM,
    ATOM: mem.Label.DD_MEM,
    GENERIC: mem.Label.NOT_MEMORIZED,
}
# Of the decided verdicts.
LEAST = {ISOLATED: 1.0, ATOM: 1.0, GENERIC: 0.95}
BAR = "neighbours, law"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: trainings, how many of them with twins, steps, hidden units, fresh draws."""

    seeds: int
    twins: int
    steps: int
    width: int
    num_fresh: int

    @property
    def recipe(self) -> train.Recipe:
        """Frequencies let a network bend on small scales: without, it joins the isolated point."""
        return train.Recipe(
            width=self.width, depth=3, num_frequencies=64, options=(("frequency_scale", 4.0),),
            num_steps=self.steps, sigma_min=0.01, sigma_max=5.0, ema_half_life=self.steps / 32,
        )  # fmt: skip


SIZES = {
    "smoke": Sizes(1, 1, 300, 64, 500),
    "cpu": Sizes(10, 3, 2_000, 128, 4_000),
    "accelerator": Sizes(10, 10, 200_000, 512, 16_000),
}


class Toy(NamedTuple):
    """The training points, what is asked of them, and fresh draws of the circle.

    Attributes:
        points: (125, 2).
        rows: of `points`.
        kinds: of these rows, one of `RIGHT`.
        fresh: (F, 2).
    """

    points: np.ndarray
    rows: np.ndarray
    kinds: np.ndarray
    fresh: np.ndarray


def toy(num_fresh: int) -> Toy:
    """The set of notebook 01."""
    data_key, _, _, _, fresh_key = jax.random.split(jax.random.key(0), 5)
    points = np.asarray(manifolds.von_mises_toy(100, kappa=2.0, num_atom=25, key=data_key).points)
    fresh = manifolds.von_mises_toy(num_fresh, kappa=2.0, num_atom=0, key=fresh_key).points
    distances = np.linalg.norm(points[:100, None] - points[:100], axis=-1)
    np.fill_diagonal(distances, np.inf)
    generic = np.argsort(np.sort(distances, axis=1)[:, 9])[:50]
    rows = np.concatenate([[distances.min(axis=1).argmax(), 100], generic])
    kinds = np.array([ISOLATED, ATOM, *50 * [GENERIC]])
    return Toy(points, rows, kinds, np.asarray(fresh))


def dimension(denoiser: Denoiser, x: Array, *, sigmas: Array) -> lid.Flipd:
    """Projected FLIPD at the middle one of three noise levels, their spread as its error."""
    curve = lid.flipd_curve(denoiser, x, sigmas, trace=linalg.positive_exact())
    return lid.Flipd(curve.value[1], jnp.std(curve.value, ddof=1), curve.residual[1])


def _curve(denoiser: Denoiser, x: Array) -> Array:
    return lid.flipd_curve(denoiser, x, SIGMAS, trace=linalg.positive_exact()).value


_curves = mapping.over_points(_curve, (None, 0))


def of_data(found: Toy) -> dict[str, Estimate]:
    """LID_* from the data, by source."""
    more = np.concatenate([found.points, found.fresh])
    return {
        "neighbours, data": mem.neighbor_lid(found.points, rows=found.rows),
        BAR: mem.neighbor_lid(more, rows=found.rows),
        "diffusion": mem.diffusion_lid(more, rows=found.rows),
    }


def of_seed(
    seed: int, found: Toy, star: dict[str, Estimate], sizes: Sizes, out: Path
) -> Iterator[dict[str, Any]]:
    """Train, measure; a row for each source of LID_*."""
    folder = out / f"toy_{sizes.steps}_{sizes.width}" / str(seed)
    model = train.train_model(found.points, sizes.recipe, folder, seed=seed, save_every=60)
    middle = lid.choose_scale(SIGMAS, _curves(model, found.points))
    measure = functools.partial(dimension, sigmas=jnp.asarray(SIGMAS[middle - 1 : middle + 2]))
    theta = mapping.over_points(measure, (None, 0))(model, found.points[found.rows])
    lid_theta = Estimate(theta.value, theta.stderr)
    verdicts = {name: (each, mem.verdict(lid_theta, each)) for name, each in star.items()}
    if seed < sizes.twins:
        twins = train.train_twins(
            found.points, sizes.recipe, folder / "twins", seed=seed, save_every=60
        )
        crossed = mem.cross_fit(
            twins.first, twins.second, found.points, twins.halves, measure, rows=found.rows,
            model=model, held_out=found.fresh[:100],
        )  # fmt: skip
        verdicts["twins"] = (crossed.lid_star, crossed.verdict)
    for source, (lid_star, judged) in verdicts.items():
        yield {
            "seed": seed, "source": source, "sigma": float(SIGMAS[middle]),
            "lid_theta": list(map(number, lid_theta.value)),
            "lid_theta_stderr": list(map(number, lid_theta.stderr)),
            "lid_star": list(map(number, lid_star.value)),
            "lid_star_stderr": list(map(number, lid_star.stderr)),
            "labels": np.asarray(judged.label).tolist(),
        }  # fmt: skip


def per_seed(rows: list[dict[str, Any]], kinds: np.ndarray) -> list[dict[str, Any]]:
    """What the table of seeds says: dimensions, the two verdicts, the share of generic points."""
    found = []
    for row in rows:
        theta, labels = np.array(row["lid_theta"], float), np.array(row["labels"])
        error = np.array(row["lid_theta_stderr"], float)
        line = {"seed": row["seed"], "LID_* by": row["source"], "sigma": row["sigma"]}
        for place, kind in enumerate((ISOLATED, ATOM)):
            line[f"LID_theta, {kind}"] = f"{theta[place]:.2f} +- {error[place]:.2f}"
            line[kind] = mem.Label(int(labels[place])).title
        generic = labels[kinds == GENERIC]
        line["LID_theta, generic"] = number(np.mean(theta[kinds == GENERIC]))
        line["not memorized"] = float(np.mean(generic == mem.Label.NOT_MEMORIZED))
        found.append(line)
    return found


def shares(rows: list[dict[str, Any]], kinds: np.ndarray) -> tuple[list[dict[str, Any]], list[str]]:
    """Over all seeds: the share of decided verdicts, and of right ones among them."""
    found, failures = [], []
    for source in dict.fromkeys(row["source"] for row in rows):
        labels = np.array([row["labels"] for row in rows if row["source"] == source])
        for kind, right in RIGHT.items():
            own = labels[:, kinds == kind]
            known = own[own != mem.Label.UNDECIDED]
            share = float(np.mean(known == right)) if known.size else None
            decided = known.size / own.size
            found.append({
                "points": kind, "LID_* by": source, "right": right.title, "seeds": len(own),
                "decided": decided, "rightly": share,
            })  # fmt: skip
            if share is not None and share < LEAST[kind]:
                failures.append(f"{kind}, {source}: {share:.0%} of the decided are {right.title}")
            if source == BAR and decided < 1:
                failures.append(f"{kind}, {source}: only {decided:.0%} are decided")
    return found, failures


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Train the preset's own number of seeds; a smoke run is too short to learn anything."""
    sizes = SIZES[preset]
    found = toy(sizes.num_fresh)
    star, rows = of_data(found), []
    for seed in range(sizes.seeds):
        rows += of_seed(seed, found, star, sizes, out)
        console.print(f"B: seed {seed} is done", style="dim")
    table("B: the von Mises toy, seed by seed", per_seed(rows, found.kinds))
    summary, failures = shares(rows, found.kinds)
    table("B: the von Mises toy, over seeds", summary)
    content = {"kinds": found.kinds.tolist(), "seeds": rows, "summary": summary}
    return content, [] if preset == "smoke" else failures
