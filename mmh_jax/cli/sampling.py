"""The command that draws samples of a model, guided or not."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from mmh_jax import console
from mmh_jax.cli.common import library

__all__ = ["Sample"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw samples of a saved model, guided or not, and say which are copies.

    Writes samples.npz; samples.csv, one row for each sample: LID_theta of the model without
    guidance and label, and if the training data are known, as they are where the model names them
    or by `--data`, LID_* at the nearest training point, the verdict, that point, the distance to
    it, d1/d2, and whether the sample is a copy by d1/d2 < 1/3; grid.png, of pictures or points in
    the plane; and summary.json.  Whatever the guidance, the same seed starts from the same noise.
    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it.
        out: The folder for the samples.
        guidance: none, the model as it is; lid, away from dimensions that are below a quantile of
            those of the model's own samples that are no copies; reject, a finished sample that is
            below it, for what comes back from noise is one point, goes back to a higher noise level
            and comes down again, up to 8 times in all; cfg, classifier-free guidance of a model
            with labels.
        num: How many samples.
        data: The training data, if the model does not know where they are: `digits`, a .npy or
            .npz file, an idx file, or a folder of images.
        levels: Noise levels of the sampler.
        step: From one level to the next; heun takes two evaluations of the model, the others one;
            ancestral adds noise.
        scale: Of cfg, by default 1, which is the conditional model.
        begin: Of cfg: the noise level, in spreads of the data, from which on it acts, by default
            the first; before, there is no label, so that one which leads to a memorized picture
            cannot.
        label: The class of all samples; by default none, or with cfg random ones.
        baseline: Of lid and reject: the folder of a model of the same data that has not memorized,
            such as an earlier checkpoint.  The dimension is then relative to the one it has; it is
            seen at a noise level of 0.4 spreads of the data by reject, by lid of 0.5, or without a
            baseline of 0.3.
        quantile: Of lid and reject: the share of usual samples that are disturbed at each level, by
            default 0.2, or refused, by default 0.1.
        strength: Of lid, by default 10,000; with 0 it does nothing.
        trust: Of lid: the largest step, as a share of the denoising step, by default 1.
        low: Of lid: the least noise level at which it acts, in spreads of the data, by default 0.2;
            of reject: it decides at the last level that is not below, by default 0, the end.
        high: Of lid: the largest one, by default 1.
        back_to: Of reject: to which noise level refused samples go back, in spreads of the data, by
            default 2; from low ones something of the same kind comes again, from the first (inf)
            anything.
        probes: Of lid and reject: draws of noise for the dimension, by default 8 and 32.
        references: Of lid and reject: how many samples are drawn first, to see what is usual, by
            default 128.
        sigma: Noise level of LID_theta in data units; `auto` takes for each sample the one where it
            depends least on it, at 7 to 15 times the cost and that of 128 more points.
        num_neighbors: Nearest neighbours for LID_*, at least 4.
        seed: Of noise, labels and probes.
        overwrite: Replace samples in the folder.
    """

    model: Path
    out: Path
    guidance: Literal["none", "lid", "reject", "cfg"] = "none"
    num: int = 64
    data: str | None = None
    levels: int = 32
    step: Literal["heun", "ddim", "ancestral", "dpm2m"] = "heun"
    scale: float | None = None
    begin: float | None = None
    label: int | None = None
    baseline: Path | None = None
    quantile: float | None = None
    strength: float | None = None
    trust: float | None = None
    low: float | None = None
    high: float | None = None
    back_to: float | None = None
    probes: int | None = None
    references: int | None = None
    sigma: Literal["auto"] | float = "auto"
    num_neighbors: int = 20
    seed: int = 0
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Sample, write the files, and print what was found."""
        report = library()
        start = time.monotonic()
        settings = dataclasses.asdict(self)
        settings["sigma"] = None if self.sigma == "auto" else self.sigma
        names = [field.name for field in dataclasses.fields(report.SampleOptions)]
        options = report.SampleOptions(**{name: settings.pop(name) for name in names})
        with console.progress() as progress:
            summary = report.sample_model(
                **settings, options=options, command=command, progress=progress
            )
        rows = _rows(summary)
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "samples": self.out}
        title = f"{self.num} samples of {self.model}, guidance {self.guidance}"
        console.print_table(title, rows)


def _rows(summary: dict[str, Any]) -> dict[str, Any]:
    """What the table says."""
    rows: dict[str, Any] = {"median LID_theta": console.number(summary["lid_theta"]["0.5"])}
    if summary["data"] is None:
        rows |= {"copies": "not known: the model names no data that are there; pass --data"}
    else:
        rows |= {"median LID_*": console.number(summary["lid_star"]["0.5"])}
        rows |= {title: count for title, count in summary["verdicts"].items() if count}
        rows |= {"copies": console.copied(summary["samples"])}
    if summary["reference"] is not None:
        reference = summary["reference"]
        rows |= {"usual dimensions": f"of {reference['kept']} of {reference['num']} samples"}
        rows["usual dimensions"] += f" without guidance: those that are {reference['rule']}"
    if summary["selection"] is not None:
        selection = summary["selection"]
        rows |= {"accepted": f"{selection['accepted']:.1%}"}
        rows |= {"tries for a sample": f"{selection['mean_tries']:.3g}"}
    asked = summary["evaluations"]
    cost = f"{asked['guided']:g}"
    if asked["guided"] != asked["unguided"]:
        cost += f"; without guidance {asked['unguided']:g}"
    return rows | {
        "evaluations for a sample": cost,
        "median sigma": f"{summary['sigma']:.4g}",
        "diagnostics": console.diagnosis(summary["diagnostics"]),
    }
