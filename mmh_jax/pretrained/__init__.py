"""Published model formats, read as they are: plain data in, Flax networks and denoisers out."""

from mmh_jax.pretrained.tokenizer import SpecialToken, Tokenizer
from mmh_jax.pretrained.tokenizer_files import load_tokenizer

__all__ = ["SpecialToken", "Tokenizer", "load_tokenizer"]
