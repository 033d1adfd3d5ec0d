"""Every schedule against its definition, its own inverse, and a simulation of its equation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import noise

CONTINUOUS = {
    "VP": noise.VP,
    "SubVP": noise.SubVP,
    "Cosine": noise.Cosine,
    "VE": noise.VE,
    "VE-wide": lambda: noise.VE(sigma_min=1e-3, sigma_max=100.0),
    "EDM": noise.EDM,
    "RectifiedFlow": noise.RectifiedFlow,
    "VP-other": lambda: noise.VP(beta_min=0.3, beta_max=11.0),
    "VP-constant": lambda: noise.VP(beta_min=9.0, beta_max=9.0),
    "Cosine-other": lambda: noise.Cosine(offset=0.05),
}
TABLES = {
    f"DDPM-{kind}-{steps}": lambda make=make, steps=steps: make(steps)
    for kind, make in (("linear", noise.ddpm_linear), ("scaled", noise.ddpm_scaled_linear))
    for steps in (10, 100, 1000, 4000)
}
SCHEDULES = CONTINUOUS | TABLES
PRESERVING = ["VP", "VP-other", "VP-constant", "Cosine", "Cosine-other", *TABLES]
KINDS = ["VP", "SubVP", "Cosine", "VE", "EDM", "RectifiedFlow", "DDPM-linear-1000"]


def make(name):
    return SCHEDULES[name]()


def noise_levels(schedule, dtype, count=200):
    """From 1e-3, or the schedule's least, to 80, or its largest."""
    ends = [float(schedule.sigma(t)) for t in (schedule.t_min, schedule.t_max)]
    low, high = max(1e-3, ends[0]), min(80.0, ends[1])
    return jnp.asarray(np.geomspace(low, high, count), dtype)


def inner_times(schedule, count=41):
    """Times within the range, none of them a whole step of a table."""
    span = schedule.t_max - schedule.t_min
    return schedule.t_min + span * jnp.linspace(0.0123, 0.9871, count)


def elasticity(schedule, t):
    """d log sigma / d log t: the factor by which a relative error of t grows in sigma."""
    slope = jax.vmap(jax.grad(lambda u: jnp.log(schedule.sigma(u))))(t)
    return jnp.abs(t * slope)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_sigma_are_inverse_float64(x64, name):
    schedule = make(name)
    sigma = noise_levels(schedule, jnp.float64)
    t = schedule.time(sigma)
    assert jnp.all(jnp.diff(t) > 0)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-11)
    t = inner_times(schedule)
    assert jnp.all(jnp.diff(schedule.sigma(t)) > 0)
    np.testing.assert_allclose(schedule.time(schedule.sigma(t)), t, rtol=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_sigma_are_inverse_float32(name):
    """To 1e-6, or to the rounding of the number in between where that is worse.

    One rounding of t is worth `elasticity` roundings of sigma, and the other way round; that
    counts for the schedules whose t ends where sigma grows without bound (Cosine, RectifiedFlow:
    up to 81 at sigma = 80), and for the tables, where a step is a small change of log sigma.
    """
    schedule, epsilon = make(name), jnp.finfo(jnp.float32).eps
    sigma = noise_levels(schedule, jnp.float32)
    t = schedule.time(sigma)
    assert t.dtype == jnp.float32
    assert jnp.all(jnp.diff(t) > 0)
    error = jnp.abs(schedule.sigma(t) / sigma - 1)
    allowed = 1e-6 + epsilon * elasticity(schedule, t)
    assert jnp.all(error <= allowed), float(jnp.max(error / allowed))
    t = jnp.asarray(inner_times(schedule), jnp.float32)
    error = jnp.abs(schedule.time(schedule.sigma(t)) / t - 1)
    allowed = 1e-6 + epsilon * (1 + jnp.abs(jnp.log(schedule.sigma(t)))) / elasticity(schedule, t)
    assert jnp.all(error <= allowed), float(jnp.max(error / allowed))


@pytest.mark.parametrize("name", SCHEDULES)
def test_drift_and_diffusion_belong_to_alpha_and_s(x64, name):
    schedule = make(name)
    t = inner_times(schedule)
    rate = jax.vmap(jax.grad(lambda u: jnp.log(schedule.alpha(u))))(t)
    np.testing.assert_allclose(schedule.drift(t), rate, rtol=1e-6, atol=1e-12)
    growth = jax.vmap(jax.grad(lambda u: schedule.s(u) ** 2))(t)
    expected = growth - 2 * rate * schedule.s(t) ** 2
    np.testing.assert_allclose(schedule.diffusion(t) ** 2, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_functions_agree_with_each_other(x64, name):
    schedule = make(name)
    t = inner_times(schedule)
    alpha, s = schedule(t)
    np.testing.assert_array_equal(alpha, schedule.alpha(t))
    np.testing.assert_array_equal(s, schedule.s(t))
    np.testing.assert_allclose(schedule.sigma(t), s / alpha, rtol=1e-11)
    np.testing.assert_allclose(schedule.log_snr(t), jnp.log(alpha**2 / s**2), rtol=1e-9, atol=1e-9)
    assert jnp.all(jnp.diff(schedule.log_snr(t)) < 0)
    if name in PRESERVING:
        np.testing.assert_allclose(alpha**2 + s**2, 1, rtol=1e-12)


def test_definitions_of_the_papers(x64):
    t = np.linspace(0.05, 0.95, 19)
    integral = 0.1 * t + 19.9 * t**2 / 2
    vp, sub_vp, cosine, ve = (make(name) for name in ("VP", "SubVP", "Cosine", "VE"))
    np.testing.assert_allclose(vp.beta(t), 0.1 + 19.9 * t, rtol=1e-12)
    np.testing.assert_allclose(vp.alpha(t), np.exp(-integral / 2), rtol=1e-12)
    np.testing.assert_allclose(vp.s(t), np.sqrt(1 - np.exp(-integral)), rtol=1e-12)
    np.testing.assert_allclose(sub_vp.alpha(t), np.exp(-integral / 2), rtol=1e-12)
    np.testing.assert_allclose(sub_vp.s(t), 1 - np.exp(-integral), rtol=1e-12)
    angle = np.pi / 2 * (t + 0.008) / 1.008
    alpha = np.cos(angle) / np.cos(np.pi / 2 * 0.008 / 1.008)
    np.testing.assert_allclose(cosine.alpha(t), alpha, rtol=1e-12)
    np.testing.assert_allclose(cosine.s(t), np.sqrt(1 - alpha**2), rtol=1e-10)
    np.testing.assert_allclose(ve.s(t), 0.01 * 5000**t, rtol=1e-12)
    np.testing.assert_array_equal(ve.alpha(t), 1)
    edm, flow = noise.EDM(), noise.RectifiedFlow()
    np.testing.assert_array_equal(edm(t), (np.ones_like(t), t))
    np.testing.assert_array_equal(flow(t), (1 - t, t))
    assert edm.t_max == 80
    assert noise.EDM(t_max=10.0).t_max == 10


@pytest.mark.spread(5)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ends(x64, name, dtype):
    """Both ends are numbers; only sigma(1) of a process that forgets everything is infinite."""
    schedule = make(name)
    start, stop = (jnp.asarray(t, dtype) for t in (schedule.t_min, schedule.t_max))
    for t in (start, stop):
        assert jnp.all(jnp.isfinite(jnp.stack(schedule(t))))
    forgets = name in ("Cosine", "Cosine-other", "RectifiedFlow")
    assert bool(jnp.isinf(schedule.sigma(stop))) == forgets
    assert jnp.isfinite(schedule.sigma(start))
    for function in (schedule.drift, schedule.diffusion):
        assert jnp.isfinite(function(start))
        assert bool(jnp.isfinite(function(stop))) != forgets
    noiseless = name not in TABLES and not name.startswith("VE")
    assert bool(schedule.sigma(start) == 0) == noiseless
    if noiseless:
        assert schedule.alpha(start) == 1
        assert schedule.s(start) == 0
        assert schedule.time(jnp.zeros((), dtype)) == 0
    if forgets:
        assert schedule.alpha(stop) == 0
        np.testing.assert_allclose(schedule.s(stop), 1, rtol=1e-6)
    else:
        np.testing.assert_allclose(schedule.time(schedule.sigma(stop)), stop, rtol=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_small_noise_does_not_cancel_in_float32(name):
    """Nothing is lost by 1 - alpha^2 near t = 0: sigma = 1e-3 means s^2 = 1e-6."""
    schedule = make(name)
    t = schedule.time(jnp.float32(1e-3))
    if name.startswith("DDPM"):
        assert t < 0  # below the first step, where log sigma goes on as a straight line
    alpha, s = schedule(t)
    np.testing.assert_allclose(s / alpha, 1e-3, rtol=2e-6)
    np.testing.assert_allclose(schedule.log_snr(t), 6 * np.log(10), rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_dtype_shape_jit_and_vmap(x64, name):
    schedule = make(name)
    methods = ("alpha", "s", "sigma", "time", "drift", "diffusion", "log_snr")

    def evaluate(sched, u):
        return {method: getattr(sched, method)(u) for method in methods}

    def mapped(sched, u):
        return jax.vmap(jax.vmap(evaluate, (None, 0)), (None, 0))(sched, u)

    for dtype in (jnp.float32, jnp.float64):
        t = jnp.linspace(0.2, 0.7, 6, dtype=dtype).reshape(2, 3)
        plain = evaluate(schedule, t)
        for values in (plain, jax.jit(evaluate)(schedule, t), jax.jit(mapped)(schedule, t)):
            for method in methods:
                chex.assert_shape(values[method], (2, 3))
                assert values[method].dtype == dtype, method
            chex.assert_trees_all_close(values, plain, rtol=200 * jnp.finfo(dtype).eps)
    assert jnp.issubdtype(schedule.sigma(0).dtype, jnp.floating)
    assert jnp.issubdtype(schedule.time(1).dtype, jnp.floating)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradient_of_time_is_the_inverse_of_that_of_sigma(x64, name):
    schedule = make(name)
    t = inner_times(schedule)
    forth = jax.vmap(jax.grad(schedule.sigma))(t)
    back = jax.vmap(jax.grad(schedule.time))(schedule.sigma(t))
    np.testing.assert_allclose(forth * back, 1, rtol=1e-7)


def test_a_schedule_is_a_pytree_of_its_parameters(x64):
    t = 0.4
    gradient = jax.grad(lambda schedule: schedule.sigma(t))(noise.VP())
    expected = jax.grad(lambda low: noise.VP(beta_min=low).sigma(t))(0.1)
    np.testing.assert_allclose(gradient.beta_min, expected, rtol=1e-12)
    stacked = noise.VE(sigma_min=jnp.array([0.01, 0.1]), sigma_max=jnp.array([1.0, 10.0]))
    levels = jax.vmap(lambda schedule: schedule.sigma(0.5))(stacked)
    np.testing.assert_allclose(levels, [0.1, 1.0], rtol=1e-12)
    tables = jax.tree.map(lambda *leaf: jnp.stack(leaf), *map(noise.ddpm_linear, (50, 50)))
    chex.assert_shape(jax.vmap(lambda schedule: schedule.time(0.3))(tables), (2,))


@pytest.mark.parametrize("steps", [10, 100, 1000, 4000])
def test_tables_meet_the_cumulative_product(x64, steps):
    linear = np.linspace(1e-4, 0.02, steps)
    scaled = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    index = np.arange(steps)
    for schedule, betas in (
        (noise.ddpm_linear(steps), linear),
        (noise.ddpm_scaled_linear(steps), scaled),
        (noise.DDPM.from_betas(scaled), scaled),
    ):
        alpha_bar = np.cumprod(1 - betas)
        assert schedule.t_max == steps - 1
        alpha, s = schedule(index)
        np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-10)
        np.testing.assert_allclose(s**2, 1 - alpha_bar, rtol=1e-10)
        sigma = np.sqrt(1 / alpha_bar - 1)
        np.testing.assert_allclose(schedule.time(sigma), index, rtol=0, atol=1e-7)
        between = np.sqrt(sigma[:-1] * sigma[1:])
        np.testing.assert_allclose(schedule.sigma(index[:-1] + 0.5), between, rtol=1e-10)
        np.testing.assert_allclose(schedule.sigma(-1.0), sigma[0] ** 2 / sigma[1], rtol=1e-9)
        np.testing.assert_allclose(schedule.sigma(steps), sigma[-1] ** 2 / sigma[-2], rtol=1e-9)


def test_published_values_of_stable_diffusion_and_ddpm(x64):
    stable = noise.ddpm_scaled_linear()
    np.testing.assert_allclose(stable.alpha(0.0) ** 2, 1 - 0.00085, rtol=1e-12)
    np.testing.assert_allclose(stable.alpha(999.0) ** 2, 0.0046600, rtol=5e-5)
    np.testing.assert_allclose(stable.sigma(999.0), 14.6146, rtol=1e-5)
    np.testing.assert_allclose(stable.sigma(0.0), 0.0291672, rtol=1e-5)
    ddpm = noise.ddpm_linear()
    np.testing.assert_allclose(ddpm.alpha(0.0) ** 2, 1 - 1e-4, rtol=1e-12)
    np.testing.assert_allclose(ddpm.alpha(999.0) ** 2, 4.0358e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_simulated_equation_has_mean_alpha_and_deviation_s(name):
    """Euler-Maruyama from x0 = 1: mean alpha(t), deviation s(t) about it, within 4 standard errors.

    In `time` of equal ratios of sigma, so that each step adds a like share of the noise.
    """
    schedule, paths, steps = make(name), 20_000, 800
    low = max(1e-3, float(schedule.sigma(schedule.t_min)))
    grid = np.asarray(schedule.time(jnp.asarray(np.geomspace(low, 1.5, steps + 1))), np.float64)

    def step(carry, inputs):
        x, key = carry
        t, width = inputs
        key, subkey = jax.random.split(key)
        shock = jnp.sqrt(width) * jax.random.normal(subkey, x.shape)
        middle = t + width / 2
        return (
            x * (1 + schedule.drift(middle) * width) + schedule.diffusion(middle) * shock,
            key,
        ), None

    key, subkey = jax.random.split(jax.random.key(7))
    alpha, s = schedule(grid[0].astype(np.float32))
    start = alpha + s * jax.random.normal(subkey, (paths,))
    inputs = jnp.asarray(grid[:-1], jnp.float32), jnp.asarray(np.diff(grid), jnp.float32)
    (end, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, key), inputs))(start)
    alpha, s = schedule(grid[-1].astype(np.float32))
    assert abs(float(end.mean() - alpha)) < 4 * float(s) / np.sqrt(paths)
    assert abs(float(end.std() - s)) < 4 * float(s) / np.sqrt(2 * paths)


def test_errors_name_argument_fault_and_cure():
    with pytest.raises(ValueError, match=r"from_betas\(betas=...\)` has shape \(2, 2\).*vector"):
        noise.DDPM.from_betas(np.full((2, 2), 0.1))
    with pytest.raises(ValueError, match=r"shape \(1,\).*at least two"):
        noise.DDPM.from_betas([0.1])
    for wrong in ([0.1, 0.0], [1.0, 0.5], [-0.1, 0.5], [0.1, np.nan]):
        with pytest.raises(ValueError, match=r"strictly between 0 and 1.*alpha_bars"):
            noise.DDPM.from_betas(wrong)
    with pytest.raises(ValueError, match="ranges from"):
        noise.ddpm_linear(10, beta_end=1.5)
    for method in ("alpha", "s", "time", "drift", "diffusion", "sigma", "log_snr"):
        with pytest.raises(NotImplementedError):
            getattr(noise.Schedule(), method)(0.5)
