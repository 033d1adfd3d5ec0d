"""Steps of `mmh_jax.sample` beside the schedulers of diffusers, which run on PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import denoise, noise, sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE, NUM = (2, 4, 4), 10
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
SCHEDULES = {"linear": noise.ddpm_linear(1000), "scaled_linear": noise.ddpm_scaled_linear(1000)}


def predicted(x_t, t):
    """A network, the same in both libraries: noise that depends on point and time."""
    library = torch if isinstance(x_t, torch.Tensor) else jnp
    return library.tanh(1.3 * x_t + 0.2 * library.sin(3 * x_t)) * (0.5 + t / 2000)


def scheduler(kind, beta_schedule):
    start, end = BETAS[beta_schedule]
    shared = {
        "num_train_timesteps": 1000, "beta_start": start, "beta_end": end,
        "beta_schedule": beta_schedule,
    }  # fmt: skip
    plain = {"clip_sample": False, "timestep_spacing": "trailing"}
    made = {
        "ddim": lambda: diffusers.DDIMScheduler(**shared, **plain),
        "ddpm": lambda: diffusers.DDPMScheduler(**shared, **plain, variance_type="fixed_small"),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
            **shared, timestep_spacing="trailing", final_sigmas_type="zero",
            lower_order_final=False, euler_at_final=True,
        ),
    }[kind]()  # fmt: skip
    made.set_timesteps(NUM)
    return made


def ours(beta_schedule, times, start, step, noises=None):
    """The same from the same noise; x0 at the end."""
    schedule = SCHEDULES[beta_schedule]
    model = denoise.from_function(predicted, schedule, prediction=denoise.eps, shape=SHAPE)
    times = jnp.asarray(times, jnp.float32)
    sigmas = schedule.sigma(times)
    x = start / schedule.alpha(times[0])
    if noises is None:
        return np.asarray(sample.solve(model, x, sigmas, step=step))
    for place, draw in enumerate(noises):
        # The step is the same function of its noise: given this draw in place of its own.
        x = with_noise(step, model, x, sigmas[place], sigmas[place + 1], draw)
    return np.asarray(model(x, sigmas[-1]))


def with_noise(step, model, x, sigma, sigma_next, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(draw, dtype))
        return step(model, x, sigma, sigma_next, None, key=jax.random.key(0)).x


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize(
    ("kind", "step"), [("ddim", sample.ddim()), ("dpm", sample.dpm_solver_2m())]
)
def test_deterministic_samplers(x64, kind, step, beta_schedule):
    start = np.random.default_rng(0).normal(size=SHAPE)
    made = scheduler(kind, beta_schedule)
    x = torch.tensor(start)[None]
    for time in made.timesteps:
        x = made.step(predicted(x, time), time, x).prev_sample
    found = ours(beta_schedule, made.timesteps.numpy(), start, step)
    np.testing.assert_allclose(found, x[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(x64, eta, beta_schedule):
    rng = np.random.default_rng(1)
    start, noises = rng.normal(size=SHAPE), rng.normal(size=(NUM - 1, *SHAPE))
    made = scheduler("ddim", beta_schedule)
    x = torch.tensor(start)[None]
    for time, draw in zip(made.timesteps, [*noises, np.zeros(SHAPE)], strict=True):
        x = made.step(
            predicted(x, time), time, x, eta=eta, variance_noise=torch.tensor(draw)[None]
        ).prev_sample
    found = ours(beta_schedule, made.timesteps.numpy(), start, sample.ddim(eta), noises)
    np.testing.assert_allclose(found, x[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_ancestral_steps_of_ddpm(x64, beta_schedule, monkeypatch):
    rng = np.random.default_rng(2)
    start, noises = rng.normal(size=SHAPE), rng.normal(size=(NUM - 1, *SHAPE))
    made = scheduler("ddpm", beta_schedule)
    left = [*noises, np.zeros(SHAPE)]
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.tensor(left.pop(0))[None])
    x = torch.tensor(start)[None]
    for time in made.timesteps:
        x = made.step(predicted(x, time), time, x).prev_sample
    assert not left
    found = ours(beta_schedule, made.timesteps.numpy(), start, sample.ancestral(), noises)
    np.testing.assert_allclose(found, x[0].numpy(), rtol=1e-5, atol=1e-5)
