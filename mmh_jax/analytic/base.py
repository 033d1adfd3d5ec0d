r"""What the exact denoisers share: the interface, the check of arguments, norms, the support.

`lid` needs to know whether a point is on the support, which no finite precision can say.  The
default tolerance is sqrt(machine epsilon) (1 + |x|): wide enough for a point that was computed in
the dtype of x, narrow enough to exclude one moved by 0.1% of its norm in float32.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Distribution"]


def is_concrete(value: Any) -> bool:
    """Whether the numbers in `value` can be looked at (they cannot under `jit` and `vmap`)."""
    return not isinstance(value, Tracer)


def floating(name: str, value: ArrayLike, ndim: int, meaning: str) -> Array:
    """`value` as a floating array of `ndim` axes, or an error that calls it `name`."""
    array = jnp.asarray(value)
    # With its dtype made explicit, so that the dtype of results does not depend on the operation.
    array = array.astype(float if jnp.issubdtype(array.dtype, jnp.integer) else array.dtype)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}=...` has dtype {array.dtype}; it is {meaning}, of real numbers.")
    if array.ndim != ndim:
        raise ValueError(f"`{name}=...` has shape {array.shape}; it is {meaning}.")
    return array


def safe_sqrt(square: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def norm(x: Array) -> Array:
    """The Euclidean norm of all entries, with gradient 0 at 0."""
    return safe_sqrt(jnp.sum(x * x))


@struct.dataclass
class Distribution:
    """A distribution of clean points, as the exact denoiser of its noisy ones.

    Subclasses define `shape`, `__call__`, `log_density`, `flipd`, `sample`, `distance` and
    `_dimension`.  Arguments are checked, and made arrays, when a user constructs an instance; not
    again by `replace`, or when JAX rebuilds it from leaves that may be tracers or gradients.

    Attributes:
        checked: bookkeeping of that check; leave it alone.
    """

    # A static field is part of the tree structure, and so survives every flatten and unflatten.
    checked: bool = struct.field(pytree_node=False, default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.checked:
            for name, value in {**self._check(), "checked": True}.items():
                object.__setattr__(self, name, value)

    def _check(self) -> dict[str, Any]:
        """The fields to set after construction; raises if the arguments make no sense."""
        return {}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a point."""
        raise NotImplementedError

    @property
    def ambient_dim(self) -> int:
        """The number of coordinates of a point."""
        return int(np.prod(self.shape, dtype=int))

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """E[x0 | x0 + sigma * eps = x], of the shape of `x`."""
        raise NotImplementedError

    def log_density(self, x: Array, sigma: ArrayLike) -> Array:
        """log rho_sigma(x), the normalised log density of x0 + sigma * eps."""
        raise NotImplementedError

    def flipd(self, x: Array, sigma: ArrayLike) -> Array:
        """F(x; sigma) = E[|x - x0|^2 | x] / sigma^2, the closed form of FLIPD; no Jacobian."""
        raise NotImplementedError

    def sample(self, num: int, *, key: Key) -> Array:
        """`num` independent clean points, (num, *shape)."""
        raise NotImplementedError

    def distance(self, x: Array) -> Array:
        """The Euclidean distance from `x` to the support, in data units."""
        raise NotImplementedError

    def _dimension(self) -> float:
        """The dimension of the support, where that is one number."""
        raise NotImplementedError

    def lid(self, x: Array, *, tolerance: ArrayLike | None = None) -> Array:
        """The local intrinsic dimension at `x`: the limit of `flipd` as sigma -> 0.

        NaN where `x` is off the support: F diverges there, as distance^2 / sigma^2.

        Args:
            x: one point.
            tolerance: the distance to the support, in data units, up to which `x` counts as on it;
                by default sqrt(machine epsilon) * (1 + |x|).
        """
        x = self._point(x)
        on_support = self.distance(x) <= support_tolerance(x, tolerance)
        return jnp.where(on_support, self._dimension(), jnp.nan).astype(x.dtype)

    def _point(self, x: ArrayLike) -> Array:
        """`x` as an array, or an error that says why it is no point of this distribution."""
        x = jnp.asarray(x)
        name = type(self).__name__
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"`{name}` was given a point of dtype {x.dtype}; a point is in real data units. "
                "Convert it, for example `x.astype(float) / 255`."
            )
        if x.shape != self.shape:
            cure = "Did you mean `jax.vmap`?" if x.shape[1:] == self.shape else "Reshape it."
            raise ValueError(
                f"`{name}` was given a point of shape {x.shape}; its points have shape "
                f"{self.shape}. {cure}"
            )
        return x


def support_tolerance(x: Array, tolerance: ArrayLike | None) -> ArrayLike:
    """The distance up to which `x` counts as a point of the support."""
    if tolerance is not None:
        return tolerance
    return float(jnp.finfo(x.dtype).eps) ** 0.5 * (1 + norm(x))
