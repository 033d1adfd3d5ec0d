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

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import console, number, table
from ladder import attribution, conditions
from ladder.conditional import GUIDANCE, SIGMA_MAX, SIGMA_MIN, folder_of, trained
from ladder.conditional import SIZES as LADDER_SIZES
from ladder.pictures import pictures
from ladder.trained import kept
from matplotlib.figure import Figure

from mmh_jax import denoise, linalg, mapping, mitigation, plotting, sample
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key
from steering.quality import Quality, quality

PROBES = 4
# Of LID guidance, levels relative to the spread of the data.
LOW, HIGH, NEAR, STRENGTH, TRUST = 0.2, 1.0, 0.3, 1e4, 1.0
# What a method may lose of agreement and of the Frechet distance, and may take of evaluations.
LOSS, REMOVED, TIMES = 0.05, 0.8, 3.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: prompts asked, samples of each, normal runs, held-out pictures a sample.

    `num_steps` are those of an optimisation, 20 in the papers.
    """

    num_asked: int
    each: int
    num_normal: int
    times: int
    num_steps: int


SIZES = {
    "smoke": Sizes(10, 2, 40, 2, 4),
    "cpu": Sizes(160, 2, 160, 4, 10),
    "accelerator": Sizes(640, 8, 1_000, 4, 20),
}


class Detector(NamedTuple):
    """A criterion, whether it is asked at a late state or at pure noise, and what it costs."""

    criterion: mitigation.Criterion
    late: bool
    evaluations: int


@functools.cache
def detector_of(name: str, size: int) -> Detector:
    """By its name, for points of so many coordinates.

    The gradient of the exact trace is taken once; where it is taken at each step, the trace is that
    of the same few probes.
    """
    probes = linalg.rademacher(PROBES)
    return {
        "CFG norm": Detector(mem.cfg_norm, False, 2),
        "sharpness": Detector(mem.sharpness, False, 4),
        "FLIPD trace": Detector(mitigation.flipd_criterion(), True, 1 + size),
        "FLIPD trace by probes": Detector(
            mitigation.flipd_criterion(trace=probes, key=jax.random.key(0)), True, 1 + PROBES
        ),
    }[name]


def guided(model: Any, high: Any = float("inf"), outside: Any = 0.0) -> denoise.Guided:
    """Guidance, to which a prompt is bound later."""
    return denoise.Guided(
        model, model.condition(None), jnp.float32(GUIDANCE), high=high, outside=outside
    )


def _run(model: Any, tokens: Array, noise: Array, high: Array, levels: Array) -> Array:
    return sample.solve(guided(model, high).condition(tokens), levels[0] * noise, levels)


def _late(model: Any, tokens: Array, noise: Array, levels: Array) -> Array:
    path = sample.solve_path(guided(model).condition(tokens), levels[0] * noise, levels)
    return path.states[-1]


def _normal(
    model: Any, measure: Any, tokens: Array, noise: Array, levels: Array
) -> tuple[Array, Array, Array]:
    bound = guided(model).condition(tokens)
    path = sample.solve_path(
        bound, levels[0] * noise, levels, record=lambda x, _, sigma: measure(bound, x, sigma)
    )
    return path.denoised[-1], path.recorded, mem.step_sizes(path.states)


def _rewrite(tokens: Array, blame: Array, words: Array, k: Array, *, key: Key) -> Array:
    """The first k of all places in the order in which they are drawn: more k, the same and more."""
    place_key, word_key = jax.random.split(key)
    order = mitigation.choose_tokens(blame, len(tokens), key=place_key)
    other = mitigation.perturb(tokens, order, mitigation.random_tokens(words), key=word_key)
    chosen = jnp.zeros(len(tokens), bool).at[order].set(jnp.arange(len(tokens)) < k)
    return jnp.where(chosen[:, None], other, tokens)


def _switched(model: Any, tokens: Array, noise: Array, levels: Array) -> Array:
    given, without = model.condition(tokens), model.condition(None)
    return mitigation.guidance_switch(given, without, levels[0] * noise, levels).level


def _rescaled(model: Any, tokens: Array, noise: Array, amount: Array, levels: Array) -> Array:
    # In the units of the network, in which 0 is the mean of the data.
    inner = mitigation.Rescaled(guided(model.inner).condition(tokens), amount)
    way = denoise.Affine(inner, model.shift, model.scale)
    return sample.solve(way, levels[0] * noise, levels)


def _clamped(
    model: Any, tokens: Array, noise: Array, usual: mem.StepReference, limit: Array, levels: Array
) -> Array:
    step = mitigation.clamped(sample.heun(), usual, limit)
    return sample.solve(guided(model).condition(tokens), levels[0] * noise, levels, step=step)


def _steered(way: Any, tokens: Array, noise: Array, levels: Array) -> Array:
    return sample.solve(way.condition(tokens), levels[0] * noise, levels)


_runs = mapping.over_points(_run, (None, 0, 0, 0, None), chunk_size=160)
_lates = mapping.over_points(_late, (None, 0, 0, None), chunk_size=160)
_normals = mapping.over_points(_normal, (None, None, 0, 0, None), chunk_size=80)
_rewrites = mapping.over_points(_rewrite, (0, 0, None, None), chunk_size=160)
_switches = mapping.over_points(_switched, (None, 0, 0, None), chunk_size=160)
_rescales = mapping.over_points(_rescaled, (None, 0, 0, None, None), chunk_size=160)
_clamps = mapping.over_points(_clamped, (None, 0, 0, None, None, None), chunk_size=160)
_steers = mapping.over_points(_steered, (None, 0, 0, None), chunk_size=80)


@functools.cache
def _of_criterion(name: str, size: int, num_steps: int = 0) -> tuple[Callable[..., Any], ...]:
    """Its value, the blame of each token, and what moves the tokens or the noise, over points."""
    criterion = detector_of(name, size).criterion

    def value(model: Any, tokens: Array, x: Array, sigma: Array) -> Array:
        return criterion(model.condition(tokens), model.condition(None), x, sigma)

    def blame(model: Any, tokens: Array, x: Array, sigma: Array) -> Array:
        return mitigation.attribute(model, tokens, x, sigma, criterion=criterion)

    def tokens_moved(model: Any, tokens: Array, x: Array, sigma: Array, stop: Array) -> Array:
        return mitigation.optimise_condition(
            model, tokens, x, sigma, criterion=criterion, num_steps=num_steps, stop_below=stop
        ).value

    def noise_moved(model: Any, tokens: Array, noise: Array, sigma: Array, stop: Array) -> Array:
        return mitigation.optimise_noise(
            model.condition(tokens), model.condition(None), noise, sigma, criterion=criterion,
            num_steps=num_steps, stop_below=stop,
        ).value  # fmt: skip

    shared, chunk = (None, 0, 0, None), 80
    return (
        mapping.over_points(value, shared, chunk_size=chunk),
        mapping.over_points(blame, shared, chunk_size=16),
        mapping.over_points(tokens_moved, (*shared, None), chunk_size=chunk),
        mapping.over_points(noise_moved, (*shared, None), chunk_size=chunk),
    )


class Normal(NamedTuple):
    """Runs of prompts of the training set that ended in no copy."""

    prompts: np.ndarray
    noise: np.ndarray
    dimensions: np.ndarray
    usual: mem.StepReference


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every method is given.

    Attributes:
        model: token-conditional, in data units.
        prompts: (N, L, E), one for each sample.
        noise: (N, *shape) from which it begins.
        levels: of the sampler.
        words: (V, E), those that are written in the place of others.
        candidates: (R, L, E), of which normal runs are made.
        data: (M, *shape), the training set.
        key: draws all else.
        num_steps: of an optimisation.
    """

    model: Any
    prompts: np.ndarray
    noise: np.ndarray
    levels: Array
    words: np.ndarray
    candidates: np.ndarray
    data: np.ndarray
    key: Key
    num_steps: int

    @property
    def late(self) -> int:
        """Where in the levels a late state is."""
        return round(attribution.LATE * (len(self.levels) - 1))

    @property
    def size(self) -> int:
        """Coordinates of a point."""
        return int(np.prod(self.model.shape))

    @property
    def spread(self) -> float:
        """Of the data."""
        return float(self.model.scale)

    @property
    def measure(self) -> mitigation.DenoisedLid:
        """Of LID guidance and rejection."""
        return mitigation.DenoisedLid(jnp.float32(NEAR * self.spread), jax.random.key(0))

    @functools.cached_property
    def normal(self) -> Normal:
        """Made once."""
        noise = normal_noise(len(self.candidates), self.model, jax.random.fold_in(self.key, 1))
        ends, dimensions, sizes = _normals(
            self.model, self.measure, self.candidates, noise, self.levels
        )
        new = ~mem.copies(ends, self.data).memorized
        usual = mem.step_reference(sizes[new])
        return Normal(self.candidates[new], noise[new], dimensions[new], usual)

    def at(self, late: bool, prompts: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, Array]:
        """The states at which a detector is asked, and their noise level."""
        if not late:
            return np.asarray(self.levels[0]) * noise, self.levels[0]
        part = self.levels[: self.late + 1]
        return _lates(self.model, prompts, noise, part), part[-1]

    def cost_at(self, late: bool) -> int:
        """Evaluations of the way there."""
        return 2 * (2 * self.late + 1) if late else 0

    @property
    def cost(self) -> int:
        """Evaluations of a guided run."""
        return 2 * calls(self.levels)


def normal_noise(num: int, model: Any, key: Key) -> np.ndarray:
    return np.asarray(jax.random.normal(key, (num, *model.shape)))


def calls(levels: Array, low: float = 0.0, high: float = float("inf")) -> int:
    """How often Heun's sampler asks a denoiser at levels of an interval.

    >>> calls(jnp.array([4.0, 2.0, 1.0])), calls(jnp.array([4.0, 2.0, 1.0]), 1.5, 5.0)
    (5, 3)
    """
    levels = np.asarray(levels)
    asked = np.full(len(levels), 2)
    asked[0] = 1
    # As `LidGuided` has it, in the precision of the levels.
    inside = (np.float32(low) <= levels) & (levels <= np.float32(high))
    return int(asked[inside].sum())


class Drawn(NamedTuple):
    """Samples, and evaluations for one of them on average."""

    samples: np.ndarray
    evaluations: float


def plain(
    of: Setting, prompts: Any = None, noise: Any = None, high: Any = np.inf, extra: float = 0
) -> Drawn:
    """The guided sampler, from other prompts, other noise, or begun late."""
    prompts = of.prompts if prompts is None else prompts
    noise = of.noise if noise is None else noise
    high = np.broadcast_to(np.asarray(high, np.float32), len(prompts))
    return Drawn(_runs(of.model, prompts, noise, high, of.levels), of.cost + extra)


def by_tokens(of: Setting, k: float, *, detector: str | None = None) -> Drawn:
    """k tokens rewritten at random, any of them or those that a detector blames."""
    blame, extra = np.zeros(of.prompts.shape[:2], np.float32), 0.0
    if detector is not None:
        found = detector_of(detector, of.size)
        x, sigma = of.at(found.late, of.prompts, of.noise)
        blame = _of_criterion(detector, of.size)[1](of.model, of.prompts, x, sigma)
        extra = of.cost_at(found.late) + 3 * found.evaluations
    key = jax.random.fold_in(of.key, 2)
    return plain(of, _rewrites(of.prompts, blame, of.words, jnp.int32(k), key=key), extra=extra)


def stop_level(of: Setting, detector: str, strength: float) -> Array:
    """The (1 - strength) quantile of a criterion over normal runs; infinite for strength 0."""
    if strength == 0:
        return jnp.float32(jnp.inf)
    late = detector_of(detector, of.size).late
    x, sigma = of.at(late, of.normal.prompts, of.normal.noise)
    values = _of_criterion(detector, of.size)[0](of.model, of.normal.prompts, x, sigma)
    return jnp.float32(np.quantile(values, 1 - strength))


def by_embedding(of: Setting, strength: float, *, detector: str) -> Drawn:
    """All tokens moved until a detector is low."""
    found = detector_of(detector, of.size)
    x, sigma = of.at(found.late, of.prompts, of.noise)
    stop = stop_level(of, detector, strength)
    moved = _of_criterion(detector, of.size, of.num_steps)[2](of.model, of.prompts, x, sigma, stop)
    extra = of.cost_at(found.late) + 3 * found.evaluations * (of.num_steps + 1)
    return plain(of, moved, extra=extra)


def by_noise(of: Setting, strength: float, *, detector: str) -> Drawn:
    """The noise moved until a detector is low."""
    stop = stop_level(of, detector, strength)
    moved = _of_criterion(detector, of.size, of.num_steps)[3](
        of.model, of.prompts, of.noise, of.levels[0], stop
    )
    extra = 3 * detector_of(detector, of.size).evaluations * (of.num_steps + 1)
    return plain(of, noise=moved, extra=extra)


def by_level(of: Setting, level: float) -> Drawn:
    """Guidance from a level on."""
    return plain(of, high=level * of.spread)


def by_switch(of: Setting, strength: float) -> Drawn:
    """Guidance from where the condition has let go, for each sample."""
    del strength
    high = _switches(of.model, of.prompts, of.noise, of.levels)
    return plain(of, high=high, extra=calls(of.levels) + len(of.levels))


def by_rescaling(of: Setting, amount: float) -> Drawn:
    """The guided answer with the standard deviation of the conditional one."""
    args = (of.model, of.prompts, of.noise, jnp.float32(amount), of.levels)
    return Drawn(_rescales(*args), of.cost)


def by_clamping(of: Setting, limit: float) -> Drawn:
    """No step longer than usual."""
    args = (of.prompts, of.noise, of.normal.usual, jnp.float32(limit), of.levels)
    return Drawn(_clamps(of.model, *args), of.cost)


def lid_target(of: Setting, quantile: float) -> mitigation.Target:
    """Of normal runs; for a quantile of 0 nothing is below it."""
    if quantile == 0:
        return mitigation.Target(of.levels, jnp.full(len(of.levels), -1e9))
    dimensions = of.normal.dimensions
    # A small set has no smaller quantile.
    quantile = max(quantile, 1 / (len(dimensions) + 1))
    return mitigation.reference_target(of.levels, dimensions, quantile=quantile)


def lid_guided(of: Setting, quantile: float) -> tuple[mitigation.LidGuided, Callable[..., float]]:
    """The guided denoiser steered by dimension, and what a run of it on some levels costs."""
    low, high = jnp.float32(LOW * of.spread), jnp.float32(HIGH * of.spread)
    way = mitigation.LidGuided(
        guided(of.model), lid_target(of, quantile), of.measure, STRENGTH, TRUST, low, high
    )
    of_one = 3 * of.measure.evaluations(0) + 2

    def cost(levels: Array) -> float:
        inside = calls(levels, float(low), float(high))
        return 2 * (calls(levels) + (of_one - 1) * inside)

    return way, cost


def by_lid(of: Setting, quantile: float) -> Drawn:
    """LID guidance of the guided denoiser."""
    way, cost = lid_guided(of, quantile)
    return Drawn(_steers(way, of.prompts, of.noise, of.levels), cost(of.levels))


def by_rejection(of: Setting, quantile: float, *, then_guided: bool = False) -> Drawn:
    """What has a low dimension at `LOW` is begun again, and then it may be guided by it."""
    way, cost = lid_guided(of, quantile)
    found = mitigation.sample_selected(
        guided(of.model), len(of.prompts), key=jax.random.fold_in(of.key, 3), sigmas=of.levels,
        measure=of.measure, target=way.target, decide_at=LOW * of.spread,
        conditions=of.prompts, again=way if then_guided else None, chunk_size=80,
    )  # fmt: skip
    decided = of.levels[: int(np.sum(np.asarray(of.levels) >= LOW * of.spread * (1 - 1e-5)))]
    extra = (found.tries.mean() - 1) * cost(decided) if then_guided else 0.0
    return Drawn(found.samples, 2 * found.evaluations + float(extra))


@dataclasses.dataclass(frozen=True)
class Method:
    """How samples are drawn, at several strengths."""

    name: str
    draw: Callable[[Setting, float], Drawn]
    strengths: tuple[float, ...]


def _methods() -> tuple[Method, ...]:
    k, stops = (1, 2, 3), (0.1, 0.5, 0.9)
    by, named = functools.partial, ("CFG norm", "FLIPD trace", "sharpness")
    return (
        Method("none", lambda of, _: plain(of), (0,)),
        Method("tokens: random", by_tokens, k),
        *(Method(f"tokens: {name}", by(by_tokens, detector=name), k) for name in named),
        Method("embedding: CFG norm", by(by_embedding, detector=named[0]), stops),
        Method("embedding: FLIPD trace", by(by_embedding, detector=f"{named[1]} by probes"), stops),
        *(Method(f"noise: {name}", by(by_noise, detector=name), stops) for name in named[::2]),
        Method("late guidance", by_level, (4.0, 2.0, 1.0, 0.5)),
        Method("dynamic switch", by_switch, (1,)),
        Method("rescaled", by_rescaling, (0.3, 0.7, 1.0)),
        Method("clamped", by_clamping, (2.0, 1.0, 0.0)),
        Method("LID guidance", by_lid, (0.1, 0.2, 0.3)),
        Method("LID rejection", by_rejection, (0.1, 0.2, 0.3, 0.4)),
        Method("LID rejection, then guidance", by(by_rejection, then_guided=True), (0.1, 0.2, 0.3)),
    )  # fmt: skip


METHODS = _methods()
# One of each kind: most of the time of a small run is that of compiling.
SMOKE = (
    "none", "tokens: random", "tokens: CFG norm", "embedding: CFG norm", "late guidance",
    "rescaled", "clamped", "LID rejection, then guidance",
)  # fmt: skip
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
