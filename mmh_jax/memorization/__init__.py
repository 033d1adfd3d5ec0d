"""Memorization: from two local dimensions to a verdict, and labels by sampling."""

from mmh_jax.memorization.labels import Copies, copies
from mmh_jax.memorization.verdict import Label, Verdict, verdict

__all__ = ["Copies", "Label", "Verdict", "copies", "verdict"]
