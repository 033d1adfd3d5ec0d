"""Training a score model: loss, loop, checkpoints, and models on disk."""

from mmh_jax.train.checkpoint import Checkpoints, run_fingerprint
from mmh_jax.train.loop import Metrics, TrainConfig, TrainState, fit, init_state
from mmh_jax.train.loss import denoising_loss, edm_weight, log_normal, log_uniform, symmetry_loss
from mmh_jax.train.recipe import RECIPES, Recipe, normalisation, train_model
from mmh_jax.train.store import ModelConfig, build, load, load_config, save

__all__ = [
    "RECIPES",
    "Checkpoints",
    "Metrics",
    "ModelConfig",
    "Recipe",
    "TrainConfig",
    "TrainState",
    "build",
    "denoising_loss",
    "edm_weight",
    "fit",
    "init_state",
    "load",
    "load_config",
    "log_normal",
    "log_uniform",
    "normalisation",
    "run_fingerprint",
    "save",
    "symmetry_loss",
    "train_model",
]
