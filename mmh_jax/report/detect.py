r"""Detectors of memorization at the points of a data set, or at samples of a model, as a CSV file.

    model, data -> sigma      one noise level for all points, chosen without labels
                -> samples    if they are scored: who copies which training point
                -> neighbors  if data are scored: the nearest training point, but the point itself
                -> scores     `memorization.scores`, block by block
                -> FILE.csv, FILE.json and, of samples, FILE.samples.npz

How well a detector finds the copies among samples is said where there are two of either kind.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import memorization
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.report import detectors as table
from mmh_jax.report import measure, output, samples
from mmh_jax.report.files import hash_of, read_json, write_csv, write_json
from mmh_jax.report.given import Given, read
from mmh_jax.report.stages import Progress, Stages, check_count, check_seed, check_sigma
from mmh_jax.report.summary import environment
from mmh_jax.typing import Key

__all__ = ["detect"]


def detect(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    seed: int,
    detectors: Sequence[str] = (),
    generate: int | None = None,
    sigma: float | None = None,
    baseline: str | Path | None = None,
    trained_on: str | Path | None = None,
    by_label: bool = False,
    num_points: int | None = None,
    chunk_size: int = 32,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Score the points of a data set, or samples of a model, by detectors of memorization.

    Partial results are kept beside the file, in `<out>.work`, until it is written: a call that is
    killed continues there.

    Args:
        model: the folder of the model.
        data: what `data.sources.load` reads.
        out: the CSV file to write; a summary is written beside it as `.json`, and samples as
            `.samples.npz`.
        seed: of the choice of points, of samples, and of the detectors' draws.
        detectors: names of `memorization.DETECTORS`; by default a few that apply.
        generate: score so many samples of the model, instead of the points of `data`.
        sigma: the noise level of all detectors, in data units; None takes the median of the
            plateaus of 128 points of `data`.
        baseline: the folder of another model, for the detectors `*_baseline`.
        trained_on: the training data, as `data`; None takes `data` itself if samples are scored, or
            the model says that it was trained on these points.
        by_label: condition each point on its label, each sample on that of a random row of `data`.
        num_points: score so many points, chosen at random; None for all.
        chunk_size: points at once.
        overwrite: whether the files may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        `(columns, summary)`: what was written.

    Raises:
        ValueError, OSError: for what cannot be used or written; before any work.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.work")
    _check_numbers(generate, num_points, chunk_size, sigma)
    check_seed(seed)
    _check_files(out, partial, overwrite=overwrite)
    given = read(model, data, baseline, trained_on, by_label, is_generated=generate is not None)
    names = tuple(detectors) or table.defaults(given=given.fields, is_image=given.data.is_image)
    table.check_detectors(names, (given.bound, given.config), given.data, given=given.fields)
    settings = {
        "model": hash_of(Path(model) / "params.safetensors"),
        "source": str(data),
        "data": hash_of(given.data.points),
        "detectors": names,
        "generate": generate,
        "sigma": sigma,
        "baseline": None if baseline is None else hash_of(Path(baseline) / "params.safetensors"),
        "trained_on": None if given.training is None else hash_of(given.training),
        "labels": hash_of(given.labels) if by_label else None,
        "num_points": num_points,
        "seed": seed,
    }
    output.check_writable(out.parent)
    work = output.claim(partial, output.DETECTION, settings, overwrite=overwrite)
    run = _Run(given, settings, work, chunk_size, Stages(progress))
    columns, summary = run.of_samples(out) if generate else run.of_data()
    about = {"format": output.DETECTION.format, "command": command, "settings": settings}
    about |= {"environment": environment()} | summary | {"timings": run.stages.rounded()}
    write_json(out.with_suffix(".json"), about)
    write_csv(out, columns)
    shutil.rmtree(partial)
    return columns, about


def _check_numbers(
    generate: int | None, num_points: int | None, chunk_size: int, sigma: float | None
) -> None:
    check_count("--generate", generate)
    check_count("--num-points", num_points)
    check_count("--chunk-size", chunk_size)
    check_sigma(sigma)
    if generate is not None and num_points is not None:
        raise ValueError(
            "--num-points is of the points of --data, and --generate scores samples; leave one out."
        )


def _check_files(out: Path, partial: Path, *, overwrite: bool) -> None:
    """Of the files beside the table only those of an earlier call of this kind are replaced."""
    output.check_file(out, overwrite=overwrite)
    summary, archive = out.with_suffix(".json"), out.with_suffix(".samples.npz")
    if out == summary:
        raise ValueError(f"--out {out} is the table; give it the suffix .csv.")
    is_ours = read_json(summary).get("format") == output.DETECTION.format
    may_replace = output.is_begun(partial, output.DETECTION) or (is_ours and overwrite)
    for path in (summary, archive):
        if path.exists() and not may_replace:
            raise ValueError(
                f"{path}, to be written beside {out.name}, exists; choose another --out"
                + (", or pass --overwrite." if is_ours else ".")
            )


class _Run(NamedTuple):
    """One call, after all checks."""

    given: Given
    settings: dict[str, Any]
    work: Path
    chunk_size: int
    stages: Stages

    def of_data(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Score points of the data."""
        given, seed = self.given, self.settings["seed"]
        points = given.data.points
        sigma = self.sigma()
        index = measure.random_subset(
            len(points), self.settings["num_points"] or len(points), seed=seed
        )
        columns, distance = {"index": index}, None
        if given.data.labels is not None:
            columns["label"] = np.asarray(given.data.labels)[index]
        if given.training is not None:
            with self.stages("neighbors") as report:
                found = nearest_neighbors(
                    given.training, 1, queries=points[index],
                    exclude=index if given.is_training else None, progress=report,
                )  # fmt: skip
            distance = found.distances[:, 0]
            columns |= {"nearest_index": found.indices[:, 0], "nearest_distance": distance}
        conditions = given.labels[index] if given.by_label else None
        found = self.score(points[index], conditions, sigma, distance)
        summary = {"sigma": sigma, "num_points": len(index)}
        return columns | table.columns_of(found), summary | table.summary_of(found)

    def of_samples(self, out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw samples, say which are copies, score them, and say how well the scores find them."""
        given, seed, num = self.given, self.settings["seed"], self.settings["generate"]
        assert given.training is not None
        sigma, conditions = self.sigma(), None
        if given.by_label:
            conditions = np.random.default_rng(seed).choice(given.labels, num)
        with self.stages("samples") as report:
            drawn = samples.draw(
                given.model, given.config, num, key=self.keys[0], conditions=conditions,
                folder=self.work / "samples", progress=report,
            )  # fmt: skip
        with self.stages("copies"):
            judged = samples.judge(drawn, given.training)
            calibrated = samples.calibrated_distance(drawn, given.training)
        # A sample that is not finite has no score, and must not stop those that have one.
        is_finite = judged.is_finite
        there = np.where(is_finite.reshape(-1, *[1] * (drawn.ndim - 1)), drawn, 0)
        found = table.only(self.score(there, conditions, sigma, judged.distance), is_finite)
        columns = {"index": np.arange(num)}
        if conditions is not None:
            columns["label"] = conditions
        columns |= judged.columns() | {"calibrated": calibrated} | table.columns_of(found)
        summary = {"sigma": sigma, "num_points": num, "samples": judged.summary()}
        summary |= table.summary_of(found)
        summary["detection"] = {
            name: table.detection_of(value[is_finite], judged.memorized[is_finite], seed=seed)
            for name, value in found.value.items()
        }
        samples.write_samples(out.with_suffix(".samples.npz"), drawn, judged)
        return columns, summary

    @property
    def keys(self) -> Key:
        """Of the samples, and of what detectors draw."""
        return jax.random.split(jax.random.key(self.settings["seed"]))

    def sigma(self) -> float:
        """The noise level that was given, or that of the plateaus."""
        if self.settings["sigma"] is not None:
            return float(self.settings["sigma"])
        given = self.given
        with self.stages("sigma") as report:
            return measure.choose_level(
                given.model, given.config, given.data.points, seed=self.settings["seed"],
                spectra=measure.spectra(given.config.shape),
                folder=self.work / "sigma", progress=report,
            )  # fmt: skip

    def score(
        self,
        points: np.ndarray,
        conditions: np.ndarray | None,
        sigma: float,
        distance: np.ndarray | None,
    ) -> memorization.Scores:
        """By the detectors of the settings."""
        given, names = self.given, self.settings["detectors"]
        subject = memorization.Subject(
            points, given.model, baseline=given.baseline, data=given.training, conditions=conditions
        )
        with self.stages("detectors") as report:
            return table.scores(
                names, subject, table.settings_of(given.config, sigma),
                key=self.keys[1], distance=distance,
                chunk_size=self.chunk_size, folder=self.work / "scores", progress=report,
            )  # fmt: skip
