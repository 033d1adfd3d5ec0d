r"""Mitigation on a published text-to-image pipeline: ways side by side, for each prompt.

    prompt -> noise            the same for all ways
           -> plain            drawn with guidance, as published
           -> tokens, random   other tokens in place of the blamed ones, or of any
           -> embedding, noise moved until a criterion is lower
           -> late, weaker     guidance that begins late, or a lower scale of it
           -> table.csv, summary.json, tradeoff.png, pictures/*.png

This is the experiment of Ross et al. (2025, 2411.00113) with the baselines of others beside it.  A
row has: the CFG norm of the condition at the first level, and FLIPD with it at what was drawn, at
t = .01 of the training's times, means over pictures; the radius in which pictures of the prompt lie
together, small where one picture is memorized; the cosine of the text encoding at the end of the
text to that of the prompt as it was, which is what it has lost of its meaning; distances, in tiles
as in the radius, to the plain pictures of the same noise and to the training picture; evaluations
of the network for one picture, those of what was found out before divided among all.  The first two
are of the condition: guidance that is late or weaker leaves the CFG norm as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import pretrained
from mmh_jax.report import asked as lists
from mmh_jax.report import output
from mmh_jax.report.asked import Asked
from mmh_jax.report.changed import PLAIN, Changes
from mmh_jax.report.files import hash_of, read_json, replacing, write_csv, write_json
from mmh_jax.report.prompt_plan import PromptPlan
from mmh_jax.report.published import WITHOUT_PROMPTS, hash_of_files
from mmh_jax.report.reworded import Words, check_tokenizers
from mmh_jax.report.stages import Progress, Stages, check_count, check_matplotlib, check_seed
from mmh_jax.report.summary import environment
from mmh_jax.report.trials import Trials

__all__ = ["mitigate_prompts"]

NUMBERS = ("cfg_norm", "flipd", "radius", "cosine", "to_plain", "to_image", "evaluations")


def mitigate_prompts(
    model: str | Path,
    out: str | Path,
    plan: PromptPlan,
    *,
    seed: int,
    chunk_size: int = 1,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try ways to keep a text-to-image pipeline from copying, on prompts, and write what is found.

    Args:
        model: the folder of a pipeline that `pretrained.load` reads.
        out: the folder to write; unfinished work of the same settings there is continued.
        plan: the prompts and the ways.
        seed: of noise, probes, and what is drawn in place of tokens.
        chunk_size: latents at once.
        overwrite: whether results in the folder may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        The content of `summary.json`: `rows`, means over prompts for each way and strength, and
        where lines say what is memorized, `memorized` and `others`, means over these.

    Cost: of each row its `evaluations` for each picture, and `4 + probes` to measure it.

    Raises:
        ValueError, OSError, ImportError: for what cannot be used or written; before the model is
            read, but for what is wrong with the model itself.
    """
    out, model = Path(out), Path(model)
    plan.check()
    check_seed(seed)
    check_count("--chunk-size", chunk_size)
    check_matplotlib("`mmh-jax mitigate`")
    if model.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the model {model} lies in the output {out}; choose another output.")
    output.check_output(out, output.PROMPTS, overwrite=overwrite)
    rows = _prompts(plan.prompts)
    _check_takes_prompts(model)
    chat = plan.chat()
    settings = {
        "model": str(model),
        "files": hash_of_files(model),
        "asked": hash_of(np.frombuffer(repr(rows).encode(errors="surrogatepass"), np.uint8)),
        "seed": seed,
    } | {name: str(v) if isinstance(v, Path) else v for name, v in vars(plan).items()}
    output.check_writable(out)
    stages = Stages(progress)
    with stages("loading"):
        pipeline = pretrained.load(model, dtype=plan.dtype, skip_t5=plan.skip_t5)
    if not isinstance(pipeline, pretrained.TextToImage):
        raise ValueError(f"{model} takes no prompts; pass the folder of a text-to-image pipeline.")
    _check_tokens(pipeline, rows, plan)
    work = output.claim(out, output.PROMPTS, settings, overwrite=overwrite)
    changes = Changes(pipeline, pipeline.denoiser(), plan, chat, seed, chunk_size, work)
    with stages("prompts") as report:
        found = list(Trials(changes, rows, plan.trials(), out).found(report))
    write_csv(out / "table.csv", _columns(found))
    about = {"format": output.PROMPTS.format, "command": command, "settings": settings}
    about |= {"environment": environment()} | _summary(found) | {"timings": stages.rounded()}
    _draw(out / "tradeoff.png", about)
    write_json(out / "summary.json", about)
    shutil.rmtree(work, ignore_errors=True)
    return about


def _prompts(path: Path) -> list[Asked]:
    rows = lists.read_prompts(path)
    for row in rows:
        if row.image is not None and not row.image.is_file():
            raise ValueError(f"--prompts {path} names {row.image}, which is not there.")
    return rows


def _check_takes_prompts(model: Path) -> None:
    kind = read_json(model / "model_index.json").get("_class_name")
    if kind in (*WITHOUT_PROMPTS, "DiTPipeline"):
        raise ValueError(
            f"{model} is a {kind}, which takes no prompts; pass the folder of a text-to-image "
            "pipeline, such as Stable Diffusion."
        )


def _check_tokens(pipeline: Any, rows: list[Asked], plan: PromptPlan) -> None:
    """Raise ValueError for prompts that have nothing to replace."""
    if not plan.rewords:
        return
    check_tokenizers(pipeline)
    for row in rows:
        if not Words(pipeline, row.prompt or "").allowed.any():
            raise ValueError(
                f"--prompts {plan.prompts}: the prompt {row.prompt!r} has no token to replace; "
                "leave it out, or the ways `tokens` and `random`."
            )


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """For CSV: nothing where a value is not known, and lists in one cell, in their order."""

    def cell(value: Any) -> Any:
        if isinstance(value, list):
            return " | ".join(map(text, value))
        return "" if value is None else value

    def text(value: Any) -> str:
        return f"{value:.7g}" if isinstance(value, float) else str(cell(value))

    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [cell(row.get(name)) for row in rows] for name in names}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if row["memorized"] is not None]
    groups = {"rows": rows}
    if known:
        groups["memorized"] = [row for row in known if row["memorized"]]
        groups["others"] = [row for row in known if not row["memorized"]]
    return {"num_prompts": sum(row["way"] == PLAIN.way for row in rows)} | {
        name: _means(some) for name, some in groups.items()
    }


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over prompts and rewrites, for each way and strength."""
    found = []
    for way, strength in dict.fromkeys((row["way"], row["strength"]) for row in rows):
        own = [row for row in rows if (row["way"], row["strength"]) == (way, strength)]
        mean: dict[str, Any] = {"way": way, "strength": strength, "num": len(own)}
        # Means are of what is finite: a way must not look good for what it breaks.
        mean["not_finite"] = sum(row["to_plain"] is None for row in own)
        for name in NUMBERS:
            cells = [row.get(name) for row in own]
            each = [value for cell in cells for value in (cell if type(cell) is list else [cell])]
            values = [float(value) for value in each if value is not None]
            mean[name] = float(np.mean(values)) if values else None
        found.append(mean)
    return found


def _draw(path: Path, about: dict[str, Any]) -> None:
    """Of the prompts that are known to be memorized, or of all."""
    from mmh_jax import plotting  # here, because matplotlib is an extra

    with replacing(path) as partial:
        plotting.tradeoff_figure(about.get("memorized") or about["rows"]).savefig(
            partial, format="png"
        )
