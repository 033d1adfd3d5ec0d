"""Denoisers made of denoisers: in other units, or guided; and what is known of any of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from mmh_jax.typing import Array, ArrayLike

__all__ = ["Affine", "Guided", "features", "is_guided", "outside_training", "trained_range"]


def features(denoiser: Any, x: Array, sigma: ArrayLike) -> tuple[Array, Any]:
    """A denoiser's answer at one point, and what its network computed inside.

    For a network that shows its features (`nn.UNet`, `nn.DiT`), whatever schedule, preconditioning
    and units it is wrapped in.  The first of the two is `denoiser(x, sigma)`.

    Args:
        denoiser: a network as a denoiser, or any object with a method `features(x, sigma)`.
        x: one point, in data units.
        sigma: its noise level.

    Returns:
        `(denoised, inside)`, `inside` as of `nn.features`.

    Cost: 1 evaluation for both.

    Raises:
        TypeError: if the denoiser, or the network inside, has no features to show.  A guided one
            has two networks: ask one of them.

    >>> from flax import nnx
    >>> from mmh_jax import denoise, nn, noise
    >>> network = nn.UNet((8, 8), width=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
    >>> denoised, inside = features(denoise.from_nnx(network, noise.VP()), jnp.ones((8, 8)), 0.1)
    >>> denoised.shape, inside.bottleneck.shape
    ((8, 8), (4, 4, 16))
    """
    read = getattr(denoiser, "features", None)
    if read is None:
        cure = "; ask its `conditional` or `unconditional`" if is_guided(denoiser) else ""
        if hasattr(denoiser, "inner"):
            cure = "; ask its `inner`"
        raise TypeError(
            f"`features(denoiser=...)` is a {type(denoiser).__name__}, which shows no features"
            f"{cure}. A `NetworkDenoiser` of a `nn.UNet` or `nn.DiT` does."
        )
    return read(x, sigma)


def is_guided(denoiser: Any) -> bool:
    """Whether a denoiser is `Guided`, or wraps one that is: no density's, then, in general.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> is_guided(Affine(Guided(near, far, 3.0), 0.0, 2.0)), is_guided(near)
    (True, False)
    """
    return bool(getattr(denoiser, "is_guided", False))


def trained_range(denoiser: Any) -> tuple[ArrayLike, ArrayLike] | None:
    """The least and the largest noise level at which a denoiser was trained, or None if unknown.

    >>> from mmh_jax import denoise, noise
    >>> network = denoise.from_function(lambda x, t: x, noise.EDM(), prediction=denoise.x0)
    >>> [float(sigma) for sigma in trained_range(Affine(network, 0.0, 2.0))]
    [0.0, 160.0]
    """
    return getattr(denoiser, "trained_range", None)


def outside_training(denoiser: Any, sigma: ArrayLike) -> Array:
    """1 where a noise level is outside the range of a denoiser's training, 0 inside or if unknown.

    >>> from mmh_jax import denoise, noise
    >>> network = denoise.from_function(lambda x, t: x, noise.EDM(), prediction=denoise.x0)
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
        shift, scale, inputs = self._units(x, sigma)
        return shift + scale * self.inner(*inputs)

    def features(self, x: Array, sigma: ArrayLike) -> tuple[Array, Any]:
        """The same, and what the inner denoiser's network computed; see `denoise.features`."""
        shift, scale, inputs = self._units(x, sigma)
        denoised, inside = features(self.inner, *inputs)
        return shift + scale * denoised, inside

    def _units(self, x: Array, sigma: ArrayLike) -> tuple[Array, Array, tuple[Array, Array]]:
        """Shift and scale, and x and sigma in the units of y."""
        if jnp.ndim(self.scale) != 0:
            raise ValueError(
                f"`Affine(scale=...)` has shape {jnp.shape(self.scale)}; one number scales all "
                "coordinates, or isotropic noise in y would not be isotropic in x."
            )
        dtype = jnp.result_type(x, float)
        shift, scale = jnp.asarray(self.shift, dtype), jnp.asarray(self.scale, dtype)
        return shift, scale, ((x - shift) / scale, jnp.asarray(sigma, dtype) / scale)

    def condition(self, cond: Any) -> Affine:
        """Bind the condition in the inner denoiser."""
        return dataclasses.replace(self, inner=self.inner.condition(cond))


def check_interval(name: str, low: ArrayLike, high: ArrayLike) -> None:
    """Raise ValueError for two numbers between which there is none; traced ones are not known."""
    if isinstance(low, Tracer) or isinstance(high, Tracer):
        return
    ends = np.asarray(low), np.asarray(high)
    # A stack of guidances, or a tree of axes for `vmap`, has no two numbers here.
    if all(end.ndim == 0 and end.dtype != object for end in ends) and not ends[0] <= ends[1]:
        raise ValueError(
            f"`{name}(low={ends[0]:g}, high={ends[1]:g})` acts at no noise level; `low` must be at "
            "most `high`. Were the two exchanged?"
        )


@struct.dataclass
class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, 2207.12598) as a denoiser.

    D = D_null + guidance_scale * (D_cond - D_null).  A scale of 0 is the unconditional model, 1
    the conditional one.  For other scales the result is, in general, no density's denoiser: its
    Jacobian need not be symmetric, and a dimension read from it is that of the guided field.

    At noise levels not between `low` and `high` the scale is `outside`.  Guidance in a limited
    interval (Kynkaanniemi et al. 2024, 2404.07724) has an `outside` of 1; guidance that starts late
    (Jain et al. 2025), so that a memorized condition cannot draw samples to its image while they
    are mostly noise, has a `high` and an `outside` of 0.

    Attributes:
        conditional: the denoiser with its condition bound.
        unconditional: the denoiser without, or with the null condition.
        guidance_scale: a scalar.
        low, high: noise levels, in data units, between which it is the scale.
        outside: the scale elsewhere.
        checked: bookkeeping of the check of `low` and `high`; leave it alone.

    Cost: 2 evaluations, outside the interval, too.

    Raises:
        ValueError: if `low` is above `high`, unless one of them is traced.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> Guided(near, far, 3.0)(jnp.ones(2), 0.5)
    Array([3., 3.], dtype=float32)
    >>> Guided(near, far, 3.0, high=0.4, outside=0.0)(jnp.ones(2), 0.5)
    Array([0., 0.], dtype=float32)
    """

    conditional: Any
    unconditional: Any
    guidance_scale: ArrayLike = 1.0
    low: ArrayLike = 0.0
    high: ArrayLike = float("inf")
    outside: ArrayLike = 1.0
    # Static, so that it survives when JAX rebuilds the tree of gradients or tangents.
    checked: bool = struct.field(pytree_node=False, default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.checked:
            check_interval("Guided", self.low, self.high)
            object.__setattr__(self, "checked", True)

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
        inside = (jnp.asarray(self.low) <= sigma) & (sigma <= jnp.asarray(self.high))
        scale = jnp.where(inside, self.guidance_scale, self.outside).astype(null.dtype)
        return null + scale * (self.conditional(x, sigma) - null)

    def condition(self, cond: Any) -> Guided:
        """Bind another condition; the unconditional branch stays."""
        return dataclasses.replace(self, conditional=self.conditional.condition(cond))
