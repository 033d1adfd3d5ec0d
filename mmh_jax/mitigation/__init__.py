"""Steering a model away from what it has memorized: by dimension, tokens, noise and guidance."""

from mmh_jax.mitigation.attribution import (
    Criterion,
    attribute,
    attribute_along,
    choose_tokens,
    flipd_criterion,
    score_norm_criterion,
)
from mmh_jax.mitigation.guidance import LidGuided, Target, reference_target
from mmh_jax.mitigation.optimise import Optimised, optimise_condition, optimise_noise
from mmh_jax.mitigation.rescale import Rescaled, clamped
from mmh_jax.mitigation.rewriter import chat_rewriter
from mmh_jax.mitigation.switch import Switch, guidance_switch
from mmh_jax.mitigation.tokens import Rewriter, mask, nearest_tokens, perturb, random_tokens

__all__ = [
    "Criterion",
    "LidGuided",
    "Optimised",
    "Rescaled",
    "Rewriter",
    "Switch",
    "Target",
    "attribute",
    "attribute_along",
    "chat_rewriter",
    "choose_tokens",
    "clamped",
    "flipd_criterion",
    "guidance_switch",
    "mask",
    "nearest_tokens",
    "optimise_condition",
    "optimise_noise",
    "perturb",
    "random_tokens",
    "reference_target",
    "score_norm_criterion",
]
