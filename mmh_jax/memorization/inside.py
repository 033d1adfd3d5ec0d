r"""Detectors that look inside a network: its bottleneck, and where it looks in its condition.

    spikiness        the standard deviation over all entries of the bottleneck h(x_t)         (2026)
    entropy          -sum_l a_l log a_l, a_l the attention to token l, averaged over pixels,
                     heads and layers                                Ren et al. 2024, 2403.11052
    bright ending    the map of the attention to the last token at the last step, which is bright
                     where a region is copied                       Chen et al. 2024, 2410.21665
    local CFG norm   |m (eps_c - eps_0)| / mean(m), m the bright ending    (the same, as a detector)

What a network shows is read by `denoise.features`.  Attention of a prompt that is not memorized
settles on its first token; a memorized one keeps looking at those that trigger the copy, so that
its entropy is larger.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmh_jax import denoise, nn
from mmh_jax.memorization.conditional import noise_difference, norm
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_point

__all__ = [
    "attention_entropy",
    "bright_ending",
    "inside_at",
    "local_cfg_norm",
    "spikiness",
]


def inside_at(denoiser: Denoiser, x: ArrayLike, sigma: ArrayLike) -> nn.Features:
    """What the network computes inside at one noisy point; all of this module reads it.

    Args:
        denoiser: of a network that shows its features, with its condition bound.
        x: one noisy point.
        sigma: its noise level, in data units.

    Cost: 1 evaluation.

    Raises:
        TypeError: if the network shows no features, or `x` is of integers.
        ValueError: if `x` has not the denoiser's shape, or sigma is not positive.
    """
    x, sigma = check_point("inside_at", denoiser, x, sigma)
    return denoise.features(denoiser, x, sigma)[1]


def spikiness(inside: nn.Features) -> Array:
    """The standard deviation over all entries of the bottleneck.

    Args:
        inside: of one noisy point.

    >>> spikiness(nn.Features(jnp.array([[[3.0, -3.0]]]), ()))
    Array(3., dtype=float32)
    """
    return jnp.std(jnp.asarray(inside.bottleneck))


def attention_entropy(inside: nn.Features) -> Array:
    """-sum_l a_l log a_l of the mean attention to each token, in nats (Ren et al. 2024).

    Layers count alike, however many heads and pixels they have.

    Args:
        inside: of one noisy point, of a network with cross-attention.

    Returns:
        Between 0 and log(number of tokens).

    Raises:
        ValueError: if the network has no cross-attention.

    >>> one_layer = (jnp.full((2, 3, 3, 4), 0.25),)
    >>> attention_entropy(nn.Features(jnp.zeros((1, 1, 1)), one_layer)).round(4)      # log 4
    Array(1.3863, dtype=float32)
    """
    maps = _maps("attention_entropy", inside)
    share = jnp.mean(jnp.stack([jnp.mean(layer, axis=(0, 1, 2)) for layer in maps]), axis=0)
    positive = share > 0
    # NaN is not positive, and stays.
    terms = share * jnp.log(jnp.where(positive, share, 1))
    return -jnp.sum(jnp.where(share == 0, 0, terms))


def bright_ending(
    inside: nn.Features, *, token: int = -1, shape: tuple[int, int] | None = None
) -> Array:
    """The attention of each pixel to the last token, averaged over heads and layers.

    Args:
        inside: at the lowest noise level of a sampler, where a copy shows.
        token: which token ends the prompt (before any padding); the last by default.
        shape: (H, W) of the map, to which those of the layers are resized linearly; by default that
            of the largest layer.  Its mean is the detector's score.

    Returns:
        (H, W), between 0 and 1.

    Raises:
        ValueError: if the network has no cross-attention, or there is no such token.

    >>> attention = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0, 2].set(1.0)
    >>> bright_ending(nn.Features(jnp.zeros((1, 1, 1)), (attention,)))
    Array([[1., 0.],
           [0., 0.]], dtype=float32)
    """
    maps = _maps("bright_ending", inside)
    length = maps[0].shape[-1]
    if not -length <= token < length:
        raise ValueError(f"`bright_ending(token={token})`: there are {length} tokens.")
    largest = max((layer.shape[1:3] for layer in maps), key=lambda size: size[0] * size[1])
    size = largest if shape is None else shape
    each = [jax.image.resize(layer[..., token].mean(0), size, "linear") for layer in maps]
    return jnp.mean(jnp.stack(each), axis=0)


def local_cfg_norm(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: ArrayLike,
    sigma: ArrayLike,
    mask: ArrayLike,
) -> Array:
    """|m (eps_c - eps_0)| / mean(m): the CFG norm where the mask is, per unit of mask.

    Args:
        conditional, unconditional, x, sigma: as for `cfg_norm`; `x` an image, (H, W) or (H, W, C).
        mask: (H, W), not negative, such as `bright_ending(..., shape=(H, W))`.

    Returns:
        A scalar; with a constant mask `cfg_norm`, and NaN with one that is 0.

    Cost: 2 evaluations.

    Raises:
        TypeError, ValueError: as `cfg_norm`; or if the mask is not that of the image.

    >>> zero, one = (lambda x, sigma: 0 * x), (lambda x, sigma: x)
    >>> local_cfg_norm(one, zero, jnp.array([[3.0, 4.0]]), 1.0, jnp.array([[0.0, 1.0]]))
    Array(8., dtype=float32)
    """
    x, sigma = check_point("local_cfg_norm", conditional, x, sigma)
    mask = jnp.asarray(mask, x.dtype)
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"`local_cfg_norm(mask=...)` has shape {mask.shape}; for a point of shape {x.shape} it "
            f"is {x.shape[:2]}. Pass `shape=` to `bright_ending`."
        )
    difference = noise_difference(conditional, unconditional, x, sigma)
    weights = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
    return norm(weights * difference) / jnp.mean(mask)


def _maps(caller: str, inside: nn.Features) -> tuple[Any, ...]:
    if not inside.cross_attention:
        raise ValueError(
            f"`{caller}(inside=...)` is of a network without cross-attention; build it with "
            "`token_size=`, so that its condition is tokens."
        )
    return inside.cross_attention
