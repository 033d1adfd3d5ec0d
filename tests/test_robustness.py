"""Every estimator of data on data that are not as they should be: a documented answer, no NaN.

0 is the answer at atoms, points with an exact duplicate, and where the exceptions below say so.
"""

import numpy as np
import pytest

from mmh_jax import lid

RNG = np.random.default_rng(0)


def plane(num=120):
    frame = np.linalg.qr(RNG.normal(size=(8, 3)))[0]
    return (RNG.normal(size=(num, 3)) @ frame.T).astype(np.float32)


def changed(index, values):
    points = plane()
    points[index] = values if not callable(values) else values(points)
    return points


GRID = np.stack(np.meshgrid(*[np.arange(8.0)] * 2), -1).reshape(-1, 2).astype(np.float32)
SETS = {
    "30% duplicates": changed(slice(84, 120), lambda points: points[:36]),
    "one far outlier": changed(7, 1e6),
    "zero distances in float32": changed(slice(10, 20), lambda p: p[10] + np.float32(1e-30)),
    "constant columns": np.concatenate([plane(), np.full((120, 2), 3, np.float32)], axis=1),
    "more coordinates than points": RNG.normal(size=(60, 300)).astype(np.float32),
    "one point": np.ones((60, 4), np.float32),
    "a lattice": GRID,
    "tiny": 1e-25 * plane(),
    "huge": 1e25 * plane(),
}
DEFAULT = ("30% duplicates", "one far outlier", "zero distances in float32", "tiny")
# Where an answer of 0, or an infinite one, is what the documentation says.
ZERO = {
    ("local_pca_broken_stick", "more coordinates than points"),  # no direction stands out
    ("local_pca_broken_stick", "a lattice"),
    ("corr_int", "zero distances in float32"),  # half of the neighbours are one point
    ("takens", "zero distances in float32"),
}
INFINITE = {
    ("two_nn", "30% duplicates"),  # the nearest two are one point
    ("two_nn_regression", "30% duplicates"),
    ("two_nn", "a lattice"),  # equal distances
    ("two_nn_regression", "a lattice"),
    ("gride", "a lattice"),
    ("corr_int", "a lattice"),
    ("corr_int", "zero distances in float32"),
    ("mada", "one far outlier"),  # at the outlier all distances round to one number
    ("fisher_s", "more coordinates than points"),  # all are separable
}


@pytest.mark.spread(5)
@pytest.mark.parametrize("method", lid.DATA_METHODS)
@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in SETS]
)
def test_a_documented_answer_at_every_point(name, method):
    points = SETS[name]
    neighbors = lid.nearest_neighbors(points, 20)
    found = lid.DATA_METHODS[method].at_points(points, neighbors)
    value, stderr = np.asarray(found.value, float), np.asarray(found.stderr, float)
    assert not np.isnan(value).any()
    assert np.all(value >= 0)
    is_atom = neighbors.distances[:, 0] == 0
    if (method, name) not in ZERO:
        assert np.all(value[~is_atom] > 0)
    if (method, name) not in INFINITE:
        assert np.isfinite(value).all()
    known = ~np.isnan(stderr)
    assert known.all() or not known.any()  # NaN says that there is no theory
    overall = lid.DATA_METHODS[method].overall(neighbors, found, points)
    assert not np.isnan(overall.value)
    if name == "one point":
        np.testing.assert_array_equal(value, 0)
        assert overall.value == 0


@pytest.mark.parametrize("method", ["mle", "mom", "two_nn", "ess", "local_pca", "tle", "abid"])
def test_a_far_outlier_leaves_the_others_alone(method):
    points = SETS["one far outlier"]
    others = np.delete(points, 7, axis=0)
    found, clean = (
        lid.DATA_METHODS[method].at_points(x, lid.nearest_neighbors(x, 20)).value
        for x in (points, others)
    )
    np.testing.assert_allclose(np.delete(found, 7), clean, rtol=2e-3)


def test_rows_with_nan_and_too_many_neighbours_are_refused():
    points = plane()
    points[[3, 9], 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite values in 2 of 120 rows, row 3"):
        lid.nearest_neighbors(points, 20)
    with pytest.raises(ValueError, match="exceeds the 119 points"):
        lid.nearest_neighbors(plane(), 120)


@pytest.mark.parametrize("method", ["local_pca", "local_pca_minka", "ca_pca", "ess", "tle"])
def test_a_neighbourhood_with_nan_has_no_dimension(method):
    """Points that were not searched here, and so not checked."""
    points = plane()
    neighbors = lid.nearest_neighbors(points, 10)
    points[neighbors.indices[5, 3]] = np.nan
    value = lid.DATA_METHODS[method].at_points(points, neighbors).value
    assert np.isnan(value[5])
    assert np.isfinite(value).any()
