"""VAE and GAN: losses against closed forms, training, and runs that continue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import lid, nn, train

D, LATENT = 5, 2


class Linear(nnx.Module):
    """z -> W z + b, with the posterior of a linear-Gaussian model as its encoder."""

    def __init__(self, weight, bias):
        self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)

    def __call__(self, z):
        return self.weight[...] @ z + self.bias[...]


class LinearEncoder(nnx.Module):
    def __init__(self, weight, bias, log_variance):
        self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)
        self.log_variance = nnx.Param(log_variance)

    def __call__(self, x):
        return self.weight[...] @ x + self.bias[...], self.log_variance[...]


def linear_model(sigma=0.7, seed=0):
    """p(x) = N(b, W W^T + sigma^2 I), with orthogonal columns, and q the exact posterior."""
    rng = np.random.default_rng(seed)
    scales = np.array([2.0, 0.5])
    weight = np.linalg.qr(rng.normal(size=(D, LATENT)))[0] * scales
    bias = rng.normal(size=D)
    variances = sigma**2 / (sigma**2 + scales**2)
    back = variances[:, None] * weight.T / sigma**2
    encoder = LinearEncoder(*map(jnp.asarray, (back, -back @ bias, np.log(variances))))
    model = train.vae(encoder, Linear(jnp.asarray(weight), jnp.asarray(bias)), sigma=sigma)
    covariance = weight @ weight.T + sigma**2 * np.eye(D)
    return model, bias, covariance


def log_normal(x, mean, covariance):
    delta = x - mean
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (delta @ np.linalg.solve(covariance, delta) + log_det)


def mean_elbo(model, x, num=20_000, beta=1.0):
    keys = jax.random.split(jax.random.key(0), num)
    found = jax.jit(jax.vmap(lambda key: train.elbo(model, x, key=key, beta=beta)))(keys)
    values = np.asarray(found.value)
    return values.mean(), values.std() / np.sqrt(num), found


def test_the_bound_is_the_likelihood_at_the_exact_posterior(x64):
    model, mean, covariance = linear_model()
    x = jnp.asarray(mean) + jnp.array([1.0, -0.5, 2.0, 0.3, -1.0])
    value, stderr, _ = mean_elbo(model, x)
    assert stderr < 0.02
    assert abs(value - log_normal(np.asarray(x), mean, covariance)) < 3.5 * stderr


def test_elsewhere_it_is_short_by_the_divergence_from_the_posterior(x64):
    model, mean, covariance = linear_model()
    x = jnp.asarray(mean) + 0.5
    moved = dataclasses.replace(
        model, encode=lambda params, x: (model.encode(params, x)[0] + 0.3, jnp.array([-1.0, 0.2]))
    )
    _, exact_log = model.posterior(x)
    ratio = jnp.exp(jnp.array([-1.0, 0.2]) - exact_log)
    gap = 0.5 * jnp.sum(ratio - 1 - jnp.log(ratio) + 0.3**2 / jnp.exp(exact_log))
    value, stderr, _ = mean_elbo(moved, x)
    expected = log_normal(np.asarray(x), mean, covariance) - float(gap)
    assert abs(value - expected) < 3.5 * stderr
    assert gap > 30 * stderr


def test_the_divergence_is_closed_and_beta_weighs_it(x64):
    model, mean, _ = linear_model()
    x = jnp.asarray(mean) + 1.0
    _, _, found = mean_elbo(model, x, num=3, beta=4.0)
    m, v = model.posterior(x)
    expected = 0.5 * jnp.sum(m**2 + jnp.exp(v) - 1 - v)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-12)
    np.testing.assert_allclose(found.value, found.log_likelihood - 4 * found.divergence, rtol=1e-12)


def test_the_gradient_of_the_bound_reaches_the_encoder(x64):
    # d ELBO / d shift of the mean, at the exact posterior, is 0; away from it, -delta / variance.
    model, mean, _ = linear_model()
    x = jnp.asarray(mean) + 0.5
    log_variance = model.posterior(x)[1]

    def mean_bound(shift, keys):
        moved = dataclasses.replace(
            model, encode=lambda params, x: (model.encode(params, x)[0] + shift, log_variance)
        )
        return jnp.mean(jax.vmap(lambda key: train.elbo(moved, x, key=key).value)(keys))

    keys = jax.random.split(jax.random.key(1), 200)
    each = jax.jit(jax.vmap(lambda k: jax.grad(mean_bound)(jnp.array([0.4, -0.2]), k[None])))(keys)
    expected = -np.array([0.4, -0.2]) / np.exp(log_variance)
    error = np.asarray(each).std(axis=0) / np.sqrt(200)
    assert np.all(np.abs(np.asarray(each).mean(axis=0) - expected) < 3.5 * error)


def test_a_linear_vae_learns_the_principal_subspace_and_the_noise():
    # Tipping & Bishop 1999: the optimum is probabilistic PCA.
    _, mean, covariance = linear_model(sigma=0.3)
    rng = np.random.default_rng(1)
    points = rng.multivariate_normal(mean, covariance, 2_000).astype(np.float32)
    start = train.vae(
        LinearEncoder(jnp.zeros((LATENT, D)), jnp.zeros(LATENT), jnp.zeros(LATENT)),
        Linear(jnp.asarray(rng.normal(size=(D, LATENT)) / 3, jnp.float32), jnp.zeros(D)),
        sigma=1.0,
    )
    config = train.VaeConfig(num_steps=2_000, batch_size=128, learning_rate=0.02)
    *_, last = train.fit_vae(start, points, config, key=jax.random.key(0))
    found = last.state.ema
    np.testing.assert_allclose(found.sigma, 0.3, rtol=0.05)
    singular = lid.decoder_spectrum(found, jnp.zeros(LATENT))
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    np.testing.assert_allclose(singular, np.sqrt(values[:2] - values[2:].mean()), rtol=0.1)
    exact = np.mean([log_normal(x, mean, covariance) for x in points])
    np.testing.assert_allclose(last.elbo, exact, atol=0.1)


def ring(num=256):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, num)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Plain(nnx.Module):
    """Two layers; a scalar if it has no outputs."""

    def __init__(self, size, outputs, *, rngs):
        self.inner = nnx.Linear(size, 32, rngs=rngs)
        self.outer = nnx.Linear(32, max(outputs, 1), rngs=rngs)
        self.is_scalar = outputs == 0

    def __call__(self, x):
        answer = self.outer(nnx.silu(self.inner(x)))
        return answer[0] if self.is_scalar else answer


class PlainEncoder(Plain):
    def __call__(self, x):
        mean, log_variance = jnp.split(super().__call__(x), 2)
        return mean, log_variance


def plain_vae():
    rngs = nnx.Rngs(0)
    return train.vae(PlainEncoder(2, 4, rngs=rngs), Plain(2, 2, rngs=rngs))


def plain_gan():
    rngs = nnx.Rngs(0)
    return train.gan(Plain(2, 2, rngs=rngs), Plain(2, 0, rngs=rngs), latent_size=2)


def blobs(num=64):
    """Images of a bright spot that moves along a circle."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, num)
    centres = 14 + 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    grid = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), axis=-1)
    squares = ((grid[None] - centres[:, None, None]) ** 2).sum(-1)
    return np.exp(-squares / 18)[..., None].astype(np.float32)


def small_vae():
    rngs = nnx.Rngs(0)
    encoder = nn.ConvEncoder(3, channels=(4, 8), width=16, rngs=rngs)
    return train.vae(encoder, nn.ConvDecoder(3, channels=(8, 8, 4), rngs=rngs))


def small_gan():
    rngs = nnx.Rngs(0)
    decoder = nn.ConvDecoder(3, channels=(8, 8, 4), rngs=rngs)
    discriminator = nn.ConvDiscriminator(channels=(4, 8), width=16, rngs=rngs)
    return train.gan(decoder, discriminator, latent_size=3)


VAE = train.VaeConfig(num_steps=60, batch_size=16, learning_rate=4e-3, steps_per_round=20)
GAN = train.GanConfig(num_steps=60, batch_size=16, learning_rate=2e-3, steps_per_round=20)
FITS = {"vae": (train.fit_vae, plain_vae, VAE), "gan": (train.fit_gan, plain_gan, GAN)}


def equal(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.mark.parametrize("name", FITS)
def test_a_run_that_continues_ends_as_one_that_was_not_cut_off(name):
    fit, build, config = FITS[name]
    points, key = ring(), jax.random.key(1)
    *_, whole = fit(build(), points, config, key=key)
    assert whole.step == 60
    for metrics in fit(build(), points, dataclasses.replace(config, steps_per_round=25), key=key):
        if metrics.step == 25:
            break
    kept = jax.tree.map(np.array, metrics.state)
    steps = []
    for metrics in fit(build(), points, config, key=key, state=jax.tree.map(jnp.array, kept)):
        steps.append(metrics.step)
    assert steps == [40, 60]
    assert equal(metrics.state, whole.state)
    assert not equal(kept.model, whole.state.model)
    *_, other = fit(build(), points, config, key=jax.random.key(2))
    assert not equal(other.state, whole.state)


@pytest.mark.slow
def test_image_vae_training_raises_the_bound():
    # Against the best that does not look at the image: a Gaussian around the mean image.
    images = blobs()
    variance = np.mean((images - images.mean(axis=0)) ** 2)
    blind = -images[0].size / 2 * (np.log(2 * np.pi * variance) + 1)
    config = dataclasses.replace(VAE, num_steps=600, steps_per_round=100)
    fit = train.fit_vae(small_vae(), images, config, key=jax.random.key(0))
    found = [metrics.elbo for metrics in fit]
    assert found[-1] > blind + 300
    assert blind > found[0]


def test_gan_losses_are_those_of_the_paper(x64):
    # f(x) = a.x, g(z) = B z + c: everything is closed.
    rng = np.random.default_rng(3)
    a, b, c = (jnp.asarray(rng.normal(size=s)) for s in ((D,), (D, LATENT), (D,)))

    class Plane(nnx.Module):
        def __init__(self):
            self.normal = nnx.Param(a)

        def __call__(self, x):
            return self.normal[...] @ x

    model = train.gan(Linear(b, c), Plane(), latent_size=LATENT)
    x, z = jnp.asarray(rng.normal(size=D)), jnp.asarray(rng.normal(size=LATENT))
    fake, real = float(a @ (b @ z + c)), float(a @ x)
    softplus = lambda t: np.log1p(np.exp(t))  # noqa: E731
    loss, (margin, steepness) = train.discriminator_loss(model, x, z, penalty=3.0)
    np.testing.assert_allclose(loss, softplus(fake) + softplus(-real) + 1.5 * a @ a, rtol=1e-12)
    np.testing.assert_allclose([margin, steepness], [real - fake, a @ a], rtol=1e-12)
    np.testing.assert_allclose(train.generator_loss(model, z), softplus(-fake), rtol=1e-12)
    # The discriminator's loss does not move the generator.
    grads = jax.grad(lambda m: train.discriminator_loss(m, x, z, penalty=3.0)[0])(model)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads.generator))
    slope = jax.tree.leaves(grads.discriminator)[0]
    sigmoid = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
    expected = sigmoid(fake) * (b @ z + c) - sigmoid(-real) * x + 3 * a
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def distance_to(points, model, latent_size):
    latents = jax.random.normal(jax.random.key(5), (256, latent_size))
    samples = np.asarray(jax.vmap(model)(latents)).reshape(256, 1, -1)
    flat = points.reshape(1, len(points), -1)
    return np.linalg.norm(samples - flat, axis=-1).min(axis=1).mean()


def test_gan_training_brings_samples_to_the_data():
    points = ring()
    config = train.GanConfig(num_steps=1_500, batch_size=128, learning_rate=4e-3, penalty=0.1)
    *_, last = train.fit_gan(plain_gan(), points, config, key=jax.random.key(0))
    assert distance_to(points, last.state.ema, 2) < 0.4 * distance_to(points, plain_gan(), 2)
    # All around, not at one place.
    latents = jax.random.normal(jax.random.key(6), (1_000, 2))
    samples = np.asarray(jax.vmap(last.state.ema)(latents))
    assert np.all(np.histogram(np.arctan2(*samples.T), 8, (-np.pi, np.pi))[0] > 20)


@pytest.mark.slow
def test_image_gan_training_brings_samples_to_the_data():
    images = blobs(256)
    config = dataclasses.replace(GAN, num_steps=300, steps_per_round=100)
    *_, last = train.fit_gan(small_gan(), images, config, key=jax.random.key(0))
    assert distance_to(images, last.state.ema, 3) < 0.5 * distance_to(images, small_gan(), 3)


def test_networks_look_at_one_example():
    rngs = nnx.Rngs(0)
    decoder = nn.ConvDecoder(3, channels=(16, 8, 4), rngs=rngs)
    z = jax.random.normal(jax.random.key(0), (4, 3))
    images = jax.vmap(decoder)(z)
    assert images.shape == (4, 28, 28, 1)
    assert 0 < images.min() < images.max() < 1
    np.testing.assert_allclose(images[2], decoder(z[2]), atol=1e-6)
    encoder = nn.ConvEncoder(3, channels=(4, 4), width=8, rngs=rngs)
    np.testing.assert_array_equal(encoder(images[0])[0], encoder(images[0, ..., 0])[0])


def test_normalisation_is_over_groups_of_channels_of_one_image():
    decoder = nn.ConvDecoder(3, channels=(8, 16, 4), rngs=nnx.Rngs(0))
    z = jax.random.normal(jax.random.key(0), (3,))
    x = decoder.first(decoder.enter(z).reshape(7, 7, 8))
    groups = np.asarray(x).reshape(14, 14, 8, 2)
    centred = groups - groups.mean(axis=(0, 1, 3), keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=(0, 1, 3), keepdims=True) + 1e-6)
    h = decoder.second(jnp.asarray(scaled.reshape(x.shape)))
    expected = nnx.sigmoid(decoder.leave(nnx.silu(h)))
    np.testing.assert_allclose(decoder(z), expected, atol=1e-5)


def test_the_length_of_the_latent_is_not_normalised_away():
    decoder = nn.ConvDecoder(6, channels=(16, 16, 8), rngs=nnx.Rngs(0))
    apply, params = nn.split(decoder)
    spectrum = lid.decoder_spectrum(lambda z: apply(params, z), jnp.ones(6))
    assert spectrum[-1] > 0.05 * spectrum[0]


def test_pixel_shuffle_is_the_published_order():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    # Torch's channels are (C, 2, 2), ours (2, 2, C).
    theirs = x.reshape(3, 5, 2, 2, 2).transpose(0, 1, 4, 2, 3).reshape(3, 5, 8)
    expected = torch.nn.functional.pixel_shuffle(torch.tensor(theirs.transpose(2, 0, 1)), 2)
    np.testing.assert_array_equal(nn.pixel_shuffle(x), expected.numpy().transpose(1, 2, 0))


def test_bad_input_is_refused():
    images, key = blobs(8), jax.random.key(0)
    with pytest.raises(ValueError, match=r"\(28, 28\).*answers in \(28, 28, 1\)"):
        next(train.fit_gan(small_gan(), images[..., 0], GAN, key=key))
    with pytest.raises(ValueError, match=r"\(28, 28\).*answers in \(28, 28, 1\)"):
        next(train.fit_vae(small_vae(), images[..., 0], VAE, key=key))
    with pytest.raises(TypeError, match="uint8"):
        next(train.fit_vae(small_vae(), images.astype(np.uint8), VAE, key=key))
    with pytest.raises(ValueError, match="not finite"):
        next(train.fit_gan(small_gan(), images * np.nan, GAN, key=key))
    with pytest.raises(TypeError, match="key"):
        next(train.fit_gan(small_gan(), images, GAN, key=0))
    with pytest.raises(ValueError, match="penalty=-1"):
        train.GanConfig(penalty=-1.0)
    with pytest.raises(ValueError, match="num_steps=0"):
        train.VaeConfig(num_steps=0)
    with pytest.raises(ValueError, match="sigma=0"):
        train.vae(Linear(jnp.eye(2), jnp.zeros(2)), Linear(jnp.eye(2), jnp.zeros(2)), sigma=0.0)
    config = dataclasses.replace(VAE, learning_rate=1e30, num_steps=20)
    with pytest.raises(FloatingPointError, match="learning rate"):
        list(train.fit_vae(plain_vae(), ring(), config, key=key))
