r"""From any network to a denoiser, D(x; sigma) = E[x0 | x0 + sigma * eps = x].

A network sees x_t = alpha x0 + s eps at time t of some schedule and predicts one of several
things.  All of them say the same about x0, by linear algebra on x_t = alpha x0 + s eps:

| prediction | the network's output             | the answer, E[x0] given x_t                 |
|------------|----------------------------------|---------------------------------------------|
| `x0`       | x0                               | output                                      |
| `eps`      | eps                              | (x_t - s output) / alpha                    |
| `score`    | grad log p_t(x_t) = -eps / s     | (x_t + s^2 output) / alpha                  |
| `v`        | alpha eps - s x0 (Salimans 2022) | (alpha x_t - s output) / (alpha^2 + s^2)    |
| `velocity` | d x_t / dt = alpha' x0 + s' eps  | (s' x_t - s output) / (alpha s' - s alpha') |

For rectified flow alpha' = -1 and s' = 1, so `velocity` is eps - x0 and the answer x_t - t output.
EDM networks (Karras 2022) predict x0 after `precondition`.

A denoiser evaluates its network at x_t = alpha x, t = time(sigma).  Conditions are bound in with
`.condition(c)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmh_jax import nn
from mmh_jax.noise import EDM, Schedule
from mmh_jax.typing import Array, ArrayLike

__all__ = [
    "NetworkDenoiser",
    "Prediction",
    "eps",
    "precondition",
    "score",
    "v",
    "velocity",
    "x0",
]

Prediction = Callable[[Array, Array, Array, Schedule], Array]


def x0(output: Array, x_t: Array, t: Array, schedule: Schedule) -> Array:
    """The network predicts the clean point."""
    return output


def eps(output: Array, x_t: Array, t: Array, schedule: Schedule) -> Array:
    """The network predicts the noise (Ho et al. 2020)."""
    alpha, s = schedule(t)
    return (x_t - s * output) / alpha


def score(output: Array, x_t: Array, t: Array, schedule: Schedule) -> Array:
    """The network predicts grad log p_t(x_t) (Song et al. 2021)."""
    alpha, s = schedule(t)
    return (x_t + s**2 * output) / alpha


def v(output: Array, x_t: Array, t: Array, schedule: Schedule) -> Array:
    """The network predicts alpha eps - s x0 (Salimans & Ho 2022, 2202.00512)."""
    alpha, s = schedule(t)
    return (alpha * x_t - s * output) / (alpha**2 + s**2)


def velocity(output: Array, x_t: Array, t: Array, schedule: Schedule) -> Array:
    """The network predicts d x_t / dt along the path of the schedule (flow matching)."""
    (alpha, s), (d_alpha, d_s) = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    return (d_s * x_t - s * output) / (alpha * d_s - s * d_alpha)


@struct.dataclass
class NetworkDenoiser:
    """A network in any parametrisation on any schedule, as a denoiser.

    Usually made by `from_function`, `from_nnx`, `from_linen` or `from_equinox`.

    Attributes:
        params: the network's arrays, a pytree (these are the leaves that `jax.grad` sees).
        schedule: the `noise.Schedule` on which it was trained.
        cond: the bound condition, or None.
        apply: `apply(params, x_t, t)`, or `apply(params, x_t, t, cond)` once a condition is bound;
            one example, no batch axis.
        prediction: what the network predicts: `x0`, `eps`, `score`, `v` or `velocity`.
        shape: the shape of a point, checked by the estimators; None to leave it unchecked.
        sigma_range: the least and the largest noise level of the training, in units of x; None for
            those of the schedule.
    """

    params: Any
    schedule: Schedule
    cond: Any = None
    apply: Callable[..., Array] = struct.field(pytree_node=False, kw_only=True)
    prediction: Prediction = struct.field(pytree_node=False, default=eps, kw_only=True)
    shape: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, kw_only=True)
    sigma_range: tuple[float, float] | None = struct.field(
        pytree_node=False, default=None, kw_only=True
    )

    @property
    def trained_range(self) -> tuple[ArrayLike, ArrayLike]:
        """The least and the largest noise level of the training."""
        if self.sigma_range is not None:
            return self.sigma_range
        return self.schedule.sigma(self.schedule.t_min), self.schedule.sigma(self.schedule.t_max)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """The network's E[x0 | x0 + sigma * eps = x], of the shape of `x`."""
        x_t, t, *cond = self._inputs(x, sigma)
        return self.prediction(self.apply(self.params, x_t, t, *cond), x_t, t, self.schedule)

    def features(self, x: Array, sigma: ArrayLike) -> tuple[Array, Any]:
        """The answer, and what the network computed inside; see `denoise.features`."""
        x_t, t, *cond = self._inputs(x, sigma)
        output, inside = _features(self.apply, self.params, x_t, t, *cond)
        return self.prediction(output, x_t, t, self.schedule), inside

    def _inputs(self, x: Array, sigma: ArrayLike) -> tuple[Any, ...]:
        """What the network is called with."""
        t = self.schedule.time(jnp.asarray(sigma, jnp.result_type(x, float)))
        inputs = (self.schedule.alpha(t) * x, t)
        return inputs if self.cond is None else (*inputs, self.cond)

    def condition(self, cond: Any) -> NetworkDenoiser:
        """The same model given `cond` (any pytree; None removes the condition)."""
        return dataclasses.replace(self, cond=cond)


def _features(apply: Any, params: Any, *inputs: Any) -> tuple[Array, Any]:
    """The answer of an `apply` and its features, if it is of a network that shows them."""
    own = getattr(apply, "features", None)
    if own is not None:
        return own(params, *inputs)
    if isinstance(apply, nn.Apply):
        return nn.features(apply, params, *inputs)
    raise TypeError(
        f"`features(denoiser=...)` is of a network whose `apply` is a {type(apply).__name__}, "
        "which shows no features; wrap a `nn.UNet` or `nn.DiT` with `from_nnx`, or give `apply` a "
        "method `features(params, x_t, t[, cond])` that returns the answer and `nn.Features`."
    )


@dataclasses.dataclass(frozen=True)
class _Precondition:
    apply: Callable[..., Array]
    sigma_data: float

    def __call__(self, params: Any, x: Array, sigma: Array, *cond: Any) -> Array:
        return self._output(self.apply(params, *self._inputs(x, sigma), *cond), x, sigma)

    def features(self, params: Any, x: Array, sigma: Array, *cond: Any) -> tuple[Array, Any]:
        output, inside = _features(self.apply, params, *self._inputs(x, sigma), *cond)
        return self._output(output, x, sigma), inside

    def _inputs(self, x: Array, sigma: Array) -> tuple[Array, Array]:
        return x / jnp.sqrt(sigma**2 + self.sigma_data**2), jnp.log(sigma) / 4

    def _output(self, output: Array, x: Array, sigma: Array) -> Array:
        total = jnp.sqrt(sigma**2 + self.sigma_data**2)
        c_skip = (self.sigma_data / total) ** 2
        c_out = sigma * self.sigma_data / total
        return c_skip * x + c_out * output


def precondition(
    apply: Callable[..., Array],
    params: Any,
    *,
    sigma_data: float = 0.5,
    shape: tuple[int, ...] | None = None,
    sigma_range: tuple[float, float] | None = None,
) -> NetworkDenoiser:
    """An EDM-preconditioned network (Karras et al. 2022, 2206.00364, eq. 7 and table 1).

    D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4), where the coefficients keep input and
    target of F at unit variance for data of standard deviation `sigma_data`.

    Args:
        apply: `apply(params, x, c_noise[, cond])`, one example per call; for a module, the
            `apply` and `params` that `from_nnx` (or another adapter) made.
        params: its parameters.
        sigma_data: the standard deviation of the data per coordinate.
        shape: the shape of a point, for checking.
        sigma_range: the least and the largest noise level of the training, if known.
    """
    return NetworkDenoiser(
        params,
        EDM(),
        apply=_Precondition(apply, sigma_data),
        prediction=x0,
        shape=shape,
        sigma_range=sigma_range,
    )
