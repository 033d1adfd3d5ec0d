"""Any network as a denoiser: one density through every schedule, parametrisation and framework."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from mmh_jax import denoise, lid, noise

DIM, AMBIENT = 3, 8
SCHEDULES = {
    "VP": noise.VP,
    "SubVP": noise.SubVP,
    "Cosine": noise.Cosine,
    "VE": noise.VE,
    "EDM": noise.EDM,
    "RectifiedFlow": noise.RectifiedFlow,
    "DDPM": noise.ddpm_linear,
    "StableDiffusion": noise.ddpm_scaled_linear,
}
PREDICTIONS = ("x0", "eps", "score", "v", "velocity")

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(AMBIENT, DIM)))[0]
VARIANCES = np.array([0.4, 1.0, 2.5])
MEAN = RNG.normal(size=AMBIENT)
COVARIANCE = (BASIS * VARIANCES) @ BASIS.T
COORDINATES = np.array([0.5, -1.2, 1.0])
POINT = MEAN + BASIS @ COORDINATES
NOISY = POINT + 0.3 * RNG.normal(size=AMBIENT)


def exact(x, sigma):
    """E[x0 | x] of N(MEAN, COVARIANCE), by conditioning a joint Gaussian."""
    gain = COVARIANCE @ jnp.linalg.inv(COVARIANCE + sigma**2 * jnp.eye(AMBIENT))
    return MEAN + gain @ (x - MEAN)


def exact_flipd(sigma):
    """At POINT, which lies in the span of the data."""
    gain = VARIANCES / (VARIANCES + sigma**2)
    return np.sum(gain + sigma**2 * COORDINATES**2 / (VARIANCES + sigma**2) ** 2)


def marginal_score(x_t, alpha, s):
    """grad log N(x_t; alpha MEAN, alpha^2 COVARIANCE + s^2 I)."""
    covariance = alpha**2 * COVARIANCE + s**2 * jnp.eye(AMBIENT)
    return -jnp.linalg.solve(covariance, x_t - alpha * MEAN)


def network(schedule, prediction):
    """What a perfectly trained network of this parametrisation answers, from the score of x_t."""

    def call(x_t, t):
        alpha, s = schedule.alpha(t), schedule.s(t)
        grad = marginal_score(x_t, alpha, s)
        eps = -s * grad
        x0 = (x_t - s * eps) / alpha
        rates = [jax.grad(f)(t) for f in (schedule.alpha, schedule.s)]
        return {
            "x0": x0,
            "eps": eps,
            "score": grad,
            "v": alpha * eps - s * x0,
            "velocity": rates[0] * x0 + rates[1] * eps,
        }[prediction]

    return call


@pytest.mark.spread(3)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_density_gives_one_denoiser(x64, name, prediction):
    schedule = SCHEDULES[name]()
    denoiser = denoise.from_function(
        network(schedule, prediction),
        schedule,
        prediction=getattr(denoise, prediction),
        shape=(AMBIENT,),
    )

    @jax.jit
    def both(sigma):
        return denoiser(jnp.asarray(NOISY), sigma), lid.flipd(denoiser, POINT, sigma).value

    for sigma in (0.02, 0.3, 3.0, 12.0):
        answer, dimension = both(sigma)
        np.testing.assert_allclose(answer, exact(NOISY, sigma), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dimension, exact_flipd(sigma), rtol=1e-5)


def test_flow_matching_is_noise_minus_data(x64):
    schedule, t = noise.RectifiedFlow(), jnp.asarray(0.3)
    clean, shock = jnp.asarray(POINT), jnp.asarray(NOISY)
    x_t = (1 - t) * clean + t * shock
    answer = denoise.velocity(shock - clean, x_t, t, schedule)
    np.testing.assert_allclose(answer, clean, rtol=1e-12)
    np.testing.assert_allclose(x_t - t * (shock - clean), clean, rtol=1e-12)


def test_flipd_of_a_vp_network_is_the_formula_of_the_paper(x64):
    """LID = D + s^2 (tr grad score_t + |score_t|^2), written for VP at x_t = alpha x, time t.

    Derivation: rho_sigma(x) = alpha^D p_t(alpha x), so grad log rho = alpha score_t and its
    divergence is alpha^2 tr grad score_t; d log rho / d log sigma = sigma^2 (lap rho / rho), and
    sigma^2 alpha^2 = s^2.  The network here is arbitrary: the identity is one of algebra.
    """
    weights = jnp.asarray(RNG.normal(size=(AMBIENT, AMBIENT)))
    beta_min, beta_max, t = 0.1, 20.0, 0.17
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
    alpha, s = np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))

    def eps_network(x_t, time):
        return jnp.tanh(weights @ x_t + time) + x_t * jnp.cos(time)

    def score(x_t):
        return -eps_network(x_t, t) / s

    x_t = alpha * jnp.asarray(NOISY)
    paper = AMBIENT + s**2 * (jnp.trace(jax.jacfwd(score)(x_t)) + jnp.sum(score(x_t) ** 2))
    denoiser = denoise.from_function(eps_network, noise.VP(beta_min, beta_max))
    np.testing.assert_allclose(lid.flipd(denoiser, NOISY, s / alpha).value, paper, rtol=1e-9)


def test_precondition_is_table_1_of_karras(x64):
    seen = []

    def raw(params, x, c_noise):
        seen.append((x, c_noise))
        return params * jnp.sin(x)

    x = jnp.asarray(NOISY)
    for data, sigma in ((0.5, 0.002), (0.5, 1.3), (0.7, 80.0)):
        denoiser = denoise.precondition(raw, 2.0, sigma_data=data, shape=(AMBIENT,))
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / np.sqrt(sigma**2 + data**2)
        c_in = 1 / np.sqrt(sigma**2 + data**2)
        answer = denoiser(x, sigma)
        np.testing.assert_allclose(answer, c_skip * x + c_out * 2 * jnp.sin(c_in * x), rtol=1e-12)
        np.testing.assert_allclose(seen[-1][0], c_in * x, rtol=1e-12)
        np.testing.assert_allclose(seen[-1][1], np.log(sigma) / 4, rtol=1e-12)
        assert denoiser.shape == (AMBIENT,)
    default = denoise.precondition(raw, 0.0)
    np.testing.assert_allclose(default(x, 0.5), x / 2, rtol=1e-12)


def test_precondition_takes_what_an_adapter_made_and_a_condition():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    made = denoise.from_nnx(Timed(module), noise.VP())
    denoiser = denoise.precondition(made.apply, made.params, sigma_data=1.0)
    x = jnp.array([0.3, -2.0])
    expected = x / 2 + (module(x / jnp.sqrt(2)) + 0.0) / jnp.sqrt(2)
    np.testing.assert_allclose(denoiser(x, 1.0), expected, rtol=1e-6)

    def conditional(params, x, c_noise, label):
        return params * label * jnp.ones_like(x)

    bound = denoise.precondition(conditional, 3.0, sigma_data=1.0).condition(2.0)
    np.testing.assert_allclose(bound(jnp.zeros(2), 1.0), 6 / jnp.sqrt(2) * np.ones(2), rtol=1e-6)


def test_affine_is_the_denoiser_of_moved_and_scaled_data(x64):
    shift, scale, sigma = jnp.asarray(RNG.normal(size=AMBIENT)), 2.5, 0.4
    moved = denoise.Affine(exact, shift, scale)
    covariance, mean = scale**2 * COVARIANCE, shift + scale * MEAN
    x = shift + scale * NOISY
    gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(AMBIENT))
    np.testing.assert_allclose(moved(x, sigma), mean + gain @ (x - mean), rtol=1e-9)
    dimension = lid.flipd(moved, shift + scale * POINT, sigma * scale).value
    np.testing.assert_allclose(dimension, exact_flipd(sigma), rtol=1e-9)
    np.testing.assert_array_equal(denoise.Affine(exact)(NOISY, sigma), exact(NOISY, sigma))


def test_affine_keeps_dtype_shape_and_condition():
    inner = denoise.from_function(
        lambda x, t, c: c * x, noise.EDM(), prediction=denoise.x0, shape=(2,)
    )
    moved = denoise.Affine(inner, 1.0, np.float64(2.0)).condition(3.0)
    assert moved.shape == (2,)
    answer = moved(jnp.array([2.0, 3.0]), 0.1)
    assert answer.dtype == jnp.float32
    np.testing.assert_allclose(answer, 1 + 3 * (np.array([2.0, 3.0]) - 1), rtol=1e-6)
    assert denoise.Affine(lambda x, sigma: x).shape is None
    with pytest.raises(ValueError, match=r"Affine\(scale=...\)` has shape \(2,\).*isotropic"):
        denoise.Affine(inner, 0.0, jnp.ones(2))(jnp.ones(2), 0.1)


def test_guidance_in_an_interval_of_noise_levels():
    def with_condition(x, sigma):
        return 2 * x

    def without(x, sigma):
        return x

    x = jnp.array([1.0, -2.0])
    limited = denoise.Guided(with_condition, without, 3.0, low=0.5, high=2.0)
    late = denoise.Guided(with_condition, without, 3.0, high=1.0, outside=0.0)
    for sigma, of_limited, of_late in ((0.1, 2, 4), (0.5, 4, 4), (1.5, 4, 1), (3.0, 2, 1)):
        np.testing.assert_allclose(limited(x, sigma), of_limited * x)
        np.testing.assert_allclose(late(x, sigma), of_late * x)
    levels = jnp.array([0.1, 1.5])
    found = jax.jit(jax.vmap(limited, in_axes=(None, 0)))(x, levels)
    np.testing.assert_allclose(found, jnp.stack([2 * x, 4 * x]))


def test_guidance_at_scales_0_1_3():
    def two_classes(x_t, t, label):
        return label * x_t + t

    model = denoise.from_function(two_classes, noise.EDM(), prediction=denoise.x0, shape=(2,))
    with_condition, without = model.condition(0.75), model.condition(0.0)
    x, sigma = jnp.array([1.0, -2.0]), 0.5
    for scale, expected in ((0.0, without), (1.0, with_condition)):
        guided = denoise.Guided(with_condition, without, scale)
        np.testing.assert_allclose(guided(x, sigma), expected(x, sigma), rtol=1e-6)
    strong = denoise.Guided(with_condition, without, 3.0)
    np.testing.assert_allclose(strong(x, sigma), 3 * 0.75 * x + 0.5, rtol=1e-6)
    assert strong.shape == (2,)
    np.testing.assert_allclose(strong.condition(0.5)(x, sigma), 3 * 0.5 * x + 0.5, rtol=1e-6)
    assert denoise.Guided(lambda x, s: x, without).guidance_scale == 1
    assert denoise.Guided(lambda x, s: x, without).shape is None
    slope = jax.grad(lambda w: denoise.Guided(with_condition, without, w)(x, sigma).sum())(2.0)
    np.testing.assert_allclose(slope, 0.75 * x.sum(), rtol=1e-6)


def test_a_condition_is_any_pytree_and_none_removes_it():
    def call(x_t, t, cond=None):
        if cond is None:
            return x_t
        return x_t * cond["scale"] + cond["shifts"][0] - cond["shifts"][1]

    model = denoise.from_function(call, noise.EDM(), prediction=denoise.x0)
    x = jnp.ones(3)
    cond = {"scale": 2.0, "shifts": (jnp.arange(3.0), jnp.full(3, 0.5))}
    bound = model.condition(cond)
    np.testing.assert_allclose(bound(x, 0.1), [1.5, 2.5, 3.5])
    np.testing.assert_array_equal(model(x, 0.1), x)
    np.testing.assert_array_equal(bound.condition(None)(x, 0.1), x)
    slope = jax.grad(lambda c: model.condition(c)(x, 0.1).sum())(cond)
    np.testing.assert_allclose(slope["scale"], 3)
    labels = jnp.array([2.0, 5.0])
    many = jax.vmap(lambda c: model.condition({**cond, "scale": c})(x, 0.1))(labels)
    np.testing.assert_allclose(many[:, 0], labels - 0.5)


def test_a_zero_condition_is_still_a_condition():
    model = denoise.from_function(lambda x, t, c: x + 10 + c, noise.EDM(), prediction=denoise.x0)
    assert model.condition(0)(jnp.zeros(()), 0.1) == 10


# One line for each framework.


class Timed(nnx.Module):
    """An NNX module of x, adding the time."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x_t, t, cond=0.0):
        return self.inner(x_t) + t + cond


class NormalisedNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)

    def __call__(self, x_t, t, label=None):
        features = self.norm(self.conv(x_t)) + t[:, None, None, None]
        return features[..., :2] + (0.0 if label is None else label[:, None, None, :])


class NormalisedLinen(linen.Module):
    @linen.compact
    def __call__(self, x_t, t):
        features = linen.GroupNorm(num_groups=2)(linen.Conv(4, (3, 3))(x_t))
        return features[..., :2] + t[:, None, None, None]


class TimedLinen(linen.Module):
    @linen.compact
    def __call__(self, x_t, t):
        return linen.Dense(2)(x_t) + t


class TimedEquinox(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x_t, t):
        return self.linear(x_t) + t


X, SIGMA = jnp.array([0.4, -1.0]), 0.3
IMAGES = jax.random.normal(jax.random.key(1), (3, 5, 5, 2))
SIGMAS = jnp.array([0.1, 0.3, 0.9])
OPTIONS = {"prediction": denoise.x0, "shape": (2,)}


def vector_models(options=OPTIONS):
    """(a maker of the denoiser of one line, the network's output at X and SIGMA)."""
    on_nnx = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    on_linen = TimedLinen()
    variables = on_linen.init(jax.random.key(0), X, SIGMA)
    on_equinox = TimedEquinox(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    dense = variables["params"]["Dense_0"]
    return {
        "function": (lambda: denoise.from_function(plain, noise.EDM(), **options), 2 * X + SIGMA),
        "nnx": (
            lambda: denoise.from_nnx(Timed(on_nnx), noise.EDM(), **options),
            X @ on_nnx.kernel[...] + on_nnx.bias[...] + SIGMA,
        ),
        "linen": (
            lambda: denoise.from_linen(on_linen, variables, noise.EDM(), **options),
            X @ dense["kernel"] + dense["bias"] + SIGMA,
        ),
        "equinox": (
            lambda: denoise.from_equinox(on_equinox, noise.EDM(), **options),
            on_equinox.linear.weight @ X + on_equinox.linear.bias + SIGMA,
        ),
    }


def plain(x_t, t):
    return 2 * x_t + t


@pytest.mark.parametrize("framework", ["function", "nnx", "linen", "equinox"])
def test_adapters_call_the_network(framework):
    make, expected = vector_models()[framework]
    denoiser = make()
    np.testing.assert_allclose(denoiser(X, SIGMA), expected, rtol=1e-5)
    jitted = jax.jit(lambda model, x: model(x, SIGMA))(denoiser, X)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5)
    assert denoiser.shape == (2,)
    assert denoiser.prediction is denoise.x0
    with pytest.raises(ValueError, match=r"takes \(2,\)"):
        lid.flipd(denoiser, jnp.ones(3), 0.1)


@pytest.mark.parametrize("framework", ["function", "nnx", "linen", "equinox"])
def test_eps_is_the_default_prediction(framework):
    make, output = vector_models({})[framework]
    denoiser = make()
    assert denoiser.prediction is denoise.eps
    assert denoiser.shape is None
    np.testing.assert_allclose(denoiser(X, SIGMA), X - SIGMA * output, rtol=1e-5, atol=1e-6)


def test_batched_modules_are_called_on_a_batch():
    """GroupNorm takes axis 0 for the batch: without `batched` the answer would be another."""
    module, other = NormalisedNNX(nnx.Rngs(0)), NormalisedLinen()
    variables = other.init(jax.random.key(0), IMAGES, SIGMAS)
    options = {"prediction": denoise.x0, "batched": True}
    cases = {
        "nnx": (denoise.from_nnx(module, noise.EDM(), **options), module(IMAGES, SIGMAS)),
        "linen": (
            denoise.from_linen(other, variables, noise.EDM(), **options),
            other.apply(variables, IMAGES, SIGMAS),
        ),
        "function": (
            denoise.from_function(
                lambda x, t: module(x, t), noise.EDM(), prediction=denoise.x0, batched=True
            ),
            module(IMAGES, SIGMAS),
        ),
        "equinox": (
            denoise.from_equinox(BatchedEquinox(jnp.ones(2)), noise.EDM(), **options),
            BatchedEquinox(jnp.ones(2))(IMAGES, SIGMAS),
        ),
    }
    for framework, (denoiser, expected) in cases.items():
        answers = jax.vmap(denoiser)(IMAGES, SIGMAS)
        np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5, err_msg=framework)
        assert denoiser(IMAGES[0], 0.1).shape == IMAGES[0].shape


class BatchedEquinox(eqx.Module):
    scale: jax.Array

    def __call__(self, x_t, t):
        return self.scale * x_t.mean((1, 2), keepdims=True) + x_t * t[:, None, None, None]


def test_conditions_of_a_batched_module_get_a_batch_axis():
    module = NormalisedNNX(nnx.Rngs(0))
    labels = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    model = denoise.from_nnx(module, noise.EDM(), prediction=denoise.x0, batched=True)

    def answer(image, sigma, label):
        return model.condition(label)(image, sigma)

    expected = module(IMAGES, SIGMAS, labels)
    np.testing.assert_allclose(
        jax.vmap(answer)(IMAGES, SIGMAS, labels), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("framework", ["function", "nnx", "linen", "equinox"])
def test_wrapping_the_same_model_twice_does_not_trace_twice(framework):
    make, _ = vector_models()[framework]
    traces = []

    @jax.jit
    def call(denoiser, x):
        traces.append(framework)
        return denoiser(x, SIGMA)

    first, second = make(), make()
    assert first is not second
    np.testing.assert_array_equal(call(first, X), call(second, X))
    call(jax.tree.map(lambda leaf: leaf + 1, first), X)
    assert len(traces) == 1
    call(dataclasses.replace(first, prediction=denoise.eps), X)
    assert len(traces) == 2


@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox"])
def test_parameters_are_leaves(framework):
    """Gradients flow to them, and a stack of them is a stack of models under vmap."""
    denoiser = vector_models()[framework][0]()

    def loss(model):
        return jnp.sum(model(X, SIGMA) * jnp.array([1.0, 10.0]))

    gradient = jax.tree.leaves(jax.grad(loss)(denoiser).params)
    bias = next(leaf for leaf in gradient if leaf.ndim == 1)
    kernel = next(leaf for leaf in gradient if leaf.ndim == 2)
    outer = np.outer(X, [1.0, 10.0])
    np.testing.assert_allclose(bias, [1, 10], rtol=1e-6)
    np.testing.assert_allclose(kernel, outer.T if framework == "equinox" else outer, rtol=1e-5)

    shifted = jax.tree.map(lambda leaf: leaf + 0.5, denoiser.params)
    stack = jax.tree.map(lambda *leaf: jnp.stack(leaf), denoiser.params, shifted)
    answers = jax.vmap(lambda params: dataclasses.replace(denoiser, params=params)(X, SIGMA))(stack)
    expected = denoiser(X, SIGMA)
    np.testing.assert_allclose(answers[0], expected, rtol=1e-5)
    np.testing.assert_allclose(answers[1], expected + 0.5 * (X.sum() + 1), rtol=1e-4)


def test_gradients_reach_the_point_the_noise_level_and_the_schedule(x64):
    schedule = noise.VP()
    denoiser = denoise.from_function(network(schedule, "eps"), schedule)
    slope = jax.grad(lambda sigma: denoiser(jnp.asarray(NOISY), sigma)[0])(0.5)
    ends = [exact(NOISY, 0.5 + h)[0] for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5)
    jacobian = jax.jacrev(lambda x: denoiser(x, 0.5))(jnp.asarray(NOISY))
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + 0.25 * np.eye(AMBIENT))
    np.testing.assert_allclose(jacobian, gain, atol=1e-9)
    model = denoise.from_function(lambda x_t, t: jnp.sin(x_t) + t, schedule)
    gradient = jax.grad(lambda m: m(jnp.ones(()), 0.5))(model)
    assert gradient.schedule.beta_min != 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dtype_of_the_point_is_kept(x64, prediction, dtype):
    model = denoise.from_function(
        lambda x_t, t: x_t * t, noise.VP(), prediction=getattr(denoise, prediction)
    )
    for sigma in (0.5, np.float64(0.5), jnp.asarray(0.5, jnp.float32)):
        assert model(jnp.ones(3, dtype), sigma).dtype == dtype


def test_a_function_must_be_hashable():
    class Holder:
        __hash__ = None

        def __call__(self, x_t, t):
            return x_t

    with pytest.raises(
        TypeError, match=r"from_function\(function=...\)` got a Holder.*from_equinox"
    ):
        denoise.from_function(Holder(), noise.VP())
