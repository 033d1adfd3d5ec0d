"""How wide a network must be: the dimension that is counted on a plane, against the width.

The Jacobian of a residual MLP of width w has rank w at most, and to denoise is to take the identity
away in D - d normal directions: at least D - w eigenvalues stay near 1 whatever is learned
(`train.Recipe.wide_enough`).  Here d = 10 in R^100.

    python benchmarks/network_width.py --preset cpu
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from common import finish, header, table

from mmh_jax import lid, mapping, train
from mmh_jax.data import manifolds

DIM, AMBIENT_DIM = 10, 100
WIDTHS = (16, 32, 64, 96, 100, 128, 256)


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    out: Path = Path("results/network_width.json"),
) -> int:
    about = header()
    steps, num = {"smoke": (100, 4), "cpu": (4_000, 32), "accelerator": (50_000, 256)}[preset]
    plane = manifolds.affine_mixture((DIM,), AMBIENT_DIM, key=jax.random.key(0)).standardized()
    points = np.asarray(plane.sample(20_000, key=jax.random.key(1)).points)
    spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None), chunk_size=num)
    rows, failures = [], []
    for width in WIDTHS[:2] if preset == "smoke" else WIDTHS:
        recipe = train.Recipe(
            width=width,
            num_steps=steps,
            ema_half_life=steps / 20,
            sigma_min=0.02,
            sigma_max=3.0,
            noise_levels=train.log_normal(-1.2, 1.2),
        )
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is measured here
            model = train.train_model(points, recipe, folder, seed=0)
        found = spectra(model, points[:num], np.float32(0.1 * model.scale))
        count = np.asarray(lid.rank_by_threshold(found.eigenvalues))
        least = max(AMBIENT_DIM - width, 0)
        rows.append(
            {"width": width, "D - width": least}
            | {"count, mean": float(count.mean()), "count, least": int(count.min())}
            | {"expected FLIPD": float(np.mean(found.expected_flipd))}
        )
        if count.min() < least:
            failures.append(f"width {width}: {count.min()} eigenvalues above one half, not {least}")
    table(f"{DIM} dimensions in R^{AMBIENT_DIM}, {steps} steps, sigma = .1 of the spread", rows)
    return finish(out, about, {"preset": preset, "rows": rows}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
