"""Samplers on oracles: order of convergence, the law of the samples, and the way back."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmh_jax import sample

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


def test_heun_converges_with_order_two(x64):
    x = jnp.array([10.0, -20.0, 30.0])
    exact = gaussian(flow(x, 20.0, 0.02), 0.02)
    errors = []
    for num in (33, 65, 129):
        levels = sample.karras_levels(num, sigma_min=0.02, sigma_max=20.0)
        errors.append(float(jnp.max(jnp.abs(sample.heun(gaussian, x, levels) - exact))))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(orders > 1.8), (errors, orders)


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
