r"""The audit of a data set: which points a model memorizes, beside controls that say what it finds.

    source -> controls    points held out, and points planted a known number of times
           -> models      of the rest: the one audited, and two fold models, one on each half
           -> separation  how much noise hides a point from the others
           -> ends        of the sampler from noisy points, of the model and of one that never saw x
           -> LID_theta   expected FLIPD of the model, each point at its own plateau
           -> LID_*       the same of the model that never saw x, at the same noise level
           -> samples     of the model: which training points they copy
           -> verdicts    memorization.basin_verdict, at a false discovery rate of 5%
           -> points.csv, points.parquet, report.html, samples.npz, lid.png, summary.json

A model that is given stands in place of those that are trained: then there are no fold models, but
for `reference`, and in their place stands a locally flat distribution, of the dimension that the
closed-form diffusion of the data has; points to hold out come from `held_out`, or there are none.

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
from mmh_jax.report import basins, findings, measure, output, samples, statements
from mmh_jax.report import detectors as table
from mmh_jax.report.files import hash_of, kept_array, replacing, write_json
from mmh_jax.report.model import hash_of_model, load_model, points_like
from mmh_jax.report.page import write_page, write_table
from mmh_jax.report.pictures import Pictures, Role, scored_pictures
from mmh_jax.report.stages import (
    Progress,
    Stages,
    check_count,
    check_matplotlib,
    check_seed,
    find_preset,
)
from mmh_jax.typing import Estimate, Key

__all__ = ["audit"]

# Noise levels relative to the separation scale of the data.
LEVELS = 2.0 ** np.arange(-1, 2.5, 0.5)

Model = tuple[Any, train.ModelConfig]


def audit(
    source: str | Path,
    out: str | Path,
    *,
    seed: int,
    model: str | Path | None = None,
    reference: str | Path | None = None,
    held_out: str | Path | None = None,
    controls: bool = True,
    preset: str = "cpu",
    num_points: int | None = None,
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
        seed: of the training and of every choice at random.
        model: a saved model to audit, or None to train one.
        reference: a saved model that never saw the data, for a model that is given.
        held_out: a source of points like the data that a given model was not trained on.
        controls: whether to plant positive controls, if a model is trained.
        preset: the amount of work, a key of `PRESETS`.
        num_points: how many distinct points to judge, repeated ones first, by default the preset's
            number at most.  The training always uses all but those held out.
        num_samples: of the model, to see which training points they copy; by default the preset's.
        detectors: names of `memorization.DETECTORS`, a column of scores each.
        overwrite: whether an audit in the folder may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        The content of `summary.json`.

    Cost: three trainings, one on all and one on each half; for each point 7 noise levels of 16 (at
    smoke size 4) runs of the sampler, by two models, of 17 evaluations each; D JVPs and a D x D
    eigenproblem for each of 7 to 15 noise levels, by two models; 63 evaluations for each sample;
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
    check_seed(seed)
    check_matplotlib("the audit")
    for name, value in (("--reference", reference), ("--held-out", held_out)):
        if value is not None and model is None:
            raise ValueError(
                f"{name} is for a model that is given, with --model: an audit that trains holds "
                "points out and trains its reference models itself. Leave it out."
            )
    if model is not None and Path(model).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the model {model} lies in the output {out}; choose another output.")
    output.check_output(out, output.AUDIT, overwrite=overwrite)
    data = sources.load(source)
    shape = data.points.shape[1:]
    given = [None if where is None else load_model(where, shape) for where in (model, reference)]
    apart = None if held_out is None else points_like(held_out, shape)
    names = tuple(detectors) or (("png_bytes",) if data.is_image else ("pixel_variance",))
    table.check_detectors(names, given[0], data, given=["data"])
    plan = None
    if model is None:
        plan = memorization.plan_controls(data.points, seed=seed, plant=controls)
    pictures = scored_pictures(
        data.points, plan, num_points or sizes.max_points, seed=seed, held_out=apart
    )
    settings = {
        "source": str(source),
        "data": hash_of(data.points),
        "model": hash_of_model(model),
        "reference": hash_of_model(reference),
        "held_out": None if apart is None else hash_of(apart),
        "controls": controls and model is None,
        "preset": preset,
        "seed": seed,
        "num_points": int(pictures.is_judged.sum()),
        "num_samples": num_samples or sizes.num_samples,
        "detectors": names,
    }
    work = output.claim(out, output.AUDIT, settings, overwrite=overwrite)
    run = _Run(data, plan, pictures, out, work, settings, Stages(progress))
    found = run.all_stages(*given)
    summary = {"format": output.AUDIT.format, "command": command, "settings": settings}
    summary |= found | {"timings": run.stages.rounded()}
    write_json(out / "summary.json", summary)
    shutil.rmtree(work, ignore_errors=True)
    return summary


class _Run(NamedTuple):
    """One audit, after all checks."""

    data: sources.Source
    plan: memorization.Controls | None
    pictures: Pictures
    out: Path
    work: Path
    settings: dict[str, Any]
    stages: Stages

    def all_stages(self, given: Model | None, reference: Model | None) -> dict[str, Any]:
        """Write all but the summary, and return its content."""
        model = self.train() if given is None else given
        references, of = self.references(reference)
        apart = self.separation()
        chosen, curves = self.lid(model, references, of, apart)
        share, unseen = self.shares(model, references, of, apart)
        drawn, judged = self.sample(model)
        scores = self.score(model, float(np.median(chosen.sigma)), apart.distance)
        found = findings.find(
            self.pictures, apart, LEVELS, share, unseen, self.num_regenerations,
            chosen, curves, judged, self.data.points[0].size,
        )  # fmt: skip
        about = statements.About(
            self.data, self.settings, references != [],
            measure.diagnostics(chosen, model[0], self.data.points[0].size), curves.sigmas,
        )  # fmt: skip
        columns = findings.columns(found, self.data.labels) | table.columns_of(scores)
        write_table(self.out, columns)
        with self.stages("figure"):
            self.draw(found)
        with self.stages("report"):
            timings = self.stages.rounded()
            page = statements.page(found, about, columns, curves, drawn, judged, timings)
            write_page(self.out / "report.html", page)
        return statements.summary(found, about, judged) | table.summary_of(scores)

    @property
    def trained_on(self) -> np.ndarray:
        """(T,) the rows of the source that the model was trained on, as far as is known."""
        return np.arange(len(self.data.points)) if self.plan is None else self.plan.training

    @property
    def num_regenerations(self) -> int:
        return find_preset(self.settings["preset"]).num_regenerations

    def train(self) -> Model:
        """The model of `out/model`, trained if it is not there yet."""
        preset = find_preset(self.settings["preset"])
        with self.stages("model") as report:
            train.train_model(
                self.data.points[self.trained_on],
                self.recipe,
                self.out / "model",
                seed=self.settings["seed"],
                work=self.work / "checkpoints",
                save_every=preset.save_every,
                progress=lambda step, total, loss: report(step, total, f"loss {loss:.3f}"),
                about={"source": self.data.name}
                | {"path": self.settings["source"], "data": self.settings["data"]},
            )
            # Read back, so that a run that found the model finished has the same arrays.
            return load_model(self.out / "model", self.data.points.shape[1:])

    @property
    def recipe(self) -> train.Recipe:
        """Sizes of the network and the training."""
        recipe = find_preset(self.settings["preset"]).recipe
        return recipe.wide_enough(self.data.points[0].size)

    def references(self, given: Model | None) -> tuple[list[Any], np.ndarray]:
        """Models that never saw the points, and (P,) which of them stands for each point."""
        of = np.zeros(len(self.pictures.rows), int)
        if self.plan is None:
            return ([] if given is None else [given[0]]), of
        points, preset = self.data.points[self.trained_on], find_preset(self.settings["preset"])
        with self.stages("folds") as report:
            twins = train.train_twins(
                points, self.recipe, self.work / "folds",
                seed=self.settings["seed"] + 1, save_every=preset.save_every,
                progress=lambda name, step, total, loss: report(
                    step + total * (name == "second"), 2 * total, f"loss {loss:.3f}"
                ),
            )  # fmt: skip
        seen_by_first = np.unique(self.trained_on[twins.halves.first])
        # Of those that neither saw, the first is asked.
        of[np.isin(self.pictures.rows, seen_by_first)] = 1
        of[self.pictures.role == Role.HELD_OUT] = 0
        return [twins.first, twins.second], of

    def separation(self) -> memorization.Separation:
        """Of the points that are scored, from those that were trained on."""
        key, _, _ = self.keys
        with self.stages("separation") as report:
            found = kept_array(
                self.work / "separation.npy",
                lambda: np.stack(
                    memorization.separation(
                        self.data.points[self.trained_on], self.pictures.points,
                        key=key, progress=report,
                    )
                ),
            )  # fmt: skip
        nearest = self.trained_on[found[2].astype(int)]
        return memorization.Separation(found[0], found[1], nearest)

    def lid(
        self,
        model: Model,
        references: list[Any],
        of: np.ndarray,
        apart: memorization.Separation,
    ) -> tuple[measure.Chosen, findings.Curves]:
        """What the model says at its plateaus, and the curves of both sides."""
        denoiser, config = model
        points, seed = self.pictures.points, self.settings["seed"]
        spectra = measure.spectra(points.shape[1:])
        with self.stages("sigma") as report:
            levels = measure.choose_levels(
                denoiser, config, self.data.points[self.trained_on], seed=seed, spectra=spectra,
                folder=self.work / "sigma", progress=report,
            )  # fmt: skip
        # The plateaus, and on to the scale at which the verdict is made.
        highest = min(2 * float(np.median(apart.scale)), config.sigma_max)
        wider = measure.extended(levels, highest)
        with self.stages("lid_theta") as report:
            measured = measure.measure(
                denoiser, points, wider, spectra=spectra,
                folder=self.work / "lid_theta", progress=report,
            )  # fmt: skip
        at_plateaus = measure.Measured(*(field[:, : len(levels)] for field in measured))
        chosen = measure.at_plateau(at_plateaus, levels, points[0].size)
        theta = Estimate(measured.expected, measured.network_error)
        with self.stages("lid_star") as report:
            star = self.lid_star(references, of, wider, spectra, report)
        return chosen, findings.Curves.at(wider, theta, star, apart.scale)

    def lid_star(
        self, references: list[Any], of: np.ndarray, levels: np.ndarray, spectra: Any, report: Any
    ) -> Estimate:
        """(P, S) of models that never saw the points, or of the closed-form diffusion."""
        points = self.pictures.points
        if not references:
            found = kept_array(
                self.work / "lid_star.npy",
                lambda: findings.closed_form(self.data.points, points, levels, report),
            )
            return Estimate(*found)
        value, stderr = np.full((2, len(points), len(levels)), np.nan)
        for number, reference in enumerate(references):
            rows = np.flatnonzero(of == number)
            if len(rows):
                measured = measure.measure(
                    reference, points[rows], levels, spectra=spectra,
                    folder=self.work / f"lid_star_{number}", progress=report,
                )  # fmt: skip
                value[rows], stderr[rows] = measured.expected, measured.network_error
        return Estimate(value, stderr)

    def shares(
        self,
        model: Model,
        references: list[Any],
        of: np.ndarray,
        apart: memorization.Separation,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(P, L) the shares of ends that return: of the model; of the reference beside the model.

        The second is the null distribution: what a model that never saw the points returns, by the
        same measure.  None if there is no reference.
        """
        with self.stages("regeneration") as report:
            own = self.ends(model, model[0], "model", apart.scale, report)
            if not references:
                sigma = LEVELS * apart.scale[:, None]
                dimension = findings.flat_dimension(self.data.points, self.pictures.points)
                flat = memorization.flat_distances(sigma, dimension[:, None])
                return memorization.returned(own, flat), None
            others = np.empty_like(own)
            for number, reference in enumerate(references):
                rows = np.flatnonzero(of == number)
                if len(rows):
                    name = f"reference_{number}"
                    scale = apart.scale[rows]
                    others[rows] = self.ends(model, reference, name, scale, report, rows)
        return memorization.returned(own, others), memorization.returned(others, own)

    def ends(
        self,
        model: Model,
        denoiser: Any,
        name: str,
        scale: np.ndarray,
        report: Any,
        rows: np.ndarray | slice = slice(None),
    ) -> np.ndarray:
        """(P, L, K) how far from each point the sampler ends, level by level."""
        return basins.ends(
            denoiser, model[1], self.pictures.points[rows], LEVELS * scale[:, None],
            key=self.keys[1], num=self.num_regenerations, folder=self.work / f"ends_{name}",
            progress=lambda done, total: report(done, total, name),
        )  # fmt: skip

    def sample(self, model: Model) -> tuple[np.ndarray, samples.Judged]:
        """Draw samples, and write them with what they copy."""
        with self.stages("samples") as report:
            drawn = samples.draw(
                *model, self.settings["num_samples"], key=self.keys[1],
                folder=self.work / "samples", progress=report,
            )  # fmt: skip
        with self.stages("copies"):
            judged = samples.judge(drawn, self.data.points[self.trained_on])
            judged = judged.in_rows(self.trained_on, len(self.data.points))
            samples.write_samples(self.out / "samples.npz", drawn, judged)
        return drawn, judged

    def score(self, model: Model, sigma: float, distance: np.ndarray) -> memorization.Scores:
        """By the detectors of the settings."""
        denoiser, config = model
        subject = memorization.Subject(self.pictures.points, denoiser, data=self.data.points)
        with self.stages("detectors") as report:
            return table.scores(
                self.settings["detectors"], subject, table.settings_of(config, sigma),
                key=self.keys[2], distance=distance, folder=self.work / "scores", progress=report,
            )  # fmt: skip

    @property
    def keys(self) -> Key:
        """Of the separation, of samples and regenerations, and of what detectors draw."""
        return jax.random.split(jax.random.key(self.settings["seed"]), 3)

    def draw(self, found: findings.Findings) -> None:
        """Write `lid.png`."""
        from mmh_jax import plotting  # here, because matplotlib is an extra

        rows = np.flatnonzero(self.pictures.is_judged)
        images = self.pictures.points[rows] if self.data.is_image else None
        figure = plotting.dimension_figure(
            Estimate(*(field[rows] for field in found.lid_theta)),
            Estimate(*(field[rows] for field in found.lid_star)),
            found.label[rows], images=images, title=self.data.name,
        )  # fmt: skip
        with replacing(self.out / "lid.png") as partial:
            figure.savefig(partial, format="png")
