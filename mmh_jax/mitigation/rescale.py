r"""Guidance that keeps to what is usual: its answer rescaled, its steps no longer than normal ones.

Guidance with a large scale drives the denoised image beyond the range of images.  Rescaled (Lin et
al. 2023, 2305.08891, section 3.4), with D the guided and D_c the conditional answer,

    D_r = D std(D_c) / std(D),         D'  =  amount D_r + (1 - amount) D,

std over all entries of one point.  There it is the network's output that is rescaled, here, for
every parametrisation, the denoised point.

Runs that memorize take steps larger than normal ones (see `memorization.step_stability`).  A
clamped step from x to x' of size r = |x' - x| becomes, with the mean m and the standard deviation v
of the sizes of the same step of normal runs,

    x + min(1, (m + limit v) / r) (x' - x),

which is ours.  It is a step that keeps noise that the next level says is gone; where many are
clamped, samples end with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.denoise import Guided, trained_range
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.memorization import StepReference
from mmh_jax.memorization.conditional import norm
from mmh_jax.sample import Advance, Step
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, is_traced

__all__ = ["Rescaled", "clamped"]


@struct.dataclass
class Rescaled:
    """A guided denoiser whose answer has the standard deviation of the conditional one.

    At noise levels outside the interval of the guided one nothing is rescaled: guidance that has
    not begun (`high=`, `outside=0.0`) is to know nothing of the condition.

    Attributes:
        guided: a `denoise.Guided`, in units in which 0 is the mean of the data: rescaling is
            about 0, as in the paper.  For others, rescale inside a `denoise.Affine`.
        amount: 0 for the guided answer, 1 for the rescaled one, 0.7 in the paper.

    Cost: 2 evaluations, as the guided one.

    Raises:
        TypeError: when called, if `guided` is no `denoise.Guided`.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> Rescaled(Guided(near, far, 3.0), 1.0)(jnp.array([1.0, -1.0]), 0.5)
    Array([ 1., -1.], dtype=float32)
    >>> Rescaled(Guided(near, far, 3.0), 0.5)(jnp.array([1.0, -1.0]), 0.5)
    Array([ 2., -2.], dtype=float32)
    """

    guided: Guided
    amount: ArrayLike = 0.7

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a point, if the guided denoiser says it."""
        return self.guided.shape

    @property
    def is_guided(self) -> bool:
        """True: in general no density's denoiser."""
        return True

    @property
    def trained_range(self) -> tuple[ArrayLike, ArrayLike] | None:
        """That of the guided denoiser."""
        return trained_range(self.guided)

    def condition(self, cond: Any) -> Rescaled:
        """Bind another condition in the guided denoiser."""
        return dataclasses.replace(self, guided=self.guided.condition(cond))

    def __call__(self, x: Array, sigma: ArrayLike) -> Array:
        """The guided answer, rescaled."""
        if not isinstance(self.guided, Guided):
            raise TypeError(
                f"`Rescaled(guided=...)` is a {type(self.guided).__name__}; pass a "
                "`denoise.Guided`, whose conditional answer sets the scale. Wrap others around it."
            )
        conditional = self.guided.conditional(x, sigma)
        # Asked once: the guided one is given the answer.
        known = dataclasses.replace(self.guided, conditional=lambda x, sigma: conditional)
        answer = known(x, sigma)
        spread = _std(answer)
        ratio = jnp.where(spread == 0, 1, _std(conditional) / jnp.where(spread == 0, 1, spread))
        inside = (jnp.asarray(self.guided.low) <= sigma) & (sigma <= jnp.asarray(self.guided.high))
        amount = jnp.where(inside, self.amount, 0)
        return (amount * ratio + (1 - amount)).astype(answer.dtype) * answer


def _std(x: Array) -> Array:
    """Over all entries, with derivative 0 where they are equal."""
    return safe_sqrt(jnp.mean((x - jnp.mean(x)) ** 2))


@struct.dataclass
class _Clamped:
    reference: StepReference
    limit: ArrayLike
    step: Any = struct.field(pytree_node=False)

    @property
    def is_stochastic(self) -> bool:
        return self.step.is_stochastic

    @property
    def evaluations(self) -> int:
        return self.step.evaluations

    def start(self, x: Array) -> tuple[Any, Array]:
        # A reference is by the number of the step.
        return self.step.start(x), jnp.zeros((), int)

    def __call__(
        self, denoiser: Denoiser, x: Array, sigma: Array, sigma_next: Array,
        memory: tuple[Any, Array], *, key: Key | None,
    ) -> Advance:  # fmt: skip
        inner, number = memory
        moved = self.step(denoiser, x, sigma, sigma_next, inner, key=key)
        mean, std = (
            jnp.asarray(each, x.dtype).at[number].get(mode="fill", fill_value=jnp.nan)
            for each in self.reference
        )
        limit = jnp.asarray(self.limit, x.dtype)
        # Infinite, not NaN, where an infinite limit meets a step that never varies.
        allowed = jnp.maximum(mean + jnp.where(jnp.isinf(limit), limit, limit * std), 0)
        size = norm(moved.x - x)
        ratio = allowed / jnp.where(size == 0, 1, size)
        # Beyond the reference it is NaN, and so is the point; a step of size 0 stays.
        is_usual = (size <= allowed) | ((size == 0) & ~jnp.isnan(allowed))
        ahead = jnp.where(is_usual, moved.x, x + ratio * (moved.x - x))
        return moved._replace(x=ahead, memory=(moved.memory, number + 1))


def clamped(step: Step, reference: StepReference, limit: ArrayLike) -> Step:
    """A step that is no longer than normal ones by more than `limit` standard deviations.

    Args:
        step: `sample.heun()`, `sample.ddim()`, or any other; one without churn, whose raised states
            a path shows, so that sizes of its steps are others.
        reference: of `memorization.step_reference`, of normal runs of the same sampler on the same
            noise levels: the sizes are by the number of the step, and a run of more steps becomes
            NaN.
        limit: in standard deviations; infinite for the step as it is.

    Returns:
        A `Step` for `sample.solve`.  What it remembers is what `step` does, and its number.

    Cost: that of `step`.

    Raises:
        ValueError: for a reference that is not two vectors of one length, finite and not negative,
            or a limit that is not a number.

    >>> from mmh_jax import sample
    >>> usual = StepReference(jnp.array([1.0, 1.0]), jnp.array([0.5, 0.5]))
    >>> step = clamped(sample.ddim(), usual, 2.0)
    >>> levels, start = jnp.array([8.0, 4.0, 2.0]), jnp.array([8.0])
    >>> path = sample.solve_path(lambda x, sigma: 0 * x, start, levels, step=step)
    >>> path.states[:, 0]                              # to 6, not to 4
    Array([8., 6., 4.], dtype=float32)
    """
    mean, std = jnp.asarray(reference.mean), jnp.asarray(reference.std)
    if mean.ndim != 1 or mean.shape != std.shape:
        raise ValueError(
            f"`clamped(reference=...)` has shapes {mean.shape} and {std.shape}; it is (S - 1,) "
            "means and standard deviations, of `memorization.step_reference`."
        )
    for name, values in {"mean": mean, "std": std}.items():
        if not is_traced(values) and not np.all(np.isfinite(values) & (np.asarray(values) >= 0)):
            raise ValueError(
                f"`clamped(reference=...)` has a {name} that is negative or not finite; take it of "
                "at least 2 runs that did not fail."
            )
    if jnp.ndim(limit) != 0 or (not is_traced(limit) and np.isnan(np.asarray(limit))):
        raise ValueError(f"`clamped(limit={limit})` is one number of standard deviations.")
    return _Clamped(StepReference(mean, std), limit, step)
