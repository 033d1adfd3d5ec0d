"""Flax networks, one example per call: U-Net, DiT, residual MLPs, convolutional decoders."""

from mmh_jax.nn.condition import Conditioning, drop_condition, null_condition
from mmh_jax.nn.conv import Conv, compiler_options, convolve
from mmh_jax.nn.decoders import ConvDecoder, ConvDiscriminator, ConvEncoder, pixel_shuffle
from mmh_jax.nn.dit import DiT
from mmh_jax.nn.functional import Apply, split
from mmh_jax.nn.layers import Attention, Features, GroupNorm, NoiseEmbedding, features
from mmh_jax.nn.mlp import GradientMLP, ResidualMLP, sinusoidal_embedding
from mmh_jax.nn.unet import UNet

__all__ = [
    "Apply",
    "Attention",
    "Conditioning",
    "Conv",
    "ConvDecoder",
    "ConvDiscriminator",
    "ConvEncoder",
    "DiT",
    "Features",
    "GradientMLP",
    "GroupNorm",
    "NoiseEmbedding",
    "ResidualMLP",
    "UNet",
    "compiler_options",
    "convolve",
    "drop_condition",
    "features",
    "null_condition",
    "pixel_shuffle",
    "sinusoidal_embedding",
    "split",
]
