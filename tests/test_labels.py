"""Copies by three lengths, and what was extracted, against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmh_jax.memorization import (
    calibrated_copies,
    copies,
    extraction,
    feature_copies,
    rate_interval,
)

RNG = np.random.default_rng(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def calibrated_by_definition(samples, points, alpha, num_neighbors):
    """Carlini et al. 2023: over the nearest of the different points."""
    points = np.unique(points, axis=0)
    distances = np.sort(np.linalg.norm(samples[:, None] - points, axis=2), axis=1)
    return distances[:, 0] / (alpha * distances[:, :num_neighbors].mean(axis=1))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([3, 30]), st.sampled_from([2, 8]), st.integers(0, 1000))
def test_calibrated_distance_is_its_definition(num_points, num_neighbors, seed):
    points, samples = normal(num_points, 3, seed=seed), normal(6, 3, seed=seed + 1)
    # Some points many times, so that the nearest ones may all be one.
    repeated = np.concatenate([points, *[points[:2]] * 9])
    found = calibrated_copies(samples, repeated, alpha=0.4, num_neighbors=num_neighbors)
    expected = calibrated_by_definition(samples, repeated, 0.4, num_neighbors)
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-4)
    np.testing.assert_array_equal(found.memorized, found.ratio < 1)


def test_calibrated_distance_of_what_was_copied_most_often():
    points = np.concatenate([np.repeat(normal(1, 5), 100, axis=0), normal(60, 5, seed=1)])
    found = calibrated_copies(points[:1], points)
    assert found.ratio[0] == 0
    assert found.memorized[0]
    assert found.counts.tolist() == [1] + [0] * 159


def test_near_duplicates_are_one_for_the_calibrated_distance():
    cluster = normal(1, 5) + 1e-3 * normal(80, 5, seed=2)
    points, sample = np.concatenate([cluster, normal(60, 5, seed=1)]), cluster[:1] + 0.05
    assert not calibrated_copies(sample, points).memorized[0]
    found = calibrated_copies(sample, points, tolerance=0.02)
    assert found.memorized[0]
    assert found.nearest[0] < 80
    np.testing.assert_array_equal(found.cluster, [0] * 80 + list(range(80, 140)))
    # Its members share what was extracted; the nearest of them is named.
    extracted = extraction(found)
    assert extracted.memorized.tolist() == [True] * 80 + [False] * 60
    assert found.counts.sum() == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_those_of_a_group_count_as_one(seed):
    points, samples = normal(20, 3, seed=seed), normal(9, 3, seed=seed + 1)
    points = np.concatenate([points, points[:3]])
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 6, 20)
    groups = np.concatenate([groups, groups[:3]])
    found = copies(samples, points, threshold=0.9, groups=groups)
    distances = np.linalg.norm(samples[:, None] - points, axis=2)
    nearest = distances.argmin(axis=1)
    other = np.where(groups == groups[nearest][:, None], np.inf, distances).min(axis=1)
    np.testing.assert_allclose(found.ratio, distances.min(axis=1) / other, rtol=1e-4)
    np.testing.assert_array_equal(groups[found.nearest], groups[nearest])
    assert all(found.cluster == [np.flatnonzero(groups == group)[0] for group in groups])
    assert all(calibrated_copies(samples, points, groups=groups).cluster == found.cluster)


def test_groups_and_a_tolerance_link_together():
    points = np.array([[0.0], [1.0], [5.0], [9.0], [9.5]], np.float32)
    found = copies(points[:1] + 0.1, points, tolerance=0.6, groups=np.array([0, 1, 2, 0, 3]))
    assert found.cluster.tolist() == [0, 1, 2, 0, 0]


def test_fifty_neighbors_where_there_are_fewer():
    points = np.array([[0.0], [1.0], [1.0]])
    assert calibrated_copies(np.array([[0.25]]), points).ratio[0] == pytest.approx(0.25 / 0.25)


@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.99])
def test_similarity_is_a_cosine(similarity):
    samples, points = normal(40, 3), normal(10, 3, seed=1) * np.arange(1, 11)[:, None]
    found = feature_copies(samples, points.astype(np.float32), similarity=similarity)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (samples, points)]
    cosine = unit[0] @ unit[1].T
    np.testing.assert_array_equal(found.nearest, cosine.argmax(axis=1))
    np.testing.assert_array_equal(found.memorized, cosine.max(axis=1) > similarity)
    length = np.sqrt(2 - 2 * similarity)
    np.testing.assert_allclose(
        found.ratio * length, np.sqrt(2 - 2 * cosine.max(axis=1)), rtol=1e-3, atol=1e-4
    )


def test_features_as_a_function_and_as_arrays():
    samples, points = normal(20, 4, 4), normal(30, 4, 4, seed=1)

    def brightness(images):
        return np.asarray(images).mean(axis=(1, 2))[:, None]

    by_function = feature_copies(samples, points, distance=0.01, features=brightness)
    by_array = feature_copies(brightness(samples), brightness(points), distance=0.01)
    np.testing.assert_array_equal(by_function.nearest, by_array.nearest)
    np.testing.assert_array_equal(by_function.ratio, by_array.ratio)
    assert 0 < by_function.memorized.sum() < 20


def test_all_have_one_shape():
    samples, points = normal(7, 3), normal(9, 3, seed=1)
    points[4] = points[2]
    every = [
        copies(samples, points),
        calibrated_copies(samples, points),
        feature_copies(samples, points, distance=1.0),
    ]
    for found in every:
        assert [np.shape(field) for field in found] == [(7,), (7,), (7,), (7,), (9,), (9,)]
        np.testing.assert_array_equal(found.nearest, every[0].nearest)
        np.testing.assert_allclose(found.distance, every[0].distance)
        assert found.cluster.tolist() == [0, 1, 2, 3, 2, 5, 6, 7, 8]
        assert len(found.pairs) == found.memorized.sum() == found.counts.sum()
        assert np.all(np.diff(found.ratio[found.pairs[:, 0]]) >= 0)


def test_duplicates_of_what_was_extracted_are_extracted():
    points = np.array([[0.0], [4.0], [9.0], [4.0]])
    found = extraction(copies(np.array([[4.1], [4.2], [8.0], [2.0]]), points))
    assert found.counts.tolist() == [0, 2, 1, 2]
    assert found.memorized.tolist() == [False, True, True, True]
    np.testing.assert_allclose(found.rate, [0, 0.5, 0.25, 0.5])
    # The sample at 2 is as near to 0 as to 4, and of the two the first is named.
    np.testing.assert_allclose(found.closest, [1, 0.1 / 4.1, 0.25, 0.1 / 4.1], rtol=1e-4)
    far = extraction(copies(np.array([[4.1]]), points))
    assert far.closest[0] == np.inf


def test_intervals_are_those_of_scipy():
    counts = np.arange(31)
    low, high = rate_interval(counts, 30, level=0.9)
    for count in counts:
        exact = stats.binomtest(int(count), 30).proportion_ci(0.9, method="exact")
        assert low[count] == pytest.approx(exact.low, abs=1e-12)
        assert high[count] == pytest.approx(exact.high, abs=1e-12)


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3])
def test_intervals_cover_at_least_as_often_as_they_say(rate):
    counts = RNG.binomial(200, rate, size=4000)
    low, high = rate_interval(counts, 200)
    covered = np.mean((low <= rate) & (rate <= high))
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, p: calibrated_copies(s, p, num_neighbors=1), "at least 2"),
        (lambda s, p: calibrated_copies(s, p, alpha=0), "must be positive"),
        (lambda s, p: calibrated_copies(s, p[:1]), "whether one of them was copied"),
        (lambda s, p: copies(s, p, groups=np.zeros(3, int)), "one integer for each"),
        (lambda s, p: copies(s, p, groups=np.zeros(len(p))), "one integer for each"),
        (lambda s, p: copies(s, p, groups=np.zeros(len(p), int)), "or one group"),
        (
            lambda s, p: copies(s, np.concatenate([p, p[:1]]), groups=np.arange(len(p) + 1)),
            "equals an earlier one of another group",
        ),
        (lambda s, p: feature_copies(s, p), "one of"),
        (lambda s, p: feature_copies(s, p, distance=1.0, similarity=0.5), "one of"),
        (lambda s, p: feature_copies(s, p, similarity=1.0), "not in"),
        (lambda s, p: feature_copies(s, p, distance=-1.0), "must be positive"),
        (lambda s, p: feature_copies(0 * s, p, similarity=0.5), "length 0"),
        (lambda s, p: feature_copies(s, p, distance=1.0, features=lambda x: x[:1]), "one row"),
        (lambda s, p: extraction(copies(s, p), level=1.0), "between 0 and 1"),
        (lambda s, p: rate_interval(np.array([3]), 2), "between 0 and `num`"),
    ],
)
def test_what_is_wrong_is_said(call, match):
    with pytest.raises(ValueError, match=match):
        call(normal(3, 2), normal(5, 2, seed=1))
