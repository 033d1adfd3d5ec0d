"""Sampler speed: seconds for a sample, beside the schedulers of diffusers on PyTorch.

A U-Net of diffusers with the options that make it most like `nn.UNet` (the same widths, blocks,
scale-and-shift by the noise level; its attention at the coarsest size is there in one block more on
our side), with random weights on both sides: time does not depend on them.  Each sampler takes the
same times of the same DDPM schedule, one evaluation each, from a given noise to the picture.  Both
are timed in turn, and the medians of the rounds are compared.  Of diffusers it is the loop of its
pipelines, without their pictures and progress bars, in `inference_mode`; neither is compiled by
hand: ours is what `jax.jit` makes of the whole loop, as `sample.sample` does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import compared, console, table
from flax import nnx

from mmh_jax import denoise, nn, noise, sample

SIDE, TIMES = 28, 1_000
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STEPS = {"DDIM": sample.ddim(), "DPM-Solver++(2M)": sample.dpm_solver_2m()}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: width and its multiples, steps of the sampler, samples at once, rounds."""

    width: int
    multipliers: tuple[int, ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int


SIZES = {
    "smoke": Sizes(8, (1, 2), (10,), (2,), 2),
    "cpu": Sizes(32, (1, 2, 2), (10, 20), (1, 16), 7),
    "accelerator": Sizes(128, (1, 2, 2), (20,), (1, 16, 256), 9),
}


def ours(width: int, multipliers: tuple[int, ...]) -> denoise.NetworkDenoiser:
    """Our network on the schedule."""
    network = nn.UNet((SIDE, SIDE, 1), width=width, multipliers=multipliers, rngs=nnx.Rngs(0))
    return denoise.from_nnx(network, noise.ddpm_linear(TIMES), shape=(SIDE, SIDE, 1))


def our_sampler(
    model: denoise.NetworkDenoiser, name: str, times: np.ndarray, batch: int
) -> Callable[[], Any]:
    """Pictures from noise at these times, in one program."""
    sigmas = model.schedule.sigma(jnp.asarray(times, jnp.float32))
    x = sigmas[0] * jax.random.normal(jax.random.key(0), (batch, *(model.shape or ())))

    @jax.jit
    def run(model: Any, x: Any, sigmas: Any) -> Any:
        return jax.vmap(lambda x: sample.solve(model, x, sigmas, step=STEPS[name]))(x)

    return lambda: run(model, x, sigmas)


def theirs(width: int, multipliers: tuple[int, ...]) -> Any:
    """A network of diffusers of the same size, on the same device."""
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    finer = len(multipliers) - 1
    return UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=tuple(width * factor for factor in multipliers),
        down_block_types=(*["DownBlock2D"] * finer, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * finer),
        attention_head_dim=width * multipliers[-1], norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    ).eval().to(device)  # fmt: skip


def scheduler(name: str, steps: int) -> Any:
    """Of diffusers, both from the last time down."""
    import diffusers

    made = {
        "DDIM": lambda: diffusers.DDIMScheduler(
            num_train_timesteps=TIMES, **BETAS, clip_sample=False, timestep_spacing="trailing"
        ),
        "DPM-Solver++(2M)": lambda: diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=TIMES, **BETAS, timestep_spacing="trailing",
            final_sigmas_type="zero", lower_order_final=False, euler_at_final=True,
        ),
    }[name]()  # fmt: skip
    made.set_timesteps(steps)
    return made


def their_sampler(network: Any, name: str, steps: int, batch: int) -> Callable[[], Any]:
    """The loop of a pipeline."""
    import torch

    device = network.device
    start = torch.randn(batch, 1, SIDE, SIDE, device=device)

    def run() -> Any:
        made = scheduler(name, steps)
        with torch.inference_mode():
            x = start
            for time_ in made.timesteps:
                x = made.step(network(x, time_).sample, time_, x).prev_sample
        if device.type == "cuda":
            torch.cuda.synchronize()
        return x.numpy(force=True)

    return run


def run(
    preset: str, seeds: int, out: Path, images: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Time each sampler; nothing is drawn by a seed, read from images or kept."""
    del seeds, out, images
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        console.print("speed: torch or diffusers is not there: skipped")
        return {}, []
    sizes = SIZES[preset]
    network = theirs(sizes.width, sizes.multipliers)
    model = ours(sizes.width, sizes.multipliers)
    parameters = {
        "ours": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "theirs": sum(leaf.numel() for leaf in network.parameters()),
    }
    rows = []
    for steps in sizes.steps:
        for name in STEPS:
            times = scheduler(name, steps).timesteps.numpy()
            for batch in sizes.batches:
                found = compared(
                    our_sampler(model, name, times, batch),
                    their_sampler(network, name, steps, batch), sizes.rounds,
                )  # fmt: skip
                rows.append({
                    "sampler": name, "batch": batch, "evaluations": len(times),
                    "s / sample, ours": found["ours"] / batch,
                    "s / sample, diffusers": found["theirs"] / batch,
                    "diffusers / ours": found["ratio"],
                })  # fmt: skip
    table(
        f"Seconds a sample of {SIDE} x {SIDE}: ours of {parameters['ours']:,} parameters on "
        f"{jax.default_backend()}, diffusers of {parameters['theirs']:,} on {network.device}",
        rows,
    )
    failures = [
        f"{row['sampler']}, batch {row['batch']}, {row['evaluations']} evaluations: "
        f"{1 / row['diffusers / ours']:.2f} times the seconds of diffusers"
        for row in rows if row["diffusers / ours"] < 1
    ]  # fmt: skip
    return {"parameters": parameters, "rows": rows}, [] if preset == "smoke" else failures
