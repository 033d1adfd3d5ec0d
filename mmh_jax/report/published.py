r"""Detectors of memorization on a published pipeline: the Stable Diffusion experiment as a command.

    prompts -> latents   drawn with guidance, decoded to pictures; or pictures, encoded
            -> scores    `memorization.scores` at the latents, conditions the prompts' own
            -> curves    FLIPD with and without the prompt over noise levels
            -> FILE.csv, FILE.json, FILE.curves.npz, FILE.png, and drawn pictures in FILE.images/

One noise level serves all detectors: that of t = .01 of the training's times, where Ross et al.
(2025, 2411.00113) look at Stable Diffusion, if none is given.  LID is that of the latent model;
`flipd_per_bit` is it over the bits of the picture as PNG.  Where lines say what is memorized, how
well scores find it is said of the means over each prompt's generations.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import memorization, pretrained
from mmh_jax.report import asked as lists
from mmh_jax.report import output
from mmh_jax.report.asked import Asked
from mmh_jax.report.files import hash_of, read_json, replacing, write_csv, write_json
from mmh_jax.report.looked import OF_PICTURES, Found, Looked
from mmh_jax.report.stages import (
    Progress,
    Stages,
    check_count,
    check_matplotlib,
    check_seed,
    check_sigma,
)
from mmh_jax.report.summary import environment

__all__ = ["PublishedOptions", "detect_published", "hash_of_files", "is_published"]

WITHOUT_PROMPTS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_CURES = {
    "unconditional": "compares the model with and without a prompt, and there are none",
    "baseline": "compares the model with another one, which this command does not take",
    "data": "reads the training data, which this command does not take",
    "reference": "needs normal runs to compare with, which no command knows",
    "generations": "reads several generations of each condition at once",
}


@dataclasses.dataclass(frozen=True)
class PublishedOptions:
    """How a published pipeline is looked at.

    Attributes:
        prompts: a file of prompts, for each of which pictures are drawn.
        images: a folder or a file of pictures, looked at as they are.
        generate: pictures for each prompt; of a model without prompts, in all.
        guidance_scale: of the sampler; None for the conditional model itself.
        num_steps: of the sampler.
        probes: of FLIPD.
        curve_levels: noise levels of the curves; 0 for none.
        dtype: of the networks, "float32" or "bfloat16".
        skip_t5: of Stable Diffusion 3, as for `pretrained.load`.
    """

    prompts: Path | None = None
    images: Path | None = None
    generate: int = 1
    guidance_scale: float = 7.5
    num_steps: int = 50
    probes: int = 8
    curve_levels: int = 6
    dtype: str = "float32"
    skip_t5: bool = False

    def check(self) -> None:
        """Raise ValueError for what is out of range, missing, or there twice."""
        if self.prompts is not None and self.images is not None:
            raise ValueError("--prompts draws pictures and --images reads them; leave one out.")
        check_count("--generate", self.generate)
        check_count("--num-steps", self.num_steps)
        check_count("--probes", self.probes, least=2)
        check_count("--curve-levels", self.curve_levels, least=0)
        if self.curve_levels == 1:
            raise ValueError("--curve-levels is 1, which is no curve; take 0 or at least 2.")
        if not np.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance-scale is {self.guidance_scale}; it must be finite.")
        if self.curve_levels:
            check_matplotlib("`mmh-jax detect` with --curve-levels above 0")


def is_published(model: str | Path) -> bool:
    """Whether a folder is that of a published pipeline."""
    return (Path(model) / "model_index.json").is_file()


def detect_published(
    model: str | Path,
    out: str | Path,
    options: PublishedOptions,
    *,
    seed: int,
    detectors: tuple[str, ...] = (),
    sigma: float | None = None,
    chunk_size: int = 1,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score what a published pipeline draws for prompts, or pictures that are there.

    Finished pieces are kept in `<out>.work` until the files are written: a call that is killed
    continues there.

    Args:
        model: the folder of a pipeline that `pretrained.load` reads.
        out: the CSV file; what is written beside it begins with its name.
        options: what is asked for.
        seed: of the noise of samples and detectors.
        detectors: names of `memorization.DETECTORS`; by default a few that apply.
        sigma: the noise level of all detectors, in units of the latents.
        chunk_size: latents at once.
        overwrite: whether files may be replaced.
        command: kept in the summary.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        `(columns, summary)`: what was written.

    Cost: `summary["evaluations"]` of the U-Net for each picture, and those of its drawing.

    Raises:
        ValueError, OSError: for what cannot be used or written; before the model is read, but for
            what is wrong with the model itself.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.work")
    options.check()
    check_seed(seed)
    check_sigma(sigma)
    check_count("--chunk-size", chunk_size)
    _check_files(out, partial, overwrite=overwrite)
    rows = _rows(options)
    has_prompts = any(row.prompt is not None for row in rows)
    if has_prompts:
        _check_takes_prompts(Path(model))
    names = detectors or _defaults(options, has_prompts)
    _check_detectors(names, has_prompts)
    settings = {
        "model": str(model),
        "files": hash_of_files(Path(model)),
        "asked": hash_of(np.frombuffer(repr(rows).encode(), np.uint8)),
        "detectors": names,
        "sigma": sigma,
        "seed": seed,
    } | {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    output.check_writable(out.parent)
    stages = Stages(progress)
    with stages("loading"):
        pipeline = pretrained.load(model, dtype=options.dtype, skip_t5=options.skip_t5)
    # After what may be wrong with the model: no work is begun for it.
    work = output.claim(partial, output.DETECTION, settings, overwrite=overwrite)
    run = Looked(pipeline, rows, options, names, sigma, seed, chunk_size, work, stages)
    found = run.found()
    about = {"format": output.DETECTION.format, "command": command, "settings": settings}
    about |= {"environment": environment()} | found.summary | {"timings": stages.rounded()}
    _write(out, found)
    write_json(out.with_suffix(".json"), about)
    write_csv(out, {name: _printed(column) for name, column in found.columns.items()})
    shutil.rmtree(partial)
    return found.columns, about


def _write(out: Path, found: Found) -> None:
    """What lies beside the table: curves, their figure, drawn pictures."""
    if found.curves is not None:
        with replacing(out.with_suffix(".curves.npz")) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **found.curves)
        from mmh_jax import plotting  # here, because matplotlib is an extra

        with replacing(out.with_suffix(".png")) as partial:
            plotting.curves_figure(
                found.curves["sigmas"],
                {name: found.curves[name] for name in found.curves if name.startswith("flipd")},
                is_marked=found.curves.get("memorized"),
            ).savefig(partial, format="png")
    if found.pictures is not None:
        folder = out.with_suffix(".images")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(found.pictures, folder)


def _printed(column: Any) -> list[Any]:
    """A column for CSV: nothing where a value is not known."""
    return ["" if value is None else value for value in column]


def hash_of_files(model: Path) -> str:
    """Of names and sizes of its files; to read gigabytes would take as long as to begin again."""
    files = sorted(path for path in model.rglob("*") if path.is_file())
    text = repr([(str(path.relative_to(model)), path.stat().st_size) for path in files])
    return hash_of(np.frombuffer(text.encode(), np.uint8))


def _check_files(out: Path, partial: Path, *, overwrite: bool) -> None:
    """Of the files beside the table only those of an earlier call of this kind are replaced."""
    output.check_file(out, overwrite=overwrite)
    beside = [out.with_suffix(end) for end in (".json", ".curves.npz", ".png", ".images")]
    if out in beside:
        raise ValueError(f"--out {out} is the table; give it the suffix .csv.")
    is_ours = read_json(beside[0]).get("format") == output.DETECTION.format
    if output.is_begun(partial, output.DETECTION) or (is_ours and overwrite):
        return
    for path in beside:
        if path.exists():
            raise ValueError(
                f"{path}, to be written beside {out.name}, exists; choose another --out"
                + (", or pass --overwrite." if is_ours else ".")
            )


def _rows(options: PublishedOptions) -> list[Asked]:
    """One for each picture."""
    if options.images is not None:
        return lists.read_pictures(options.images)
    if options.prompts is None:
        return [Asked(None, None, None)] * options.generate
    return [row for row in lists.read_prompts(options.prompts) for _ in range(options.generate)]


def _defaults(options: PublishedOptions, has_prompts: bool) -> tuple[str, ...]:
    names = ("flipd", "residual", "score_norm", *OF_PICTURES)
    if not has_prompts:
        return names
    pair = ("flipd_unconditional", "flipd_difference", "cfg_norm", "cfg_norm_first", "sharpness")
    return names + pair + (("cfg_norm_encoded",) if options.images is not None else ())


def _check_detectors(names: tuple[str, ...], has_prompts: bool) -> None:
    there = memorization.DETECTORS
    if unknown := [name for name in names if name not in there]:
        raise ValueError(
            f"--detectors: unknown detector {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(there)}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"--detectors {' '.join(names)}: name none twice.")
    for name in names:
        for field in there[name].reads:
            if field in _CURES and not (field == "unconditional" and has_prompts):
                raise ValueError(f"--detectors: `{name}` {_CURES[field]}; leave it out.")
        if "inside" in there[name].quantities:
            raise ValueError(
                f"--detectors: `{name}` looks inside a UNet or DiT of this library; leave it out."
            )
    if not set(names) - set(OF_PICTURES):
        raise ValueError("--detectors: name at least one that asks the model.")


def _check_takes_prompts(model: Path) -> None:
    kind = read_json(model / "model_index.json").get("_class_name")
    if kind in WITHOUT_PROMPTS:
        raise ValueError(
            f"{model} is a {kind}, which takes no prompts; pass --images with a folder or lines "
            "without them, or --generate alone."
        )
