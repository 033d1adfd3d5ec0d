"""Samplers on oracles: order of convergence, the law of the samples, and the way back."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmh_jax import analytic, sample

SCALES = np.array([0.0, 0.5, 2.0])


def gaussian(x, sigma):
    """The exact denoiser of independent normals; its flow scales x_i by sqrt(l_i + sigma^2)."""
    variances = jnp.asarray(SCALES, x.dtype) ** 2
    return variances / (variances + sigma**2) * x


def flow(x, start, end):
    return x * np.sqrt((SCALES**2 + end**2) / (SCALES**2 + start**2))


def test_karras_levels_are_those_of_the_paper(x64):
    levels = sample.karras_levels(18, sigma_min=0.002, sigma_max=80.0)
    steps = np.arange(18) / 17
    expected = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "order"),
    [(sample.heun(), 2), (sample.ddim(), 1), (sample.dpm_solver_2m(), 2)],
    ids=["heun", "ddim", "dpm_solver_2m"],
)
def test_steps_converge_with_their_order(x64, step, order):
    x = jnp.array([10.0, -20.0, 30.0])
    exact = gaussian(flow(x, 20.0, 0.02), 0.02)
    errors = []
    for num in (129, 257, 513):
        levels = sample.karras_levels(num, sigma_min=0.02, sigma_max=20.0)
        found = sample.solve(gaussian, x, levels, step=step)
        errors.append(float(jnp.max(jnp.abs(found - exact))))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - order) < 0.15), (errors, orders)


STOCHASTIC = {
    "ancestral": sample.ancestral(),
    "eta": sample.ddim(0.5),
    "edm": sample.heun(0.2),
    "edm, an interval": sample.heun(0.2, low=0.5, high=5.0),
}


@pytest.mark.parametrize("step", STOCHASTIC.values(), ids=STOCHASTIC)
def test_noise_of_steps_keeps_the_law(step):
    num = 4_000
    draws = sample.sample(
        gaussian, num, key=jax.random.key(0), sigma_min=0.002, sigma_max=40.0, shape=(3,),
        num_levels=200, step=step,
    )  # fmt: skip
    mean, variance = np.mean(draws, 0), np.var(np.asarray(draws), 0)
    assert np.all(np.abs(mean) < 4 * SCALES / np.sqrt(num) + 1e-4)
    # Four standard errors, and 3% for the steps.
    np.testing.assert_allclose(variance, SCALES**2, rtol=4 * np.sqrt(2 / num) + 0.03, atol=1e-4)
    again = sample.solve(gaussian, jnp.ones(3), jnp.array([3.0, 1.0, 0.1]), step=step,
                         key=jax.random.key(0))  # fmt: skip
    other = sample.solve(gaussian, jnp.ones(3), jnp.array([3.0, 1.0, 0.1]), step=step,
                         key=jax.random.key(1))  # fmt: skip
    assert not np.allclose(again, other)


def energy(one, other):
    """Energy distance of two samples, (N, D) and (M, D)."""

    def apart(a, b):
        return np.mean(np.linalg.norm(a[:, None] - b, axis=-1))

    return 2 * apart(one, other) - apart(one, one) - apart(other, other)


def permutation_p(one, other, rng, num=200):
    """The share of ways to divide all points in two that are as far apart as these."""
    both, size = np.concatenate([one, other]), len(one)
    found = energy(one, other)
    orders = (rng.permutation(len(both)) for _ in range(num))
    beaten = sum(energy(both[order[:size]], both[order[size:]]) >= found for order in orders)
    return (1 + beaten) / (1 + num)


LAW = {
    "heun": sample.heun(), "ddim": sample.ddim(), "dpm_solver_2m": sample.dpm_solver_2m(),
    "ancestral": sample.ancestral(), "edm": sample.heun(0.1),
}  # fmt: skip


def two_clusters():
    components = (
        analytic.LinearGaussian(jnp.array(mean), jnp.eye(2), jnp.array([0.3, 0.3]))
        for mean in ([2.0, 0.0], [-1.0, 1.0])
    )
    return analytic.Mixture(tuple(components), [0.7, 0.3])


@pytest.mark.parametrize("step", LAW.values(), ids=LAW)
def test_samples_cannot_be_told_from_the_law_of_a_mixture(step):
    law, rng = two_clusters(), np.random.default_rng(0)
    truth = np.asarray(law.sample(300, key=jax.random.key(2)))
    draws = sample.sample(
        law, 300, key=jax.random.key(1), sigma_min=0.01, sigma_max=20.0, num_levels=100,
        shape=(2,), step=step,
    )  # fmt: skip
    assert permutation_p(np.asarray(draws), truth, rng) > 0.02
    # The test is one that sees a wrong share of the clusters.
    large = truth[:, 0] > 0.5
    wrong = np.concatenate([truth[large][: np.sum(~large)], truth[~large]])
    assert permutation_p(np.asarray(draws), wrong, rng) < 0.02


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_reverse_sde_has_the_law_and_without_noise_the_flow(x64, noise):
    keys = jax.random.split(jax.random.key(0), 2_000)
    start = 20.0 * jax.random.normal(jax.random.key(1), (2_000, 3))

    def carry(x, key):
        return sample.reverse_sde(gaussian, x, 20.0, 0.05, key=key, noise=noise, num_steps=200)

    ends = np.asarray(jax.jit(jax.vmap(carry))(start, keys))
    # What starts with the variance of the noise alone.
    given = SCALES**2 + 0.05**2
    np.testing.assert_allclose(ends.var(0), given, rtol=4 * np.sqrt(2 / 2_000) + 0.03)
    if noise == 0:
        np.testing.assert_allclose(ends, flow(np.asarray(start), 20.0, 0.05), rtol=0.02)


def test_the_reverse_sde_takes_solvers_steps_and_gives_up(x64):
    settings = {"key": jax.random.key(0), "num_steps": 100}
    x = jnp.array([1.0, -2.0, 3.0])
    fixed = sample.reverse_sde(gaussian, x, 3.0, 0.1, solver=diffrax.ShARK(), **settings)
    adaptive = sample.reverse_sde(
        gaussian, x, 3.0, 0.1, **settings,
        controller=diffrax.PIDController(rtol=1e-2, atol=1e-2, dtmin=0.005),
    )  # fmt: skip
    # One Brownian path, two ways of following it.
    np.testing.assert_allclose(fixed, adaptive, atol=0.1)
    grid = jnp.linspace(-jnp.log(3.0), -jnp.log(0.1), 101)
    stepped = sample.reverse_sde(
        gaussian, x, 3.0, 0.1, controller=diffrax.StepTo(ts=grid), **settings
    )
    np.testing.assert_allclose(fixed, stepped, atol=0.1)
    failed = sample.reverse_sde(gaussian, x, 3.0, 0.1, max_steps=3, **settings)
    assert jnp.all(jnp.isnan(failed))
    with pytest.raises(TypeError, match="or take `probability_flow`"):
        sample.reverse_sde(gaussian, x, 3.0, 0.1, key=None)  # pyright: ignore


@pytest.mark.parametrize("step", LAW.values(), ids=LAW)
def test_a_path_ends_where_solve_does_and_records(step):
    levels, key = sample.karras_levels(6, sigma_min=0.1, sigma_max=3.0), jax.random.key(3)
    x = jnp.array([1.0, -2.0, 3.0])
    path = sample.solve_path(
        gaussian, x, levels, step=step, key=key,
        record=lambda x, denoised, sigma: {"residual": jnp.sum((x - denoised) ** 2) / sigma**2},
    )  # fmt: skip
    end = sample.solve(gaussian, x, levels, step=step, key=key)
    np.testing.assert_allclose(path.denoised[-1], end, rtol=1e-6)
    assert path.recorded is not None
    # Everywhere the denoiser's answer at that point and level, with churn too.
    answers = jax.vmap(gaussian)(path.states, path.sigmas)
    np.testing.assert_allclose(path.denoised, answers, rtol=1e-5, atol=1e-6)
    residual = jnp.sum((path.states - path.denoised) ** 2, axis=1) / path.sigmas**2
    np.testing.assert_allclose(path.recorded["residual"], residual, rtol=1e-5)
    assert (path.sigmas[0] > levels[0]) == (step == LAW["edm"])


def test_steps_say_what_is_wrong():
    with pytest.raises(ValueError, match="eta is between 0"):
        sample.ddim(1.5)
    for wrong in ({"churn": -0.1}, {"churn": np.inf}, {"low": 2.0, "high": 1.0}):
        with pytest.raises(ValueError, match="not negative, and low is below high"):
            sample.heun(**wrong)
    x = jnp.ones(3)
    with pytest.raises(TypeError, match="or take a step without noise"):
        sample.solve(gaussian, x, jnp.array([1.0, 0.1]), step=sample.ancestral())
    with pytest.raises(ValueError, match="finite positive number"):
        sample.solve(gaussian, x, jnp.array([1.0, 0.0]))
    for levels, step in (([1.0, 1.0], sample.heun()), ([0.1, 1.0], sample.ancestral())):
        with pytest.raises(ValueError, match="must change at each step"):
            sample.solve(gaussian, x, jnp.array(levels), step=step, key=jax.random.key(0))
    with pytest.raises(ValueError, match="takes a vector of noise levels"):
        sample.solve_path(gaussian, x, jnp.array(1.0))
    with pytest.raises(ValueError, match="goes down"):
        sample.reverse_sde(gaussian, x, 0.1, 1.0, key=jax.random.key(0))


@pytest.mark.parametrize("sigma", [0.2, 1.0, 8.0])
def test_a_step_of_edm_is_that_of_the_paper(x64, sigma, monkeypatch):
    rng = np.random.default_rng(0)
    x, draw, ahead = rng.normal(size=3), rng.normal(size=3), 0.7 * sigma
    step = sample.heun(0.3, low=0.5, high=5.0, noise=1.007)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(draw, dtype))
    found = step(
        gaussian, jnp.asarray(x), jnp.asarray(sigma), jnp.asarray(ahead), None,
        key=jax.random.key(0),
    )  # fmt: skip
    # Karras et al. 2022, algorithm 2, lines 4 to 11.
    raised = 1.3 * sigma if 0.5 <= sigma <= 5.0 else sigma
    start = x + np.sqrt(raised**2 - sigma**2) * 1.007 * draw
    slope = (start - gaussian(start, raised)) / raised
    euler = start + (ahead - raised) * slope
    slope_next = (euler - gaussian(euler, ahead)) / ahead
    np.testing.assert_allclose(found.x, start + (ahead - raised) * (slope + slope_next) / 2)
    assert float(found.at[1]) == pytest.approx(raised)


@pytest.mark.parametrize("step", LAW.values(), ids=LAW)
def test_the_end_may_be_differentiated_by_start_and_levels(step):
    levels = sample.karras_levels(5, sigma_min=0.1, sigma_max=3.0)

    def end(x, levels):
        return jnp.sum(sample.solve(gaussian, x, levels, step=step, key=jax.random.key(0)))

    slopes = jax.grad(end, argnums=(0, 1))(jnp.array([1.0, -2.0, 3.0]), levels)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_whole_numbers_are_points_and_what_is_recorded_may_be_a_number():
    levels = jnp.array([3.0, 1.0])
    end = sample.solve(gaussian, jnp.array([1, -2, 3]), levels)
    np.testing.assert_allclose(end, sample.solve(gaussian, jnp.array([1.0, -2.0, 3.0]), levels))
    path = sample.solve_path(gaussian, jnp.ones(3), levels, record=lambda *at: 1.0)
    np.testing.assert_array_equal(path.recorded, [1.0, 1.0])


@pytest.mark.parametrize("ends", [(20.0, 0.02), (0.02, 20.0)])
def test_probability_flow_is_exact_both_ways(x64, ends):
    x = jnp.array([1.0, -2.0, 3.0])
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    end = sample.probability_flow(gaussian, x, *ends, controller=controller)
    np.testing.assert_allclose(end, flow(x, *ends), rtol=1e-6)


def test_probability_flow_takes_fixed_steps_and_reports_failure(x64):
    x = jnp.ones(3)
    grid = jnp.linspace(np.log(2.0), np.log(0.1), 101)
    end = sample.probability_flow(
        gaussian, x, 2.0, 0.1, solver=diffrax.Heun(), controller=diffrax.StepTo(ts=grid)
    )
    np.testing.assert_allclose(end, flow(x, 2.0, 0.1), rtol=1e-3)
    failed = sample.probability_flow(gaussian, x, 2.0, 0.1, max_steps=2)
    assert jnp.all(jnp.isnan(failed))


def test_samples_have_the_law_of_the_data():
    draws = sample.sample(
        gaussian, 20_000, key=jax.random.key(0), sigma_min=0.002, sigma_max=40.0, shape=(3,)
    )
    mean, covariance = np.mean(draws, 0), np.cov(np.asarray(draws).T)
    assert np.all(np.abs(mean) < 4 * SCALES / np.sqrt(20_000) + 1e-4)
    # Standard error of a variance: l sqrt(2 / n) = 1%; the ODE's error adds under 1%.
    np.testing.assert_allclose(np.diag(covariance), SCALES**2, rtol=0.05, atol=1e-4)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    assert np.max(np.abs(off_diagonal)) < 0.04


def test_sample_uses_the_denoisers_shape_and_is_reproducible():
    class Shaped:
        shape = (2, 2)

        def __call__(self, x, sigma):
            return x / (1 + sigma**2)

    jax.tree_util.register_static(Shaped)
    arguments = {"key": jax.random.key(0), "sigma_min": 0.01, "sigma_max": 5.0, "num_levels": 4}
    draws = sample.sample(Shaped(), 5, **arguments)
    assert draws.shape == (5, 2, 2)
    np.testing.assert_array_equal(draws, sample.sample(Shaped(), 5, **arguments))


def test_errors():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        sample.karras_levels(5, sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(ValueError, match="pass `shape=`"):
        sample.sample(gaussian, 2, key=jax.random.key(0), sigma_min=0.1, sigma_max=1.0)


def test_each_sample_has_its_own_condition():
    """A model whose only point is its condition."""

    @struct.dataclass
    class Constant:
        where: Any = None

        def condition(self, where):
            return Constant(where)

        def __call__(self, x, sigma):
            return jnp.broadcast_to(self.where, x.shape)

    settings = {"key": jax.random.key(0), "sigma_min": 0.01, "sigma_max": 5.0, "shape": (2,)}
    conditions = np.array([3.0, -1.0, 2.0], np.float32)
    draws = sample.sample(Constant(), 3, conditions=conditions, **settings)
    np.testing.assert_allclose(draws, conditions[:, None] * np.ones(2), rtol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 samples; pass one condition"):
        sample.sample(Constant(), 4, conditions=conditions, **settings)


@pytest.mark.parametrize("step", [sample.ddim(), sample.dpm_solver_2m()])
def test_levels_that_end_at_0_are_finite_in_one_program(step):
    """The last step has an infinite length in log sigma."""
    levels = jnp.append(jnp.geomspace(3.0, 0.01, 32), 0.0)
    gaussian = lambda x, s: x / (1 + s**2)  # noqa: E731
    solve = jax.jit(lambda x, levels: sample.solve(gaussian, x, levels, step=step))
    np.testing.assert_allclose(solve(jnp.array([10**0.5]), levels), 1.0, atol=0.1)
