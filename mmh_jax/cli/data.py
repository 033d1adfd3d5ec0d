"""Commands on data: measure their dimensions, audit them for memorization."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from mmh_jax import console
from mmh_jax.cli.common import PresetName, Source, library

__all__ = ["Audit", "LidData"]


@dataclasses.dataclass(frozen=True)
class LidData:
    """Measure the local intrinsic dimension of a data set from nearest neighbours; no model.

    Writes one row for each point: its index, label if there is one, dimension and standard error by
    each method, its nearest neighbour and the distance to it, and how many copies of it there are.
    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        source: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        out: The CSV file to write.
        method: One or more of mle, mom, mada, two_nn, gride, tle, abid, ess, local_pca, danco, ...
            (`mmh_jax.lid.DATA_METHODS`).
        num_neighbors: Nearest neighbours of each point; `auto` takes for each point and method the
            number, of 8 to 128, where the dimension depends least on it; with 0 plateaus there is
            no dimension.
        num_points: Write the rows of so many points, chosen at random; all are neighbours.
        tolerance: Points linked by steps no longer than this, in data units, are duplicates.
        merge: Take duplicates for one point.  Otherwise exact ones are an atom, of dimension 0.
        seed: Of the choice of points.
        overwrite: Replace the file.
    """

    source: Source
    out: Path
    method: tuple[str, ...] = ("mle",)
    num_neighbors: Literal["auto"] | int = 20
    num_points: int | None = None
    tolerance: float = 0.0
    merge: bool = False
    seed: int = 0
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Measure, write the file, and print medians and the dimension of all."""
        report = library()
        start = time.monotonic()
        settings = dataclasses.asdict(self) | {
            "num_neighbors": None if self.num_neighbors == "auto" else self.num_neighbors
        }
        methods = settings.pop("method")
        with console.progress() as progress:
            columns, about = report.lid_of_data(**settings, methods=methods, progress=progress)
        rows: dict[str, Any] = {}
        for name in self.method:
            rows[f"median LID_*, {name}"] = console.median(columns[name])
            if name in about["overall"]:
                value, stderr = about["overall"][name]
                error = f" +- {stderr:.2f}" if math.isfinite(stderr) else ""
                rows[f"of all points, {name}"] = f"{value:.2f}{error}"
        twins = f"{about['duplicates']} of {about['num_points']} points"
        rows |= {"duplicates": f"{twins}, in {about['clusters']} clusters"}
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "file": self.out}
        console.print_table(f"LID of {self.source}", rows)


@dataclasses.dataclass(frozen=True)
class Audit:
    """Audit a data set for memorization, beside controls that say what the audit would have found.

    Holds some of the data out, plants a few a known number of times, and trains a model on the
    rest.  Memorized is what the model returns to from noise that hides it from the other points, as
    no model does that never saw it: DD-Mem where the data repeat it, OD-Mem where it occurs once.
    Samples of the model say beside it which points it gives away.  Writes report.html, points.csv,
    points.parquet, summary.json, samples.npz and lid.png, and the model if it was trained.
    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        source: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        out: The folder for the report.
        demo: Audit 600 of the digits, 10 of them there 33 times and 10 nine times, in place of a
            source: an audit that finds something, beside the truth.
        model: The folder of a saved model of this data; by default one is trained.
        reference: The folder of a saved model that never saw the data, to compare `model` with.
        held_out: A source of points like the data that `model` was not trained on.
        no_controls: Plant nothing: what the audit would have missed is then not known.
        preset: How much work: training, at most 128, 2,000 or 10,000 points, and 64, 1,000 or
            10,000 samples.  Time grows with the cube of the number of coordinates of a point.
        seed: Of the training and of every choice at random.
        num_points: Judge so many different points, repeated ones first; by default as many as the
            preset says.  The training always uses all but those held out.
        num_samples: Compare so many samples of the model with the data; by default as many as the
            preset says.
        detectors: As for `mmh-jax detect`, at the median of the plateaus; a column each.
        overwrite: Replace an audit in the folder.
    """

    out: Path
    source: tyro.conf.Positional[str | None] = None
    demo: bool = False
    model: Path | None = None
    reference: Path | None = None
    held_out: str | None = None
    no_controls: bool = False
    preset: PresetName = "cpu"
    seed: int = 0
    num_points: int | None = None
    num_samples: int | None = None
    detectors: tuple[str, ...] = ()
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Run the audit and print its summary."""
        report = library()
        if self.demo == (self.source is not None):
            raise ValueError("name a source to audit, or --demo for one with planted copies.")
        start = time.monotonic()
        settings = dataclasses.asdict(self)
        settings |= {"controls": not settings.pop("no_controls"), "command": command}
        source = "planted_digits" if settings.pop("demo") else settings["source"]
        settings["source"] = source
        with console.progress() as progress:
            summary = report.audit(**settings, progress=progress)
        rows = {
            "verdict": summary["verdict"],
            **{title: count for title, count in summary["verdicts"].items() if count},
            "evidence": "\n".join(summary["evidence"]),
            "verdict, and extracted": console.agreement(summary["agreement"]),
            "found, of planted": console.doses(summary["controls"].get("dose_response", ())),
            "median LID_theta, LID_*": " and ".join(
                console.number(summary[side]["0.5"]) for side in ("lid_theta", "lid_star")
            ),
            "of the model, at plateaus": console.number(summary["lid_plateau"]["0.5"]),
            "copies": console.copied(summary["samples"]),
            "diagnostics": console.diagnosis(summary["diagnostics"]),
            "cannot say": "\n".join(summary["limits"]),
            "seconds": f"{time.monotonic() - start:.0f}",
            "report": self.out / "report.html",
        }
        console.print_table(f"audit of {source}, {summary['num_points']} points", rows)
