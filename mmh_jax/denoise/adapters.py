"""Functions and modules of Flax NNX, Flax Linen and Equinox as denoisers.

Each `apply` below, like `nn.Apply`, is a frozen dataclass, so that wrapping the same model twice
gives equal static fields and `jax.jit` does not compile twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
from flax import nnx

from mmh_jax import nn
from mmh_jax.denoise.network import NetworkDenoiser, Prediction, eps
from mmh_jax.nn.functional import one_example
from mmh_jax.noise import Schedule
from mmh_jax.typing import Array

__all__ = ["from_equinox", "from_function", "from_linen", "from_nnx"]


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

    >>> import jax.numpy as jnp
    >>> from mmh_jax import denoise, noise
    >>> standard_normal = from_function(lambda x_t, t: -x_t, noise.VP(), prediction=denoise.score)
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
