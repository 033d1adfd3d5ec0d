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
`.condition(c)`; classifier-free guidance is a denoiser made of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx, struct

from mmh_jax import nn
from mmh_jax.nn.functional import one_example
from mmh_jax.noise import EDM, Schedule
from mmh_jax.typing import Array, ArrayLike

__all__ = [
    "Affine",
    "Guided",
    "NetworkDenoiser",
    "eps",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "is_guided",
    "outside_training",
    "precondition",
    "score",
    "trained_range",
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
        t = self.schedule.time(jnp.asarray(sigma, jnp.result_type(x, float)))
        x_t = self.schedule.alpha(t) * x
        inputs = (x_t, t) if self.cond is None else (x_t, t, self.cond)
        return self.prediction(self.apply(self.params, *inputs), x_t, t, self.schedule)

    def condition(self, cond: Any) -> NetworkDenoiser:
        """The same model given `cond` (any pytree; None removes the condition)."""
        return dataclasses.replace(self, cond=cond)


# Adapters.  Each `apply` below, like `nn.Apply`, is a frozen dataclass, so that wrapping the same
# model twice gives equal static fields and `jax.jit` does not compile twice.


@dataclasses.dataclass(frozen=True)
class _Function:
    function: Callable[..., Array]
    batched: bool

    def __call__(self, params: None, *inputs: Any) -> Array:
        return one_example(self.function, *inputs) if self.batched else self.function(*inputs)


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: Any
    batched: bool

    def __call__(self, params: Any, *inputs: Any) -> Array:
        def call(*args: Any) -> Array:
            return self.module.apply(params, *args)

        return one_example(call, *inputs) if self.batched else call(*inputs)


@dataclasses.dataclass(frozen=True)
class _Equinox:
    static: Any
    batched: bool

    def __call__(self, params: Any, *inputs: Any) -> Array:
        module = eqx.combine(params, self.static)
        return one_example(module, *inputs) if self.batched else module(*inputs)


def from_function(
    function: Callable[..., Array],
    schedule: Schedule,
    *,
    prediction: Prediction = eps,
    shape: tuple[int, ...] | None = None,
    batched: bool = False,
) -> NetworkDenoiser:
    """A plain function `function(x_t, t[, cond])` as a denoiser.

    Arrays that the function closes over become constants of the compiled program; for a large
    model use `NetworkDenoiser(params, schedule, apply=...)`, which keeps them as arguments.

    Args:
        function: the network, one example per call (or with a leading batch axis of size 1 on every
            argument if `batched`).
        schedule: the noise schedule on which it was trained.
        prediction: what it predicts.
        shape: the shape of a point, for checking.
        batched: whether the function wants a batch axis.

    >>> from mmh_jax import noise
    >>> standard_normal = from_function(lambda x_t, t: -x_t, noise.VP(), prediction=score)
    >>> standard_normal(jnp.array([3.0]), 1.0).round(5)   # E[x0 | x] = x / (1 + sigma^2)
    Array([1.5], dtype=float32)
    """
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"`from_function(function=...)` got a {type(function).__name__} that cannot be hashed, "
            "so it cannot be part of a compiled program; if it is a module that holds arrays, use "
            "`from_equinox` or `NetworkDenoiser(params, schedule, apply=...)`."
        ) from None
    return NetworkDenoiser(
        None, schedule, apply=_Function(function, batched), prediction=prediction, shape=shape
    )


def from_nnx(
    module: nnx.Module,
    schedule: Schedule,
    *,
    prediction: Prediction = eps,
    shape: tuple[int, ...] | None = None,
    batched: bool = False,
) -> NetworkDenoiser:
    """A Flax NNX module `module(x_t, t[, cond])` as a denoiser; see `from_function`.

    The module is split once, here; put it into evaluation mode first (`module.eval()`) if it has
    dropout or batch statistics.  All its state becomes leaves, the integers of a dropout's random
    state too: `equinox.filter_grad` differentiates such a denoiser, `jax.grad` refuses it.

    NNX group, batch and instance normalisation take axis 0 for the batch: on one example they are
    silently wrong.  Pass `batched=True` if the module contains one.
    """
    apply, params = nn.split(module, batched=batched)
    return NetworkDenoiser(params, schedule, apply=apply, prediction=prediction, shape=shape)


def from_linen(
    module: Any,
    params: Any,
    schedule: Schedule,
    *,
    prediction: Prediction = eps,
    shape: tuple[int, ...] | None = None,
    batched: bool = False,
) -> NetworkDenoiser:
    """A Flax Linen module and its variables as a denoiser; see `from_function`."""
    return NetworkDenoiser(
        params, schedule, apply=_Linen(module, batched), prediction=prediction, shape=shape
    )


def from_equinox(
    module: Any,
    schedule: Schedule,
    *,
    prediction: Prediction = eps,
    shape: tuple[int, ...] | None = None,
    batched: bool = False,
) -> NetworkDenoiser:
    """An Equinox module `module(x_t, t[, cond])` as a denoiser; see `from_function`."""
    params, static = eqx.partition(module, eqx.is_array)
    return NetworkDenoiser(
        params, schedule, apply=_Equinox(static, batched), prediction=prediction, shape=shape
    )


@dataclasses.dataclass(frozen=True)
class _Precondition:
    apply: Callable[..., Array]
    sigma_data: float

    def __call__(self, params: Any, x: Array, sigma: Array, *cond: Any) -> Array:
        total = jnp.sqrt(sigma**2 + self.sigma_data**2)
        c_skip = (self.sigma_data / total) ** 2
        c_out = sigma * self.sigma_data / total
        output = self.apply(params, x / total, jnp.log(sigma) / 4, *cond)
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


def is_guided(denoiser: Any) -> bool:
    """Whether a denoiser is `Guided`, or wraps one that is: no density's, then, in general.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> is_guided(Affine(Guided(near, far, 3.0), 0.0, 2.0)), is_guided(near)
    (True, False)
    """
    return bool(getattr(denoiser, "is_guided", False))


def trained_range(denoiser: Any) -> tuple[ArrayLike, ArrayLike] | None:
    """The least and the largest noise level at which a denoiser was trained, or None if unknown.

    >>> network = from_function(lambda x, t: x, EDM(), prediction=x0)
    >>> [float(sigma) for sigma in trained_range(Affine(network, 0.0, 2.0))]
    [0.0, 160.0]
    """
    return getattr(denoiser, "trained_range", None)


def outside_training(denoiser: Any, sigma: ArrayLike) -> Array:
    """1 where a noise level is outside the range of a denoiser's training, 0 inside or if unknown.

    >>> network = from_function(lambda x, t: x, EDM(t_max=80.0), prediction=x0)
    >>> outside_training(network, jnp.array([1.0, 100.0]))
    Array([0, 1], dtype=int32)
    """
    found, sigma = trained_range(denoiser), jnp.asarray(sigma)
    if found is None:
        return jnp.zeros(sigma.shape, int)
    # One part in a thousand: ends of the range that went through a time and back are inside.
    low, high = found
    return jnp.asarray((sigma < 0.999 * low) | (sigma > 1.001 * high), int)


@struct.dataclass
class Affine:
    """A denoiser of y seen in data units x = shift + scale * y.

    D(x; sigma) = shift + scale * D_y((x - shift) / scale; sigma / scale).  One positive number
    scales all coordinates, so that the noise stays isotropic; dimensions do not change.

    Attributes:
        inner: the denoiser in the units of y, in which the network was trained.
        shift: the origin of y in data units, a scalar or of the shape of a point.
        scale: data units per unit of y, a positive scalar.
    """

    inner: Any
    shift: ArrayLike = 0.0
    scale: ArrayLike = 1.0

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a point, if the inner denoiser says it."""
        return getattr(self.inner, "shape", None)

    @property
    def is_guided(self) -> bool:
        """Whether the inner denoiser is guided."""
        return is_guided(self.inner)

    @property
    def trained_range(self) -> tuple[ArrayLike, ArrayLike] | None:
        """The inner denoiser's, in data units."""
        found = trained_range(self.inner)
        return None if found is None else (found[0] * self.scale, found[1] * self.scale)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """The inner denoiser's answer, in data units."""
        if jnp.ndim(self.scale) != 0:
            raise ValueError(
                f"`Affine(scale=...)` has shape {jnp.shape(self.scale)}; one number scales all "
                "coordinates, or isotropic noise in y would not be isotropic in x."
            )
        dtype = jnp.result_type(x, float)
        shift, scale = jnp.asarray(self.shift, dtype), jnp.asarray(self.scale, dtype)
        return shift + scale * self.inner((x - shift) / scale, jnp.asarray(sigma, dtype) / scale)

    def condition(self, cond: Any) -> Affine:
        """Bind the condition in the inner denoiser."""
        return dataclasses.replace(self, inner=self.inner.condition(cond))


@struct.dataclass
class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, 2207.12598) as a denoiser.

    D = D_null + guidance_scale * (D_cond - D_null).  A scale of 0 is the unconditional model, 1
    the conditional one.  For other scales the result is, in general, no density's denoiser: its
    Jacobian need not be symmetric, and a dimension read from it is that of the guided field.

    Attributes:
        conditional: the denoiser with its condition bound.
        unconditional: the denoiser without, or with the null condition.
        guidance_scale: a scalar.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> Guided(near, far, 3.0)(jnp.ones(2), 0.5)
    Array([3., 3.], dtype=float32)
    """

    conditional: Any
    unconditional: Any
    guidance_scale: ArrayLike = 1.0

    @property
    def is_guided(self) -> bool:
        """True: a guided field is in general no density's."""
        return True

    @property
    def trained_range(self) -> tuple[ArrayLike, ArrayLike] | None:
        """That of the conditional denoiser."""
        return trained_range(self.conditional)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a point, if the conditional denoiser says it."""
        return getattr(self.conditional, "shape", None)

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """The guided combination of both answers."""
        null = self.unconditional(x, sigma)
        scale = jnp.asarray(self.guidance_scale, null.dtype)
        return null + scale * (self.conditional(x, sigma) - null)

    def condition(self, cond: Any) -> Guided:
        """Bind another condition; the unconditional branch stays."""
        return dataclasses.replace(self, conditional=self.conditional.condition(cond))
