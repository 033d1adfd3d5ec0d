"""Duplicates, near-duplicates, and the dimension as a curve over the number of neighbours."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from mmh_jax import lid
from mmh_jax.lid import duplicates

RNG = np.random.default_rng(0)


def test_exact_duplicates_are_grouped():
    points = RNG.normal(size=(500, 3, 2)).astype(np.float32)
    points[100:200] = points[:100]
    points[300] = points[7]
    found = lid.find_duplicates(points)
    assert len(found.first) == 399
    assert found.counts.sum() == 500
    assert found.counts[7] == 3
    assert found.cluster[[7, 107, 300]].tolist() == [7, 7, 7]
    np.testing.assert_array_equal(points[found.first][found.cluster], points)
    np.testing.assert_array_equal(found.first, np.sort(found.first))
    assert found.is_duplicate.sum() == 201
    # As the neighbours see them.
    nearest = lid.nearest_neighbors(points, 1).distances[:, 0]
    np.testing.assert_array_equal(found.is_duplicate, nearest == 0)


def test_zero_has_no_sign():
    found = lid.find_duplicates(np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]]))
    assert found.cluster.tolist() == [0, 0, 1]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), tolerance=st.floats(0.005, 0.2))
def test_near_duplicates_are_single_linkage(seed, tolerance):
    points = np.random.default_rng(seed).uniform(size=(300, 2))
    found = lid.find_duplicates(points, tolerance=tolerance)
    labels = DBSCAN(eps=tolerance, min_samples=1).fit(points).labels_
    pairs = set(zip(found.cluster.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == len(found.first) == labels.max() + 1


def test_a_crowd_larger_than_the_first_neighbourhood_is_one():
    crowd = 1e-3 * RNG.normal(size=(90, 4))
    points = np.concatenate([crowd, 5 + RNG.normal(size=(60, 4)), crowd[:9]])
    found = lid.find_duplicates(points, tolerance=0.02)
    assert found.counts[0] == 99
    assert len(found.first) == 61


def test_two_crowds_whose_points_see_only_their_own_at_first():
    crowds = [1e-4 * RNG.normal(size=(20, 3)) + np.array([shift, 0, 0]) for shift in (0, 0.015, 1)]
    found = lid.find_duplicates(np.concatenate(crowds), tolerance=0.02)
    assert found.counts.tolist() == [40, 20]


def test_steps_are_measured_in_the_precision_of_the_points():
    line = np.array([[0.0], [1.0], [2.0], [3.0], [3.0 + 1e-8]])
    assert lid.find_duplicates(line, tolerance=1e-9).counts.tolist() == [1] * 5
    assert lid.find_duplicates(line, tolerance=1.1e-8).counts.tolist() == [1, 1, 1, 2]
    # Longer than the tolerance in float32, and not in float64.
    pair = np.array([[0.0], [1e4], [1e4 + 1e-3]])
    assert lid.find_duplicates(pair, tolerance=1.001e-3).counts.tolist() == [1, 2]


def test_a_tolerance_in_the_wrong_units_costs_blocks_only(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 1000)
    found = lid.find_duplicates(RNG.normal(size=(400, 3)), tolerance=100.0)
    assert found.counts.tolist() == [400]


def test_one_point_only():
    found = lid.find_duplicates(np.ones((40, 3)), tolerance=0.1)
    assert found.counts.tolist() == [40]


@pytest.mark.parametrize(
    ("points", "tolerance", "error", "match"),
    [
        (np.ones((3, 2), int), 0.0, TypeError, "real data units"),
        (np.full((3, 2), np.inf), 0.0, ValueError, "infinite values in 3 of 3 rows"),
        (np.ones((0, 2)), 0.0, ValueError, "at least one point"),
        (np.ones((3, 2)), -1.0, ValueError, "tolerance=-1"),
        (np.ones((3, 2)), np.nan, ValueError, "tolerance=nan"),
    ],
)
def test_what_cannot_be_grouped_is_named(points, tolerance, error, match):
    with pytest.raises(error, match=match):
        lid.find_duplicates(points, tolerance=tolerance)


LEVELS = [10, 14, 20, 28, 40, 56, 80]


@pytest.fixture(scope="module")
def five_in_ten():
    points = RNG.normal(size=(800, 5)) @ np.eye(5, 10)
    return points, lid.nearest_neighbors(points, 90)


@pytest.mark.parametrize("method", ["mle", "two_nn", "local_pca", "ess"])
def test_each_level_is_the_method_with_so_many_neighbours(method, five_in_ten):
    points, neighbors = five_in_ten
    curve = lid.neighbor_curve(method, points, neighbors, LEVELS)
    pooled = lid.neighbor_curve(method, points, neighbors, LEVELS, pooled=True)
    assert curve.value.shape == (800, 7)
    assert pooled.value.shape == (7,)
    fresh = lid.nearest_neighbors(points, 28)
    found = lid.DATA_METHODS[method].at_points(points, fresh)
    np.testing.assert_allclose(curve.value[:, 3], found.value, rtol=1e-5)
    np.testing.assert_allclose(curve.stderr[:, 3], found.stderr, rtol=1e-4)
    overall = lid.DATA_METHODS[method].overall(fresh, found)
    np.testing.assert_allclose(pooled.value[3], overall.value, rtol=1e-5)


@pytest.mark.parametrize(("method", "most"), [("mle", 0.8), ("ess", 0.2), ("local_pca", 0.05)])
def test_at_the_plateau_the_points_are_nearer_than_at_twenty(method, most, five_in_ten):
    points, neighbors = five_in_ten
    curve = lid.neighbor_curve(method, points, neighbors, LEVELS)
    found = lid.at_plateau(curve)
    at_plateau = np.abs(found.value - 5).mean()
    assert at_plateau < most
    assert at_plateau < np.abs(curve.value[:, 2] - 5).mean() + 0.01
    assert set(found.sigma) <= set(map(float, LEVELS))
    assert np.isfinite(found.value).all()


def test_curves_that_cannot_be_made_are_named(five_in_ten):
    points, neighbors = five_in_ten
    with pytest.raises(ValueError, match="there are mle, mom"):
        lid.neighbor_curve("best", points, neighbors, LEVELS)
    wrong: list[Any] = [[20, 10], [2, 10], [20, 91], [], [10.5, 20.5]]
    for levels in wrong:
        with pytest.raises(ValueError, match="increase from at least 4, for 'mle', to at most 90"):
            lid.neighbor_curve("mle", points, neighbors, levels)
