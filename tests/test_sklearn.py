"""The scikit-learn face and the list of methods behind it."""

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from mmh_jax import Estimate, lid
from mmh_jax.sklearn import LID

METHODS = list(lid.DATA_METHODS)
# Mean over a plane of 2 dimensions in R^4, k = 20: the counts by their own rules.
COUNTS_OTHERWISE = {"local_pca_kaiser", "local_pca_broken_stick", "local_pca_fan"}


def plane(num=400, seed=0):
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(4, 2)))[0]
    return rng.uniform(size=(num, 2)) @ frame.T


@pytest.mark.parametrize(
    "method",
    [
        "mle",
        "ess",
        *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in ("mle", "ess")),
    ],
)
def test_scikit_learns_own_checks(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small samples: fewer neighbours are taken
        check_estimator(LID(method=method))


def test_scikit_learns_own_checks_with_duplicates_merged():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(LID(duplicates="merge"))


@pytest.mark.spread(3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_plane(method):
    model = LID(method=method, num_neighbors=20).fit(plane())
    assert model.dimension_pw_.shape == model.dimension_pw_stderr_.shape == (400,)
    assert isinstance(model.dimension_, float)
    if method not in COUNTS_OTHERWISE:
        assert model.dimension_ == pytest.approx(2, abs=0.25)
        assert np.nanmean(model.dimension_pw_) == pytest.approx(2, abs=0.4)
    if method in ("mle", "two_nn", "gride", "ess", "abid", "mom", "mada"):
        assert 0 < model.dimension_stderr_ < 0.3
        assert np.all(model.dimension_pw_stderr_ > 0)


def test_the_numbers_are_those_of_the_estimators():
    points = plane().astype(np.float32)
    neighbors = lid.nearest_neighbors(points, 20)
    model = LID().fit(points)
    expected = [lid.mle(row) for row in neighbors.distances[:5]]
    np.testing.assert_allclose(model.dimension_pw_[:5], [e.value for e in expected], rtol=1e-6)
    np.testing.assert_allclose(
        model.dimension_pw_stderr_[:5], [e.stderr for e in expected], rtol=1e-6
    )
    assert model.dimension_ == pytest.approx(float(lid.mle_mean(neighbors.distances).value))
    ratios = lid.two_nn(neighbors.distances[neighbors.indices[7]])
    found = LID(method="two_nn").fit(points)
    assert found.dimension_pw_[7] == pytest.approx(float(ratios.value), rel=1e-6)
    assert found.dimension_ == pytest.approx(float(lid.two_nn(neighbors.distances).value))
    np.testing.assert_array_equal(LID().fit_predict(points), model.dimension_pw_)


def test_the_median_leaves_out_what_is_not_finite():
    neighbors = lid.Neighbors(np.ones((4, 4)), np.zeros((4, 4), int))
    method = lid.DATA_METHODS["mom"]
    found = Estimate(np.array([1.0, 3.0, np.inf, np.nan]), np.ones(4))
    assert method.overall(neighbors, found) == (2.0, pytest.approx(1.2533 / 1.349))
    nothing = Estimate(np.full(4, np.inf), np.ones(4))
    assert np.isnan(method.overall(neighbors, nothing)).all()


def test_duplicates_are_atoms():
    points = np.concatenate([plane(200), np.ones((30, 4))])
    of_a_set = "two_nn_regression", "closed_form", "corr_int", "takens", "fisher_s", "danco"
    of_a_point = "mle", "mom", "mada", "two_nn", "tle", "ess", "abid", "local_pca"
    for method in (*of_a_point, *of_a_set):
        found = LID(method=method).fit(points).dimension_pw_
        assert np.all(found[200:] == 0), method
        # The closed form has no value where it has no plateau.
        assert np.isnan(found).mean() < (0.5 if method == "closed_form" else 1e-9), method


def test_merged_duplicates_have_the_answer_of_one_point():
    points = plane(200)
    order = np.random.default_rng(1).permutation(260)
    often = np.concatenate([points, points[:30], points[:30]])[order]
    for method in ("mle", "two_nn", "fisher_s"):
        once = LID(method=method).fit(points)
        merged = LID(method=method, duplicates="merge").fit(often)
        source = np.concatenate([np.arange(200), np.arange(30), np.arange(30)])[order]
        np.testing.assert_allclose(merged.dimension_pw_, once.dimension_pw_[source], rtol=1e-5)
        np.testing.assert_allclose(
            merged.dimension_pw_stderr_, once.dimension_pw_stderr_[source], rtol=1e-4
        )
        assert merged.dimension_ == pytest.approx(once.dimension_, rel=1e-5)
    alike = LID(duplicates="merge").fit(points)
    np.testing.assert_array_equal(alike.dimension_pw_, LID().fit(points).dimension_pw_)


def test_too_few_different_points_are_said():
    points = np.repeat(plane(10), 5, axis=0)
    with pytest.warns(UserWarning, match="num_neighbors=20 is not below the 10 points; 9 are"):
        assert LID(duplicates="merge").fit(points).num_neighbors_ == 9
    with pytest.raises(ValueError, match="n_samples=15, of which 3 differ"):
        LID(duplicates="merge").fit(points[:15])


def test_too_few_points_are_said():
    with pytest.warns(UserWarning, match="num_neighbors=20 is not below the 10 points; 9 are"):
        model = LID().fit(plane(10))
    assert model.num_neighbors_ == 9
    with pytest.raises(ValueError, match=r"needs 4 neighbours of each point.*n_samples=4"):
        LID().fit(plane(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mle2"}, "method='mle2'.*there are mle, "),
        ({"num_neighbors": 3}, "num_neighbors=3.*'mle' needs 4"),
        ({"num_neighbors": 5.0}, "num_neighbors=5.0.*integer"),
        ({"duplicates": "drop"}, "duplicates='drop'.*'atoms' or 'merge'"),
    ],
)
def test_bad_options_name_argument_and_cure(options, message):
    with pytest.raises(ValueError, match=message):
        clone(LID(**options)).fit(plane(30))
