"""The scale of a basin of attraction against closed forms, and the controls of an audit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from mmh_jax import memorization as mem

KEY = jax.random.key(0)


def test_the_separation_of_two_points_is_that_of_quadrature():
    def told(sigma):
        weight = lambda z: 1 / (1 + np.exp(-(1 + 2 * sigma * z) / (2 * sigma**2)))  # noqa: E731
        return integrate.quad(lambda z: weight(z) * stats.norm.pdf(z), -9, 9)[0]

    for probability in (0.6, 0.9):
        exact = optimize.brentq(lambda s, p=probability: told(s) - p, 0.05, 20)
        pair = np.array([[0.0, 0.0], [0.0, 1.0]])
        found = mem.separation(pair, pair, key=KEY, probability=probability).scale
        np.testing.assert_allclose(found, exact, rtol=0.2)  # a mean over 64 draws


def test_separation_is_a_length_and_counts_equal_points_once():
    points = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    queries = np.concatenate([points[:5], points[:2] + 3])
    found = mem.separation(points, queries, key=KEY)
    larger = mem.separation(100 * points, 100 * queries, key=KEY)
    np.testing.assert_allclose(larger.scale, 100 * found.scale, rtol=1e-3)
    again = mem.separation(np.concatenate([points, points[:30]]), queries, key=KEY)
    np.testing.assert_array_equal(again.scale, found.scale)
    distances = np.linalg.norm(points[:, None] - queries, axis=-1)
    distances[distances == 0] = np.inf
    np.testing.assert_array_equal(found.nearest, distances.argmin(axis=0))
    np.testing.assert_allclose(found.distance, distances.min(axis=0), rtol=1e-5)


def atom_in_gaussian(weight, dim):
    """The exact denoiser of (1 - w) N(0, I) + w delta_0, and where E_z of the posterior is 1/2."""

    def log_odds(square, sigma):
        ratio = sigma**2 / (1 + sigma**2)
        constant = np.log(weight / (1 - weight)) - dim / 2 * jnp.log(ratio)
        return constant - square / (2 * sigma**2) * (1 - ratio)

    def denoiser(y, sigma):
        pi = jax.nn.sigmoid(log_odds(jnp.sum(y**2), sigma))
        return (1 - pi) * y / (1 + sigma**2)

    squares = stats.chi2(dim).ppf((np.arange(4000) + 0.5) / 4000)

    def excess(log_sigma):
        sigma = np.exp(log_sigma)
        return float(np.mean(jax.nn.sigmoid(log_odds(sigma**2 * squares, sigma)))) - 0.5

    return denoiser, np.exp(optimize.brentq(excess, -9, 2))


@pytest.mark.parametrize(("dim", "factor"), [(1, 1.45), (2, 1.32), (5, 1.16)])
def test_the_basin_of_an_exact_atom_has_the_scale_of_the_law(dim, factor):
    scales = []
    for weight in np.array([0.1, 1.0]) * (1e-5 if dim == 5 else 0.01):
        denoiser, closed = atom_in_gaussian(weight, dim)
        levels = closed * 2.0 ** np.arange(-2, 2.1, 0.25)
        ends = [
            jax.vmap(
                lambda s, d=d: mem.regeneration_distances(
                    d, jnp.zeros(dim), s, key=KEY, num_samples=1024
                )
            )(levels.astype(np.float32))
            for d in (denoiser, lambda y, s: y / (1 + s**2))
        ]
        share = mem.returned(ends[0], ends[1])
        scale = mem.basin_scale(levels, share[None], 1024)
        assert scale.low[0] < scale.value[0] < scale.high[0]
        assert scale.value[0] / closed == pytest.approx(factor, rel=0.05)
        scales.append(scale.value[0])
    slope = np.log(scales[1] / scales[0]) / np.log(10)
    assert slope == pytest.approx(1 / dim, rel=0.05)


def test_the_flat_distances_are_those_of_a_gaussian_that_was_not_told():
    flat = lambda y, s: y * jnp.array([1.0, 1.0, 0.0, 0.0])  # noqa: E731
    ends = mem.regeneration_distances(flat, jnp.zeros(4), 0.1, key=KEY, num_samples=4096)
    expected = mem.flat_distances(0.1, 2.0, 4096)
    np.testing.assert_allclose(np.sort(ends)[100:-100], expected[100:-100], rtol=0.1)
    assert mem.returned(ends, expected) < 0.02  # chance is taken out


def test_what_is_not_finite_has_not_returned():
    infinite = np.full((1, 4), np.inf)
    assert mem.returned(infinite, infinite) == 0
    assert mem.returned(np.full((1, 4), np.nan), np.ones((1, 4))) == 0
    assert mem.returned(np.zeros((1, 4)), infinite) == 1


def test_the_scale_ends_where_half_have_not_returned():
    levels = np.array([1.0, 2.0, 4.0])
    share = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0.5, 0.25, 0]])
    found = mem.basin_scale(levels, share, 16)
    np.testing.assert_allclose(found.value, [4, 2**0.5, 0, 1])
    assert found.high[0] == np.inf
    assert np.all(found.low <= found.value)


def test_verdicts_at_a_scale():
    labels = mem.basin_verdict(
        [2.0, 2.0, 2.0, 0.1, 0.1], 1.0, repeated=[0, 1, 0, 0, 1],
        discovered=[1, 1, 0, 1, 1], known=[0, 1, 1, 1, 0],
    )  # fmt: skip
    titles = [mem.Label(int(code)).title for code in labels]
    assert titles == ["OD-Mem", "DD-Mem", "undecided", "not memorized", "undecided"]


def test_controls_are_single_and_apart():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2000, 3))
    points[:400] = points[400:500].repeat(4, axis=0)
    plan = mem.plan_controls(points, seed=1)
    times = np.bincount(plan.training, minlength=2000)
    assert np.all(times[plan.held_out] == 0)
    assert len(plan.held_out) == 150  # a tenth of the 1,500 single ones
    np.testing.assert_array_equal(times[plan.planted], plan.counts)
    others = np.setdiff1d(np.arange(2000), np.concatenate([plan.held_out, plan.planted]))
    assert np.all(times[others] == 1)
    assert min(plan.held_out.min(), plan.planted.min()) >= 500
    assert set(plan.counts) == {2, 4, 8, 16, 32}
    assert plan.counts.sum() <= 0.15 * 2000
    assert len(mem.plan_controls(points, seed=1, plant=False).planted) == 0
    with pytest.raises(ValueError, match="occur once"):
        mem.plan_controls(np.repeat(points[:8], 3, axis=0), seed=0)


def test_discoveries_hold_their_rate_where_nothing_and_where_something_is_memorized():
    """200 audits of exact models: scores are the denoising losses of a mixture with atoms."""
    rng, rates, any_false = np.random.default_rng(5), [], []
    for run in range(200):
        memorized = 0 if run % 2 else 30
        scores = -rng.chisquare(8, 400)
        scores[:memorized] = -rng.chisquare(8, memorized) * 0.01
        p_values = mem.conformal_p_values(scores, -rng.chisquare(8, 500))
        found = mem.discoveries(p_values, rate=0.05)
        false = found[memorized:].sum()
        if memorized:
            assert found[:memorized].mean() > 0.8
            rates.append(false / max(found.sum(), 1))
        else:
            any_false.append(false > 0)
    assert np.mean(rates) < 0.05 + 3 * np.std(rates) / len(rates) ** 0.5
    assert np.mean(any_false) < 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5
    uniform = mem.conformal_p_values(rng.normal(size=4000), rng.normal(size=999))
    assert stats.kstest(uniform, "uniform").statistic < 0.06


def test_families_are_tested_by_themselves():
    p_values = np.array([0.012, 0.012, *np.full(98, 0.5)])
    assert not mem.discoveries(p_values).any()
    found = mem.discoveries(p_values, families=np.arange(100) >= 2)
    assert found.tolist() == [True, True, *[False] * 98]
    assert mem.discoveries([np.nan, 0.01]).tolist() == [False, True]


def test_ties_count_against_a_point_and_a_control_must_be_finite():
    assert mem.conformal_p_values([0.0, 1.0], [0.0, 0.0, 0.0]).tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="finite scores"):
        mem.conformal_p_values([0.0], [np.nan])


def test_a_dose_response_has_the_interval_of_clopper_and_pearson():
    dose = mem.dose_response(np.repeat([2, 8, 16], 5), np.arange(15) >= 6)
    assert dose.found.tolist() == [0, 4, 5]
    exact = stats.binomtest(9, 10).proportion_ci(method="exact")
    assert dose.at_least(8) == pytest.approx((9, 10, exact.low, exact.high))
    assert dose.at_least(99) == (0, 0, 0.0, 1.0)
