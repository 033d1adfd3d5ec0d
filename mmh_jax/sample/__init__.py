"""Samplers along the probability flow, from noise to data, and likelihoods, from data to noise."""

from mmh_jax.sample.likelihood import log_density
from mmh_jax.sample.ode import (
    Path,
    karras_levels,
    probability_flow,
    sample,
    solve,
    solve_path,
)
from mmh_jax.sample.sde import reverse_sde
from mmh_jax.sample.steps import Advance, Step, ancestral, ddim, dpm_solver_2m, heun

__all__ = [
    "Advance",
    "Path",
    "Step",
    "ancestral",
    "ddim",
    "dpm_solver_2m",
    "heun",
    "karras_levels",
    "log_density",
    "probability_flow",
    "reverse_sde",
    "sample",
    "solve",
    "solve_path",
]
