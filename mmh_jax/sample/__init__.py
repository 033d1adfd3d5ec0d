"""Samplers: from noise to data along the probability flow."""

from mmh_jax.sample.ode import heun, karras_levels, probability_flow, sample

__all__ = ["heun", "karras_levels", "probability_flow", "sample"]
