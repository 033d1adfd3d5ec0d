"""The rules that count in spectra, and the choice of one scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import lid


def test_all_rules_find_the_dimension(plane):
    denoiser, x, _ = plane
    values = lid.jacobian_spectrum(denoiser, x, 0.05).eigenvalues
    assert lid.rank_by_threshold(values) == 3
    assert lid.rank_by_gap(values) == 3
    assert lid.rank_by_gap(values, ceiling=1.0) == 3
    np.testing.assert_allclose(lid.soft_rank(values), 3, atol=0.02)


def test_normal_bundle_counts_normals(plane):
    denoiser, x, _ = plane
    values = lid.normal_bundle_spectrum(denoiser, x, 0.05, key=jax.random.key(0))
    assert values.shape == (10,)
    assert 10 - lid.rank_by_gap(values) == 3
    assert 10 - lid.rank_by_threshold(values) == 3
    # Singular values of a (40, 7) Gaussian matrix over sqrt(40): Marchenko-Pastur's edges.
    edge = np.sqrt(7 / 40)
    assert 1 - edge - 0.15 < values[6]
    assert values[0] < 1 + edge + 0.15


def test_normal_bundle_is_centred_and_scaled_as_a_covariance():
    """A denoiser that keeps 3 of 12 coordinates, and pulls those to its mean."""
    tangent = jnp.arange(12) < 3
    gaussian = lambda x, sigma: jnp.where(tangent, x / (1 + sigma**2), 0)  # noqa: E731
    key, sigma, num = jax.random.key(0), 0.05, 48
    for offset in (0.0, 3.0, 30.0):  # far from the mean, where the mean score is large
        x = jnp.where(tangent, offset, 0.0)
        values = lid.normal_bundle_spectrum(gaussian, x, sigma, key=key, num_samples=num)
        assert 12 - lid.rank_by_threshold(values) == 3
        assert 12 - lid.rank_by_largest_difference(values) == 3
    noise = jax.vmap(lambda k: jax.random.normal(k, (12,)))(jax.random.split(key, num))
    scale = jnp.where(tangent, sigma**2 / (1 + sigma**2), 1)
    covariance = jnp.cov(np.asarray(scale * noise), rowvar=False)
    exact = jnp.sqrt(jnp.linalg.eigvalsh(covariance)[::-1])
    np.testing.assert_allclose(values[:9], exact[:9], rtol=1e-4)


def test_the_largest_difference_is_no_ratio():
    assert lid.rank_by_largest_difference(jnp.array([10.0, 3.0, 2.0, 0.2])) == 1
    batch = jnp.array([[1.0, 0.9, 0.1], [1.0, 0.2, jnp.nan]])
    np.testing.assert_array_equal(lid.rank_by_largest_difference(batch), [2, -1])


def test_gap_is_a_ratio_with_a_floor():
    # The absolute gap is largest after the first value; the ratio after the third.
    assert lid.rank_by_gap(jnp.array([10.0, 3.0, 2.0, 0.2])) == 3
    # Ratios inside the noise below the floor do not count.
    assert lid.rank_by_gap(jnp.array([1.0, 0.8, 1e-3, 1e-9])) == 2
    # No fall at all: full rank.
    assert lid.rank_by_gap(jnp.array([1.0, 0.9, 0.8])) == 3
    # Nothing near the ceiling: rank 0.
    assert lid.rank_by_gap(jnp.array([0.02, 0.015, 0.0]), ceiling=1.0) == 0
    # A ceiling between integers.
    assert lid.rank_by_gap(jnp.array([1, 1, 0]), ceiling=0.5) == 2
    # Negative values, above-ceiling values and batches.
    batch = jnp.array([[1.2, 0.9, -0.3], [0.5, 0.001, -0.2]])
    np.testing.assert_array_equal(lid.rank_by_gap(batch, ceiling=1.0), [2, 1])


def test_soft_rank_is_smooth_and_near_the_count():
    values = jnp.array([1.0, 0.95, 0.02, 0.0])
    np.testing.assert_allclose(lid.soft_rank(values), 2, atol=0.02)
    gradient = jax.grad(lid.soft_rank)(values)
    assert jnp.all(jnp.isfinite(gradient))
    # At |1 - l| = width an eigenvalue counts one half.
    np.testing.assert_allclose(lid.soft_rank(jnp.array([0.7]), width=0.3), 0.5, rtol=1e-6)


def test_normal_bundle_refuses_too_few_samples(plane):
    denoiser, x, _ = plane
    with pytest.raises(ValueError, match="exceed the dimension"):
        lid.normal_bundle_spectrum(denoiser, x, 0.05, key=jax.random.key(0), num_samples=10)
    with pytest.raises(TypeError, match="needs a key"):
        lid.normal_bundle_spectrum(denoiser, x, 0.05, key=None)


def test_scale_is_where_the_curve_is_flat():
    sigmas = np.geomspace(1e-3, 1, 13)
    true = np.array([[2.0], [5.0]])
    curves = true * (1 - sigmas**2) + 0.1 * (1e-3 / sigmas) ** 2 * true
    index = lid.choose_scale(sigmas, curves)
    slope = lid.relative_slope(sigmas, curves)
    assert index == np.argmin(slope)
    # F = d (1 - s^2 + c/s^2): the slope vanishes where s^4 = c... here s = (1e-7)^(1/4) = .018.
    assert 0.009 < sigmas[index] < 0.036
    np.testing.assert_allclose(curves[:, index], true[:, 0], rtol=1e-2)


def test_scale_passes_over_a_network_that_returns_its_input():
    sigmas = np.geomspace(1e-3, 1, 7)
    untrained = np.array([[10.0, 10.0, 10.0, 6.0, 5.0, 4.8, 4.0]])
    assert lid.choose_scale(sigmas, untrained) == 1
    assert lid.choose_scale(sigmas, untrained, ambient_dim=10) == 5
    # Data that do fill the space are flat at D everywhere, and that is an answer.
    full = np.array([[10.0, 10.0, 10.0, 10.0, 9.9, 9.8, 9.7]])
    assert lid.choose_scale(sigmas, full, ambient_dim=10) == 1


def test_scale_never_at_the_ends_and_never_on_rubbish():
    sigmas = np.array([0.1, 0.2, 0.4, 0.8])
    flat_at_the_end = np.array([[1.0, 2.0, 2.5, 2.5]])
    assert lid.choose_scale(sigmas, flat_at_the_end) == 2
    broken = np.array([[1.0, np.nan, 2.0, 2.0, 2.0]])
    assert lid.choose_scale(np.geomspace(0.1, 1, 5), broken) == 3
    with pytest.raises(ValueError, match="positive mean"):
        lid.choose_scale(sigmas, -np.ones((2, 4)))
    with pytest.raises(ValueError, match="increasing"):
        lid.choose_scale(sigmas[::-1], np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least 3"):
        lid.choose_scale(sigmas[:2], np.ones((2, 2)))
