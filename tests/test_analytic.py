"""Exact denoisers against independent formulas, quadrature, sampling and themselves."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from mmh_jax.analytic import (
    Empirical,
    LinearGaussian,
    Mixture,
    Sphere,
    bessel,
    von_mises,
    von_mises_with_atom,
)
from mmh_jax.typing import Denoiser

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None, derandomize=True)


def gaussian(rng, ambient_dim, dim, mean_scale=1.0):
    basis = np.linalg.qr(rng.normal(size=(ambient_dim, dim)))[0]
    mean = mean_scale * rng.normal(size=ambient_dim)
    return LinearGaussian(mean, basis, rng.uniform(0.3, 2.0, dim))


def make(name):
    """One of each kind, in the default dtype of the moment."""
    rng = np.random.default_rng(7)
    match name:
        case "gaussian":
            return gaussian(rng, 6, 3)
        case "full gaussian":
            return gaussian(rng, 4, 4)
        case "atom":
            return LinearGaussian.atom(rng.normal(size=3))
        case "sphere":
            return Sphere(3, 1.3)
        case "tilted sphere":
            return Sphere(2, 0.7, 2.5 * rng.normal(size=3))
        case "circle":
            return von_mises(0.4, 2.0, 1.2)
        case "empirical":
            return Empirical(rng.normal(size=(40, 3, 2)), chunk_size=16)
        case "mixture":
            parts = (gaussian(rng, 4, 1), gaussian(rng, 4, 3), LinearGaussian.atom(np.ones(4)))
            return Mixture(parts, [1.0, 2.0, 1.0])
        case "toy":
            return von_mises_with_atom(0.3, 2.0, 0.25)


NAMES = [
    "gaussian",
    "full gaussian",
    "atom",
    "sphere",
    "tilted sphere",
    "empirical",
    "mixture",
    "toy",
]
SIGMAS = np.array([0.02, 0.1, 0.5, 3.0])


def noisy_points(denoiser, num=6, seed=0):
    """Points x0 + sigma eps with their noise levels, and clean points, which are a special case."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x0 = denoiser.sample(num * SIGMAS.size, key=keys[0])
    sigma = jnp.asarray(np.tile(SIGMAS, num), x0.dtype)
    eps = jax.random.normal(keys[1], x0.shape, x0.dtype)
    clean = np.arange(x0.shape[0]) < SIGMAS.size
    level = jnp.where(jnp.asarray(clean), 0, sigma).reshape(-1, *(1,) * (x0.ndim - 1))
    return x0 + level * eps, sigma


@jax.jit
def evaluate(denoiser, x, sigma):
    return denoiser(x, sigma), denoiser.log_density(x, sigma), denoiser.flipd(x, sigma)


@jax.jit
def dims(denoiser, x, tolerance=None):
    return jax.vmap(lambda x: denoiser.lid(x, tolerance=tolerance))(x)


@jax.jit
def report(denoiser, x, sigma):
    """Everything that the tests compare, at many points."""

    def at_one(x, sigma):
        flat = lambda x: denoiser(x.reshape(denoiser.shape), sigma).reshape(-1)  # noqa: E731
        log_density = lambda x, log: denoiser.log_density(x, jnp.exp(log))  # noqa: E731
        value, (score, slope) = jax.value_and_grad(log_density, (0, 1))(x, jnp.log(sigma))
        return {
            "D": denoiser(x, sigma).reshape(-1),
            "J": jax.jacfwd(flat)(x.reshape(-1)),
            "F": denoiser.flipd(x, sigma),
            "log_density": value,
            "slope": slope,
            "score": score.reshape(-1),
        }

    return jax.vmap(at_one)(x, sigma)


def check_identities(out, x, sigma, rtol):
    out, x, sigma = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (out, x, sigma))
    x = x.reshape(sigma.size, -1)
    residual = (x - out["D"]) / sigma[:, None]
    flipd = np.trace(out["J"], axis1=1, axis2=2) + np.sum(residual**2, axis=1)
    # An atom's F at the atom is 0: errors there are absolute, against 1.
    np.testing.assert_allclose(out["F"], flipd, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(out["F"], x.shape[1] + out["slope"], rtol=rtol, atol=rtol)
    size = 1 + np.linalg.norm(residual, axis=1, keepdims=True)
    tweedie = -residual / size, out["score"] * sigma[:, None] / size
    np.testing.assert_allclose(*tweedie, rtol=0, atol=rtol)
    np.testing.assert_allclose(out["J"], out["J"].transpose(0, 2, 1), rtol=0, atol=rtol)
    assert np.linalg.eigvalsh(out["J"]).min() > -rtol


@pytest.mark.parametrize("name", NAMES)
def test_flipd_density_and_denoiser_agree(name):
    denoiser = make(name)
    x, sigma = noisy_points(denoiser)
    single = report(denoiser, x, sigma)
    assert {value.dtype for value in single.values()} == {jnp.dtype("float32")}
    check_identities(single, x, sigma, 1e-3)
    with jax.enable_x64(True):
        x, sigma = np.asarray(x, np.float64), np.asarray(sigma, np.float64)
        double = report(make(name), x, sigma)
        assert {value.dtype for value in double.values()} == {jnp.dtype("float64")}
        check_identities(double, x, sigma, 1e-9)
    # The same numbers in both precisions; an exponent is rounded relative to itself.
    single, double = jax.tree.map(np.asarray, (single, double))
    np.testing.assert_allclose(single["F"], double["F"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(single["log_density"], double["log_density"], 1e-4, atol=1e-4)
    residual = (single["D"] - double["D"]) / sigma[:, None]
    np.testing.assert_allclose(residual, 0, atol=1e-3)


# Independent formulas.


def test_linear_gaussian_is_the_conditional_gaussian(x64):
    denoiser = gaussian(np.random.default_rng(3), 5, 2)
    basis, mean = np.asarray(denoiser.basis), np.asarray(denoiser.mean)
    covariance = basis @ np.diag(denoiser.scales**2) @ basis.T
    x, sigma = np.random.default_rng(4).normal(size=5), 0.3
    total = covariance + sigma**2 * np.eye(5)
    solved = np.linalg.solve(total, x - mean)
    np.testing.assert_allclose(denoiser(x, sigma), mean + covariance @ solved, rtol=1e-12)
    np.testing.assert_allclose(
        denoiser.log_density(x, sigma), stats.multivariate_normal(mean, total).logpdf(x), rtol=1e-12
    )
    # E|x - x0|^2 = |x - D|^2 + tr Cov(x0 | x)
    posterior = covariance - covariance @ np.linalg.solve(total, covariance)
    flipd = np.sum((sigma**2 * solved) ** 2) / sigma**2 + np.trace(posterior) / sigma**2
    np.testing.assert_allclose(denoiser.flipd(x, sigma), flipd, rtol=1e-12)


def test_linear_gaussian_mean_flipd_is_the_closed_form(x64):
    denoiser, sigma = gaussian(np.random.default_rng(5), 6, 3), 0.7
    x0 = denoiser.sample(40_000, key=jax.random.key(0))
    values = jax.vmap(lambda x: denoiser.flipd(x, sigma))(
        x0 + sigma * jax.random.normal(jax.random.key(1), x0.shape)
    )
    # Over x ~ rho_sigma, the mean of F is E|x - x0|^2 / sigma^2 = D.
    assert abs(np.mean(values) - 6) < 4 * np.std(values) / 200
    # Over clean points it is d - sum sigma^4 / (l + sigma^2)^2.
    values = jax.vmap(lambda x: denoiser.flipd(x, sigma))(x0)
    exact = 3 - np.sum(sigma**4 / (denoiser.scales**2 + sigma**2) ** 2)
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / 200


def test_empirical_is_a_softmax(x64):
    rng = np.random.default_rng(6)
    points, x, sigma = rng.normal(size=(23, 4)), rng.normal(size=4), 0.6
    squares = np.sum((x - points) ** 2, axis=1)
    weights = special.softmax(-squares / (2 * sigma**2))
    density = np.mean([stats.multivariate_normal(p, sigma**2 * np.eye(4)).pdf(x) for p in points])
    denoiser = Empirical(points, chunk_size=5)
    np.testing.assert_allclose(denoiser(x, sigma), weights @ points, rtol=1e-12)
    np.testing.assert_allclose(denoiser.flipd(x, sigma), weights @ squares / sigma**2, rtol=1e-12)
    np.testing.assert_allclose(denoiser.log_density(x, sigma), np.log(density), rtol=1e-12)
    np.testing.assert_allclose(denoiser.distance(x), np.sqrt(squares.min()), rtol=1e-12)


def test_mixture_weighs_by_responsibility(x64):
    denoiser, x, sigma = make("mixture"), np.full(4, 0.8), 1.2
    shares = np.array([0.25, 0.5, 0.25])
    parts = denoiser.components
    densities = [
        stats.multivariate_normal(
            part.mean, (part.basis * part.scales**2) @ part.basis.T + sigma**2 * np.eye(4)
        ).pdf(x)
        for part in parts
    ]
    joint = shares * densities
    weights = joint / joint.sum()
    assert weights.min() > 1e-3  # the point tests all three
    means = np.array([part(x, sigma) for part in parts])
    values = np.array([part.flipd(x, sigma) for part in parts])
    np.testing.assert_allclose(denoiser.responsibilities(x, sigma), weights, rtol=1e-12)
    np.testing.assert_allclose(denoiser.log_density(x, sigma), np.log(joint.sum()), rtol=1e-12)
    np.testing.assert_allclose(denoiser(x, sigma), weights @ means, rtol=1e-12)
    np.testing.assert_allclose(denoiser.flipd(x, sigma), weights @ values, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.15, 0.6, 5.0])
def test_toy_agrees_with_quadrature_on_the_circle(sigma, x64):
    loc, kappa, share = 0.3, 2.0, 0.25
    # The trapezoidal rule on a period converges geometrically.
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mass = np.exp(kappa * np.cos(angles - loc))
    mass = np.append((1 - share) * mass / mass.sum(), share)
    support = np.concatenate([circle, np.zeros((1, 2))])
    denoiser = von_mises_with_atom(loc, kappa, share)
    for x in ([0.5, -0.2], [0.0, 0.0], [-0.9, 0.6]):
        squares = np.sum((np.array(x) - support) ** 2, axis=1)
        joint = mass * np.exp(-squares / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        weights = joint / joint.sum()
        x = jnp.array(x)
        np.testing.assert_allclose(denoiser(x, sigma), weights @ support, atol=1e-12)
        np.testing.assert_allclose(denoiser.flipd(x, sigma), weights @ squares / sigma**2, 1e-11)
        np.testing.assert_allclose(denoiser.log_density(x, sigma), np.log(joint.sum()), atol=1e-11)


def sphere_by_mpmath(sphere, x, sigma):
    """F, log rho, and (x - D) / sigma in 60 digits."""
    vector = lambda values: [mp.mpf(float(value)) for value in values]  # noqa: E731
    with mp.workdps(60):
        n, radius, sigma = sphere.dim + 1, mp.mpf(float(sphere.radius)), mp.mpf(float(sigma))
        x, tilt = vector(x), vector(np.zeros(n) if sphere.tilt is None else sphere.tilt)
        nu = mp.mpf(n) / 2 - 1
        c = [a + radius * b / sigma**2 for a, b in zip(tilt, x, strict=True)]
        length = lambda v: mp.sqrt(sum(a * a for a in v))  # noqa: E731
        k = length(c)
        mean = radius * mp.besseli(nu + 1, k) / mp.besseli(nu, k) / k
        log_i = lambda k: (  # noqa: E731
            mp.log(mp.gamma(nu + 1) * (k / 2) ** -nu * mp.besseli(nu, k)) if k else mp.mpf(0)
        )
        residual = [(a - mean * b) / sigma for a, b in zip(x, c, strict=True)]
        dot = sum(a * mean * b for a, b in zip(x, c, strict=True))
        square = length(x) ** 2 + radius**2
        log_density = -square / (2 * sigma**2) - n * mp.log(2 * mp.pi * sigma**2) / 2
        log_density += log_i(k) - log_i(length(tilt))
        flipd = (square - 2 * dot) / sigma**2
        return float(flipd), float(log_density), np.array([float(a) for a in residual])


@pytest.mark.parametrize("x64_mode", [True, False])
@pytest.mark.parametrize("kappa", [None, 2.0, 100.0])
def test_sphere_is_exact_at_every_noise_level(kappa, x64_mode):
    rng = np.random.default_rng(8)
    with jax.enable_x64(x64_mode):
        eps = float(jnp.finfo(jnp.zeros(()).dtype).eps)
        for dim in (1, 2, 10):
            direction = rng.normal(size=dim + 1)
            tilt = None if kappa is None else kappa * direction / np.linalg.norm(direction)
            sphere = Sphere(dim, jnp.asarray(1.5), tilt)
            for sigma in (1e-3, 0.05, 0.4, 3.0, 1e3):
                for offset in (-0.7, 0.0, sigma):
                    x = rng.normal(size=dim + 1)
                    x = jnp.asarray((1.5 + offset) * x / np.linalg.norm(x))
                    sigma = jnp.asarray(sigma)
                    mean, log_density, flipd = evaluate(sphere, x, sigma)
                    residual = (x - mean) / sigma
                    expected = sphere_by_mpmath(sphere, x, sigma)
                    # x is off the sphere by its own rounding, seen at sigma.
                    scale = eps * (1 + 1.5 / float(sigma))
                    np.testing.assert_allclose(flipd, expected[0], 20 * (scale + 30 * eps))
                    limit = 300 * eps * (1 + abs(expected[1])) + 3 * scale
                    np.testing.assert_allclose(log_density, expected[1], rtol=0, atol=limit)
                    limit = 3 * scale * (1 + np.linalg.norm(expected[2]))
                    np.testing.assert_allclose(residual, expected[2], rtol=0, atol=limit)


def test_sphere_published_numbers(x64):
    x = jnp.zeros(11).at[3].set(1.0)
    near, far = (float(Sphere(10).flipd(x, sigma)) for sigma in (0.174, 0.348))
    assert near == pytest.approx(9.37838, abs=1e-5)
    assert (4 * near - far) / 3 == pytest.approx(10.014, abs=1e-3)
    # To first order in sigma^2: d - d (d - 2) sigma^2 / (4 R^2).
    sphere, sigma = Sphere(10, 2.0), 1e-3
    assert float(sphere.flipd(2 * x, sigma)) == pytest.approx(10 - 80 * sigma**2 / 16, abs=1e-9)


def test_sphere_is_smooth_at_the_centre(x64):
    sphere, origin = Sphere(4, 1.3), jnp.zeros(5)
    hessian = jax.jit(jax.hessian(lambda x: sphere.log_density(x, 0.5)))(origin)
    # J = Cov / sigma^2 = R^2 / (n sigma^2) I, and the score's Jacobian is (J - I) / sigma^2.
    jacobian = np.eye(5) * 1.3**2 / 5 / 0.25
    np.testing.assert_allclose(jax.jit(jax.jacrev(sphere))(origin, 0.5), jacobian, atol=1e-12)
    np.testing.assert_allclose(hessian, (jacobian - np.eye(5)) / 0.25, atol=1e-11)
    # F = (|x|^2 + R^2 - 2 x . D) / sigma^2, so its Hessian is (2 I - 4 J) / sigma^2.
    hessian = jax.jit(jax.jacfwd(jax.jacfwd(lambda x: sphere.flipd(x, 0.5))))(origin)
    np.testing.assert_allclose(hessian, (2 * np.eye(5) - 4 * jacobian) / 0.25, atol=1e-11)


# Bessel functions.


@functools.cache
def bessel_by_mpmath(nu, k):
    """h, B, G, dh/dw, d^2h/dw^2 and dB/dk, from the definitions."""
    with mp.workdps(50):
        nu, k = mp.mpf(nu), mp.mpf(k)
        i = [mp.besseli(nu + j, k) for j in range(4)]
        h = [i[j + 1] / i[j] / k for j in range(3)]
        log_normaliser = mp.log(mp.gamma(nu + 1) * (k / 2) ** -nu * i[0])
        # d/dk [k^-nu I_nu] = k^-nu I_{nu+1}: dlog(h_nu)/dw = (h_{nu+1} - h_nu) / 2.
        slopes = [h[j] * (h[j + 1] - h[j]) / 2 for j in range(2)]
        curvature = slopes[0] * (h[1] - h[0]) / 2 + h[0] * (slopes[1] - slopes[0]) / 2
        a = k * h[0]
        slope_b = -(1 - a**2 - (2 * nu + 1) * h[0])
        return [float(v) for v in (h[0], 1 - a, log_normaliser, slopes[0], curvature, slope_b)]


@pytest.mark.parametrize("x64_mode", [True, False])
def test_bessel_functions_to_the_last_digits(x64_mode):
    with jax.enable_x64(x64_mode):
        eps = float(jnp.finfo(jnp.zeros(()).dtype).eps)
        ks = np.array([1e-6, 1e-3, 0.1, 1, 5, 12, 20, 23.9, 24.1, 30, 100, 1e3, 1e5, 1e8])
        ks = jnp.asarray(ks.astype(np.float32), float)
        for nu in (0.0, 0.5, 4.5, 23.5, 50.0, 400.0):
            exact = np.array([bessel_by_mpmath(nu, float(k)) for k in ks]).T

            @jax.jit
            @jax.vmap
            def evaluate(k, nu=nu):
                ratio = lambda w: bessel.ratio(nu, w)  # noqa: E731
                slope = jax.grad(ratio)
                return (
                    ratio(k**2),
                    bessel.complement(nu, k),
                    bessel.log_normaliser(nu, k**2),
                    slope(k**2),
                    jax.grad(slope)(k**2),
                    jax.grad(lambda k: bessel.complement(nu, k))(k),
                    2 * jax.grad(lambda w: bessel.log_normaliser(nu, w))(k**2),
                    bessel.scaled_log_normaliser(nu, k),
                    -jax.grad(lambda k: bessel.scaled_log_normaliser(nu, k))(k),
                )

            got = [np.asarray(value, np.float64) for value in evaluate(ks)]
            h, b, g, slope, curvature, slope_b, h_again, scaled, b_again = got
            np.testing.assert_allclose(h, exact[0], 4 * eps)
            np.testing.assert_allclose(b, exact[1], 20 * eps)
            np.testing.assert_allclose(g, exact[2], rtol=4 * eps, atol=100 * 2.3e-16 + 4 * eps)
            np.testing.assert_allclose(slope, exact[3], 8 * eps)
            # d^2h/dw^2 underflows float32 at the largest k.
            normal = np.abs(exact[4]) > float(jnp.finfo(ks.dtype).tiny)
            np.testing.assert_allclose(curvature[normal], exact[4][normal], 60 * eps)
            np.testing.assert_allclose(slope_b[:-1], exact[5][:-1], 400 * eps)
            np.testing.assert_allclose(h_again, exact[0], 8 * eps)
            np.testing.assert_allclose(scaled[:-2], (exact[2] - ks)[:-2], 1e-3, atol=2e-3)
            np.testing.assert_allclose(b_again, exact[1], 60 * eps)


def test_scaled_log_normaliser_keeps_its_digits(x64):
    for nu, k in ((0.0, 1e6), (4.5, 1e8), (400.0, 3e3)):
        with mp.workdps(50):
            exact = mp.log(mp.gamma(nu + 1) * mp.mpf(k / 2) ** -nu * mp.besseli(nu, k)) - k
        np.testing.assert_allclose(
            bessel.scaled_log_normaliser(nu, jnp.asarray(k)), float(exact), 1e-13
        )


def test_bessel_functions_at_zero(x64):
    zero = jnp.zeros(())
    for nu in (0.0, 4.5, 30.0):
        assert float(bessel.log_normaliser(nu, zero)) == pytest.approx(0, abs=1e-14)
        assert float(bessel.ratio(nu, zero)) == pytest.approx(1 / (2 * nu + 2), rel=1e-15)
        slope = float(jax.grad(lambda w, nu=nu: bessel.ratio(nu, w))(zero))
        assert slope == pytest.approx(-1 / ((2 * nu + 2) ** 2 * (2 * nu + 4)), rel=1e-14)


def test_debye_polynomials_are_those_of_the_handbook():
    # DLMF 10.41.10 and .11: U_1 = (3p - 5p^3)/24, V_1 = (-9p + 7p^3)/24, U_2 likewise.
    p_table, q_table = bessel._POLYNOMIALS
    np.testing.assert_allclose(p_table[1, :2], [3 / 24, -5 / 24])
    np.testing.assert_allclose(p_table[2, :3], np.array([81, -462, 385]) / 1152)
    # V_1 - U_1 = -(1 - p^2) Q_0 p, and V_2 - U_2 = -(1 - p^2) p^2 Q_1(p^2).
    v_2 = np.array([-135, 594, -455]) / 1152
    np.testing.assert_allclose(q_table[0, 0], 0.5)
    difference = np.polynomial.polynomial.polymul([-1, 1], q_table[1, :2])
    np.testing.assert_allclose(difference, v_2 - p_table[2, :3])


# Dimension.


def test_lid_on_and_off_the_support():
    for name, dim in (("gaussian", 3), ("atom", 0), ("sphere", 3), ("circle", 1), ("empirical", 0)):
        denoiser = make(name)
        x = denoiser.sample(50, key=jax.random.key(0))
        np.testing.assert_array_equal(dims(denoiser, x), dim)
        assert np.isnan(np.asarray(dims(denoiser, x + 0.01))).mean() > 0.9
        np.testing.assert_array_equal(dims(denoiser, x + 0.01, 0.1), dim)


def test_lid_of_a_mixture_is_its_smallest_dimension():
    line = LinearGaussian(jnp.zeros(3), jnp.eye(3)[:, :1], jnp.ones(1))
    plane = LinearGaussian(jnp.zeros(3), jnp.eye(3)[:, :2], jnp.ones(2))
    mixture = Mixture((plane, line, LinearGaussian.atom(jnp.eye(3)[0])), jnp.array([5.0, 1.0, 1.0]))
    x = jnp.array([[1.0, 2.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(dims(mixture, x), [2, 1, 0, np.nan])
    np.testing.assert_allclose(jax.vmap(mixture.distance)(x), [0, 0, 0, 1], atol=1e-6)
    # The limit of F as sigma -> 0 is what lid says.
    limits = [float(evaluate(mixture, point, 1e-4)[2]) for point in x[:3]]
    np.testing.assert_allclose(limits, [2, 1, 0], atol=1e-2)
    # A component of weight 0 is not there.
    absent = Mixture(mixture.components, jnp.array([5.0, 0.0, 1.0]))
    assert float(absent.lid(x[1])) == 2


@pytest.mark.parametrize("name", NAMES)
def test_flipd_tends_to_lid(name, x64):
    denoiser = make(name)
    x = denoiser.sample(20, key=jax.random.key(3))
    limits = jax.jit(jax.vmap(denoiser.flipd, in_axes=(0, None)))(x, 1e-5)
    np.testing.assert_allclose(limits, dims(denoiser, x), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_flipd_off_the_support_is_distance_over_sigma(name, x64):
    denoiser = make(name)
    x = 3 * jax.random.normal(jax.random.key(4), denoiser.shape)
    if name == "full gaussian":
        assert float(denoiser.distance(x)) < 1e-12
    else:
        ratio = evaluate(denoiser, x, 1e-4)[2] * 1e-8 / denoiser.distance(x) ** 2
        assert float(ratio) == pytest.approx(1, abs=1e-5)


# Symmetries.


def orthogonal(rng, dim):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def moved(denoiser, rotation, shift, scale):
    """The law of shift + scale * rotation @ x0."""
    match denoiser:
        case LinearGaussian(mean, basis, scales):
            return LinearGaussian(shift + scale * rotation @ mean, rotation @ basis, scale * scales)
        case Empirical(points):
            return Empirical(shift + scale * points @ rotation.T, chunk_size=denoiser.chunk_size)
        case Mixture(components, weights):
            return Mixture([moved(c, rotation, shift, scale) for c in components], weights)
        case Sphere():
            return Sphere(denoiser.dim, scale * denoiser.radius, rotation @ denoiser.tilt)


@given(seed=seeds, log_scale=st.floats(-2, 2), sigma=st.floats(0.05, 3))
@few
def test_equivariance(seed, log_scale, sigma):
    with jax.enable_x64(True):
        rng, scale = np.random.default_rng(seed), np.exp(log_scale)
        rotation, shift = orthogonal(rng, 4), rng.normal(size=4)
        cloud = Empirical(rng.normal(size=(11, 4)), chunk_size=4)
        for denoiser, offset in (
            (make("mixture"), shift),
            (cloud, shift),
            (Sphere(3, 1.1, 2 * rng.normal(size=4)), np.zeros(4)),
        ):
            x = jnp.asarray(rng.normal(size=4))
            mean, log_density, flipd = evaluate(denoiser, x, sigma)
            image = moved(denoiser, rotation, offset, scale)
            result = evaluate(image, offset + scale * rotation @ x, scale * sigma)
            np.testing.assert_allclose(result[0], offset + scale * rotation @ mean, atol=1e-10)
            np.testing.assert_allclose(result[1], log_density - 4 * np.log(scale), atol=1e-8)
            np.testing.assert_allclose(result[2], flipd, rtol=1e-8)


@given(seed=seeds, chunk_size=st.sampled_from([1, 7, 23, 64]), sigma=st.floats(0.02, 3))
@few
def test_empirical_does_not_depend_on_order_or_chunks(seed, chunk_size, sigma):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        points, x = rng.normal(size=(23, 3)), jnp.asarray(rng.normal(size=3))
        reference = evaluate(Empirical(points, chunk_size=5), x, sigma)
        other = evaluate(Empirical(rng.permutation(points), chunk_size=chunk_size), x, sigma)
        for a, b in zip(reference, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_and_jit_is_eager(name, x64):
    denoiser = make(name)
    x, sigma = noisy_points(denoiser, num=1)

    def everything(denoiser, x, sigma):
        quantities = (denoiser.log_density(x, sigma), denoiser.flipd(x, sigma), denoiser.lid(x))
        return denoiser(x, sigma), *quantities, denoiser.distance(x)

    together = jax.jit(jax.vmap(everything, in_axes=(None, 0, 0)))(denoiser, x, sigma)
    compiled = jax.jit(everything)
    for i in range(len(x)):
        for a, b in zip(together, compiled(denoiser, x[i], sigma[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-10, atol=1e-12)
    for a, b in zip(together, everything(denoiser, x[1], sigma[1]), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-10, atol=1e-12)


# Derivatives of `Empirical`, which are written by hand.


def dense_moments(points, x, sigma):
    squares = jnp.sum((points - x) ** 2, axis=1)
    logits = -squares / (2 * sigma**2)
    weights = jax.nn.softmax(logits)
    log_density = jax.nn.logsumexp(logits) - jnp.log(len(points))
    log_density -= x.size * jnp.log(2 * jnp.pi * sigma**2) / 2
    return weights @ points, log_density, weights @ squares / sigma**2


def test_empirical_derivatives_are_those_of_the_dense_formula(x64):
    rng = np.random.default_rng(9)
    points, x = jnp.asarray(rng.normal(size=(10, 3))), jnp.asarray(rng.normal(size=3))
    args = points, x, jnp.asarray(0.8)

    def streamed(points, x, sigma):
        return evaluate(Empirical(points, chunk_size=4), x, sigma)

    def scalar(function):
        def loss(points, x, sigma):
            mean, log_density, flipd = function(points, x, sigma)
            return jnp.sum(jnp.sin(mean)) + log_density**2 + jnp.cos(flipd)

        return loss

    for derivative in (jax.jacfwd, jax.jacrev):
        got = jax.jit(derivative(streamed, argnums=(0, 1, 2)))(*args)
        expected = jax.jit(derivative(dense_moments, argnums=(0, 1, 2)))(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, expected)
    for outer in (jax.jacfwd, jax.jacrev):
        got, expected = (
            jax.jit(outer(jax.grad(scalar(f), argnums=(0, 1, 2)), argnums=(0, 1, 2)))(*args)
            for f in (streamed, dense_moments)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, expected)


def test_empirical_temporaries_are_a_few_chunks():
    """At 60,000 x 784, read from the compiler: the data are 188 MB, a chunk .8 MB."""
    data = jax.eval_shape(lambda: Empirical(jnp.zeros((60_000, 28, 28))))
    x = jax.ShapeDtypeStruct((28, 28), jnp.float32)
    basis = jax.ShapeDtypeStruct((64, 28, 28), jnp.float32)

    def linearized(data, x, basis):
        mean, tangent_map = jax.linearize(lambda x: data(x, 0.5), x)
        return mean, jax.lax.map(tangent_map, basis, batch_size=32)

    for function, args, limit in (
        (lambda data, x: (data(x, 0.5), data.flipd(x, 0.5), data.distance(x)), (x,), 8e6),
        (jax.value_and_grad(lambda data, x: data.flipd(x, 0.5), argnums=1), (x,), 8e6),
        (linearized, (x, basis), 16e6),
    ):
        compiled = jax.jit(function).lower(data, *args).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < limit


def test_empirical_at_full_size_stays_within_a_gibibyte():
    script = """
        import resource
        import jax, jax.numpy as jnp, numpy as np
        from mmh_jax.analytic import Empirical

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        jnp.zeros(3).block_until_ready()
        before = peak()
        points = np.random.default_rng(0).random((60_000, 784), dtype=np.float32)
        data = Empirical(points)
        x = data.points[5] + 0.01
        value, slope = jax.jvp(lambda x: data(x, 1.0), (x,), (x,))
        gradient = jax.grad(lambda x: data.flipd(x, 1.0))(x)
        assert np.isfinite(value).all() and np.isfinite(slope).all() and np.isfinite(gradient).all()
        print((peak() - before) / 2**20)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output) < 1.0


# Sampling.


def test_samples_and_density_and_denoiser_are_of_one_law():
    """Importance weights on clean samples give the density and the posterior mean."""
    for name in ("gaussian", "tilted sphere", "empirical", "mixture"):
        denoiser, sigma = make(name), 0.9
        x0 = denoiser.sample(60_000, key=jax.random.key(1))
        x = denoiser.sample(1, key=jax.random.key(2))[0] + 0.4
        ambient_dim = x.size
        x0, flat = np.asarray(x0, np.float64).reshape(60_000, -1), np.asarray(x).reshape(-1)
        squares = np.sum((x0 - flat) ** 2, axis=1)
        weights = np.exp(-squares / (2 * sigma**2)) / (2 * np.pi * sigma**2) ** (ambient_dim / 2)
        mean, log_density, _ = evaluate(denoiser, x, sigma)
        density = np.exp(float(log_density))
        assert abs(weights.mean() - density) < 4.5 * weights.std() / 60_000**0.5
        errors = weights[:, None] * (x0 - np.asarray(mean).reshape(-1))
        limit = 4.5 * errors.std(axis=0) / 60_000**0.5 + 1e-7
        np.testing.assert_array_less(np.abs(errors.mean(axis=0)), limit)


def test_gaussian_samples_have_its_mean_and_covariance():
    denoiser = gaussian(np.random.default_rng(10), 4, 2)
    x = np.asarray(denoiser.sample(50_000, key=jax.random.key(0)))
    covariance = (denoiser.basis * denoiser.scales**2) @ denoiser.basis.T
    np.testing.assert_allclose(x.mean(axis=0), denoiser.mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.1)
    atom = LinearGaussian.atom(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(atom.sample(3, key=jax.random.key(0)), [[1.0, 2.0]] * 3)


def test_uniform_samples_of_the_sphere():
    x = np.asarray(Sphere(2, 3.0).sample(20_000, key=jax.random.key(0)))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 3, rtol=1e-6)
    # Archimedes: every coordinate is uniform on S^2.
    for coordinate in x.T:
        assert stats.kstest(coordinate, stats.uniform(-3, 6).cdf).pvalue > 1e-3


def test_zero_tilt_is_uniform(x64):
    tilted, uniform = Sphere(2, 1.5, jnp.zeros(3)), Sphere(2, 1.5)
    x = jnp.array([0.3, -1.0, 0.9])
    for sigma in (0.2, 4.0):
        for a, b in zip(evaluate(tilted, x, sigma), evaluate(uniform, x, sigma), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    sample = np.asarray(tilted.sample(5_000, key=jax.random.key(0)))
    for coordinate in sample.T:
        assert stats.kstest(coordinate, stats.uniform(-1.5, 3).cdf).pvalue > 1e-3


def test_von_mises_fisher_samples():
    x = np.asarray(von_mises(0.5, 2.0).sample(20_000, key=jax.random.key(0)))
    angles = np.arctan2(x[:, 1], x[:, 0])
    assert stats.kstest(angles, stats.vonmises(2.0, loc=0.5).cdf).pvalue > 1e-3
    for kappa in (0.1, 5.0, 1e4):
        direction = np.array([2.0, -1.0, 2.0]) / 3
        sphere = Sphere(2, 1.0, jnp.asarray(kappa * direction))
        x = np.asarray(sphere.sample(20_000, key=jax.random.key(1)), np.float64)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
        # On S^2 the cosine W to the mean direction has P(W < w) = expm1(-k (1-w)) / expm1(-2k) ...
        fall = np.sum((x - direction) ** 2, axis=1) / 2  # 1 - W
        survival = np.expm1(-kappa * fall) / np.expm1(-2 * kappa)
        assert stats.kstest(survival, "uniform").pvalue > 1e-3
        # ... and the direction across it is uniform.
        across = x - (x @ direction)[:, None] * direction
        east = np.array([1, 2, 0]) / 5**0.5
        turn = np.arctan2(across @ east, across @ np.cross(direction, east))
        assert stats.kstest(turn, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-4


def test_mixture_and_empirical_samples_have_the_right_shares():
    x = np.asarray(make("toy").sample(20_000, key=jax.random.key(0)))
    share = np.mean(np.linalg.norm(x, axis=1) < 0.5)
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 20_000) ** 0.5)
    data = Empirical(jnp.arange(5.0)[:, None])
    x = np.asarray(data.sample(20_000, key=jax.random.key(1)))
    counts = np.bincount(x[:, 0].astype(int), minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert data.sample(0, key=jax.random.key(0)).shape == (0, 1)


# Pytrees and errors.


@pytest.mark.parametrize("name", NAMES)
def test_denoisers_are_pytrees(name):
    denoiser = make(name)
    assert isinstance(denoiser, Denoiser)
    # JAX may put anything in the place of leaves: nothing is checked then.
    negative = jax.tree.map(lambda leaf: -3 * jnp.asarray(leaf), denoiser)
    assert jax.tree.structure(negative) == jax.tree.structure(denoiser)
    jax.tree.map(lambda leaf: None, denoiser)
    x = denoiser.sample(1, key=jax.random.key(0))[0]
    gradient = jax.jit(jax.grad(lambda d: d.log_density(x + 0.1, 0.5)))(denoiser)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_many_denoisers_at_once():
    atoms = jax.vmap(LinearGaussian.atom)(jnp.arange(6.0).reshape(3, 2))
    values = jax.vmap(lambda atom: atom.flipd(jnp.zeros(2), 1.0))(atoms)
    np.testing.assert_allclose(values, [1, 13, 41], rtol=1e-6)

    @jax.jit
    def under_jit(scales):
        return LinearGaussian(jnp.zeros(2), jnp.eye(2), scales).flipd(jnp.zeros(2), 1.0)

    assert float(under_jit(jnp.ones(2))) == 1.0


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: LinearGaussian(jnp.zeros((2, 2)), jnp.eye(2), jnp.ones(2)), ValueError, "mean"),
        (lambda: LinearGaussian(jnp.zeros(3), jnp.eye(2), jnp.ones(2)), ValueError, "basis"),
        (lambda: LinearGaussian(jnp.zeros(2), 2 * jnp.eye(2), jnp.ones(2)), ValueError, "ortho"),
        (lambda: LinearGaussian(jnp.zeros(2), jnp.eye(2), jnp.zeros(2)), ValueError, "positive"),
        (lambda: LinearGaussian(jnp.zeros(2, bool), jnp.eye(2), [1, 1]), TypeError, "dtype"),
        (lambda: Mixture((), []), ValueError, "at least one"),
        (lambda: Mixture((Sphere(1), Sphere(2)), [1, 1]), ValueError, "one shape"),
        (lambda: Mixture((Sphere(1),), [1, 1]), ValueError, "one weight"),
        (lambda: Mixture((Sphere(1), Sphere(1)), [-1, 2]), ValueError, "not negative"),
        (lambda: Sphere(0), ValueError, "atom"),
        (lambda: Sphere(1, -1.0), ValueError, "radius"),
        (lambda: Sphere(1, 1.0, jnp.ones(3)), ValueError, "tilt"),
        (lambda: Empirical(np.zeros((3, 2), np.uint8)), TypeError, "float32"),
        (lambda: Empirical(jnp.zeros((0, 2))), ValueError, "N >= 1"),
        (lambda: Empirical(jnp.zeros((3, 2)), chunk_size=0), ValueError, "chunk_size"),
        (lambda: Sphere(2).flipd(jnp.ones((5, 3)), 1.0), ValueError, "vmap"),
        (lambda: Sphere(2)(jnp.ones(2), 1.0), ValueError, "shape"),
        (lambda: Empirical(jnp.zeros((3, 2)))(jnp.ones(2, int), 1.0), TypeError, "astype"),
    ],
)
def test_errors_say_what_is_wrong(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_checks_do_not_break_tracing():
    jax.jit(lambda basis: LinearGaussian(jnp.zeros(2), basis, jnp.ones(2)).basis)(2 * jnp.eye(2))
    jax.jit(lambda radius: Sphere(1, radius).radius)(-1.0)
    jax.jit(lambda weights: Mixture((Sphere(1),), weights).weights)(-jnp.ones(1))


@pytest.mark.parametrize(("dim", "sigma"), [(64, 1e-6), (3072, 0.03)])
def test_a_data_set_at_very_small_noise_in_one_program(dim, sigma):
    """Exponents of 1e9 and more: a fused subtraction must not make a weight above 1 of them."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, dim)).astype(np.float32) * (1 if dim == 64 else 80)
    data = Empirical(jnp.asarray(points), chunk_size=1024)
    queries = points[:10] + rng.normal(size=(10, dim)).astype(np.float32) / 4
    answer = jax.jit(lambda x: (data(x, sigma), data.flipd(x, sigma)))
    for query, point in zip(queries, points, strict=False):
        denoised, dimension = answer(jnp.asarray(query))
        np.testing.assert_allclose(denoised, point, atol=1e-4)
        square = np.sum((query.astype(float) - point) ** 2)
        np.testing.assert_allclose(dimension, square / sigma**2, rtol=1e-4)
