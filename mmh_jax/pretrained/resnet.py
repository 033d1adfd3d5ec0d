r"""Residual blocks of published U-Nets and autoencoders, and how they change the resolution.

    h <- conv1(resample(act(norm1(x))))
    h <- norm2(h + W act(e))                         `default`, e the embedding of the time
    h <- norm2(h) (1 + scale) + shift                `scale_shift`, (scale, shift) = W act(e)
    y <- (shortcut(resample(x)) + conv2(act(h))) / rescale

Resampling is by means of 2 x 2, by repetition, or by the filter (1, 3, 3, 1) / 8 along each axis
(`fir`, Karras et al. 2020; Song et al. 2021), whose sums are written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.pretrained.layers import Conv, GroupNorm, Linear
from mmh_jax.typing import Array

__all__ = ["Downsample", "Resnet", "Style", "Upsample", "fir_doubled", "fir_halved"]


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of one network have in common.

    Attributes:
        caller: the network, for errors.
        embedding: size of the embedding of the time, or None if there is none.
        groups: of the norms, or None for a quarter of the channels, at most 32.
        eps: of the norms.
        act: the activation.
        shift: how the time enters, "default" or "scale_shift".
        chunk: queries of attention at a time, or None.
        rngs: the source of initial weights.
    """

    caller: str
    embedding: int | None
    groups: int | None
    eps: float
    act: Callable[[Array], Array]
    shift: str
    chunk: int | None
    rngs: nnx.Rngs

    def groups_of(self, width: int) -> int:
        """The groups of a norm of this many channels."""
        return max(1, min(width // 4, 32)) if self.groups is None else self.groups


def doubled(x: Array) -> Array:
    """Every pixel four times: nearest neighbours."""
    return jnp.repeat(jnp.repeat(x, 2, 0), 2, 1)


def halved(x: Array) -> Array:
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    height, width = x.shape[0] // 2, x.shape[1] // 2
    pairs = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, x.shape[2])
    return pairs.mean((1, 3))


def fir_halved(x: Array) -> Array:
    """Half the resolution, by the filter (1, 3, 3, 1) / 8 along each axis, zeros outside.

    >>> fir_halved(jnp.ones((4, 4, 1)))[..., 0]
    Array([[0.765625, 0.765625],
           [0.765625, 0.765625]], dtype=float32)
    """
    for axis in (0, 1):
        num = x.shape[axis] // 2
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
        parts = [
            weight * jax.lax.slice_in_dim(padded, start, start + 2 * num - 1, 2, axis)
            for start, weight in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8))
        ]
        x = parts[0] + parts[1] + parts[2] + parts[3]
    return x


def fir_doubled(x: Array) -> Array:
    """Twice the resolution, by the filter (1, 3, 3, 1) / 4 along each axis, zeros outside.

    >>> fir_doubled(jnp.ones((2, 2, 1)))[0, :, 0]
    Array([0.5625, 0.75  , 0.75  , 0.5625], dtype=float32)
    """
    for axis in (0, 1):
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
        num = x.shape[axis]
        before, after = (
            jax.lax.slice_in_dim(padded, start, start + num, 1, axis) for start in (0, 2)
        )
        both = jnp.stack([before / 4 + 3 * x / 4, 3 * x / 4 + after / 4], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * num, *x.shape[axis + 1 :])
    return x


RESAMPLINGS: dict[str, Callable[[Array], Array]] = {
    "down": halved,
    "up": doubled,
    "fir_down": fir_halved,
    "fir_up": fir_doubled,
}


class Resnet(nnx.Module):
    """A residual block.

    Args:
        style: of the network.
        num_in, num_out: channels.
        resample: None, "down", "up", "fir_down" or "fir_up".
        rescale: by which the answer is divided.
        skip_time_act: whether the embedding is taken as it is.
        shortcut: whether there is a convolution beside the block also where `num_in` is `num_out`.
        groups_in: of the first norm, if they are others.

    >>> def answer(x, embedding):
    ...     style = Style("Net", 8, 2, 1e-5, jax.nn.silu, "default", None, nnx.Rngs(0))
    ...     return Resnet(style, 4, 6, resample="down")(x, embedding)
    >>> jax.eval_shape(answer, jnp.ones((4, 4, 4)), jnp.ones(8)).shape
    (2, 2, 6)
    """

    def __init__(
        self,
        style: Style,
        num_in: int,
        num_out: int,
        *,
        resample: str | None = None,
        rescale: float = 1.0,
        skip_time_act: bool = False,
        shortcut: bool = False,
        groups_in: int | None = None,
    ):
        rngs = style.rngs
        self.norm1 = GroupNorm(groups_in or style.groups_of(num_in), num_in, eps=style.eps)
        self.conv1 = Conv(num_in, num_out, rngs=rngs)
        width = 2 * num_out if style.shift == "scale_shift" else num_out
        self.time_emb_proj: Any = (
            None if style.embedding is None else Linear(style.embedding, width, rngs=rngs)
        )
        self.norm2 = GroupNorm(style.groups_of(num_out), num_out, eps=style.eps)
        self.conv2 = Conv(num_out, num_out, rngs=rngs)
        beside = shortcut or num_in != num_out
        self.conv_shortcut: Any = Conv(num_in, num_out, size=1, rngs=rngs) if beside else None
        self.act = style.act
        self.scales = style.shift == "scale_shift"
        self.resample = resample
        self.rescale = rescale
        self.skip_time_act = skip_time_act

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """(H', W', num_out)."""
        h = self.act(self.norm1(x))
        if self.resample is not None:
            x, h = (RESAMPLINGS[self.resample](value) for value in (x, h))
        h = self.conv1(h)
        if self.time_emb_proj is None or embedding is None:
            h = self.norm2(h)
        else:
            moved = self.time_emb_proj(embedding if self.skip_time_act else self.act(embedding))
            if self.scales:
                scale, shift = jnp.split(moved, 2)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + moved)
        h = self.conv2(self.act(h))
        y = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return y if self.rescale == 1 else y / self.rescale


class Downsample(nnx.Module):
    """Half the resolution, by a convolution with stride 2.

    Args:
        width: channels.
        padding: 1 on every side, or 0 for one row below and one column to the right.
        rngs: the source of the initial weights.

    >>> Downsample(2, 0, rngs=nnx.Rngs(0))(jnp.ones((4, 4, 2))).shape
    (2, 2, 2)
    """

    def __init__(self, width: int, padding: int, *, rngs: nnx.Rngs):
        zeros = ((0, 1), (0, 1)) if padding == 0 else padding
        self.conv = Conv(width, width, stride=2, padding=zeros, rngs=rngs)

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """(H / 2, W / 2, C)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution, or a given one, by nearest neighbours and a convolution.

    Args:
        width: channels.
        rngs: the source of the initial weights.

    >>> Upsample(2, rngs=nnx.Rngs(0))(jnp.ones((4, 4, 2))).shape
    (8, 8, 2)
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, rngs=rngs)

    def __call__(
        self, x: Array, embedding: Array | None = None, size: tuple[int, int] | None = None
    ) -> Array:
        """(2 H, 2 W, C), or (*size, C)."""
        if size is None or size == (2 * x.shape[0], 2 * x.shape[1]):
            return self.conv(doubled(x))
        rows, columns = (
            jnp.arange(wanted) * there // wanted
            for wanted, there in zip(size, x.shape[:2], strict=True)
        )
        return self.conv(x[rows][:, columns])
