"""Published checkpoints: their formats, and their networks in Flax with the published names.

Files are read as data, JSON and safetensors: nothing in them is executed or unpickled.
"""

from mmh_jax.pretrained.files import read_json
from mmh_jax.pretrained.tensors import Tensors, open_safetensors, open_weights
from mmh_jax.pretrained.tokenizer import SpecialToken, Tokenizer
from mmh_jax.pretrained.tokenizer_files import load_tokenizer
from mmh_jax.pretrained.weights import flatten, layout, restore, save

__all__ = [
    "SpecialToken",
    "Tensors",
    "Tokenizer",
    "flatten",
    "layout",
    "load_tokenizer",
    "open_safetensors",
    "open_weights",
    "read_json",
    "restore",
    "save",
]
