"""Mitigation on the trigger tier: what each method removes, against quality and evaluations.

The model and the prompts are those of `ladder.conditions.tokens`, one prompt in five with the
trigger; every prompt is asked several times, with guidance 5, and all methods but rejection begin
from the same noise.  A sample is memorized if it is a copy by d1 / d2 < 1/3, whatever was asked.
Its quality is that of `quality`, beside held-out digits of the kinds that were asked for.

Nothing is tuned on these prompts.  What a method needs to know of usual runs (where to stop, how
long a step is, which dimension is low) it takes from *normal* runs: of prompts drawn from the
training set, without a look at who has the trigger, that ended in no copy.

| method                | strength                                                        |
|-----------------------|-----------------------------------------------------------------|
| tokens: ...           | k tokens rewritten at random, of 5; chance, or those blamed most |
| embedding:, noise: .. | moved until the criterion is at the (1 - s) quantile of normal  |
| late guidance         | from which level on, in spreads of the data                     |
| dynamic switch        | none: from the end of the first fall of the CFG norm            |
| rescaled              | the amount                                                      |
| clamped               | standard deviations of a step above the usual one               |
| LID ...               | the quantile of normal runs that is the target                  |

Evaluations are of the network; a product with a Jacobian is one, and a reverse pass is two of what
it goes through, so that the gradient of a criterion counts three times.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import console, number, table
from ladder import attribution, conditions
from ladder.conditional import GUIDANCE, SIGMA_MAX, SIGMA_MIN, folder_of, trained
from ladder.conditional import SIZES as LADDER_SIZES
from ladder.pictures import pictures
from ladder.trained import kept
from matplotlib.figure import Figure

from mmh_jax import memorization as mem
from mmh_jax import plotting, sample
from steering.prompt_methods import METHODS, SMOKE, Drawn, Method
from steering.prompts import SIZES, Setting, normal_noise
from steering.quality import Quality, quality

# What a method may lose of agreement and of the Frechet distance, and may take of evaluations.
LOSS, REMOVED, TIMES = 0.05, 0.8, 3.0
TOKENS = "tokens: "
LID = ("LID guidance", "LID rejection", "LID rejection, then guidance")
HELD_OUT = "held-out digits"
FAMILIES = {
    "tokens rewritten": TOKENS, "embedding or noise": ("embedding: ", "noise: "),
    "guidance": ("late", "dynamic", "rescaled", "clamped"), "dimension": "LID",
}  # fmt: skip


class Judge(NamedTuple):
    """What samples are held against."""

    data: np.ndarray
    quality: Quality
    digits: np.ndarray
    has_trigger: np.ndarray

    def __call__(self, drawn: Drawn) -> dict[str, float]:
        """Copies and quality."""
        copied = mem.copies(drawn.samples, self.data).memorized
        found = {"copies": float(copied.mean())}
        found |= {"copies, trigger": float(copied[self.has_trigger].mean())}
        found |= self.quality(drawn.samples, self.digits)
        return found | {"evaluations": drawn.evaluations}


def digits_of(prompts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(P,) which digit each prompt (P, L, E) asks for."""
    is_digit = (prompts[:, :, None] == words[: conditions.NUM_DIGITS]).all(axis=3)
    return np.argmax(is_digit.any(axis=1), axis=1)


def held_out(
    points: np.ndarray, labels: np.ndarray, seen: np.ndarray, wanted: np.ndarray, seed: int
) -> np.ndarray:
    """Pictures of the digits that are wanted, of which none was seen; repeated if there are few."""
    known = {picture.tobytes() for picture in seen}
    unseen = np.array([picture.tobytes() not in known for picture in points])
    rng, rows = np.random.default_rng(seed), np.empty(len(wanted), int)
    for digit in np.unique(wanted):
        own = wanted == digit
        rows[own] = np.resize(
            rng.permutation(np.flatnonzero(unseen & (labels == digit))), own.sum()
        )
    return points[rows]


def prepared(source: str, seed: int, preset: str, out: Path) -> tuple[Setting, Judge, Any, Any]:
    """The model, what is asked of it, and who judges; task and held-out pictures beside."""
    ladder, sizes = LADDER_SIZES[preset], SIZES[preset]
    task = conditions.tokens(source, ladder.side, ladder.num_asked, seed, ladder.most)
    model = trained(task, ladder, seed, folder_of("tokens", source, seed, ladder, out))
    levels = sample.karras_levels(
        ladder.num_levels, sigma_min=SIGMA_MIN * float(model.scale),
        sigma_max=SIGMA_MAX * float(model.scale),
    )  # fmt: skip
    words, rng = conditions.vocabulary(), np.random.default_rng(seed)
    # Of thousands of words the trigger would never be drawn; of these few it would be, and tie
    # other prompts to the image.
    others = np.delete(words, conditions.TRIGGER, axis=0)
    prompts = np.repeat(task.asked[: sizes.num_asked], sizes.each, axis=0)
    digits = digits_of(prompts, words)
    noise_key, key = jax.random.split(jax.random.key(200 + seed))
    setting = Setting(
        model, prompts, normal_noise(len(prompts), model, noise_key), levels, others,
        task.conditions[rng.integers(len(task.points), size=sizes.num_normal)], task.points, key,
        sizes.num_steps,
    )  # fmt: skip
    points, labels = pictures(source, ladder.side)
    wanted = np.tile(digits, 1 + sizes.times)
    unseen = held_out(points, labels, task.points, wanted, seed)
    reference, beside = unseen[len(prompts) :], unseen[: len(prompts)]
    has_trigger = np.repeat(task.trigger[: sizes.num_asked] >= 0, sizes.each)
    return setting, Judge(task.points, quality(reference), digits, has_trigger), task, beside


def hit_shares(of: Setting, task: conditions.Task) -> dict[str, float]:
    """hit@1 of attribution on the prompts that have the trigger."""
    tied = np.flatnonzero(task.trigger >= 0)
    found = attribution.hits(
        of.model, task.asked[tied], task.trigger[tied], of.levels, GUIDANCE,
        key=jax.random.fold_in(of.key, 4),
    )  # fmt: skip
    return {name: float(each.mean()) for name, each in found.items()}


def of_seed(source: str, seed: int, preset: str, out: Path) -> dict[str, Any]:
    """All methods, each kept in a file of its own."""
    folder = folder_of("tokens", source, seed, LADDER_SIZES[preset], out) / "steering"
    ready = functools.cache(lambda: prepared(source, seed, preset, out))

    def judged(method: Method) -> dict[str, Any]:
        setting, judge, *_ = ready()
        strengths = method.strengths[-1:] if preset == "smoke" else method.strengths
        rows = [{"strength": s} | judge(method.draw(setting, s)) for s in strengths]
        console.print(f"conditional, seed {seed}: {method.name} is done", style="dim")
        return {"rows": rows}

    others = Method(HELD_OUT, lambda *_: Drawn(ready()[3], 0.0), (0,))
    rows = []
    methods = [each for each in METHODS if preset != "smoke" or each.name in SMOKE]
    for method in (others, *methods):
        name = "".join(c if c.isalnum() else "_" for c in method.name)
        found = kept(folder / f"{name}.json", functools.partial(judged, method))
        rows += [{"method": method.name, "seed": seed} | row for row in found["rows"]]
    hits = {}
    if preset != "smoke":
        hits = kept(folder / "hits.json", lambda: hit_shares(ready()[0], ready()[2]))
    return {"seed": seed, "rows": rows, "hits": hits}


def mean_of(name: str, values: list[float]) -> dict[str, float | None]:
    """Over seeds, with its standard error; None of one seed."""
    mean = mem.over_seeds(np.array(values))
    return {name: number(mean.value), f"+- {name}": number(mean.stderr)}


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds and its standard error, of each method at each strength."""
    places = dict.fromkeys((row["method"], row["strength"]) for row in rows)
    result = []
    for method, strength in places:
        own = [row for row in rows if (row["method"], row["strength"]) == (method, strength)]
        row = {"method": method, "strength": strength}
        for name in list(own[0])[list(own[0]).index("copies") :]:
            row |= mean_of(name, [each[name] for each in own])
        result.append(row)
    return result


def _at(rows: list[dict[str, Any]], method: str, strength: float | None = None) -> dict[str, Any]:
    return next(
        row for row in rows
        if row["method"] == method and strength in (None, row["strength"])
    )  # fmt: skip


def as_good(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row loses no more than `LOSS` of agreement and of the Frechet distance."""
    agrees = row["agreement"] >= (1 - LOSS) * other["agreement"]
    return agrees and row["Frechet"] <= (1 + LOSS) * other["Frechet"]


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold, of the means over seeds: blame beats chance, and dimension is cheap."""
    failures, none = [], _at(rows, "none")
    if none["copies"] == 0:
        return ["no sample is a copy, so that there is nothing to remove"]
    for row in rows:
        name = row["method"].removeprefix(TOKENS)
        if name == row["method"] or name == "random":
            continue
        chance = _at(rows, "tokens: random", row["strength"])
        if not (row["copies"] < chance["copies"] and as_good(row, chance)):
            failures.append(
                f"k = {row['strength']:g}: tokens blamed by {name} do not dominate random ones: "
                + ", ".join(f"{each} {row[each]:.3g} against {chance[each]:.3g}"
                            for each in ("copies", "agreement", "Frechet"))
            )  # fmt: skip
    lid = [row for row in rows if row["method"] in LID]
    if not any(
        row["copies"] <= (1 - REMOVED) * none["copies"] + 1e-9 and as_good(row, none)
        and row["evaluations"] <= TIMES * none["evaluations"] for row in lid
    ):  # fmt: skip
        said = [
            f"{row['method']} {row['strength']:g} removes {1 - row['copies'] / none['copies']:.0%}"
            f", agreement {row['agreement']:.3f} from {none['agreement']:.3f}, Frechet "
            f"{row['Frechet']:.3g} from {none['Frechet']:.3g}, at "
            f"{row['evaluations'] / none['evaluations']:.1f} times the evaluations" for row in lid
        ]  # fmt: skip
        failures.append(
            f"no LID guidance or rejection removes {REMOVED:.0%} of the copies at a loss of "
            f"{LOSS:.0%} and {TIMES:g} times the evaluations: " + "; ".join(said)
        )
    return failures


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Copies against the Frechet distance, and against agreement; a column for each family."""
    figure = Figure(figsize=(3.0 * len(FAMILIES), 5.6), layout="constrained")
    panels = figure.subplots(2, len(FAMILIES), sharex=True, sharey="row")
    for (family, starts), column in zip(FAMILIES.items(), panels.T, strict=True):
        own = [row for row in rows if row["method"].startswith(starts)]
        names = list(dict.fromkeys(row["method"] for row in own))
        for axes, metric in zip(column, ("Frechet", "agreement"), strict=True):
            axes.axhline(_at(rows, HELD_OUT)[metric], color="0.6", linestyle=":", linewidth=1)
            for place, name in enumerate(names):
                line = [row for row in own if row["method"] == name]
                error = [[row[f"+- {key}"] or 0 for row in line] for key in ("copies", metric)]
                axes.errorbar(
                    [row["copies"] for row in line], [row[metric] for row in line], error[1],
                    error[0], color=plotting.OKABE_ITO[place], marker="osv^D"[place], markersize=4,
                    linewidth=1, elinewidth=0.5, label=name.partition(": ")[2]
                    if family == "tokens rewritten" else name,
                )  # fmt: skip
            none = _at(rows, "none")
            axes.plot(none["copies"], none[metric], "k*", markersize=9)
        column[0].set_title(family, fontsize=10)
        if names:
            column[0].legend(frameon=False, fontsize=7)
        column[1].set_xlabel("share of samples that are copies")
        column[1].set_xlim(left=-0.01)
    panels[0, 0].set_ylabel("Frechet distance to held-out digits")
    panels[1, 0].set_ylabel("agreement with the prompt")
    figure.suptitle(f"{title}; star: nothing done, dotted: held-out digits", fontsize=9)
    figure.savefig(path, dpi=120)


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """All methods, of each source of images; a smoke run is too short to learn anything."""
    content, failures = {}, []
    for source in images:
        found = [
            of_seed(source, seed, preset, out)
            for seed in range(1 if preset == "smoke" else seeds)
        ]  # fmt: skip
        rows = frontier([row for each in found for row in each["rows"]])
        title = f"trigger tier, {Path(source).name}, {len(found)} seeds"
        first = ("method", "strength")
        main = ("copies", "+- copies", "copies, trigger", "Frechet", "+- Frechet", "agreement")
        more = ("precision", "recall", "confidence", "total variation")
        for about, names in (
            ("copies, quality, cost", (*main, "+- agreement", "evaluations")),
            ("more of quality", more),
        ):
            shown = [{name: row[name] for name in (*first, *names)} for row in rows]
            table(f"Mitigation, {title}: {about}", shown)
        hits = [
            {"detector": name} | mean_of("hit@1", [each["hits"][name] for each in found])
            for name in found[0]["hits"]
        ]
        if hits:
            table("hit@1 of attribution, on the prompts with the trigger", hits)
        draw(rows, title, out / f"steering_conditional_{Path(source).name}.png")
        content[Path(source).name] = {"seeds": found, "rows": rows, "hits": hits}
        failures += [f"{Path(source).name}: {failure}" for failure in bars(rows)]
    return content, [] if preset == "smoke" else failures
