"""The command that compares ways to keep a model from copying."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from mmh_jax import console
from mmh_jax.cli.common import check_kind, library

__all__ = ["Mitigate"]

# Options of the one kind of model and of the other.
_OF_TRAINED = ("num", "data", "quantiles", "scale", "label", "baseline", "levels", "step",
               "references")  # fmt: skip
_OF_PROMPTS = ("prompts", "ways", "generate", "guidance_scale", "num_steps", "criterion",
               "num_tokens", "rewriter", "rewrites", "chat_url", "chat_model", "optimise_steps",
               "dtype", "skip_t5", "chunk_size")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mitigate:
    """Compare ways to keep a model from copying: what each removes, spoils and costs.

    Of a model of `mmh-jax train`: all ways start from the same noise.  Without `--scale` they are
    LID guidance and rejection (`mmh-jax sample --guidance lid` or `reject`), at each quantile; with
    it, of a model that takes labels, classifier-free guidance that begins late, or is weaker.
    Writes frontier.csv, one row for the model as it is, one for it without its copies, which
    nothing can beat, and one for each way: the share of copies by d1/d2 < 1/3 with its 95%
    interval, Frechet distance, precision and recall beside other samples of the model that are no
    copies, and evaluations of the network for one sample; frontier.png; the samples; and
    summary.json.

    Of a published pipeline that takes prompts, such as a folder of Stable Diffusion: of each prompt
    of `--prompts` pictures are drawn as published and by each of `--ways`, from the same noise.
    Writes table.csv, one row for each way, strength and prompt: the CFG norm at the first level,
    FLIPD, the radius in which the pictures of the prompt lie together, the cosine of its text
    encoding to that of the prompt, distances to the plain pictures and to the training picture, if
    the line of the prompt names it as "image", evaluations of the network, the changed prompt and
    the tokens that were blamed; tradeoff.png; the pictures; and summary.json, with means.

    Interrupted or killed, it continues when the same command is run again.

    Attributes:
        model: The folder of a model, as `mmh-jax train` writes it, or of a published pipeline, with
            model_index.json.
        out: The folder for the results.
        num: Samples of each way; by default 256.
        data: The training data, if the model does not know where they are.
        quantiles: The shares of usual samples that are disturbed, by default 0.1 0.2 0.3, or
            refused, by default 0.1 0.15 0.2.
        scale: Of classifier-free guidance.
        begins: With a scale: noise levels from which on it acts, in spreads of the data, by default
            4 2 1; of prompts: shares of the training's times, by default .8 .6.
        scales: With a scale: lower ones to compare with; of prompts by default 3 1.
        label: The class of all samples; by default none, or with a scale random ones.
        baseline: The folder of a model of the same data that has not memorized, such as an earlier
            checkpoint, for ways by dimension.
        levels: Noise levels of the sampler; by default 32.
        step: From one level to the next; by default heun.
        probes: Draws of noise for the dimension, by default 8 of LID guidance and 32 of rejection.
        references: How many samples are drawn to see which dimensions are usual; by default 256.
        prompts: Of a published pipeline: a file with a JSON object on each line, {"prompt": ...},
            with "memorized": true or false and "image": FILE where they are known.
        ways: Of prompts: tokens, the blamed ones replaced; random, any; embedding and noise, moved
            until the criterion is lower; late and weaker guidance.  By default all but noise.
        generate: Pictures of each prompt by each way; by default 4.
        guidance_scale: Of prompts, of the pictures; by default 7.5.
        num_steps: Of the sampler of the pictures; by default 50.
        criterion: What blames tokens and is lowered; by default cfg_norm.
        num_tokens: How many tokens are replaced; by default 1 2 4.
        rewriter: What replaces them: random words, mask for nothing, or chat for a language model,
            which rewrites the prompt; by default random.
        rewrites: How often a prompt is rewritten at each strength; by default 1.
        chat_url: Of --rewriter chat: such as http://localhost:8000/v1/chat/completions; its key is
            read from the environment variable MMH_JAX_CHAT_KEY.
        chat_model: The name of the language model there.
        optimise_steps: Of embedding and noise; by default 20.
        dtype: Of the networks of a published pipeline; by default float32.
        skip_t5: Of Stable Diffusion 3: do without its third text encoder.
        chunk_size: Pictures at once; by default 1.
        seed: Of noise, labels, probes and replaced tokens.
        overwrite: Replace results in the folder.
    """

    model: Path
    out: Path
    num: int | None = None
    data: str | None = None
    quantiles: tuple[float, ...] | None = None
    scale: float | None = None
    begins: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    label: int | None = None
    baseline: Path | None = None
    levels: int | None = None
    step: Literal["heun", "ddim", "ancestral", "dpm2m"] | None = None
    probes: int | None = None
    references: int | None = None
    prompts: Path | None = None
    ways: tuple[str, ...] | None = None
    generate: int | None = None
    guidance_scale: float | None = None
    num_steps: int | None = None
    criterion: Literal["cfg_norm", "sharpness", "score_norm", "flipd"] | None = None
    num_tokens: tuple[int, ...] | None = None
    rewriter: Literal["random", "mask", "chat"] | None = None
    rewrites: int | None = None
    chat_url: str | None = None
    chat_model: str | None = None
    optimise_steps: tuple[int, ...] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    skip_t5: bool = False
    chunk_size: int | None = None
    seed: int = 0
    overwrite: bool = False

    def run(self, command: str) -> None:
        """Try all ways, write the files, and print a line for each."""
        report = library()
        start = time.monotonic()
        is_published = report.is_published(self.model)
        self._check(is_published)
        ask = self._ask_published if is_published else self._ask_trained
        with console.progress() as progress:
            title, rows = ask(report, seed=self.seed, overwrite=self.overwrite, command=command,
                              progress=progress)  # fmt: skip
        rows |= {"seconds": f"{time.monotonic() - start:.0f}", "results": self.out}
        console.print_table(f"{self.model}: {title}", rows)

    def _check(self, is_published: bool) -> None:
        """Raise ValueError for options of the other kind of model, or without prompts."""
        others = _OF_TRAINED if is_published else _OF_PROMPTS
        check_kind(self, others, is_published=is_published)
        if is_published and self.prompts is None:
            raise ValueError(f"{self.model} is a published pipeline; pass --prompts FILE.")

    def _given(self, options: Any) -> dict[str, Any]:
        """What was said of the fields of a dataclass."""
        names = [field.name for field in dataclasses.fields(options)]
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def _ask_trained(self, report: Any, **how: Any) -> tuple[str, dict[str, Any]]:
        plan = report.MitigationPlan(**self._given(report.MitigationPlan))
        more = {name: getattr(self, name) for name in ("num", "data", "baseline")}
        more = {name: value for name, value in more.items() if value is not None}
        summary = report.mitigate_model(self.model, self.out, plan=plan, **more, **how)
        num = summary["settings"]["num"]
        return f"{num} samples of each way", {_name(r): _line(r) for r in summary["rows"]}

    def _ask_published(self, report: Any, **how: Any) -> tuple[str, dict[str, Any]]:
        plan = report.PromptPlan(**self._given(report.PromptPlan))
        if self.chunk_size is not None:
            how["chunk_size"] = self.chunk_size
        summary = report.mitigate_prompts(self.model, self.out, plan, **how)
        rows = {_name(row): _line_of_prompts(row) for row in summary["rows"]}
        return f"{summary['num_prompts']} prompts", rows


def _name(row: dict[str, Any]) -> str:
    return row["way"] if row["strength"] is None else f"{row['way']}, {row['strength']:g}"


def _line(row: dict[str, Any]) -> str:
    text = f"{row['share']:.1%} copies ({row['share_low']:.1%} to {row['share_high']:.1%}), "
    text += f"Frechet {console.number(row['frechet'])}, recall {console.number(row['recall'])}, "
    return text + f"{row['evaluations']:.0f} evaluations"


def _line_of_prompts(row: dict[str, Any]) -> str:
    names = {"CFG norm": "cfg_norm", "radius": "radius", "cosine": "cosine",
             "from the training picture": "to_image"}  # fmt: skip
    # Three digits: of flow matching the CFG norm at the first level is some 1e-6.
    parts = [f"{name} {row[key]:.3g}" for name, key in names.items() if row[key] is not None]
    return ", ".join(parts) + f", {row['evaluations']:.0f} evaluations"
