r"""What all pipelines of latents share: the autoencoder, the process, and guidance.

    image   --AutoencoderKL-->  latent               encode, decode
    D(x; sigma, c),  D_null + scale (D_c - D_null)   guided

A point x is a scaled latent (h, w, channels).  LID of a latent is that of the latent model: the
decoder is smooth, and adds no dimension where it is injective.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax import nn
from mmh_jax.denoise import Guided
from mmh_jax.pretrained.autoencoder import AutoencoderKL
from mmh_jax.pretrained.schedules import Process
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Latents", "guided"]


@dataclasses.dataclass(frozen=True)
class Latents:
    """A pipeline whose network is of latents.

    Attributes:
        vae: the autoencoder, split.
        process: that of the training.
        shape: (h, w, channels) of a latent.
    """

    vae: tuple[nn.Apply, Any]
    process: Process
    shape: tuple[int, ...]

    @property
    def patch_size(self) -> int:
        """Pixels of a latent, along each side, that the network takes at once."""
        return 1

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of the images of latents of `shape`."""
        module = nnx.merge(self.vae[0].graph, self.vae[1])
        return jax.eval_shape(module.decode, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape  # pyright: ignore

    def resized(self, height: int, width: int) -> Self:
        """The same for images of another size.

        Raises:
            ValueError: if the size is no multiple of what a patch of the latent stands for.
        """
        factor = self.image_shape[0] // self.shape[0]
        least = factor * self.patch_size
        if height < 1 or width < 1 or height % least or width % least:
            raise ValueError(
                f"`resized(height={height}, width={width})` must be multiples of {least}."
            )
        shape = (height // factor, width // factor, self.shape[2])
        return dataclasses.replace(self, shape=shape)

    def encode(self, image: ArrayLike, *, key: Key | None = None) -> Array:
        """The scaled latent of an image (H, W, channels) in [0, 1].

        Args:
            image: of any size that the autoencoder divides.
            key: draws from the posterior; None for its mean.
        """
        image = jnp.asarray(image)
        if image.ndim != 3:
            raise ValueError(
                f"`encode(image=...)` has shape {image.shape}; it is one image (H, W, channels)."
            )
        return _latent(*self.vae, 2 * image - 1, key)

    def decode(self, latent: ArrayLike) -> Array:
        """The image (H, W, channels) of a scaled latent, in [0, 1]; what is beyond is cut off."""
        return jnp.clip((_image(*self.vae, jnp.asarray(latent)) + 1) / 2, 0, 1)


def guided(conditional: Any, unconditional: Any, scale: float | None) -> Any:
    """The conditional denoiser for a scale of None, else both, with guidance.

    >>> near, far = (lambda x, sigma: x), (lambda x, sigma: 0 * x)
    >>> guided(near, far, None) is near
    True
    >>> guided(near, far, 3.0)(jnp.ones(2), 0.5)
    Array([3., 3.], dtype=float32)
    """
    if scale is None:
        return conditional
    # An array: another scale is not another program.
    return Guided(conditional, unconditional, jnp.asarray(scale, jnp.float32))


@jax.jit(static_argnums=0)
def _latent(apply: nn.Apply, params: Any, image: Array, key: Key | None) -> Array:
    vae: AutoencoderKL = nnx.merge(apply.graph, params)
    mean, log_variance = vae.encode(image)
    if key is not None:
        mean = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
    return vae.scale(mean)


@jax.jit(static_argnums=0)
def _image(apply: nn.Apply, params: Any, latent: Array) -> Array:
    vae: AutoencoderKL = nnx.merge(apply.graph, params)
    return vae.decode(vae.unscale(latent))
