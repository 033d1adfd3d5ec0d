r"""Ways to keep a saved model from copying, side by side on the same noise: safety against quality.

    model -> plain samples           and others, of the next seed, to compare with
          -> usual dimensions        once for each way that steers by them
          -> samples of each way     at each strength, from the noise of the plain ones
          -> copies, quality, cost   frontier.csv, frontier.png, samples/*.npz, summary.json

Quality is the likeness to samples of the same model that are no copies: what is wanted is the model
without its memory, and data that were held out are seldom at hand.  Fréchet distance, precision
and recall are of the first principal components of that set, a quarter as many as it has samples,
at most 64.  Partial results are kept in `out/.work`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmh_jax import evaluation, memorization, train
from mmh_jax.data import sources
from mmh_jax.report import output, samples
from mmh_jax.report.drawing import Sampler, find_baseline, find_training
from mmh_jax.report.files import hash_of, replacing, write_csv, write_json
from mmh_jax.report.model import load_model
from mmh_jax.report.stages import Progress, Stages, check_count, check_matplotlib, check_seed
from mmh_jax.report.ways import MitigationPlan, Way

__all__ = ["mitigate_model"]

PLAIN, KNOWN = "plain", "copies left out"
MAX_COMPONENTS, NUM_NEIGHBORS, LEAST = 64, 5, 24


def mitigate_model(
    model: str | Path,
    out: str | Path,
    *,
    seed: int,
    plan: MitigationPlan | None = None,
    num: int = 256,
    data: str | Path | None = None,
    baseline: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try ways to keep a saved model from copying; say what each removes, spoils and costs.

    Args:
        model: the folder of the model.
        out: the folder to write; unfinished work of the same settings there is continued.
        seed: of noise, labels and probes.
        plan: the ways; by default by dimension.
        num: samples of each way, at least 24.
        data, baseline: as for `sample_model`.
        overwrite: whether results in the folder may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        The content of `summary.json`: `rows`, one for each way, with `evaluations` of the network
        for one sample, and `removed`, of the plain sampler's copies, None if it has none.

    Cost: `num` samples of each way, and twice of the model as it is.

    Raises:
        ValueError, OSError, ImportError: for what cannot be used or written; among it a model whose
            training data are not known, for then nothing can be called a copy.
    """
    out, plan = Path(out), plan or MitigationPlan()
    check_count("--num", num, least=LEAST)
    check_seed(seed)
    plan.check(baseline)
    check_matplotlib("`mmh-jax mitigate`")
    if Path(model).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the model {model} lies in the output {out}; choose another output.")
    output.check_output(out, output.MITIGATION, overwrite=overwrite)
    config, ways = train.load_config(model), plan.ways()
    for each in (plan.plain, *(way.options for way in ways)):
        each.check(config)
    denoiser, config = load_model(model, config.shape)
    other = find_baseline(baseline, config, ways[0].options)
    training = find_training(data, config)
    if training is None:
        raise ValueError(
            f"the training data of {model} are not known, or have changed, so that nothing can be "
            "called a copy; pass --data."
        )
    settings = {
        "model": hash_of(Path(model) / "params.safetensors"),
        "data": hash_of(training.points),
        "baseline": None if baseline is None else hash_of(Path(baseline) / "params.safetensors"),
        "num": num,
        "seed": seed,
    } | plan.settings()
    work = output.claim(out, output.MITIGATION, settings, overwrite=overwrite)
    plain = Sampler(denoiser, other, config, plan.plain, seed)
    run = _Run(plain, training, num, out, work, Stages(progress))
    rows = run.rows(ways)
    columns = {name: ["" if row[name] is None else row[name] for row in rows] for name in rows[0]}
    write_csv(out / "frontier.csv", columns)
    run.draw(rows)
    summary = {
        "format": output.MITIGATION.format, "command": command, "settings": settings,
        "data": training.name, "rows": rows, "seconds": run.stages.rounded(),
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    shutil.rmtree(work, ignore_errors=True)
    return summary


class _Run(NamedTuple):
    """One call, after all checks."""

    plain: Sampler
    training: sources.Source
    num: int
    out: Path
    work: Path
    stages: Stages

    def rows(self, ways: list[Way]) -> list[dict[str, Any]]:
        """A row for the plain sampler, one for it without its copies, and one for each way."""
        another = self.plain._replace(seed=(self.plain.seed + 1) % 2**32)
        with self.stages("to compare with") as report:
            others = another.draw(self.num, None, folder=self.work / "others", progress=report)
        found = self.judge(others.samples)
        measure = _quality(others.samples[found.is_finite & ~found.memorized])
        with self.stages(PLAIN) as report:
            drawn = self.plain.draw(self.num, None, folder=self.work / "plain", progress=report)
        judged = self.judge(drawn.samples)
        first = self.row(PLAIN, None, drawn, judged, self.plain, measure, copies=None)
        left = samples.Drawn(*(field[~judged.memorized] for field in drawn))
        rows = [first, self.row(KNOWN, None, left, self.judge(left.samples), self.plain, measure,
                                copies=first["share"])]  # fmt: skip
        self.keep(PLAIN, drawn, judged)
        for way in ways:
            sampler = self.plain._replace(options=way.options)
            target = None
            if way.options.has_target:
                with self.stages(f"usual, {way.name}") as report:
                    target, _ = sampler.target(
                        self.judge, folder=self.work / f"reference_{way.name}", progress=report
                    )
            with self.stages(f"{way.name} {way.strength:g}") as report:
                drawn = sampler.draw(
                    self.num, target, folder=self.work / way.folder, progress=report
                )
            judged = self.judge(drawn.samples)
            rows.append(self.row(way.name, way.strength, drawn, judged, sampler, measure,
                                 copies=first["share"]))  # fmt: skip
            self.keep(way.folder, drawn, judged)
        return rows

    def judge(self, drawn: np.ndarray) -> samples.Judged:
        """What the samples copy."""
        return samples.judge(drawn, self.training.points)

    def row(
        self, name: str, strength: float | None, drawn: samples.Drawn, judged: samples.Judged,
        sampler: Sampler, measure: Callable[[np.ndarray], dict[str, float | None]], *,
        copies: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """What became of a way."""
        finite, count = int(judged.is_finite.sum()), int(judged.memorized.sum())
        if not finite:
            raise FloatingPointError(f"no sample of {name} is finite; the model cannot be sampled.")
        low, high = memorization.rate_interval(count, finite)
        share = count / finite
        removed = 1 - share / copies if copies else None
        return {
            "way": name, "strength": strength, "samples": finite, "copies": count, "share": share,
            "share_low": float(low), "share_high": float(high), "removed": removed,
            **measure(drawn.samples[judged.is_finite]),
            "evaluations": sampler.evaluations(drawn)["guided"],
            "accepted": float(drawn.accepted.mean()),
        }  # fmt: skip

    def keep(self, name: str, drawn: samples.Drawn, judged: samples.Judged) -> None:
        """Write the samples."""
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        samples.write_samples(folder / f"{name}.npz", drawn.samples, judged)

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Write `frontier.png`."""
        from mmh_jax import plotting  # here, because matplotlib is an extra

        with replacing(self.out / "frontier.png") as partial:
            plotting.frontier_figure(rows).savefig(partial, format="png")


def _quality(usual: np.ndarray) -> Callable[[np.ndarray], dict[str, float | None]]:
    """Measures sets of samples beside `usual`, (N, *shape)."""
    flat = usual.reshape(len(usual), -1).astype(np.float64)
    if len(flat) < LEAST:
        raise ValueError(
            f"only {len(flat)} samples of the model are finite and no copies, too few to compare "
            "with; raise --num."
        )
    center = flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat - center, full_matrices=False)
    directions = directions[: max(1, min(MAX_COMPONENTS, len(flat) // 4))]
    reference = (flat - center) @ directions.T

    def measure(drawn: np.ndarray) -> dict[str, float | None]:
        if len(drawn) <= NUM_NEIGHBORS:
            return dict.fromkeys(("frechet", "frechet_stderr", "precision", "recall"))
        features = (drawn.reshape(len(drawn), -1) - center) @ directions.T
        distance = evaluation.frechet_distance(features, reference)
        near = evaluation.prdc(features, reference, num_neighbors=NUM_NEIGHBORS)
        found = {
            "frechet": distance.value, "frechet_stderr": distance.stderr,
            "precision": near.precision.value, "recall": near.recall.value,
        }  # fmt: skip
        return {name: float(v) if math.isfinite(v) else None for name, v in found.items()}

    return measure
