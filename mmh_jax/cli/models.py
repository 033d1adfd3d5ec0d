"""Commands on models: train one, measure its dimensions."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmh_jax import console
from mmh_jax.cli.common import PresetName, Source, library

__all__ = ["Lid", "Train"]

Method = Literal["expected", "tangential", "flipd", "projected", "thresholded", "rank"]


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
        report = library()
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
        report = library()
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
