"""Samplers along the probability flow, from noise to data, and likelihoods, from data to noise."""

from mmh_jax.sample.likelihood import log_density
from mmh_jax.sample.ode import Path, heun, heun_path, karras_levels, probability_flow, sample

__all__ = [
    "Path",
    "heun",
    "heun_path",
    "karras_levels",
    "log_density",
    "probability_flow",
    "sample",
]
