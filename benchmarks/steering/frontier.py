"""The frontier without conditions: copies among the samples of an overfitting model, and quality.

The model of tier C2: a residual MLP trained on 300 digits until some per cent of its samples are
copies by d1 / d2 < 1/3.  Each method has one strength, the quantile of the usual: the target is
below what that share of the runs have that end in no copy (1,000 runs with noise of their own).

    guide               `LidGuided` from the first level to the last, between .2 and 1 spread
    reject              `sample_selected` at the end, begun anew
    reject and go back  at the end, back to 2 spreads
    reject midway       at .2 spreads, back to 2 spreads
    reject, then guide  at .2 spreads, back to 1.1 spreads, and down again with guidance
    particles           of 50, an ancestral sampler

by the dimension of the denoised point (`DenoisedLid`, 4 draws at .3 spreads), or in relation to the
model's own early checkpoint ("ratio", at .5 spreads); or, at the end only, by 32 draws at .4
spreads with the spread of what comes back, in relation to the early checkpoint ("spread ratio"); or
by the trace at the state (`JacobianTrace`, levels .2 to .8).  To compare with: the ancestral
sampler, the early checkpoint itself, and copies left out by who knows the training pictures ("known
copies left out"): no method can be better than that.

The settings were found on a training with another seed than those of the table.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console, table
from ladder.pictures import draw_beside, pictures
from ladder.trained import Trained, Training, kept, longer, trained
from matplotlib.figure import Figure

from mmh_jax import linalg, mapping, mitigation, plotting, sample
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key
from steering.quality import quality

PLAIN, KNOWN, EARLY, ANCESTRAL = "plain", "known copies left out", "early checkpoint", "ancestral"
# Seeds of the table begin after the one on which settings were found.
FIRST_SEED = 3
STRENGTH, TRUST, LOW, HIGH = 1e4, 1.0, 0.2, 1.0
REMOVED, LOST, TIMES = 0.8, 0.05, 3.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: the training, pictures, samples, reference runs, noise levels, quantiles."""

    training: Training
    longer: float
    num_points: int
    num_samples: int
    num_runs: int
    num_levels: int
    quantiles: tuple[float, ...]


SIZES = {
    "smoke": Sizes(Training(192, 1_200, 64), 1, 24, 100, 60, 10, (0.2,)),
    "cpu": Sizes(Training(384, 4_000), 5, 300, 1_500, 1_000, 24, (0.1, 0.15, 0.2, 0.3, 0.5)),
    "accelerator": Sizes(
        Training(1_024, 12_000), 5, 300, 20_000, 4_000, 32, (0.05, 0.1, 0.2, 0.3, 0.4)
    ),
}


class World(NamedTuple):
    """A model, what it was trained on, levels, starts, and dimensions of usual runs."""

    found: Trained
    data: np.ndarray
    levels: Array
    starts: np.ndarray
    measures: dict[str, Any]
    usual: dict[str, np.ndarray]

    def target(self, by: str, share: float) -> mitigation.Target:
        """Below which that share of usual runs is."""
        return mitigation.reference_target(self.levels, self.usual[by], quantile=share)


def _run(denoiser: Any, x: Array, levels: Array) -> Array:
    return sample.solve(denoiser, x, levels)


def _ancestral(denoiser: Any, x: Array, levels: Array, *, key: Key) -> Array:
    return sample.solve(denoiser, x, levels, step=sample.ancestral(), key=key)


def _measured(denoiser: Any, x: Array, levels: Array, measures: Any) -> tuple[Array, Any]:
    path = sample.solve_path(denoiser, x, levels)
    return path.denoised[-1], jax.lax.map(
        lambda at: jax.tree.map(
            lambda measure: measure(denoiser, *at), measures, is_leaf=lambda one: callable(one)
        ),
        (path.states, path.sigmas),
    )


runs = mapping.over_points(_run, (None, 0, None), chunk_size=250)
ancestral_runs = mapping.over_points(_ancestral, (None, 0, None), chunk_size=250)
measured_runs = mapping.over_points(_measured, (None, 0, None, None), chunk_size=250)


def world(source: str, seed: int, sizes: Sizes, side: int, out: Path) -> World:
    """Train, or read; and run the sampler to see what is usual."""
    points = pictures(source, side)[0]
    about = longer(sizes.training, points, sizes.longer)
    order = np.random.default_rng(seed).permutation(len(points))
    data = points[order[: sizes.num_points]]
    name = f"{Path(source).name}_{about.width}_{about.num_steps}_{seed}"
    found = trained(data, about, seed, out / name)
    scale = found.scale
    levels = sample.karras_levels(sizes.num_levels, sigma_min=0.02 * scale, sigma_max=8 * scale)
    start_key, run_key, measure_key = jax.random.split(jax.random.key(2_000 + seed), 3)

    def noise(key: Key, num: int) -> np.ndarray:
        return np.asarray(levels[0] * jax.random.normal(key, (num, *data.shape[1:])))

    measures = {
        "dimension": mitigation.DenoisedLid(0.3 * scale, measure_key),
        "ratio": mitigation.DenoisedLid(0.5 * scale, measure_key, found.early),
        "spread ratio": mitigation.DenoisedLid(
            0.4 * scale, measure_key, found.early, num_samples=32, spread=True
        ),
        "trace": mitigation.JacobianTrace(measure_key, trace=linalg.rademacher(8)),
    }
    ends, usual = measured_runs(found.model, noise(run_key, sizes.num_runs), levels, measures)
    is_new = ~mem.copies(ends, data).memorized
    usual = {name: dims[is_new] for name, dims in usual.items()}
    return World(found, data, levels, noise(start_key, sizes.num_samples), measures, usual)


def guided(at: World, by: str, share: float) -> mitigation.LidGuided:
    """The model under guidance."""
    scale, high = at.found.scale, 0.8 if by == "trace" else HIGH
    return mitigation.LidGuided(
        at.found.model, at.target(by, share), at.measures[by], jnp.float32(STRENGTH),
        jnp.float32(TRUST), jnp.float32(LOW * scale), jnp.float32(high * scale),
    )  # fmt: skip


def cost_of_guidance(at: World, by: str, *, calls: np.ndarray | None = None) -> float:
    """Evaluations more than the model's, of one sample whose denoiser is asked at these levels."""
    levels, scale = np.asarray(at.levels), at.found.scale
    high = 0.8 if by == "trace" else HIGH
    # Heun asks at both ends of each step, and the end is asked once more.
    calls = np.concatenate([levels, levels[1:]]) if calls is None else calls
    inside = int(np.sum((LOW * scale <= calls) & (calls <= high * scale)))
    return inside * (3 * at.measures[by].evaluations(at.data[0].size) + 1)


def guide(at: World, by: str, share: float, seed: int) -> tuple[np.ndarray, float]:
    """All the way."""
    plain = 2 * len(at.levels) - 1
    samples = runs(guided(at, by, share), at.starts, at.levels)
    return samples, plain + cost_of_guidance(at, by)


def reject(
    at: World, by: str, share: float, seed: int, *,
    decide_at: float = 0.02, back_to: float = float("inf"), again: bool = False,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """And again, with guidance if asked."""
    scale = at.found.scale
    found = mitigation.sample_selected(
        at.found.model, len(at.starts), key=jax.random.key(3_000 + seed), sigmas=at.levels,
        measure=at.measures[by], target=at.target(by, share), decide_at=decide_at * scale,
        back_to=back_to * scale, again=guided(at, by, share) if again else None,
        shape=at.data.shape[1:], chunk_size=250,
    )  # fmt: skip
    cost = found.evaluations
    if again:
        # All levels of the way down again are inside of the interval but the first.
        each = 3 * at.measures[by].evaluations(at.data[0].size) + 2
        cost += found.evaluations_again * each
    return found.samples, cost


_POPULATION = 50


def _population(
    denoiser: Any, x: Array, levels: Array, steer: Any, low: Array, *, key: Key
) -> Array:
    found = mitigation.particles(
        denoiser, x, levels, steer.log_weight, key=key, low=low, high=HIGH / LOW * low
    )
    return found.samples


_populations = mapping.over_points(_population, (None, 0, None, None, None), chunk_size=4)


def particles(at: World, by: str, share: float, seed: int) -> tuple[np.ndarray, float]:
    """In populations; with a strength of which a lack of .3 counts."""
    steer = guided(at, by, share).replace(strength=jnp.float32(100.0))
    groups = at.starts.reshape(-1, _POPULATION, *at.starts.shape[1:])
    low = jnp.float32(LOW * at.found.scale)
    samples = _populations(
        at.found.model, groups, at.levels, steer, low, key=jax.random.key(4_000 + seed)
    )
    levels = np.asarray(at.levels)
    inside = np.sum((LOW * at.found.scale <= levels) & (levels <= HIGH * at.found.scale))
    cost = len(levels) + int(inside) * at.measures[by].evaluations(at.data[0].size)
    return samples.reshape(at.starts.shape), cost


def _back(at: World, by: str, share: float, seed: int) -> tuple[np.ndarray, float]:
    return reject(at, by, share, seed, back_to=2.0)


def _midway(at: World, by: str, share: float, seed: int) -> tuple[np.ndarray, float]:
    return reject(at, by, share, seed, decide_at=LOW, back_to=2.0)


def _then_guide(at: World, by: str, share: float, seed: int) -> tuple[np.ndarray, float]:
    return reject(at, by, share, seed, decide_at=LOW, back_to=1.1, again=True)


Method = Callable[[World, str, float, int], tuple[np.ndarray, float]]
METHODS: dict[str, tuple[Method, str]] = {
    "guide, trace": (guide, "trace"),
    "guide, dimension": (guide, "dimension"),
    "guide, ratio": (guide, "ratio"),
    "reject, dimension": (reject, "dimension"),
    "reject, ratio": (reject, "ratio"),
    "reject, spread ratio": (reject, "spread ratio"),
    "reject and go back, spread ratio": (_back, "spread ratio"),
    "reject midway, dimension": (_midway, "dimension"),
    "reject, then guide, dimension": (_then_guide, "dimension"),
    "particles, dimension": (particles, "dimension"),
}


def judged(
    samples: np.ndarray, cost: float, at: World, judge: Any, seconds: float
) -> dict[str, Any]:
    """Copies, quality, cost."""
    copied = mem.copies(samples, at.data)
    return {
        "copies": float(copied.memorized.mean()), "num": int(copied.memorized.sum()),
        "evaluations": float(cost), "seconds": seconds, **judge(samples),
    }  # fmt: skip


def of_seed(source: str, seed: int, sizes: Sizes, side: int, out: Path) -> list[dict[str, Any]]:
    """A row for each method and strength, and for what they are compared with."""
    state: dict[str, Any] = {}
    name = f"frontier_{Path(source).name}_{sizes.training.width}_{sizes.training.num_steps}"
    folder = out / name / str(seed)

    def at() -> World:
        if "world" not in state:
            state["world"] = world(source, seed, sizes, side, out)
            points = pictures(source, side)[0]
            order = np.random.default_rng(seed).permutation(len(points))
            held_out = points[order[sizes.num_points :][: max(200, sizes.num_samples)]]
            state["judge"] = quality(held_out)
        return state["world"]

    def measure(draw: Callable[[], tuple[np.ndarray, float]]) -> dict[str, Any]:
        here, start = at(), time.perf_counter()
        samples, cost = draw()
        return judged(samples, cost, here, state["judge"], time.perf_counter() - start)

    def plain() -> np.ndarray:
        return runs(at().found.model, at().starts, at().levels)

    def known() -> tuple[np.ndarray, float]:
        samples = plain()
        return samples[~mem.copies(samples, at().data).memorized], 2 * len(at().levels) - 1

    compared: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
        PLAIN: lambda: (plain(), 2 * len(at().levels) - 1),
        KNOWN: known,
        EARLY: lambda: (
            runs(at().found.early, at().starts, at().levels), 2 * len(at().levels) - 1
        ),
        ANCESTRAL: lambda: (
            ancestral_runs(
                at().found.model, at().starts, at().levels, key=jax.random.key(5_000 + seed)
            ),
            len(at().levels),
        ),
    }  # fmt: skip
    rows = []
    for name, draw in compared.items():
        found = kept(folder / f"{name}.json", lambda draw=draw: measure(draw))
        rows.append({"method": name, "quantile": None} | found)
    for name, (method, by) in METHODS.items():
        for share in sizes.quantiles:
            found = kept(
                folder / f"{name}_{share:g}.json",
                lambda method=method, by=by, share=share: measure(
                    lambda: method(at(), by, share, seed)
                ),
            )
            rows.append({"method": name, "quantile": share} | found)
        console.print(f"frontier, seed {seed}: {name} is done", style="dim")
    if "world" in state:
        _pictures(state["world"], sizes.quantiles[-1], folder)
    return rows


def _pictures(at: World, share: float, folder: Path) -> None:
    """The plain samples nearest to a copy, and what guidance made of the same noise."""
    plain = runs(at.found.model, at.starts[:500], at.levels)
    copied = mem.copies(plain, at.data)
    rows = np.argsort(copied.ratio)[:24]
    steered = runs(guided(at, "ratio", share), at.starts[rows], at.levels)
    labels = [f"{ratio:.2f}" for ratio in copied.ratio[rows]]
    draw_beside(plain[rows], at.data[copied.nearest[rows]], labels,
                "plain, with d1 / d2", folder / "plain")  # fmt: skip
    after = mem.copies(steered, at.data)
    labels = [f"{ratio:.2f}" for ratio in after.ratio]
    draw_beside(steered, at.data[after.nearest], labels,
                "guided from the same noise, with d1 / d2", folder / "guided")  # fmt: skip


MEASURED = ("copies", "Frechet", "precision", "recall", "confidence", "evaluations")


def over_seeds(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over seeds, with the share of copies removed and what quality became of the plain.

    `beside known` is the Frechet distance in relation to that without the known copies, which are
    good pictures: to lose them is no fault of a method.
    """
    rows = []
    for each in zip(*found, strict=True):
        row = {"method": each[0]["method"], "quantile": each[0]["quantile"]}
        row |= {name: float(np.mean([one[name] for one in each])) for name in MEASURED}
        plain = [seed[0] for seed in found]
        row["removed"] = 1 - row["copies"] / float(np.mean([one["copies"] for one in plain]))
        row["Frechet ratio"] = float(
            np.mean(
                [one["Frechet"] / base["Frechet"] for one, base in zip(each, plain, strict=True)]
            )
        )
        known = [next(row for row in seed if row["method"] == KNOWN) for seed in found]
        row["beside known"] = float(
            np.mean(
                [one["Frechet"] / best["Frechet"] for one, best in zip(each, known, strict=True)]
            )
        )
        row["times"] = row["evaluations"] / float(np.mean([one["evaluations"] for one in plain]))
        rows.append(row)
    return rows


def lost(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """What a method lost of each quality, as a share of the plain sampler's."""
    found = {"Frechet": row["Frechet ratio"] - 1}
    for name in ("precision", "recall", "confidence"):
        found[name] = 1 - row[name] / plain[name]
    return found


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Whether a method removes four fifths at a twentieth of quality and three times the cost."""
    plain, steered = rows[0], [row for row in rows if row["quantile"] is not None]
    candidates = [row for row in steered if row["removed"] >= REMOVED]
    good = [
        row for row in candidates
        if row["times"] <= TIMES and max(lost(row, plain).values()) <= LOST
    ]  # fmt: skip
    if good:
        return []
    if not candidates:
        best = max(steered, key=lambda row: row["removed"])
        return [f"no method removes {REMOVED:.0%}; {best['method']} removes {best['removed']:.0%}"]
    best = min(candidates, key=lambda row: max(lost(row, plain).values()))
    losses = ", ".join(f"{name} {value:+.1%}" for name, value in lost(best, plain).items())
    return [
        f"no method removes {REMOVED:.0%} at {LOST:.0%} of every quality and {TIMES:g} times the "
        f"cost; {best['method']} at {best['quantile']:g} removes {best['removed']:.0%} at "
        f"{best['times']:.1f} times, and loses {losses}"
    ]


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Copies against the Frechet distance and against recall, a line for each method."""
    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    panels = (("Frechet", "Fréchet distance"), ("recall", "recall"), ("times", "cost / plain"))
    compared, steered = ([row for row in rows if (row["quantile"] is None) == is_compared]
                         for is_compared in (True, False))  # fmt: skip
    looks = [(color, style) for style in (".-", ".--") for color in (*plotting.OKABE_ITO, "k")]
    for axes, (field, title) in zip(drawn.subplots(1, 3), panels, strict=True):
        for row, marker in zip(compared, "osD^", strict=True):
            axes.plot(row[field], 100 * row["copies"], marker, color="#777777", mfc="white",
                      label=row["method"])  # fmt: skip
        names = list(dict.fromkeys(row["method"] for row in steered))
        for name, (color, style) in zip(names, looks, strict=False):
            own = [rows[0], *(row for row in steered if row["method"] == name)]
            axes.plot([row[field] for row in own], [100 * row["copies"] for row in own],
                      style, color=color, label=name, lw=1.2)  # fmt: skip
        axes.set_xlabel(title)
        axes.set_ylim(bottom=0)
    drawn.axes[0].set_ylabel("copies, % of samples")
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    drawn.savefig(path, dpi=150)


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds."""
    sizes, content, failures = SIZES[preset], {}, []
    side = 28 if preset == "accelerator" else 14
    for source in images:
        numbers = range(FIRST_SEED, FIRST_SEED + (1 if preset == "smoke" else seeds))
        found = [of_seed(source, seed, sizes, side, out) for seed in numbers]
        rows, name = over_seeds(found), Path(source).name
        counts = ", ".join(str(each[0]["num"]) for each in found)
        table(f"frontier, {name}: {counts} of {sizes.num_samples} plain samples are copies", rows)
        figure(rows, out / f"frontier_{name}.png")
        console.print(f"figure: {out / f'frontier_{name}.png'}")
        content[name] = {"rows": rows, "seeds": found}
        failures += [f"{name}: {failure}" for failure in bars(rows)]
    return content, [] if preset == "smoke" else failures
