"""Samples of a model, and which training points they copy, in blocks that can be continued.

A sample is a copy by d_1 / d_2 < 1/3 on the deduplicated data, `memorization.copies`; Carlini's
calibrated distance stands beside it.  A training point is extracted as often as samples copy it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import memorization, sample
from mmh_jax.mitigation import Measure, Target, sample_selected
from mmh_jax.report.files import read_array, replacing, write_array
from mmh_jax.report.measure import BLOCK_SIZE, Progress
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Estimate, Key

__all__ = [
    "Drawn",
    "Judged",
    "calibrated_distance",
    "draw",
    "draw_selected",
    "judge",
    "write_samples",
]


class Judged(NamedTuple):
    """M samples beside N training points.  A sample that is not finite has -1, NaN and False.

    Attributes:
        nearest: (M,) the row of the nearest training point, of duplicates the first.
        distance: (M,) to it, in data units.
        ratio: (M,) d_1 / d_2.
        memorized: (M,) whether it is a copy by the ratio.
        extracted: (N,) how many samples copy each training point; duplicates share theirs.
        fraction: of the finite samples, how many are copies, and its standard error; NaN if none
            is finite.
    """

    nearest: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray
    memorized: np.ndarray
    extracted: np.ndarray
    fraction: Estimate

    @property
    def is_finite(self) -> np.ndarray:
        """(M,) whether a sample is finite."""
        return self.nearest >= 0

    def in_rows(self, rows: np.ndarray, num: int) -> Judged:
        """The same with the training points numbered as rows of a larger set.

        Args:
            rows: (N,) the row of each training point, repeated ones as often as they are.
            num: of the rows of the set.
        """
        extracted = np.zeros(num, int)
        extracted[rows] = self.extracted
        nearest = np.where(self.is_finite, rows[self.nearest], -1)
        return self._replace(nearest=nearest, extracted=extracted)

    def columns(self) -> dict[str, np.ndarray]:
        """For a table, one row for each sample."""
        return {
            "nearest_index": self.nearest,
            "nearest_distance": self.distance,
            "ratio": self.ratio,
            "memorized": self.memorized.astype(int),
        }

    def summary(self) -> dict[str, Any]:
        """For JSON; None in place of a number that there is not."""
        known = bool(self.is_finite.any())
        return {
            "num": len(self.nearest),
            "not_finite": int(np.sum(~self.is_finite)),
            "memorized": int(self.memorized.sum()),
            "fraction": float(self.fraction.value) if known else None,
            "fraction_stderr": float(self.fraction.stderr) if known else None,
            "extracted_points": int(np.sum(self.extracted > 0)),
        }


def draw(
    model: Any,
    config: ModelConfig,
    num: int,
    *,
    key: Key,
    conditions: np.ndarray | None = None,
    num_levels: int = 32,
    step: sample.Step = sample.heun(),  # noqa: B008 (a frozen value)
    folder: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Samples of a model, (num, *shape), by `sample.sample`.

    Args:
        model: a denoiser.
        config: for the shape of a point and the noise levels.
        num: how many; with more of them the first stay the same.
        key: draws the noise.
        conditions: (num,) labels, one bound for each sample; None for the model as it is.
        num_levels, step: as for `sample.sample`.
        folder: where each finished block is kept; blocks found there are not drawn again.
        progress: called as `progress(done, num)`.
    """

    def block(key: Key, rows: np.ndarray) -> np.ndarray:
        drawn = sample.sample(
            model,
            BLOCK_SIZE,
            key=key,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            num_levels=num_levels,
            shape=config.shape,
            step=step,
            conditions=None if conditions is None else conditions[rows],
        )
        return np.asarray(drawn)

    return _in_blocks(block, num, key, folder, progress)


class Drawn(NamedTuple):
    """Samples that were accepted, or given up.

    Attributes:
        samples: (N, *shape).
        accepted: (N,) whether the dimension was at or above the target at the last try.
        tries: (N,) how many.
    """

    samples: np.ndarray
    accepted: np.ndarray
    tries: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """For a table, one row for each sample."""
        return {"accepted": self.accepted.astype(int), "tries": self.tries}


def draw_selected(
    model: Any,
    config: ModelConfig,
    num: int,
    *,
    key: Key,
    sigmas: np.ndarray,
    places: tuple[int, int],
    measure: Measure,
    target: Target,
    max_tries: int,
    step: sample.Step,
    conditions: np.ndarray | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Drawn:
    """Samples of a model, begun again where their dimension is low, by `sample_selected`.

    Args:
        model, config, num, key, conditions, step, folder, progress: as for `draw`.
        sigmas: (S,) the noise levels.
        places: the numbers of those to go back to, and to decide at.
        measure, target, max_tries: as for `mitigation.sample_selected`.
    """
    back, decide = (float(sigmas[place]) for place in places)

    def block(key: Key, rows: np.ndarray) -> np.ndarray:
        found = sample_selected(
            model,
            BLOCK_SIZE,
            key=key,
            sigmas=sigmas,
            measure=measure,
            target=target,
            decide_at=decide,
            back_to=back,
            step=step,
            max_tries=max_tries,
            shape=config.shape,
            conditions=None if conditions is None else conditions[rows],
        )
        flat = np.reshape(found.samples, (BLOCK_SIZE, -1))
        return np.column_stack([flat, found.accepted, found.tries]).astype(flat.dtype)

    rows = _in_blocks(block, num, key, folder, progress)
    samples = rows[:, :-2].reshape(num, *config.shape)
    return Drawn(samples, rows[:, -2].astype(bool), rows[:, -1].astype(int))


def _in_blocks(
    block: Callable[[Key, np.ndarray], np.ndarray],
    num: int,
    key: Key,
    folder: Path | None,
    progress: Progress | None,
) -> np.ndarray:
    """`block(key, rows)` for all rows, (num, ...); what is in the folder is not drawn again."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
    blocks = []
    for number, start in enumerate(range(0, num, BLOCK_SIZE)):
        path = None if folder is None else folder / f"{start:09d}.npy"
        found = None if path is None else read_array(path)
        if found is None:
            # A whole block always: one program, and the same numbers whatever `num` is.
            rows = np.minimum(np.arange(start, start + BLOCK_SIZE), num - 1)
            found = block(jax.random.fold_in(key, number), rows)
            if path is not None:
                write_array(path, found)
        blocks.append(found)
        if progress is not None:
            progress(min(start + BLOCK_SIZE, num), num)
    return np.concatenate(blocks)[:num]


def judge(samples: np.ndarray, points: np.ndarray) -> Judged:
    """Which of the samples (M, *shape) are copies of which of the training points (N, *shape)."""
    finite = _finite_rows(samples)
    nearest, (distance, ratio) = np.full(len(samples), -1), np.full((2, len(samples)), np.nan)
    memorized, extracted = np.zeros(len(samples), bool), np.zeros(len(points), int)
    fraction = Estimate(np.nan, np.nan)
    if len(finite):
        found = memorization.copies(samples[finite], points)
        nearest[finite], distance[finite], ratio[finite] = (
            found.nearest,
            found.distance,
            found.ratio,
        )
        memorized[finite], fraction = found.memorized, found.fraction
        extracted = memorization.extraction(found).counts
    return Judged(nearest, distance, ratio, memorized, extracted, fraction)


def calibrated_distance(samples: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(M,) Carlini's, `memorization.calibrated_copies`; NaN for samples that are not finite."""
    finite, result = _finite_rows(samples), np.full(len(samples), np.nan)
    if len(finite):
        result[finite] = memorization.calibrated_copies(samples[finite], points).ratio
    return result


def _finite_rows(samples: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isfinite(samples.reshape(len(samples), -1)).all(axis=1))


def write_samples(
    path: str | Path, samples: np.ndarray, judged: Judged | None, **more: np.ndarray
) -> None:
    """Write samples and what was found about them as `.npz`, to be read without pickle."""
    found = {}
    if judged is not None:
        found = {name: getattr(judged, name) for name in ("nearest", "ratio", "memorized")}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, samples=samples, **found, **more)  # pyright: ignore
