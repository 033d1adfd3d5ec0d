import jax
import numpy as np
import pytest
from scipy import stats

from mmh_jax.data.manifolds import (
    AffineMixture,
    affine_mixture,
    gaussian,
    laplace,
    uniform,
    von_mises_toy,
)

LATENTS = {"uniform": uniform, "gaussian": gaussian, "laplace": laplace}


NUM = 60_000

# One compiled program for each latent law, rather than one for each operation and shape.
make = jax.jit(affine_mixture, static_argnums=(0, 1), static_argnames=("latent", "separation"))
draw = jax.jit(lambda mixture, key: mixture.sample(NUM, key=key))


@pytest.fixture(scope="module", params=LATENTS)
def mixture(request) -> AffineMixture:
    return make((2, 4, 8), 10, key=jax.random.key(0), latent=LATENTS[request.param])


@pytest.fixture(scope="module")
def sample(mixture):
    return jax.tree.map(np.asarray, draw(mixture, jax.random.key(1)))


def rank(points: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(points - points.mean(0), tol=1e-3 * len(points) ** 0.5))


@pytest.mark.parametrize("in_standard_units", [False, True])
def test_each_piece_has_its_dimension(mixture, sample, in_standard_units):
    if in_standard_units:
        sample = jax.tree.map(np.asarray, draw(mixture.standardized(), jax.random.key(1)))
    points, lid, component = sample
    assert np.isin(component, [0, 1, 2]).all()
    for k, dim in enumerate((2, 4, 8)):
        assert set(lid[component == k]) == {dim}
        assert rank(points[component == k][:1000]) == dim


def test_pieces_are_equally_likely(sample):
    counts = np.bincount(sample.component)
    assert np.abs(counts - NUM / 3).max() < 4 * (NUM * 2 / 9) ** 0.5


def test_frames_are_orthonormal_and_modes_ten_apart(mixture):
    for frame in mixture.frames:
        np.testing.assert_allclose(frame.T @ frame, np.eye(frame.shape[1]), atol=1e-5)
    gaps = np.linalg.norm(mixture.modes[:, None] - mixture.modes, axis=-1)
    np.testing.assert_allclose(gaps, 10 * (1 - np.eye(3)), rtol=1e-6)
    np.testing.assert_allclose(mixture.modes[0, :2], np.array([5, -5]) / 2**0.5, rtol=1e-6)


def test_pieces_of_one_dimension_lie_in_different_directions():
    one, other = make((3, 3), 10, key=jax.random.key(0)).frames
    cosines = np.linalg.svd(np.asarray(one.T @ other), compute_uv=False)
    assert cosines.max() < 0.99


def test_frames_are_uniform_over_directions():
    """A uniform unit vector in R^4 has coordinates of mean 0 and variance 1 / 4."""
    keys = jax.random.split(jax.random.key(3), 400)
    frames = np.asarray(jax.vmap(lambda key: make((1,), 4, key=key).frames[0][:, 0])(keys))
    assert np.abs(frames.mean(0)).max() < 4 * 0.5 / 20
    np.testing.assert_allclose((frames**2).mean(0), 0.25, atol=4 * 0.22 / 20)


@pytest.mark.parametrize("latent", LATENTS.values(), ids=LATENTS)
def test_only_laplace_coordinates_are_rescaled(latent):
    mixture = make((5,), 10, key=jax.random.key(0), latent=latent)
    if latent is not laplace:
        np.testing.assert_allclose(mixture.scales, 1, rtol=1e-6)
        return
    deviations = np.asarray(draw(mixture, jax.random.key(1)).points).std(0)
    rescaled = np.asarray(mixture.scales[0] < 1)
    assert 2 <= rescaled.sum() <= 8
    np.testing.assert_allclose(deviations[rescaled], 1, rtol=0.03)
    assert deviations[~rescaled].max() < 1


def test_moments_are_exact(mixture, sample):
    error = np.asarray(mixture.std) * NUM**-0.5
    assert np.all(np.abs(sample.points.astype(float).mean(0) - mixture.mean) < 5 * error)
    np.testing.assert_allclose(sample.points.std(0), mixture.std, rtol=0.03)


def test_covariance_of_each_piece_is_that_of_its_map(mixture):
    standard = mixture.standardized()
    points, _, component = map(np.asarray, draw(standard, jax.random.key(5)))
    for k, matrix in enumerate(standard.maps):
        expected = mixture.latent.std**2 * np.asarray(matrix @ matrix.T)
        found = np.cov(points[component == k].T)
        np.testing.assert_allclose(found, expected, atol=0.05 * np.trace(expected))


def test_train_and_test_share_the_standardisation(mixture, sample):
    """The standardised law, sampled with the same key, is the standardised sample of the law."""
    standard = mixture.standardized()
    points = draw(standard, jax.random.key(1)).points
    np.testing.assert_allclose(points, (sample.points - mixture.mean) / mixture.std, atol=5e-5)
    np.testing.assert_allclose(standard.mean, 0, atol=1e-5)
    np.testing.assert_allclose(standard.std, 1, rtol=1e-5)
    by_sample = mixture.rescaled(shift=sample.points.mean(0), scale=sample.points.std(0))
    points = np.asarray(draw(by_sample, jax.random.key(1)).points, np.float64)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(points.std(0), 1, rtol=1e-4)


@pytest.mark.parametrize("name", LATENTS)
def test_latent_laws_have_the_deviation_they_claim(name):
    latent = LATENTS[name]
    z = np.asarray(latent.draw(jax.random.key(0), (20_000,)), np.float64)
    law = {
        "uniform": stats.uniform(-1, 2),
        "gaussian": stats.norm(),
        "laplace": stats.laplace(),
    }[name]
    assert stats.kstest(z, law.cdf).pvalue > 1e-3
    assert latent.std == pytest.approx(law.std())


def test_an_atom_is_a_piece_of_dimension_zero():
    mixture = make((0, 2), 10, key=jax.random.key(0))
    points, lid, _ = map(np.asarray, draw(mixture, jax.random.key(1)))
    np.testing.assert_array_equal(points[lid == 0].min(0), mixture.modes[0])
    np.testing.assert_array_equal(points[lid == 0].max(0), mixture.modes[0])
    constant = make((0, 0), 10, key=jax.random.key(0)).standardized()
    assert np.isfinite(draw(constant, jax.random.key(0)).points).all()


def test_sampling_is_pure(mixture, sample):
    np.testing.assert_array_equal(draw(mixture, jax.random.key(1)).points, sample.points)
    assert not np.allclose(draw(mixture, jax.random.key(9)).points, sample.points)
    eager = mixture.sample(NUM, key=jax.random.key(1)).points
    np.testing.assert_allclose(eager, sample.points, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "ambient_dim"),
    [((), 3), ((4,), 3), ((1, 1, 1), 2), ((-1,), 3), ((1.5,), 3), ((1,), 0)],
)
def test_impossible_mixtures_are_refused(dims, ambient_dim):
    with pytest.raises(ValueError, match="affine_mixture"):
        affine_mixture(dims, ambient_dim, key=jax.random.key(0))


def test_sample_refuses_an_impossible_number(mixture):
    with pytest.raises(ValueError, match="num=0"):
        mixture.sample(0, key=jax.random.key(0))
    with pytest.raises(TypeError, match="key"):
        mixture.sample(1, key=None)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 2.0, 30.0, 1e4])
def test_von_mises_law(kappa):
    points, lid, component = von_mises_toy(
        5000, key=jax.random.key(0), loc=0.7, kappa=kappa, num_atom=11
    )
    points = np.asarray(points, np.float64)
    np.testing.assert_array_equal(lid, [1] * 5000 + [0] * 11)
    np.testing.assert_array_equal(component, [0] * 5000 + [1] * 11)
    np.testing.assert_array_equal(points[5000:], 0)
    np.testing.assert_allclose(np.linalg.norm(points[:5000], axis=1), 1, rtol=1e-6)
    angles = np.angle(points[:5000] @ np.array([1, 1j]) * np.exp(-0.7j))
    law = stats.vonmises(kappa) if kappa else stats.uniform(-np.pi, 2 * np.pi)
    assert stats.kstest(angles, law.cdf).pvalue > 1e-3


def test_von_mises_defaults_are_the_paper_s():
    points, lid, _ = von_mises_toy(key=jax.random.key(0))
    said = von_mises_toy(100, key=jax.random.key(0), loc=0.0, kappa=2.0, num_atom=100)
    np.testing.assert_array_equal(points, said.points)
    np.testing.assert_array_equal(lid, [1] * 100 + [0] * 100)


@pytest.mark.parametrize("wrong", [{"num": -1}, {"num_atom": 1.5}, {"kappa": -1.0}])
def test_von_mises_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        von_mises_toy(**{"num": 3, **wrong}, key=jax.random.key(0))
