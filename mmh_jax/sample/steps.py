r"""Steps of samplers: from one noise level to the next, in one form for every schedule.

In x = x_t / alpha and sigma = s / alpha a schedule is nothing but its noise levels, and the
published samplers, whatever schedule they were written for, are few.  With D = D(x; sigma), from
sigma to sigma':

    DDIM          D + (down / sigma) (x - D) + up z,   up = eta sigma' sqrt(1 - sigma'^2 / sigma^2),
                  down^2 = sigma'^2 - up^2; eta = 0 is Euler's step, eta = 1 the ancestral DDPM
                  (Song et al. 2021, 2010.02502, eq. 12 and 16; Ho et al. 2020, 2006.11239, with
                  the posterior's variance)
    DPM++(2M)     (sigma' / sigma) x + (1 - sigma' / sigma) [D + (D - D_before) h / (2 h_before)],
                  h = log(sigma / sigma') (Lu et al. 2022, 2211.01095, algorithm 2)
    Heun, EDM     noise up to (1 + churn) sigma, then Euler's step corrected by the slope at its
                  end (Karras et al. 2022, 2206.00364, algorithms 1 and 2)

A step is a value, as a trace strategy is; `solve` takes any of them.
"""

# ruff: noqa: D102 -- a method that overrides one of `Step` is documented there.

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mmh_jax.typing import Array, Denoiser, Key, check_key

__all__ = ["Advance", "Step", "ancestral", "ddim", "dpm_solver_2m", "heun"]


class Advance(NamedTuple):
    """What a step returns.

    Attributes:
        x: the point at the next level.
        denoised: what the denoiser answered first.
        at: the point and the level at which it was asked: this step's, or raised by churn.
        memory: what the next step is given.
    """

    x: Array
    denoised: Array
    at: tuple[Array, Array]
    memory: Any


class Step(Protocol):
    """From one noise level to the next.

    Attributes:
        is_stochastic: whether it draws noise, and needs a key.
        evaluations: of the denoiser, for each step.
    """

    @property
    def is_stochastic(self) -> bool: ...

    @property
    def evaluations(self) -> int: ...

    def start(self, x: Array) -> Any:
        """The memory before the first step."""
        ...

    def __call__(
        self,
        denoiser: Denoiser,
        x: Array,
        sigma: Array,
        sigma_next: Array,
        memory: Any,
        *,
        key: Key | None,
    ) -> Advance:
        """Carry x from `sigma` to `sigma_next`."""
        ...


@dataclasses.dataclass(frozen=True)
class _Ddim:
    eta: float

    evaluations = 1

    @property
    def is_stochastic(self) -> bool:
        return self.eta > 0

    def start(self, x: Array) -> None:
        return None

    def __call__(
        self, denoiser: Denoiser, x: Array, sigma: Array, sigma_next: Array, memory: None, *,
        key: Key | None,
    ) -> Advance:  # fmt: skip
        denoised = denoiser(x, sigma)
        if not self.is_stochastic:
            ahead = denoised + sigma_next / sigma * (x - denoised)
            return Advance(ahead, denoised, (x, sigma), None)
        up = self.eta * sigma_next * jnp.sqrt(1 - (sigma_next / sigma) ** 2)
        down = jnp.sqrt(sigma_next**2 - up**2)
        noise = jax.random.normal(_given(key), x.shape, x.dtype)
        ahead = denoised + down / sigma * (x - denoised) + up * noise
        return Advance(ahead, denoised, (x, sigma), None)


@dataclasses.dataclass(frozen=True)
class _Multistep:
    evaluations = 1
    is_stochastic = False

    def start(self, x: Array) -> tuple[Array, Array]:
        # No step before: the first is then of the first order.
        return jnp.zeros_like(x), jnp.zeros((), x.dtype)

    def __call__(
        self, denoiser: Denoiser, x: Array, sigma: Array, sigma_next: Array,
        memory: tuple[Array, Array], *, key: Key | None,
    ) -> Advance:  # fmt: skip
        before, length_before = memory
        denoised, length = denoiser(x, sigma), jnp.log(sigma / sigma_next)
        # The last step, to no noise, is of the first order, too: it ends at the denoised point.
        is_first = (length_before == 0) | (sigma_next == 0)
        share = jnp.where(is_first, 0, length / jnp.where(is_first, 1, 2 * length_before))
        ahead = denoised + share * (denoised - before)
        ratio = sigma_next / sigma
        moved = ratio * x + (1 - ratio) * ahead
        return Advance(moved, denoised, (x, sigma), (denoised, length))


@dataclasses.dataclass(frozen=True)
class _Heun:
    churn: float
    low: float
    high: float
    noise: float

    evaluations = 2

    @property
    def is_stochastic(self) -> bool:
        return self.churn > 0

    def start(self, x: Array) -> None:
        return None

    def __call__(
        self, denoiser: Denoiser, x: Array, sigma: Array, sigma_next: Array, memory: None, *,
        key: Key | None,
    ) -> Advance:  # fmt: skip
        if self.is_stochastic:
            inside = (self.low <= sigma) & (sigma <= self.high)
            factor = jnp.where(inside, 1 + self.churn, 1.0).astype(x.dtype)
            # Of the factor, so that nothing is below 0 by rounding where there is no noise.
            added = self.noise * sigma * jnp.sqrt(factor**2 - 1)
            x = x + added * jax.random.normal(_given(key), x.shape, x.dtype)
            sigma = factor * sigma
        denoised = denoiser(x, sigma)
        slope = (x - denoised) / sigma
        euler = x + (sigma_next - sigma) * slope
        slope_next = (euler - denoiser(euler, sigma_next)) / sigma_next
        moved = x + (sigma_next - sigma) * (slope + slope_next) / 2
        return Advance(moved, denoised, (x, sigma), None)


def _given(key: Key | None) -> Key:
    return check_key("a step with noise", key, otherwise=", or take one without: `ddim()`")


def ddim(eta: float = 0.0) -> Step:
    """DDIM: 1 evaluation a step, first order; downwards with `eta`, either way without.

    Args:
        eta: of the noise of each step, from 0, deterministic, to 1, ancestral sampling.

    Raises:
        ValueError: if eta is not between 0 and 1.

    >>> ddim(), ddim(1.0).is_stochastic
    (_Ddim(eta=0.0), True)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`ddim(eta={eta})`: eta is between 0, no noise, and 1, that of DDPM.")
    return _Ddim(float(eta))


def ancestral() -> Step:
    """Ancestral sampling of a DDPM, `ddim(1.0)`: exact for the posterior of a single point."""
    return ddim(1.0)


def dpm_solver_2m() -> Step:
    """DPM-Solver++(2M): 1 evaluation a step, second order, no noise.

    Best on levels evenly spaced in log sigma, or nearly so, as `karras_levels`.
    """
    return _Multistep()


def heun(
    churn: float = 0.0, *, low: float = 0.0, high: float = float("inf"), noise: float = 1.0
) -> Step:
    """Heun's step: 2 evaluations, second order; with `churn` the stochastic sampler of EDM.

    Args:
        churn: the share by which noise raises the level before each step, gamma of the paper:
            min(S_churn / steps, sqrt(2) - 1).
        low, high: levels between which it does, S_tmin and S_tmax, in data units.
        noise: the standard deviation of this noise, S_noise, a little over 1 against detail lost.

    Raises:
        ValueError: for a negative churn or noise, or `low` not below `high`.

    >>> heun(0.1).is_stochastic, heun().evaluations
    (True, 2)
    """
    if not (0 <= churn < float("inf") and 0 <= noise < float("inf") and low < high):
        raise ValueError(
            f"`heun(churn={churn}, low={low}, high={high}, noise={noise})`: churn and noise are "
            "finite and not negative, and low is below high."
        )
    return _Heun(float(churn), float(low), float(high), float(noise))
