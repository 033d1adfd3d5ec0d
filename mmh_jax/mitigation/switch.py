r"""When to begin guiding: the noise level at which a condition has let go.

A memorized condition pulls to its image from the start, and |eps_c - eps_0| is large; a path that
is not guided leaves the basin of that image, and the pull falls.  Guidance that begins then no
longer leads to the image (Jain et al. 2025, 2411.16738, there the dynamic transition point, at a
local minimum of the guidance).  With n_0, ..., n_{S-1} the values at the levels of an unguided run,
the rule here is

    i* = the least i with n_{i+1} > n_i and n_j < n_{j-1} for some j <= i,

the end of the first fall: values that rise from the start are passed over, and a fall that rests
for a while goes on.  The exact rule is ours, and so is the answer where there is no such i: the
last level, so that guidance acts in the last step only.

A level that is chosen beforehand, the static transition point, is `denoise.Guided(high=level,
outside=0.0)` alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from mmh_jax.memorization.conditional import norm
from mmh_jax.sample import Step, heun, solve_path
from mmh_jax.typing import Array, Denoiser, Key, check_answer, check_point

__all__ = ["Switch", "guidance_switch"]


class Switch(NamedTuple):
    """Where guidance may begin.

    Attributes:
        level: the noise level, of those of the run; the last if there is no minimum; NaN if a norm
            is not finite.
        found: whether there is a minimum.
        norms: (S,) |eps_c - eps_0| along the unguided run.
    """

    level: Any
    found: Any
    norms: Any


def guidance_switch(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: Array,
    sigmas: Array,
    *,
    step: Step = heun(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
) -> Switch:
    """The noise level from which on one sample may be guided (Jain et al. 2025).

    To be used as `denoise.Guided(conditional, unconditional, scale, high=found.level, outside=0.0)`
    from the same start on the same levels: down to there it is the run that was looked at.

    Args:
        conditional, unconditional: as for `memorization.cfg_norm`.
        x: the noisy start of the sampler, one point at the level `sigmas[0]`.
        sigmas: (S,) decreasing noise levels, S >= 3 for a minimum to be seen.
        step, key: of the sampler, as for `sample.solve`; the same again for the guided run.

    Cost: an unguided run, and S evaluations of the conditional model.  The guided run repeats the
    unguided part of it.  Bias: a rise by the network's noise counts, as any does.

    Raises:
        TypeError, ValueError: as `sample.solve`; or if `x` has not the denoiser's shape, or an
            answer has not that of `x`.

    >>> def pull(x, sigma):                                # |eps_c - eps_0| is |log2 sigma| + 1
    ...     return sigma * (jnp.abs(jnp.log2(sigma)) + 1) + 0 * x
    >>> levels = 2.0 ** jnp.arange(3, -4, -1)
    >>> found = guidance_switch(pull, lambda x, sigma: 0 * x, jnp.ones(1), levels)
    >>> found.level, bool(found.found), found.norms
    (Array(1., dtype=float32), True, Array([4., 3., 2., 1., 2., 3., 4.], dtype=float32))
    """
    x, sigmas = check_point("guidance_switch", unconditional, x, sigmas, levels=1)

    def pulled(x: Array, denoised: Array, sigma: Array) -> Array:
        answer = conditional(x, sigma)
        check_answer("guidance_switch", answer, x)
        return norm((answer - denoised) / sigma)

    path = solve_path(unconditional, x, sigmas, step=step, key=key, record=pulled)
    norms, place, found = path.recorded, *first_minimum(path.recorded)
    level = jnp.where(jnp.all(jnp.isfinite(norms)), path.sigmas[place], jnp.nan)
    return Switch(level, found, norms)


def first_minimum(values: Array) -> tuple[Array, Array]:
    """The place at which the first fall of a curve ends, and whether there is one; else the last.

    >>> first_minimum(jnp.array([1.0, 2.0, 1.0, 1.0, 0.5, 3.0, 0.1]))
    (Array(4, dtype=int32), Array(True, dtype=bool))
    """
    changes = jnp.diff(values)
    has_fallen = jnp.concatenate([jnp.zeros(1, bool), jnp.cumsum(changes < 0) > 0])
    ends = has_fallen & jnp.append(changes > 0, False)
    found = jnp.any(ends)
    return jnp.where(found, jnp.argmax(ends), len(values) - 1), found
