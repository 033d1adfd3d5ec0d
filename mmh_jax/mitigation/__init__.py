"""Steering a model away from what it has memorized: LID guidance."""

from mmh_jax.mitigation.guidance import LidGuided, Target, reference_target

__all__ = ["LidGuided", "Target", "reference_target"]
