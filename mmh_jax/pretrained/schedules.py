r"""Published `scheduler_config.json`: on which noise schedule a network was trained, and for what.

A scheduler of diffusers is two things: the process of the training, which belongs to the model, and
a sampler, which does not.  Here the process is read,

    alpha_bar_t = prod_{i <= t} (1 - beta_i),   t = 0 ... T - 1  (T = 1000),

with the same t that the network is told, so that `noise.DDPM` is met at whole t; and the options of
the sampler that say at which t to evaluate.  `beta_schedule` says beta_i, i = 0 ... T - 1:

    linear              from `beta_start` to `beta_end` in equal steps (Ho et al. 2020)
    scaled_linear       the square of steps from sqrt(`beta_start`) to sqrt(`beta_end`)
    squaredcos_cap_v2   1 - f(i + 1) / f(i), at most .999 (Nichol & Dhariwal 2021), with
                        f(i) = cos^2((i / T + .008) / 1.008 * pi / 2)
    sigmoid             `beta_start` + sigmoid(-6 ... 6) * (`beta_end` - `beta_start`)

Stable Diffusion is `scaled_linear`; read as `linear`, its noise levels are too large, by up to a
factor of 1.7.  Flow matching (Stable Diffusion 3) has x_t = (1 - t) x0 + t eps, and its network is
told T t; `shift` moves only the steps of the sampler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmh_jax import denoise
from mmh_jax.data.files import PathLike
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.denoise.network import Prediction
from mmh_jax.noise import DDPM, RectifiedFlow, Schedule
from mmh_jax.pretrained.files import fault, read_json, shown
from mmh_jax.typing import Array

__all__ = ["Process", "load_process", "process_of"]

MAX_STEPS = 100_000
CURE = "Use the scheduler_config.json that was published with this model."
DISCRETE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler",)
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": denoise.eps,
    "sample": denoise.x0,
    "v_prediction": denoise.v,
    "flow_prediction": denoise.velocity,
}
SPACINGS = ("leading", "linspace", "trailing")
# Options of samplers, and of training, that change neither schedule nor prediction.
_OTHERS = {
    *("algorithm_type", "base_image_seq_len", "base_shift", "clip_sample", "clip_sample_range"),
    *("disable_corrector", "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type"),
    *("interpolation_type", "invert_sigmas", "lambda_min_clipped", "lower_order_final"),
    *("max_image_seq_len", "max_shift", "predict_x0", "sample_max_value", "set_alpha_to_one"),
    *("shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p"),
    *("solver_type", "stochastic_sampling", "thresholding", "time_shift_type"),
    *("use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas"),
    *("use_lu_lambdas", "variance_type", "flow_shift"),
}
_READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "steps_offset", "timestep_spacing", "shift"),
    *("use_flow_sigmas", "timestep_type"),
}


@dataclasses.dataclass(frozen=True)
class Process:
    """On which process a network was trained, and the steps that its sampler takes.

    Attributes:
        schedule: `noise.DDPM` with t = 0 ... T - 1, or `noise.RectifiedFlow` with t from 0 to 1.
        prediction: what the network predicts, such as `denoise.eps`.
        num_steps: T.
        time_scale: the network is told this times t: 1, or T for flow matching.
        spacing, offset: how the sampler chooses its steps; see `steps`.
        clip: the sampler clips its estimate of x0 to +- this, if not None.  The denoiser does not.
        last_is_clean: whether the sampler's last step ends at alpha_bar = 1, not alpha_bar_0.
        learned_variance: whether half of the network's output channels are a variance, which the
            denoiser does not use.
        shift: of the steps of flow matching; None where it is not one number.
    """

    schedule: Schedule
    prediction: Prediction
    num_steps: int
    time_scale: float = 1.0
    spacing: str = "leading"
    offset: int = 0
    clip: float | None = None
    last_is_clean: bool = True
    learned_variance: bool = False
    shift: float | None = 1.0

    def denoiser(
        self,
        apply: Callable[..., Array],
        params: Any,
        *,
        shape: tuple[int, ...] | None = None,
        cond: Any = None,
    ) -> NetworkDenoiser:
        """The network as a denoiser.

        Args:
            apply: `apply(params, x_t, t[, cond])` for one example, t as published networks take it.
            params: its parameters.
            shape: of a point.
            cond: a condition, or None.

        >>> process = process_of({"_class_name": "DDPMScheduler"})
        >>> denoiser = process.denoiser(lambda params, x, t: 0 * x, ())
        >>> float(denoiser(jnp.ones(()), 2.0))  # no noise is found: x itself
        1.0
        """
        scaled = apply if self.time_scale == 1 else _Scaled(apply, self.time_scale)
        return NetworkDenoiser(
            params,
            self.schedule,
            cond,
            apply=scaled,
            prediction=self.prediction,
            shape=shape,
            sigma_range=self._sigma_range(),
        )

    def _sigma_range(self) -> tuple[float, float] | None:
        if not isinstance(self.schedule, RectifiedFlow):
            return None
        return 1 / (self.num_steps - 1), self.num_steps - 1.0  # t = 1 / T and 1 - 1 / T

    def steps(self, num: int) -> np.ndarray:
        """The t of a sampler with `num` steps, falling: those that DDIM in diffusers takes.

        For flow matching t is shifted: T s(u), s(u) = shift u / (1 + (shift - 1) u), u falling
        from 1 to 1 / T in equal steps.

        Args:
            num: at least 1, and at most T.

        Raises:
            ValueError: if `num` is out of range.

        >>> process_of({"_class_name": "DDIMScheduler", "steps_offset": 1}).steps(4)
        array([751, 501, 251,   1])
        """
        total = self.num_steps
        if not 1 <= num <= total:
            raise ValueError(
                f"`steps(num={num})` must be from 1 to {total}, those of the training."
            )
        if isinstance(self.schedule, RectifiedFlow):
            # Published samplers start from a table that is shifted already, and shift it again.
            if self.shift is None:
                raise ValueError(
                    "`steps(num=...)` of this model depend on the size of the image, which is not "
                    "supported; give the steps yourself, as T t."
                )
            least = _shifted(1 / total, self.shift)
            return total * _shifted(np.linspace(1.0, least, num), self.shift)
        if self.spacing == "leading":
            return np.arange(num)[::-1] * (total // num) + self.offset
        if self.spacing == "linspace":
            return np.linspace(0, total - 1, num).round()[::-1].astype(int)
        return np.round(np.arange(total, 0, -total / num)).astype(int) - 1


def _shifted(u: Any, shift: float) -> Any:
    return shift * u / (1 + (shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A network that is told a multiple of t."""

    apply: Callable[..., Array]
    factor: float

    def __call__(self, params: Any, x: Array, t: Array, *cond: Any) -> Array:
        return self.apply(params, x, self.factor * t, *cond)


def load_process(path: PathLike, *, caller: str = "load_process") -> Process:
    """Read a `scheduler_config.json`.

    Args:
        path: of the file, or of the folder that holds it.
        caller: the function to name in an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none, or asks for what is not supported.
    """
    path = Path(path)
    path = path / "scheduler_config.json" if path.is_dir() else path
    return process_of(read_json(path, caller=caller), caller=caller, path=path)


def process_of(
    config: Mapping[str, Any], *, caller: str = "process_of", path: PathLike = "..."
) -> Process:
    """The process that the content of a `scheduler_config.json` describes.

    Args:
        config: with `_class_name`, which is one of `DISCRETE` or `FLOW`.
        caller, path: to name in an error.

    Raises:
        ValueError: if a value is wrong, unknown or not supported.

    >>> config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
    >>> config |= {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    >>> process = process_of(config)  # Stable Diffusion 1
    >>> round(float(process.schedule.sigma(999)), 2)
    14.61
    """
    return _Config(dict(config), caller, path).process()


class _Config:
    """A configuration, and where it is from."""

    def __init__(self, config: dict[str, Any], caller: str, path: PathLike):
        self.config, self.caller, self.path = config, caller, path
        self.kind = config.get("_class_name")

    def wrong(self, what: str, cure: str = CURE) -> ValueError:
        return fault(self.caller, self.path, what, cure)

    def number(self, name: str, default: float, *, least: float = 0.0) -> float:
        value = self.config.get(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value < least:
            raise self.wrong(f"has the {name} {shown(value)}")
        return value

    def whole(self, name: str, default: int, *, least: int, most: int) -> int:
        value = self.number(name, default, least=least)
        if value != int(value) or value > most:
            raise self.wrong(f"has the {name} {shown(value)}")
        return int(value)

    def choice(self, name: str, default: str, among: Any) -> str:
        value = self.config.get(name, default)
        if not isinstance(value, str) or value not in among:
            raise self.wrong(
                f"has the {name} {shown(value)}", f"Supported are {', '.join(sorted(among))}."
            )
        return value

    def check(self) -> None:
        if self.kind not in DISCRETE + FLOW:
            raise self.wrong(
                f"is of the scheduler {shown(self.kind)}, which is not read here",
                f"Read are {', '.join(DISCRETE + FLOW)}.",
            )
        for name, value in self.config.items():
            known = name.startswith("_") or name in _READ | _OTHERS
            if not known and value not in (None, False):
                raise self.wrong(
                    f"has the unknown option {shown(name)}: {shown(value)}",
                    "It may change what the network was trained for; remove it if it does not.",
                )
        self.choice("timestep_type", "discrete", ("discrete",))

    def process(self) -> Process:
        self.check()
        total = self.whole("num_train_timesteps", 1000, least=2, most=MAX_STEPS)
        flow = self.kind in FLOW or self.config.get("use_flow_sigmas") is True
        if flow:
            return self.flow(total)
        predictions = PREDICTIONS.keys() - {"flow_prediction"}
        clips = self.config.get("clip_sample", self.kind in ("DDPMScheduler", "DDIMScheduler"))
        spaced = (
            "leading"
            if self.kind in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
            else "linspace"
        )
        return Process(
            self.schedule(total),
            PREDICTIONS[self.choice("prediction_type", "epsilon", predictions)],
            total,
            spacing=self.choice("timestep_spacing", spaced, SPACINGS),
            offset=self.whole("steps_offset", 0, least=0, most=total - 1),
            clip=self.number("clip_sample_range", 1.0) if clips else None,
            last_is_clean=bool(self.config.get("set_alpha_to_one", self.kind != "PNDMScheduler")),
            learned_variance=self.config.get("variance_type") in ("learned", "learned_range"),
        )

    def flow(self, total: int) -> Process:
        shift: float | None = self.number("shift", 1.0, least=1e-3)
        if self.kind not in FLOW or self.config.get("use_dynamic_shifting"):
            shift = None
        if self.kind not in FLOW:
            self.choice("prediction_type", "epsilon", ("flow_prediction",))
        return Process(
            RectifiedFlow(), denoise.velocity, total, time_scale=float(total), shift=shift
        )

    def schedule(self, total: int) -> DDPM:
        betas = self.betas(total)
        if not np.all((betas > 0) & (betas < 1)):
            raise self.wrong("has betas that are not strictly between 0 and 1")
        if self.config.get("rescale_betas_zero_snr"):
            if self.config.get("prediction_type", "epsilon") == "epsilon":
                raise self.wrong(
                    'has rescale_betas_zero_snr with prediction_type "epsilon": where nothing of '
                    "the point is left the noise does not tell it, and there is no denoiser"
                )
            return _without_last(betas)
        return DDPM.from_betas(betas)

    def betas(self, total: int) -> np.ndarray:
        given = self.config.get("trained_betas")
        if given is not None:
            if not isinstance(given, list) or len(given) != total:
                raise self.wrong(f"has trained_betas that are no list of {total} numbers")
            if not all(isinstance(beta, float | int) for beta in given):
                raise self.wrong("has trained_betas that are not all numbers")
            return np.asarray(given, np.float64)
        default = (0.00085, 0.012) if self.kind == "HeunDiscreteScheduler" else (1e-4, 0.02)
        start = self.number("beta_start", default[0])
        end = self.number("beta_end", default[1])
        return _BETAS[self.choice("beta_schedule", "linear", _BETAS)](start, end, total)


def _cosine(start: float, end: float, total: int) -> np.ndarray:
    alpha_bar = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _sigmoid(start: float, end: float, total: int) -> np.ndarray:
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, total)))


_BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": np.linspace,
    "scaled_linear": lambda start, end, total: np.linspace(start**0.5, end**0.5, total) ** 2,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
}


def _without_last(betas: np.ndarray) -> DDPM:
    """The table with alpha_bar moved so that its last is 0 (Lin et al. 2023, 2305.08891).

    There the noise level is infinite; the table ends one step before, and goes on as a line.
    """
    root = np.exp(np.cumsum(np.log1p(-betas)) / 2)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root[:-1] ** 2
    return DDPM(jnp.asarray(0.5 * np.log((1 - alpha_bar) / alpha_bar)))
