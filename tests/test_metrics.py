"""Metrics against scikit-learn, their invariances, and what their intervals promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from mmh_jax.memorization import compare, detection, over_seeds


def values_of(scores, labels, **settings):
    found = detection(scores, labels, seed=0, num_resamples=100, **settings)
    return np.array([found.auroc.value, found.auprc.value, found.tpr.value])


def by_scikit_learn(scores, labels, max_fpr):
    # It refuses infinities; ranks are the same ranking.
    ranks = stats.rankdata(scores)
    fpr, tpr, _ = reference.roc_curve(labels, ranks, drop_intermediate=False)
    return np.array(
        [
            reference.roc_auc_score(labels, ranks),
            reference.average_precision_score(labels, ranks),
            tpr[fpr <= max_fpr + 1e-12].max(),
        ]
    )


@st.composite
def examples(draw):
    """Scores with ties and infinities, and labels of both kinds."""
    num = draw(st.integers(2, 60))
    score = st.one_of(
        st.integers(-3, 3).map(float),
        st.floats(-10, 10),
        st.sampled_from([np.inf, -np.inf]),
    )
    scores = np.array(draw(st.lists(score, min_size=num, max_size=num)))
    labels = np.array(draw(st.lists(st.booleans(), min_size=num, max_size=num)))
    labels[:2] = [True, False]
    return scores, labels


@settings(max_examples=150, deadline=None)
@given(examples(), st.sampled_from([0.01, 0.1, 0.5]))
def test_as_scikit_learn(example, max_fpr):
    scores, labels = example
    found = values_of(scores, labels, max_fpr=max_fpr)
    np.testing.assert_allclose(found, by_scikit_learn(scores, labels, max_fpr), atol=1e-12)


def test_as_scikit_learn_where_a_percent_is_ten_negatives():
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=1200) < 1 / 6
    scores = np.round(rng.normal(size=1200) + labels, 1)
    for max_fpr in (0.001, 0.01, 0.05):
        expected = by_scikit_learn(scores, labels, max_fpr)
        np.testing.assert_allclose(values_of(scores, labels, max_fpr=max_fpr), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(0, 1000))
def test_monotone_transforms_and_permutations_change_nothing(example, seed):
    scores, labels = example
    before = values_of(scores, labels)
    np.testing.assert_allclose(values_of(stats.rankdata(scores) ** 3, labels), before, atol=1e-12)
    order = np.random.default_rng(seed).permutation(len(scores))
    np.testing.assert_allclose(values_of(scores[order], labels[order]), before, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(examples())
def test_a_bad_score_is_not_turned_round(example):
    scores, labels = example
    assert values_of(-scores, labels)[0] == pytest.approx(1 - values_of(scores, labels)[0])


def test_a_score_that_says_nothing():
    labels = np.arange(200) < 20
    found = detection(np.zeros(200), labels, seed=0)
    assert found.auroc == (0.5, 0.5, 0.5)
    assert found.auprc.value == pytest.approx(0.1)  # the prevalence
    assert found.tpr.value == 0  # every threshold lets all through, or none
    assert (found.num_positive, found.num_negative) == (20, 180)


def test_the_resampled_metrics_are_those_of_the_resample():
    """Weights stand for examples that are drawn so often."""
    from mmh_jax.memorization import metrics

    rng = np.random.default_rng(3)
    labels = rng.uniform(size=50) < 0.4
    scores = np.round(rng.normal(size=50) + labels, 1)
    weights = metrics._resamples(labels, 5, rng)
    assert np.all(weights[:, labels].sum(axis=1) == labels.sum())
    ranking = metrics._ranking(scores)
    found = metrics._metrics(ranking, weights * labels, weights * ~labels, 0.1)
    for drawn, column in zip(weights.astype(int), found.T, strict=True):
        rows = np.repeat(np.arange(50), drawn)
        expected = by_scikit_learn(scores[rows], labels[rows], 0.1)
        np.testing.assert_allclose(column, expected, atol=1e-12)


def test_chunks_and_seeds(monkeypatch):
    labels = np.arange(40) % 3 == 0
    scores = np.random.default_rng(0).normal(size=40) + labels
    whole = detection(scores, labels, seed=1, num_resamples=200)
    assert whole == detection(scores, labels, seed=1, num_resamples=200)
    assert whole.auroc != detection(scores, labels, seed=2, num_resamples=200).auroc
    monkeypatch.setattr("mmh_jax.memorization.metrics._CHUNK", 1000)
    parts = detection(scores, labels, seed=1, num_resamples=200)
    assert parts.auroc.value == whole.auroc.value
    assert parts.auroc.low == pytest.approx(whole.auroc.low, abs=0.1)


def binormal(rng, num, shift):
    """Scores of as many memorized examples as others."""
    labels = np.arange(2 * num) < num
    return rng.normal(size=2 * num) + shift * labels, labels


@pytest.mark.parametrize("num", [60])
def test_intervals_of_auroc_cover_the_truth(num):
    rng, shift, repeats = np.random.default_rng(0), 1.0, 400
    truth = stats.norm.cdf(shift / np.sqrt(2))
    covered = 0
    for repeat in range(repeats):
        found = detection(*binormal(rng, num, shift), seed=repeat, num_resamples=400).auroc
        covered += found.low <= truth <= found.high
    # A percentile interval of 60 examples of each kind covers a little less than it says.
    assert abs(covered / repeats - 0.945) < 3 * np.sqrt(0.95 * 0.05 / repeats)


def test_comparison_under_the_null():
    """Two scores that are equally good: small p-values are as rare as they say."""
    rng, repeats = np.random.default_rng(0), 400
    p_values = []
    for repeat in range(repeats):
        shared, labels = binormal(rng, 60, 1.0)
        first, second = shared + rng.normal(size=(2, 120))
        p_values.append(compare(first, second, labels, seed=repeat, num_resamples=400).p_value)
    for level in (0.05, 0.2, 0.5):
        rate = np.mean(np.array(p_values) <= level)
        assert abs(rate - level) < 3.5 * np.sqrt(level * (1 - level) / repeats)


def test_comparison_sees_a_difference_and_pairs_examples():
    rng = np.random.default_rng(0)
    shared, labels = binormal(rng, 150, 1.0)
    better, worse = shared + 0.1 * rng.normal(size=300), shared + 0.7 * rng.normal(size=300)
    found = compare(better, worse, labels, seed=0)
    assert found.auroc.low > 0
    assert found.p_value < 0.01
    alone = [detection(scores, labels, seed=0) for scores in (better, worse)]
    assert found.auroc.value == pytest.approx(alone[0].auroc.value - alone[1].auroc.value)
    # The difference of what both have in common is known better than each of them.
    assert alone[0].auroc.low < alone[1].auroc.high
    back = compare(worse, better, labels, seed=0)
    assert back.auroc.value == pytest.approx(-found.auroc.value)
    assert back.p_value == pytest.approx(found.p_value)
    assert compare(better, better, labels, seed=0).p_value == 1


def test_over_seeds_covers():
    values = np.random.default_rng(0).normal(size=(4000, 3))
    found = [over_seeds(row) for row in values]
    covered = np.mean([abs(each.value) <= 1.959964 * each.stderr for each in found])
    assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 4000)
    assert np.isnan(over_seeds([0.9]).stderr)


@pytest.mark.parametrize(
    ("scores", "labels", "settings", "match"),
    [
        ([1.0, np.nan], [True, False], {}, "NaN"),
        ([1.0, 2.0], [True, True], {}, "some of both"),
        ([1.0, 2.0], [0, 2], {}, "not true or false"),
        ([1.0], [True, False], {}, "one score and one label"),
        ([1.0, 2.0], [True, False], {"max_fpr": 0.0}, "between 0 and 1"),
        ([1.0, 2.0], [True, False], {"num_resamples": 10}, "at least 100"),
    ],
)
def test_what_is_wrong_is_said(scores, labels, settings, match):
    with pytest.raises(ValueError, match=match):
        detection(scores, labels, seed=0, **settings)
    with pytest.raises(ValueError, match=match):
        compare(scores, scores, labels, seed=0, **settings)
