r"""What a sampler is steered by: a dimension on the way, low where a copy is being made.

At a state x of noise level sigma a *measure* is one number:

    JacobianTrace   tr dD/dx = E[|x0 - D|^2 | x] / sigma^2, the dimension as it is seen from x, by
                    how far the posterior of x0 has collapsed;
    DenoisedLid     log E_z |D(y + s z; s) - y|^2 / s^2 at the denoised point y = D(x; sigma), the
                    dimension by the denoising loss (Yeats et al. 2025, 2510.12975) at a noise level
                    s of its own; with a baseline model the logarithm of the ratio to the same of
                    that model, LID_theta / LID_* on the way.  The loss is small where y comes back;
                    the spread of what comes back, E_z |D - E D|^2 / s^2, where it is one point.
                    Their geometric mean asks for both, from the same evaluations.

On its way to *any* sample the posterior of a model that was trained on few points collapses, and
the trace does not tell the way to a copy from the way to something new; the neighbourhood of the
denoised point does, from where the copy is decided.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from mmh_jax import lid, linalg
from mmh_jax.linalg.operator import products_of
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key

__all__ = ["DenoisedLid", "JacobianTrace", "Measure"]


class Measure(Protocol):
    """A number of a denoiser at one state, smaller = more memorized."""

    def evaluations(self, size: int) -> float:
        """Of denoisers, at a point of `size` coordinates; a product with a Jacobian is one."""
        ...

    def __call__(self, denoiser: Denoiser, x: Array, sigma: ArrayLike) -> Array:
        """The measure at a state x of noise level sigma."""
        ...

    def condition(self, cond: Any) -> Measure:
        """The same, of a model to which a condition is bound."""
        ...


@struct.dataclass
class JacobianTrace:
    """tr dD/dx at the state itself.

    Attributes:
        key: of a stochastic trace, the same probes at every point and level, so that the field is
            smooth.
        trace: how to take it.

    Cost: 1 evaluation and the products of the trace; an exact one has as many as coordinates.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> JacobianTrace()(line, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """

    key: Key | None = None
    trace: linalg.Trace = struct.field(pytree_node=False, default=linalg.exact(), kw_only=True)

    def evaluations(self, size: int) -> float:
        """1 and the products."""
        return 1 + products_of(self.trace, size)

    def __call__(self, denoiser: Denoiser, x: Array, sigma: ArrayLike) -> Array:
        """The trace."""
        _, matvec = jax.linearize(lambda point: denoiser(point, sigma), x)
        return self.trace(matvec, x, key=self.key).value

    def condition(self, cond: Any) -> JacobianTrace:
        """Itself: it knows no model but the one it is given."""
        del cond
        return self


@struct.dataclass
class DenoisedLid:
    """The logarithm of the denoising-loss dimension at the denoised point.

    Attributes:
        sigma: s, the noise level at which the point is looked at, in data units: about half of the
            spread of the data, or of the distance between what counts as different.
        key: draws the noise, the same at every point and level.
        baseline: a model that has not memorized (an early checkpoint, a twin trained on other
            data), or None.
        num_samples: K draws of noise.
        spread: whether the geometric mean of loss and spread takes the place of the loss; K is then
            2 at least.  With 32 draws at .4 spreads of the data, and a baseline, it tells finished
            copies from other samples far better than the loss; on the way, where gradients are
            taken, the loss with few draws is cheaper.

    Cost: 1 + K evaluations, and K of the baseline.  Bias: of the dimension, as `denoising_loss`
    without extrapolation, larger the larger s is; the ratio has it above and below.  As all points
    have the same K draws, the value depends on the direction of the tangent space: in two or three
    coordinates take many draws, or a whole arc of a circle looks low.

    >>> line = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> measure = DenoisedLid(0.1, jax.random.key(0), num_samples=4096)
    >>> bool(abs(measure(line, jnp.ones(3), 1.0)) < 0.1)           # log 1
    True
    >>> twice = DenoisedLid(0.1, jax.random.key(0), lambda x, sigma: x * jnp.array([1.0, 1.0, 0.0]))
    >>> bool(twice(line, jnp.ones(3), 1.0) < 0)
    True
    """

    sigma: ArrayLike
    key: Key
    baseline: Any = None
    num_samples: int = struct.field(pytree_node=False, default=4, kw_only=True)
    spread: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def evaluations(self, size: int) -> float:
        """1 + K, and K of the baseline."""
        del size
        return 1 + self.num_samples * (1 if self.baseline is None else 2)

    def __call__(self, denoiser: Denoiser, x: Array, sigma: ArrayLike) -> Array:
        """The logarithm of the dimension, or of the ratio."""
        y = denoiser(x, sigma)
        found = self._log_lid(denoiser, y)
        return found if self.baseline is None else found - self._log_lid(self.baseline, y)

    def _log_lid(self, denoiser: Denoiser, y: Array) -> Array:
        draws = {"key": self.key, "num_samples": self.num_samples}
        if not self.spread:
            return _log(lid.denoising_loss(denoiser, y, self.sigma, ratio=None, **draws).value)
        parts = lid.denoised_return(denoiser, y, self.sigma, **draws)
        return sum(_log(part.value) for part in parts) / 2  # pyright: ignore

    def condition(self, cond: Any) -> DenoisedLid:
        """With the condition bound in the baseline, too."""
        if self.baseline is None:
            return self
        return dataclasses.replace(self, baseline=self.baseline.condition(cond))


def _log(value: Array) -> Array:
    """The logarithm, from a floor on.

    A model that gives back one point whatever it is given: -inf has no derivative, and that of the
    logarithm of a rounding error is huge.
    """
    return jnp.log(jnp.maximum(value, jnp.finfo(value.dtype).eps ** 2))
