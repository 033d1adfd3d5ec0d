r"""Layers whose parameters are named and laid out as in published PyTorch checkpoints.

An attribute has the name of its key in the state dict, a list is an `nnx.List`, so that the path of
a parameter, joined by dots, is its published name: `down_blocks.0.resnets.1.norm1.weight`.  Arrays
are stored as published, but for the kernels of convolutions:

    Linear.weight   (out, in)           y = x W^T + b
    Conv.weight     (h, w, in, out)     published (out, in, h, w)
    norms           weight, bias (C,)   y = (x - mean) / sqrt(var + eps) * weight + bias

A network computes in the dtype of its parameters; statistics of norms, softmax and the sines of
time embeddings are in float32 at least.  Everything is for one example: (H, W, C), or (L, C).
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.nn.conv import convolve
from mmh_jax.typing import Array

__all__ = [
    "Conv",
    "Embedding",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "Nothing",
    "abstract",
    "activation",
    "attend",
    "initial",
    "wide",
]

_INITIAL = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
_INITIAL_CONV = nnx.initializers.lecun_normal()

_Network = TypeVar("_Network", bound=nnx.Module)
_DRAWS = contextvars.ContextVar("draws", default=True)


def _check_sizes(layer: str, **sizes: int) -> None:
    if min(sizes.values()) < 1:
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"`{layer}({given})` must all be at least 1; check the sizes in the configuration."
        )


def initial(how: Callable[..., Array], rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    """A parameter drawn by `how(key, shape)`; inside `abstract`, one without a value."""
    return nnx.Param(how(rngs.params(), shape) if _DRAWS.get() else jnp.zeros(shape))


def abstract(build: Callable[[], _Network]) -> _Network:
    """The network that `build` makes, with shapes in place of arrays; nothing is allocated.

    As `nnx.eval_shape`, but no random numbers are traced: those take a time that grows with the
    square of their number, half a minute for Stable Diffusion XL.

    >>> abstract(lambda: Linear(10**6, 10**6, rngs=nnx.Rngs(0))).weight.shape
    (1000000, 1000000)
    """
    token = _DRAWS.set(False)
    try:
        return nnx.eval_shape(build)
    finally:
        _DRAWS.reset(token)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activation(name: str, caller: str) -> Callable[[Array], Array]:
    """The activation that configurations call `name`.

    Raises:
        ValueError: if there is none of this name.

    >>> float(activation("relu", "UNet2DModel")(jnp.array(-1.0)))
    0.0
    """
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ValueError(
            f"`{caller}(act_fn={name!r})` is not known; known: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name.lower()]


def wide(x: Array) -> Array:
    """The same in float32, or in float64 if it was: for statistics, softmax and sines.

    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Nothing(nnx.Module):
    """The identity: a place in a published list (of a dropout, an activation) without parameters.

    >>> float(Nothing()(1.5))
    1.5
    """

    def __call__(self, x: Array) -> Array:
        """`x` itself."""
        return x


class Linear(nnx.Module):
    """y = x W^T + b on the last axis.

    Args:
        num_in, num_out: sizes of that axis.
        bias: whether there is a b.
        rngs: the source of the initial weights.

    >>> layer = Linear(3, 2, rngs=nnx.Rngs(0))
    >>> layer.weight.shape, layer(jnp.ones((4, 3))).shape
    ((2, 3), (4, 2))
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool = True, rngs: nnx.Rngs):
        _check_sizes("Linear", num_in=num_in, num_out=num_out)
        self.weight = initial(_INITIAL, rngs, (num_out, num_in))
        self.bias = nnx.Param(jnp.zeros(num_out)) if bias else None

    def __call__(self, x: Array) -> Array:
        """Of shape (..., num_out), in the dtype of the weights."""
        weight = self.weight[...]
        y = x.astype(weight.dtype) @ weight.T
        return y if self.bias is None else y + self.bias[...]


class Conv(nnx.Module):
    """A convolution of one image (H, W, C) with zeros around it.

    Args:
        num_in, num_out: channels.
        size: of the kernel.
        stride: of both axes.
        padding: zeros around the image, as in `nn.convolve`; PyTorch's padding is symmetric, also
            with a stride.  None keeps the size: (size - 1) // 2.
        bias: whether there is one.
        rngs: the source of the initial kernel.

    >>> layer = Conv(3, 8, stride=2, rngs=nnx.Rngs(0))
    >>> layer.weight.shape, layer(jnp.ones((6, 6, 3))).shape
    ((3, 3, 3, 8), (3, 3, 8))
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        size: int = 3,
        stride: int = 1,
        padding: int | Sequence[tuple[int, int]] | None = None,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        _check_sizes("Conv", num_in=num_in, num_out=num_out, size=size)
        self.weight = initial(_INITIAL_CONV, rngs, (size, size, num_in, num_out))
        self.bias = nnx.Param(jnp.zeros(num_out)) if bias else None
        self.stride = stride
        whole = (size - 1) // 2 if padding is None else padding
        self.padding = whole if isinstance(whole, int) else tuple((a, b) for a, b in whole)

    def __call__(self, x: Array) -> Array:
        """(H', W', num_out), in the dtype of the weights."""
        weight = self.weight[...]
        y = convolve(x.astype(weight.dtype), weight, stride=self.stride, padding=self.padding)
        return y if self.bias is None else y + self.bias[...]


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018, 1803.08494) of (..., C), over all axes and one group.

    Args:
        num_groups: a divisor of the channels.
        width: channels.
        eps: added to the variance.
        affine: whether there are weight and bias.

    Raises:
        ValueError: if the channels do not divide into groups.

    >>> norm = GroupNorm(2, 4)
    >>> norm(jnp.arange(16.0).reshape(2, 2, 4)).std().round(3)
    Array(1., dtype=float32)
    """

    def __init__(self, num_groups: int, width: int, *, eps: float = 1e-5, affine: bool = True):
        if num_groups < 1 or width % num_groups:
            raise ValueError(
                f"`GroupNorm(num_groups={num_groups}, width={width})`: the channels do not divide "
                "into these groups; check `norm_num_groups` against `block_out_channels`."
            )
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine else None

    def _over_group(self, x: Array) -> Array:
        """For each channel, the mean over the pixels of its group."""
        of_group = jnp.mean(x, tuple(range(x.ndim - 1))).reshape(self.num_groups, -1).mean(1)
        return jnp.repeat(of_group, x.shape[-1] // self.num_groups)

    def __call__(self, x: Array) -> Array:
        """The normalised array, in x's dtype."""
        x_wide = wide(x)
        centred = x_wide - self._over_group(x_wide)
        scale = jax.lax.rsqrt(self._over_group(centred**2) + self.eps)
        if self.weight is None or self.bias is None:
            return (centred * scale).astype(x.dtype)
        return (centred * (scale * self.weight[...]) + self.bias[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis.

    Args:
        width: its size.
        eps: added to the variance.
        affine: whether there are weight and bias.
        bias: whether there is a bias beside the weight.

    >>> LayerNorm(3)(jnp.array([1.0, 2.0, 3.0])).round(3)
    Array([-1.225,  0.   ,  1.225], dtype=float32)
    """

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine and bias else None

    def __call__(self, x: Array) -> Array:
        """The normalised array, in x's dtype."""
        x_wide = wide(x)
        centred = x_wide - jnp.mean(x_wide, -1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.eps)
        y = y if self.weight is None else y * self.weight[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors.

    Args:
        num: of vectors.
        size: of each.
        rngs: the source of the initial table.

    >>> Embedding(5, 3, rngs=nnx.Rngs(0))(jnp.array([0, 4])).shape
    (2, 3)
    """

    def __init__(self, num: int, size: int, *, rngs: nnx.Rngs):
        _check_sizes("Embedding", num=num, size=size)
        self.weight = initial(jax.random.normal, rngs, (num, size))

    def __call__(self, index: Array) -> Array:
        """The vectors of these indices, (..., size)."""
        return jnp.take(self.weight[...], jnp.asarray(index), axis=0)


def _attend(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    # Heads first: XLA's CPU backend takes several times as long for heads in the middle, once
    # there is a batch before them.
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    scores = wide(q @ jnp.swapaxes(k, 1, 2))
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    return jnp.swapaxes(weights.astype(v.dtype) @ v, 0, 1)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    bias: Array | None = None,
    chunk: int | None = None,
) -> Array:
    r"""softmax(scale Q K^T + bias) V for each head, the softmax in float32.

    With `chunk`, that many queries at a time, each chunk computed again in a gradient: the scores
    in memory are (heads, chunk, L_k) instead of (heads, L_q, L_k), in every derivative; the answer
    is the same.

    Args:
        q: (L_q, heads, d).
        k, v: (L_k, heads, d).
        scale: d^{-1/2} if not given.
        bias: added to the scores, broadcast to (heads, L_q, L_k); -inf where a query must not look.
        chunk: queries at a time; None for all.

    Returns:
        (L_q, heads, d).

    Raises:
        ValueError: if `chunk` is less than 1.

    >>> q = jnp.ones((5, 2, 3))
    >>> bool(jnp.allclose(attend(q, q, q, chunk=2), attend(q, q, q)))
    True
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"`attend(chunk={chunk})` must be at least 1, or None for all queries.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    length = q.shape[0]
    if chunk is None or length <= chunk:
        return _attend(q, k, v, bias, scale)
    num = -(-length // chunk)
    rest = num * chunk - length  # queries of zeros, whose answers are dropped
    queries = jnp.pad(q, ((0, rest), (0, 0), (0, 0))).reshape(num, chunk, *q.shape[1:])
    one = jax.checkpoint(functools.partial(_attend, scale=scale))
    if bias is None:
        found = jax.lax.map(lambda part: one(part, k, v, None), queries)
    else:
        whole = jnp.broadcast_to(bias, (*bias.shape[:-2], length, k.shape[0]))
        whole = jnp.pad(whole, [(0, 0)] * (whole.ndim - 2) + [(0, rest), (0, 0)])
        parts = jnp.moveaxis(whole.reshape(*whole.shape[:-2], num, chunk, k.shape[0]), -3, 0)
        found = jax.lax.map(lambda part: one(part[0], k, v, part[1]), (queries, parts))
    return found.reshape(num * chunk, *v.shape[1:])[:length]
