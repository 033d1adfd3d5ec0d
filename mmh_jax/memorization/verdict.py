r"""The manifold memorization hypothesis as a test: is the model's dimension too small at x?

With LID_theta(x) the dimension of the manifold the model learned and LID_*(x) that of the manifold
the data came from (Ross et al., ICLR 2025, 2411.00113, definition 3.1),

    OD-Mem   LID_theta < LID_*                overfitting: the model lost dimensions the data have,
    DD-Mem   LID_theta = LID_*, both small    the data themselves have almost none at x,
    neither  otherwise.

Both sides are estimates.  z = (LID_theta - LID_*) / standard error says how many standard errors
apart they are; each variance is that at the other's value (`typing.variance_at`), since the error
of random probes grows with the dimension: a dimension too small by chance comes with an error bar
too small.  No dimension is known better than to the rounding error of a sum of D numbers.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp

from mmh_jax.typing import Array, variance_at

__all__ = ["Label", "Verdict", "verdict"]


class Label(enum.IntEnum):
    """What happened at a point; `Label(int(code)).title` reads a code."""

    UNDECIDED = -1
    NOT_MEMORIZED = 0
    OD_MEM = 1
    DD_MEM = 2

    @property
    def title(self) -> str:
        """The name used in text: `OD-Mem`, `DD-Mem`, `not memorized`, `undecided`."""
        names = {-1: "undecided", 0: "not memorized", 1: "OD-Mem", 2: "DD-Mem"}
        return names[self.value]


class Verdict(NamedTuple):
    """A `Label` as an integer array, and the z-score behind it (negative: LID_theta is smaller)."""

    label: Array
    z: Array


def verdict(
    lid_theta: Any, lid_star: Any, *, small: float = 0.5, z_critical: float = 1.96
) -> Verdict:
    """Classify points by the two dimensions.  Elementwise: any shape, `jit` and `vmap` included.

    Args:
        lid_theta: of the model: an `Estimate`, or whatever has `value`, `stderr` and perhaps
            `dispersion`: a trace, `lid.Flipd`, `lid.AtPlateau`.  Pass it whole: without its
            dispersion an estimate from random probes is called OD-Mem by chance too often.
        lid_star: of the data, likewise.
        small: a dimension at or below this is small.  The default means "rounds to zero: the point
            itself is all there is"; raise it to catch templates that keep a few degrees of freedom.
        z_critical: how many standard errors LID_theta must lie below LID_* for OD-Mem.  At 1.96 one
            point in forty is called so by chance when the two are equal; raise it for many points.

    Returns:
        `Verdict(label, z)`.  Two estimates without error are compared up to rounding, 100 units in
        the last place of the larger, or of 1.  A NaN anywhere gives `UNDECIDED`, never a silent
        "not memorized".

    >>> from mmh_jax.typing import Estimate
    >>> result = verdict(Estimate(0.2, 0.1), Estimate(1.0, 0.1))
    >>> Label(int(result.label)).title, round(float(result.z), 2)
    ('OD-Mem', -5.66)
    """
    theta, star = jnp.asarray(lid_theta.value, float), jnp.asarray(lid_star.value, float)
    difference = theta - star
    largest = jnp.maximum(jnp.maximum(jnp.abs(theta), jnp.abs(star)), 1)
    rounding = 100 * jnp.finfo(difference.dtype).eps * largest
    variance = variance_at(lid_theta, star) + variance_at(lid_star, theta) + rounding**2
    z = difference / jnp.sqrt(variance)
    # A dimension is an integer: where LID_* rounds to 0 there is none left for a model to lose.
    od_mem = (z < -z_critical) & (star > 0.5)
    dd_mem = (theta <= small) & (star <= small) & ~od_mem
    label = jnp.where(od_mem, Label.OD_MEM, jnp.where(dd_mem, Label.DD_MEM, Label.NOT_MEMORIZED))
    known = jnp.isfinite(theta) & jnp.isfinite(star) & ~jnp.isnan(z)
    return Verdict(jnp.where(known, label, Label.UNDECIDED), z)
