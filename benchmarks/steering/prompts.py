"""Prompts and their model, and what methods read of normal runs: the setting of tier D.

The programs that sample, of one prompt and many starts, are here, too: compiled once for all
strengths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ladder import attribution
from ladder.conditional import GUIDANCE

from mmh_jax import denoise, linalg, mapping, mitigation, sample
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key

PROBES = 4
# Of LID guidance, levels relative to the spread of the data.
LOW, HIGH, NEAR, STRENGTH, TRUST = 0.2, 1.0, 0.3, 1e4, 1.0


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


runs = mapping.over_points(_run, (None, 0, 0, 0, None), chunk_size=160)
_lates = mapping.over_points(_late, (None, 0, 0, None), chunk_size=160)
_normals = mapping.over_points(_normal, (None, None, 0, 0, None), chunk_size=80)
rewrites = mapping.over_points(_rewrite, (0, 0, None, None), chunk_size=160)
switches = mapping.over_points(_switched, (None, 0, 0, None), chunk_size=160)
rescales = mapping.over_points(_rescaled, (None, 0, 0, None, None), chunk_size=160)
clamps = mapping.over_points(_clamped, (None, 0, 0, None, None, None), chunk_size=160)
steers = mapping.over_points(_steered, (None, 0, 0, None), chunk_size=80)


@functools.cache
def of_criterion(name: str, size: int, num_steps: int = 0) -> tuple[Callable[..., Any], ...]:
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
