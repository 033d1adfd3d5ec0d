"""Ways to mitigate, tried on the prompts of a published pipeline, piece by piece.

Of each prompt every trial has a piece of what was drawn and a row of what is found, beside what
`changed` keeps; each is read from the working folder if it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmh_jax import lid, linalg, mapping, memorization
from mmh_jax.report.asked import Asked, picture
from mmh_jax.report.changed import PLAIN, Case, Change, Changes, Trial
from mmh_jax.report.files import kept_array, read_json, replacing, write_json
from mmh_jax.report.looked import LOOK_AT, level_at
from mmh_jax.report.reworded import Words, context_of
from mmh_jax.typing import Array, Key

__all__ = ["Trials"]

TILES = 4  # along each side of a picture, for distances


class Trials(NamedTuple):
    """One call, after all checks.

    Attributes:
        changes: what trials change.
        rows: the prompts.
        trials: all but the plain one.
        out: the folder that pictures are written to.
    """

    changes: Changes
    rows: list[Asked]
    trials: list[Trial]
    out: Path

    def found(self, report: Callable[..., None]) -> Iterator[dict[str, Any]]:
        """A row for each prompt and trial, the plain one first."""
        trials = [PLAIN, *self.trials]
        for folder in ("changes", "latents", "rows"):
            (self.changes.work / folder).mkdir(exist_ok=True)
        (self.out / "pictures").mkdir(exist_ok=True)
        total = len(self.rows) * len(trials)
        for number, asked in enumerate(self.rows):
            paths = [self.changes.path("rows", number, trial.name, ".json") for trial in trials]
            if not all(path.exists() for path in paths):
                case = self.case(number, asked)
                plain = self.shown(self.drawn(case, PLAIN, self.changes.change(case, PLAIN)))
                for place, (trial, path) in enumerate(zip(trials, paths, strict=True)):
                    if not path.exists():
                        write_json(path, self.row(case, trial, plain))
                    report(number * len(trials) + place + 1, total, trial.name)
            yield from map(read_json, paths)

    def case(self, number: int, asked: Asked) -> Case:
        """A prompt, and what its trials share."""
        pipeline, prompt = self.changes.pipeline, asked.prompt or ""
        shape = (self.changes.plan.generate, *pipeline.shape)
        noise = np.asarray(jax.random.normal(self.changes.key(0, number), shape))
        image = None if asked.image is None else picture(asked.image, pipeline.image_shape)
        return Case(number, asked, Words(pipeline, prompt), pipeline.embed(prompt), noise, image)

    def row(self, case: Case, trial: Trial, plain: np.ndarray) -> dict[str, Any]:
        """What becomes of a prompt by a trial, beside its plain pictures; its own are written."""
        change = self.changes.change(case, trial)
        drawn = self.drawn(case, trial, change)
        shown = self.shown(drawn)
        for number, image in enumerate(shown):
            self.write(image, f"{case.number:05d}_{trial.name}_{number}.png")
        row: dict[str, Any] = {"index": case.number, "prompt": case.asked.prompt}
        row |= {"memorized": case.asked.memorized, **trial._asdict()}
        row |= self.measured(case, change, drawn) | {"radius": _radius(shown)}
        row["cosine"] = _cosine(
            context_of(change.condition)[change.end], context_of(case.condition)[case.words.end]
        )
        row["to_plain"] = float(np.mean(_distances(shown, plain)))
        if case.image is not None:
            row["to_image"] = _distances(shown, np.broadcast_to(case.image, shown.shape)).tolist()
        row["evaluations"] = change.evaluations + 2 * len(self.changes.sigmas)
        worded = change.reworded
        row["changed"] = None if worded is None else worded.text
        row["blamed"] = None if worded is None else worded.blamed
        return {name: _finite(value) for name, value in row.items()}

    def drawn(self, case: Case, trial: Trial, change: Change) -> np.ndarray:
        """(n, *shape) latents."""
        by = self.changes
        draw = functools.partial(
            by.pipeline.sample, None, noise=change.noise, num_steps=by.plan.num_steps,
            denoiser=by.guided(change.condition, trial), chunk_size=by.chunk_size,
        )  # fmt: skip
        return kept_array(by.path("latents", case.number, trial.name, ".npy"), draw)

    def shown(self, latents: np.ndarray) -> np.ndarray:
        """(n, H, W, C) pictures in [0, 1]."""
        decoded = map(self.changes.pipeline.decode, latents)
        return np.stack([np.asarray(each, np.float32) for each in decoded])

    def write(self, image: np.ndarray, name: str) -> None:
        """A picture as PNG; what is not finite is black."""
        pixels = np.round(255 * np.nan_to_num(image)).astype(np.uint8)
        with replacing(self.out / "pictures" / name) as partial:
            Image.fromarray(pixels).save(partial, format="PNG")

    def measured(self, case: Case, change: Change, drawn: np.ndarray) -> dict[str, float]:
        """Of the condition: its CFG norm where sampling begins, the dimension where it ends."""
        by = self.changes
        keys = jax.random.split(by.key(1, case.number), len(drawn))
        sigma, first = (
            np.float32(level_at(by.pipeline.process, LOOK_AT)), np.float32(by.sigmas[0])
        )  # fmt: skip
        start = np.asarray(by.unit * change.noise, np.float32)
        run = _measure(by.plan.probes, by.chunk_size)
        found = run(drawn, start, change.condition, by.base, sigma, first, key=keys)
        return dict(zip(("cfg_norm", "flipd"), np.mean(found, axis=0).tolist(), strict=True))


@functools.cache
def _measure(probes: int, chunk_size: int) -> Callable[..., Any]:
    trace = linalg.rademacher(probes, chunk_size=1)

    def one(
        x: Array, start: Array, condition: Any, base: Any, sigma: Array, first: Array, *, key: Key
    ) -> Array:
        model = base.condition(condition)
        norm = memorization.cfg_norm(model, base, start, first)
        return jnp.stack([norm, lid.flipd(model, x, sigma, trace=trace, key=key).value])

    return mapping.over_points(one, (0, 0, None, None, None, None), chunk_size=chunk_size)


def _tiles(shape: tuple[int, ...]) -> int:
    return 1 if shape[0] % TILES or shape[1] % TILES else TILES


def _radius(shown: np.ndarray) -> float | None:
    """How close together the pictures of a prompt lie; None of a single one."""
    if len(shown) < 2:
        return None
    return float(memorization.pairwise_radius(shown, tiles=_tiles(shown.shape[1:])))


def _distances(shown: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) of each picture to the other of its number, as of the radius."""
    tiles = _tiles(shown.shape[1:])
    pairs = zip(shown, others, strict=True)
    return np.asarray([memorization.tiled_distance(*pair, tiles=tiles) for pair in pairs])


def _cosine(one: Array, other: Array) -> float:
    a, b = (np.asarray(each, np.float64) for each in (one, other))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(float).tiny))


def _finite(value: Any) -> Any:
    """What JSON can hold: None for a number that is not finite, in lists, too."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
