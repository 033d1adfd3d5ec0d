"""Tier C4, a GAN: which of its pictures have the lowest dimension, the memorized or the simplest?

A GAN is trained on pictures some of which are there many times.  Of samples: the decoder's LID
(`lid.rank_at_noise` of the singular values of its Jacobian), whether they are copies of a training
picture (d1 / d2 < 1/3, duplicates counted as one), whether a planted one is the nearest, how far
that is, and how simple they are (bytes as PNG, variance of the pixels).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import console, table
from flax import nnx
from scipy.stats import spearmanr

from ladder.pictures import draw_beside, pictures
from ladder.trained import detected, kept, spoken
from mmh_jax import lid, mapping, nn, train
from mmh_jax import memorization as mem
from mmh_jax.data import planting
from mmh_jax.typing import Array

# Of observation noise, pixels being between 0 and 1; as in `decoder_rank.py`.
SIGMA = 0.05
LATENT_SIZE, LOWEST = 16, 0.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: pictures, those planted and how often, the GAN, samples measured."""

    num_points: int
    num_planted: int
    copies: int
    channels: tuple[int, int, int]
    num_steps: int
    num_samples: int


SIZES = {
    "smoke": Sizes(64, 2, 8, (8, 8, 4), 20, 24),
    "cpu": Sizes(1_000, 5, 100, (32, 32, 8), 3_000, 1_000),
    "accelerator": Sizes(5_000, 20, 200, (128, 64, 32), 50_000, 5_000),
}


def _look(decoder: Any, z: Array) -> tuple[Array, Array]:
    """A sample, and its dimension."""
    return decoder(z), lid.rank_at_noise(lid.decoder_spectrum(decoder, z), SIGMA)


_looked = mapping.over_points(_look, (None, 0), chunk_size=16)


def measured(source: str, seed: int, sizes: Sizes, path: Path) -> dict[str, Any]:
    """Train, draw, measure; the samples of the lowest dimension are drawn into a figure."""
    points = pictures(source, 28)[0]
    order = np.random.default_rng(seed).permutation(len(points))[: sizes.num_points]
    plant_key, init_key, fit_key, draw_key = jax.random.split(jax.random.key(seed), 4)
    data = planting.plant_duplicates(
        points[order], copies=sizes.copies, num_planted=sizes.num_planted, key=plant_key
    )
    rngs = nnx.Rngs(init_key)
    decoder = nn.ConvDecoder(LATENT_SIZE, channels=sizes.channels, rngs=rngs)
    model = train.gan(decoder, nn.ConvDiscriminator(rngs=rngs), latent_size=LATENT_SIZE)
    config = train.GanConfig(num_steps=sizes.num_steps)
    for metrics in train.fit_gan(model, data.points[..., None], config, key=fit_key):
        state = metrics.state
    latents = jax.random.normal(draw_key, (sizes.num_samples, LATENT_SIZE))
    samples, dims = _looked(state.ema, latents)
    samples = samples[..., 0]
    copied = mem.copies(samples, data.points)
    is_planted = np.isin(data.origin[copied.nearest], data.rows)
    rows = np.argsort(dims)[:24]
    labels = [f"{dims[row]:.1f}, {copied.ratio[row]:.2f}" for row in rows]
    nearest = data.points[copied.nearest[rows]]
    draw_beside(samples[rows], nearest, labels, "lowest decoder LID, with d1 / d2", path)
    simple = {"png_bytes": mem.png_bytes(samples), "pixel_variance": samples.var(axis=(1, 2))}
    sides = {"distance": copied.distance, **simple}
    lowest = np.argsort(dims)[: max(1, round(LOWEST * len(dims)))]
    found: dict[str, Any] = {
        "seed": seed, "LID, 5%": float(np.quantile(dims, 0.05)), "LID": float(np.median(dims)),
        "LID, 95%": float(np.quantile(dims, 0.95)), "copies": int(copied.memorized.sum()),
        "copies among the lowest": int(copied.memorized[lowest].sum()),
        "nearest is planted": float(is_planted.mean()),
        "and among the lowest": float(is_planted[lowest].mean()),
    }  # fmt: skip
    found |= {f"rank correlation, {n}": float(spearmanr(dims, s)[0]) for n, s in sides.items()}
    for name, labels in {"copies": copied.memorized, "planted": is_planted}.items():
        known = 0 < labels.sum() < len(labels)
        found[f"AUROC, {name}"] = detected(-dims, labels).auroc.value if known else None
        for other, values in simple.items():
            key = f"AUROC of {other}, {name}"
            found[key] = detected(-values, labels).auroc.value if known else None
    return found


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Each source of images, several seeds; a question, so that there is no bar."""
    sizes, content = SIZES[preset], {}
    for source in images:
        name, found = Path(source).name, []
        for seed in range(1 if preset == "smoke" else seeds):
            path = out / f"gan_{name}_{sizes.num_points}_{sizes.num_steps}_{seed}.json"
            make = functools.partial(measured, source, seed, sizes, path)
            found.append(kept(path, make))
            console.print(f"C4: {name}, seed {seed} is done", style="dim")
        rows = []
        for key in found[0]:
            values = [each[key] for each in found if each[key] is not None]
            if key != "seed":
                rows.append({"measured": key, "value": spoken(values) if values else "-"})
        about = f"{sizes.num_planted} of {sizes.num_points} pictures {sizes.copies} times"
        table(f"C4, {name}: samples of a GAN that saw {about}", rows)
        content[name] = found
    return content, []
