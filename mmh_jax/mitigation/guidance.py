r"""LID guidance: a denoiser that steers samples away from low dimensions.

On the way to a point that a model has memorized a dimension d(x; sigma), the *measure*, falls below
what is usual there (`JacobianTrace`, `DenoisedLid`).  Guidance multiplies the density at each noise
level by a weight that is 1 where d is usual,

    log w(x; sigma) = -strength/2 * max(0, target(sigma) - d(x; sigma))^2,

so that the score gains grad log w, and the denoiser sigma^2 grad log w.  Two things keep it from
making pictures of noise, which have the largest dimension of all: beyond the target nothing acts;
and the step is projected by the Jacobian onto the directions that the model itself allows, J grad,
and cut to a share of the denoising step |x - D|.

The target is a low quantile of d at the same noise level on the way to samples that are not copies
(`reference_target`): at each level about that share of them is disturbed, too, and along the whole
way more, since those that are low at one level need not be those that are low at another.

The potential and the projection are ours; what to steer by is the open question of Ross et al.
(2025, 2411.00113, section 5).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.denoise import trained_range
from mmh_jax.denoise.combine import check_interval
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.mitigation.measure import JacobianTrace
from mmh_jax.typing import Array, ArrayLike

__all__ = ["LidGuided", "Target", "reference_target"]


@struct.dataclass
class Target:
    """The least usual dimension by noise level, linear in log sigma between levels.

    Attributes:
        sigmas: (S,) noise levels in data units, increasing or decreasing.
        values: (S,) dimensions.

    >>> Target(jnp.array([0.1, 10.0]), jnp.array([2.0, 0.0]))(1.0).round(4)
    Array(1., dtype=float32)
    """

    sigmas: Array
    values: Array

    def __call__(self, sigma: ArrayLike) -> Array:
        """The target at a noise level; beyond the first and the last level theirs."""
        levels, values = jnp.log(self.sigmas), self.values
        order = jnp.argsort(levels)
        return jnp.interp(jnp.log(jnp.asarray(sigma)), levels[order], values[order])


def reference_target(sigmas: ArrayLike, dimensions: ArrayLike, *, quantile: float = 0.1) -> Target:
    """The conformal lower quantile of d over runs of the sampler that ended in no copy.

    With N runs it is the floor(quantile (N + 1))-th smallest at each level: a further run, if it is
    exchangeable with these, is below it with a probability of at most `quantile` at each level.

    Args:
        sigmas: (S,) noise levels.
        dimensions: (N, S) d at the states of each run, by the measure that will guide, with the
            same key: only then are the numbers exchangeable.
        quantile: at least 1 / (N + 1).

    Raises:
        ValueError: if shapes disagree, a dimension is not finite, or there are too few runs.

    >>> reference_target([1.0, 0.1], np.arange(18.0).reshape(9, 2), quantile=0.2).values
    Array([2., 3.], dtype=float32)
    """
    levels, values = np.asarray(sigmas, float), np.asarray(dimensions, float)
    if levels.ndim != 1 or values.ndim != 2 or values.shape[1] != len(levels):
        raise ValueError(
            f"`reference_target(sigmas=..., dimensions=...)` have shapes {levels.shape} and "
            f"{values.shape}; pass (S,) levels and (N, S) dimensions."
        )
    if not np.isfinite(values).all():
        raise ValueError("`reference_target(dimensions=...)` has a value that is not finite.")
    if not (np.all(levels > 0) and len(np.unique(levels)) == len(levels) and 0 < quantile < 1):
        raise ValueError(
            f"`reference_target(sigmas=..., quantile={quantile})` takes different positive noise "
            "levels, and a quantile between 0 and 1."
        )
    place = int(np.floor(quantile * (len(values) + 1) + 1e-9))
    if not 1 <= place <= len(values):
        raise ValueError(
            f"`reference_target(quantile={quantile})` is at least 1 / (N + 1), below 1; "
            f"there are {len(values)} runs."
        )
    return Target(
        jnp.asarray(levels, jnp.float32),
        jnp.asarray(np.sort(values, axis=0)[place - 1], jnp.float32),
    )


@struct.dataclass
class LidGuided:
    """A denoiser that moves away from where the dimension is below a target.

    Attributes:
        inner: the denoiser, a guided one too.
        target: a `Target`, or any pytree called with a noise level.
        measure: d, called as `measure(inner, x, sigma)`.
        strength: of the potential; with a small `trust` mostly of no matter.
        trust: the largest step, as a share of |x - D|.
        low, high: noise levels, in data units, between which it acts.
        tangential: whether the step is projected by the Jacobian.
        checked: bookkeeping of the check of `low` and `high`; leave it alone.

    Cost: with one noise level for all points at once, as in `sample.solve`, 1 evaluation outside
    the interval; under a `vmap` over levels both branches are computed.  In it, with a measure of K
    evaluations, about 3 K + 2: the gradient is a reverse pass over it, and above the target, too;
    `sample_selected(again=)` pays for it only at samples that need it.  Bias: noise in the measure
    makes it act above the target, too.

    Raises:
        ValueError: if `low` is above `high`, unless one of them is traced.

    >>> narrow = lambda x, sigma: x / (1 + sigma**2) * jnp.where(jnp.sum(x**2) > 1, 1.0, 0.1)
    >>> usual = Target(jnp.array([0.1, 1.0]), jnp.array([0.0, 0.0]))
    >>> x = jnp.array([0.5, 0.0])
    >>> bool(jnp.all(LidGuided(narrow, usual)(x, 0.5) == narrow(x, 0.5)))
    True
    >>> pair = lambda x, sigma: jnp.tanh(x / sigma**2)           # two atoms, at -1 and 1
    >>> usual = Target(jnp.array([0.1, 1.0]), jnp.array([1.0, 1.0]))
    >>> x = jnp.array([0.5])
    >>> bool(abs(LidGuided(pair, usual)(x, 0.6)[0]) < abs(pair(x, 0.6)[0]))
    True
    """

    inner: Any
    target: Any
    measure: Any = JacobianTrace()
    strength: ArrayLike = 1.0
    trust: ArrayLike = 0.3
    low: ArrayLike = 0.0
    high: ArrayLike = float("inf")
    tangential: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    # Static, so that it survives when JAX rebuilds the tree of gradients or tangents.
    checked: bool = struct.field(pytree_node=False, default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.checked:
            check_interval("LidGuided", self.low, self.high)
            object.__setattr__(self, "checked", True)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a point, if the inner denoiser says it."""
        return getattr(self.inner, "shape", None)

    @property
    def is_guided(self) -> bool:
        """True: in general no density's denoiser."""
        return True

    @property
    def trained_range(self) -> tuple[ArrayLike, ArrayLike] | None:
        """That of the inner denoiser."""
        return trained_range(self.inner)

    def condition(self, cond: Any) -> LidGuided:
        """Bind the condition in the inner denoiser, and in the measure's baseline if it has one."""
        inner, measure = self.inner.condition(cond), self.measure.condition(cond)
        return dataclasses.replace(self, inner=inner, measure=measure)

    def log_weight(self, x: Array, sigma: ArrayLike) -> Array:
        """log w(x; sigma), 0 where d is usual."""
        lack = jnp.maximum(self.target(sigma) - self.measure(self.inner, x, sigma), 0)
        return -jnp.asarray(self.strength) / 2 * lack**2

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """The inner denoiser's answer, and the step away from low dimensions."""
        x = jnp.asarray(x, jnp.result_type(x, float))
        sigma = jnp.asarray(sigma, x.dtype)
        inside = (jnp.asarray(self.low) <= sigma) & (sigma <= jnp.asarray(self.high))
        return jax.lax.cond(inside, lambda: self._steered(x, sigma), lambda: self.inner(x, sigma))

    def _steered(self, x: Array, sigma: Array) -> Array:
        step = sigma**2 * jax.grad(self.log_weight)(x, sigma)
        denoised, matvec = jax.linearize(lambda point: self.inner(point, sigma), x)
        if self.tangential:
            step = matvec(step)
        # Roots with derivative 0 at 0: a step of length 0 is none, and may be differentiated.
        length = safe_sqrt(jnp.sum(step**2))
        limit = self.trust * safe_sqrt(jnp.sum((x - denoised) ** 2))
        share = jnp.where(length > limit, limit / jnp.where(length > limit, length, 1), 1)
        return denoised + share.astype(x.dtype) * step
