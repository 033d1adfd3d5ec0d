"""Memorization: from two local dimensions to a verdict."""

from mmh_jax.memorization.verdict import Label, Verdict, verdict

__all__ = ["Label", "Verdict", "verdict"]
