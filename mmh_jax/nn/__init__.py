"""Flax networks, one example per call: embeddings, a residual MLP, and the gradient of one."""

from mmh_jax.nn.functional import Apply, split
from mmh_jax.nn.mlp import GradientMLP, ResidualMLP, sinusoidal_embedding

__all__ = ["Apply", "GradientMLP", "ResidualMLP", "sinusoidal_embedding", "split"]
