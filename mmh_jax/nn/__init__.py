"""Flax networks, one example per call: embeddings, residual MLPs, convolutional decoders."""

from mmh_jax.nn.conv import Conv, convolve
from mmh_jax.nn.decoders import ConvDecoder, ConvDiscriminator, ConvEncoder, pixel_shuffle
from mmh_jax.nn.functional import Apply, split
from mmh_jax.nn.mlp import GradientMLP, ResidualMLP, sinusoidal_embedding

__all__ = [
    "Apply",
    "Conv",
    "ConvDecoder",
    "ConvDiscriminator",
    "ConvEncoder",
    "GradientMLP",
    "ResidualMLP",
    "convolve",
    "pixel_shuffle",
    "sinusoidal_embedding",
    "split",
]
