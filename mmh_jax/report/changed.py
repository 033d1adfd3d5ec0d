"""What ways to mitigate change in a prompt, in its embedding, its noise, or its guidance.

A trial is a way at a strength.  What is common to all trials of a prompt is drawn from its number
alone.  What took evaluations of the network, or a language model, is kept in the working folder
when it is finished, and read from there if it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmh_jax import mapping, mitigation, pretrained, sample
from mmh_jax.denoise import Guided
from mmh_jax.pretrained.run import first_alpha, levels
from mmh_jax.report import reworded
from mmh_jax.report.asked import Asked
from mmh_jax.report.files import kept_array, read_json, write_json
from mmh_jax.report.looked import level_at
from mmh_jax.report.reworded import OfContext, Reworded, Words, context_of, with_context
from mmh_jax.typing import Array, Key

if TYPE_CHECKING:
    from mmh_jax.report.prompt_plan import PromptPlan

__all__ = ["PLAIN", "Case", "Change", "Changes", "Trial"]

LATE = 0.8  # of the steps, where the dimension is looked at: 40 of 50 (Ross et al. 2025)
RATE = 0.05  # of the optimisers, likewise


class Trial(NamedTuple):
    """A way at a strength, and which of its rewrites; each None where there is none."""

    way: str
    strength: float | None = None
    rewrite: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        parts = [self.way] + ([] if self.strength is None else [f"{self.strength:g}"])
        return "_".join(parts + ([] if self.rewrite is None else [str(self.rewrite)]))


PLAIN = Trial("plain")


class Case(NamedTuple):
    """A prompt.

    Attributes:
        number: of its line.
        asked: the line.
        words: the prompt as tokens.
        condition: of the pipeline.
        noise: (n, *shape) of unit variance, from which all ways start.
        image: the picture it was trained with, (H, W, C), or None.
    """

    number: int
    asked: Asked
    words: Words
    condition: Any
    noise: np.ndarray
    image: np.ndarray | None


class Change(NamedTuple):
    """What a trial changes.

    Attributes:
        condition, noise: in place of those of the prompt.
        end: the place in the context at which the text ends.
        evaluations: of the network, for what was found out before, for each picture.
        reworded: the prompt, if it is another.
    """

    condition: Any
    noise: np.ndarray
    end: int
    evaluations: float = 0.0
    reworded: Reworded | None = None


class Changes(NamedTuple):
    """What trials change, of one call.

    Attributes:
        pipeline: of `pretrained.load`.
        base: its denoiser, without a prompt.
        plan: of the call.
        chat: of `mitigation.chat_rewriter`, or None.
        seed, chunk_size: of the call.
        work: the working folder.
    """

    pipeline: pretrained.TextToImage
    base: Any
    plan: PromptPlan
    chat: Callable[..., list[str]] | None
    seed: int
    chunk_size: int
    work: Path

    def path(self, folder: str, number: int, name: str, end: str) -> Path:
        """Of a piece."""
        return self.work / folder / f"{number:05d}_{name}{end}"

    def key(self, use: int, number: int) -> Key:
        """Of a use, for a prompt."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), use), number)

    @property
    def sigmas(self) -> Array:
        """The noise levels of the sampler."""
        return levels(self.pipeline.process, self.plan.num_steps)[0]

    @property
    def unit(self) -> float:
        """What the sampler multiplies noise of unit variance by: 1/alpha at its first level."""
        return 1 / first_alpha(self.pipeline.process, self.plan.num_steps)

    def change(self, case: Case, trial: Trial) -> Change:
        """What the trial changes in the prompt or in its noise."""
        same = Change(case.condition, case.noise, case.words.end)
        if trial.way in ("tokens", "random"):
            found = self.reworded(case, trial)[trial.rewrite or 0]
            ids = np.asarray(found.ids, np.int32)
            cost = self.blame_cost if trial.way == "tokens" else 0
            return Change(
                self.pipeline.embed_ids(list(ids)), case.noise,
                reworded.end_of(self.pipeline, ids), cost / len(case.noise), found,
            )  # fmt: skip
        if trial.way in ("embedding", "noise"):
            num_steps = int(trial.strength or 0)
            path = self.path("changes", case.number, trial.name, ".npy")
            make = self.embedding if trial.way == "embedding" else self.noise
            moved = kept_array(path, functools.partial(make, case, num_steps))
            cost = (num_steps + 1) * reworded.criterion_cost(self.plan.criterion, self.plan.probes)
            if trial.way == "noise":
                return same._replace(noise=moved, evaluations=float(cost))
            condition = with_context(case.condition, jnp.asarray(moved))
            cost += self.path_cost
            return same._replace(condition=condition, evaluations=cost / len(case.noise))
        return same

    @property
    def path_cost(self) -> int:
        """Evaluations to come to the point at which prompts are looked at."""
        return 2 * (self.late + 1) if self.plan.criterion == "flipd" else 0

    @property
    def blame_cost(self) -> int:
        """Evaluations of an attribution."""
        return reworded.criterion_cost(self.plan.criterion, self.plan.probes) + self.path_cost

    @property
    def late(self) -> int:
        """The step at which the dimension is looked at."""
        return min(int(LATE * self.plan.num_steps), len(self.sigmas) - 1)

    def looked_at(self, case: Case) -> tuple[Array, Array]:
        """The point at which prompts are blamed and moved, and its noise level.

        Of the first of the prompt's draws: pure noise at the first level, or for the dimension a
        late state of the plain trajectory.
        """
        x, sigmas = jnp.asarray(self.unit * case.noise[0]), self.sigmas
        if self.plan.criterion != "flipd":
            return x, sigmas[0]
        guided = self.guided(case.condition, PLAIN)
        return _state(guided, x, sigmas[: self.late + 1]), sigmas[self.late]

    def reworded(self, case: Case, trial: Trial) -> list[Reworded]:
        """All rewrites of a way at a strength."""
        name = trial._replace(rewrite=None).name
        path = self.path("changes", case.number, name, ".json")
        if not path.exists():
            is_blind = trial.way == "random"
            blame = np.zeros(case.words.ids.shape[1]) if is_blind else self.blame(case)
            found = Reworded.by(
                self.plan.rewriter, case.words, blame, int(trial.strength or 1),
                num=self.plan.rewrites, key=self.key(3 if is_blind else 2, case.number),
                chat=self.chat,
            )  # fmt: skip
            write_json(path, {"found": [each._asdict() for each in found]})
        return [Reworded(**each) for each in read_json(path)["found"]]

    def blame(self, case: Case) -> np.ndarray:
        """(77,) of the tokens of the prompt."""

        def make() -> Any:
            run = reworded.blame_of(self.plan.criterion, self.plan.probes)
            tokens = _tokens(case)
            x, sigma = self.looked_at(case)
            return run(self.base, case.condition, tokens, x, sigma, self.key(4, case.number))

        return kept_array(self.path("changes", case.number, "blame", ".npy"), make)

    def embedding(self, case: Case, num_steps: int) -> Array:
        """The tokens of the prompt moved until the criterion is lower."""
        run = _over_tokens(self.plan.criterion, self.plan.probes, num_steps)
        x, sigma = self.looked_at(case)
        key = self.key(4, case.number)
        return run(self.base, case.condition, _tokens(case), x, sigma, key)

    def noise(self, case: Case, num_steps: int) -> np.ndarray:
        """The noise of each picture moved, its length kept, until the criterion is lower."""
        run = _over_noise(self.plan.criterion, self.plan.probes, num_steps, self.chunk_size)
        sigma = np.float32(self.sigmas[0])
        # The optimiser starts at sigma times its noise, the sampler at 1/alpha times it.
        scale = np.float32(self.unit / sigma)
        key = self.key(4, case.number)
        moved = run(scale * case.noise, case.condition, self.base, sigma, key)
        return np.asarray(moved / scale, np.float32)

    def guided(self, condition: Any, trial: Trial) -> Guided:
        """The denoiser of the sampler; one program for all trials."""
        scale, high, outside = self.plan.guidance_scale, np.inf, 1.0
        if trial.way == "weaker":
            scale = float(trial.strength or 0)
        if trial.way == "late":
            high, outside = level_at(self.pipeline.process, float(trial.strength or 0)), 0.0
        numbers = (jnp.float32(value) for value in (scale, 0.0, high, outside))
        return Guided(self.base.condition(condition), self.base, *numbers)


def _tokens(case: Case) -> Array:
    """(77, E); in full precision, which an optimiser's steps need."""
    return context_of(case.condition)[: case.words.ids.shape[1]].astype(jnp.float32)


@jax.jit
def _state(denoiser: Any, x: Array, sigmas: Array) -> Array:
    return sample.solve_path(denoiser, x, sigmas, step=sample.ddim()).states[-1]


@functools.cache
def _over_tokens(criterion: str, probes: int, num_steps: int) -> Callable[..., Array]:
    @jax.jit
    def run(base: Any, condition: Any, tokens: Array, x: Array, sigma: Array, key: Key) -> Array:
        return mitigation.optimise_condition(
            OfContext(base, condition), tokens, x, sigma, num_steps=num_steps,
            criterion=reworded.criterion_of(criterion, probes, key, schedule=base.schedule),
            optimizer=optax.adamw(RATE),
        ).value  # fmt: skip

    return run


@functools.cache
def _over_noise(
    criterion: str, probes: int, num_steps: int, chunk_size: int
) -> Callable[..., np.ndarray]:
    def one(noise: Array, condition: Any, base: Any, sigma: Array, key: Key) -> Array:
        return mitigation.optimise_noise(
            base.condition(condition), base, noise, sigma, num_steps=num_steps,
            criterion=reworded.criterion_of(criterion, probes, key, schedule=base.schedule),
            optimizer=optax.adam(RATE),
        ).value  # fmt: skip

    return mapping.over_points(one, (0, None, None, None, None), chunk_size=chunk_size)
