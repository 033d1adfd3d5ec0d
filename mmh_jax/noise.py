r"""Noise schedules: how data turn into noise, x_t = alpha(t) x0 + s(t) eps.

Every schedule is seen by the rest of the package only through its noise level in data units,

    sigma(t) = s(t) / alpha(t),

a strictly increasing function of t with an exact inverse `time(sigma)`: x_t / alpha(t) is the
clean point plus sigma(t) * eps whatever the schedule.  As a stochastic differential equation,

    dx = f(t) x dt + g(t) dw,    f = alpha' / alpha,    g^2 = (s^2)' - 2 f s^2 = 2 s^2 (log sigma)'.

| schedule        | alpha             | s                 | reference                          |
|-----------------|-------------------|-------------------|------------------------------------|
| `VP`            | exp(-B/2)         | sqrt(1 - exp(-B)) | Song 2021, 2011.13456, eq. 11      |
| `SubVP`         | exp(-B/2)         | 1 - exp(-B)       | Song 2021, eq. 12                  |
| `Cosine`        | cos a / cos c     | sqrt(1 - alpha^2) | Nichol 2021, 2102.09672, eq. 17    |
| `VE`            | 1                 | lo (hi / lo)^t    | Song 2021, eq. 9                   |
| `EDM`           | 1                 | t                 | Karras 2022, 2206.00364            |
| `RectifiedFlow` | 1 - t             | t                 | Liu 2022, 2209.03003               |
| `DDPM`          | sqrt(alpha_bar)   | sqrt(1 - alpha^2) | Ho 2020, 2006.11239; between steps |
|                 |                   |                   | log sigma is interpolated          |

with B(t) the integral of beta from 0 to t, a = (pi/2)(t + c0)/(1 + c0) and c = a(0).
All functions are elementwise in t or sigma, differentiable, and keep the dtype of their argument.
"""

# ruff: noqa: D102 -- a method that overrides one of `Schedule` is documented there.

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.typing import Array, ArrayLike

__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "RectifiedFlow",
    "Schedule",
    "SubVP",
    "ddpm_linear",
    "ddpm_scaled_linear",
]


def _float(value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


class Schedule:
    """The base of all schedules.  Call it with t to get `(alpha, s)`.

    Attributes:
        t_min, t_max: the range of t on which the process is defined; sigma(t_min) is 0 or the
            schedule's smallest noise level, sigma(t_max) its largest (possibly infinite).
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: ArrayLike) -> Array:
        """The factor of the clean point."""
        raise NotImplementedError

    def s(self, t: ArrayLike) -> Array:
        """The standard deviation of the noise in x_t."""
        raise NotImplementedError

    def time(self, sigma: ArrayLike) -> Array:
        """The exact inverse of `sigma`: the t at which the noise level is `sigma`."""
        raise NotImplementedError

    def drift(self, t: ArrayLike) -> Array:
        """f(t) of dx = f(t) x dt + g(t) dw."""
        raise NotImplementedError

    def diffusion(self, t: ArrayLike) -> Array:
        """g(t) of dx = f(t) x dt + g(t) dw."""
        raise NotImplementedError

    def sigma(self, t: ArrayLike) -> Array:
        """The noise level in data units, s / alpha."""
        return self.s(t) / self.alpha(t)

    def log_snr(self, t: ArrayLike) -> Array:
        """log(alpha^2 / s^2) = -2 log sigma."""
        return -2 * jnp.log(self.sigma(t))

    def __call__(self, t: ArrayLike) -> tuple[Array, Array]:
        """`(alpha(t), s(t))`."""
        return self.alpha(t), self.s(t)


@struct.dataclass
class _LinearBeta(Schedule):
    """beta(t) = beta_min + t (beta_max - beta_min) and its integral B(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: ArrayLike) -> Array:
        """The rate at which the process forgets."""
        t = _float(t)
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: ArrayLike) -> Array:
        """B(t)."""
        t = _float(t)
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def _time_of_integral(self, integral: Array) -> Array:
        # The root of a quadratic, in the form that does not cancel for small B.
        slope = 2 * (self.beta_max - self.beta_min)
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + slope * integral))

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.exp(-self.beta_integral(t) / 2)

    def drift(self, t: ArrayLike) -> Array:
        return -self.beta(t) / 2


@struct.dataclass
class VP(_LinearBeta):
    """Variance preserving, alpha^2 + s^2 = 1, with beta linear in t from .1 to 20.

    >>> schedule = VP()
    >>> t = schedule.time(0.1)
    >>> round(float(schedule.sigma(t)), 6)
    0.1
    """

    def s(self, t: ArrayLike) -> Array:
        return jnp.sqrt(-jnp.expm1(-self.beta_integral(t)))

    def sigma(self, t: ArrayLike) -> Array:
        return jnp.sqrt(jnp.expm1(self.beta_integral(t)))

    def time(self, sigma: ArrayLike) -> Array:
        return self._time_of_integral(jnp.log1p(_float(sigma) ** 2))

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(self.beta(t))


@struct.dataclass
class SubVP(_LinearBeta):
    """Sub-VP: the drift of VP with less noise, s = 1 - exp(-B)."""

    def s(self, t: ArrayLike) -> Array:
        return -jnp.expm1(-self.beta_integral(t))

    def sigma(self, t: ArrayLike) -> Array:
        return 2 * jnp.sinh(self.beta_integral(t) / 2)

    def time(self, sigma: ArrayLike) -> Array:
        return self._time_of_integral(2 * jnp.arcsinh(_float(sigma) / 2))

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(self.beta(t) * -jnp.expm1(-2 * self.beta_integral(t)))


@struct.dataclass
class Cosine(Schedule):
    """Cosine, alpha = cos(a) / cos(c); variance preserving.

    Written with sin(a - c) near t = 0 and with the angle left to pi/2 near t = 1, so that nothing
    cancels: alpha(1) is 0 and sigma(1) infinite.
    """

    offset: float = 0.008

    def _angles(self, t: ArrayLike) -> tuple[Array, Array]:
        scale = jnp.pi / 2 / (1 + self.offset)
        return scale * _float(t), scale * self.offset * jnp.ones_like(_float(t))

    def _angle_left(self, t: ArrayLike) -> Array:
        return jnp.pi / 2 / (1 + self.offset) * (1 - _float(t))

    def alpha(self, t: ArrayLike) -> Array:
        _, start = self._angles(t)
        return jnp.sin(self._angle_left(t)) / jnp.cos(start)

    def s(self, t: ArrayLike) -> Array:
        turn, start = self._angles(t)
        return jnp.sqrt(jnp.sin(turn) * jnp.sin(turn + 2 * start)) / jnp.cos(start)

    def time(self, sigma: ArrayLike) -> Array:
        sigma = _float(sigma)
        _, start = self._angles(sigma)
        sin_c, cos_c = jnp.sin(start), jnp.cos(start)
        # tan^2 a = (sigma^2 + sin^2 c) / cos^2 c, and sin(a - c) sin(a + c) = (sigma cos a)^2.
        cos_a = cos_c / jnp.sqrt(1 + sigma**2)
        sin_a = jnp.sqrt((sigma**2 + sin_c**2) / (1 + sigma**2))
        sine = (sigma * cos_a) ** 2 / (sin_a * cos_c + cos_a * sin_c)
        cosine = cos_a * cos_c + sin_a * sin_c
        return jnp.arctan2(sine, cosine) * (1 + self.offset) * 2 / jnp.pi

    def _log_alpha_rate(self, t: ArrayLike) -> Array:
        return -jnp.pi / 2 / (1 + self.offset) / jnp.tan(self._angle_left(t))

    def drift(self, t: ArrayLike) -> Array:
        return self._log_alpha_rate(t)

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(-2 * self._log_alpha_rate(t))


@struct.dataclass
class VE(Schedule):
    """Variance exploding: alpha = 1, s geometric from `sigma_min` to `sigma_max`."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.ones_like(_float(t))

    def s(self, t: ArrayLike) -> Array:
        return self.sigma_min * jnp.exp(_float(t) * jnp.log(self.sigma_max / self.sigma_min))

    def time(self, sigma: ArrayLike) -> Array:
        ratio = jnp.log(self.sigma_max / self.sigma_min)
        return jnp.log(_float(sigma) / self.sigma_min) / ratio

    def drift(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(_float(t))

    def diffusion(self, t: ArrayLike) -> Array:
        return self.s(t) * jnp.sqrt(2 * jnp.log(self.sigma_max / self.sigma_min))


@struct.dataclass
class EDM(Schedule):
    """alpha = 1, s = t: time is the noise level itself."""

    t_max: float = struct.field(pytree_node=False, default=80.0)

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.ones_like(_float(t))

    def s(self, t: ArrayLike) -> Array:
        return _float(t)

    def time(self, sigma: ArrayLike) -> Array:
        return _float(sigma)

    def drift(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(_float(t))

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(2 * _float(t))


@struct.dataclass
class RectifiedFlow(Schedule):
    """Straight paths: x_t = (1 - t) x0 + t eps."""

    def alpha(self, t: ArrayLike) -> Array:
        return 1 - _float(t)

    def s(self, t: ArrayLike) -> Array:
        return _float(t)

    def time(self, sigma: ArrayLike) -> Array:
        sigma = _float(sigma)
        return sigma / (1 + sigma)

    def drift(self, t: ArrayLike) -> Array:
        return -1 / (1 - _float(t))

    def diffusion(self, t: ArrayLike) -> Array:
        t = _float(t)
        return jnp.sqrt(2 * t / (1 - t))


@struct.dataclass
class DDPM(Schedule):
    """A table of discrete steps, made continuous: t is the step index 0 ... T-1.

    Between steps, and beyond the first and the last, log sigma is linear in t, so that at whole
    steps the table is met exactly and the inverse is exact everywhere.  alpha^2 + s^2 = 1.

    Args:
        log_sigmas: (T,) strictly increasing; use `from_betas`, `ddpm_linear` or
            `ddpm_scaled_linear`.

    >>> schedule = ddpm_linear(1000)
    >>> bool(jnp.isclose(schedule.alpha(0.0) ** 2, 1 - 1e-4))
    True
    """

    log_sigmas: Array

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> DDPM:
        """The schedule of alpha_bar_t = prod_{i <= t} (1 - beta_i).

        Raises:
            ValueError: if `betas` are not at least two numbers strictly between 0 and 1.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or betas.size < 2:
            raise ValueError(
                f"`DDPM.from_betas(betas=...)` has shape {betas.shape}; it takes a vector of at "
                "least two betas, one per step."
            )
        if not np.all((betas > 0) & (betas < 1)):
            raise ValueError(
                f"`DDPM.from_betas(betas=...)` ranges from {betas.min()} to {betas.max()}; a beta "
                "lies strictly between 0 and 1. Did you pass alphas or alpha_bars?"
            )
        log_alpha_bar = np.cumsum(np.log1p(-betas))
        return cls(jnp.asarray(0.5 * np.log(np.expm1(-log_alpha_bar))))

    @property
    def t_max(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The last step, T - 1."""
        return float(self.log_sigmas.shape[0] - 1)

    def _segment(self, index: Array) -> tuple[Array, Array]:
        index = jnp.clip(index, 0, self.log_sigmas.shape[0] - 2)
        start = self.log_sigmas[index]
        return start, self.log_sigmas[index + 1] - start

    def _log_sigma(self, t: ArrayLike) -> tuple[Array, Array]:
        t = _float(t)
        index = jnp.clip(jnp.floor(t).astype(int), 0, self.log_sigmas.shape[0] - 2)
        start, slope = self._segment(index)
        log_sigma = start + slope * (t - index)
        return log_sigma.astype(t.dtype), slope.astype(t.dtype)

    def sigma(self, t: ArrayLike) -> Array:
        return jnp.exp(self._log_sigma(t)[0])

    def alpha(self, t: ArrayLike) -> Array:
        return jax.lax.rsqrt(1 + self.sigma(t) ** 2)

    def s(self, t: ArrayLike) -> Array:
        return self.sigma(t) * self.alpha(t)

    def time(self, sigma: ArrayLike) -> Array:
        log_sigma = jnp.log(_float(sigma))
        index = jnp.searchsorted(self.log_sigmas, log_sigma, side="right") - 1
        index = jnp.clip(index, 0, self.log_sigmas.shape[0] - 2)
        start, slope = self._segment(index)
        return (index + (log_sigma - start) / slope).astype(log_sigma.dtype)

    def drift(self, t: ArrayLike) -> Array:
        _, slope = self._log_sigma(t)
        return -slope * self.s(t) ** 2

    def diffusion(self, t: ArrayLike) -> Array:
        _, slope = self._log_sigma(t)
        return self.s(t) * jnp.sqrt(2 * slope)


def ddpm_linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDPM:
    """Betas linear in the step (Ho et al. 2020)."""
    return DDPM.from_betas(np.linspace(beta_start, beta_end, num_steps))


def ddpm_scaled_linear(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> DDPM:
    """Square roots of the betas linear in the step: latent diffusion and Stable Diffusion."""
    return DDPM.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)
