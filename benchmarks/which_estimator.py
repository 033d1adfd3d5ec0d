"""Every estimator that looks at a model, on one: the measured column of docs/which_estimator.md.

The model is exact, a Gaussian of 10 dimensions in R^100 (scales .5 to 2), so that what is left is
the estimator's own error: bias from sigma = .1, and noise from its probes.  Mean and standard
deviation over keys, at one point; the truth is 10.  `lid_accuracy.py` is the same for networks.

    python benchmarks/which_estimator.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import finish, header, table

from mmh_jax import analytic, lid, linalg
from mmh_jax.typing import Key

DIM, AMBIENT, SIGMA = 10, 100, 0.1


def estimators() -> dict[str, tuple[str, Callable[[Any, Any, Key], Any]]]:
    """By name: what it evaluates, and a function of model, point and key."""

    def traced(trace: linalg.Trace) -> Callable[[Any, Any, Key], Any]:
        return lambda model, x, key: lid.flipd(model, x, SIGMA, trace=trace, key=key).value

    def read(rule: Callable[[Any], Any]) -> Callable[[Any, Any, Key], Any]:
        return lambda model, x, key: rule(lid.jacobian_spectrum(model, x, SIGMA).eigenvalues)

    def bundle(model: Any, x: Any, key: Key) -> Any:
        values = lid.normal_bundle_spectrum(model, x, SIGMA, key=key)
        return AMBIENT - lid.rank_by_threshold(values)

    def curve(model: Any, x: Any, key: Key) -> Any:
        return lid.lidl(lid.flipd_curve(model, x, jnp.geomspace(SIGMA, 4 * SIGMA, 8))).value

    def loss(ratio: float | None) -> Callable[[Any, Any, Key], Any]:
        return lambda model, x, key: (
            lid.denoising_loss(model, x, SIGMA, key=key, num_samples=50, ratio=ratio).value
        )

    def soft(model: Any, x: Any, key: Key) -> Any:
        return lid.soft_rank_lanczos(model, x, SIGMA, key=key, num_probes=8, order=6).value

    return {
        "FLIPD, exact()": ("100 JVPs", traced(linalg.exact())),
        "FLIPD, rademacher(50)": ("50 JVPs", traced(linalg.rademacher(50))),
        "FLIPD, xtrace(50)": ("50 JVPs", traced(linalg.xtrace(50))),
        "FLIPD, hutchpp(50)": ("50 JVPs", traced(linalg.hutchpp(50))),
        "FLIPD, positive_exact()": ("100 JVPs, eigh", traced(linalg.positive_exact())),
        "FLIPD, positive_lanczos(8, 6)": (
            "48 JVPs, 48 VJPs",
            traced(linalg.positive_lanczos(8, 6)),
        ),
        "Richardson, exact()": (
            "200 JVPs",
            lambda model, x, key: lid.richardson(model, x, SIGMA).value,
        ),
        "LIDL, .1 to .4": ("800 JVPs", curve),
        "tangential FLIPD": (
            "100 JVPs, eigh",
            lambda model, x, key: lid.jacobian_spectrum(model, x, SIGMA).tangential_flipd,
        ),
        "expected FLIPD": (
            "100 JVPs, eigh",
            lambda model, x, key: lid.jacobian_spectrum(model, x, SIGMA).expected_flipd,
        ),
        "eigenvalues above 1/2": ("100 JVPs, eigh", read(lid.rank_by_threshold)),
        "largest gap": ("100 JVPs, eigh", read(lambda v: lid.rank_by_gap(v, ceiling=1.0))),
        "participation ratio": ("100 JVPs, eigh", read(lid.participation_ratio)),
        "soft count": ("100 JVPs, eigh", read(lid.soft_rank)),
        "soft count, Lanczos(8, 6)": ("48 JVPs, 48 VJPs", soft),
        "normal bundle": ("400 evaluations, SVD", bundle),
        "denoising loss, plain": ("50 evaluations", loss(None)),
        "denoising loss, two levels": ("100 evaluations", loss(2.0)),
    }


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    out: Path = Path("results/which_estimator.json"),
) -> int:
    about = header()
    num_keys = {"smoke": 4, "cpu": 200}.get(preset, 2_000)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(AMBIENT, DIM)))[0]
    model = analytic.LinearGaussian(
        jnp.zeros(AMBIENT), jnp.asarray(basis, jnp.float32), jnp.linspace(0.5, 2, DIM)
    )
    x = model.sample(1, key=jax.random.key(1))[0]
    keys = jax.random.split(jax.random.key(2), num_keys)
    rows = []
    for name, (cost, estimate) in estimators().items():
        run = jax.jit(lambda keys, e=estimate: jax.lax.map(lambda key: e(model, x, key), keys))
        values = np.asarray(run(keys), float)
        spread = float(values.std())
        rows.append({"estimator": name, "cost": cost, "mean": float(values.mean()), "sd": spread})
    table(f"10 dimensions in R^100, sigma {SIGMA}, {num_keys} keys", rows)
    failures = [
        f"{row['estimator']}: {row['mean']:.2f}"
        for row in rows
        if abs(row["mean"] - DIM) > 1 + 4 * row["sd"] / np.sqrt(num_keys)
    ]
    return finish(out, about, {"preset": preset, "rows": rows}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
