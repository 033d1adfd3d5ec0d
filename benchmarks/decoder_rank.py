"""The dimension of what decoders generate: a VAE and a GAN trained here, and a published DCGAN.

Trains both on images of 28 x 28 pixels, takes the singular values of the decoder's Jacobian at
latents of its own law, and prints how many are above thresholds, above the largest gap, and above
the noise (`lid.rank_at_noise`; a VAE has a noise level of its own).  Beside them: how good the
samples are, by features of the classifier that comes with the package, where there is one for the
data.  Of the DCGAN the answer is known: all 100 latent directions move the image, so that its LID
is 100 in 12,288 dimensions; it fails if another number comes out.

    python benchmarks/decoder_rank.py --images .../train-images-idx3-ubyte.gz --preset cpu
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import dcgan as published
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import console, finish, header, table
from flax import nnx
from ladder.pictures import enlarged

from mmh_jax import data, evaluation, lid, nn, plotting, train
from mmh_jax.mapping import over_points
from mmh_jax.report.files import replacing
from mmh_jax.typing import Key

CLASSIFIERS = {
    "fashion_mnist": evaluation.fashion_mnist_classifier,
    "mnist": evaluation.mnist_classifier,
}
THRESHOLDS = (0.1, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How long, and how large."""

    vae_steps: int
    gan_steps: int
    latent_size: int = 16
    channels: tuple[int, int, int] = (64, 32, 16)
    batch_size: int = 64
    num_latents: int = 64
    num_samples: int = 2_000
    max_points: int | None = None


PRESETS = {
    "smoke": Preset(20, 20, channels=(8, 8, 4), num_latents=4, num_samples=100, max_points=500),
    "cpu": Preset(1_500, 2_000, channels=(32, 32, 8)),
    "accelerator": Preset(50_000, 100_000, channels=(256, 128, 64), num_samples=10_000),
}

_sample = over_points(lambda decoder, z: decoder(z), (None, 0), chunk_size=128)
_spectra = over_points(lid.decoder_spectrum, (None, 0), chunk_size=8)


def trained_vae(images: np.ndarray, preset: Preset, key: Key) -> tuple[train.Vae, str]:
    """The VAE and what its training says."""
    init_key, train_key = jax.random.split(key)
    rngs = nnx.Rngs(init_key)
    decoder = nn.ConvDecoder(preset.latent_size, channels=preset.channels, rngs=rngs)
    model = train.vae(nn.ConvEncoder(preset.latent_size, rngs=rngs), decoder)
    config = train.VaeConfig(num_steps=preset.vae_steps, batch_size=preset.batch_size)
    for metrics in train.fit_vae(model, images, config, key=train_key):
        if metrics.step % 500 == 0:
            console.print(f"vae {metrics.step}: ELBO {metrics.elbo:.1f} nats", style="dim")
    model = metrics.state.ema
    return model, f"ELBO {metrics.elbo:.1f} nats, KL {metrics.divergence:.1f} nats"


def trained_gan(images: np.ndarray, preset: Preset, key: Key) -> tuple[train.Gan, str]:
    """The GAN and what its training says."""
    init_key, train_key = jax.random.split(key)
    rngs = nnx.Rngs(init_key)
    decoder = nn.ConvDecoder(preset.latent_size, channels=preset.channels, rngs=rngs)
    model = train.gan(decoder, nn.ConvDiscriminator(rngs=rngs), latent_size=preset.latent_size)
    config = train.GanConfig(num_steps=preset.gan_steps, batch_size=preset.batch_size)
    for metrics in train.fit_gan(model, images, config, key=train_key):
        if metrics.step % 500 == 0:
            console.print(
                f"gan {metrics.step}: margin {metrics.margin:.3f}, "
                f"|grad f|^2 {metrics.steepness:.3f}",
                style="dim",
            )
    return metrics.state.ema, f"margin {metrics.margin:.3f}"


def ranks(name: str, spectra: np.ndarray, own_noise: float | None = None) -> dict[str, Any]:
    """One row: means over latents; `own_noise` is the decoder's, if it has any."""
    values = jnp.asarray(spectra)
    relative = values / values[:, :1]
    gap = jax.vmap(lambda s: lid.rank_by_gap(s, floor=1e-4))(values)
    row: dict[str, Any] = {"decoder": name, "latent": spectra.shape[1]}
    row |= {"largest": float(spectra[:, 0].mean()), "smallest": float(spectra[:, -1].mean())}
    for threshold in THRESHOLDS:
        count = jax.vmap(lambda s, t=threshold: lid.rank_by_threshold(s, t))(relative)
        row[f"> {threshold:g}"] = float(count.mean())
    row["gap"] = float(gap.mean())
    for what, sigma in (("at .05", 0.05), ("at own noise", own_noise)):
        row[what] = None if sigma is None else float(lid.rank_at_noise(values, sigma).mean())
    return row


def judged(name: str, classifier: evaluation.Classifier, real: Any, samples: Any) -> dict[str, Any]:
    """One row: distances in features, and what the classifier says."""
    features = over_points(lambda c, x: (c.features(x), c.logits(x)), (None, 0), chunk_size=256)
    (fake, logits), (true, _) = features(classifier, samples), features(classifier, real)
    distance = evaluation.frechet_distance(fake, true)
    kernel = evaluation.kernel_distance(fake, true)
    shares = evaluation.prdc(fake, true)._asdict()
    sure = evaluation.certainty(logits)
    row = {"samples of": name, "Frechet": distance.value, "+-": distance.stderr}
    row |= {"kernel": kernel.value, "+- ": kernel.stderr}
    row |= {what: estimate.value for what, estimate in shares.items()}
    return row | {"confidence": sure.confidence.value, "marginal": sure.marginal_entropy}


def study_dcgan(path: Path | None, num_latents: int, key: Key) -> tuple[Any, Any] | None:
    """Spectra at latents, and images; None without a network."""
    with tempfile.TemporaryDirectory() as folder:
        found = path or published.download(Path(folder))
        if found is None:
            console.print(f"{published.PACKAGE} cannot be downloaded; pass --dcgan", style="yellow")
            return None
        model = published.load(found)
    latents = jax.random.normal(key, (num_latents, published.LATENT_SIZE))
    spectrum = jax.jit(lambda z: lid.decoder_spectrum(model, z, chunk_size=published.LATENT_SIZE))
    spectra = np.stack([np.asarray(spectrum(z)) for z in latents])
    return spectra, _sample(model, latents)


def save(figure: Any, path: Path) -> None:
    """As PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def pictures(path: Path | None, most: int | None) -> np.ndarray:
    """(N, 28, 28, 1); without a file scikit-learn's digits, each pixel as 3 x 3, with a margin."""
    if path is not None:
        return data.load(path, max_points=most).points[..., None]
    console.print("no --images: scikit-learn's digits, enlarged")
    return enlarged(data.load("digits", max_points=most).points)[..., None]


def main(
    images: Path | None = None,
    kind: Literal["fashion_mnist", "mnist", "other"] = "fashion_mnist",
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    dcgan: Path | None = None,
    seed: int = 0,
    out: Path = Path("results/decoder_rank.json"),
) -> int:
    about = header()
    chosen = PRESETS[preset]
    points = pictures(images, chosen.max_points)
    vae_key, gan_key, latent_key, dcgan_key = jax.random.split(jax.random.key(seed), 4)
    latents = jax.random.normal(latent_key, (chosen.num_samples, chosen.latent_size))
    half = min(chosen.num_samples, len(points) // 2)
    real, other = points[:half], points[half : 2 * half]
    classifier = CLASSIFIERS[kind]() if kind in CLASSIFIERS else None
    judgements, rows, notes, failures = [], [], {}, []
    if classifier is not None:
        judgements.append(judged("data", classifier, real, other))
    recipes: dict[str, Callable[..., tuple[Any, str]]] = {"vae": trained_vae, "gan": trained_gan}
    for (name, recipe), key in zip(recipes.items(), (vae_key, gan_key), strict=True):
        start = time.perf_counter()
        model, note = recipe(points, chosen, key)
        notes[name] = {"note": note, "seconds": time.perf_counter() - start}
        samples = _sample(model, latents)
        save(plotting.image_grid(samples[:64], title=name), out.with_name(f"{out.stem}_{name}.png"))
        spectra = _spectra(model, latents[: chosen.num_latents])
        own_noise = float(model.sigma) if isinstance(model, train.Vae) else None
        notes[name]["sigma"] = own_noise
        rows.append(ranks(name, spectra, own_noise))
        if classifier is not None:
            judgements.append(judged(name, classifier, real, samples))
        console.print(f"{name}: {note}, {notes[name]['seconds']:.0f} s")
    faces_of = study_dcgan(dcgan, max(chosen.num_latents // 8, 1), dcgan_key)
    if faces_of is not None:
        spectra, faces = faces_of
        rows.append(ranks("DCGAN, published", spectra))
        grid = plotting.image_grid((faces + 1) / 2, title="DCGAN")
        save(grid, out.with_name(f"{out.stem}_dcgan.png"))
        if rows[-1]["> 0.001"] != 100:
            failures.append(f"DCGAN has LID {rows[-1]['> 0.001']}, not 100")
    table("singular values of the decoder, means over latents; > t: relative to the largest", rows)
    if judgements:
        title = f"samples against {half:,} real images, in features of the {kind} classifier"
        table(title, judgements)
    content = {"preset": preset, "seed": seed, "training": notes, "ranks": rows}
    return finish(out, about, content | {"samples": judgements}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
