"""Detectors of memorization as columns of a table: which apply, and their scores in blocks.

All detectors of one table look at one noise level.  What a detector reads and is not there, is said
before any work, with the option that gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import memorization
from mmh_jax.data.sources import Source
from mmh_jax.memorization.evidence import evaluations_of, with_needs
from mmh_jax.report.files import read_array, write_array
from mmh_jax.report.measure import BLOCK_SIZE, Progress
from mmh_jax.sample import karras_levels
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Key

__all__ = [
    "check_detectors",
    "columns_of",
    "defaults",
    "detection_of",
    "only",
    "scores",
    "settings_of",
    "summary_of",
]

LEAST = 2  # of the memorized and of the others, to say how well a detector does

DISTANCE = "nearest_distance"
SAMPLER_LEVELS = 32
ENCODE_LEVELS = 12
REGENERATION_LEVELS = 9

_CURES = {
    "unconditional": (
        "compares the model with and without a condition; pass `--label` to `mmh-jax detect`, with "
        "a model that was trained with `--by-label`"
    ),
    "baseline": (
        "compares the model with another one; pass `--baseline FOLDER` to `mmh-jax detect`, an "
        "earlier checkpoint's or another model's"
    ),
    "data": "reads the training data; pass `--trained-on SOURCE`",
    "reference": (
        "needs normal runs to compare with, which no command knows; call `memorization.scores` "
        "with `Subject(reference=...)`"
    ),
    "generations": (
        "reads several generations of each condition, which no command draws; call "
        "`memorization.scores` with `Subject(generations=...)`"
    ),
}
_ATTENTION = ("attention_entropy", "bright_ending", "local_cfg_norm")


def defaults(*, given: Iterable[str], is_image: bool) -> tuple[str, ...]:
    """The detectors that are asked for if none is named, of those that apply.

    Args:
        given: of `unconditional`, `baseline` and `data` what there is.
        is_image: whether points are pictures.

    >>> defaults(given=["data"], is_image=False)[:3]
    ('expected_flipd', 'projected_trace', 'denoised_spread')
    """
    optional = {
        "unconditional": ("projected_trace_difference", "cfg_norm"),
        "baseline": ("projected_trace_log_ratio_baseline", "regeneration_mean_log_ratio_baseline"),
        "data": (DISTANCE,),
    }
    names = ["expected_flipd", "projected_trace", "denoised_spread", "score_norm"]
    names += [name for field, some in optional.items() if field in given for name in some]
    return (*names, "pixel_variance", *(("png_bytes",) if is_image else ()))


def check_detectors(
    names: Sequence[str],
    model: tuple[Any, ModelConfig] | None,
    source: Source,
    *,
    given: Iterable[str],
) -> None:
    """Raise ValueError for detectors that there are not, or for which something is missing.

    Args:
        names: of `memorization.DETECTORS`.
        model: a denoiser, with a condition bound if its points have conditions, and its
            configuration; None for a ResidualMLP that is yet to be trained.
        source: of the points, or of data that samples are like.
        given: fields of `memorization.Subject` that there are, beyond points and denoiser.
    """
    there = memorization.DETECTORS
    if unknown := [name for name in names if name not in there]:
        raise ValueError(
            f"--detectors: unknown detector {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(there)}."
        )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--detectors {' '.join(names)}: name at least one, and none twice.")
    for name in names:
        for field in there[name].reads:
            if field in _CURES and field not in given:
                raise ValueError(f"--detectors: `{name}` {_CURES[field]}.")
        if name == "png_bytes" and not source.is_image:
            raise ValueError(
                "--detectors: `png_bytes` is of pictures, (H, W) or (H, W, 3) with values from 0 "
                f"to 1, which those of {source.name} are not; leave it out."
            )
        if name == "zlib_bytes" and source.value_range != (0, 1):
            raise ValueError(
                "--detectors: `zlib_bytes` is of values from 0 to 1; those of "
                f"{source.name} go from {source.value_range[0]:.3g} to "
                f"{source.value_range[1]:.3g}. Leave it out."
            )
        if "inside" in with_needs(there[name].quantities):
            _check_inside(name, model)


def _check_inside(name: str, model: tuple[Any, ModelConfig] | None) -> None:
    network = "ResidualMLP" if model is None else model[1].network
    if model is None or network not in ("UNet", "DiT"):
        raise ValueError(
            f"--detectors: `{name}` looks inside a UNet or DiT; this model is a {network}. Leave "
            "it out, or train a model by `mmh-jax train --network UNet`."
        )
    denoiser, config = model
    x = np.zeros(config.shape, np.float32)
    inside = jax.eval_shape(lambda x: memorization.inside_at(denoiser, x, config.sigma_max), x)
    if name in _ATTENTION and not inside.cross_attention:
        raise ValueError(
            f"--detectors: `{name}` reads the attention of each pixel to tokens, and this "
            f"{network} has none; leave it out."
        )


def settings_of(config: ModelConfig, sigma: float) -> memorization.Settings:
    """The noise levels at which detectors look at a model of this configuration.

    Dimensions at `sigma`; the sampler's on the whole range of the training; a clean point is
    carried up from `sigma` to three times the spread of the data, and regenerated from noise of
    half of it.
    """
    spread = config.scale * config.sigma_data
    noised = min(max(spread / 2, 2 * config.sigma_min), config.sigma_max)
    top = max(min(3 * spread, config.sigma_max), 2 * sigma)
    levels = karras_levels(SAMPLER_LEVELS, sigma_min=config.sigma_min, sigma_max=config.sigma_max)
    return memorization.Settings(
        np.float32(sigma),
        levels=levels,
        encode_levels=np.geomspace(sigma, top, ENCODE_LEVELS).astype(np.float32),
        spread=spread,
        regeneration_levels=karras_levels(
            REGENERATION_LEVELS, sigma_min=config.sigma_min, sigma_max=noised
        ),
    )


def scores(
    names: Sequence[str],
    subject: memorization.Subject,
    settings: memorization.Settings,
    *,
    key: Key,
    distance: np.ndarray | None = None,
    chunk_size: int = 32,
    block_size: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> memorization.Scores:
    """`memorization.scores`, block by block: the same numbers.

    Args:
        names, subject, settings, key, chunk_size: as there.
        distance: (M,) of each point to the nearest of the training data but itself, for the
            detector `nearest_distance`, which would compare a training point with itself.
        block_size: points of a block, at least; by default 256.
        folder: where each finished block is kept; blocks found there are not computed again.
        progress: called as `progress(done, total)`, in points.
    """
    if folder is not None:
        folder.mkdir(exist_ok=True)
    total, size = len(subject.points), max(block_size or BLOCK_SIZE, chunk_size)
    keys, blocks = jax.random.split(key, total), []
    subject = _without_unread(names, subject, distance)
    for start in range(0, total, size):
        stop = min(start + size, total)
        path = None if folder is None else folder / f"{start:09d}-{stop:09d}.npy"
        block = None if path is None else read_array(path)
        if block is None:
            # At least a chunk, the last point repeated: a short last block compiles nothing.
            rows = np.arange(start, max(stop, start + min(chunk_size, total)))
            rows = np.minimum(rows, total - 1)
            found = memorization.scores(
                _with_distance(names, None if distance is None else distance[rows]),
                _part(subject, rows),
                settings,
                key=keys[rows],
                chunk_size=chunk_size,
            )
            both = [[of[name] for name in names] for of in (found.value, found.stderr)]
            block = np.asarray(both, float)[..., : stop - start]
            if path is not None:
                write_array(path, block)
        blocks.append(block)
        if progress is not None:
            progress(stop, total)
    value, stderr = np.concatenate(blocks, axis=-1)
    dim = int(np.prod(np.shape(subject.points)[1:], dtype=int))
    chosen = [memorization.DETECTORS[name] for name in names]
    return memorization.Scores(
        dict(zip(names, value, strict=True)),
        dict(zip(names, stderr, strict=True)),
        {detector.name: detector.evaluations(dim, settings) for detector in chosen},
        evaluations_of([each for d in chosen for each in d.quantities], dim, settings),
    )


def _with_distance(
    names: Sequence[str], distance: np.ndarray | None
) -> list[str | memorization.Detector]:
    """The detectors, `nearest_distance` as it is known already."""
    if distance is None:
        return list(names)
    known = memorization.Detector(DISTANCE, on_host=lambda points: -distance)
    return [known if name == DISTANCE else name for name in names]


def _without_unread(
    names: Sequence[str], subject: memorization.Subject, distance: np.ndarray | None
) -> memorization.Subject:
    """Training data that no detector reads are not carried to the device; others once."""
    reading = [memorization.DETECTORS[n].reads for n in names if n != DISTANCE or distance is None]
    is_read = any("data" in fields for fields in reading)
    data = jnp.asarray(subject.data) if is_read and subject.data is not None else None
    return subject.replace(data=data)  # pyright: ignore


def _part(subject: memorization.Subject, rows: np.ndarray) -> memorization.Subject:
    conditions = jax.tree.map(lambda leaf: leaf[rows], subject.conditions)
    return subject.replace(points=subject.points[rows], conditions=conditions)  # pyright: ignore


def columns_of(found: memorization.Scores) -> dict[str, np.ndarray]:
    """A column `score_NAME` for each detector, and `score_NAME_stderr` where there is one."""
    columns = {}
    for name, value in found.value.items():
        columns[f"score_{name}"] = value
        if np.any(found.stderr[name] != 0):
            columns[f"score_{name}_stderr"] = found.stderr[name]
    return columns


def only(found: memorization.Scores, is_kept: np.ndarray) -> memorization.Scores:
    """The scores with NaN, and errors of 0, where a point is not kept."""
    return found._replace(
        value={name: np.where(is_kept, value, np.nan) for name, value in found.value.items()},
        stderr={name: np.where(is_kept, error, 0) for name, error in found.stderr.items()},
    )


def summary_of(found: memorization.Scores) -> dict[str, Any]:
    """For JSON: evaluations of the network for one point, of all detectors and of each alone."""
    return {
        "evaluations": float(found.total),
        "detectors": {
            name: {
                "evaluations": float(found.evaluations[name]),
                "median": _median(value),
                "not_finite": int(np.sum(~np.isfinite(value))),
            }
            for name, value in found.value.items()
        },
    }


def _median(value: np.ndarray) -> float | None:
    finite = value[np.isfinite(value)]
    return float(np.median(finite)) if len(finite) else None


def detection_of(
    value: np.ndarray, is_memorized: np.ndarray, *, seed: int
) -> dict[str, Any] | None:
    """How well a score finds the memorized, for JSON; None with too few of either kind.

    A score of NaN ranks last, as not memorized.

    Args:
        value: (M,) scores.
        is_memorized: (M,) booleans.
        seed: of the bootstrap.
    """
    num_positive = int(is_memorized.sum())
    if min(num_positive, len(is_memorized) - num_positive) < LEAST:
        return None
    ranked = np.where(np.isnan(value), -np.inf, value)
    found = memorization.detection(ranked, is_memorized, seed=seed)
    intervals = {"auroc": found.auroc, "auprc": found.auprc, "tpr_at_1%_fpr": found.tpr}
    return {name: interval._asdict() for name, interval in intervals.items()} | {
        "num_positive": found.num_positive,
        "num_negative": found.num_negative,
    }
