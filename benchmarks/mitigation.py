"""Mitigation: steering samples away from copies, and what it costs in quality and evaluations.

toy          circle and atom: who lands on the atom, and that the rest of the law stays
frontier     an overfitting model of digits: copies against quality for every method
textures     chaotic pictures by plain ascent of the dimension, and none with hinge and trust
conditional  prompts with a trigger: methods that change prompt, noise or guidance
speed        samplers beside diffusers' in PyTorch

    python benchmarks/mitigation.py --preset cpu --parts toy frontier --out mitigation

What is finished is kept in the folder `--out`: cut off, the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from common import finish, header
from steering import conditional, frontier, speed, textures, toy

Part = Literal["toy", "frontier", "textures", "conditional", "speed"]
PARTS = {
    "toy": toy, "frontier": frontier, "textures": textures, "conditional": conditional,
    "speed": speed,
}  # fmt: skip


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    parts: tuple[Part, ...] = ("toy", "frontier", "textures"),
    seeds: int = 3,
    images: tuple[str, ...] = ("digits",),
    out: Path = Path("mitigation"),
) -> int:
    """Run, print, draw, write.

    Args:
        preset: how much.
        parts: which.
        seeds: trainings of each model.
        images: what `data.load` reads.
        out: a folder for models, figures and the JSON file.
    """
    about, failures = header(), []
    content: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        content[part], failed = PARTS[part].run(preset, seeds, out, images)
        failures += [f"{part}: {failure}" for failure in failed]
    return finish(out / "mitigation.json", about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
