"""Likelihoods along the flow, against exact densities; LIDL from them, against that from FLIPD."""

from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid, linalg, sample

TIGHT = diffrax.PIDController(rtol=1e-8, atol=1e-8)
SCALES = np.array([0.5, 1.5])
AMBIENT = 5


def plane(seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(AMBIENT, SCALES.size)))[0]
    return analytic.LinearGaussian(*map(jnp.asarray, (rng.normal(size=AMBIENT), basis, SCALES)))


def mixture():
    return analytic.Mixture((plane(), analytic.LinearGaussian.atom(jnp.ones(AMBIENT))), [0.6, 0.4])


def sphere():
    return analytic.Sphere(AMBIENT - 1, 2.0, tilt=jnp.arange(AMBIENT) / 3)


# A function of the model and the numbers, compiled once for each structure of a model.
@eqx.filter_jit
def compiled(model, x, sigma, **options):
    return sample.log_density(model, x, sigma, controller=TIGHT, **options)


follow = eqx.filter_jit(partial(sample.probability_flow, controller=TIGHT))


def log_normal(x, mean, variance):
    log_volume = x.size * np.log(2 * np.pi * variance)
    return -(jnp.sum((x - mean) ** 2) / variance + log_volume) / 2


@pytest.mark.parametrize("sigma_max", [30.0, 300.0])
def test_gaussian_up_to_the_error_of_the_prior_in_closed_form(x64, sigma_max):
    model = plane()
    basis, sigma = np.asarray(model.basis), 0.1
    # A point of the data, and a noisy one; `t` of the module docstring, in an eigenbasis.
    variances = np.append(SCALES**2, np.zeros(AMBIENT - 2))
    spread = np.sqrt(variances.mean())
    axes = np.linalg.qr(np.hstack([basis, np.random.default_rng(1).normal(size=(AMBIENT, 3))]))[0]
    a = (variances + sigma_max**2) / (spread**2 + sigma_max**2)
    for t_root in ([0.7, -1.3, 0, 0, 0], [0.7, -1.3, 0.5, -0.2, 1.5]):
        t_root = np.array(t_root)
        x = model.mean + axes @ (t_root * np.sqrt(variances + sigma**2))
        value = compiled(
            model,
            x,
            sigma,
            sigma_max=jnp.asarray(sigma_max),
            prior_mean=model.mean,
            prior_std=jnp.asarray(spread),
        )
        too_large = np.sum(np.log(a) + t_root**2 * (1 - a)) / 2
        first_order = np.sum((variances - spread**2) * (1 - t_root**2)) / (2 * sigma_max**2)
        np.testing.assert_allclose(too_large, first_order, rtol=0.02)
        np.testing.assert_allclose(value - model.log_density(x, sigma), too_large, atol=1e-6)


@pytest.mark.parametrize("make", [plane, mixture, sphere])
def test_the_error_is_that_of_the_prior_where_the_path_ends(x64, make):
    model, sigma_max = make(), 40.0
    prior_mean, prior_std = jnp.full(AMBIENT, 0.3), 1.2
    clean = model.sample(3, key=jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    for index, sigma in enumerate((0.03, 0.3, 3.0)):
        x = clean[index] + sigma * noise[index]
        value = compiled(
            model,
            x,
            jnp.asarray(sigma),
            sigma_max=jnp.asarray(sigma_max),
            prior_mean=prior_mean,
            prior_std=jnp.asarray(prior_std),
        )
        end = follow(model, x, jnp.asarray(sigma), jnp.asarray(sigma_max))
        prior = log_normal(end, prior_mean, prior_std**2 + sigma_max**2)
        mismatch = prior - model.log_density(end, sigma_max)
        np.testing.assert_allclose(value - model.log_density(x, sigma), mismatch, atol=2e-6)
        # |mean - prior_mean| / sigma_max is at most .1 here, times a standard normal.
        assert abs(mismatch) < 0.3


def test_an_isotropic_gaussian_is_its_own_prior():
    """Any sigma_max will do; here in single precision, with the default tolerances, as an image."""

    def model(x, sigma):
        return 1 + 4 / (4 + sigma**2) * (x - 1)

    x = jax.random.normal(jax.random.key(0), (2, 3))
    value = sample.log_density(model, x, 0.1, sigma_max=1.0, prior_mean=1.0, prior_std=2.0)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, log_normal(x, 1.0, 4.01), atol=1e-3)


def test_lidl_from_likelihoods_from_exact_densities_and_from_flipd(x64):
    model = mixture()
    x = model.components[0].sample(1, key=jax.random.key(3))[0]
    sigmas = jnp.geomspace(0.05, 0.5, 7)
    exact = jax.vmap(partial(model.log_density, x))(sigmas)
    prior_mean = 0.6 * model.components[0].mean + 0.4  # that of the mixture
    options = {"sigma_max": 1e3, "prior_mean": prior_mean, "prior_std": 1.0}
    followed = jax.jit(jax.vmap(lambda s: compiled(model, x, s, **options)))(sigmas)
    truth = lid.lidl_from_density(sigmas, exact, AMBIENT)
    # The prior's error is of order (spread / sigma_max)^2, 1e-6.
    np.testing.assert_allclose(followed, exact, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        lid.lidl_from_density(sigmas, followed, AMBIENT), truth, rtol=0, atol=1e-5
    )
    # LIDL of the curve integrates by trapezoids: an error of at most h^3 max|F''| / 12 a step.
    u = jnp.log(sigmas)
    curvature = jax.grad(jax.grad(lambda u: model.flipd(x, jnp.exp(u))))
    largest = jnp.max(jnp.abs(jax.vmap(curvature)(jnp.linspace(u[0], u[-1], 200))))
    step_weights = jnp.abs(jnp.cumsum((u - u.mean())[::-1])[::-1][1:]) / jnp.sum(
        (u - u.mean()) ** 2
    )
    bound = jnp.sum(step_weights) * (u[1] - u[0]) ** 3 * largest / 12
    curve = lid.lidl(lid.flipd_curve(model, x, sigmas)).value
    assert bound < 0.2
    assert abs(curve - truth) < bound


def test_its_derivatives_are_the_score_flipd_and_those_of_the_exact_density(x64):
    model = plane()
    x, sigma = model.mean + 0.3, 0.4

    def value(x, sigma, scales):
        options = {"sigma_max": 300.0, "prior_mean": model.mean, "prior_std": 0.7}
        return sample.log_density(model.replace(scales=scales), x, sigma, **options)

    gradients = jax.jit(jax.grad(value, (0, 1, 2)))(x, sigma, model.scales)
    np.testing.assert_allclose(gradients[0], (model(x, sigma) - x) / sigma**2, atol=1e-3)
    slope = AMBIENT + sigma * gradients[1]
    np.testing.assert_allclose(slope, lid.flipd(model, x, sigma).value, atol=1e-3)
    exact = jax.grad(lambda s: model.replace(scales=s).log_density(x, sigma))(model.scales)
    np.testing.assert_allclose(gradients[2], exact, atol=1e-3)


def test_jit_and_vmap_over_points_and_levels_change_nothing(x64):
    model = plane()
    points = model.sample(3, key=jax.random.key(0))
    sigmas = jnp.array([0.1, 0.4])

    def value(x, sigma):
        return sample.log_density(model, x, sigma, sigma_max=50.0, prior_std=1.0)

    table = jax.jit(jax.vmap(jax.vmap(value, (None, 0)), (0, None)))(points, sigmas)
    assert table.shape == (3, 2)
    # The step sizes of one point do not depend on the others.
    np.testing.assert_allclose(table[1, 1], value(points[1], sigmas[1]), rtol=1e-9)


def test_a_stochastic_trace_is_unbiased_and_keeps_its_probes(x64):
    model = plane()
    x, sigma = model.mean + 0.2, 0.2
    options = {"sigma_max": 50.0, "prior_std": 1.0}
    exact = sample.log_density(model, x, sigma, **options)

    def draw(key):
        return sample.log_density(model, x, sigma, trace=linalg.rademacher(4), key=key, **options)

    values = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 100))
    spread = jnp.std(values)
    assert abs(values.mean() - exact) < 4 * spread / 10
    # With the same signs v all along, the error is that of v^T A v, A the integral of dD/dx.
    levels = jnp.geomspace(sigma, 50.0, 400)
    gains = SCALES**2 / (SCALES**2 + levels[:, None] ** 2)
    shares = np.trapezoid(gains, np.log(levels), axis=0)
    matrix = np.asarray(model.basis) @ np.diag(shares) @ np.asarray(model.basis).T
    off_diagonal = matrix - np.diag(np.diag(matrix))
    # The relative standard error of a standard deviation from 100 keys is about 7%.
    np.testing.assert_allclose(spread, np.sqrt(2 * np.sum(off_diagonal**2) / 4), rtol=0.3)


def test_failure_is_visible():
    def gaussian(x, sigma):
        return x / (1 + sigma**2)

    options = {"sigma_max": 10.0, "prior_std": 1.0}
    assert jnp.isnan(sample.log_density(gaussian, jnp.ones(2), 0.1, max_steps=2, **options))
    assert jnp.isnan(sample.log_density(lambda x, s: jnp.nan * x, jnp.ones(2), 0.1, **options))
    grid = jnp.linspace(np.log(0.1), np.log(10.0), 101)
    fixed = sample.log_density(
        gaussian,
        jnp.ones(2),
        0.1,
        solver=diffrax.Heun(),
        controller=diffrax.StepTo(ts=grid),
        **options,
    )
    np.testing.assert_allclose(fixed, log_normal(jnp.ones(2), 0.0, 1.01), atol=3e-3)


def density(x=None, sigma=0.1, **options):
    x = jnp.zeros(3) if x is None else x
    defaults = {"sigma_max": 10.0, "prior_std": 1.0}
    return sample.log_density(
        analytic.LinearGaussian.atom(jnp.zeros(3)), x, sigma, **defaults | options
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: density(jnp.zeros(3, int)), TypeError, r"log_density\(x=.*int32.*Convert"),
        (lambda: density(jnp.zeros((2, 3))), ValueError, r"\(2, 3\).*takes \(3,\).*jax.vmap"),
        (lambda: density(sigma=-0.1), ValueError, "finite positive"),
        (lambda: density(sigma=jnp.ones(2)), ValueError, r"\(sigma=.*\(2,\).*one.*jax.vmap"),
        (lambda: density(sigma=10.0), ValueError, r"sigma=10.*sigma_max=10.*take several times"),
        (lambda: density(sigma_max=jnp.inf), ValueError, "finite sigma_max"),
        (lambda: density(sigma_max=jnp.ones(2)), ValueError, r"sigma_max=.*\(2,\).*one number"),
        (lambda: density(prior_std=-1.0), ValueError, "prior_std=-1.0.*at least 0"),
        (lambda: density(prior_std=jnp.ones(3)), ValueError, r"prior_std=.*\(3,\).*the root"),
        (lambda: density(prior_mean=jnp.ones(2)), ValueError, r"prior_mean=.*\(2,\).*\(3,\)"),
        (lambda: density(trace=linalg.rademacher(2)), TypeError, r"key=jax\.random\.key"),
    ],
)
def test_errors_name_argument_fault_and_cure(call, error, text):
    with pytest.raises(error, match=text):
        call()
