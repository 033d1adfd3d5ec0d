"""Steering a model away from what it has memorized: guidance, rejection and particles by LID."""

from mmh_jax.mitigation.guidance import LidGuided, Target, reference_target
from mmh_jax.mitigation.measure import DenoisedLid, JacobianTrace, Measure
from mmh_jax.mitigation.particles import Particles, particles, systematic_resampling
from mmh_jax.mitigation.rejection import Selected, sample_selected

__all__ = [
    "DenoisedLid",
    "JacobianTrace",
    "LidGuided",
    "Measure",
    "Particles",
    "Selected",
    "Target",
    "particles",
    "reference_target",
    "sample_selected",
    "systematic_resampling",
]
