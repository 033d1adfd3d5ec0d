"""The sets of `lid_accuracy`: how to draw them, the recipe, the exact denoiser if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmh_jax import analytic, train
from mmh_jax.data import curved, embedded, manifolds, warped

FRAME_KEY, TRAIN_KEY, TEST_KEY = (jax.random.key(i) for i in range(3))
LAWS = {"uniform": manifolds.uniform, "Gaussian": manifolds.gaussian, "Laplace": manifolds.laplace}


@dataclasses.dataclass(frozen=True)
class Case:
    """A set of known dimension.

    Attributes:
        name: as in the literature.
        ambient_dim: D.
        draw: `draw(num, key)`, labelled points.
        recipe: a key of `RECIPES`.
        exact: makes the exact denoiser in the units of the points, or None.
        largest_mae: what a trained model must reach at the plateau: by projected and expected
            FLIPD, and by the count of eigenvalues.
    """

    name: str
    ambient_dim: int
    draw: Callable[[int, Any], manifolds.Labelled]
    recipe: str
    exact: Callable[[], Any] | None = None
    largest_mae: tuple[float, float] | None = None


def _affine(
    law: str, dims: tuple[int, ...], ambient_dim: int, largest_mae: tuple[float, float] | None
) -> Case:
    mixture = manifolds.affine_mixture(
        dims, ambient_dim, key=FRAME_KEY, latent=LAWS[law]
    ).standardized()

    def exact() -> Any:
        pieces = []
        for mode, matrix in zip(mixture.modes, mixture.maps, strict=True):
            basis, scales, _ = jnp.linalg.svd(matrix, full_matrices=False)
            pieces.append(analytic.LinearGaussian(mode, basis, scales))
        return analytic.Mixture(tuple(pieces), jnp.full(len(pieces), 1 / len(pieces)))

    name = f"{law} {'+'.join(map(str, dims))} in {ambient_dim}"
    recipe = "low" if ambient_dim <= 10 else "middle" if ambient_dim <= 100 else "high"
    if largest_mae is not None and recipe == "middle":
        recipe = "judged"
    return Case(
        name,
        ambient_dim,
        lambda num, key: mixture.sample(num, key=key),
        recipe,
        exact if law == "Gaussian" else None,
        largest_mae,
    )


AFFINE = [
    ((5,), 10),
    ((2, 4, 8), 10),
    ((10,), 100),
    ((30,), 100),
    ((80,), 100),
    ((90,), 100),
    ((10, 25, 50), 100),
    ((10, 30, 90), 100),
    ((200,), 800),
    ((400,), 800),
    ((10, 80, 200), 800),
    ((100,), 1000),
    ((500,), 1000),
    ((900,), 1000),
]
TARGETS = {
    ("Laplace", (5,)): (0.15, 0.02),
    ("Gaussian", (90,)): (0.5, 0.02),
    ("uniform", (10, 30, 90)): (0.4, 0.02),
}


def _shape(
    name: str,
    draw: Callable[..., manifolds.Labelled],
    ambient_dim: int,
    scale: float = 1.0,
    exact: Callable[[], Any] | None = None,
    largest_mae: tuple[float, float] | None = None,
) -> Case:
    """A set in units of `scale`; in large dimension with the recipe for it."""

    def scaled(num: int, key: Any) -> manifolds.Labelled:
        return curved.rescale(draw(num, key=key), shift=0.0, scale=scale)

    recipe = "low" if ambient_dim <= 10 else "middle"
    return Case(name, ambient_dim, scaled, recipe, exact, largest_mae)


def _embedded(name: str, draw: Callable[..., Any], dim: int, ambient_dim: int, size: int) -> Case:
    # One frame for training and test: `size` natural coordinates, mixed.
    frame = jax.random.orthogonal(FRAME_KEY, ambient_dim, m=size)
    return _shape(
        f"{name} {dim} in {ambient_dim}",
        lambda num, key: draw(num, dim, ambient_dim, key=key, frame=frame),
        ambient_dim,
    )


def _warped(mixture: Any, name: str, ambient_dim: int) -> Case:
    return _shape(name, mixture.sample, ambient_dim)


def cases() -> dict[str, Case]:
    """Every set, by name."""
    found = [
        _affine(law, dims, ambient_dim, TARGETS.get((law, dims)))
        for dims, ambient_dim in AFFINE
        for law in LAWS
    ]
    found += [
        _shape(
            "string in doughnut",
            curved.string_in_doughnut,
            3,
            scale=5.0,
            largest_mae=(0.1, float("inf")),
        ),
        _shape("lollipop", curved.lollipop, 2),
        _shape("swiss roll", curved.swiss_roll, 3, scale=5.0),
        _shape("torus and circle", curved.torus_and_circle, 3),
        _warped(warped.squiggly((2, 4, 8), 10, key=FRAME_KEY), "squiggly 2+4+8 in 10", 10),
        _warped(warped.spline_flow((2, 4, 8), 10, key=FRAME_KEY), "spline flow 2+4+8 in 10", 10),
        _warped(
            warped.spline_flow((10, 30, 90), 100, key=FRAME_KEY), "spline flow 10+30+90 in 100", 100
        ),
        _shape(
            "sphere 10 in 11",
            lambda num, key: manifolds.Labelled(
                analytic.Sphere(10, 1.0).sample(num, key=key),
                jnp.full(num, 10),
                jnp.zeros(num, int),
            ),
            11,
            exact=lambda: analytic.Sphere(10, 1.0),
        ),
    ]
    found += [
        _embedded("hypersphere", embedded.hypersphere, 16, 64, 17),
        _embedded("hyperball", embedded.hyperball, 16, 64, 16),
        _embedded("twin peaks", embedded.twin_peaks, 128, 256, 129),
        _embedded("Clifford torus", embedded.clifford_torus, 32, 128, 64),
        _embedded("nonlinear", embedded.nonlinear, 32, 128, 128),
    ]
    return {case.name: case for case in found}


Training = Literal["plain", "symmetric", "conservative"]


def recipes(preset: str, training: Training = "plain") -> dict[str, train.Recipe]:
    """Sizes for a preset, by the recipe's name.

    The noise levels are log-normal around .3 (.14 in low dimension), not log-uniform: below about
    .03 of the spread of the data a network of this size learns nothing in minutes, and samples
    there are lost.  On a CPU the sets that are judged train longest among those of their size.
    A step of the other kinds of training takes twice as long: they make half as many.
    """
    width, depth, batch, judged_steps, steps, high_steps = {
        "smoke": (64, 2, 128, 300, 300, 150),
        "cpu": (384, 3, 512, 16_000, 8_000, 4_000),
        "accelerator": (1024, 4, 2048, 200_000, 200_000, 100_000),
    }[preset]
    judged = train.Recipe(
        width=width,
        depth=depth,
        num_steps=judged_steps,
        batch_size=batch,
        ema_half_life=50.0 if preset == "smoke" else 500.0,
        sigma_min=0.02,
        sigma_max=3.0,
        noise_levels=train.log_normal(-1.2, 1.2),
    )
    low = dataclasses.replace(
        judged,
        width=256 if preset == "cpu" else width,
        sigma_min=0.005,
        noise_levels=train.log_normal(-2.0, 1.5),
    )
    middle = dataclasses.replace(judged, num_steps=steps)
    # Wider than D - d, or the normal directions do not fit (`train.Recipe.wide_enough`).
    high = dataclasses.replace(judged, width=1024, num_steps=high_steps)
    if preset == "cpu":
        high = dataclasses.replace(high, depth=1, batch_size=batch // 2)
    found = {"low": low, "judged": judged, "middle": middle, "high": high}
    if training == "plain":
        return found
    options = {"symmetric": {"symmetry": 1.0}, "conservative": {"network": "GradientMLP"}}[training]
    return {
        name: dataclasses.replace(recipe, num_steps=recipe.num_steps // 2, **options)
        for name, recipe in found.items()
    }
