"""Which token of a prompt made the model memorize: the one on which a detector depends most.

Token i is blamed for |dL / de_i| (Ross et al. 2025, 2411.00113, `mitigation.attribute`): L the CFG
norm, the score norm or the sharpness at pure noise, where sampling begins, or FLIPD, with its
residual as in the paper, or the trace alone, at a late state of the guided sampler.  `random` is
chance, measured on the same prompts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import denoise, mapping, mitigation, sample
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key

# Of the steps of the sampler: 40 of 50 in the paper.
LATE = 0.8
AT_START = {
    "cfg_norm": mem.cfg_norm,
    "score_norm": mitigation.score_norm_criterion,
    "sharpness": mem.sharpness,
}
LATE_ON = {
    "flipd": mitigation.flipd_criterion(residual=True),
    "trace": mitigation.flipd_criterion(),
}


def _blame(model: Any, tokens: Array, levels: Array, scale: Array, *, key: Key) -> dict[str, Array]:
    """|dL / de_i| for each detector, (L,)."""
    noise_key, random_key = jax.random.split(key)
    start = levels[0] * jax.random.normal(noise_key, model.shape)
    guided = denoise.Guided(model.condition(tokens), model.condition(None), scale)
    late = round(LATE * (len(levels) - 1))
    state = sample.solve_path(guided, start, levels).states[late]
    at = dict.fromkeys(AT_START, (start, levels[0])) | dict.fromkeys(LATE_ON, (state, levels[late]))
    blames = {
        name: mitigation.attribute(model, tokens, *at[name], criterion=criterion)
        for name, criterion in (AT_START | LATE_ON).items()
    }
    return blames | {"random": jax.random.uniform(random_key, tokens.shape[:1])}


_over_prompts = mapping.over_points(_blame, (None, 0, None, None), chunk_size=16)


def hits(
    model: Any, prompts: np.ndarray, places: np.ndarray, levels: Array, scale: float, *, key: Key
) -> dict[str, np.ndarray]:
    """For each detector, (P,) whether the token it blames most is the trigger.

    Args:
        model: token-conditional.
        prompts: (P, L, E), each with a trigger.
        places: (P,) where it is.
        levels: of the sampler.
        scale: of its guidance.
        key: draws the noise.
    """
    found = _over_prompts(model, prompts, levels, jnp.float32(scale), key=key)
    return {name: np.argmax(blame, axis=1) == places for name, blame in found.items()}
