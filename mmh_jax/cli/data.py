"""Commands on data: measure their dimensions, audit them for memorization."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

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
    """Audit a data set for memorization: train or load a model, compare dimensions, sample, score.

    At each point LID_theta, of the model, is compared with LID_*, of the data.  OD-Mem: the model
    has lost dimensions there; DD-Mem: the data have almost none themselves.  Samples of the model
    say which training points it gives away: `extracted` counts the samples that copy each.  Writes
    summary.json, points.csv, samples.npz and lid.png, and the model if it was trained.  Interrupted
    or killed, it continues when the same command is run again.

    Attributes:
        source: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        out: The folder for the report.
        model: The folder of a saved model of this data; by default one is trained.
        preset: How much work: training, at most 128, 2,000 or 10,000 points, and 64, 1,000 or
            10,000 samples.  Time grows with the cube of the number of coordinates of a point.
        seed: Of the training and of the choice of points.
        num_points: Measure at so many points, chosen at random; by default as many as the preset
            says.  The training always uses all.
        num_neighbors: Nearest neighbours for LID_*, at least 4.
        num_samples: Compare so many samples of the model with the data; by default as many as the
            preset says.
        detectors: As for `mmh-jax detect`, at the median of the plateaus; by default
            expected_flipd, projected_trace, nearest_distance and, of pictures, png_bytes.
        overwrite: Replace an audit in the folder.
    """

    source: Source
    out: Path
    model: Path | None = None
    preset: PresetName = "cpu"
    seed: int = 0
    num_points: int | None = None
    num_neighbors: int = 20
    num_samples: int | None = None
    detectors: tuple[str, ...] = ()
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Run the audit and print its summary."""
        report = library()
        start = time.monotonic()
        with console.progress() as progress:
            summary = report.audit(**dataclasses.asdict(self), command=command, progress=progress)
        rows = {
            "median LID_theta": console.number(summary["lid_theta"]["0.5"]),
            "median LID_*": console.number(summary["lid_star"]["0.5"]),
            **{title: count for title, count in summary["verdicts"].items() if count},
            "copies": console.copied(summary["samples"]),
            "median sigma": f"{summary['sigma']:.4g}",
            "diagnostics": console.diagnosis(summary["diagnostics"]),
            "seconds": f"{time.monotonic() - start:.0f}",
            "report": self.out,
        }
        console.print_table(f"audit of {self.source}, {summary['num_points']} points", rows)
