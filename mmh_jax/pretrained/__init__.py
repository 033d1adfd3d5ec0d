"""Published checkpoints: `load(folder)`; their formats, and their networks in Flax.

Files are read as data, JSON and safetensors: nothing in them is executed or unpickled.
"""

from mmh_jax.pretrained.autoencoder import AutoencoderKL, Posterior
from mmh_jax.pretrained.block_names import current_name
from mmh_jax.pretrained.class_conditional import ClassConditional
from mmh_jax.pretrained.clip import CLIPTextModel, TextEncoding, load_text_encoder
from mmh_jax.pretrained.conditional_unet import Condition, UNet2DConditionModel
from mmh_jax.pretrained.edm import DhariwalUNet, SongUNet
from mmh_jax.pretrained.edm_models import load_edm
from mmh_jax.pretrained.files import read_json
from mmh_jax.pretrained.iddpm import IDDPMUNet, load_iddpm
from mmh_jax.pretrained.layers import abstract
from mmh_jax.pretrained.pipeline import Unconditional, load
from mmh_jax.pretrained.schedules import Process, load_process, process_of
from mmh_jax.pretrained.sd3 import JointCondition, SD3Transformer2DModel
from mmh_jax.pretrained.stable_diffusion import StableDiffusion, StableDiffusion3
from mmh_jax.pretrained.stylegan2 import StyleGAN2Generator, load_stylegan2
from mmh_jax.pretrained.tensors import Tensors, open_safetensors, open_weights
from mmh_jax.pretrained.text_to_image import TextToImage
from mmh_jax.pretrained.tokenizer import SpecialToken, Tokenizer
from mmh_jax.pretrained.tokenizer_files import load_tokenizer
from mmh_jax.pretrained.transformer import DiTTransformer2DModel
from mmh_jax.pretrained.unet import UNet2DModel
from mmh_jax.pretrained.weights import flatten, layout, restore, save

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "ClassConditional",
    "Condition",
    "DhariwalUNet",
    "DiTTransformer2DModel",
    "IDDPMUNet",
    "JointCondition",
    "Posterior",
    "Process",
    "SD3Transformer2DModel",
    "SongUNet",
    "SpecialToken",
    "StableDiffusion",
    "StableDiffusion3",
    "StyleGAN2Generator",
    "Tensors",
    "TextEncoding",
    "TextToImage",
    "Tokenizer",
    "UNet2DConditionModel",
    "UNet2DModel",
    "Unconditional",
    "abstract",
    "current_name",
    "flatten",
    "layout",
    "load",
    "load_edm",
    "load_iddpm",
    "load_process",
    "load_stylegan2",
    "load_text_encoder",
    "load_tokenizer",
    "open_safetensors",
    "open_weights",
    "process_of",
    "read_json",
    "restore",
    "save",
]
