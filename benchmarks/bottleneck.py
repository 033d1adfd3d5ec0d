"""A nonlinear denoiser through a bottleneck, as arrays: the same network for every framework.

    D(x; sigma) = h(W^T x) W^T,    h(u) = u / (1 + sigma^2) + residual MLP(u)

with W (D, d) of orthonormal columns, so that the Jacobian has rank d = min(100, D // 2) and, as
that of a denoiser, d eigenvalues near 1 / (1 + sigma^2).  The MLP, three blocks of two layers, 1024
units wide where d = 100, is what an evaluation costs; its output is small.  The noise level enters
each block, so that nothing can be reused from one noise level to the next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.typing import Array

DEPTH = 3


def rank(ambient_dim: int) -> int:
    """d, the rank of the Jacobian."""
    return min(100, ambient_dim // 2)


def weights(ambient_dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32: frame (D, d), enter (d, H), inner, outer (3, H, H), time (3, H), leave (H, d)."""
    rng = np.random.default_rng(seed)
    d = rank(ambient_dim)
    width = min(1024, 2 ** int(np.ceil(np.log2(10 * d))))
    hidden = rng.normal(size=(2, DEPTH, width, width)) / np.sqrt(width)
    arrays = {
        "frame": np.linalg.qr(rng.normal(size=(ambient_dim, d)))[0],
        "enter": rng.normal(size=(d, width)),
        "inner": hidden[0],
        "outer": hidden[1],
        "time": 0.1 * rng.normal(size=(DEPTH, width)),
        "leave": 0.1 * rng.normal(size=(width, d)) / width,
    }
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


@struct.dataclass
class Bottleneck:
    """The JAX side."""

    frame: Array
    enter: Array
    inner: Array
    outer: Array
    time: Array
    leave: Array

    def __call__(self, x: Array, sigma: Array) -> Array:
        """D(x; sigma) at one point (D,)."""
        u = x @ self.frame
        h = u @ self.enter
        for inner, outer, time in zip(self.inner, self.outer, self.time, strict=True):
            h = h + jax.nn.silu(h @ inner + jnp.log(sigma) * time) @ outer
        return (u / (1 + sigma**2) + h @ self.leave) @ self.frame.T


def load(arrays: dict[str, np.ndarray]) -> Bottleneck:
    """The arrays on JAX's default device."""
    return Bottleneck(**{name: jnp.asarray(array) for name, array in arrays.items()})
