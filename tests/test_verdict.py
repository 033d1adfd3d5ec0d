"""The truth table of the manifold memorization hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid
from mmh_jax.memorization import Label, verdict
from mmh_jax.typing import ChiSquareEstimate, Estimate


@pytest.mark.parametrize(
    ("theta", "star", "label"),
    [
        ((0.1, 0.1), (1.0, 0.1), Label.OD_MEM),
        ((0.0, 0.1), (0.1, 0.1), Label.DD_MEM),
        ((1.0, 0.1), (1.0, 0.1), Label.NOT_MEMORIZED),
        ((0.9, 0.1), (1.0, 0.1), Label.NOT_MEMORIZED),  # one standard error is no verdict
        ((5.0, 0.1), (1.0, 0.1), Label.NOT_MEMORIZED),  # too large is underfitting
        ((0.0, 0.0), (1.0, 0.0), Label.OD_MEM),  # exact estimates are compared exactly
        ((0.0, 0.0), (0.0, 0.0), Label.DD_MEM),
        ((-0.2, 0.01), (0.1, 0.01), Label.DD_MEM),  # both round to 0: no dimension to lose
        ((0.2, 0.1), (0.6, 0.1), Label.OD_MEM),
        ((np.nan, 0.1), (1.0, 0.1), Label.UNDECIDED),
        ((0.1, np.nan), (1.0, 0.1), Label.UNDECIDED),
        ((0.1, 0.1), (np.inf, np.inf), Label.UNDECIDED),
    ],
)
def test_truth_table(theta, star, label):
    assert Label(int(verdict(Estimate(*theta), Estimate(*star)).label)) is label


def test_z_is_the_difference_in_standard_errors():
    result = verdict(Estimate(3.0, 0.3), Estimate(5.0, 0.4))
    np.testing.assert_allclose(result.z, -4.0, rtol=1e-6)
    # The error of a sum of squares is that at the other's value: .3^2 + .05 (5 - 3), and .4^2.
    result = verdict(ChiSquareEstimate(3.0, 0.3, 0.05), Estimate(5.0, 0.4))
    np.testing.assert_allclose(result.z, -2 / np.sqrt(0.35), rtol=1e-6)
    swapped = verdict(Estimate(3.0, 0.4), ChiSquareEstimate(5.0, 0.4, 0.05))
    np.testing.assert_allclose(swapped.z, -2 / np.sqrt(0.16 + 0.16 - 0.1), rtol=1e-6)


def test_estimates_without_error_are_known_to_rounding():
    assert verdict(Estimate(1.0, 0.0), Estimate(2.0, 0.0)).label == Label.OD_MEM
    assert verdict(Estimate(2.0, 0.0), Estimate(2.0, 0.0)).z == 0
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    for theta, star in ((below, 1.0), (1000 * below, 1000.0)):
        result = verdict(Estimate(theta, 0.0), Estimate(star, 0.0))
        assert result.label == Label.NOT_MEMORIZED
        assert result.z > -0.1


@pytest.mark.parametrize("dim", [10, 100])
def test_the_bias_of_flipd_is_no_memory(dim):
    """On a unit sphere FLIPD is d - (d^2 - 2 d) sigma^2 / 4 to first order: 9.95, and 93.9."""
    sphere, sigma = analytic.Sphere(dim), 0.05
    points = sphere.sample(20, key=jax.random.key(0))
    found = jax.jit(jax.vmap(lambda x: lid.flipd(sphere, x, sigma)))(points)
    bias = (dim**2 - 2 * dim) * sigma**2 / 4
    np.testing.assert_allclose(found.value, dim - bias, rtol=0.003)
    np.testing.assert_allclose(found.stderr, bias, rtol=0.05)
    assert np.all(verdict(found, Estimate(float(dim), 0.01)).label == Label.NOT_MEMORIZED)
    # A dimension that is lost still counts: three of ten, and a third of a hundred.
    star = Estimate(dim + dim / 3, 0.01)
    assert np.all(verdict(found, star).label == Label.OD_MEM)


def test_thresholds_are_the_callers():
    theta, star = Estimate(3.0, 0.5), Estimate(4.0, 0.5)
    assert verdict(theta, star).label == Label.NOT_MEMORIZED
    assert verdict(theta, star, z_critical=1.0).label == Label.OD_MEM
    assert verdict(theta, star, small=4.5).label == Label.DD_MEM


def test_elementwise_under_jit_and_vmap():
    theta = Estimate(jnp.array([0.0, 1.0, 0.0]), jnp.full(3, 0.1))
    star = Estimate(jnp.array([1.0, 1.0, 0.0]), jnp.full(3, 0.1))
    expected = [Label.OD_MEM, Label.NOT_MEMORIZED, Label.DD_MEM]
    np.testing.assert_array_equal(jax.jit(verdict)(theta, star).label, expected)
    np.testing.assert_array_equal(jax.vmap(verdict)(theta, star).label, expected)


def test_false_alarms_at_the_nominal_rate():
    noise = jax.random.normal(jax.random.key(0), (2, 100_000)) * jnp.array([[0.3], [0.4]])
    result = verdict(Estimate(5 + noise[0], 0.3), Estimate(5 + noise[1], 0.4))
    rate = jnp.mean(result.label == Label.OD_MEM)
    # One-sided normal tail beyond 1.96: .025 with standard error .0005.
    assert abs(rate - 0.025) < 0.002


def test_titles():
    assert [label.title for label in Label] == ["undecided", "not memorized", "OD-Mem", "DD-Mem"]
