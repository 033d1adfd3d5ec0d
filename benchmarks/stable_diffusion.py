"""Stable Diffusion: what its LID costs, and how fast its networks are.

flops  operations of the full sizes, counted on shapes alone
cost   evaluations, seconds and memory of each step for one image
speed  the U-Nets beside those of diffusers in PyTorch

    python benchmarks/stable_diffusion.py --preset cpu
    python benchmarks/stable_diffusion.py --preset accelerator --model stable-diffusion-v1-5

Without a folder `cost` is that of random weights, for which it is the same; presets smoke and cpu
time a tiny network.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from common import finish, header
from diffusion import cost, flops, speed

Part = Literal["flops", "cost", "speed"]


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    parts: tuple[Part, ...] = ("flops", "cost", "speed"),
    model: Path | None = None,
    out: Path = Path("results/stable_diffusion.json"),
) -> int:
    """Run, print, write.

    Args:
        preset: how much.
        parts: which.
        model: a published folder, for `cost`.
        out: the JSON file.
    """
    about, failures = header(), []
    content: dict[str, Any] = {}
    if "flops" in parts:
        content["flops"] = flops.run(preset, model)
    if "cost" in parts:
        content["cost"] = cost.run(preset, model)
    if "speed" in parts:
        content["speed"], failures = speed.run(preset, model)
    return finish(out, about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
