import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mmh_jax.data.manifolds import affine_mixture
from mmh_jax.lid.mle import mle, mle_mean
from mmh_jax.lid.neighbors import nearest_neighbors

NUM_DRAWS = 20_000
mle_many = jax.jit(jax.vmap(mle))
mle_many_biased = jax.jit(jax.vmap(lambda distances: mle(distances, unbiased=False)))


def draw_distances(dim, num_neighbors, num=NUM_DRAWS, seed=0):
    """Distances to the neighbours in the exact law: r^d is uniform."""
    uniform = np.random.default_rng(seed).uniform(size=(num, num_neighbors))
    return np.sort(uniform ** (1 / dim), axis=1).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 7, 100])
@pytest.mark.parametrize("num_neighbors", [6, 20, 100])
def test_unbiased_and_its_standard_error_calibrated(dim, num_neighbors):
    k = num_neighbors
    value, stderr = map(np.asarray, mle_many(draw_distances(dim, k)))
    theory = dim / (k - 3) ** 0.5
    assert abs(value.mean() - dim) < 4 * theory / NUM_DRAWS**0.5
    # The excess kurtosis of an inverse gamma of shape a is 6 (5a - 11) / ((a - 3)(a - 4)).
    a = k - 1
    kurtosis = 6 * (5 * a - 11) / ((a - 3) * (a - 4)) if a > 5 else 60
    assert value.std() == pytest.approx(theory, rel=2 * ((kurtosis + 2) / NUM_DRAWS) ** 0.5)
    assert stderr.mean() == pytest.approx(theory, rel=4 / (k - 3) ** 0.5 / NUM_DRAWS**0.5)
    covered = np.mean(np.abs(value - dim) < 1.96 * stderr)
    assert {6: 0.9268, 20: 0.9434, 100: 0.9488}[k] == pytest.approx(covered, abs=4 * 0.0018)


def test_maximum_likelihood_form_has_its_known_bias():
    value = np.asarray(mle_many_biased(draw_distances(5, 10)).value)
    assert abs(value.mean() - 5 * 9 / 8) < 4 * value.std() / NUM_DRAWS**0.5
    best = value[0]
    ratios = draw_distances(5, 10)[0].astype(float)
    ratios = ratios[:-1] / ratios[-1]

    def log_likelihood(dim):
        return np.sum(np.log(dim) + (dim - 1) * np.log(ratios))

    assert log_likelihood(best) > max(log_likelihood(0.999 * best), log_likelihood(1.001 * best))


def test_both_forms_have_the_same_relative_standard_error():
    distances = draw_distances(5, 10, num=10)
    biased, unbiased = mle_many_biased(distances), mle_many(distances)
    np.testing.assert_allclose(
        biased.stderr / biased.value, unbiased.stderr / unbiased.value, rtol=1e-6
    )
    np.testing.assert_allclose(unbiased.stderr / unbiased.value, 7**-0.5, rtol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mean_pools_the_likelihoods(unbiased):
    """Disjoint neighbourhoods; n = 20 * 5 makes the bias of the biased form visible."""
    distances = draw_distances(7, 6).reshape(-1, 20, 6)
    value, stderr = jax.vmap(lambda d: mle_mean(d, unbiased=unbiased))(distances)
    expected = 7 if unbiased else 7 * 100 / 99
    assert abs(value.mean() - expected) < 4 * 7 / 98**0.5 / len(distances) ** 0.5
    assert abs(value.mean() - 7 * 100 / 99 - 7 + expected) > 0.03
    np.testing.assert_allclose(stderr / value, (2 / 98) ** 0.5, rtol=1e-6)
    assert value.std() == pytest.approx(7 / 98**0.5, rel=0.1)


def test_standard_error_of_the_mean_covers_shared_distances():
    """Within one sample the neighbourhoods overlap; 60 samples on a flat torus."""
    points = np.random.default_rng(0).uniform(size=(60, 500, 2)) * 2 * np.pi
    points = np.concatenate([np.cos(points), np.sin(points)], axis=-1)
    found = [mle_mean(nearest_neighbors(sample, 10).distances) for sample in points]
    value, stderr = np.asarray(found).T
    disjoint = stderr.mean() / 2**0.5
    assert disjoint * 1.05 < value.std(ddof=1) < stderr.mean() * 1.2


def test_parity_with_scikit_dimension():
    skdim = pytest.importorskip("skdim", reason="published for Python below 3.13 only")
    mixture = affine_mixture((2, 5), 7, key=jax.random.key(0))
    points = np.asarray(mixture.sample(400, key=jax.random.key(1)).points)
    distances = nearest_neighbors(points, 20).distances
    for ours, unbiased in ((mle_many, True), (mle_many_biased, False)):
        theirs = skdim.id.MLE(unbiased=unbiased).fit(points.astype(float), n_neighbors=20)
        np.testing.assert_allclose(ours(distances).value, theirs.dimension_pw_, rtol=1e-4)
    assert mle_mean(distances, unbiased=False).value == pytest.approx(theirs.dimension_, rel=1e-4)


positive = st.floats(2**-10, 2**10, width=32)


@settings(deadline=None, max_examples=50)
@given(st.lists(positive, min_size=8, max_size=8), st.integers(-60, 60))
def test_scale_and_order_do_not_matter(distances, exponent):
    distances = np.array(distances, np.float32)
    value, stderr = mle_many(distances[None])
    for other in (distances * np.float32(2.0**exponent), distances[::-1].copy()):
        again = mle_many(other[None])
        np.testing.assert_allclose(again.value, value, rtol=1e-5)
        np.testing.assert_allclose(again.stderr, stderr, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 2**10, width=32), min_size=8, max_size=8))
def test_never_nan(distances):
    """With atoms, ties and all of them."""
    distances = np.array(distances, np.float32)
    value, stderr = mle_many(distances[None])
    if np.min(distances) < np.finfo(np.float32).tiny:  # XLA takes subnormal numbers for 0
        assert value[0] == stderr[0] == 0
    else:
        assert value[0] > 0
        assert stderr[0] > 0


def test_an_atom_has_dimension_zero_and_a_gradient():
    distances = jnp.array([0.0, 0.0, 1.0, 2.0, 3.0])
    for unbiased in (True, False):
        assert mle(distances, unbiased=unbiased) == (0, 0)
        gradients = jax.jit(jax.jacrev(lambda d, u=unbiased: mle(d, unbiased=u)))(distances)
        np.testing.assert_array_equal(gradients, 0)
    assert mle(jnp.zeros(4)) == (0, 0)
    np.testing.assert_array_equal(jax.grad(lambda d: mle(d).value)(jnp.zeros(4)), 0)


def test_equal_distances_say_nothing():
    assert mle(jnp.full(5, 2.0)) == (jnp.inf, jnp.inf)
    assert np.isfinite(jax.grad(lambda d: mle(d).value)(jnp.full(5, 2.0))).all()


def test_a_ratio_that_underflows_is_not_zero():
    value = mle(jnp.array([1e-37, 1e3, 2e3, 3e3])).value
    assert 0 < value < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_failure_stays_visible(bad):
    distances = jnp.array([0.5, 1.0, 2.0, 4.0, bad])
    assert np.isnan(mle(distances).value)
    assert np.isnan(mle(distances).stderr)
    assert np.isnan(mle_mean(distances[None]).value)


def test_mean_leaves_atoms_out():
    distances = draw_distances(3, 10, num=50)
    with_atoms = np.concatenate([distances, distances])
    with_atoms[50:, 0] = 0
    np.testing.assert_allclose(mle_mean(with_atoms), mle_mean(distances), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda d: mle_mean(d).value))(with_atoms)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:50]).min() > 0
    assert mle_mean(jnp.zeros((3, 4))) == (0, 0)
    assert mle_mean(jnp.ones((3, 4))) == (jnp.inf, jnp.inf)


def test_gradient():
    distances = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    check_grads(lambda d: mle(d).value, (distances,), order=1, rtol=1e-2)


def test_float64():
    distances = draw_distances(30, 12, num=3).astype(np.float64)
    total = np.log(distances[:, -1:] / distances).sum(1)
    with jax.enable_x64(True):
        value = jax.jit(jax.vmap(mle))(distances).value
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, 10 / total, rtol=1e-13)
    assert mle_many(distances.astype(np.float32)).value.dtype == np.float32


def test_errors_name_argument_fault_and_cure():
    with pytest.raises(TypeError, match=r"distances=.*int32"):
        mle(jnp.arange(5))
    with pytest.raises(ValueError, match=r"shape \(3, 5\).*jax.vmap"):
        mle(jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"shape \(3,\).*more neighbours"):
        mle(jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(5,\).*one in each row"):
        mle_mean(jnp.ones(5))
    with pytest.raises(ValueError, match=r"shape \(0, 5\)"):
        mle_mean(jnp.ones((0, 5)))
