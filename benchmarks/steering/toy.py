"""Circle and atom: who lands on the memorized point, and what becomes of the rest.

*exact*    a von Mises law on the circle, and an atom of weight .3 at its centre, by their exact
           denoiser: what is steered by and the law are known.
*trained*  the toy of the memorization ladder: 100 points of the circle, of which one is alone and
           is made a point of its own by the network (OD-Mem), and 25 copies of the centre.

The measure is the dimension of the denoised point at .1 (`DenoisedLid`).  Samples are plain, guided
(`LidGuided`, between .1 and 1.5, by 16 draws), or rejected (`sample_selected`, at noise level .1,
begun anew, by 64 draws: with 8, in the plane, it depends on the direction of the tangent, and a
whole arc is refused).  The target of guidance is that which one in ten of the runs is below that do
not end at the points in question; of rejection one in a hundred, for by then the two kinds are far
apart, and what is refused without need changes the law of the rest.  By the trace at the state
nothing is gained here: from where the centre could still be left it sees the whole circle, and more
dimensions than from a point of the circle.

The rest: whether the samples elsewhere are still of the law of the plain ones, by the energy
distance of two independent sets and permutations; of the exact law, beside its own draws.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console, table
from ladder import toy as ladder_toy
from matplotlib.figure import Figure

from mmh_jax import analytic, mitigation, plotting, sample, train
from mmh_jax.typing import Key
from steering.frontier import measured_runs, runs

ATOM_WEIGHT, KAPPA, NEAR = 0.3, 2.0, 0.1
DECIDE_AT, LOW, HIGH, TRUST = 0.1, 0.1, 1.5, 3.0
QUANTILES = {"guided": 0.1, "rejected": 0.01}
NUM_DRAWS = {"guided": 16, "rejected": 64}
SIGNIFICANT = 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: samples, permutations; of the trained toy the ladder's preset."""

    num_samples: int
    num_permutations: int


SIZES = {
    "smoke": Sizes(200, 50), "cpu": Sizes(2_000, 500), "accelerator": Sizes(8_000, 500)
}  # fmt: skip


class Toy(NamedTuple):
    """A model, the points in question by name, and draws of the law elsewhere if it is known."""

    model: Any
    places: dict[str, np.ndarray]
    law: Any


def exact() -> Toy:
    """The law itself."""
    law = analytic.von_mises_with_atom(0.0, KAPPA, ATOM_WEIGHT)
    return Toy(law, {"centre": np.zeros(2)}, analytic.von_mises(0.0, KAPPA))


def trained(preset: str, seed: int, out: Path) -> Toy:
    """A network on 125 points."""
    found, sizes = ladder_toy.toy(10), ladder_toy.SIZES[preset]
    folder = out / f"toy_{sizes.steps}_{sizes.width}" / str(seed)
    model = train.train_model(found.points, sizes.recipe, folder, seed=seed, save_every=60)
    return Toy(model, {"centre": np.zeros(2), "isolated point": found.points[found.rows[0]]}, None)


def near(samples: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(N,) whether a sample is at the place."""
    return np.linalg.norm(samples - place, axis=1) < NEAR


def elsewhere(samples: np.ndarray, places: dict[str, np.ndarray]) -> np.ndarray:
    """The samples that are at none of the places."""
    return samples[~np.any([near(samples, place) for place in places.values()], axis=0)]


def same_law(one: np.ndarray, other: np.ndarray, num: int, rng: np.random.Generator) -> float:
    """p of the energy distance of two sets, by permutations."""
    both, size = np.concatenate([one, other]), len(one)
    apart = np.linalg.norm(both[:, None] - both, axis=-1)

    def energy(order: np.ndarray) -> float:
        is_one = np.zeros(len(both))
        is_one[order[:size]] = 1 / size
        is_other = np.zeros(len(both))
        is_other[order[size:]] = 1 / (len(both) - size)
        sign = is_one - is_other
        return float(-sign @ apart @ sign)

    found = energy(np.arange(len(both)))
    beaten = sum(energy(rng.permutation(len(both))) >= found for _ in range(num))
    return (1 + beaten) / (1 + num)


def drawn(of: Toy, sizes: Sizes, key: Key) -> dict[str, np.ndarray]:
    """Samples of each method, and a second set of plain ones."""
    levels = sample.karras_levels(40, sigma_min=0.02, sigma_max=5.0)
    start_key, other_key, reject_key, measure_key = jax.random.split(key, 4)
    measures = {
        name: mitigation.DenoisedLid(DECIDE_AT, measure_key, num_samples=num)
        for name, num in NUM_DRAWS.items()
    }

    def noise(key: Key) -> np.ndarray:
        return np.asarray(levels[0] * jax.random.normal(key, (sizes.num_samples, 2)))

    other, dims = measured_runs(of.model, noise(other_key), levels, measures)
    is_new = ~np.any([near(other, place) for place in of.places.values()], axis=0)
    targets = {
        name: mitigation.reference_target(levels, dims[name][is_new], quantile=quantile)
        for name, quantile in QUANTILES.items()
    }
    guided = mitigation.LidGuided(
        of.model, targets["guided"], measures["guided"], jnp.float32(100.0), jnp.float32(TRUST),
        jnp.float32(LOW), jnp.float32(HIGH),
    )  # fmt: skip
    rejected = mitigation.sample_selected(
        of.model, sizes.num_samples, key=reject_key, sigmas=levels, measure=measures["rejected"],
        target=targets["rejected"], decide_at=DECIDE_AT, shape=(2,), max_tries=20,
    )  # fmt: skip
    starts = noise(start_key)
    return {
        "another plain": other, "plain": runs(of.model, starts, levels),
        "guided": runs(guided, starts, levels), "rejected": rejected.samples,
    }  # fmt: skip


def rows_of(
    name: str, seed: int, of: Toy, found: dict[str, np.ndarray], sizes: Sizes
) -> list[dict[str, Any]]:
    """Shares at the places, and whether the rest is what it was."""
    rng = np.random.default_rng(seed)
    rest = found["another plain"]
    if of.law is not None:
        rest = np.asarray(of.law.sample(sizes.num_samples, key=jax.random.key(70 + seed)))
    rest = elsewhere(rest, of.places)
    rows = []
    for method in ("plain", "guided", "rejected"):
        samples = found[method]
        other = elsewhere(samples, of.places)
        rows.append({
            "toy": name, "seed": seed, "samples": method,
            **{f"at the {place}": float(near(samples, where).mean())
               for place, where in of.places.items()},
            "off the circle": float(np.mean(np.abs(np.linalg.norm(other, axis=1) - 1) > NEAR)),
            "p, the rest is as before": same_law(
                other[:1_000], rest[:1_000], sizes.num_permutations, rng
            ),
        })  # fmt: skip
    return rows


def figure(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """A row of pictures for each toy."""
    methods = ("plain", "guided", "rejected")
    figure = Figure(figsize=(7.5, 2.6 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(methods), squeeze=False)
    for line, (name, samples) in zip(grid, found.items(), strict=True):
        for axes, method in zip(line, methods, strict=True):
            axes.scatter(*samples[method][:800].T, s=4, color=plotting.OKABE_ITO[0], alpha=0.5)
            axes.set_title(f"{name}: {method}")
            axes.set_aspect("equal")
            axes.set_xlim(-1.4, 1.4)
            axes.set_ylim(-1.4, 1.4)
    figure.savefig(path, dpi=130)


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Rejection empties the memorized point and leaves the rest; guidance takes from it."""
    failures = []
    for plain, guided, rejected in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        name, at = f"{plain['toy']}, seed {plain['seed']}", "at the centre"
        if guided[at] > 0.2 * plain[at]:
            failures.append(f"{name}: guidance leaves {guided[at]:.2f} of {plain[at]:.2f} there")
        if rejected[at] > 0.05 * plain[at]:
            failures.append(f"{name}: rejection leaves {rejected[at]:.3f} of {plain[at]:.2f} there")
        if plain["toy"] == "exact" and rejected["p, the rest is as before"] < SIGNIFICANT:
            failures.append(f"{name}: rejection changes the rest: {rejected}")
    return failures


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Both toys."""
    sizes, rows, shown = SIZES[preset], [], {}
    for name in ("exact", "trained"):
        for seed in range(1 if preset == "smoke" else seeds):
            of = exact() if name == "exact" else trained(preset, seed, out)
            found = drawn(of, sizes, jax.random.key(10 + seed))
            shown.setdefault(name, found)
            rows += rows_of(name, seed, of, found, sizes)
        table(f"{name} toy", [row for row in rows if row["toy"] == name])
    figure(shown, out / "toy.png")
    console.print(f"figure: {out / 'toy.png'}")
    return {"rows": rows}, [] if preset == "smoke" else bars(rows)
