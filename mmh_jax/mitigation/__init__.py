"""Steering a model away from what it has memorized.

By dimension, with or without a condition: LID guidance (`LidGuided`), rejection
(`sample_selected`), a population (`particles`), each by a `Measure` and a `Target`.  By the
condition: which tokens are to blame (`attribute`), other tokens (`perturb`, `chat_rewriter`),
another embedding or another initial noise (`optimise_condition`, `optimise_noise`), guidance that
begins late (`guidance_switch`) or is tamed (`Rescaled`, `clamped`).
"""

from mmh_jax.mitigation.attribution import (
    Criterion,
    attribute,
    attribute_along,
    choose_tokens,
    flipd_criterion,
    score_norm_criterion,
)
from mmh_jax.mitigation.guidance import LidGuided, Target, reference_target
from mmh_jax.mitigation.measure import DenoisedLid, JacobianTrace, Measure
from mmh_jax.mitigation.optimise import Optimised, optimise_condition, optimise_noise
from mmh_jax.mitigation.particles import Particles, particles, systematic_resampling
from mmh_jax.mitigation.rejection import Selected, sample_selected
from mmh_jax.mitigation.rescale import Rescaled, clamped
from mmh_jax.mitigation.rewriter import chat_rewriter
from mmh_jax.mitigation.switch import Switch, guidance_switch
from mmh_jax.mitigation.tokens import Rewriter, mask, nearest_tokens, perturb, random_tokens

__all__ = [
    "Criterion",
    "DenoisedLid",
    "JacobianTrace",
    "LidGuided",
    "Measure",
    "Optimised",
    "Particles",
    "Rescaled",
    "Rewriter",
    "Selected",
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
    "particles",
    "perturb",
    "random_tokens",
    "reference_target",
    "sample_selected",
    "score_norm_criterion",
    "systematic_resampling",
]
