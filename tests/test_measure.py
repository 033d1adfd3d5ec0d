"""How a report measures: which noise levels it looks at, and which one each point gets."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, denoise, noise, train
from mmh_jax.report import measure

SHAPE = (6,)
CONFIG = train.ModelConfig(
    network="ResidualMLP",
    network_options={},
    shape=SHAPE,
    scale=1.0,
    sigma_data=1.0,
    sigma_min=0.001,
    sigma_max=5.0,
)


def gaussian(shift, scales):
    """On the first axes, as wide as `scales`; shifted along the last."""
    basis = jnp.eye(6)[:, : len(scales)]
    return analytic.LinearGaussian(jnp.zeros(6).at[5].set(shift), basis, jnp.asarray(scales))


@pytest.fixture(scope="module")
def two_scales():
    """A wide plane, and far from it a piece of 4 dimensions of which 2 are .03 wide."""
    pieces = (gaussian(0.0, [1.0, 1.0]), gaussian(9.0, [1.0, 1.0, 0.03, 0.03]))
    return analytic.Mixture(pieces, jnp.array([0.5, 0.5])), [
        np.asarray(piece.sample(60, key=jax.random.key(i))) for i, piece in enumerate(pieces)
    ]


def levels_of(model, points, config=CONFIG):
    return measure.choose_levels(model, config, points, seed=0, spectra=measure.spectra(SHAPE))


def chosen_at(model, points, config=CONFIG):
    spectra = measure.spectra(SHAPE)
    levels = levels_of(model, points, config)
    measured = measure.measure(model, points, levels, spectra=spectra)
    return levels, measure.at_plateau(measured, levels, 6)


def test_one_level_for_all_is_the_median_of_their_plateaus():
    """Of 60 points with a plateau at the finest levels, and 40 with one above .003 only."""
    pieces = (gaussian(0.0, [1.0, 1.0]), gaussian(9.0, [1.0, 1.0, 0.003, 0.003]))
    model = analytic.Mixture(pieces, jnp.array([0.5, 0.5]))
    parts = [
        piece.sample(num, key=jax.random.key(0))
        for piece, num in zip(pieces, (60, 40), strict=True)
    ]
    spectra, points = measure.spectra(SHAPE), np.concatenate(parts)
    level = measure.choose_level(model, CONFIG, points, seed=0, spectra=spectra)
    _, chosen = chosen_at(model, points)
    assert len(np.unique(chosen.sigma)) > 1
    assert level == pytest.approx(np.median(chosen.sigma), rel=1e-6)


def test_each_point_has_its_own_level(two_scales):
    model, (wide, mixed) = two_scales
    levels, chosen = chosen_at(model, np.concatenate([wide, mixed]))
    np.testing.assert_allclose(chosen.lid.value[:60], 2, atol=0.01)
    found = chosen.lid.value[60:]
    assert np.all((np.abs(found - 4) < 0.1) | (np.abs(found - 2) < 0.1))
    assert np.mean(np.abs(found - 4) < 0.1) > 0.5
    assert np.all(chosen.num_plateaus[60:] >= 1)
    assert np.all(chosen.num_plateaus[:60] == 1)
    assert set(chosen.sigma) <= set(levels)
    # The readings are those of the level.
    at = np.flatnonzero(levels == chosen.sigma[70])[0]
    spectrum = measure.spectra(SHAPE)(model, mixed[10:11], levels[at])
    np.testing.assert_allclose(chosen.measured.flipd[70], spectrum.flipd[0], rtol=1e-5)
    np.testing.assert_allclose(chosen.lid.value[70], spectrum.expected_flipd[0], rtol=1e-5)
    assert chosen.lid.stderr[70] >= spectrum.network_error[0]


def test_levels_are_a_part_of_the_grid_around_all_plateaus(two_scales):
    model, (wide, mixed) = two_scales
    levels = levels_of(model, np.concatenate([wide, mixed]))
    grid = np.geomspace(0.001, 0.5, measure.NUM_LEVELS)
    start = np.flatnonzero(np.isclose(grid, levels[0]))[0]
    np.testing.assert_allclose(levels, grid[start : start + len(levels)])
    assert measure.MIN_LEVELS <= len(levels) <= measure.NUM_LEVELS
    # A plane alone is flattest at the smallest levels: no need of the others.
    assert len(levels_of(model, wide)) == measure.MIN_LEVELS
    assert levels_of(model, wide)[0] == pytest.approx(0.001)


def test_no_plateau_is_no_dimension():
    # One direction less for each factor 2 of the noise.
    model = gaussian(0.0, 0.5 ** np.arange(6.0))
    points = np.asarray(model.sample(40, key=jax.random.key(0)))
    _, chosen = chosen_at(model, points, dataclasses.replace(CONFIG, sigma_min=0.06))
    without = chosen.num_plateaus == 0
    assert without.any()
    assert np.isfinite(chosen.lid.value).all()
    np.testing.assert_array_equal(np.isnan(chosen.dimension.value), without)
    found = measure.diagnostics(chosen, model, 6)
    assert found["no_plateau"] == without.sum()
    assert found["num_points"] == 40
    assert found["sigma_outside_training"] is False


def test_a_given_level_is_taken_as_it_is(two_scales):
    model, (wide, _) = two_scales
    measured = measure.measure(model, wide, np.array([7.0]), spectra=measure.spectra(SHAPE))
    chosen = measure.at_level(measured, 7.0)
    assert set(chosen.sigma) == {7.0}
    np.testing.assert_array_equal(chosen.num_plateaus, -1)
    np.testing.assert_array_equal(chosen.lid.value, measured.expected[:, 0])
    np.testing.assert_array_equal(chosen.lid.stderr, measured.network_error[:, 0])
    assert np.isfinite(chosen.dimension.value).all()
    trained = denoise.from_function(lambda x, t: x, noise.EDM(t_max=5.0), prediction=denoise.x0)
    assert measure.diagnostics(chosen, trained, 6)["sigma_outside_training"] is True
    assert measure.diagnostics(chosen, model, 6)["sigma_outside_training"] is False  # not known


def test_a_dimension_that_is_that_of_the_space_is_counted(two_scales):
    learned, (wide, _) = two_scales
    nothing = denoise.from_function(lambda x, t: x, noise.EDM(t_max=5.0), prediction=denoise.x0)
    for model, full in ((nothing, len(wide)), (learned, 0)):
        _, chosen = chosen_at(model, wide)
        assert np.all(chosen.num_plateaus > 0)
        assert measure.diagnostics(chosen, model, 6)["full"] == full


def test_a_model_trained_at_large_noise_only_is_refused():
    config = dataclasses.replace(CONFIG, sigma_min=0.5)
    with pytest.raises(ValueError, match=r"sigma_min = 0\.5 up, and half the spread.* is 0\.5"):
        levels_of(gaussian(0.0, [1.0]), np.ones((5, 6), np.float32), config)


def test_a_model_that_is_nowhere_finite_is_refused():
    with pytest.raises(ValueError, match="no noise level has a finite dimension"):
        levels_of(gaussian(jnp.nan, [1.0]), np.ones((5, 6), np.float32))


def test_one_point_that_is_not_finite_is_counted_and_spoils_nothing(two_scales):
    model, (wide, _) = two_scales
    points = wide[:10].copy()
    points[3] = np.nan
    levels = levels_of(model, wide)
    measured = measure.measure(model, points, levels, spectra=measure.spectra(SHAPE))
    found = measure.diagnostics(measure.at_plateau(measured, levels, 6), model, 6)
    assert found["not_finite"] == found["no_plateau"] == 1
    assert found["asymmetry"] < 1e-6
    json.dumps(found, allow_nan=False)
    nowhere = measure.measure(model, points[3:4], levels, spectra=measure.spectra(SHAPE))
    found = measure.diagnostics(measure.at_plateau(nowhere, levels, 6), model, 6)
    assert found["asymmetry"] is None


def test_the_window_of_levels_has_margins_and_enough_levels():
    last = measure.NUM_LEVELS - 1
    for low in range(last + 1):
        for high in range(low, last + 1):
            first, final = measure._window(low, high)
            assert 0 <= first <= max(low - 2, 0)
            assert last >= final >= min(high + 2, last)
            assert final - first + 1 >= measure.MIN_LEVELS
            # No more than that, or than two beyond the plateaus.
            assert final - first + 1 <= max(measure.MIN_LEVELS, high - low + 5)
