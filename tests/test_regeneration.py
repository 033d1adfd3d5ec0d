"""The spread of the denoised, and of what a sampler regenerates: dimensions by whole steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid, sample
from mmh_jax import memorization as mem

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SCALES = np.array([0.4, 0.7, 1.5])
BASIS = np.linalg.qr(RNG.normal(size=(5, 3)))[0]
Y = np.array([0.6, -0.5, 1.5])
SIGMA = 0.3


def gaussian():
    """On a subspace of dimension 3 of R^5, and a point of it."""
    model = analytic.LinearGaussian(np.arange(5.0), BASIS, SCALES)
    return model, jnp.asarray(model.mean + BASIS @ Y)


def gains(sigma):
    return SCALES**2 / (SCALES**2 + sigma**2)


def noises(key, num, dtype):
    """Those that an estimator draws, in coordinates of the subspace."""
    keys = jax.random.split(key, num)
    return np.asarray(jax.vmap(lambda k: jax.random.normal(k, (5,), dtype))(keys)) @ BASIS


def test_spread_is_that_of_the_noise_that_is_let_through(x64):
    model, x = gaussian()
    found = lid.denoised_spread(model, x, SIGMA, key=KEY, num_samples=50, chunk_size=7)
    through = gains(SIGMA) * noises(KEY, 50, jnp.float64)
    np.testing.assert_allclose(found.value, through.var(axis=0, ddof=1).sum(), rtol=1e-9)


def test_the_loss_and_its_mean_with_the_spread_are_of_the_same_draws(x64):
    model, x = gaussian()
    draws = {"key": KEY, "num_samples": 50, "chunk_size": 7}
    found = lid.denoised_return(model, x, SIGMA, **draws)
    through, kept = gains(SIGMA) * noises(KEY, 50, jnp.float64), (1 - gains(SIGMA)) * Y / SIGMA
    losses = ((through - kept) ** 2).sum(axis=1)
    np.testing.assert_allclose(found.dimension.value, losses.mean(), rtol=1e-9)
    loss = lid.denoising_loss(model, x, SIGMA, ratio=None, **draws)
    np.testing.assert_allclose(found.dimension, loss, rtol=1e-12)
    assert found.spread == lid.denoised_spread(model, x, SIGMA, **draws)
    both = found.dimension.value * found.spread.value
    np.testing.assert_allclose(found.mean.value, both**0.5, rtol=1e-12)


def test_spread_and_its_error_in_the_mean(x64):
    model, x = gaussian()
    truth = np.sum(gains(SIGMA) ** 2)
    spread = jax.jit(lambda key: lid.denoised_spread(model, x, SIGMA, key=key, num_samples=32))
    found = jax.lax.map(spread, jax.random.split(KEY, 1_000))
    mean, error = found.value.mean(), found.value.std(ddof=1) / 1_000**0.5
    assert abs(mean - truth) < 3 * error
    inside = np.mean(np.abs(found.value - truth) < 1.96 * found.stderr)
    assert 0.9 < inside < 0.98


def test_spread_in_single_precision(x64):
    model, x = gaussian()
    exact = lid.denoised_spread(model, x, SIGMA, key=KEY, num_samples=4096)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model)
    found = lid.denoised_spread(single, jnp.float32(x), SIGMA, key=KEY, num_samples=4096)
    assert found.value.dtype == jnp.float32
    # Other draws: JAX has its own for each precision.
    assert abs(found.value - exact.value) < 3 * np.hypot(found.stderr, exact.stderr)
    through = gains(SIGMA) * noises(KEY, 4096, jnp.float32)
    np.testing.assert_allclose(found.value, through.var(axis=0, ddof=1).sum(), rtol=1e-4)


def test_spread_lies_between_two_norms_of_the_jacobian(x64):
    points = jnp.asarray(RNG.normal(size=(6, 3)))
    model, x, sigma = analytic.Empirical(points), points[0] + 0.1, 0.6
    spread = lid.denoised_spread(model, x, sigma, key=KEY, num_samples=20_000)
    draws = x + sigma * jax.random.normal(KEY, (20_000, 3))
    jacobians = jax.lax.map(jax.jacfwd(lambda x: model(x, sigma)), draws, batch_size=500)
    low, high = jnp.sum(jacobians.mean(0) ** 2), jnp.sum(jacobians**2, axis=(1, 2)).mean()
    assert low < spread.value - 3 * spread.stderr
    assert spread.value + 3 * spread.stderr < high


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_neither_shifts_nor_units_matter(x64, scale):
    points = jnp.asarray(0.3 * RNG.normal(size=(6, 3)))
    levels = sample.karras_levels(6, sigma_min=0.01, sigma_max=SIGMA)
    shift = jnp.array([3.0, -1.0, 2.0])

    def both(scale, shift):
        model, x = analytic.Empirical(scale * points + shift), scale * (points[0] + 0.1) + shift
        again = mem.regeneration(model, x, scale * levels, key=KEY)
        return lid.denoised_spread(model, x, scale * SIGMA, key=KEY), again.dimension, again.spread

    np.testing.assert_allclose(both(1.0, 0 * shift), both(scale, scale * shift), rtol=1e-6)


def test_regeneration_is_the_flow_of_a_gaussian(x64):
    model, x = gaussian()
    gain = np.sqrt(gains(SIGMA))
    ends = gain * (Y + SIGMA * noises(KEY, 4, jnp.float64))
    square = np.sum((ends - Y) ** 2, axis=1).mean() / SIGMA**2
    spread = ends.var(axis=0, ddof=1).sum() / SIGMA**2

    def errors(num):
        levels = np.geomspace(SIGMA, 1e-5, num)
        found = mem.regeneration(model, x, levels, key=KEY, num_samples=4)
        return abs(found.dimension.value - square) / square, found.spread.value / spread - 1

    coarse, fine, finest = errors(200)[0], errors(400)[0], errors(4_000)
    assert 3.5 < coarse / fine < 4.5  # of second order
    assert np.all(np.abs(finest) < 1e-6)


def test_regeneration_in_the_mean(x64):
    model, x = gaussian()
    g, levels = gains(SIGMA), np.geomspace(SIGMA, 1e-3, 40)
    found = mem.regeneration(model, x, levels, key=KEY, num_samples=4_000, chunk_size=500)
    value = np.sum(g) + np.sum((1 - np.sqrt(g)) ** 2 * Y**2) / SIGMA**2
    assert abs(found.dimension.value - value) < 3 * found.dimension.stderr
    assert abs(found.spread.value - np.sum(g)) < 3 * found.spread.stderr
    assert found.ends.shape == (4_000, 5)
    assert float(found.mean.value) == pytest.approx(np.sqrt(value * np.sum(g)), rel=0.05)
    half = float(found.dimension.stderr + found.spread.stderr) / 2
    assert float(found.mean.stderr) == pytest.approx(half, rel=0.1)


def test_what_is_memorized_comes_back(x64):
    points = jnp.asarray(30 * np.eye(3))
    law = analytic.LinearGaussian(np.zeros(3), np.eye(3), 10 * np.ones(3))
    levels = sample.karras_levels(16, sigma_min=0.01, sigma_max=2.0)
    x = points[0] + jnp.array([0.3, 0.0, 0.0])
    memory, novel = (
        mem.regeneration(m, x, levels, key=KEY) for m in (analytic.Empirical(points), law)
    )
    np.testing.assert_allclose(memory.dimension.value, (0.3 / 2.0) ** 2, rtol=1e-6)
    assert memory.spread.value < 1e-12
    assert novel.dimension.value > 1
    assert lid.denoised_spread(analytic.Empirical(points), x, 2.0, key=KEY).value < 1e-6


def test_under_jit_and_vmap():
    points = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    model, levels = analytic.Empirical(points), jnp.array([0.5, 0.2, 0.05])

    def both(x, key):
        again = mem.regeneration(model, x, levels, key=key, num_samples=5, chunk_size=2)
        return lid.denoised_spread(model, x, 0.5, key=key, num_samples=5), again.dimension

    keys = jax.random.split(KEY, 6)
    many = jax.jit(jax.vmap(both))(points, keys)
    for i in range(2):
        for one, all_of in zip(
            jax.tree.leaves(both(points[i], keys[i])), jax.tree.leaves(many), strict=True
        ):
            np.testing.assert_allclose(one, all_of[i], rtol=1e-4)


def zero(x, sigma):
    return 0 * x


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lid.denoised_spread(zero, jnp.ones(2), 0.1, key=None), TypeError, "needs a key"),
        (
            lambda: lid.denoised_spread(zero, jnp.ones(2), 0.1, key=KEY, num_samples=1),
            ValueError,
            "num_samples=1.*at least 2",
        ),
        (lambda: lid.denoised_spread(zero, jnp.ones(2), -1.0, key=KEY), ValueError, "positive"),
        (
            lambda: mem.regeneration(zero, jnp.ones(2), jnp.array([0.1, 0.2]), key=KEY),
            ValueError,
            "decreasing",
        ),
        (
            lambda: mem.regeneration(zero, jnp.ones(2), jnp.array([0.1]), key=KEY),
            ValueError,
            "at least 2 decreasing",
        ),
        (
            lambda: mem.regeneration(zero, jnp.ones(2), jnp.array([0.2, 0.1]), key=None),
            TypeError,
            "needs a key",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_detectors_read_them():
    points = (30 * np.eye(3)).astype(np.float32)
    law = analytic.LinearGaussian(np.zeros(3), np.eye(3), 10 * np.ones(3))
    levels = sample.karras_levels(8, sigma_min=0.01, sigma_max=2.0)
    settings = mem.Settings(2.0, num_samples=8, regeneration_levels=levels, num_regenerations=6)
    subject = mem.Subject(
        points[:2], analytic.Empirical(jnp.asarray(points)), baseline=jax.tree.map(jnp.float32, law)
    )
    names = [
        "denoised_spread", "regeneration", "regeneration_spread", "regeneration_log_ratio_baseline",
        "denoised_spread_log_ratio_baseline", "regeneration_spread_log_ratio_baseline",
        "denoised_mean_log_ratio_baseline",
    ]  # fmt: skip
    found = mem.scores(names, subject, settings, key=KEY)
    assert found.evaluations["denoised_spread"] == 8
    assert found.evaluations["regeneration"] == 6 * 15
    assert found.evaluations["regeneration_log_ratio_baseline"] == 2 * 6 * 15
    assert found.total == 2 * 8 + 2 * 6 * 15
    for name in names[3:]:
        assert np.all(found.value[name] > 5)
    with pytest.raises(ValueError, match="regeneration_levels"):
        mem.scores(["regeneration"], subject, mem.Settings(2.0), key=KEY)
