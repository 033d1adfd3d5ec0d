"""Precision, recall, density, coverage: against their definitions, word by word."""

import numpy as np
import pytest

from mmh_jax import evaluation


def by_definition(samples, data, k):
    """The four definitions with all distances at once, in float64."""
    between = np.linalg.norm(samples[:, None] - data, axis=-1)

    def radii(points):
        own = np.linalg.norm(points[:, None] - points, axis=-1)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    data_radii, sample_radii = radii(data), radii(samples)
    inside = between <= data_radii
    return [
        inside.any(axis=1).mean(),
        (between <= sample_radii[:, None]).any(axis=0).mean(),
        inside.sum() / (k * len(samples)),
        inside.any(axis=0).mean(),
    ]


def two_sets(seed, num_samples=150, num_data=200, d=4):
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(num_samples, d)) * [1.5, 0.4, 1, 1][:d] + 0.3
    return samples.astype(np.float32), rng.normal(size=(num_data, d)).astype(np.float32)


def values(found):
    return [estimate.value for estimate in found]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_definitions(k, seed):
    samples, data = two_sets(seed)
    expected = by_definition(samples, data, k)
    assert 0 < min(expected[0], expected[1], expected[3]) < 1
    found = evaluation.prdc(samples, data, num_neighbors=k)
    np.testing.assert_allclose(values(found), expected, atol=1e-12)


def test_more_than_a_block_and_points_of_any_shape():
    samples, data = two_sets(2, num_samples=1300, num_data=1100)
    found = evaluation.prdc(samples.reshape(-1, 2, 2), data.reshape(-1, 2, 2))
    np.testing.assert_allclose(values(found), by_definition(samples, data, 5), atol=1e-12)


def test_against_the_published_package():
    prdc = pytest.importorskip("prdc")
    samples, data = two_sets(3)
    expected = prdc.compute_prdc(real_features=data, fake_features=samples, nearest_k=5)
    found = evaluation.prdc(samples, data)._asdict()
    for name, estimate in found.items():
        np.testing.assert_allclose(estimate.value, expected[name], atol=1e-12, err_msg=name)


def test_a_copy_of_the_data_is_inside_however_far_from_the_origin():
    _, data = two_sets(4)
    copies = np.concatenate([data[:40], data[:40]]) + 1e3  # every ball of a sample has radius 0
    found = evaluation.prdc(copies, data + 1e3, num_neighbors=1)
    assert found.precision.value == 1
    np.testing.assert_allclose(found.recall.value, 40 / 200)


def test_a_point_on_the_surface_is_inside():
    # The k-th neighbour of a real point, as a sample, is at the radius to the last bit.
    _, data = two_sets(5, num_data=64)
    data = data + 7.0
    own = np.linalg.norm(data[:, None] - data, axis=-1) + np.diag(np.full(64, np.inf))
    neighbors = np.argsort(own, axis=1)[:, 2]
    found = evaluation.prdc(data[neighbors], data, num_neighbors=3)
    assert found.coverage.value == 1
    assert found.density.value >= 1


def test_two_samples_of_one_law():
    rng = np.random.default_rng(6)
    samples, data = rng.normal(size=(2, 1500, 3)).astype(np.float32)
    found = evaluation.prdc(samples, data)
    coverage = evaluation.expected_coverage(1500, 1500, num_neighbors=5)
    # Neighbouring balls share samples: a little more spread than of independent ones.
    assert abs(found.coverage.value - coverage) < 4 * found.coverage.stderr
    assert abs(found.density.value - 1) < 4 * found.density.stderr


@pytest.mark.parametrize(("num_samples", "num_data", "k"), [(60, 40, 3), (30, 80, 1)])
def test_expected_coverage(num_samples, num_data, k):
    rng = np.random.default_rng(7)
    found = []
    for _ in range(150):
        pair = rng.normal(size=(num_samples, 2)), rng.normal(size=(num_data, 2))
        found.append(by_definition(*pair, k)[3])
    expected = evaluation.expected_coverage(num_samples, num_data, num_neighbors=k)
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(150)


def test_collapse_and_invention_are_told_apart():
    rng = np.random.default_rng(8)
    data = rng.normal(size=(400, 3)).astype(np.float32)
    collapsed = (0.05 * rng.normal(size=(400, 3))).astype(np.float32)
    inventive = (6 * rng.normal(size=(400, 3))).astype(np.float32)
    one, other = evaluation.prdc(collapsed, data), evaluation.prdc(inventive, data)
    assert one.precision.value > 0.95 > 0.2 > one.coverage.value
    assert other.precision.value < 0.5 < 0.9 < other.recall.value


def test_an_outlier_widens_precision_not_density():
    rng = np.random.default_rng(9)
    data = rng.normal(size=(300, 2)).astype(np.float32)
    data[0] = [60.0, 0.0]
    samples = rng.normal((45, 0), size=(300, 2)).astype(np.float32)
    found = evaluation.prdc(samples, data)
    assert found.precision.value == 1
    assert found.density.value == pytest.approx(0.2)


def test_standard_errors_are_those_of_a_mean():
    samples, data = two_sets(10)
    found = evaluation.prdc(samples, data)
    p = found.precision.value
    np.testing.assert_allclose(found.precision.stderr, np.sqrt(p * (1 - p) / 149), rtol=1e-12)


def test_double_precision(x64):
    samples, data = (points.astype(np.float64) for points in two_sets(11))
    found = evaluation.prdc(samples, data)
    np.testing.assert_allclose(values(found), by_definition(samples, data, 5), atol=1e-12)


def test_bad_sets_are_refused():
    samples, data = two_sets(12)
    with pytest.raises(ValueError, match=r"shape \(3,\).*same network"):
        evaluation.prdc(samples[:, :3], data)
    with pytest.raises(ValueError, match="more than 5 points in `features`, which has 5"):
        evaluation.prdc(samples[:5], data)
    with pytest.raises(TypeError, match="uint8"):
        evaluation.prdc(samples.astype(np.uint8), data)
    with pytest.raises(ValueError, match="num_neighbors=0"):
        evaluation.prdc(samples, data, num_neighbors=0)
    data[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"reference.*1 of 200 rows, row 2"):
        evaluation.prdc(samples, data)
