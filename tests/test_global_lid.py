"""Estimators that read a set as one: exact laws, invariances, failures, scikit-dimension."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import ball, manifolds_of_three, many
from scipy.special import digamma, lambertw
from sklearn.metrics import pairwise_distances

from mmh_jax import lid
from mmh_jax.lid.concentration import _von_mises
from mmh_jax.lid.danco import _between_norms

K = 10


def torus(dim, num_points, seed):
    """Uniform on a product of circles in R^{2 dim}, which has no edge."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=(num_points, dim))
    return np.stack([np.cos(angles), np.sin(angles)], -1).reshape(num_points, -1)


def corr_int(points, **options):
    distances = lid.nearest_neighbors(points, min(60, len(points) - 1)).distances
    return lid.correlation_dimension(distances, points=points, **options)


def takens(points):
    return lid.takens(lid.nearest_neighbors(points, 20).distances)


def regression(points):
    return lid.two_nn_regression(lid.nearest_neighbors(points, 2).distances)


def folded(statistics, thetas):
    """With the mean of arctan in place of the angle of the mean direction."""
    each = np.arctan(np.sum(np.sin(thetas), -1) / np.sum(np.cos(thetas), -1))
    return statistics._replace(direction=jnp.asarray(each.mean()))


@pytest.mark.parametrize("name", ["affine 2+5 in 8", "swiss roll", "sphere 4 in 5"])
class TestAgainstScikitDimension:
    """On the same points, in float64."""

    @pytest.fixture
    def case(self, name, x64):
        skdim = pytest.importorskip("skdim", reason="published for Python below 3.13 only")
        return skdim.id, np.asarray(manifolds_of_three()[name], np.float64)

    def test_two_nn_regression(self, case):
        theirs, points = case
        found = theirs.TwoNN(discard_fraction=0.1).fit(points).dimension_
        assert regression(points).value == pytest.approx(found, rel=1e-9)

    @pytest.mark.parametrize("num_neighbors", [20, 40, 299])
    def test_corr_int(self, case, num_neighbors):
        """However many neighbours are given, whatever is missing is counted."""
        theirs, points = case
        distances = lid.nearest_neighbors(points, num_neighbors).distances
        ours = lid.correlation_dimension(distances, points=points)
        assert ours.value == pytest.approx(theirs.CorrInt().fit(points).dimension_, rel=1e-9)

    def test_fisher_s(self, case):
        theirs, points = case
        found, ours = theirs.FisherS().fit(points), lid.fisher_s(points)
        np.testing.assert_allclose(ours.inseparable, found.p_alpha_, atol=1e-12)
        # Where no pair is inseparable they have NaN.
        np.testing.assert_array_equal(np.isinf(ours.curve), np.isnan(found.n_alpha_))
        known = np.isfinite(ours.curve)
        np.testing.assert_allclose(ours.curve[known], found.n_alpha_[known], rtol=1e-9)
        assert ours.value == pytest.approx(found.dimension_, rel=1e-9)
        if (found.p_alpha_ != 0).all(axis=1).any():
            each, _ = found.point_inseparability_to_pointID()
            np.testing.assert_allclose(ours.at_points, each, rtol=1e-9)
        else:  # then theirs fails: there is no alpha at which no point is separable
            with pytest.raises(ValueError, match="zero-size"):
                found.point_inseparability_to_pointID()
            assert (ours.at_points > 0).all()

    def test_danco(self, case):
        """They average arctan(sum sin / sum cos), which jumps by pi where the mean angle is right.

        The angle of the mean direction does not; folded as theirs, everything agrees.
        """
        theirs, points = case
        ours = lid.danco_statistics(points, K)
        model = theirs.DANCo(k=K, fractal=False, random_state=0)
        model._k = K
        found = model._dancoDimEstNoCalibration(points, 2 * points.shape[1] + 5)
        distances = np.asarray(lid.nearest_neighbors(points, K + 1).distances)
        ratios = distances[:, 0] / distances[:, -1]
        best, theirs_at = (model._lld(d, ratios, 300) for d in (float(ours.norm), found["dhat"]))
        # Their search tries d = 0, where their likelihood is -1e30, and may then end where it
        # began, at an integer.
        stuck = found["dhat"] % 1 == 0
        assert (
            best > theirs_at + 1 if stuck else ours.norm == pytest.approx(found["dhat"], rel=1e-4)
        )
        assert ours.concentration == pytest.approx(found["mu_tau"], rel=1e-9)
        thetas = model._angles(points, lid.nearest_neighbors(points, K).indices)
        ours = folded(ours, thetas)._replace(norm=found["dhat"])
        assert ours.direction == pytest.approx(found["mu_nu"], rel=1e-6)
        calibration = lid.danco_calibration(300, K, upto=points.shape[1], key=jax.random.key(0))
        names = {"norm": "dhat", "direction": "mu_nu", "concentration": "mu_tau"}
        rows = [
            {names[name]: float(leaf[i]) for name, leaf in calibration.statistics._asdict().items()}
            for i in range(points.shape[1])
        ]
        model.calibration_data = {
            "k": K, "N": 300, "maxdim": len(rows), "calibration_data": rows
        }  # fmt: skip
        model.fit(points)
        nearest = lid.nearest_ball(ours, calibration)
        assert nearest.value == model.dimension_
        constant = -1 - sum(1 / i for i in range(1, K))  # left out by theirs
        assert nearest.divergence.min() == pytest.approx(model.kl_divergence_ + constant, abs=1e-3)


def test_their_danco_has_no_line_in_a_plane():
    """At the ends of a curve tau is infinite, and with it their mean; ours is at most 50."""
    skdim = pytest.importorskip("skdim", reason="published for Python below 3.13 only")
    points = np.linspace(0, 1, 200)[:, None] ** 1.5 * [[1.0, 2.0, 3.0, 4.0]]
    calibration = lid.danco_calibration(200, K, upto=4, key=jax.random.key(0))
    assert lid.danco(points, calibration).value == 1
    assert np.isfinite(lid.danco_statistics(points, K).concentration)
    model = skdim.id.DANCo(k=K, fractal=False, random_state=0)
    model._k = K
    found = model._dancoDimEstNoCalibration(points, 8)
    assert not 0 < found["mu_tau"] < 1e6


@pytest.mark.parametrize(("dim", "num_points"), [(1, 60), (7, 400)])
def test_regression_in_the_exact_law(dim, num_points, x64):
    volumes = np.random.default_rng(0).exponential(size=(3_000, num_points, 2)).cumsum(axis=-1)
    value, stderr = many(lid.two_nn_regression, volumes ** (1 / dim))
    assert value.mean() == pytest.approx(dim, rel=0.03)
    assert np.mean(stderr) == pytest.approx(value.std(), rel=0.1)
    plain = many(functools.partial(lid.two_nn, discard=0.1), volumes ** (1 / dim)).value
    assert value.std() > plain.std()


@pytest.mark.parametrize("estimator", [corr_int, takens])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_error_of_the_correlation_dimension(estimator, dim, x64):
    found = [estimator(torus(dim, 400, seed)) for seed in range(60)]
    value, stderr = np.array(found).T
    assert value.mean() == pytest.approx(dim, rel=0.2)  # pairs across a circle are too near
    assert 0.7 < np.mean(stderr) / value.std() < 1.5


def test_takens_is_the_likelihood_of_all_pairs(x64):
    points = ball(3, 100)[0]
    pairs = pairwise_distances(points)[np.triu_indices(100, 1)]
    logs = np.log(0.4 / pairs[pairs < 0.4])
    for num_neighbors in (70, 99):
        distances = lid.nearest_neighbors(points, num_neighbors).distances
        value, stderr = lid.takens(distances, radius=0.4)
        assert value == pytest.approx((len(logs) - 1) / logs.sum(), rel=1e-9)
        assert stderr >= value / len(logs) ** 0.5
    complete = lid.nearest_neighbors(points, 5).distances
    radius = complete[:, -1].min()
    # The pair at the radius itself, which it is to the last bit, is not below it.
    logs = np.log(radius / pairs[pairs < radius * (1 - 1e-9)])
    assert lid.takens(complete).value == pytest.approx((len(logs) - 1) / logs.sum(), rel=1e-9)


def test_pairs_are_counted_exactly():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(700, 3)).astype(np.float32) + 100  # more than one block
    exact = pairwise_distances(points.astype(np.float64) - 100)
    radii = np.array([0.1, 0.5, 20.0])
    expected = [(np.sum(exact < r) - 700) / (700 * 699) for r in radii]
    np.testing.assert_allclose(lid.correlation_integral(points, radii), expected, rtol=1e-12)
    distances = lid.nearest_neighbors(points, 20).distances
    with pytest.raises(ValueError, match=r"at \d+ points all 20 neighbours.*pass `points=`"):
        lid.correlation_dimension(distances)
    assert np.isnan(jax.jit(lid.correlation_dimension)(distances).value)
    with pytest.raises(ValueError, match=r"takens\(radius=1\).*radius of at most 0\."):
        lid.takens(distances, radius=1.0)
    assert np.isnan(jax.jit(lid.takens)(distances, radius=1.0).value)
    few = points[:40]
    np.testing.assert_array_equal(
        lid.nearest_neighbors(few, 39).distances.argsort(), np.tile(np.arange(39), (40, 1))
    )
    np.testing.assert_allclose(
        lid.pair_distances(few), lid.nearest_neighbors(few, 39).distances, rtol=1e-5
    )


@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.98])
def test_the_inverse_of_the_inseparable_share(alpha):
    share = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.5, 1.0])
    b = -np.log(1 - alpha**2)
    exact = np.real(lambertw(b / (2 * np.pi * (share * alpha) ** 2 * (1 - alpha**2)))) / b
    found = lid.inseparable_dimension(share, alpha)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert np.isnan(lid.inseparable_dimension(0.0, alpha))  # as scikit-dimension has it
    assert np.isnan(lid.inseparable_dimension(jnp.nan, alpha))


@pytest.mark.parametrize("dim", [2, 3, 6, 10])
def test_fisher_s_on_spheres(dim):
    points = np.random.default_rng(0).normal(size=(1_000, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    frame = np.linalg.qr(np.random.default_rng(1).normal(size=(30, dim)))[0]
    found = lid.fisher_s(points @ frame.T)
    assert found.value == pytest.approx(dim, rel=0.05)
    assert 0.85 < found.alpha < 0.89
    assert np.median(found.at_points) == pytest.approx(dim, rel=0.15)
    # In blocks that do not divide the number of points.
    again = lid.fisher_s(points @ frame.T, block_size=7)
    np.testing.assert_array_equal(again.inseparable, found.inseparable)


@pytest.mark.parametrize("k", [3, 10, 60])
def test_the_divergence_of_norms(k):
    q = np.array([0.02, 0.3, 0.9, 1.0, 1.2, 4.0, 50.0])
    grid = (np.arange(400_000) + 0.5) / 400_000
    log_u = np.log(-np.expm1(np.log1p(-grid) / k))
    gap = [np.mean(np.log1p(-grid) / k - np.log(-np.expm1(x * log_u))) for x in q]
    exact = -np.log(q) - (1 - q) * (digamma(k + 1) - digamma(1)) + (k - 1) * np.array(gap)
    np.testing.assert_allclose(
        _between_norms(jnp.asarray(q, float), k), exact, rtol=3e-3, atol=2e-4
    )


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_danco_on_balls(dim):
    calibration = lid.danco_calibration(60, K, upto=12, repeats=30, key=jax.random.key(0))
    find = functools.partial(lid.danco, calibration=calibration)
    found = many(find, ball(dim, 60, num=100, ambient_dim=12, seed=1))
    assert found.value.mean() == pytest.approx(dim, rel=0.06)
    assert np.mean(found.value == dim) > (0.9 if dim < 4 else 0.5)
    assert found.fractional.mean() == pytest.approx(dim, rel=0.06)


def test_danco_of_many_points_is_that_of_few():
    """From the neighbours, or from all distances; in R^3, or padded into R^9."""
    points = ball(3, 200, seed=2)[0]
    few = jax.jit(lid.danco_statistics, static_argnums=1)(jnp.asarray(points, jnp.float32), K)
    many_points = lid.danco_statistics(points @ np.eye(3, 9), K)
    np.testing.assert_allclose(jnp.stack(few), jnp.stack(many_points), rtol=1e-4)
    small = lid.danco_calibration(200, K, upto=3, repeats=20, key=jax.random.key(0))
    big = lid.danco_calibration(300, K, upto=3, key=jax.random.key(0))
    assert big.num_points == 300
    for one, other in zip(small.statistics, big.statistics, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.25)
    assert lid.danco(ball(3, 300, seed=4)[0], big).value == 3
    again = lid.danco_calibration(300, K, upto=3, key=jax.random.key(0))
    np.testing.assert_array_equal(jnp.stack(again.statistics), jnp.stack(big.statistics))


@functools.cache
def calibration_of(num_points, upto=5):
    return lid.danco_calibration(num_points, K, upto=upto, key=jax.random.key(0))


def danco(points):
    return lid.danco(points, calibration_of(len(points))).fractional


def fisher(points):
    return lid.fisher_s(points).value


SETS = {
    "corr_int": lambda points: corr_int(points).value,
    "takens": lambda points: takens(points).value,
    "two_nn_regression": lambda points: regression(points).value,
    "fisher_s": fisher,
    "danco": danco,
}


@pytest.mark.parametrize("name", SETS)
def test_motion_scale_and_order_do_not_matter(name):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 5)) * [1, 1, 1, 0.8, 0.01]
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    other = (points @ rotation)[rng.permutation(200)]
    expected = SETS[name](points)
    for scale, shift in ((1.0, 3.0), (2.0**-40, 0.0), (2.0**40, 0.0)):
        found = SETS[name](other * scale + shift)
        assert float(found) == pytest.approx(float(expected), rel=2e-3), scale
    # A column that does not vary, and more of them than there are points.
    padded = np.concatenate([points, np.full((200, 250), 7.0)], axis=1)
    assert float(SETS[name](padded)) == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize("name", SETS)
def test_sets_with_flaws(name):
    points = ball(3, 200, ambient_dim=5)[0]
    clean = float(SETS[name](points))
    assert clean == pytest.approx(3, abs=0.6)
    outlier = np.concatenate([points, np.full((1, 5), 1e4)])
    if name == "fisher_s":  # the one component that is kept
        assert 0 < float(SETS[name](outlier)) < 1
    else:
        assert float(SETS[name](outlier)) == pytest.approx(clean, abs=0.5)
    duplicated = float(SETS[name](np.concatenate([points, points[:40]])))
    assert 0.3 * clean < duplicated < clean + 0.5
    assert float(SETS[name](np.ones((30, 5)))) == 0
    wide = np.random.default_rng(0).normal(size=(30, 100))
    found = float(SETS[name](wide))
    assert np.isnan(found) if name == "fisher_s" else found >= 5
    broken = points.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinite.*row 7"):
        SETS[name](broken)


def test_values_without_a_scale():
    lattice = jnp.ones((30, 20))
    assert lid.correlation_dimension(lattice, points=np.ones((30, 1))).value == jnp.inf
    assert lid.takens(lattice).value == 0  # no pair is nearer than the radius
    assert lid.two_nn_regression(lattice) == (jnp.inf, jnp.inf)
    assert lid.danco_statistics(np.eye(30) * 1.0, K).norm == jnp.inf
    assert lid.danco(np.eye(30) * 1.0, calibration_of(30)).value == jnp.inf
    nan = lattice.at[3, 1].set(jnp.nan)
    assert np.isnan(lid.takens(nan).value)
    assert np.isnan(jax.jit(lid.fisher_s)(jnp.ones((5, 2)).at[1, 1].set(jnp.nan)).value)
    nu, tau, used = _von_mises(jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
    assert (nu, used) == (0, True)
    assert tau == pytest.approx(50, rel=0.02)
    assert not _von_mises(jnp.array([[1.0, 0.0], [0.0, 0.0]]))[2]


def test_errors_name_argument_and_fault():
    with pytest.raises(ValueError, match=r"`two_nn_regression\(discard=0\)`.*above 0"):
        lid.two_nn_regression(jnp.ones((9, 2)), discard=0)
    with pytest.raises(ValueError, match=r"inner=3, outer=3.*1 <= inner < outer"):
        lid.correlation_dimension(jnp.ones((30, 9)), inner=3, outer=3)
    with pytest.raises(ValueError, match=r"`correlation_dimension\(distances=.*at least 20"):
        lid.correlation_dimension(jnp.ones((30, 9)))
    with pytest.raises(ValueError, match=r"has 1 points; a pair"):
        lid.correlation_integral(np.ones((1, 2)), [1.0])
    with pytest.raises(ValueError, match=r"`fisher_s\(alphas=.*between 0 and 1"):
        lid.fisher_s(jnp.ones((5, 2)), alphas=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"ascending"):
        lid.fisher_s(jnp.ones((5, 2)), alphas=(0.5, 0.4))
    with pytest.raises(ValueError, match=r"condition=1"):
        lid.fisher_s(jnp.ones((5, 2)), condition=1)
    with pytest.raises(TypeError, match=r"`fisher_s\(offsets=|`fisher_s\(points="):
        lid.fisher_s(jnp.ones((5, 2), int))
    with pytest.raises(ValueError, match=r"is for 30 points, and there are 31"):
        lid.danco(np.ones((31, 2)), calibration_of(30))
    with pytest.raises(ValueError, match=r"num_neighbors=9.*of the 10 points|num_neighbors=9"):
        lid.danco_calibration(10, 9, upto=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"upto=0"):
        lid.danco_calibration(20, 9, upto=0, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"typed key"):
        lid.danco_calibration(20, 9, upto=1, key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match=r"inside `jit`.*at most 256"):
        jax.jit(lid.danco_statistics)(jnp.ones((300, 2)))


def test_methods_of_a_set_need_the_points():
    method = lid.DATA_METHODS["fisher_s"]
    points = ball(2, 60)[0]
    neighbors = lid.nearest_neighbors(points, 20)
    found = method.at_points(points, neighbors)
    with pytest.raises(ValueError, match=r"overall\(points=None\)"):
        method.overall(neighbors, found)
    whole = method.overall(neighbors, found, points)
    assert whole.value == pytest.approx(float(lid.fisher_s(points).value), rel=1e-6)
    at_7 = lid.fisher_s(points[neighbors.indices[7]]).value
    assert found.value[7] == pytest.approx(float(at_7), rel=1e-5)


def test_danco_goes_as_far_as_the_data(monkeypatch):
    """In the list, the calibration is extended until the value is inside it."""
    methods = sys.modules["mmh_jax.lid.methods"]
    real, asked = methods.danco_calibration, []

    def spy(*args, upto, **options):
        asked.append(upto)
        return real(*args, upto=upto, **options)

    monkeypatch.setattr(methods, "danco_calibration", spy)
    methods._ball_statistics.cache_clear()
    points = np.random.default_rng(0).normal(size=(80, 40))
    neighbors = lid.nearest_neighbors(points, 12)
    value = methods._danco_of_all(points, neighbors).value
    assert 20 < value <= 40
    assert asked == sorted(asked)
    assert value < asked[-1] or asked[-1] == 40
