"""Several noise levels, the denoising loss, tangents, and what says that a result is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid, linalg, mapping

AMBIENT = 12
SCALES = np.array([0.4, 0.7, 1.0, 1.3])


def gaussian(scales=SCALES, ambient=AMBIENT, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(ambient, len(scales))))[0]
    mean = rng.normal(size=ambient)
    return analytic.LinearGaussian(*map(jnp.asarray, (mean, basis, np.asarray(scales))))


def turned(angle, gain=0.5):
    """A denoiser whose Jacobian is gain times a rotation in the plane, of any angle."""
    c, s = np.cos(angle), np.sin(angle)
    return lambda x, sigma: gain * jnp.array([[c, -s], [s, c]]) @ x


# Richardson.


def test_richardson_on_the_sphere_has_an_error_of_fourth_order(x64):
    sphere = analytic.Sphere(10)
    x = sphere.sample(1, key=jax.random.key(0))[0]
    np.testing.assert_allclose(lid.flipd(sphere, x, 0.174).value, 9.378, atol=1e-3)
    assert abs(lid.richardson(sphere, x, 0.174).value - 10) < 0.02
    sigmas = jnp.array([0.04, 0.08])
    plain = 10 - jax.vmap(lambda s: lid.flipd(sphere, x, s).value)(sigmas)
    extrapolated = 10 - jax.vmap(lambda s: lid.richardson(sphere, x, s).value)(sigmas)
    np.testing.assert_allclose(plain[1] / plain[0], 4, rtol=0.05)
    np.testing.assert_allclose(extrapolated[1] / extrapolated[0], 16, rtol=0.2)


def test_richardson_in_many_dimensions_is_off_by_fourth_order_only(x64):
    """d = 900 in R^1000, unit scales, sigma = .174.

    With a = sigma^2 / (1 + sigma^2) FLIPD is d (1 - a^2) on average over the data: these points
    have no error of second order, so that Richardson, made against one, is off by more, .27%.
    """
    d, sigma = 900, 0.174
    rng = np.random.default_rng(0)
    model = analytic.LinearGaussian(jnp.zeros(1000), jnp.eye(1000, d), jnp.ones(d))
    points = jnp.asarray(np.pad(rng.normal(size=(200, d)), ((0, 0), (0, 100))))
    near, far = (jax.vmap(lambda x, s=s: model.flipd(x, s))(points) for s in (sigma, 2 * sigma))
    values = (4 * near - far) / 3
    a, b = (s**2 / (1 + s**2) for s in (sigma, 2 * sigma))
    for result, mean in ((near, d * (1 - a**2)), (values, d * (1 + (b**2 - 4 * a**2) / 3))):
        assert abs(result.mean() - mean) < 4 * result.std() / 200**0.5
    assert abs(values.mean() - d) < 0.003 * d
    # At one point, and by the estimator, a gain of an order of magnitude at the centre.
    centre = jnp.zeros(1000)
    plain, extrapolated = (
        estimate(model, centre, sigma).value for estimate in (lid.flipd, lid.richardson)
    )
    np.testing.assert_allclose(plain, d * (1 - a), rtol=1e-10)
    np.testing.assert_allclose(extrapolated, d * (1 - (4 * a - b) / 3), rtol=1e-10)
    assert abs(extrapolated - d) < 0.12 * abs(plain - d)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_richardson_is_its_combination_for_linear_and_projecting_traces(x64, ratio):
    model = gaussian()
    x = model.sample(1, key=jax.random.key(0))[0]
    near, far = model.flipd(x, 0.2), model.flipd(x, 0.2 * ratio)
    expected = (ratio**2 * near - far) / (ratio**2 - 1)
    for trace in (linalg.exact(), linalg.positive_exact()):
        result = lid.richardson(model, x, 0.2, ratio=ratio, trace=trace)
        np.testing.assert_allclose(result.value, expected, rtol=1e-9)
        assert result.stderr == 0


def count(name, jaxpr):
    """How often a program calls a primitive, one in a loop counted once."""
    inner = jax.tree.leaves(
        [list(eqn.params.values()) for eqn in jaxpr.eqns],
        is_leaf=lambda value: hasattr(value, "eqns"),
    )
    programs = [value for value in inner if hasattr(value, "eqns")]
    programs = [getattr(program, "jaxpr", program) for program in programs]
    calls = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return calls + sum(count(name, program) for program in programs)


@pytest.mark.parametrize("trace", [linalg.positive_exact(), linalg.positive_lanczos(2, 4)])
def test_richardson_never_runs_two_eigenproblems_at_once(trace):
    """Mapped over 64 points in R^32, two of them hang within seconds on a CPU of two cores."""

    def run(x, key):
        return lid.richardson(lambda y, sigma: jnp.tanh(y), x, 0.1, trace=trace, key=key)

    program = jax.make_jaxpr(run)(jnp.ones(AMBIENT), jax.random.key(0))
    assert count("eigh", program.jaxpr) == 1


@pytest.mark.parametrize("trace", [linalg.rademacher(16), linalg.positive_lanczos(16, 5)])
def test_the_standard_error_of_richardson_is_calibrated(x64, trace):
    model = gaussian()
    x = model.sample(1, key=jax.random.key(0))[0]
    keys = jax.random.split(jax.random.key(1), 200)
    draw = jax.jit(jax.vmap(lambda key: lid.richardson(model, x, 0.3, trace=trace, key=key)))
    value, stderr, _ = draw(keys)
    spread = jnp.std(value)
    assert abs(value.mean() - lid.richardson(model, x, 0.3).value) < 4 * spread / 200**0.5
    # 200 keys know a standard deviation to 5%.
    assert 0.9 < jnp.sqrt(jnp.mean(stderr**2)) / spread < 1.3


def two_jacobians(x, sigma):
    """Of one trace at every noise level, but of other directions at large ones."""
    gains = jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0, 0.5, 0.0]))
    near, far = (jax.random.orthogonal(jax.random.key(seed), 6) for seed in (5, 6))
    return jnp.where(sigma < 0.15, near @ gains @ near.T, far @ gains @ far.T) @ x


def test_a_linear_trace_sees_the_combined_jacobian(x64):
    """And so its standard error is the combination's, with probes of unrelated errors too."""
    x, trace = jnp.zeros(6), linalg.rademacher(16)
    keys = jax.random.split(jax.random.key(0), 300)
    draw = jax.vmap(lambda key: lid.richardson(two_jacobians, x, 0.1, trace=trace, key=key))
    value, stderr, _ = draw(keys)
    assert 0.9 < jnp.sqrt(jnp.mean(stderr**2)) / jnp.std(value) < 1.25
    # No mixture of the two levels' own standard errors.
    levels = jnp.array([0.1, 0.2])
    own = lid.flipd_curve(two_jacobians, x, levels, trace=trace, key=keys[0]).stderr
    assert abs(stderr[0] - abs(4 * own[0] - own[1]) / 3) > 0.1 * stderr[0]


def test_a_standard_error_of_richardson_is_not_negative(x64):
    # Exact at the small level, where the Jacobian is diagonal: the large level's, of weight -1/3.
    def model(x, sigma):
        return jnp.where(sigma < 0.15, x, two_jacobians(x, sigma))

    trace = linalg.positive_lanczos(16, 6)
    result = lid.richardson(model, jnp.zeros(6), 0.1, trace=trace, key=jax.random.key(0))
    far = lid.flipd(model, jnp.zeros(6), 0.2, trace=trace, key=jax.random.key(0)).stderr
    np.testing.assert_allclose(result.stderr, far / 3, rtol=1e-6)
    assert result.stderr > 0.01


# LIDL.


@pytest.mark.parametrize("sigmas", [[0.1, 0.2], [0.01, 0.02, 0.1, 0.15, 0.4], [0.3, 0.2, 0.05]])
def test_lidl_weights_are_the_least_squares_slope_of_the_integral(x64, sigmas):
    sigmas = np.array(sigmas)
    weights = lid.lidl_weights(sigmas)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert np.all(weights > 0)
    u = np.log(sigmas)
    values = np.random.default_rng(0).normal(size=(2, sigmas.size)) + 3
    steps = (values[:, 1:] + values[:, :-1] - 2 * AMBIENT) / 2 * np.diff(u)
    log_density = np.pad(np.cumsum(steps, axis=1), ((0, 0), (1, 0))) - 7.0
    slope = AMBIENT + np.polyfit(u, log_density.T, 1)[0]
    curve = lid.Curve(sigmas, values, 0.1 * np.ones_like(values), np.zeros_like(values))
    result = lid.lidl(curve)
    np.testing.assert_allclose(result.value, slope, rtol=1e-10)
    np.testing.assert_allclose(result.stderr, 0.1, rtol=1e-10)
    np.testing.assert_allclose(
        lid.lidl_from_density(sigmas, log_density, AMBIENT), slope, rtol=1e-10
    )


def test_lidl_weights_are_parabolic_in_log_sigma(x64):
    sigmas = np.geomspace(0.01, 1, 401)
    position = np.linspace(-1, 1, 401)
    parabola = 0.75 * (1 - position**2) * (2 / 400)
    np.testing.assert_allclose(lid.lidl_weights(sigmas), parabola, atol=3e-5)


# The denoising loss.


@pytest.mark.parametrize("ratio", [None, 1.5, 2.0])
def test_denoising_loss_is_its_closed_form(x64, ratio):
    model, sigma = gaussian(), 0.3
    y = np.array([0.6, -0.5, 1.5, 0.2])
    x = model.mean + model.basis @ y

    def loss(sigma):
        variances = SCALES**2
        gain = variances / (variances + sigma**2)
        return np.sum(gain**2 * (1 + sigma**2 * y**2 / variances**2))

    expected = loss(sigma)
    if ratio is not None:
        expected = (ratio**2 * loss(sigma) - loss(ratio * sigma)) / (ratio**2 - 1)
    for seed in range(3):
        key = jax.random.key(seed)
        result = lid.denoising_loss(model, x, sigma, key=key, num_samples=4096, ratio=ratio)
        assert abs(result.value - expected) < 3 * result.stderr
        assert result.stderr < 0.1


def test_the_second_scale_of_the_denoising_loss_lowers_its_bias(x64):
    model = gaussian(np.ones(4))
    x, sigma = model.mean, 0.2
    plain, corrected = (
        lid.denoising_loss(model, x, sigma, key=jax.random.key(0), num_samples=20_000, ratio=ratio)
        for ratio in (None, 2.0)
    )
    assert abs(corrected.value - 4) + 3 * corrected.stderr < abs(plain.value - 4)


# Spectra and tangents.


def test_soft_rank_by_lanczos_is_that_of_the_spectrum(x64):
    model = gaussian()
    x = model.sample(1, key=jax.random.key(0))[0]
    truth = lid.soft_rank(lid.jacobian_spectrum(model, x, 0.3).eigenvalues)
    key = jax.random.key(1)
    result = lid.soft_rank_lanczos(model, x, 0.3, key=key, num_probes=256, order=AMBIENT)
    assert 0 < result.stderr < 0.15
    assert abs(result.value - truth) < 4 * result.stderr
    # One number of width and power is passed on to both.
    options = {"width": 0.5, "power": 2.0}
    truth = lid.soft_rank(lid.jacobian_spectrum(model, x, 0.3).eigenvalues, **options)
    result = lid.soft_rank_lanczos(model, x, 0.3, key=key, num_probes=256, order=12, **options)
    assert abs(result.value - truth) < 4 * result.stderr


def test_tangent_space_spans_the_basis(x64):
    model = gaussian()
    x = model.sample(1, key=jax.random.key(0))[0]
    space = lid.tangent_space(model, x, 0.1)
    assert lid.rank_by_gap(space.eigenvalues, ceiling=1.0) == 4
    np.testing.assert_allclose(
        space.eigenvalues, lid.jacobian_spectrum(model, x, 0.1).eigenvalues, atol=1e-12
    )
    np.testing.assert_allclose(space.directions @ space.directions.T, np.eye(AMBIENT), atol=1e-12)
    # The sines of the principal angles between both spaces.
    tangents = space.directions[:4].T
    outside = tangents - model.basis @ (model.basis.T @ tangents)
    assert np.linalg.svd(outside, compute_uv=False).max() < 1e-6

    def image(y, sigma):
        return model(y.reshape(-1), sigma).reshape(y.shape)

    pictures = lid.tangent_space(image, x.reshape(3, 4), 0.1).directions
    assert pictures.shape == (AMBIENT, 3, 4)
    overlap = jnp.abs(pictures.reshape(AMBIENT, AMBIENT)[:4] @ tangents)
    np.testing.assert_allclose(overlap, np.eye(4), atol=1e-9)


def test_participation_ratio():
    for d in (1, 3, 8):
        np.testing.assert_allclose(lid.participation_ratio(0.7 * (jnp.arange(8) < d)), d, rtol=1e-6)
    np.testing.assert_allclose(lid.participation_ratio(jnp.array([2.0, 1.0])), 9 / 5, rtol=1e-6)
    table = lid.participation_ratio(jnp.array([[1.0, 1.0, -5.0], [0.0, -1.0, -1.0]]))
    np.testing.assert_allclose(table, [2.0, 0.0])


def test_asymmetry_of_symmetric_skew_and_mixed_jacobians(x64):
    x = jnp.array([0.3, -0.2])
    for angle in (0.0, np.pi / 4, np.pi / 2, 2.0):
        spectrum = lid.jacobian_spectrum(turned(angle), x, 0.1)
        np.testing.assert_allclose(spectrum.asymmetry, abs(np.sin(angle)), atol=1e-12)
        np.testing.assert_allclose(spectrum.eigenvalues, 0.5 * np.cos(angle), atol=1e-12)
    assert lid.jacobian_spectrum(lambda x, sigma: 0 * x, x, 0.1).asymmetry == 0
    model = gaussian()
    assert lid.jacobian_spectrum(model, model.mean, 0.1).asymmetry < 1e-12
    skewed = lid.jacobian_spectrum(turned(2.0), x, 0.1)
    np.testing.assert_allclose(skewed.flipd, lid.flipd(turned(2.0), x, 0.1).value, rtol=1e-12)
    np.testing.assert_allclose(skewed.projected_flipd, skewed.residual, rtol=1e-12)


# What says that a value is no dimension.


@pytest.mark.parametrize("scales", [np.ones(8), np.geomspace(0.1, 3, 8)])
@pytest.mark.parametrize("sigma", [0.03, 0.3, 0.55])
def test_points_of_the_data_are_not_flagged_and_points_off_it_are(scales, sigma):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gaussian(scales, 20))
    points = model.sample(2000, key=jax.random.key(0))

    @jax.jit
    def flags(points):
        results = jax.vmap(lambda x: lid.flipd(model, x, sigma))(points)
        spectra = jax.vmap(lambda x: lid.jacobian_spectrum(model, x, sigma))(points[:50])
        return results.off_manifold, spectra.off_manifold

    flagged, same = flags(points)
    assert flagged.mean() < 0.01
    np.testing.assert_array_equal(flagged[:50], same)
    normal = jnp.linalg.svd(model.basis)[0][:, -1]
    moved, _ = flags(points + 3 * sigma * normal)
    assert moved.all()


def test_the_bound_is_for_noise_levels_below_the_scales():
    """At sigma = 1 half of each direction is residual: the mean is tr / 2, twice the bound's."""
    model = analytic.LinearGaussian(jnp.zeros(20), jnp.eye(20, 8), jnp.ones(8))
    points = model.sample(4000, key=jax.random.key(0))
    results = jax.vmap(lambda x: lid.flipd(model, x, 1.0))(points)
    np.testing.assert_allclose(results.trace, 4, rtol=1e-5)
    np.testing.assert_allclose(results.residual.mean(), 2, rtol=0.05)
    assert 0.04 < results.off_manifold.mean() < 0.12


def test_a_dimension_below_zero_is_flagged_beyond_its_error():
    x = jnp.zeros(2)
    assert lid.flipd(lambda x, sigma: -0.5 * x, x, 0.1).negative
    assert not lid.flipd(lambda x, sigma: 0 * x, x, 0.1).negative
    assert not lid.Flipd(jnp.array(-1.0), jnp.array(0.6), jnp.array(0.0)).negative


# The boundary.

KEY = jax.random.key(0)


def zero(x, sigma):
    return 0 * x


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lid.richardson(zero, jnp.ones(2), 0.1, ratio=1.0), ValueError, "above 1"),
        (lambda: lid.richardson(zero, jnp.ones(2), -0.1), ValueError, "finite positive"),
        (lambda: lid.lidl_weights(0.1), ValueError, "vector of at least 2"),
        (lambda: lid.lidl_weights([0.1]), ValueError, r"shape \(1,\)"),
        (
            lambda: lid.denoising_loss(zero, jnp.ones(2), 0.1, key=KEY, ratio=0.5),
            ValueError,
            "ratio=0.5.*above 1, or None",
        ),
        (
            lambda: lid.denoising_loss(zero, jnp.ones(2), 0.1, key=KEY, num_samples=0),
            ValueError,
            "num_samples=0",
        ),
        (lambda: lid.denoising_loss(zero, jnp.ones(2), 0.1, key=None), TypeError, "needs a key"),
        (lambda: lid.tangent_space(zero, jnp.ones(2, int), 0.1), TypeError, "int"),
        (lambda: lid.soft_rank_lanczos(zero, jnp.ones(2), 0.0, key=KEY), ValueError, "positive"),
    ],
)
def test_errors_name_argument_and_fault(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_more_levels_remove_more_orders(x64):
    # F = 2 / (1 + s^2) at 0: the error of m levels is 2 times the product of their s^2, at most.
    def ball(y, sigma):
        return y / (1 + sigma**2)

    for ratio, num in ((2.0, 2), (2.0, 3), (1.5, 4)):
        value = lid.richardson(ball, jnp.zeros(2), 0.1, ratio=ratio, num_levels=num).value
        levels2 = np.array([(0.1 * ratio**i) ** 2 for i in range(num)])
        exact = 2 * np.prod(
            levels2 / (1 + levels2)
        )  # the remainder of the interpolation of 1/(1+h)
        np.testing.assert_allclose(abs(value - 2), exact, rtol=1e-6)
        projected = lid.richardson(
            ball, jnp.zeros(2), 0.1, ratio=ratio, num_levels=num, trace=linalg.positive_exact()
        )
        np.testing.assert_allclose(projected.value, value, rtol=1e-12)
    with pytest.raises(ValueError, match="2 levels"):
        lid.richardson(ball, jnp.zeros(2), 0.1, num_levels=1)


def test_lidl_takes_unequal_errors_and_curves_of_many_points():
    sigmas = np.array([0.1, 0.2, 0.4])
    weights = np.asarray(lid.lidl_weights(sigmas))
    stderr = np.array([0.4, 0.1, 0.1])
    result = lid.lidl(lid.Curve(sigmas, np.ones(3), stderr, np.zeros(3)))
    np.testing.assert_allclose(result.stderr, weights @ stderr, rtol=1e-6)
    assert abs(result.stderr - stderr.mean()) > 0.02

    points = jnp.zeros((2, 3))
    curves = mapping.over_points(
        lambda x: lid.flipd_curve(lambda y, s: y / (1 + s**2), x, jnp.asarray(sigmas))
    )(points)
    assert curves.sigmas.shape == (2, 3)
    many = lid.lidl(curves)
    np.testing.assert_allclose(many.value, 2 * [weights @ (3 / (1 + sigmas**2))], rtol=1e-5)
    with pytest.raises(ValueError, match="finite positive number"):
        lid.lidl_weights([0.1, -0.2])
