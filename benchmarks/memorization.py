"""Memorization on the ladder of evaluation: where the truth is known, and where it is measured.

A  no training: exact models that have memorized to a known degree, circle and atom.
B  the von Mises toy, trained: a point memorized by overfitting and one by the data; ten seeds of
   its own, whatever `--seeds` says.
C1 pictures, unconditional, against measured copying: training pictures, some there many times.
C2 the same: samples of an overfitting model, without any duplicate.
C3 as C2, at three sizes of the model by three of the data.
C4 a GAN: whether its samples of the lowest dimension are memorized or simple.
C5 verdicts: overfitted singles told from duplicates and shapes, for each source of LID_*.
D  conditional models: one class, or one token of a prompt, tied to one image.
E  template memory: a part of the picture copied, and where a map of the pixels finds it.

    python benchmarks/memorization.py --preset cpu --tiers A --out memorization

A training that is finished is kept in the folder `--out`: cut off, the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from common import finish, header
from ladder import (
    conditional,
    decoder,
    duplicates,
    exact,
    samples,
    scale,
    templates,
    toy,
    verdicts,
)

Tier = Literal["A", "B", "C1", "C2", "C3", "C4", "C5", "D", "E"]
TIERS = {
    "A": exact, "B": toy, "C1": duplicates, "C2": samples, "C3": scale, "C4": decoder,
    "C5": verdicts, "D": conditional, "E": templates,
}  # fmt: skip


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    tiers: tuple[Tier, ...] = ("A",),
    seeds: int = 3,
    images: tuple[str, ...] = ("digits",),
    out: Path = Path("memorization"),
) -> int:
    """Run, print, draw, write.

    Args:
        preset: how much.
        tiers: of the ladder.
        seeds: trainings of each model, but in tier B.
        images: what `data.load` reads, for the tiers that train on images.
        out: a folder for models, figures and the JSON file.
    """
    about, failures = header(), []
    content: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for tier in tiers:
        content[tier], failed = TIERS[tier].run(preset, seeds, out, images)
        failures += [f"{tier}: {failure}" for failure in failed]
    return finish(out / "memorization.json", about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
