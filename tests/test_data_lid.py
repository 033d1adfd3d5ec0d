"""Estimators that read one neighbourhood: exact laws, invariances, failures, scikit-dimension."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ball, manifolds_of_three, many

from mmh_jax.lid import local_pca, mle, nearest_neighbors, participation_ratio, radii
from mmh_jax.lid.angles import abid, ess, expected_skewness, simplex_skewness
from mmh_jax.lid.tle import _radius, tle

NUM_DRAWS = 4_000
OF_OFFSETS = {"ess": ess, "abid": abid, "tle": tle}
OF_DISTANCES = {"mom": radii.mom, "mada": radii.mada}


def ball_radii(dim, num_neighbors, num=NUM_DRAWS):
    """Distances to the neighbours in the exact law: r^d is uniform, the k-th at the boundary."""
    uniform = np.random.default_rng(0).uniform(size=(num, num_neighbors))
    return np.sort(uniform ** (1 / dim), axis=1)


@pytest.mark.parametrize("dim", [1, 5, 30])
@pytest.mark.parametrize("name", OF_DISTANCES)
def test_in_the_exact_law_the_value_and_the_error_are_right(name, dim, x64):
    k = 50
    value, stderr = many(OF_DISTANCES[name], ball_radii(dim, k))
    # What is left of the bias is of second order; of MADA of first: log 2 for psi(50) - psi(25).
    bias = {"mom": 0.01, "mada": 0.05}[name]
    assert value.mean() == pytest.approx(dim, rel=bias)
    relative = value.std() / dim
    assert np.median(stderr) / dim == pytest.approx(relative, rel=0.15)
    covered = np.mean(np.abs(value - dim) < 1.96 * stderr)
    assert 0.92 < covered < 0.97


def test_the_bias_that_mom_takes_off(x64):
    distances = ball_radii(8, 20, num=20_000)
    raw = many(functools.partial(radii.mom, unbiased=False), distances).value.mean()
    clean = many(radii.mom, distances).value.mean()
    assert raw - 8 == pytest.approx(8 * 9 / (10 * 19), rel=0.2)
    assert abs(clean - 8) < 0.2 * (raw - 8)


@pytest.mark.parametrize("dim", [1, 4, 40])
@pytest.mark.parametrize(("inner", "outer"), [(1, 2), (2, 4), (3, 11)])
def test_ratios_in_the_exact_law(dim, inner, outer, x64):
    volumes = np.random.default_rng(0).exponential(size=(200, 100, outer)).cumsum(axis=-1)
    find = functools.partial(radii.gride, inner=inner, outer=outer)
    value, stderr = many(find, volumes ** (1 / dim))
    assert abs(value.mean() - dim) < 4 * value.std() / 200**0.5 + 0.01 * dim * (inner > 1)
    assert np.mean(stderr) == pytest.approx(value.std(), rel=0.2)


def test_gride_is_the_root_of_its_score(x64):
    volumes = np.random.default_rng(1).exponential(size=(50, 6)).cumsum(axis=-1)
    distances = volumes ** (1 / 3)
    value, stderr = radii.gride(distances, inner=2, outer=5)
    logs = jnp.log(distances[:, 4] / distances[:, 1])

    def log_likelihood(dim):
        density = 2 * jnp.log(jnp.expm1(dim * logs)) - (4 * dim + 1) * logs
        return 49 * jnp.log(dim) + jnp.sum(density)

    assert float(jax.grad(log_likelihood)(value)) == pytest.approx(0, abs=1e-6)
    # The error counts all points.
    information = -jax.grad(jax.grad(log_likelihood))(value) + 1 / value**2
    assert float(stderr) == pytest.approx(float(information) ** -0.5, rel=1e-6)


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.5])
def test_two_nn_is_unbiased_however_much_is_censored(discard, x64):
    volumes = np.random.default_rng(0).exponential(size=(2_000, 40, 2)).cumsum(axis=-1)
    distances = volumes ** (1 / 7)
    value, stderr = many(functools.partial(radii.two_nn, discard=discard), distances)
    assert abs(value.mean() - 7) < 4 * value.std() / 2_000**0.5
    assert np.mean(stderr) == pytest.approx(value.std(), rel=0.1)
    if discard == 0:
        np.testing.assert_allclose(value, many(radii.gride, distances).value, rtol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 3, 7.5, 100, 3_000])
def test_expected_skewness(dim, x64):
    rng = np.random.default_rng(0)
    log = jax.scipy.special.gammaln
    exact = np.exp(2 * log(dim / 2) - log((dim + 1) / 2) - log(max(dim - 1, 1e-300) / 2))
    assert float(expected_skewness(dim)) == pytest.approx(float(exact), abs=1e-11)
    with jax.enable_x64(False):
        assert float(expected_skewness(float(dim))) == pytest.approx(float(exact), abs=1e-6)
    if dim in (2, 3, 100):
        first, second = rng.normal(size=(2, 20_000, int(dim)))
        cosine = np.sum(first * second, -1) / np.linalg.norm(first, axis=-1)
        sine = np.sqrt(1 - (cosine / np.linalg.norm(second, axis=-1)) ** 2)
        assert abs(sine.mean() - exact) < 4 * sine.std() / 20_000**0.5


@pytest.mark.parametrize(("dim", "ambient_dim"), [(1, 3), (2, 2), (5, 20), (30, 40)])
@pytest.mark.parametrize("name", ["ess", "abid"])
def test_directions_in_a_ball(name, dim, ambient_dim, x64):
    value, stderr = many(OF_OFFSETS[name], ball(dim, 100, num=100, ambient_dim=ambient_dim))
    assert value.mean() == pytest.approx(dim, rel=0.03)
    if dim > 1:
        # From an isotropic law every neighbour is worth the same: the jackknife is then too large.
        assert 1.0 < np.mean(stderr) / value.std() < 1.8


@pytest.mark.parametrize("name", ["ess", "abid"])
def test_the_jackknife_of_unequal_directions(name, x64):
    scales = np.array([4.0, 2.0, 1.0, 1.0])
    samples = np.random.default_rng(0).normal(size=(400, 100, 4)) * scales
    value, stderr = many(OF_OFFSETS[name], samples)
    assert np.mean(stderr) == pytest.approx(value.std(), rel=0.15)


def test_tight_estimates_are_less_noisy_than_the_likelihood(x64):
    points = ball(5, 20, num=1_000)
    distances = np.linalg.norm(points, axis=-1)
    alone = many(mle, distances).value
    together = many(tle, points)
    assert together.mean() == pytest.approx(5, rel=0.1)
    assert together.std() < 0.93 * alone.std()


def test_the_radius_of_tle_solves_its_equation(x64):
    rng = np.random.default_rng(0)
    for q, v in rng.uniform(-0.5, 0.5, size=(20, 2, 3)):
        between = np.sum((q - v) ** 2)
        rho = float(_radius(jnp.sum(q**2), jnp.sum(v**2), between))
        assert np.linalg.norm(v - q * (1 - rho)) == pytest.approx(rho, rel=1e-9)


@pytest.mark.parametrize("name", ["affine 2+5 in 8", "swiss roll", "sphere 4 in 5"])
class TestAgainstScikitDimension:
    """The same neighbourhoods; their code in float64."""

    K = 20

    @pytest.fixture
    def case(self, name, x64):
        skdim = pytest.importorskip("skdim", reason="published for Python below 3.13 only")
        points = np.asarray(manifolds_of_three()[name], np.float64)
        distances, indices = map(np.asarray, nearest_neighbors(points, self.K))
        known = {"precomputed_knn_arrays": (distances, indices)}
        return skdim.id, points, distances, points[indices] - points[:, None], known

    def test_tle(self, case):
        theirs, points, _, offsets, known = case
        found = theirs.TLE().fit(points, **known).dimension_pw_
        np.testing.assert_allclose(many(tle, offsets), found, rtol=1e-3)

    def test_ess(self, case):
        """Theirs interpolates linearly between integers, as the public R code does."""
        theirs, points, _, offsets, known = case
        found = theirs.ESS().fit(points, **known)
        skewness = np.asarray(many(simplex_skewness, offsets).value)
        np.testing.assert_allclose(skewness, found.essval_, rtol=1e-6)
        integers = np.arange(1, 60)
        linear = np.interp(skewness, expected_skewness(integers.astype(float)), integers)
        np.testing.assert_allclose(linear, found.dimension_pw_, rtol=1e-6)
        np.testing.assert_allclose(many(ess, offsets).value, linear, atol=0.25)

    def test_mada(self, case):
        theirs, points, distances, _, _ = case
        found = theirs.MADA().fit(points, n_neighbors=self.K).dimension_pw_
        np.testing.assert_allclose(many(radii.mada, distances).value, found, rtol=1e-6)

    def test_mom(self, case):
        """Theirs counts the k-th neighbour, which the ball ends at, among those inside."""
        theirs, points, distances, _, known = case
        found = theirs.MOM().fit(points, **known).dimension_pw_
        raw = many(functools.partial(radii.mom, unbiased=False), distances).value
        np.testing.assert_allclose(raw + (raw + 1) / (self.K - 1), found, rtol=1e-6)

    def test_two_nn(self, case):
        theirs, points, distances, _, _ = case
        for discard in (0.0, 0.1):
            found = theirs.TwoNN(method="mle", discard_fraction=discard).fit(points).dimension_
            assert radii.two_nn(distances, discard=discard).value == pytest.approx(found, rel=1e-6)

    def test_gride(self, case):
        """They drop ratios of at least q50 + 20 (q95 - q50)."""
        theirs, points, distances, _, _ = case
        for inner, outer in ((1, 2), (2, 4), (3, 11)):
            found = theirs.GRIDE(n1=inner, n2=outer).fit(points)
            ratios = distances[:, outer - 1] / distances[:, inner - 1]
            q50, q95 = np.percentile(ratios, [50, 95])
            kept = distances[ratios < q50 + 20 * (q95 - q50)]
            ours = radii.gride(kept, inner=inner, outer=outer)
            assert ours.value == pytest.approx(found.dimension_, rel=1e-6)
            assert ours.stderr == pytest.approx(found.error_, rel=1e-6)

    def test_local_pca(self, case):
        theirs, points, _, offsets, _ = case
        spectra = many(local_pca.local_spectrum, offsets)
        rules = {
            "FO": local_pca.fukunaga_olsen,
            "maxgap": local_pca.rank_by_ratio,
            "ratio": functools.partial(local_pca.explained_variance, fraction=0.05),
            "participation_ratio": participation_ratio,
            "Kaiser": local_pca.kaiser,
            "broken_stick": local_pca.broken_stick,
            "Fan": local_pca.fan,
            "Minka": functools.partial(
                local_pca.minka, num_samples=self.K, ambient_dim=points.shape[1]
            ),
        }
        for version, rule in rules.items():
            found = [theirs.lPCA(ver=version).fit(patch).dimension_ for patch in offsets[:40]]
            ours = many(rule, spectra[:40])
            # A flat patch in float64: the eigenvalues beyond the piece are rounding.  Theirs takes
            # the ratios of these for gaps, and (Minka) never all of the others.
            flat = np.asarray(spectra[:40, -1] < 1e-14 * spectra[:40, 0])
            compared = ~flat if version in ("maxgap", "Minka") else np.ones(40, bool)
            assert compared.any() or name_is_flat(points)
            np.testing.assert_allclose(
                ours[compared], np.array(found, float)[compared], rtol=1e-3, err_msg=version
            )


def name_is_flat(points):
    """Whether the set is a mixture of affine pieces."""
    return points.shape[1] == 8


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), exponent=st.integers(-40, 40))
def test_rotation_translation_scale_and_order_do_not_matter(seed, exponent):
    rng = np.random.default_rng(seed)
    offsets = rng.normal(size=(12, 4)).astype(np.float32) * [1, 1, 0.5, 0.01]
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    other = (offsets @ rotation)[rng.permutation(12)] * 2.0**exponent
    for name, estimator in OF_OFFSETS.items():
        found = [
            float(jax.tree.leaves(estimator(jnp.asarray(x, jnp.float32)))[0])
            for x in (offsets, other)
        ]
        assert found[1] == pytest.approx(found[0], rel=2e-3), name
    spectra = [local_pca.local_spectrum(jnp.asarray(x, jnp.float32)) for x in (offsets, other)]
    np.testing.assert_allclose(spectra[1] / 4.0**exponent, spectra[0], rtol=1e-3, atol=1e-8)
    moved = np.asarray(ess(jnp.asarray(offsets + 1, jnp.float32)).value)
    assert moved == pytest.approx(float(ess(jnp.asarray(offsets, jnp.float32)).value), rel=1e-3)


@pytest.mark.parametrize("estimator", OF_OFFSETS.values())
def test_degenerate_neighbourhoods(estimator):
    def value(offsets):
        return float(jax.tree.leaves(estimator(jnp.asarray(offsets, jnp.float32)))[0])

    assert value(np.zeros((6, 3))) == 0  # duplicates of the point
    line = np.outer(np.arange(1.0, 7.0), [1.0, 2.0, 2.0])
    if estimator is not tle:  # from k points on a line, one-sided, it has a noisy 1
        assert value(line) == pytest.approx(1, abs=1e-3)
    tiny = value(ball(3, 30)[0] * 1e-30)  # whose squares underflow
    assert tiny == pytest.approx(value(ball(3, 30)[0]), rel=1e-3)
    assert np.isnan(value(np.full((6, 3), np.nan)))
    with_nan = line.copy()
    with_nan[2, 1] = np.nan
    assert np.isnan(value(with_nan))
    with_one_duplicate = np.concatenate([np.zeros((1, 3)), ball(3, 30)[0]])
    assert 0 <= value(with_one_duplicate) < 6
    assert np.isfinite(value(np.random.default_rng(0).normal(size=(4, 50))))  # fewer than D


@pytest.mark.parametrize("estimator", OF_DISTANCES.values())
def test_degenerate_distances(estimator):
    assert estimator(jnp.array([0.0, 0.0, 0.0, 0.0])) == (0, 0)
    assert estimator(jnp.array([2.0, 2.0, 2.0, 2.0])) == (jnp.inf, jnp.inf)
    assert np.isnan(estimator(jnp.array([1.0, jnp.nan, 2.0, jnp.nan])).value)


@pytest.mark.parametrize("estimator", [radii.two_nn, radii.two_nn_regression, radii.gride])
def test_degenerate_ratios(estimator):
    distances = jnp.asarray(ball_radii(3, 2, num=20), jnp.float32)
    with_duplicates = jnp.concatenate([distances, jnp.zeros((10, 2)), jnp.array([[0.0, 1.0]])])
    np.testing.assert_allclose(estimator(with_duplicates), estimator(distances), rtol=1e-5)
    assert estimator(jnp.zeros((5, 2))) == (0, 0)
    assert estimator(jnp.ones((5, 2))) == (jnp.inf, jnp.inf)
    assert np.isnan(estimator(distances.at[3, 1].set(jnp.nan)).value)


def test_spectra_of_nothing_have_no_dimension():
    rules = [
        local_pca.fukunaga_olsen, local_pca.rank_by_ratio, local_pca.explained_variance,
        local_pca.kaiser, local_pca.broken_stick, local_pca.fan,
        functools.partial(local_pca.minka, num_samples=9, ambient_dim=5),
        functools.partial(local_pca.ca_pca, radius=1.0),
    ]  # fmt: skip
    for rule in rules:
        assert rule(jnp.zeros(5)) == 0, rule
        assert rule(jnp.full(5, jnp.nan)) == rule(jnp.array([1.0, 1, 1, 1, jnp.nan])) == -1, rule


def test_the_evidence_without_noise_is_infinite():
    spectrum = jnp.array([1.0, 0.5, 0.2, 0.0, 0.0])
    assert local_pca.minka(spectrum, num_samples=9, ambient_dim=5) == 3


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_rules_count_the_directions_of_a_thick_plane(dim):
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [rng.normal(size=(200, dim)), 0.01 * rng.normal(size=(200, 8 - dim))], 1
    )
    spectrum = local_pca.local_spectrum(jnp.asarray(points, jnp.float32))
    assert spectrum.shape == (8,)
    np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(np.cov(points.T))[::-1], rtol=1e-4)
    assert local_pca.fukunaga_olsen(spectrum) == dim
    assert local_pca.rank_by_ratio(spectrum) == dim
    assert local_pca.minka(spectrum, num_samples=200, ambient_dim=8) == dim
    assert local_pca.explained_variance(spectrum) == dim


@pytest.mark.parametrize(("k", "ambient_dim"), [(20, 100), (60, 30)])
def test_the_spectrum_keeps_small_singular_values(k, ambient_dim):
    rng = np.random.default_rng(0)
    rank = min(k - 1, ambient_dim)
    frame = np.linalg.qr(rng.normal(size=(k, rank)))[0]
    frame = np.linalg.qr(frame - frame.mean(axis=0))[0]
    scales = np.geomspace(1, 1e-4, rank)
    offsets = (frame * scales) @ np.linalg.qr(rng.normal(size=(ambient_dim, rank)))[0].T
    found = np.asarray(local_pca.local_spectrum(jnp.asarray(offsets, jnp.float32)))
    np.testing.assert_allclose(np.sqrt(found * (k - 1)), scales, atol=1e-6)


def test_the_spectrum_has_a_derivative_where_some_of_it_is_zero(x64):
    """That of its sum, the trace of the covariance."""
    offsets = jnp.asarray(ball(3, 12)[0] @ np.eye(3, 20))
    found = jax.grad(lambda x: jnp.sum(local_pca.local_spectrum(x)))(offsets)
    centred = offsets - offsets.mean(axis=0)
    np.testing.assert_allclose(found, 2 * centred / 11, atol=1e-9)


@pytest.mark.parametrize("radius", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dim", [1, 4, 20])
def test_ca_pca_knows_the_spectrum_of_a_ball(dim, radius, x64):
    # Where not all directions are tangent, the others hold what curvature took from these.
    for normal in (0.0, 0.01):
        flat = jnp.full(dim, 1 / (dim + 2) - normal * (3 * dim + 4) / (dim * (dim + 4)))
        spectrum = radius**2 * jnp.concatenate([flat, jnp.array([normal, 0.0, 0.0])])
        assert local_pca.ca_pca(spectrum, radius=radius) == dim


def test_ca_pca_is_its_formula(x64):
    rng = np.random.default_rng(0)
    for _ in range(20):
        spectrum, radius = np.sort(rng.exponential(size=12) ** 2)[::-1], rng.uniform(0.5, 6)
        scores = []
        for d in range(1, 13):
            inside, beyond = spectrum[:d] / radius**2, sum(spectrum[d:]) / radius**2
            ball = inside + (3 * d + 4) / (d * (d + 4)) * beyond - 1 / (d + 2)
            scores.append(sum(ball**2) ** 0.5 + 2 * beyond)
        assert local_pca.ca_pca(jnp.asarray(spectrum), radius=radius) == 1 + np.argmin(scores)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_ca_pca_of_a_curved_sheet(dim):
    """The graph of |x|^2 in a unit ball: nine tenths of the variance are not in d directions."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, size=(200_000, dim))
    height = np.sum(x**2, axis=1)
    area = np.sqrt(1 + 4 * height)  # |det| of the chart
    kept = (height + height**2 < 1) & (rng.uniform(size=len(x)) * 5**0.5 < area)
    sheet = np.concatenate([x, height[:, None], np.zeros((len(x), 2))], axis=1)[kept]
    spectrum = jnp.asarray(np.linalg.eigvalsh(np.cov(sheet.T))[::-1].clip(0), jnp.float32)
    assert local_pca.ca_pca(spectrum, radius=1.0) == dim


@pytest.mark.parametrize("estimator", [ess, abid])
def test_gradients_also_at_duplicates(estimator, x64):
    offsets = jnp.asarray(ball(3, 12)[0])
    value = lambda x: estimator(x).value  # noqa: E731
    gradient = jax.grad(value)(offsets)
    step = 1e-6 * np.random.default_rng(1).normal(size=offsets.shape)
    difference = (value(offsets + step) - value(offsets - step)) / 2
    assert float(jnp.sum(gradient * step)) == pytest.approx(float(difference), rel=1e-5)
    assert np.isfinite(jax.grad(value)(offsets.at[:2].set(0))).all()


def test_errors_name_argument_and_fault():
    with pytest.raises(ValueError, match=r"`ess\(offsets=.*shape \(2, 3\).*at least 3"):
        ess(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"`tle\(offsets=.*int32"):
        tle(jnp.ones((5, 3), int))
    with pytest.raises(ValueError, match=r"`mom\(distances=.*shape \(2,\).*at least 3"):
        radii.mom(jnp.ones(2))
    with pytest.raises(ValueError, match=r"`gride\(inner=3, outer=2\)`"):
        radii.gride(jnp.ones((4, 5)), inner=3, outer=2)
    with pytest.raises(ValueError, match=r"`two_nn\(discard=0.9\)`.*of the 5 points"):
        radii.two_nn(jnp.ones((5, 2)), discard=0.9)
    with pytest.raises(ValueError, match=r"`kaiser\(spectrum=.*shape \(2, 3\)"):
        local_pca.kaiser(jnp.ones((2, 3)))
