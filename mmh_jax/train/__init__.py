"""Training a score model: loss, loop, checkpoints, and models on disk."""

from mmh_jax.train.checkpoint import Checkpoints, run_fingerprint
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.ema import profile_coefficients, reconstruct
from mmh_jax.train.gan import (
    Gan,
    GanConfig,
    GanMetrics,
    GanState,
    discriminator_loss,
    fit_gan,
    gan,
    generator_loss,
    init_gan,
)
from mmh_jax.train.log import JsonLines, read_json_lines, tensorboard
from mmh_jax.train.loop import Metrics, fit
from mmh_jax.train.loss import (
    denoising_loss,
    edm_weight,
    log_normal,
    log_uniform,
    min_snr_weight,
    noise_weight,
    symmetry_loss,
    uniform_time,
)
from mmh_jax.train.recipe import IMAGE_RECIPES, RECIPES, Recipe
from mmh_jax.train.run import check_trainable, normalisation, train_model
from mmh_jax.train.step import TrainState, init_state
from mmh_jax.train.store import ModelConfig, build, load, load_config, save
from mmh_jax.train.stream import Stream, grain_stream
from mmh_jax.train.twins import Twins, train_twins
from mmh_jax.train.vae import (
    Elbo,
    Vae,
    VaeConfig,
    VaeMetrics,
    VaeState,
    elbo,
    fit_vae,
    init_vae,
    vae,
)

__all__ = [
    "IMAGE_RECIPES",
    "RECIPES",
    "Checkpoints",
    "Elbo",
    "Gan",
    "GanConfig",
    "GanMetrics",
    "GanState",
    "JsonLines",
    "Metrics",
    "ModelConfig",
    "Recipe",
    "Stream",
    "TrainConfig",
    "TrainState",
    "Twins",
    "Vae",
    "VaeConfig",
    "VaeMetrics",
    "VaeState",
    "build",
    "check_trainable",
    "denoising_loss",
    "discriminator_loss",
    "edm_weight",
    "elbo",
    "fit",
    "fit_gan",
    "fit_vae",
    "gan",
    "generator_loss",
    "grain_stream",
    "init_gan",
    "init_state",
    "init_vae",
    "load",
    "load_config",
    "log_normal",
    "log_uniform",
    "min_snr_weight",
    "noise_weight",
    "normalisation",
    "profile_coefficients",
    "read_json_lines",
    "reconstruct",
    "run_fingerprint",
    "save",
    "symmetry_loss",
    "tensorboard",
    "train_model",
    "train_twins",
    "uniform_time",
    "vae",
]
