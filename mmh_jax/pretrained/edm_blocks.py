r"""The blocks of the networks of Karras et al. (2022, 2206.00364), with their published names.

    block   h <- conv0(silu(norm0(x))),   h <- conv1(silu(norm1(h), e)),   x <- s (skip(x) + h)
            x <- s (x + proj(attention(qkv(norm2(x)))))                 where there is attention
    down    y_i = sum_k f_k x_{2i + k - p},              p = (len f - 1) // 2, for each axis
    up      y_j = 2 sum_i f_{j + p - 2i} x_i,                       the adjoint of down, times 4

The embedding e is added before `norm1` (DDPM++, NCSN++) or modulates what comes out of it (ADM).
The filter f sums to one: (1, 1) / 2 for DDPM++ and ADM, (1, 3, 3, 1) / 8 for NCSN++.  In both
resampling is before `conv0` and before the convolution of `skip`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mmh_jax.data.files import PathLike
from mmh_jax.nn.conv import convolve
from mmh_jax.pretrained.files import fault
from mmh_jax.pretrained.layers import Conv, GroupNorm, Linear, attend
from mmh_jax.typing import Array

__all__ = [
    "Block",
    "FusedDown",
    "Group",
    "Resample",
    "Resampled",
    "Style",
    "check_filters",
    "doubled",
    "filtered",
    "halved",
]


def halved(x: Array, taps: tuple[float, ...], *, padding: int | None = None) -> Array:
    """An image (H, W, C) filtered and halved.

    Args:
        x: the image.
        taps: the filter; it is divided by its sum.
        padding: zeros on each side, (len(taps) - 1) // 2 if not given.

    >>> halved(jnp.arange(4.0).reshape(2, 2, 1), (1, 1)).tolist()
    [[[1.5]]]
    """
    padding = (len(taps) - 1) // 2 if padding is None else padding
    x = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    for axis in (0, 1):
        num = (x.shape[axis] - len(taps)) // 2 + 1
        parts = [
            lax.slice_in_dim(x, k, k + 2 * num - 1, 2, axis) * (tap / sum(taps))
            for k, tap in enumerate(taps)
        ]
        x = sum(parts[1:], parts[0])
    return x


def doubled(x: Array, taps: tuple[float, ...]) -> Array:
    """An image (H, W, C) doubled and filtered.

    >>> doubled(jnp.ones((1, 1, 1)), (1, 1))[..., 0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    side = len(taps) - 1 - (len(taps) - 1) // 2
    return filtered(x, taps, (side, side, 1))  # a zero in between


def filtered(x: Array, taps: tuple[float, ...], zeros: tuple[int, int, int]) -> Array:
    """An image (H, W, C) convolved with a filter that sums to 2 along each axis.

    Args:
        x: the image.
        taps: the filter, not turned; it is divided by half its sum.
        zeros: before, after and between the pixels of each axis; negative ones cut.

    >>> filtered(jnp.ones((2, 2, 1)), (1, 3), (1, 0, 0))[..., 0].tolist()
    [[0.25, 1.0], [1.0, 4.0]]
    """
    size = len(taps)
    for axis in (0, 1):
        widths = [(0, 0, 0)] * 3
        widths[axis] = zeros
        z = lax.pad(x, jnp.zeros((), x.dtype), widths)
        num = z.shape[axis] - size + 1
        parts = [
            lax.slice_in_dim(z, k, k + num, 1, axis) * (2 * tap / sum(taps))
            for k, tap in enumerate(reversed(taps))
        ]
        x = sum(parts[1:], parts[0])
    return x


def check_filters(
    caller: str, folder: PathLike, tensors: Mapping[str, np.ndarray], taps: Any
) -> None:
    """Refuse a file whose filters are not those of its configuration.

    Args:
        caller: to name in an error.
        folder: where the file is, for an error.
        tensors: by published name; the filters end in `.resample_filter`.
        taps: of the configuration, unchecked.

    Raises:
        ValueError: if one is another.

    >>> found = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    >>> check_filters("load_edm", ".", {"x.resample_filter": found}, [1, 3, 3, 1])
    """
    taps = np.asarray(taps, np.float64)
    expected = np.outer(taps, taps) / max(taps.sum() ** 2, 1e-30) if taps.ndim == 1 else None
    for name, value in tensors.items():
        if name.endswith(".resample_filter"):
            found = np.squeeze(value)
            if expected is None or found.shape != expected.shape or np.any(
                np.abs(found - expected) > 1e-3
            ):  # fmt: skip
                raise fault(
                    caller, folder, f"has a {name[:100]} that is not of its config.json",
                    "Export both from the same model, as documented.",
                )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of one network have in common.

    Attributes:
        embedding: the size of e.
        taps: the filter of resampling.
        scale: s, by which sums are multiplied.
        eps: of the norms.
        adaptive: whether e modulates, instead of being added.
        head_size: of attention; None for one head.
        project: whether a resampled skip always has a convolution.
        chunk: queries of attention at a time, or None for all.
        rngs: the source of initial weights.
    """

    embedding: int
    taps: tuple[float, ...]
    scale: float
    eps: float
    adaptive: bool
    head_size: int | None
    project: bool
    chunk: int | None
    rngs: nnx.Rngs


class Group(GroupNorm):
    """Group normalisation with at least 4 channels a group, and at most 32 groups.

    >>> Group(24).num_groups
    6
    """

    def __init__(self, width: int, *, eps: float = 1e-5):
        super().__init__(min(32, width // 4), width, eps=eps)


class Resampled(Conv):
    """A convolution after halving ("down"), doubling ("up"), or neither (None).

    >>> def answer(x):
    ...     return Resampled(3, 4, 1, "down", (1.0, 1.0), rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(answer, jnp.ones((8, 6, 3))).shape
    (4, 3, 4)
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        size: int,
        way: str | None = None,
        taps: tuple[float, ...] = (1.0, 1.0),
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_in, num_out, size=size, rngs=rngs)
        self.resample = Resample(way, taps)

    def __call__(self, x: Array) -> Array:
        """One image."""
        return super().__call__(self.resample(x))


class Resample(nnx.Module):
    """Halving, doubling or neither, without parameters.

    >>> Resample("up", (1.0, 1.0))(jnp.ones((2, 2, 1))).shape
    (4, 4, 1)
    """

    def __init__(self, way: str | None, taps: tuple[float, ...]):
        self.way, self.taps = way, taps

    def __call__(self, x: Array) -> Array:
        """One image."""
        if self.way is None:
            return x
        return halved(x, self.taps) if self.way == "down" else doubled(x, self.taps)


class FusedDown(Conv):
    """A convolution, then halving, with all zeros around the convolution: NCSN++'s residual.

    >>> def answer(x):
    ...     return FusedDown(3, 4, (1.0, 3.0, 3.0, 1.0), rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(answer, jnp.ones((8, 6, 3))).shape
    (4, 3, 4)
    """

    def __init__(self, num_in: int, num_out: int, taps: tuple[float, ...], *, rngs: nnx.Rngs):
        super().__init__(num_in, num_out, size=3, rngs=rngs)
        self.taps = taps

    def __call__(self, x: Array) -> Array:
        """One image."""
        weight = self.weight[...]
        around = 1 + (len(self.taps) - 1) // 2
        h = convolve(x.astype(weight.dtype), weight, padding=around)
        h = halved(h, self.taps, padding=0)
        return h if self.bias is None else h + self.bias[...]


class Block(nnx.Module):
    """A residual block; see the head of this module.

    Args:
        style: of the network.
        num_in, num_out: channels.
        way: "down", "up" or None.
        attention: whether there is attention.

    >>> def answer(x, e):
    ...     style = Style(6, (1.0, 1.0), 0.7, 1e-6, False, None, True, None, nnx.Rngs(0))
    ...     return Block(style, 4, 8, way="down", attention=True)(x, e)
    >>> jax.eval_shape(answer, jnp.ones((4, 4, 4)), jnp.ones(6)).shape
    (2, 2, 8)
    """

    def __init__(
        self,
        style: Style,
        num_in: int,
        num_out: int,
        *,
        way: str | None = None,
        attention: bool = False,
    ):
        rngs, taps = style.rngs, style.taps
        self.num_in, self.num_out = num_in, num_out
        self.scale, self.adaptive, self.chunk = style.scale, style.adaptive, style.chunk
        self.norm0 = Group(num_in, eps=style.eps)
        self.conv0 = Resampled(num_in, num_out, 3, way, taps, rngs=rngs)
        self.affine = Linear(style.embedding, num_out * (1 + style.adaptive), rngs=rngs)
        self.norm1 = Group(num_out, eps=style.eps)
        self.conv1 = Conv(num_out, num_out, rngs=rngs)
        skip: Any = None
        if num_in != num_out or (way is not None and style.project):
            skip = Resampled(num_in, num_out, 1, way, taps, rngs=rngs)
        elif way is not None:
            skip = Resample(way, taps)
        self.skip = skip
        # Fewer channels than a head has make no head, and no attention.
        heads = 1 if style.head_size is None else num_out // style.head_size
        self.num_heads = heads if attention else 0
        if self.num_heads:
            self.norm2 = Group(num_out, eps=style.eps)
            self.qkv = Conv(num_out, 3 * num_out, size=1, rngs=rngs)
            self.proj = Conv(num_out, num_out, size=1, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        """One image and the embedding."""
        h = self.conv0(jax.nn.silu(self.norm0(x)))
        parameters = self.affine(embedding)
        if self.adaptive:
            scale, shift = jnp.split(parameters, 2)
            h = jax.nn.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = jax.nn.silu(self.norm1(h + parameters))
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.scale
        return (self._attention(x) + x) * self.scale if self.num_heads else x

    def _attention(self, x: Array) -> Array:
        # The published order of the channels: head, channel, then query, key and value.
        parts = self.qkv(self.norm2(x)).reshape(x.shape[0] * x.shape[1], self.num_heads, -1, 3)
        q, k, v = (parts[..., index] for index in range(3))
        return self.proj(attend(q, k, v, chunk=self.chunk).reshape(x.shape))
