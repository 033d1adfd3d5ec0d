"""The command that compares ways to keep a model from copying."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from mmh_jax import console
from mmh_jax.cli.common import library

__all__ = ["Mitigate"]


@dataclasses.dataclass(frozen=True)
class Mitigate:
    """Compare ways to keep a saved model from copying: what each removes, spoils and costs.

    All ways start from the same noise.  Without `--scale` they are LID guidance and rejection
    (`mmh-jax sample --guidance lid` or `reject`), at each quantile; with it, of a model that takes
    labels, classifier-free guidance that begins late, or is weaker.  Writes frontier.csv, one row
    for the model as it is, one for it without its copies, which nothing can beat, and one for each
    way: the share of copies by d1/d2 < 1/3 with its 95% interval, Frechet distance, precision and
    recall beside other samples of the model that are no copies, and evaluations of the network for
    one sample; frontier.png; the samples; and summary.json.  Interrupted or killed, it continues
    when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it.
        out: The folder for the results.
        num: Samples of each way.
        data: The training data, if the model does not know where they are.
        quantiles: The shares of usual samples that are disturbed, by default 0.1 0.2 0.3, or
            refused, by default 0.1 0.15 0.2.
        scale: Of classifier-free guidance.
        begins: With a scale: noise levels from which on it acts, in spreads of the data, by default
            4 2 1.
        scales: With a scale: lower ones to compare with.
        label: The class of all samples; by default none, or with a scale random ones.
        baseline: The folder of a model of the same data that has not memorized, such as an earlier
            checkpoint, for ways by dimension.
        levels: Noise levels of the sampler.
        step: From one level to the next.
        probes: Draws of noise for the dimension, by default 8 of LID guidance and 32 of rejection.
        references: How many samples are drawn to see which dimensions are usual, by default 256.
        seed: Of noise, labels and probes.
        overwrite: Replace results in the folder.
    """

    model: Path
    out: Path
    num: int = 256
    data: str | None = None
    quantiles: tuple[float, ...] | None = None
    scale: float | None = None
    begins: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    label: int | None = None
    baseline: Path | None = None
    levels: int = 32
    step: Literal["heun", "ddim", "ancestral", "dpm2m"] = "heun"
    probes: int | None = None
    references: int | None = None
    seed: int = 0
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Try all ways, write the files, and print a line for each."""
        report = library()
        start = time.monotonic()
        settings = dataclasses.asdict(self)
        names = [field.name for field in dataclasses.fields(report.MitigationPlan)]
        plan = report.MitigationPlan(**{name: settings.pop(name) for name in names})
        with console.progress() as progress:
            summary = report.mitigate_model(
                **settings, plan=plan, command=command, progress=progress
            )
        rows = {_name(row): _line(row) for row in summary["rows"]}
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "results": self.out}
        console.print_table(f"{self.model}: {self.num} samples of each way", rows)


def _name(row: dict[str, Any]) -> str:
    return row["way"] if row["strength"] is None else f"{row['way']}, {row['strength']:g}"


def _line(row: dict[str, Any]) -> str:
    text = f"{row['share']:.1%} copies ({row['share_low']:.1%} to {row['share_high']:.1%}), "
    text += f"Frechet {console.number(row['frechet'])}, recall {console.number(row['recall'])}, "
    return text + f"{row['evaluations']:.0f} evaluations"
