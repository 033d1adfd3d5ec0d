"""Plateaus: found where they are, none where there are none; and what the interval promises."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import analytic, lid, linalg, mapping

SIGMAS = np.geomspace(1e-3, 3, 24)


def curve(value, sigmas=SIGMAS, stderr=0.0):
    value = np.asarray(value, float)
    return lid.Curve(sigmas, value, np.full_like(value, stderr), np.zeros_like(value))


def scales(*pairs):
    """FLIPD, averaged over points, of a Gaussian with `count` directions of width `scale`."""
    return sum(count / (1 + (SIGMAS / scale) ** 2) for count, scale in pairs)


def test_one_scale_has_one_plateau():
    (found,) = lid.plateaus(curve(scales((5, 1.0))))
    assert abs(found.value - 5) < 1e-4
    assert found.stderr < 1e-4
    assert found.sigma == SIGMAS[1]  # the flattest level that has both neighbours
    assert found.sigma_low == SIGMAS[0]
    # It ends where F has lost 5%: sigma^2 = .05 / .95.
    assert 0.16 < found.sigma_high < 0.24


def test_a_plateau_reaches_as_far_as_the_probes_can_tell():
    (sharp,) = lid.plateaus(curve(scales((2, 1.0))))
    (noisy,) = lid.plateaus(curve(scales((2, 1.0)), stderr=0.2))
    # Two standard errors are .4 of 2: F has fallen so far where sigma^2 = 1 / 4, not .1 / 1.9.
    assert sharp.sigma_high < 0.24
    assert 0.35 < noisy.sigma_high < 0.51
    assert 0.199 < noisy.stderr < 0.201


def test_a_plateau_does_not_reach_the_next_dimension():
    # However little the probes tell: what they cannot tell apart is still two dimensions.
    found = lid.plateaus(curve(scales((2, 1.0), (1, 0.02)), stderr=2.0))
    assert [round(p.value) for p in found] == [3, 2]


def test_of_two_flat_plateaus_the_finer_is_taken():
    # Near an edge: 2 below the distance to it, and 1, flatter for longer, above.
    value = 1 + 1 / (1 + (SIGMAS / 0.02) ** 3) + 2e-4 * np.log(SIGMAS / 0.001)
    found = lid.plateaus(curve(value))
    assert [round(p.value) for p in found] == [2, 1]
    result = lid.at_plateau(curve([value, np.where(SIGMAS > 0.1, 1, value)]))
    np.testing.assert_allclose(result.value, 2, atol=0.01)
    # A rough one is not taken for its fineness.
    rough = value + np.where(SIGMAS < 0.02, 0.1 * np.log(SIGMAS / 0.001), 0.3)
    assert lid.plateaus(curve(rough))[0].roughness > 0.01
    assert lid.at_plateau(curve(rough[None])).sigma[0] > 0.02


def test_every_scale_of_the_data_has_its_plateau():
    found = lid.plateaus(curve(scales((4, 1.0), (3, 0.02))))
    assert [round(p.value) for p in found] == [7, 4]
    assert found[0].sigma < 0.004
    assert 0.05 < found[1].sigma < 0.4
    assert found[0].sigma_high < found[1].sigma_low


def test_a_slope_without_end_is_no_plateau():
    # A new direction for each e-fold of sigma.
    falling = 20 - 2 * np.log(SIGMAS / SIGMAS[0])
    assert lid.plateaus(curve(falling), max_slope=0.05) == []
    result = lid.at_plateau(curve(falling[None]), max_slope=0.05)
    assert result.num_plateaus.tolist() == [0]
    assert np.isfinite(result.value[0])  # the flattest level, and marked as no plateau
    assert result.stderr[0] > 0.5


def test_a_maximum_is_no_plateau():
    # The slope is 0 at the top, but nowhere else near it.
    peak = 10 - 4 * np.log(SIGMAS / 0.05) ** 2
    assert lid.plateaus(curve(peak)) == []


def test_an_untrained_end_is_passed_over():
    # A network that returns its input below .01, as D = 10.
    value = 3 + 7 / (1 + (SIGMAS / 0.01) ** 4) - 0.2 * np.log(SIGMAS / 0.1) ** 2 / 10
    both = lid.plateaus(curve(value))
    assert round(both[0].value) == 10
    result = lid.at_plateau(curve(value[None]), ambient_dim=10)
    assert abs(result.value[0] - 3) < 0.1
    assert result.num_plateaus[0] == len(both)
    full = lid.at_plateau(curve(np.full((1, 24), 10.0)), ambient_dim=10)
    assert full.value[0] == 10  # data that do fill the space


def test_nan_stays_away_and_stays_visible():
    value = scales((5, 1.0))
    value[:6] = np.nan
    (found,) = lid.plateaus(curve(value))
    assert abs(found.value - 5) < 0.01
    assert found.sigma > SIGMAS[6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lid.at_plateau(curve(np.full((1, 24), np.inf))).num_plateaus.tolist() == [0]
        result = lid.at_plateau(curve(np.full((2, 24), np.nan)))
    assert np.all(np.isnan(result.value))
    assert result.num_plateaus.tolist() == [0, 0]


@settings(deadline=None, max_examples=25)
@given(unit=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_units_and_the_order_of_points_do_not_matter(unit, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(1, 20, (5, 1)) / (1 + (SIGMAS / rng.uniform(0.05, 2, (5, 1))) ** 2)
    plain = lid.at_plateau(curve(values))
    scaled = lid.at_plateau(curve(values[::-1], sigmas=unit * SIGMAS))
    np.testing.assert_allclose(scaled.value[::-1], plain.value, rtol=1e-6)
    np.testing.assert_allclose(scaled.sigma[::-1], unit * plain.sigma, rtol=1e-6)
    one = lid.plateaus(curve(values[0]))
    assert plain.value[0] in [p.value for p in one]


def test_the_interval_covers_the_dimension_of_an_oracle():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(100, 10)))[0].astype(np.float32)
    model = analytic.LinearGaussian(jnp.zeros(100), basis, jnp.linspace(0.5, 2, 10))
    points = model.sample(1000, key=jax.random.key(0))

    def at(model, x, *, key):
        sigmas = jnp.geomspace(0.003, 0.5, 12)
        return lid.flipd_curve(model, x, sigmas, trace=linalg.rademacher(16), key=key)

    curves = mapping.over_points(at, (None, 0), chunk_size=250)(
        model, points, key=jax.random.key(1)
    )
    found = lid.at_plateau(curves)
    coverage = np.mean(np.abs(found.value - 10) <= 1.96 * found.stderr)
    assert 0.93 < coverage < 0.97
    assert np.all(found.num_plateaus >= 1)


def test_the_knee_is_kneedles():
    pytest.importorskip("kneed")
    # Convex and decreasing, with a sharp corner at level 12 and value 2.
    value = np.where(
        np.arange(24) < 12, 2 + 1.5 * (12 - np.arange(24)), 2 - 0.01 * np.arange(-12, 12)
    )
    assert lid.knee(curve(value)) == pytest.approx(2, abs=0.1)
    assert np.isnan(lid.knee(curve(np.full(24, np.nan))))


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match="at_plateau"):
        lid.plateaus(curve(np.ones((2, 24))))
    with pytest.raises(ValueError, match="at least 4"):
        lid.plateaus(curve(np.ones(3), sigmas=SIGMAS[:3]))
    with pytest.raises(ValueError, match="increasing"):
        lid.plateaus(curve(np.ones(24), sigmas=SIGMAS[::-1]))


def test_no_level_belongs_to_two_plateaus():
    step = 5 + 0.15 * np.tanh(np.log(SIGMAS / 0.05))
    curves = [step] + [
        5 + np.cumsum(np.random.default_rng(seed).normal(0, 0.03, 24)) for seed in range(40)
    ]
    for value in curves:
        found = lid.plateaus(curve(value))
        for one, other in itertools.pairwise(found):
            assert one.sigma_high < other.sigma_low
    assert len(lid.plateaus(curve(step))) == 2


def test_shapes_that_do_not_fit_are_named():
    two = curve(np.ones((2, 24)))
    with pytest.raises(ValueError, match=r"`knee.*takes the curve of one point"):
        lid.knee(two)
    unequal = np.stack([SIGMAS, 2 * SIGMAS])
    with pytest.raises(ValueError, match="equal rows"):
        lid.at_plateau(two._replace(sigmas=unequal))
    with pytest.raises(ValueError, match=r"values of shape \(2, 2, 24\)"):
        lid.at_plateau(curve(np.ones((2, 2, 24))))


def test_the_dispersion_is_that_of_the_chosen_level():
    sigmas = np.geomspace(0.01, 1, 12)
    value = np.array([[2.0], [5.0]]) / (1 + sigmas**2)
    curves = lid.Curve(sigmas, value, 0 * value, 0 * value, dispersion=value / 8)
    found = lid.at_plateau(curves)
    np.testing.assert_allclose(found.dispersion, found.value / 8, rtol=1e-12)
    # A field that no curve has fills one number for each point when it is mapped.
    np.testing.assert_array_equal(lid.at_plateau(curves._replace(dispersion=np.zeros(2)))[-1], 0)
