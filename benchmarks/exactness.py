"""FLIPD against closed forms, and one density seen through every schedule and parametrisation.

`lid.flipd` takes a denoiser and differentiates it; each distribution of `analytic` also has FLIPD
in closed form, without any Jacobian.  The first table shows the largest relative error over points
drawn from the distribution, and noisy ones, and over noise levels, in float64 and float32.  The
second wraps exact denoisers as networks that predict noise, score, x0, v or velocity on every
schedule, turns them back with `denoise.from_function`, and compares denoiser and FLIPD (float64).

    python benchmarks/exactness.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import finish, header, table

from mmh_jax import analytic, denoise, lid, noise

SIGMAS = (0.01, 0.1, 0.5, 2.0)
SCHEDULES = {
    "VP": noise.VP(),
    "sub-VP": noise.SubVP(),
    "cosine": noise.Cosine(),
    "VE": noise.VE(sigma_min=0.001, sigma_max=50.0),
    "EDM": noise.EDM(),
    "rectified flow": noise.RectifiedFlow(),
}
PREDICTIONS = {
    "eps": denoise.eps,
    "score": denoise.score,
    "x0": denoise.x0,
    "v": denoise.v,
    "velocity": denoise.velocity,
}


def gaussian(dim: int, ambient_dim: int, seed: int, mean: float = 0.0) -> Any:
    """A linear Gaussian with a random frame and random scales between .3 and 3."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(ambient_dim, dim)))[0]
    shift = mean * rng.normal(size=ambient_dim)
    scales = np.exp(rng.uniform(np.log(0.3), np.log(3), dim))
    return analytic.LinearGaussian(jnp.asarray(shift), jnp.asarray(frame), jnp.asarray(scales))


def distributions() -> dict[str, Any]:
    """The oracles, in the floating type of the moment."""
    parts = tuple(gaussian(d, 100, seed=d, mean=1.0) for d in (10, 30, 90))
    training_set = np.random.default_rng(0).normal(size=(500, 20))
    return {f"Gaussian {d} in 100": gaussian(d, 100, seed=d) for d in (2, 10, 90)} | {
        "mixture 10 + 30 + 90 in 100": analytic.Mixture(parts, jnp.ones(3) / 3),
        "sphere 10 in 11": analytic.Sphere(10, 1.0),
        "500 points in 20": analytic.Empirical(jnp.asarray(training_set)),
        "von Mises and atom in 2": analytic.von_mises_with_atom(kappa=2.0, atom_weight=0.2),
    }


@jax.jit
def _both(model: Any, points: Any, sigma: Any) -> tuple[Any, Any]:
    """FLIPD by differentiation and in closed form."""
    estimate = jax.vmap(lambda x: lid.flipd(model, x, sigma).value)(points)
    return estimate, jax.vmap(lambda x: model.flipd(x, sigma))(points)


def largest_error(model: Any, num: int) -> float:
    """The largest relative error over points of the distribution, a little off it, and sigma."""
    key = jax.random.key(1)
    worst = 0.0
    for sigma in SIGMAS:
        clean = model.sample(num, key=key)
        noisy = clean + sigma * jax.random.normal(key, clean.shape, clean.dtype)
        for points in (clean, noisy):
            estimate, exact = _both(model, points, sigma)
            # Relative to at least one: FLIPD of a data set is 0 at its own points.
            worst = max(worst, float(jnp.max(jnp.abs(estimate - exact) / jnp.maximum(exact, 1))))
    return worst


def view(model: Any, schedule: noise.Schedule, name: str) -> Any:
    """The same denoiser as a network that predicts `name` on `schedule`, turned back."""

    def network(x_t: Any, t: Any) -> Any:
        (alpha, s), (d_alpha, d_s) = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        clean = model(x_t / alpha, s / alpha)
        eps = (x_t - alpha * clean) / s
        outputs = {
            "eps": eps,
            "score": -eps / s,
            "x0": clean,
            "v": alpha * eps - s * clean,
            "velocity": d_alpha * clean + d_s * eps,
        }
        return outputs[name]

    return denoise.from_function(network, schedule, prediction=PREDICTIONS[name])


def view_error(model: Any, schedule: noise.Schedule, name: str) -> tuple[float, float]:
    """The largest relative error of the denoiser and of FLIPD of a view."""
    seen = view(model, schedule, name)
    points = model.sample(4, key=jax.random.key(2))
    sigmas = jnp.array([0.05, 0.5, 2.0])

    @jax.jit
    def errors(points: Any, sigmas: Any) -> tuple[Any, Any]:
        def at(x: Any, sigma: Any) -> tuple[Any, Any]:
            exact = model(x, sigma)
            difference = jnp.linalg.norm(seen(x, sigma) - exact) / jnp.linalg.norm(exact)
            return difference, jnp.abs(lid.flipd(seen, x, sigma).value / model.flipd(x, sigma) - 1)

        return jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))(points, sigmas)

    by_value, by_flipd = errors(points, sigmas)
    return float(by_value.max()), float(by_flipd.max())


def richardson_rows(sigma: float = 0.174) -> list[dict[str, Any]]:
    """Mean absolute error of FLIPD and of its extrapolation, over 16 points."""
    rows = []
    with jax.enable_x64(True):
        frame = np.linalg.qr(np.random.default_rng(3).normal(size=(1000, 900)))[0]
        wide = analytic.LinearGaussian(jnp.zeros(1000), jnp.asarray(frame), jnp.ones(900))
        cases = (
            ("sphere 10 in 11", analytic.Sphere(10, 1.0), 10, 2.0, 2, 0.02),
            # The first order averages out over a Gaussian; the second is what two levels multiply.
            ("Gaussian 900 in 1000", wide, 900, 2.0, 2, float("inf")),
            ("Gaussian 900 in 1000", wide, 900, 1.2, 3, 0.3),
        )
        for name, model, dim, ratio, num, at_most in cases:

            def both(x: Any, model: Any = model, ratio: float = ratio, num: int = num) -> Any:
                better = lid.richardson(model, x, sigma, ratio=ratio, num_levels=num)
                return model.flipd(x, sigma), better.value

            points = model.sample(16, key=jax.random.key(4))
            plain, better = (
                float(np.abs(np.asarray(v) - dim).mean()) for v in jax.jit(jax.vmap(both))(points)
            )
            row = {"set": name, "sigma": sigma, "ratio": ratio, "levels": num, "FLIPD": plain}
            rows.append(row | {"extrapolated": better, "at most": at_most})
    return rows


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    out: Path = Path("results/exactness.json"),
) -> int:
    about = header()
    num = 4 if preset == "smoke" else 50
    failures, rows = [], []
    with jax.enable_x64(True):
        double = {name: largest_error(model, num) for name, model in distributions().items()}
    single = {name: largest_error(model, num) for name, model in distributions().items()}
    for name in double:
        rows.append({"distribution": name, "float64": double[name], "float32": single[name]})
        if not double[name] <= 1e-6:
            failures.append(f"{name}: float64 error {double[name]:.1e} above 1e-6")
        if not single[name] <= 1e-3:
            failures.append(f"{name}: float32 error {single[name]:.1e} above 1e-3")
    table(f"largest relative error of FLIPD, sigma in {SIGMAS}", rows)

    views = []
    with jax.enable_x64(True):
        table_schedules = SCHEDULES | {"DDPM, 1000 steps": noise.ddpm_linear(1000)}
        models = distributions()
        chosen = ["Gaussian 10 in 100", "sphere 10 in 11", "mixture 10 + 30 + 90 in 100"]
        for model_name in chosen[:1] if preset == "smoke" else chosen:
            for schedule_name, schedule in table_schedules.items():
                for name in PREDICTIONS:
                    by_value, by_flipd = view_error(models[model_name], schedule, name)
                    views.append(
                        {
                            "distribution": model_name,
                            "schedule": schedule_name,
                            "network predicts": name,
                            "denoiser": by_value,
                            "FLIPD": by_flipd,
                        }
                    )
    worst = [
        {"schedule": name}
        | {
            p: max(
                v["FLIPD"] for v in views if v["schedule"] == name and v["network predicts"] == p
            )
            for p in PREDICTIONS
        }
        for name in table_schedules
    ]
    table("the same density through every view: largest relative error of FLIPD, float64", worst)
    if not max(v["denoiser"] for v in views) <= 1e-5:
        failures.append("a view's denoiser differs by more than 1e-5")
    if not max(v["FLIPD"] for v in views) <= 1e-5:
        failures.append("a view's FLIPD differs by more than 1e-5")
    extrapolated = richardson_rows()
    table("two scales remove the first order of the bias (exact denoisers, float64)", extrapolated)
    failures += [
        f"{row['set']}, {row['levels']} levels: extrapolation error {row['extrapolated']:.3f}"
        for row in extrapolated
        if not row["extrapolated"] <= row["at most"]
    ]
    for row in extrapolated:  # JSON knows no infinity
        row["at most"] = None if row["at most"] == float("inf") else row["at most"]
    content = {"errors": rows, "views": views, "richardson": extrapolated}
    return finish(out, about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
