"""Distances of features: against Gaussians, scipy's matrix root, and repeated draws."""

import jax
import numpy as np
import pytest
from scipy import linalg

from mmh_jax import evaluation


def by_matrix_root(x, y):
    """The published formula, with a root of the non-symmetric product."""
    one, two = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(one @ two).real
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(one + two - 2 * root)


def two_sets(seed=0, d=12, n=400, m=300):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return x, rng.normal(size=(m, d)) @ rng.normal(size=(d, d))


@pytest.mark.parametrize("d", [1, 2, 12, 64])
def test_it_is_the_published_formula(d):
    x, y = two_sets(d=d)
    expected = (
        by_matrix_root(x, y)
        if d > 1
        else (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    )
    np.testing.assert_allclose(evaluation.frechet_distance(x, y).value, expected, rtol=1e-9)
    moments = [x.mean(0), np.atleast_2d(np.cov(x.T)), y.mean(0), np.atleast_2d(np.cov(y.T))]
    np.testing.assert_allclose(evaluation.frechet_of_moments(*moments), expected, rtol=1e-7)
    back = evaluation.frechet_distance(y, x).value
    np.testing.assert_allclose(back, expected, rtol=1e-9)


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    one, two = np.geomspace(1e-8, 10, 6), np.geomspace(5, 1e-6, 6)
    mean = rng.normal(size=6)
    found = evaluation.frechet_of_moments(
        mean, basis * one @ basis.T, 0 * mean, basis * two @ basis.T
    )
    expected = mean @ mean + np.sum((np.sqrt(one) - np.sqrt(two)) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_fewer_points_than_features_and_features_that_do_not_vary():
    x, y = two_sets(d=30, n=10, m=15)
    x[:, :5] = 3.0
    y[:, 2] = -1.0
    found = evaluation.frechet_distance(x, y)
    # A root of the product is no reference here: it is singular.
    moments = evaluation.frechet_of_moments(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    np.testing.assert_allclose(found.value, moments, rtol=1e-6)
    assert np.isfinite(found.stderr)
    assert evaluation.frechet_distance(x, x).value < 1e-12 * (x**2).sum()


def test_small_parts_of_the_covariance_are_kept():
    # A distance of 1e-10 beside variances of 1e4, from centred features; formed as a covariance
    # product it would be lost.
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 4)) * [100, 1e-4, 1, 1]
    y = x * [1, 1.5, 1, 1]
    expected = (0.5 * x[:, 1].std(ddof=1)) ** 2 + (0.5 * x[:, 1].mean()) ** 2
    assert 1e-10 < expected < 1e-8
    np.testing.assert_allclose(evaluation.frechet_distance(x, y).value, expected, atol=3e-11)


def test_standard_errors_cover_the_distance_of_the_laws():
    rng = np.random.default_rng(3)
    factor, mean = rng.normal(size=(3, 3)), np.array([1.0, 0.0, -0.5])
    expected = evaluation.frechet_of_moments(mean, factor.T @ factor, 0 * mean, np.eye(3))
    errors, hits = [], 0
    for _ in range(300):
        x, y = rng.normal(size=(800, 3)) @ factor + mean, rng.normal(size=(600, 3))
        found = evaluation.frechet_distance(x, y)
        errors.append((found.value - expected) / found.stderr)
        hits += abs(errors[-1]) < 1.96
    assert 0.91 <= hits / 300 <= 0.98
    assert 0.9 < np.std(errors) < 1.1


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_the_standard_error_is_that_of_leaving_points_out(shift):
    x, y = two_sets(d=3, n=150, m=120)
    x = x + shift
    value = lambda x, y: evaluation.frechet_distance(x, y).value  # noqa: E731
    without_x = np.array([value(np.delete(x, i, 0), y) for i in range(150)])
    without_y = np.array([value(x, np.delete(y, i, 0)) for i in range(120)])
    expected = np.sqrt(149 * without_x.var() + 119 * without_y.var())
    np.testing.assert_allclose(evaluation.frechet_distance(x, y).stderr, expected, rtol=0.03)


def test_the_bias_is_positive_and_falls_like_one_over_n():
    rng = np.random.default_rng(4)

    def mean_distance(n):
        draws = [evaluation.frechet_distance(*rng.normal(size=(2, n, 8))).value for _ in range(60)]
        return np.mean(draws)

    few, many = mean_distance(100), mean_distance(400)
    assert many > 0
    np.testing.assert_allclose(few / many, 4, rtol=0.15)


def direct_mmd(x, y):
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    mean = lambda values: np.mean(list(values))  # noqa: E731
    within = [
        mean(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j)
        for s in (x, y)
    ]
    return sum(within) - 2 * mean(kernel(a, b) for a in x for b in y)


@pytest.mark.parametrize("block_size", [1, 7, 1024])
def test_the_kernel_distance_is_the_mean_over_pairs(block_size):
    x, y = two_sets(d=3, n=20, m=15)
    found = evaluation.kernel_distance(x, y, block_size=block_size)
    np.testing.assert_allclose(found.value, direct_mmd(x, y), rtol=1e-10)


def test_the_jackknife_is_that_of_leaving_points_out():
    x, y = two_sets(d=3, n=12, m=9)
    value = lambda x, y: evaluation.kernel_distance(x, y).value  # noqa: E731
    without_x = np.array([value(np.delete(x, i, 0), y) for i in range(12)])
    without_y = np.array([value(x, np.delete(y, i, 0)) for i in range(9)])
    variance = 11 * without_x.var() + 8 * without_y.var()
    np.testing.assert_allclose(evaluation.kernel_distance(x, y).stderr, variance**0.5, rtol=1e-9)


def test_the_kernel_distance_has_no_bias_and_its_error_bar_holds():
    rng = np.random.default_rng(5)

    def scores(shift, truth):
        found = [
            evaluation.kernel_distance(rng.normal(size=(60, 2)) + shift, rng.normal(size=(80, 2)))
            for _ in range(400)
        ]
        values, errors = np.array(found).T
        assert abs(values.mean() - truth) < 3.5 * values.std() / 20
        return values.std() / np.sqrt(np.mean(errors**2))

    # E (x.y / 2 + 1)^3 over x ~ N(a, I), y ~ N(b, I) in R^2; ab = a.b.
    s2 = 0.5
    third = lambda aa, bb, ab: (  # noqa: E731
        1
        + 3 * ab / 2
        + 3 * (2 + aa + bb + ab**2) / 4
        + (ab**3 + 3 * ab * (aa + bb + 2) + 6 * ab) / 8
    )
    truth = third(s2, s2, s2) + third(0, 0, 0) - 2 * third(s2, 0, 0)
    assert 0.85 < scores(np.sqrt(s2 / 2), truth) < 1.1
    # Where both laws agree the jackknife is too large, by up to sqrt(2).
    assert 0.6 < scores(0.0, 0.0) < 1.05


def test_features_may_be_of_low_precision():
    x, y = (rows.astype(np.float32) for rows in two_sets())
    half = [jax.numpy.asarray(rows, jax.numpy.bfloat16) for rows in (x, y)]
    np.testing.assert_allclose(
        evaluation.frechet_distance(*half).value, evaluation.frechet_distance(x, y).value, rtol=0.02
    )


@pytest.mark.parametrize("distance", [evaluation.frechet_distance, evaluation.kernel_distance])
def test_bad_features_are_refused(distance):
    x, y = two_sets(d=3)
    with pytest.raises(ValueError, match="same network"):
        distance(x, y[:, :2])
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*at least"):
        distance(x, y[:1])
    with pytest.raises(ValueError, match="Flatten images"):
        distance(x[:, None], y)
    with pytest.raises(TypeError, match="int64"):
        distance(x.astype(int), y)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"features.*NaN or infinite values in 1 of 400"):
        distance(x, y)


def test_bad_moments_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and a covariance of \(3, 3\)"):
        evaluation.frechet_of_moments(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not symmetric"):
        evaluation.frechet_of_moments(np.zeros(2), np.triu(np.ones((2, 2))), np.zeros(2), np.eye(2))
