"""The truth table of the manifold memorization hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax.memorization import Label, verdict
from mmh_jax.typing import Estimate


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
    assert verdict(Estimate(1.0, 0.0), Estimate(2.0, 0.0)).z == -jnp.inf
    assert verdict(Estimate(2.0, 0.0), Estimate(2.0, 0.0)).z == 0


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
