"""The spectrum of a Jacobian, the dimensions read from it, and the error it admits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid, linalg, mapping


def test_jacobian_spectrum_is_the_shrinkage_of_each_direction(plane):
    denoiser, x, variances = plane
    spectrum = lid.jacobian_spectrum(denoiser, x, 0.3)
    expected = jnp.sort(variances / (variances + 0.09))[::-1]
    np.testing.assert_allclose(spectrum.eigenvalues[:3], expected, rtol=1e-10)
    np.testing.assert_allclose(spectrum.eigenvalues[3:], 0, atol=1e-12)
    flipd = lid.flipd(denoiser, x, 0.3).value
    np.testing.assert_allclose(spectrum.flipd, flipd, rtol=1e-10)
    np.testing.assert_allclose(spectrum.projected_flipd, flipd, rtol=1e-10)


def test_projected_flipd_drops_negative_eigenvalues():
    spectrum = lid.Spectrum(
        jnp.array([[1.0, 0.5, -0.25]]), jnp.array([0.5]), jnp.zeros(1), jnp.zeros(1)
    )
    np.testing.assert_allclose(spectrum.flipd, [1.75])
    np.testing.assert_allclose(spectrum.projected_flipd, [2.0])


def test_thresholded_flipd_is_the_trace_above_the_noise(x64):
    matrix = jnp.diag(jnp.array([1.0, 0.5, 0.2, 0.1, -0.3]))

    def denoiser(y, sigma):
        return matrix @ y

    trace = linalg.positive_exact(above_noise=True)
    spectrum = lid.jacobian_spectrum(denoiser, jnp.zeros(5), 0.1)
    np.testing.assert_allclose(spectrum.thresholded_flipd, 1.5)
    np.testing.assert_allclose(
        lid.flipd(denoiser, jnp.zeros(5), 0.1, trace=trace).value, spectrum.thresholded_flipd
    )
    batch = lid.Spectrum(
        jnp.stack([spectrum.eigenvalues, jnp.ones(5)]), jnp.zeros(2), jnp.zeros(2), jnp.zeros(2)
    )
    np.testing.assert_allclose(batch.thresholded_flipd, [1.5, 5])


def test_tangential_flipd_is_its_closed_form(plane):
    denoiser, x, variances = plane
    sigma = 0.4  # wider than none of the scales, but not by much
    gain = variances / (variances + sigma**2)
    along = jnp.array([0.1, -0.5, 1.0]) * (1 - gain) / sigma
    smooth = 3 * gain**2 - 2 * gain**3
    expected = jnp.sum(gain) + jnp.sum((smooth * along) ** 2)
    spectrum = lid.jacobian_spectrum(denoiser, x, sigma)
    np.testing.assert_allclose(spectrum.tangential_flipd, expected, rtol=1e-10)
    # At a scale in between, what is narrower is left out.
    narrow = lid.jacobian_spectrum(denoiser, x, 0.7)
    gain = variances[1:] / (variances[1:] + 0.49)
    kept = narrow.tangential_flipd - narrow.tangential_residual
    np.testing.assert_allclose(kept, jnp.sum(gain), rtol=1e-10)


def test_expected_flipd_is_the_mean_of_flipd_over_points(plane):
    denoiser, x, variances = plane
    gain = variances / (variances + 0.16)
    found = lid.jacobian_spectrum(denoiser, x, 0.4).expected_flipd
    np.testing.assert_allclose(found, 3 - jnp.sum((1 - gain) ** 2), rtol=1e-10)
    basis = jnp.linalg.svd(jax.jacobian(lambda y: denoiser(y, 0.4))(x))[0][:, :3]
    scales = jnp.sqrt(variances[::-1])
    model = analytic.LinearGaussian(jnp.zeros(10), basis, scales)
    points = model.sample(20_000, key=jax.random.key(0))
    values = np.asarray(jax.vmap(lambda y: lid.flipd(denoiser, y, 0.4).value)(points))
    assert abs(values.mean() - found) < 4 * values.std() / 20_000**0.5
    # Of a direction narrower than sigma nothing is left.
    narrow = lid.jacobian_spectrum(denoiser, x, 0.7)
    gain = variances[1:] / (variances[1:] + 0.49)
    np.testing.assert_allclose(narrow.expected_flipd, jnp.sum(gain * (2 - gain)), rtol=1e-10)


def test_expected_flipd_has_a_bias_of_second_order(x64):
    gaussian = analytic.LinearGaussian(jnp.zeros(6), jnp.eye(6)[:, :4], jnp.full(4, 2.0))
    for sigma, ratio in ((0.4, 16), (0.2, 16)):
        bias = [
            4 - lid.jacobian_spectrum(gaussian, jnp.zeros(6), s).expected_flipd
            for s in (sigma, sigma / 2)
        ]
        assert bias[0] / bias[1] == pytest.approx(ratio, rel=0.1)


def test_tangential_flipd_has_the_bias_of_flipd_to_first_order(plane):
    denoiser, x, _ = plane

    def difference(sigma):
        spectrum = lid.jacobian_spectrum(denoiser, x, sigma)
        return spectrum.flipd - spectrum.tangential_flipd

    # Third order in sigma^2 here, where there is nothing normal: a factor 64 per factor 2.
    ratio = difference(0.04) / difference(0.02)
    assert 55 < ratio < 70
    # On a sphere the residual is normal, sigma^2 d^2 / 4: the bias is another, of the same order.
    sphere = analytic.Sphere(4, 1.0)
    point = jnp.zeros(5).at[0].set(1.0)
    for sigma in (0.02, 0.04):
        spectrum = lid.jacobian_spectrum(sphere, point, sigma)
        assert abs(spectrum.tangential_flipd - 4) < 8 * sigma**2


def test_distance_is_an_error_not_a_dimension(plane):
    denoiser, x, _ = plane
    normal = jnp.linalg.svd(jax.jacfwd(lambda y: denoiser(y, 0.1))(x))[0][:, -1]
    on = lid.jacobian_spectrum(denoiser, x, 0.1)
    off = lid.jacobian_spectrum(denoiser, x + 0.5 * normal, 0.1)
    np.testing.assert_allclose(off.flipd - on.flipd, 25, rtol=1e-6)
    np.testing.assert_allclose(off.tangential_flipd, on.tangential_flipd, rtol=1e-6)
    np.testing.assert_allclose(off.network_error - on.network_error, 25, rtol=1e-3)
    assert off.off_manifold
    assert not on.off_manifold


def test_points_of_a_gaussian_are_on_it_at_every_scale(x64):
    ball = analytic.LinearGaussian(jnp.zeros(8), jnp.eye(8), jnp.ones(8))
    points = jax.random.normal(jax.random.key(0), (2000, 8))
    spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None))
    for sigma in (0.1, 1.0, 3.0):
        assert jnp.mean(spectra(ball, points, sigma).off_manifold) < 0.015
    assert jnp.mean(spectra(ball, 4 * points, 1.0).off_manifold) > 0.9


@pytest.mark.parametrize(
    ("size", "dim", "entry", "largest_ratio"),
    [(60, 20, 0.01, 2), (60, 20, 0.03, 2), (100, 20, 0.03, 2), (100, 5, 0.01, 4)],
)
def test_network_error_is_the_error_of_a_noisy_projection(x64, size, dim, entry, largest_ratio):
    projection = jnp.diag(jnp.where(jnp.arange(size) < dim, 1.0, 0.0))

    def at(key):
        matrix = projection + entry * jax.random.normal(key, (size, size))
        return lid.jacobian_spectrum(lambda y, sigma: matrix @ y, jnp.zeros(size), 0.1)

    spectra = jax.lax.map(at, jax.random.split(jax.random.key(0), 400))
    error = spectra.tangential_flipd - dim
    # The trace over the tangents has variance d s^2, and d (D - d) s^2 / 2 pushes it up.
    np.testing.assert_allclose(jnp.std(error), entry * dim**0.5, rtol=0.12)
    push = dim * (size - dim) * entry**2 / 2
    np.testing.assert_allclose(jnp.mean(error), push, rtol=0.25, atol=0.15 * entry * dim**0.5)
    assert jnp.mean(jnp.abs(error) <= 1.96 * spectra.network_error) > 0.93
    # An eigenvalue of the bulk just beyond the edge is in the estimate, though not in the error:
    # most of it where the bulk is large and the tangents few.
    assert jnp.mean(spectra.network_error) < largest_ratio * jnp.sqrt(jnp.mean(error**2))
    # For thresholded FLIPD what it keeps of the bulk is part of the error, and of the estimate.
    error = spectra.thresholded_flipd - dim
    assert jnp.mean(jnp.abs(error) <= 1.96 * spectra.network_error) > 0.9


def test_the_tangential_residual_is_a_part_of_the_residual(x64):
    # Between two atoms an exact denoiser has an eigenvalue far above 1; a network's are negative.
    def atoms(y, sigma):
        return jnp.tanh(y / sigma**2)

    between = lid.jacobian_spectrum(atoms, jnp.array([0.05]), 0.3)
    assert between.eigenvalues[0] > 8
    np.testing.assert_allclose(between.tangential_residual, between.residual, rtol=1e-12)

    matrix = jnp.diag(jnp.array([3.0, 0.9, 0.4, 0.1, -0.8]))
    flawed = lid.jacobian_spectrum(lambda y, sigma: matrix @ y, jnp.ones(5), 0.1)
    normal = (1 - jnp.diag(matrix)) / 0.1
    inside = jnp.clip(jnp.diag(matrix), 0, 1)
    step = 3 * inside**2 - 2 * inside**3
    np.testing.assert_allclose(flawed.tangential_residual, jnp.sum((step * normal) ** 2))
    assert flawed.tangential_residual < flawed.residual

    data = analytic.Empirical(jax.random.normal(jax.random.key(0), (20, 5)))
    points = (data.points[:-1] + data.points[1:]) / 2
    for sigma in (0.1, 0.3, 0.5):
        spectra = mapping.over_points(lid.jacobian_spectrum, (None, 0, None))(data, points, sigma)
        assert jnp.all(spectra.tangential_residual <= spectra.residual * (1 + 1e-12))
        assert jnp.all(spectra.tangential_residual >= 0)


def test_derivatives_at_equal_eigenvalues(x64, plane):
    denoiser, x, _ = plane  # 7 eigenvalues are 0

    def tangential(y):
        return lid.jacobian_spectrum(denoiser, y, 0.7).tangential_flipd

    def along(y, direction, step=1e-5):
        return (tangential(y + step * direction) - tangential(y - step * direction)) / (2 * step)

    gradient = jax.grad(tangential)(x)
    for direction in jnp.eye(10)[:4]:
        np.testing.assert_allclose(gradient @ direction, along(x, direction), atol=1e-6)

    # A Jacobian that turns and stretches with the point, with eigenvalues in and outside [0, 1].
    mix = jax.random.normal(jax.random.key(3), (4, 4))

    def curved(y, sigma):
        return mix.T @ jnp.tanh(mix @ y) / 2 + 0.1 * jnp.sin(y[::-1])

    def readings(y):
        spectrum = lid.jacobian_spectrum(curved, y, 0.7)
        return jnp.array([spectrum.tangential_residual, spectrum.flipd, spectrum.network_error])

    point = jnp.array([0.3, -0.2, 0.5, 0.1])
    forward, reverse = jax.jacfwd(readings)(point), jax.jacrev(readings)(point)
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)
    for j, direction in enumerate(jnp.eye(4)):
        difference = (
            readings(point + 1e-5 * direction) - readings(point - 1e-5 * direction)
        ) / 2e-5
        np.testing.assert_allclose(forward[:, j], difference, rtol=1e-5, atol=1e-6)
    # Symmetric to the last bit, and flat: no skew part, no difference, and no NaN.
    errors = jax.grad(lambda y: lid.jacobian_spectrum(denoiser, y, 0.02).network_error)(x)
    assert jnp.all(jnp.isfinite(errors))


def test_the_noise_of_a_network_does_not_hide_a_distance():
    size, dim = 300, 20
    matrix = jnp.diag(jnp.where(jnp.arange(size) < dim, 1.0, 0.0))
    matrix += 0.01 * jax.random.normal(jax.random.key(0), (size, size))

    def model(y, sigma):
        return matrix @ y

    off = jnp.zeros(size).at[-1].set(0.3)  # three sigma away
    assert lid.jacobian_spectrum(model, off, 0.1).off_manifold
    assert not lid.jacobian_spectrum(model, 0 * off, 0.1).off_manifold


def test_an_exact_denoiser_of_a_flat_manifold_has_no_network_error(plane):
    denoiser, x, _ = plane
    spectrum = lid.jacobian_spectrum(denoiser, x, 0.02)
    assert spectrum.network_error < 1e-5
    assert spectrum.asymmetry < 1e-12
    # Nothing but skewness: a finite error, and no dimension.
    skew = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    turned = lid.jacobian_spectrum(lambda y, sigma: skew @ y, jnp.ones(2), 1.0)
    np.testing.assert_allclose(turned.asymmetry, 1, rtol=1e-12)
    assert jnp.isfinite(turned.network_error)


def test_spectral_curve_is_the_spectrum_at_each_level(plane):
    denoiser, x, _ = plane
    sigmas = jnp.array([0.05, 0.3, 0.9])
    curve = jax.jit(lambda y: lid.spectral_curve(denoiser, y, sigmas))(x)
    for j, sigma in enumerate(sigmas):
        spectrum = lid.jacobian_spectrum(denoiser, x, sigma)
        np.testing.assert_allclose(curve.value[j], spectrum.expected_flipd, rtol=1e-10)
        np.testing.assert_allclose(curve.stderr[j], spectrum.network_error, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(curve.residual[j], spectrum.residual, rtol=1e-10)
    np.testing.assert_array_equal(curve.guided, 0)
    with pytest.raises(ValueError, match="vector of noise levels"):
        lid.spectral_curve(denoiser, x, 0.1)
    found = lid.at_plateau(lid.spectral_curve(denoiser, x, jnp.geomspace(0.01, 0.3, 8)))
    np.testing.assert_allclose(found.value, 3, atol=2e-3)


def test_readings_do_not_depend_on_the_frame(plane):
    denoiser, x, _ = plane
    frame = jax.random.orthogonal(jax.random.key(1), 10)
    skew = jax.random.normal(jax.random.key(2), (10, 10)) / 50

    def flawed(y, sigma):
        return denoiser(y, sigma) + skew @ (y - x)

    def turned(y, sigma):
        return frame @ flawed(frame.T @ y, sigma)

    one = lid.jacobian_spectrum(flawed, x, 0.2)
    other = lid.jacobian_spectrum(turned, frame @ x, 0.2)
    for name in (
        "tangential_flipd",
        "expected_flipd",
        "thresholded_flipd",
        "network_error",
        "asymmetry",
    ):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-8)
    assert one.network_error > 0.01


def test_what_is_not_finite_has_no_dimension(plane):
    denoiser, x, _ = plane
    nowhere = x.at[3].set(jnp.nan)
    spectrum = lid.jacobian_spectrum(denoiser, nowhere, 0.2)
    assert jnp.isfinite(spectrum.eigenvalues).all()  # a linear denoiser
    broken = lid.jacobian_spectrum(lambda y, sigma: jnp.sqrt(y), jnp.zeros(4) - 1, 0.2)
    for found in (spectrum, broken):
        for name in ("expected", "tangential", "thresholded", "projected"):
            assert jnp.isnan(getattr(found, f"{name}_flipd"))
    assert lid.rank_by_threshold(broken.eigenvalues) == -1
    assert lid.rank_by_gap(broken.eigenvalues) == -1
    assert jnp.isnan(lid.soft_rank(broken.eigenvalues))
    assert jnp.isnan(lid.participation_ratio(broken.eigenvalues))
