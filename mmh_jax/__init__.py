"""Local intrinsic dimension and memorization in generative models, in JAX.

Rooms: `noise`, `denoise`, `analytic` (from a model to a denoiser); `lid` (from a denoiser, or from
data, to a dimension); `memorization` (from two dimensions to a verdict); `mitigation` (steering
away from what is memorized); `evaluation` (how good the samples are); `train`, `sample`, `nn`,
`data`; and `linalg`, `mapping`, the tools they share.  The verbs of every day are here too.
"""

from mmh_jax import (
    analytic,
    data,
    denoise,
    evaluation,
    lid,
    linalg,
    mapping,
    memorization,
    mitigation,
    nn,
    noise,
    sample,
    train,
)
from mmh_jax.lid import flipd, flipd_curve, jacobian_spectrum
from mmh_jax.mapping import over_points
from mmh_jax.memorization import verdict
from mmh_jax.train import load
from mmh_jax.typing import Denoiser, Estimate

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Estimate",
    "analytic",
    "data",
    "denoise",
    "evaluation",
    "flipd",
    "flipd_curve",
    "jacobian_spectrum",
    "lid",
    "linalg",
    "load",
    "mapping",
    "memorization",
    "mitigation",
    "nn",
    "noise",
    "over_points",
    "sample",
    "train",
    "verdict",
]
