"""The command line, `mmh-jax`: train a model, measure dimensions, detect memorization, audit data.

Results go to files, one summary to stdout; progress and errors to stderr.  Exit codes: 0 done, 2 an
error that the message explains, 130 interrupted.  What only a command needs is imported in it, so
that `mmh-jax --help` is quick.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape

from mmh_jax import console

__all__ = ["Audit", "Detect", "Lid", "LidData", "Train", "main"]

Source = Annotated[str, tyro.conf.Positional]
PresetName = Annotated[str, tyro.conf.arg(metavar="{smoke,cpu,accelerator}")]
Method = Literal["expected", "tangential", "flipd", "projected", "thresholded", "rank"]

_CURES = {
    errno.ENOSPC: "; free some space, then run the same command again",
    errno.EDQUOT: "; free some space, then run the same command again",
    errno.EROFS: "; choose another output",
    errno.EACCES: "; choose another output, or change its permissions",
}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a score model on a data set and save it as a folder.

    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        source: What `data.load` reads: `digits`, a .npy or .npz file, an idx file, a folder of
            images, of MNIST or of CIFAR, ...
        out: The folder for the model: config.json, params.safetensors and metrics.jsonl.
        preset: Sizes of network and training: a minute, some minutes, or hours on an accelerator.
        seed: Of weights, order and noise.
        num_steps: Optimiser steps; by default the preset's.
        network: For points of any kind an MLP; for images a U-Net or a transformer.
        by_label: Train a conditional model on the labels of the source; UNet and DiT only.
        budget: Minutes of training, in place of a number of steps.
        tensorboard: Write the metrics to this folder for TensorBoard, too.
        overwrite: Replace a finished model in the folder.
    """

    source: Source
    out: Path
    preset: PresetName = "cpu"
    seed: int = 0
    num_steps: int | None = None
    network: Literal["ResidualMLP", "UNet", "DiT"] = "ResidualMLP"
    by_label: bool = False
    budget: float | None = None
    tensorboard: Path | None = None
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Train, save, and print where the model is."""
        report = _library()
        start = time.monotonic()
        with console.progress() as progress:
            report.train_model(**dataclasses.asdict(self), progress=progress)
        rows = {"seconds": f"{time.monotonic() - start:.0f}", "model": self.out}
        console.print_table(f"model of {self.source}", rows)


@dataclasses.dataclass(frozen=True)
class Lid:
    """Measure the local intrinsic dimension of a saved model at the points of a data set.

    Writes one row for each point: its index, label if there is one, noise level, how many plateaus
    its curve has (with 0 there is no dimension), a column for each method, the standard error of
    the expected one, the residual |x - D(x)|^2 / sigma^2, and whether that is too large for a
    point of the model's manifold, off which there is no dimension either.  Interrupted or killed,
    it continues when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it.
        source: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        out: The CSV file to write.
        sigma: Noise level in data units; `auto` takes for each point the one where LID_theta
            depends least on it, at 7 to 15 times the cost.
        method: One or more of: expected, the sum of g (2 - g) over the eigenvalues g above one
            half of the denoiser's Jacobian, the dimension of its tangent space; tangential, the sum
            of those g plus the tangential residual, of which the former has the mean; flipd, the
            trace of the Jacobian plus the residual; projected, the same without negative
            eigenvalues; thresholded, also without those smaller in size than the most negative
            one; rank, the number above one half.
        num_points: Measure at so many points, chosen at random; by default at all.
        seed: Of this choice, and of the points that say which noise levels to look at.
        overwrite: Replace the file.
    """

    model: Annotated[Path, tyro.conf.Positional]
    source: Source
    out: Path
    sigma: Literal["auto"] | float = "auto"
    method: tuple[Method, ...] = ("expected",)
    num_points: int | None = None
    seed: int = 0
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Measure, write the file, and print medians."""
        report = _library()
        start = time.monotonic()
        with console.progress() as progress:
            columns, diagnostics = report.lid_theta(
                self.model,
                self.source,
                self.out,
                sigma=None if self.sigma == "auto" else self.sigma,
                methods=self.method,
                num_points=self.num_points,
                seed=self.seed,
                overwrite=self.overwrite,
                progress=progress,
            )
        rows = {f"median LID_theta, {name}": console.median(columns[name]) for name in self.method}
        rows |= {
            "points": len(columns["index"]),
            "median sigma": console.median(columns["sigma"], ".4g"),
        }
        rows |= {"diagnostics": console.diagnosis(diagnostics)}
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "file": self.out}
        console.print_table(f"{self.model} at {self.source}", rows)


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
        report = _library()
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
class Detect:
    """Score points of a data set, or samples of a model, by detectors of memorization.

    Writes one row for each point: its index, label if there is one, the nearest training point and
    the distance to it if the training data are known, a column score_NAME for each detector, larger
    = more memorized, and its standard error where it has one; of samples also d1/d2 to the nearest
    two training points without duplicates, Carlini's calibrated distance, and whether the sample is
    a copy by d1/d2 < 1/3.  Beside FILE.csv are written FILE.json, with evaluations of the network
    for one point and how well each detector finds the copies, and FILE.samples.npz.  Interrupted
    or killed, it continues when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it.
        data: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        out: The CSV file to write.
        detectors: One or more of flipd, denoised_spread, regeneration, cfg_norm, ...
            (`mmh_jax.memorization.DETECTORS`); by default those of the model that are usual, simple
            ones to compare with, and some for what `--label` and `--baseline` give.
        generate: Score so many samples of the model, instead of the points of the data.
        sigma: Noise level of all detectors, in data units; `auto` takes the median of the plateaus
            of 128 points of the data, for which it looks at no label.
        baseline: The folder of an earlier checkpoint or another model, for detectors *_baseline.
        trained_on: The training data; by default the data, for samples or if the model says so.
        label: Condition the model on the label of each point, a sample on that of a random one.
        num_points: Score so many points, chosen at random; by default all.
        seed: Of this choice, of samples, and of the noise that detectors draw.
        chunk_size: Points at once; fewer take less memory.
        overwrite: Replace the file, and those beside it.
    """

    model: Path
    data: str
    out: Path
    detectors: tuple[str, ...] = ()
    generate: int | None = None
    sigma: Literal["auto"] | float = "auto"
    baseline: Path | None = None
    trained_on: str | None = None
    label: bool = False
    num_points: int | None = None
    seed: int = 0
    chunk_size: int = 32
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Score, write the files, and print what was found."""
        report = _library()
        start = time.monotonic()
        sigma = None if self.sigma == "auto" else self.sigma
        settings = dataclasses.asdict(self) | {"sigma": sigma}
        by_label = settings.pop("label")
        with console.progress() as progress:
            _, summary = report.detect(
                **settings, by_label=by_label, command=command, progress=progress
            )
        found, rows = summary["detectors"], {"sigma": f"{summary['sigma']:.4g}"}
        rows |= {f"median, {name}": console.number(one["median"]) for name, one in found.items()}
        rows |= {"evaluations for a point": f"{summary['evaluations']:g}"}
        if "samples" in summary:
            rows |= {"copies": console.copied(summary["samples"])}
            for name, one in summary["detection"].items():
                rows[f"finds them, {name}"] = console.detection(one)
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "file": self.out}
        what = f"{summary['num_points']} {'points' if self.generate is None else 'samples'}"
        console.print_table(f"{self.model} and {self.data}, {what}", rows)


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
        report = _library()
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        argv: the arguments; by default those of the process, which an interrupt then ends here.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    commands = {"train": Train, "lid": Lid, "lid-data": LidData, "detect": Detect, "audit": Audit}
    if argv[:2] == ["lid", "data"]:  # a folder `data` is written `./data`
        argv = ["lid-data", *argv[2:]]
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="mmh-jax",
            description="Local intrinsic dimension and memorization in generative models.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run(shlex.join(["mmh-jax", *argv]))
    except SystemExit as end:  # from the parser: 0 after --help, 2 for a usage error
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        console.print_error("interrupted; run the same command again to continue")
        if is_process:
            # XLA's threads may still compute; Python's own way out would crash beneath them.
            sys.stdout.flush()
            os._exit(130)
        return 130
    except (
        ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError
    ) as error:  # fmt: skip
        if not _is_explained(error):
            raise
        console.print_error(f"[bold red]error:[/] {escape(_one_line(error))}")
        return 2
    return 0


def _library() -> Any:
    """`mmh_jax.report`, imported only once a command needs it."""
    # Before LAPACK is loaded: its threads fight with XLA's over batches of small matrices, and are
    # many times slower for it on busy cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mmh_jax import report

    # Orbax logs, with a traceback, the errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return report


def _is_explained(error: Exception) -> bool:
    """Whether the message is meant for the user: a fault of the system, or raised by this package.

    Among the faults of the system is memory that is full, which a device reports in its own way.

    A TypeError or ValueError that arose inside another package is a defect of this one: its
    traceback must be seen.
    """
    if isinstance(error, OSError | ImportError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        text = name + error.strerror + _CURES.get(error.errno or 0, "")
    if "RESOURCE_EXHAUSTED" in text or not text:  # of a device, or of Python itself
        text = f"out of memory: {text or 'nothing is left'}; take a smaller preset or fewer points"
    return " ".join(text.split())
