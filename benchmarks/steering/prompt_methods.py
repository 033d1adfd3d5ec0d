"""Methods of the trigger tier by strength: other tokens, embeddings, noise, guidance, dimension."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import mitigation
from mmh_jax.typing import Array
from steering.prompts import (
    HIGH,
    LOW,
    STRENGTH,
    TRUST,
    Setting,
    calls,
    clamps,
    detector_of,
    guided,
    of_criterion,
    rescales,
    rewrites,
    runs,
    steers,
    switches,
)  # fmt: skip


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
    return Drawn(runs(of.model, prompts, noise, high, of.levels), of.cost + extra)


def by_tokens(of: Setting, k: float, *, detector: str | None = None) -> Drawn:
    """k tokens rewritten at random, any of them or those that a detector blames."""
    blame, extra = np.zeros(of.prompts.shape[:2], np.float32), 0.0
    if detector is not None:
        found = detector_of(detector, of.size)
        x, sigma = of.at(found.late, of.prompts, of.noise)
        blame = of_criterion(detector, of.size)[1](of.model, of.prompts, x, sigma)
        extra = of.cost_at(found.late) + 3 * found.evaluations
    key = jax.random.fold_in(of.key, 2)
    return plain(of, rewrites(of.prompts, blame, of.words, jnp.int32(k), key=key), extra=extra)


def stop_level(of: Setting, detector: str, strength: float) -> Array:
    """The (1 - strength) quantile of a criterion over normal runs; infinite for strength 0."""
    if strength == 0:
        return jnp.float32(jnp.inf)
    late = detector_of(detector, of.size).late
    x, sigma = of.at(late, of.normal.prompts, of.normal.noise)
    values = of_criterion(detector, of.size)[0](of.model, of.normal.prompts, x, sigma)
    return jnp.float32(np.quantile(values, 1 - strength))


def by_embedding(of: Setting, strength: float, *, detector: str) -> Drawn:
    """All tokens moved until a detector is low."""
    found = detector_of(detector, of.size)
    x, sigma = of.at(found.late, of.prompts, of.noise)
    stop = stop_level(of, detector, strength)
    moved = of_criterion(detector, of.size, of.num_steps)[2](of.model, of.prompts, x, sigma, stop)
    extra = of.cost_at(found.late) + 3 * found.evaluations * (of.num_steps + 1)
    return plain(of, moved, extra=extra)


def by_noise(of: Setting, strength: float, *, detector: str) -> Drawn:
    """The noise moved until a detector is low."""
    stop = stop_level(of, detector, strength)
    moved = of_criterion(detector, of.size, of.num_steps)[3](
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
    high = switches(of.model, of.prompts, of.noise, of.levels)
    return plain(of, high=high, extra=calls(of.levels) + len(of.levels))


def by_rescaling(of: Setting, amount: float) -> Drawn:
    """The guided answer with the standard deviation of the conditional one."""
    args = (of.model, of.prompts, of.noise, jnp.float32(amount), of.levels)
    return Drawn(rescales(*args), of.cost)


def by_clamping(of: Setting, limit: float) -> Drawn:
    """No step longer than usual."""
    args = (of.prompts, of.noise, of.normal.usual, jnp.float32(limit), of.levels)
    return Drawn(clamps(of.model, *args), of.cost)


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
    return Drawn(steers(way, of.prompts, of.noise, of.levels), cost(of.levels))


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
