r"""Small convolutional networks of grey images, 28 x 28: a decoder z -> x, and what trains it.

    decoder        z (d,) -> 7 x 7 -> 14 x 14 -> 28 x 28 x 1, through a sigmoid: values in (0, 1)
    encoder        x -> the mean and the log variance of a Gaussian over z, (d,) each
    discriminator  x -> a logit, large for real images

One example a call, and none depends on another: group norm where it helps, no batch norm.  The
decoder and the encoder are smooth (silu), so that a Jacobian says what a small step does.  Sizes
double by *pixel shuffle* (Shi et al. 2016, 1609.05158): a convolution makes four times as many
channels, which become the four pixels of each one; none is visited more often than its neighbour.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mmh_jax.nn.functional import one_example
from mmh_jax.typing import Array

__all__ = ["ConvDecoder", "ConvDiscriminator", "ConvEncoder", "pixel_shuffle"]

_SIDE = 28
_COARSE = _SIDE // 4


def pixel_shuffle(x: Array) -> Array:
    """(H, W, 4 C) to (2 H, 2 W, C): each pixel's channels become a square of four pixels.

    >>> pixel_shuffle(jnp.arange(4.0).reshape(1, 1, 4))[..., 0]
    Array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    height, width, channels = x.shape
    x = x.reshape(height, width, 2, 2, channels // 4)
    return x.transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, channels // 4)


class _Doubling(nnx.Module):
    """A convolution to four times the channels, and pixel shuffle."""

    def __init__(self, channels: int, leaving: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, 4 * leaving, (3, 3), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return pixel_shuffle(self.conv(nnx.silu(x)))


class ConvDecoder(nnx.Module):
    """x = g(z): a latent (d,) to an image (28, 28, 1) with values in (0, 1).

    Cost of a call with the default channels: 8 million multiplications.

    Args:
        latent_size: d.
        channels: at 7 x 7, 14 x 14 and 28 x 28 pixels; multiples of 8, or less than 8.
        rngs: the source of the initial weights.

    >>> decoder = ConvDecoder(5, channels=(8, 8, 4), rngs=nnx.Rngs(0))
    >>> decoder(jnp.zeros(5)).shape
    (28, 28, 1)
    """

    def __init__(
        self, latent_size: int, *, channels: tuple[int, int, int] = (64, 32, 16), rngs: nnx.Rngs
    ):
        coarse, middle, fine = channels
        self.coarse = coarse
        self.enter = nnx.Linear(latent_size, _COARSE**2 * coarse, rngs=rngs)
        self.first = _Doubling(coarse, middle, rngs=rngs)
        self.norm = nnx.GroupNorm(middle, num_groups=min(8, middle), rngs=rngs)
        self.second = _Doubling(middle, fine, rngs=rngs)
        self.leave = nnx.Conv(fine, 1, (3, 3), rngs=rngs)

    def __call__(self, z: Array) -> Array:
        """One image, of one latent."""
        x = self.first(self.enter(z).reshape(_COARSE, _COARSE, self.coarse))
        # Not sooner: right after a linear layer it would take away the length of z, and with it a
        # dimension.  Flax's group norm takes axis 0 for a batch: without one it would mix rows.
        x = one_example(self.norm, x)
        return nnx.sigmoid(self.leave(nnx.silu(self.second(x))))


class _Trunk(nnx.Module):
    """An image to 7 x 7 pixels, flat."""

    def __init__(self, channels: tuple[int, int], *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, channels[0], (5, 5), strides=2, rngs=rngs)
        self.second = nnx.Conv(channels[0], channels[1], (3, 3), strides=2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        # Centred: images are mostly background.
        x = x.reshape(_SIDE, _SIDE, 1) - 0.5
        return nnx.silu(self.second(nnx.silu(self.first(x)))).reshape(-1)


class ConvEncoder(nnx.Module):
    """q(z | x): an image (28, 28) or (28, 28, 1) to a diagonal Gaussian over the latents.

    Args:
        latent_size: d.
        channels: at 14 x 14 and 7 x 7 pixels.
        width: of the layer before the last.
        rngs: the source of the initial weights.

    >>> encoder = ConvEncoder(5, channels=(4, 4), width=16, rngs=nnx.Rngs(0))
    >>> [part.shape for part in encoder(jnp.zeros((28, 28, 1)))]
    [(5,), (5,)]
    """

    def __init__(
        self,
        latent_size: int,
        *,
        channels: tuple[int, int] = (32, 64),
        width: int = 128,
        rngs: nnx.Rngs,
    ):
        self.trunk = _Trunk(channels, rngs=rngs)
        self.middle = nnx.Linear(_COARSE**2 * channels[1], width, rngs=rngs)
        self.leave = nnx.Linear(width, 2 * latent_size, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Mean and log variance, (d,) each."""
        mean, log_variance = jnp.split(self.leave(nnx.silu(self.middle(self.trunk(x)))), 2)
        return mean, log_variance


class ConvDiscriminator(nnx.Module):
    """An image (28, 28) or (28, 28, 1) to a logit: large where it looks real.

    No normalisation at all: the gradient penalty of `train.fit_gan` keeps it smooth.

    Args:
        channels, width, rngs: as in `ConvEncoder`.

    >>> ConvDiscriminator(channels=(4, 4), width=16, rngs=nnx.Rngs(0))(jnp.zeros((28, 28, 1))).shape
    ()
    """

    def __init__(self, *, channels: tuple[int, int] = (32, 64), width: int = 128, rngs: nnx.Rngs):
        self.trunk = _Trunk(channels, rngs=rngs)
        self.middle = nnx.Linear(_COARSE**2 * channels[1], width, rngs=rngs)
        self.leave = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """The logit, a scalar."""
        return self.leave(nnx.silu(self.middle(self.trunk(x))))[0]
