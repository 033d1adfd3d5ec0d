r"""Samples of a saved model, guided or not, each with its dimension and what it copies.

    model -> reference      for guidance by dimension: runs without, to see what is usual
          -> samples        in blocks
          -> copies, LID_*  of the nearest training point, if the training data are known
          -> LID_theta      of the model without guidance, as in an audit
          -> samples.npz, samples.csv, grid.png, summary.json

Partial results are kept in `out/.work`, so that a run which is killed continues there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmh_jax import memorization, train
from mmh_jax.data import sources
from mmh_jax.report import measure, output, samples
from mmh_jax.report.drawing import Sampler, find_baseline, find_training
from mmh_jax.report.files import hash_of, replacing, write_csv, write_json
from mmh_jax.report.guiding import SampleOptions
from mmh_jax.report.model import load_model
from mmh_jax.report.stages import (
    Progress,
    Stages,
    check_count,
    check_matplotlib,
    check_seed,
    check_sigma,
)
from mmh_jax.report.summary import columns_of, columns_of_model, summary_of
from mmh_jax.typing import Estimate

__all__ = ["sample_model"]

MAX_PICTURES = 100


def sample_model(
    model: str | Path,
    out: str | Path,
    *,
    seed: int,
    options: SampleOptions | None = None,
    num: int = 64,
    data: str | Path | None = None,
    baseline: str | Path | None = None,
    sigma: float | None = None,
    num_neighbors: int = 20,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw samples of a saved model, and say of each what it is and what it copies.

    LID_theta is that of the model without guidance and without a label; LID_* is that of the
    training point nearest to the sample.

    Args:
        model: the folder of the model.
        out: the folder to write; unfinished work of the same settings there is continued.
        seed: of noise, labels and probes: guided or not, samples start from the same noise.
        options: the sampler and the guidance; by default none.
        num: how many samples.
        data: the training data, as `data.sources.load` reads them; None for those that the model
            names, if they are there and the same.
        baseline: the folder of a model of the same data that has not memorized, to which the
            dimensions that guide are relative.
        sigma: the noise level of LID_theta, in data units; None for each sample's own plateau.
        num_neighbors: for LID_*.
        overwrite: whether samples in the folder may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        The content of `summary.json`.

    Cost: `options.evaluations(config, measure)` for each sample and each reference run; for
    LID_theta D JVPs and a D x D eigenproblem for each sample and level, and without `sigma` those
    of an audit.

    Raises:
        ValueError, OSError, ImportError: for what cannot be used or written; before any work, but
            for too few reference runs that are no copies.
    """
    out, options = Path(out), options or SampleOptions()
    check_count("--num", num)
    check_count("--num-neighbors", num_neighbors, least=4)
    check_seed(seed)
    check_sigma(sigma)
    if Path(model).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the model {model} lies in the output {out}; choose another output.")
    output.check_output(out, output.SAMPLING, overwrite=overwrite)
    config = train.load_config(model)
    options.check(config)
    options.check_baseline(baseline)
    denoiser, config = load_model(model, config.shape)
    other = find_baseline(baseline, config, options)
    training = find_training(data, config)
    if training is not None and len(training.points) <= num_neighbors:
        raise ValueError(
            f"{training.name} has {len(training.points)} points, too few for {num_neighbors} "
            "neighbours of each; lower --num-neighbors."
        )
    if _figure_kind(config.shape, training):
        check_matplotlib("`mmh-jax sample`")
    settings = {
        "model": hash_of(Path(model) / "params.safetensors"),
        "data": None if training is None else hash_of(training.points),
        "baseline": None if baseline is None else hash_of(Path(baseline) / "params.safetensors"),
        "num": num,
        "sigma": sigma,
        "num_neighbors": num_neighbors,
        "seed": seed,
    }
    settings |= options.settings()
    work = output.claim(out, output.SAMPLING, settings, overwrite=overwrite)
    sampler = Sampler(denoiser, other, config, options, seed)
    run = _Run(sampler, training, settings, out, work, Stages(progress))
    columns, levels, found = run.all_stages()
    summary = {"format": output.SAMPLING.format} | summary_of(
        columns,
        settings=settings,
        command=command,
        sigmas=levels,
        timings=run.stages.rounded(),
        found=found,
    )
    write_json(out / "summary.json", summary)
    shutil.rmtree(work, ignore_errors=True)
    return summary


def _figure_kind(shape: tuple[int, ...], training: sources.Source | None) -> str:
    """`pictures`, `points` in the plane, or nothing that can be drawn."""
    if training is not None and training.is_image:
        return "pictures"
    if shape == (2,):
        return "points"
    return "pictures" if len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)) else ""


class _Run(NamedTuple):
    """One call, after all checks."""

    sampler: Sampler
    training: sources.Source | None
    settings: dict[str, Any]
    out: Path
    work: Path
    stages: Stages

    def all_stages(self) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
        """Write all but the summary; return the columns, noise levels and other findings."""
        num, labels = self.settings["num"], self.sampler.labels(self.settings["num"])
        target, reference = None, None
        if self.sampler.options.has_target:
            with self.stages("reference") as report:
                target, reference = self.sampler.target(
                    self.judge, folder=self.work / "reference", progress=report
                )
        with self.stages("samples") as report:
            found = self.sampler.draw(num, target, folder=self.work / "samples", progress=report)
        drawn = found.samples
        selected = found if self.sampler.options.guidance == "reject" else None
        judged = self.judge(drawn)
        more = {"seed": np.asarray(self.settings["seed"])}
        more |= {} if labels is None else {"label": labels}
        samples.write_samples(self.out / "samples.npz", drawn, judged, **more)
        levels, chosen = self.lid_theta(drawn)
        columns = self.columns(labels, chosen, judged)
        columns |= {} if selected is None else selected.columns()
        write_csv(self.out / "samples.csv", columns)
        if kind := _figure_kind(self.sampler.config.shape, self.training):
            with self.stages("figure"):
                self.draw(kind, drawn, columns)
        about = {
            "data": self.about_data(),
            "reference": reference,
            "evaluations": self.sampler.evaluations(found),
            "selection": None if selected is None else _summary_of_selection(selected),
            "samples": _summary_of(drawn, judged),
            "diagnostics": measure.diagnostics(chosen, self.sampler.model, drawn[0].size),
        }
        return columns, levels, about

    def judge(self, drawn: np.ndarray) -> samples.Judged | None:
        """What the samples copy, if that can be said."""
        if self.training is None:
            return None
        with self.stages("copies"):
            return samples.judge(drawn, self.training.points)

    def lid_theta(self, drawn: np.ndarray) -> tuple[np.ndarray, measure.Chosen]:
        """The noise levels, and what the model says at the samples."""
        sigma, spectra = self.settings["sigma"], measure.spectra(self.sampler.config.shape)
        levels = np.asarray([sigma])
        if sigma is None:
            there = drawn if self.training is None else self.training.points
            with self.stages("sigma") as report:
                levels = measure.choose_levels(
                    self.sampler.model, self.sampler.config, there, seed=self.settings["seed"],
                    spectra=spectra, folder=self.work / "sigma", progress=report,
                )  # fmt: skip
        with self.stages("lid_theta") as report:
            measured = measure.measure(
                self.sampler.model, drawn, levels, spectra=spectra,
                folder=self.work / "lid_theta", progress=report,
            )  # fmt: skip
        if sigma is None:
            return levels, measure.at_plateau(measured, levels, drawn[0].size)
        return levels, measure.at_level(measured, sigma)

    def columns(
        self, labels: np.ndarray | None, chosen: measure.Chosen, judged: samples.Judged | None
    ) -> dict[str, np.ndarray]:
        """A row for each sample."""
        index = np.arange(self.settings["num"])
        if judged is None or self.training is None:
            return columns_of_model(index, labels, chosen)
        rows, place = np.unique(np.maximum(judged.nearest, 0), return_inverse=True)
        with self.stages("lid_star") as report:
            found = memorization.neighbor_lid(
                self.training.points, rows=rows,
                num_neighbors=self.settings["num_neighbors"], progress=report,
            )  # fmt: skip
        star = Estimate(*(np.where(judged.is_finite, field[place], np.nan) for field in found))
        # Off the model's manifold there is no dimension, and so no verdict.
        dimension = chosen.learned(self.training.points[0].size)
        verdicts = memorization.verdict(dimension, star)
        nearest = (judged.nearest, judged.distance)
        return columns_of(index, labels, chosen, star, verdicts, nearest) | judged.columns()

    def about_data(self) -> dict[str, Any] | None:
        """Which data the samples were compared with."""
        if self.training is None:
            return None
        known = self.sampler.config.training.get("data")
        is_same = None if known is None else known == self.settings["data"]
        return {"source": self.training.name, "is_training_data": is_same}

    def draw(self, kind: str, drawn: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Write `grid.png`."""
        from mmh_jax import plotting  # here, because matplotlib is an extra

        num = len(drawn)
        copied = columns.get("memorized", np.zeros(num)).astype(bool)
        if kind == "points":
            points = None if self.training is None else self.training.points
            figure = plotting.plane_figure(drawn, copied, data=points)
        else:
            low, high = (0.0, 1.0) if self.training is None else self.training.value_range
            shown = (drawn[:MAX_PICTURES] - low) / (high - low)
            known = (columns["num_plateaus"] != 0) & (columns["off_manifold"] == 0)
            values = np.where(known, columns["lid_theta"], np.nan)
            dimensions = ["none" if np.isnan(value) else f"{value:.1f}" for value in values]
            marks = np.where(copied, " copy", "")
            texts = [d + mark for d, mark in zip(dimensions, marks, strict=True)]
            title = "LID$_\\theta$ below each" + (f"; {len(shown)} of {num}" * (num > len(shown)))
            figure = plotting.image_grid(shown, labels=texts[:MAX_PICTURES], title=title)
        with replacing(self.out / "grid.png") as partial:
            figure.savefig(partial, format="png")


def _summary_of_selection(selected: samples.Drawn) -> dict[str, float]:
    """How many were accepted, and after how many tries."""
    accepted, tries = float(selected.accepted.mean()), float(selected.tries.mean())
    return {"accepted": accepted, "mean_tries": tries}


def _summary_of(drawn: np.ndarray, judged: samples.Judged | None) -> dict[str, Any]:
    """How many there are and, if that is known, how many are copies, with a 95% interval."""
    if judged is None:
        finite = np.isfinite(drawn.reshape(len(drawn), -1)).all(axis=1)
        return {"num": len(drawn), "not_finite": int(np.sum(~finite))}
    found, finite = judged.summary(), int(judged.is_finite.sum())
    ends = memorization.rate_interval(found["memorized"], finite) if finite else None
    return found | {"fraction_interval": None if ends is None else [float(end) for end in ends]}
