"""Flax networks, one example per call: embeddings and a residual MLP."""

from mmh_jax.nn.functional import Apply, split
from mmh_jax.nn.mlp import ResidualMLP, sinusoidal_embedding

__all__ = ["Apply", "ResidualMLP", "sinusoidal_embedding", "split"]
