"""The command that detects what a model has memorized."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from mmh_jax import console
from mmh_jax.cli.common import check_kind, library

__all__ = ["Detect"]

# Options of the one kind of model and of the other.
_OF_DATA = ("data", "baseline", "trained_on", "label", "num_points")
_OF_PUBLISHED = (
    *("prompts", "images", "guidance_scale", "num_steps", "probes", "curve_levels", "dtype"),
    "skip_t5",
)


@dataclasses.dataclass(frozen=True)
class Detect:
    """Score points of a data set, samples of a model, or prompts, by detectors of memorization.

    Of a model of `mmh-jax train`: writes one row for each point of `--data`: its index, label if
    there is one, the nearest training point and the distance to it if the training data are known,
    a column score_NAME for each detector, larger = more memorized, and its standard error where it
    has one; of samples also d1/d2 to the nearest two training points without duplicates, Carlini's
    calibrated distance, and whether the sample is a copy by d1/d2 < 1/3.  Beside FILE.csv are
    written FILE.json, with evaluations of the network for one point and how well each detector
    finds the copies, and FILE.samples.npz.

    Of a published pipeline, such as a folder of Stable Diffusion: writes one row for each picture
    drawn for the prompts of `--prompts`, or read by `--images`: scores of its latent, the prompt
    being its condition, and of FLIPD the score for each bit of the picture as PNG.  Beside it
    FILE.json, FILE.curves.npz and FILE.png, FLIPD over noise levels with the prompt and without,
    and drawn pictures in FILE.images.

    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it, or of a published pipeline, with
            model_index.json.
        out: The CSV file to write.
        data: Of a trained model: `digits`, a .npy or .npz file, an idx file, or a folder of images.
        prompts: Of a published pipeline: a file with a JSON object on each line, {"prompt": ...},
            with "memorized": true or false where that is known; of class-conditional pipelines a
            prompt is a class.
        images: Of a published pipeline: a folder of pictures, or a file as for --prompts with
            "image": FILE on each line; with prompts or without.
        detectors: One or more of flipd, denoised_spread, regeneration, cfg_norm, ...
            (`mmh_jax.memorization.DETECTORS`); by default those of the model that are usual, simple
            ones to compare with, and some for what `--label` and `--baseline` give.
        generate: Score so many samples of the model, instead of the points of the data; of a
            published pipeline so many for each prompt, by default 1, or without prompts in all.
        sigma: Noise level of all detectors, in data units; `auto` takes the median of the plateaus
            of 128 points of the data, for which it looks at no label; of a published pipeline that
            of a hundredth of the training's times.
        baseline: The folder of an earlier checkpoint or another model, for detectors *_baseline.
        trained_on: The training data; by default the data, for samples or if the model says so.
        label: Condition the model on the label of each point, a sample on that of a random one.
        num_points: Score so many points, chosen at random; by default all.
        guidance_scale: Of classifier-free guidance of drawn pictures; by default 7.5.
        num_steps: Of the sampler of drawn pictures; by default 50.
        probes: Of FLIPD of published pipelines; by default 8.
        curve_levels: Noise levels of the curves, 0 for none; by default 6.
        dtype: Of the networks of a published pipeline; by default float32.
        skip_t5: Of Stable Diffusion 3: do without its third text encoder, which is not read here.
        seed: Of this choice, of samples, and of the noise that detectors draw.
        chunk_size: Points at once, by default 32, of published pipelines 1; fewer take less memory.
        overwrite: Replace the file, and those beside it.
    """

    model: Path
    out: Path
    data: str | None = None
    prompts: Path | None = None
    images: Path | None = None
    detectors: tuple[str, ...] = ()
    generate: int | None = None
    sigma: Literal["auto"] | float = "auto"
    baseline: Path | None = None
    trained_on: str | None = None
    label: bool = False
    num_points: int | None = None
    guidance_scale: float | None = None
    num_steps: int | None = None
    probes: int | None = None
    curve_levels: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    skip_t5: bool = False
    seed: int = 0
    chunk_size: int | None = None
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Score, write the files, and print what was found."""
        report = library()
        start = time.monotonic()
        is_published = report.is_published(self.model)
        self._check(is_published)
        ask = self._ask_published if is_published else self._ask_trained
        with console.progress() as progress:
            _, summary = ask(report, command=command, progress=progress)
        rows = _rows(summary)
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "file": self.out}
        asked = self.prompts or self.images if is_published else self.data
        is_sampled = self.prompts or self.generate if is_published else self.generate
        what = f"{summary['num_points']} {'samples' if is_sampled else 'points'}"
        about = f"{self.model} and {asked}" if asked else f"{self.model}"
        console.print_table(f"{about}, {what}", rows)

    def _check(self, is_published: bool) -> None:
        """Raise ValueError for options of the other kind of model, or if there is nothing to do."""
        others = _OF_DATA if is_published else _OF_PUBLISHED
        check_kind(self, others, is_published=is_published)
        if is_published and not (self.prompts or self.images or self.generate is not None):
            raise ValueError(
                f"{self.model} is a published pipeline; pass --prompts FILE, --images FOLDER, or "
                "of a model without prompts --generate NUMBER."
            )
        if not is_published and self.data is None:
            raise ValueError(
                f"--data is missing, and {self.model} has no model_index.json, as a published "
                "pipeline would; pass --data."
            )

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "sigma": None if self.sigma == "auto" else self.sigma,
            "detectors": self.detectors, "seed": self.seed, "overwrite": self.overwrite,
        }  # fmt: skip

    def _ask_trained(self, report: Any, **how: Any) -> Any:
        return report.detect(
            self.model, self.data, self.out, generate=self.generate, baseline=self.baseline,
            trained_on=self.trained_on, by_label=self.label, num_points=self.num_points,
            chunk_size=32 if self.chunk_size is None else self.chunk_size, **self._shared, **how,
        )  # fmt: skip

    def _ask_published(self, report: Any, **how: Any) -> Any:
        names = [field.name for field in dataclasses.fields(report.PublishedOptions)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return report.detect_published(
            self.model, self.out, report.PublishedOptions(**given),
            chunk_size=1 if self.chunk_size is None else self.chunk_size, **self._shared, **how,
        )  # fmt: skip


def _rows(summary: dict[str, Any]) -> dict[str, Any]:
    """What the table says."""
    found, rows = summary["detectors"], {"sigma": f"{summary['sigma']:.4g}"}
    rows |= {f"median, {name}": console.number(one["median"]) for name, one in found.items()}
    rows |= {"evaluations for a point": f"{summary['evaluations']:g}"}
    if "samples" in summary:
        rows |= {"copies": console.copied(summary["samples"])}
    for name, one in (summary.get("detection") or {}).items():
        rows[f"finds them, {name}"] = console.detection(one)
    return rows
