r"""The audit of a data set: train or load a model, measure, sample, score and judge every point.

    source -> points -> model -> LID_*       nearest neighbours in the data, maximum likelihood
                              -> sigmas      the noise levels in question
                              -> LID_theta   expected FLIPD, each point at its own plateau
                              -> samples     of the model: which training points they copy
                              -> detectors   scores, at the median of the plateaus
                              -> verdicts    memorization.verdict
                              -> points.csv, samples.npz, lid.png, summary.json

Partial results are kept in `out/.work`, so that a run which is killed continues there; the same
seed gives the same `points.csv` byte for byte, whether or not the run was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import memorization, train
from mmh_jax.data import sources
from mmh_jax.report import detectors as table
from mmh_jax.report import measure, output, samples
from mmh_jax.report.files import hash_of, replacing, write_csv, write_json
from mmh_jax.report.model import load_model
from mmh_jax.report.neighbors import check_neighbors, lid_star
from mmh_jax.report.stages import (
    Progress,
    Stages,
    check_count,
    check_matplotlib,
    check_seed,
    find_preset,
)
from mmh_jax.report.summary import columns_of, summary_of
from mmh_jax.typing import Estimate, Key

__all__ = ["audit"]

# By default; of pictures `png_bytes`, too.
DETECTORS = ("expected_flipd", "projected_trace", "nearest_distance")

Model = tuple[Any, train.ModelConfig]


def audit(
    source: str | Path,
    out: str | Path,
    *,
    seed: int,
    model: str | Path | None = None,
    preset: str = "cpu",
    num_points: int | None = None,
    num_neighbors: int = 20,
    num_samples: int | None = None,
    detectors: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit a data set for memorization, and write the report into a folder.

    Args:
        source: what `data.sources.load` reads.
        out: the folder to write; an unfinished audit of the same settings there is continued.
        seed: of the training and of the choice of points.
        model: a saved model to audit, or None to train one.
        preset: the amount of work, a key of `PRESETS`.
        num_points: at how many points to measure, by default the preset's number at most.  The
            training and the neighbours always use all.
        num_neighbors: for LID_*.
        num_samples: of the model, to see which training points they copy; by default the preset's.
        detectors: names of `memorization.DETECTORS`, a column of scores each; by default a few.
        overwrite: whether an audit in the folder may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        The content of `summary.json`.

    Cost: the training; D JVPs and a D x D eigenproblem for each of 15 noise levels at 128 points
    and for each of 7 to 15 at the others; what the detectors cost; 63 evaluations for each sample;
    the distances from points and samples to all the data.

    Raises:
        ValueError: for settings, a source, a model or a folder that cannot be used; before
            anything is written.
        OSError: if the folder cannot be written.
        ImportError: if matplotlib is missing.
    """
    out, sizes = Path(out), find_preset(preset)
    check_count("--num-points", num_points)
    check_count("--num-samples", num_samples)
    check_count("--num-neighbors", num_neighbors, least=4)
    check_seed(seed)
    check_matplotlib("the audit")
    if model is not None and Path(model).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the model {model} lies in the output {out}; choose another output.")
    output.check_output(out, output.AUDIT, overwrite=overwrite)
    data = sources.load(source)
    check_neighbors(source, len(data.points), num_neighbors)
    given = None if model is None else load_model(model, data.points.shape[1:])
    names = tuple(detectors) or (*DETECTORS, *(("png_bytes",) if data.is_image else ()))
    table.check_detectors(names, given, data, given=["data"])
    settings = {
        "source": str(source),
        "data": hash_of(data.points),
        "model": None if model is None else hash_of(Path(model) / "params.safetensors"),
        "preset": preset,
        "seed": seed,
        "num_points": min(num_points or sizes.max_points, len(data.points)),
        "num_neighbors": num_neighbors,
        "num_samples": num_samples or sizes.num_samples,
        "detectors": names,
    }
    work = output.claim(out, output.AUDIT, settings, overwrite=overwrite)
    run = _Run(data, out, work, settings, Stages(progress))
    columns, levels, found = run.all_stages(given)
    summary = {"format": output.AUDIT.format} | summary_of(
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


class _Run(NamedTuple):
    """One audit, after all checks."""

    data: sources.Source
    out: Path
    work: Path
    settings: dict[str, Any]
    stages: Stages

    def all_stages(
        self, given: Model | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
        """Write all but the summary; return the columns of `points.csv`, levels, other findings."""
        model = self.train() if given is None else given
        num_points, seed = self.settings["num_points"], self.settings["seed"]
        index = measure.random_subset(len(self.data.points), num_points, seed=seed)
        star, nearest = self.lid_star(index)
        levels, chosen = self.lid_theta(model, index)
        judged = self.sample(model)
        scores = self.score(model, index, float(np.median(chosen.sigma)), nearest[1])
        verdicts = memorization.verdict(chosen.dimension, star)
        columns = columns_of(index, self.data.labels, chosen, star, verdicts, nearest)
        columns |= {"extracted": judged.extracted[index]} | table.columns_of(scores)
        write_csv(self.out / "points.csv", columns)
        with self.stages("figure"):
            self.draw(index, chosen.lid, star, verdicts)
        found = {
            "diagnostics": measure.diagnostics(chosen, model[0], self.data.points[0].size),
            "samples": judged.summary(),
        }
        return columns, levels, found | table.summary_of(scores)

    def train(self) -> Model:
        """The model of `out/model`, trained if it is not there yet."""
        preset = find_preset(self.settings["preset"])
        with self.stages("model") as report:
            train.train_model(
                self.data.points,
                preset.recipe.wide_enough(self.data.points[0].size),
                self.out / "model",
                seed=self.settings["seed"],
                work=self.work / "checkpoints",
                save_every=preset.save_every,
                progress=lambda step, total, loss: report(step, total, f"loss {loss:.3f}"),
                about={
                    "source": self.data.name,
                    "path": self.settings["source"],
                    "data": self.settings["data"],
                },
            )
            # Read back, so that a run that found the model finished computes with the same arrays
            # as the one that trained it.
            return load_model(self.out / "model", self.data.points.shape[1:])

    def lid_star(self, index: np.ndarray) -> tuple[Estimate, tuple[np.ndarray, np.ndarray]]:
        """LID_* at the points of `index`; the index of their nearest other point, its distance."""
        with self.stages("lid_star") as report:
            return lid_star(
                self.data.points, index, self.settings["num_neighbors"], progress=report
            )

    def lid_theta(self, model: Model, index: np.ndarray) -> tuple[np.ndarray, measure.Chosen]:
        """The noise levels, and what the model says at the points of `index`."""
        denoiser, config = model
        points, seed = self.data.points, self.settings["seed"]
        spectra = measure.spectra(points.shape[1:])
        with self.stages("sigma") as report:
            levels = measure.choose_levels(
                denoiser, config, points, seed=seed, spectra=spectra,
                folder=self.work / "sigma", progress=report,
            )  # fmt: skip
        with self.stages("lid_theta") as report:
            measured = measure.measure(
                denoiser, points[index], levels, spectra=spectra,
                folder=self.work / "lid_theta", progress=report,
            )  # fmt: skip
        return levels, measure.at_plateau(measured, levels, points[0].size)

    def sample(self, model: Model) -> samples.Judged:
        """Draw samples, and write them with what they copy."""
        sample_key, _ = self.keys
        with self.stages("samples") as report:
            drawn = samples.draw(
                *model, self.settings["num_samples"], key=sample_key,
                folder=self.work / "samples", progress=report,
            )  # fmt: skip
        with self.stages("copies"):
            judged = samples.judge(drawn, self.data.points)
            samples.write_samples(self.out / "samples.npz", drawn, judged)
        return judged

    def score(
        self, model: Model, index: np.ndarray, sigma: float, distance: np.ndarray
    ) -> memorization.Scores:
        """By the detectors of the settings, at the points of `index`."""
        (denoiser, config), (_, score_key) = model, self.keys
        points = self.data.points
        subject = memorization.Subject(points[index], denoiser, data=points)
        with self.stages("detectors") as report:
            return table.scores(
                self.settings["detectors"], subject, table.settings_of(config, sigma),
                key=score_key, distance=distance, folder=self.work / "scores", progress=report,
            )  # fmt: skip

    @property
    def keys(self) -> Key:
        """Of the samples, and of what detectors draw."""
        return jax.random.split(jax.random.key(self.settings["seed"]))

    def draw(
        self,
        index: np.ndarray,
        lid_theta: Estimate,
        star: Estimate,
        verdicts: memorization.Verdict,
    ) -> None:
        """Write `lid.png`."""
        from mmh_jax import plotting  # here, because matplotlib is an extra

        images = self.data.points[index] if self.data.is_image else None
        figure = plotting.dimension_figure(
            lid_theta, star, verdicts.label, images=images, title=self.data.name
        )
        with replacing(self.out / "lid.png") as partial:
            figure.savefig(partial, format="png")
