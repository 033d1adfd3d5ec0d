"""FLIPD against closed forms, through every strategy, and at its boundary."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import denoise, lid, linalg, nn, noise, train

DIM, AMBIENT = 4, 12


def gaussian(seed=0, dtype=jnp.float64):
    """A linear Gaussian denoiser, its parts, and a point of it, written out by hand."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(AMBIENT, DIM)))[0]
    variances = rng.uniform(0.3, 2.0, size=DIM) ** 2
    mean = rng.normal(size=AMBIENT)
    coordinates = np.sqrt(variances) * rng.normal(size=DIM)
    point = mean + basis @ coordinates

    def denoiser(x, sigma):
        b, m, v = (jnp.asarray(a, dtype) for a in (basis, mean, variances))
        return m + b @ (v / (v + sigma**2) * (b.T @ (x - m)))

    return denoiser, jnp.asarray(point, dtype), variances, coordinates


def closed_form(variances, coordinates, sigma):
    gain = variances / (variances + sigma**2)
    return np.sum(gain + sigma**2 * coordinates**2 / (variances + sigma**2) ** 2)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0, 10.0])
def test_closed_form_float64(x64, sigma):
    denoiser, x, variances, coordinates = gaussian()
    for trace in (linalg.exact(), linalg.exact(5), linalg.positive_exact()):
        result = lid.flipd(denoiser, x, sigma, trace=trace)
        np.testing.assert_allclose(
            result.value, closed_form(variances, coordinates, sigma), rtol=1e-9
        )
        lost = sigma**2 / (variances + sigma**2)
        residual = lost**2 * coordinates**2 / sigma**2
        slope = 2 * residual * (1 - 2 * lost) - 2 * lost * (1 - lost)
        np.testing.assert_allclose(result.stderr, abs(slope.sum()) / 2, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 1.0])
def test_closed_form_float32(sigma):
    denoiser, x, variances, coordinates = gaussian(dtype=jnp.float32)
    result = lid.flipd(denoiser, x, sigma)
    assert result.value.dtype == jnp.float32
    np.testing.assert_allclose(result.value, closed_form(variances, coordinates, sigma), rtol=1e-3)


def test_stochastic_traces_agree_within_their_errors(x64):
    denoiser, x, variances, coordinates = gaussian()
    truth = closed_form(variances, coordinates, 0.5)
    keys = jax.random.split(jax.random.key(1), 400)

    def estimate(key):
        return lid.flipd(denoiser, x, 0.5, trace=linalg.rademacher(16), key=key)

    value, stderr, *_ = jax.jit(jax.vmap(estimate))(keys)
    pooled = jnp.std(value) / jnp.sqrt(value.size)
    assert jnp.abs(value.mean() - truth) < 4 * pooled
    assert 0.9 < jnp.sqrt(jnp.mean(stderr**2)) / jnp.std(value) < 1.35
    sketch = lid.flipd(denoiser, x, 0.5, trace=linalg.xtrace(11), key=keys[0])
    np.testing.assert_allclose(sketch.value, truth, rtol=1e-6)


def test_projection_removes_only_what_no_denoiser_can_have(x64):
    noise = jnp.asarray(np.random.default_rng(3).normal(size=(AMBIENT, AMBIENT)))
    denoiser, x, variances, coordinates = gaussian()

    def trained(x, sigma):
        return denoiser(x, sigma) + 0.05 * noise @ (x - point)

    point = x
    truth = closed_form(variances, coordinates, 0.05)
    matrix = jax.jacfwd(lambda y: trained(y, 0.05))(x)
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    raw = lid.flipd(trained, x, 0.05).value
    projected = lid.flipd(trained, x, 0.05, trace=linalg.positive_exact()).value
    np.testing.assert_allclose(projected - raw, -eigenvalues[eigenvalues < 0].sum(), rtol=1e-8)
    np.testing.assert_allclose(raw, truth + 0.05 * jnp.trace(noise), rtol=1e-6)


def test_curve_is_flipd_at_each_noise_level_with_common_probes(x64):
    denoiser, x, *_ = gaussian()
    sigmas = jnp.geomspace(0.01, 1.0, 5)
    key = jax.random.key(0)
    for trace in (linalg.exact(), linalg.rademacher(4)):
        curve = lid.flipd_curve(denoiser, x, sigmas, trace=trace, key=key)
        chex.assert_shape(curve, (5,))
        for index, sigma in enumerate(sigmas):
            single = lid.flipd(denoiser, x, sigma, trace=trace, key=key)
            np.testing.assert_allclose(curve.value[index], single.value, rtol=1e-12)
            assert single.stderr > curve.stderr[index]  # the bias is in it, too


def test_differentiable_in_point_and_noise_level(x64):
    denoiser, x, variances, coordinates = gaussian()
    sigma, step = 0.7, 1e-6
    slope = jax.grad(lambda s: lid.flipd(denoiser, x, s).value)(sigma)
    ends = [closed_form(variances, coordinates, s) for s in (sigma + step, sigma - step)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
    gradient = jax.grad(lambda y: lid.flipd(denoiser, y, sigma).value)(x)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=AMBIENT))
    change = [lid.flipd(denoiser, x + s * direction, sigma).value for s in (step, -step)]
    np.testing.assert_allclose(
        gradient @ direction, (change[0] - change[1]) / (2 * step), rtol=1e-5
    )


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10.0))
def test_invariant_under_rotation_translation_and_scale(seed, scale):
    with jax.enable_x64(True):
        denoiser, x, *_ = gaussian(seed)
        rng = np.random.default_rng(seed + 1)
        rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(AMBIENT, AMBIENT)))[0])
        shift = jnp.asarray(rng.normal(size=AMBIENT))

        def moved(y, sigma):
            return (
                scale * rotation @ denoiser(rotation.T @ (y - shift) / scale, sigma / scale) + shift
            )

        before = lid.flipd(denoiser, x, 0.2).value
        after = lid.flipd(moved, scale * rotation @ x + shift, 0.2 * scale).value
        np.testing.assert_allclose(before, after, rtol=1e-9)


def test_jit_vmap_and_shape_of_a_point_do_not_matter(x64):
    denoiser, x, *_ = gaussian()

    def image(y, sigma):
        return denoiser(y.reshape(-1), sigma).reshape(y.shape)

    plain = lid.flipd(denoiser, x, 0.1).value
    np.testing.assert_allclose(lid.flipd(image, x.reshape(3, 4), 0.1).value, plain, rtol=1e-12)
    batch = jnp.stack([x, x + 0.1])
    mapped = jax.jit(jax.vmap(lambda y: lid.flipd(denoiser, y, 0.1).value))(batch)
    loop = [lid.flipd(denoiser, y, 0.1).value for y in batch]
    np.testing.assert_allclose(mapped, jnp.stack(loop), rtol=1e-12)


def test_errors_name_argument_fault_and_cure():
    class Shaped:
        shape = (3,)

        def __call__(self, x, sigma):
            return x

    with pytest.raises(ValueError, match=r"shape \(5, 3\).*takes \(3,\).*jax.vmap"):
        lid.flipd(Shaped(), jnp.zeros((5, 3)), 0.1)
    with pytest.raises(ValueError, match="finite positive"):
        lid.flipd(Shaped(), jnp.zeros(3), 0.0)
    with pytest.raises(ValueError, match="finite positive"):
        lid.flipd_curve(Shaped(), jnp.zeros(3), [0.1, -0.1])
    with pytest.raises(ValueError, match="vector of noise levels"):
        lid.flipd_curve(Shaped(), jnp.zeros(3), 0.1)
    with pytest.raises(TypeError, match=r"int32.*data units"):
        lid.flipd(Shaped(), jnp.zeros(3, jnp.int32), 0.1)
    with pytest.raises(TypeError, match=r"key=jax\.random\.key"):
        lid.flipd(Shaped(), jnp.zeros(3), 0.1, trace=linalg.rademacher(4))


def test_a_result_says_whether_to_believe_it(x64):
    denoiser, x, *_ = gaussian()
    on = lid.flipd(denoiser, x, 0.1)
    assert not on.off_manifold
    assert not on.negative
    assert on.guided == 0
    np.testing.assert_allclose(on.trace + on.residual, on.value)
    normal = np.linalg.svd(jax.jacfwd(lambda y: denoiser(y, 0.1))(x))[2][-1]
    off = lid.flipd(denoiser, x + 0.5 * jnp.asarray(normal), 0.1)
    assert off.off_manifold
    np.testing.assert_allclose(off.value - on.value, 25, rtol=1e-6)
    assert lid.flipd(lambda y, sigma: -0.2 * y, 0 * x, 0.1).negative
    guided = denoise.Guided(denoiser, lambda y, sigma: 0 * y, 3.0)
    assert lid.flipd(guided, x, 0.1).guided == 1
    curve = lid.flipd_curve(denoise.Affine(guided), x, [0.1, 0.2])
    np.testing.assert_array_equal(curve.guided, [1, 1])
    # A plain function does not know where it was trained; a network, or its schedule, does.
    assert lid.flipd(denoiser, x, 1e9).outside_training == 0
    schedule = noise.EDM(t_max=0.5)
    network = denoise.from_function(denoiser, schedule, prediction=denoise.x0)
    for scaled in (denoise.Affine(network, 0.0, 2.0), denoise.Guided(network, network, 1.0)):
        sigmas = jnp.array([0.1, 0.4, 2.0])
        expected = [0, 0, 1]
        np.testing.assert_array_equal(denoise.outside_training(scaled, sigmas), expected)
        found = lid.flipd_curve(scaled, x, sigmas).outside_training
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(lid.spectral_curve(scaled, x, sigmas).outside_training, found)
    narrow = dataclasses.replace(network, sigma_range=(0.2, 0.3))
    np.testing.assert_array_equal(denoise.outside_training(narrow, sigmas), [1, 1, 1])


def test_lanczos_is_the_dense_projection_on_a_trained_network():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 5)))[0]
    points = np.random.default_rng(1).normal(size=(2000, 5)) @ basis.T
    points = (2 * points).astype(np.float32)
    network = nn.ResidualMLP((20,), width=64, depth=2, rngs=nnx.Rngs(0))
    model = denoise.precondition(*nn.split(network), sigma_data=1.0, shape=(20,))
    config = train.TrainConfig(num_steps=400, batch_size=128, ema_half_life=30.0)
    for metrics in train.fit(model, points, config, key=jax.random.key(0)):
        model = model.replace(params=metrics.state.ema)
    keys = jax.random.split(jax.random.key(2), 48)

    spectrum = lid.jacobian_spectrum(model, points[0], 0.1)
    assert spectrum.asymmetry > 0.01
    assert spectrum.eigenvalues[-1] < -0.01
    at = functools.partial(lid.flipd, model)
    for above_noise in (False, True):
        exact = linalg.positive_exact(above_noise=above_noise)
        lanczos = linalg.positive_lanczos(16, 20, above_noise=above_noise)
        dense = jax.lax.map(lambda x, t=exact: at(x, 0.1, trace=t), points[:48])
        sketch = jax.lax.map(
            lambda xk, t=lanczos: at(xk[0], 0.1, trace=t, key=xk[1]), (points[:48], keys)
        )
        error = sketch.value - dense.value
        assert jnp.mean(jnp.abs(error) <= 1.96 * sketch.stderr) > 0.85
        assert abs(jnp.mean(error)) < 4 * jnp.std(error) / 48**0.5
        np.testing.assert_allclose(sketch.residual, dense.residual, rtol=1e-4)


@pytest.mark.parametrize(
    "estimate",
    [
        lid.flipd,
        lid.jacobian_spectrum,
        lid.tangent_space,
        lid.richardson,
        functools.partial(lid.denoising_loss, key=jax.random.key(0)),
        functools.partial(lid.denoised_spread, key=jax.random.key(0)),
        functools.partial(lid.soft_rank_lanczos, key=jax.random.key(0)),
        functools.partial(lid.normal_bundle_spectrum, key=jax.random.key(0)),
    ],
)
def test_one_level_and_an_answer_like_the_point(estimate):
    with pytest.raises(ValueError, match="has shape \\(2,\\); it takes one noise level"):
        estimate(lambda x, s: x, jnp.zeros(2), jnp.array([0.5, 1.0]))
    for answer in (lambda x, s: x[:, None], lambda x, s: jnp.sum(x)):
        with pytest.raises(ValueError, match="for a point of shape \\(3,\\)"):
            estimate(answer, jnp.ones(3), 0.5)
