"""Published schedulers against diffusers: the noise levels, the steps, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import denoise
from mmh_jax.noise import RectifiedFlow
from mmh_jax.pretrained.schedules import load_process, process_of

SD1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD2 = SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
CIFAR10 = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
SDXL = SD1 | {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
CASES = {
    "sd1": SD1,
    "sd2": SD2,
    "cifar10": CIFAR10,
    "sdxl": SDXL,
    "cosine": CIFAR10 | {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": CIFAR10 | {"beta_schedule": "sigmoid"},
    "given": CIFAR10 | {"trained_betas": np.linspace(0.001, 0.1, 50).tolist()}
    | {"num_train_timesteps": 50},
    "short": SD1 | {"num_train_timesteps": 100},
    "ancestral": SDXL | {"_class_name": "EulerAncestralDiscreteScheduler"},
    "dpm": SD1 | {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2},
    "unipc": SD1 | {"_class_name": "UniPCMultistepScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "lms": SD1 | {"_class_name": "LMSDiscreteScheduler"},
    "zero": SD2 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}  # fmt: skip
# alpha_bar at some t, as diffusers has it in float32.
KNOWN = {
    "sd1": {0: 0.99914998, 250: 0.67379230, 500: 0.27633247, 999: 0.00466010},
    "cifar10": {0: 0.99989998, 250: 0.52142298, 500: 0.07779665, 999: 4.0358304e-05},
}


def alpha_bars(process, num):
    return jax.vmap(process.schedule.alpha)(jnp.arange(num, dtype=float)) ** 2


@pytest.mark.parametrize("name", CASES)
def test_alpha_bar_is_that_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = {k: v for k, v in CASES[name].items() if not k.startswith("_")}
    kind = getattr(diffusers, CASES[name]["_class_name"])
    theirs = kind.from_config(config).alphas_cumprod.numpy()
    process = process_of(CASES[name])
    num = len(theirs) - (name == "zero")  # there the last alpha_bar is 0, and sigma infinite
    # Theirs is a product of up to 1,000 factors in float32.
    np.testing.assert_allclose(alpha_bars(process, num), theirs[:num], rtol=5e-5)
    assert process.schedule.t_max == num - 1
    assert process.num_steps == len(theirs)


@pytest.mark.parametrize("name", KNOWN)
def test_alpha_bar_is_the_known_one(name):
    schedule = process_of(CASES[name]).schedule
    for t, expected in KNOWN[name].items():
        assert float(schedule.alpha(float(t)) ** 2) == pytest.approx(expected, rel=2e-5)


def test_scaled_linear_read_as_linear_is_wrong():
    right = process_of(SD1).schedule
    wrong = process_of(SD1 | {"beta_schedule": "linear"}).schedule
    t = jnp.arange(1000.0)
    ratio = jax.vmap(wrong.sigma)(t) / jax.vmap(right.sigma)(t)
    assert float(ratio[0]) == pytest.approx(1, abs=1e-3)  # both start with the same beta,
    assert float(ratio[500]) == pytest.approx(1.41, abs=0.01)
    assert float(ratio.max()) == pytest.approx(1.72, abs=0.01)  # and end far from each other:
    # a network that should be asked at t = 500 is asked at 409.
    assert float(wrong.time(right.sigma(500.0))) == pytest.approx(408.9, abs=0.5)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num", [1, 7, 10, 50, 1000])
def test_steps_are_those_of_diffusers(spacing, num):
    diffusers = pytest.importorskip("diffusers")
    config = SD2 | {"timestep_spacing": spacing, "steps_offset": 0 if num == 1000 else 1}
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(num)
    np.testing.assert_array_equal(process_of(config).steps(num), theirs.timesteps.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_flow_matching_are_those_of_diffusers(shift):
    diffusers = pytest.importorskip("diffusers")
    config = SD3 | {"shift": shift}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(28)
    np.testing.assert_allclose(process_of(config).steps(28), theirs.timesteps.numpy(), rtol=1e-5)


def test_a_published_process_says_what_the_network_predicts():
    assert process_of(SD1).prediction is denoise.eps
    assert process_of(SD2).prediction is denoise.v
    assert process_of(CIFAR10 | {"prediction_type": "sample"}).prediction is denoise.x0
    assert process_of(SD3).prediction is denoise.velocity
    assert process_of(SD1).offset == 1
    assert process_of(SD1).spacing == "leading"
    assert process_of(SD1).last_is_clean is False
    assert process_of(SD1).clip is None
    assert process_of(CIFAR10).clip == 1
    assert process_of(CIFAR10 | {"variance_type": "learned_range"}).learned_variance


def gaussian(process, spread):
    """The network that is exact for data N(0, spread^2), told t as published ones are."""

    def apply(params, x, t):
        alpha, s = process.schedule(t / process.time_scale)
        noise = s * x / (alpha**2 * spread**2 + s**2)
        clean = alpha * spread**2 * x / (alpha**2 * spread**2 + s**2)
        if process.prediction is denoise.eps:
            return noise
        if process.prediction is denoise.x0:
            return clean
        return alpha * noise - s * clean if process.prediction is denoise.v else noise - clean

    return apply


@pytest.mark.parametrize(
    "config", [SD1, SD2, CIFAR10 | {"prediction_type": "sample"}, SD3, CASES["zero"]]
)
def test_the_denoiser_of_an_exact_network_is_exact(config):
    process = process_of(config)
    denoiser = process.denoiser(gaussian(process, 2.0), (), shape=(3,))
    x = jnp.array([1.0, -2.0, 0.5])
    for sigma in (0.1, 1.0, 5.0):
        np.testing.assert_allclose(denoiser(x, sigma), x * 4 / (4 + sigma**2), rtol=2e-4)
    low, high = map(float, denoiser.trained_range)
    assert 0 < low < high < np.inf


def test_a_flow_network_is_told_a_thousand_t():
    seen = []
    process = process_of(SD3)
    assert isinstance(process.schedule, RectifiedFlow)
    denoiser = process.denoiser(lambda params, x, t: (seen.append(float(t)), x)[1], ())
    denoiser(jnp.ones(2), 3.0)
    assert seen == [pytest.approx(750)]
    same = process.denoiser(len, ()).apply
    assert same == process_of(SD3).denoiser(len, ()).apply  # so that nothing is compiled twice
    assert hash(same) == hash(process_of(SD3).denoiser(len, ()).apply)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
        ({"_class_name": None}, "scheduler None"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'.*scaled_linear"),
        ({"beta_schedule": ["linear"]}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'.*epsilon"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"timestep_spacing": "log"}, "timestep_spacing 'log'"),
        ({"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000"),
        ({"num_train_timesteps": 1.5}, "num_train_timesteps 1.5"),
        ({"num_train_timesteps": True}, "num_train_timesteps True"),
        ({"beta_start": "0.1"}, "beta_start '0.1'"),
        ({"beta_start": -0.1}, "beta_start -0.1"),
        ({"beta_start": float("nan")}, "beta_start nan"),
        ({"beta_end": 1.5}, "strictly between 0 and 1"),
        ({"trained_betas": [0.1]}, "no list of 1000"),
        ({"trained_betas": [0.1] * 999 + ["x"]}, "not all numbers"),
        ({"steps_offset": 1000}, "steps_offset 1000"),
        ({"new_option": 3}, "unknown option 'new_option': 3"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD1 | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_process(tmp_path)
    assert "scheduler_config.json" in str(caught.value)


def test_reading_from_a_folder_or_a_file(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(SD1 | {"new_option": None}))
    for place in (tmp_path, path):
        assert load_process(place).prediction is denoise.eps
    with pytest.raises(FileNotFoundError, match="missing"):
        load_process(tmp_path / "missing" / "scheduler_config.json")
    with pytest.raises(ValueError, match="from 1 to 1000"):
        load_process(path).steps(0)
    dynamic = process_of(SD3 | {"use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="size of the image"):
        dynamic.steps(10)
