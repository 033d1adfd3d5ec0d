r"""The words the whole package shares: a denoiser, an estimate, and checks at the public boundary.

A **denoiser** answers with the posterior mean of a clean point, given a noisy one,

    D(x; sigma) = E[x0 | x0 + sigma * eps = x],        eps ~ N(0, I),

with `x` and `sigma` both in data units.  Tweedie's formula makes it the score of the smoothed
density rho_sigma = p * N(0, sigma^2 I):  grad log rho_sigma(x) = (D(x; sigma) - x) / sigma^2.
Everything in this package that looks at a model looks at it through this one function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

Scalar: TypeAlias = Float[Array, ""]
Point: TypeAlias = Float[Array, "*shape"]
Key: TypeAlias = PRNGKeyArray
Matvec: TypeAlias = Callable[[Array], Array]

__all__ = [
    "Array",
    "ArrayLike",
    "ChiSquareEstimate",
    "Denoiser",
    "Estimate",
    "Key",
    "Matvec",
    "Point",
    "Scalar",
    "check_answer",
    "check_key",
    "check_level",
    "check_point",
    "interval",
    "is_traced",
    "variance_at",
]


@runtime_checkable
class Denoiser(Protocol):
    """A pytree called with one point and one noise level; it returns E[x0 | x].

    `x` is a single example of any shape, `sigma` a scalar; the result has the shape of `x`.
    A denoiser may carry a static attribute `shape`; the estimators check `x` against it.
    """

    def __call__(self, x: Array, sigma: ArrayLike, /) -> Array:
        """E[x0 | x0 + sigma * eps = x]."""
        ...


class Estimate(NamedTuple):
    """A number and its standard error (0 where the method is deterministic).

    >>> Estimate(value=2.0, stderr=0.1)
    Estimate(value=2.0, stderr=0.1)
    """

    value: Any
    stderr: Any


class ChiSquareEstimate(NamedTuple):
    """An estimate with the error of a sum of squares, which grows with what it estimates.

    Attributes:
        value: the number.
        stderr: its standard error, were the value the true one.
        dispersion: how much its variance grows for each unit by which the truth is larger: for d
            squares of standard normal numbers, averaged over K draws, 2 / K.
    """

    value: Any
    stderr: Any
    dispersion: Any = 0


def variance_at(estimate: Any, truth: ArrayLike) -> Array:
    """stderr^2 + dispersion (truth - value): the variance of an estimate if `truth` is true.

    `estimate` has `value`, `stderr` and perhaps `dispersion`, 0 if not.
    """
    growth = jnp.asarray(getattr(estimate, "dispersion", 0), float) * (truth - estimate.value)
    return jnp.maximum(jnp.asarray(estimate.stderr, float) ** 2 + growth, 0)


def interval(estimate: Any, z: float = 1.96) -> tuple[Array, Array]:
    """The score interval: the true values from which an estimate is z standard errors or less.

    All t with (value - t)^2 <= z^2 `variance_at(estimate, t)`: value +- z stderr for an `Estimate`.
    With a dispersion it reaches farther up than down, as the error of a sum of squares does: for a
    mean of chi-square numbers it covers 95 to 96%, and the truth is rarely above it.

    >>> [round(float(end), 2) for end in interval(ChiSquareEstimate(1.0, 0.5, 0.25))]
    [0.39, 2.57]
    """
    shift = z**2 * jnp.asarray(getattr(estimate, "dispersion", 0), float) / 2
    half = jnp.hypot(shift, z * jnp.asarray(estimate.stderr, float))
    return estimate.value + shift - half, estimate.value + shift + half


def is_traced(value: Any) -> bool:
    """Whether any leaf has no value yet: inside `jit`, `vmap` or a derivative."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def check_point(
    caller: str, denoiser: Any, x: ArrayLike, sigma: ArrayLike, *, levels: int = 0
) -> tuple[Array, Array]:
    """Return `(x, sigma)` as floating arrays, or say which of them is wrong and what to do.

    Traced values cannot be looked at, so of an argument of `jit` or `vmap` only shape and dtype are
    checked.

    Args:
        caller: the function whose arguments they are.
        denoiser: the model.
        x: one point.
        sigma: one noise level, or several.
        levels: the number of axes `sigma` is to have, 0 or 1.

    Raises:
        TypeError: if `x` is not of a floating dtype.
        ValueError: if `x` has not the denoiser's shape, or `sigma` is not positive and finite, or
            not one number (a vector, for `levels=1`).
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(x=...)` has dtype {x.dtype}; a point is in real data units. "
            "Convert it, for example `x.astype(float) / 255`."
        )
    shape = getattr(denoiser, "shape", None)
    if shape is not None and x.shape != tuple(shape):
        many = x.shape[1:] == tuple(shape)
        cure = "Did you mean `jax.vmap`?" if many else "Pass one point of that shape."
        raise ValueError(
            f"`{caller}(x=...)` has shape {x.shape}; this denoiser takes {tuple(shape)}. {cure}"
        )
    sigma = check_level(caller, sigma, x.dtype)
    if sigma.ndim != levels:
        name, what = (
            ("sigmas", "a vector of noise levels") if levels else ("sigma", "one noise level")
        )
        cure = "" if levels else " For several, `jax.vmap`, or a curve."
        raise ValueError(f"`{caller}({name}=...)` has shape {sigma.shape}; it takes {what}.{cure}")
    return x, sigma


def check_answer(caller: str, denoised: Array, x: Array) -> None:
    """Refuse a denoiser's answer that has not the shape of the point: it would broadcast.

    Raises:
        ValueError: if the shapes differ.
    """
    if denoised.shape != x.shape:
        raise ValueError(
            f"`{caller}(denoiser=...)` returns shape {denoised.shape} for a point of shape "
            f"{x.shape}; a denoiser's answer is a point like x."
        )


def check_level(caller: str, sigma: ArrayLike, dtype: Any) -> Array:
    """Return noise levels as an array of `dtype`, or say that one is not positive and finite.

    Raises:
        ValueError: if a concrete level is not a finite positive number.
    """
    if not is_traced(sigma):  # looked at before JAX does: inside `jit` it would become a tracer
        values = np.asarray(sigma).astype(dtype)
        if not (np.all(np.isfinite(values)) and np.all(values > 0)):
            raise ValueError(
                f"`{caller}(sigma=...)` is {values}; a noise level is a finite positive number "
                "in data units."
            )
    return jnp.asarray(sigma, dtype)


def check_key(
    caller: str,
    key: Key | None,
    *,
    otherwise: str = ", or choose `trace=linalg.exact()`, which draws nothing",
) -> Key:
    """Return `key`, or say that this randomised method needs one, and what does not.

    Raises:
        TypeError: if `key` is None or not a typed key.
    """
    if key is None:
        raise TypeError(
            f"`{caller}` is stochastic and needs a key: pass `key=jax.random.key(0)`{otherwise}."
        )
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"`{caller}(key=...)` is not a typed key; make one with `jax.random.key(seed)`."
        )
    return key
