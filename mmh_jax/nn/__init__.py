"""Flax networks, one example per call: convolutions, a residual MLP, and the gradient of one."""

from mmh_jax.nn.conv import Conv, convolve
from mmh_jax.nn.functional import Apply, split
from mmh_jax.nn.mlp import GradientMLP, ResidualMLP, sinusoidal_embedding

__all__ = [
    "Apply",
    "Conv",
    "GradientMLP",
    "ResidualMLP",
    "convolve",
    "sinusoidal_embedding",
    "split",
]
