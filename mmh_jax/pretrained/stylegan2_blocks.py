r"""The layers of StyleGAN2 (Karras et al. 2020, 1912.04958; 2006.06676), with published names.

    dense     y = r (x W^T / sqrt(n) + b)             n inputs; W and b are stored divided by r
    layer     s = dense(w),   d_o = (sum_{i,h,v} (s_i k_hvio)^2 + 1e-8)^{-1/2}
              y = lrelu(d * conv(s * x, k) + strength * noise + b)
    to RGB    y = conv(s * x / sqrt(n), k) + b
    up        y_j = sum_i k_{j-2i} x_i  for each axis, then the filter; k is turned, not slid

with lrelu(x) = sqrt(2) max(x, x/5), and y cut to [-clamp, clamp].  A block is a layer that doubles,
a layer, and what it adds to the image, which is doubled on the way:

    x <- conv1(conv0(x)),   image <- doubled(image) + torgb(x)

The style s scales the input, where the published code scales the kernel: the same function, whose
kernel is then shared by all examples of a `vmap` and by all columns of a Jacobian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mmh_jax.nn.conv import convolve
from mmh_jax.pretrained.edm_blocks import doubled, filtered
from mmh_jax.pretrained.layers import initial
from mmh_jax.typing import Array

__all__ = ["Common", "Dense", "SynthesisBlock", "SynthesisLayer", "ToRGB", "convolved_up", "unit"]


@dataclasses.dataclass(frozen=True)
class Common:
    """What all blocks of one network have in common.

    Attributes:
        w_dim: entries of w.
        channels: of the image.
        taps: the filter of doubling, an even number of them.
        clamp: where activations are cut, or None.
        has_noise: whether the layers have noise among their parameters.
        adds_noise: whether they add it.
        rngs: the source of initial weights.
    """

    w_dim: int
    channels: int
    taps: tuple[float, ...]
    clamp: float | None
    has_noise: bool
    adds_noise: bool
    rngs: nnx.Rngs


def unit(x: Array) -> Array:
    """x divided by the root of its mean square: of length sqrt(n), wherever it points.

    >>> unit(jnp.array([3.0, -3.0]))
    Array([ 1., -1.], dtype=float32)
    """
    return x * lax.rsqrt(jnp.mean(x**2) + 1e-8)


def _lrelu(x: Array) -> Array:
    return math.sqrt(2) * jax.nn.leaky_relu(x, 0.2)


def _cut(x: Array, clamp: float | None) -> Array:
    return x if clamp is None else jnp.clip(x, -clamp, clamp)


class Dense(nnx.Module):
    """A linear layer whose parameters are stored without their scale.

    Args:
        num_in, num_out: sizes.
        rate: r, the factor of the learning rate.
        activate: whether lrelu follows.
        offset: of which the bias begins.
        rngs: the source of the initial weights.

    >>> Dense(4, 3, offset=1.0, rngs=nnx.Rngs(0))(jnp.zeros(4))
    Array([1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        rate: float = 1.0,
        activate: bool = False,
        offset: float = 0.0,
        rngs: nnx.Rngs,
    ):
        def draw(key: Any, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / rate

        self.rate, self.activate = rate, activate
        self.weight = initial(draw, rngs, (num_out, num_in))
        self.bias = nnx.Param(jnp.full(num_out, offset))

    def __call__(self, x: Array) -> Array:
        """(num_in,) to (num_out,)."""
        weight = self.weight[...]
        scale = self.rate / math.sqrt(weight.shape[1])
        y = (weight * scale) @ x + self.bias[...] * self.rate
        return _lrelu(y) if self.activate else y


def convolved_up(x: Array, kernel: Array, taps: tuple[float, ...]) -> Array:
    """An image with zeros between its pixels, convolved with a kernel of 3 x 3, then filtered.

    Every second pixel of the result sees the same two taps of the kernel along an axis, so that
    one convolution of the small image, of 2 x 2 taps and four times the channels, has all of them.

    Args:
        x: (H, W, C).
        kernel: (3, 3, C, O).
        taps: the filter, an even number of them.

    Returns:
        (2 H, 2 W, O).

    >>> kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    >>> bool(jnp.allclose(convolved_up(jnp.ones((4, 4, 1)), kernel, (1, 1)), 1.0))
    True
    """
    (height, width, _), (_, _, num_in, num_out) = x.shape, kernel.shape
    # y_{2m + a} = sum_b x_{m - b} k_{2b + a}, a and b of 0 and 1, with k_3 = 0.
    whole = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    parts = jnp.flip(whole.reshape(2, 2, 2, 2, num_in, num_out), (0, 2))
    parts = parts.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, num_in, 4 * num_out)
    y = convolve(x, parts, padding=1).reshape(height + 1, width + 1, 2, 2, num_out)
    y = y.transpose(0, 2, 1, 3, 4).reshape(2 * height + 2, 2 * width + 2, num_out)
    side = len(taps) // 2 - 1
    return filtered(y, taps, (side, side - 1, 0))  # the last pixel is that of k_3


class SynthesisLayer(nnx.Module):
    """A convolution under a style; see the head of this module.

    Args:
        common: of the network.
        num_in, num_out: channels.
        size: height and width of the result.
        up: whether the image is doubled.

    >>> common = Common(5, 3, (1.0, 3.0, 3.0, 1.0), None, True, True, nnx.Rngs(0))
    >>> SynthesisLayer(common, 2, 4, 8, up=True)(jnp.ones((4, 4, 2)), jnp.ones(5)).shape
    (8, 8, 4)
    """

    def __init__(self, common: Common, num_in: int, num_out: int, size: int, *, up: bool = False):
        rngs = common.rngs
        self.up, self.taps, self.clamp = up, common.taps, common.clamp
        self.adds_noise = common.has_noise and common.adds_noise
        self.affine = Dense(common.w_dim, num_in, offset=1.0, rngs=rngs)
        self.weight = initial(jax.random.normal, rngs, (3, 3, num_in, num_out))
        self.bias = nnx.Param(jnp.zeros(num_out))
        if common.has_noise:
            self.noise_const = initial(jax.random.normal, rngs, (size, size))
            self.noise_strength = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array, w: Array) -> Array:
        """(H, W, num_in) to (size, size, num_out)."""
        kernel, style = self.weight[...], self.affine(w)
        h = x * style
        h = convolved_up(h, kernel, self.taps) if self.up else convolve(h, kernel)
        h = h * lax.rsqrt(style**2 @ jnp.sum(kernel**2, (0, 1)) + 1e-8)
        if self.adds_noise:
            h = h + self.noise_const[...][:, :, None] * self.noise_strength[...]
        return _cut(_lrelu(h + self.bias[...]), self.clamp)


class ToRGB(nnx.Module):
    """What a block adds to the image.

    Args:
        common: of the network.
        num_in: channels of the block.

    >>> common = Common(5, 3, (1.0, 3.0, 3.0, 1.0), None, True, True, nnx.Rngs(0))
    >>> ToRGB(common, 2)(jnp.ones((4, 4, 2)), jnp.ones(5)).shape
    (4, 4, 3)
    """

    def __init__(self, common: Common, num_in: int):
        rngs = common.rngs
        self.clamp = common.clamp
        self.affine = Dense(common.w_dim, num_in, offset=1.0, rngs=rngs)
        self.weight = initial(jax.random.normal, rngs, (1, 1, num_in, common.channels))
        self.bias = nnx.Param(jnp.zeros(common.channels))

    def __call__(self, x: Array, w: Array) -> Array:
        """(H, W, num_in) to (H, W, channels)."""
        style = self.affine(w) / math.sqrt(x.shape[2])
        return _cut(convolve(x * style, self.weight[...]) + self.bias[...], self.clamp)


class SynthesisBlock(nnx.Module):
    """One resolution; see the head of this module.

    Args:
        common: of the network.
        num_in: channels of the block below, 0 for the first block.
        num_out: channels.
        size: height and width.

    >>> common = Common(5, 3, (1.0, 3.0, 3.0, 1.0), None, True, True, nnx.Rngs(0))
    >>> x, image = SynthesisBlock(common, 0, 8, 4)(None, None, [jnp.ones(5)] * 2)
    >>> x.shape, image.shape
    ((4, 4, 8), (4, 4, 3))
    """

    def __init__(self, common: Common, num_in: int, num_out: int, size: int):
        self.taps = common.taps
        self.num_layers = 1 + (num_in > 0)
        if num_in:
            self.conv0 = SynthesisLayer(common, num_in, num_out, size, up=True)
        else:
            self.const = initial(jax.random.normal, common.rngs, (num_out, size, size))
        self.conv1 = SynthesisLayer(common, num_out, num_out, size)
        self.torgb = ToRGB(common, num_out)

    def __call__(
        self, x: Array | None, image: Array | None, ws: Sequence[Array]
    ) -> tuple[Array, Array]:
        """Features and image of this resolution from those of the one below.

        Args:
            x, image: None for the first block.
            ws: a w for each layer, and one for the image.
        """
        if x is None or image is None:
            x = self.conv1(self.const[...].transpose(1, 2, 0), ws[0])
            return x, self.torgb(x, ws[1])
        x = self.conv1(self.conv0(x, ws[0]), ws[1])
        return x, doubled(image, self.taps) + self.torgb(x, ws[2])
