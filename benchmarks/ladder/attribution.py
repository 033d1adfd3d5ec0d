"""Which token of a prompt made the model memorize: the one on which a detector depends most.

For a detector L of a prompt with embeddings e_1, ..., e_L, token i is blamed for |dL / de_i| (Ross
et al. 2025, 2411.00113): L the CFG norm at pure noise, where sampling begins, or FLIPD at a late
state of the guided sampler.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax import denoise, lid, mapping, sample
from mmh_jax import memorization as mem
from mmh_jax.typing import Array, Key

# Of the steps of the sampler: 40 of 50 in the paper.
LATE = 0.8


def _lengths(loss: Any, tokens: Array) -> Array:
    return jnp.linalg.norm(jax.grad(loss)(tokens), axis=-1)


def _blame(model: Any, tokens: Array, levels: Array, scale: Array, *, key: Key) -> dict[str, Array]:
    """|dL / de_i| for each detector, (L,)."""
    null = model.condition(None)
    start = levels[0] * jax.random.normal(key, model.shape)
    guided = denoise.Guided(model.condition(tokens), null, scale)
    late = round(LATE * (len(levels) - 1))
    state = sample.solve_path(guided, start, levels).states[late]
    return {
        "cfg_norm": _lengths(
            lambda e: mem.cfg_norm(model.condition(e), null, start, levels[0]), tokens
        ),
        "flipd": _lengths(
            lambda e: lid.flipd(model.condition(e), state, levels[late]).value, tokens
        ),
    }


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
