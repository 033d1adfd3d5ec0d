"""From any network to a denoiser, D(x; sigma) = E[x0 | x0 + sigma * eps = x]."""

from mmh_jax.denoise.adapters import from_equinox, from_function, from_linen, from_nnx
from mmh_jax.denoise.combine import (
    Affine,
    Guided,
    features,
    is_guided,
    outside_training,
    trained_range,
)
from mmh_jax.denoise.network import (
    NetworkDenoiser,
    eps,
    precondition,
    score,
    v,
    velocity,
    x0,
)

__all__ = [
    "Affine",
    "Guided",
    "NetworkDenoiser",
    "eps",
    "features",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "is_guided",
    "outside_training",
    "precondition",
    "score",
    "trained_range",
    "v",
    "velocity",
    "x0",
]
