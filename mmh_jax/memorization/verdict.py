r"""The manifold memorization hypothesis as a test: is the model's dimension too small at x?

With LID_theta(x) the dimension of the manifold the model learned and LID_*(x) that of the manifold
the data came from (Ross et al., ICLR 2025, 2411.00113, definition 3.1),

    OD-Mem   LID_theta < LID_*                overfitting: the model lost dimensions the data have,
    DD-Mem   LID_theta = LID_*, both small    the data themselves have almost none at x,
    neither  otherwise.

Both sides are estimates.  z = (LID_theta - LID_*) / sqrt(stderr_theta^2 + stderr_*^2) says how many
standard errors apart they are.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax.numpy as jnp

from mmh_jax.typing import Array, Estimate

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
    lid_theta: Estimate, lid_star: Estimate, *, small: float = 0.5, z_critical: float = 1.96
) -> Verdict:
    """Classify points by the two dimensions.  Elementwise: any shape, `jit` and `vmap` included.

    Args:
        lid_theta: of the model.
        lid_star: of the data.
        small: a dimension at or below this is small.  The default means "rounds to zero: the point
            itself is all there is"; raise it to catch templates that keep a few degrees of freedom.
        z_critical: how many standard errors LID_theta must lie below LID_* for OD-Mem.  At 1.96 one
            point in forty is called so by chance when the two are equal; raise it for many points.

    Returns:
        `Verdict(label, z)`.  Two estimates without error are compared exactly: z is then 0 or
        infinite.  A NaN anywhere gives `UNDECIDED`, never a silent "not memorized".

    >>> result = verdict(Estimate(0.2, 0.1), Estimate(1.0, 0.1))
    >>> Label(int(result.label)).title, round(float(result.z), 2)
    ('OD-Mem', -5.66)
    """
    theta, star = jnp.asarray(lid_theta.value, float), jnp.asarray(lid_star.value, float)
    difference = theta - star
    stderr = jnp.hypot(jnp.asarray(lid_theta.stderr, float), jnp.asarray(lid_star.stderr, float))
    exact = jnp.where(difference == 0, 0.0, jnp.sign(difference) * jnp.inf)
    z = jnp.where(stderr == 0, exact, difference / jnp.where(stderr == 0, 1.0, stderr))
    # A dimension is an integer: where LID_* rounds to 0 there is none left for a model to lose.
    od_mem = (z < -z_critical) & (star > 0.5)
    dd_mem = (theta <= small) & (star <= small) & ~od_mem
    label = jnp.where(od_mem, Label.OD_MEM, jnp.where(dd_mem, Label.DD_MEM, Label.NOT_MEMORIZED))
    known = jnp.isfinite(theta) & jnp.isfinite(star) & ~jnp.isnan(z)
    return Verdict(jnp.where(known, label, Label.UNDECIDED), z)
