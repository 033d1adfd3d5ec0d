r"""What image networks are made of: normalisation, attention, the embedding of the noise level.

    group norm   y = (x - mean_g) / sqrt(var_g + eps) * scale + bias, over pixels and one group
    attention    y = softmax(Q K^T / sqrt(d)) V    for each head of size d

Statistics and softmax are in float32 at least, whatever the network computes in.  All of it is
for one example: (H, W, C), or a sequence (L, C).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.nn.functional import Apply
from mmh_jax.nn.mlp import sinusoidal_embedding
from mmh_jax.typing import Array, Key

__all__ = ["Attention", "Features", "GroupNorm", "NoiseEmbedding", "features"]


class Features(NamedTuple):
    """What a network computed inside, for one example.

    Attributes:
        bottleneck: (h, w, C), the features in its middle.
        cross_attention: for each layer with tokens, from first to last, (heads, h, w, L): how much
            each pixel of the feature map looks at each token, with sum 1 over the tokens.
    """

    bottleneck: Array
    cross_attention: tuple[Array, ...]


def features(
    apply: Apply, params: Any, x: Array, c_noise: Array, cond: Any = None
) -> tuple[Array, Features]:
    """The answer of a network for one example, and what is inside: one evaluation for both.

    A pure function, for `jax.jit` and `jax.vmap`; what is not used of it is not computed.

    Args:
        apply, params: of a `UNet` or a `DiT`, as `split` made them.
        x, c_noise, cond: as for the network.

    Raises:
        TypeError: if the network has no features to show.

    >>> from mmh_jax import nn
    >>> network = nn.UNet((8, 8, 1), width=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
    >>> answer, inside = features(*nn.split(network), jnp.ones((8, 8, 1)), 0.0)
    >>> answer.shape, inside.bottleneck.shape
    ((8, 8, 1), (4, 4, 16))
    """
    network = nnx.merge(apply.graph, params)
    read = getattr(network, "features", None)
    if read is None:
        raise TypeError(
            f"`features(apply=...)` is of a {type(network).__name__}, which shows no features; "
            "`UNet` and `DiT` do."
        )
    return read(x, c_noise, cond)


def compute_dtype(caller: str, dtype: str | None) -> Any:
    """The floating dtype of a name, or None for that of the input."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"`{caller}(dtype={dtype!r})` is no floating dtype; choose 'float32' or 'bfloat16'."
        )
    return found


def heads_of(caller: str, width: int, num_heads: int | None, head_size: int | None) -> int:
    """The number of heads for a width, from the number or the size of them."""
    if num_heads is not None and head_size is not None:
        raise ValueError(f"`{caller}` was given both num_heads and head_size; give one.")
    heads = num_heads or 1
    if head_size is not None:
        heads = max(1, width // head_size) if head_size > 0 else 0
    if heads < 1 or width % heads or (head_size and width > head_size and width % head_size):
        raise ValueError(
            f"`{caller}`: {width} channels do not divide into heads (num_heads={num_heads}, "
            f"head_size={head_size}); choose a divisor."
        )
    return heads


def checked_point(caller: str, x: Array, shape: tuple[int, ...]) -> Array:
    """One example of the network's shape, or what is wrong with it."""
    x = jnp.asarray(x)
    if x.shape != shape:
        cure = "Did you mean `jax.vmap`?" if x.shape[1:] == shape else "Pass one such point."
        raise ValueError(f"`{caller}(x=...)` has shape {x.shape}; it takes {shape}. {cure}")
    return x


def with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W, C); a grey image (H, W) has one channel."""
    return (*shape, 1) if len(shape) == 2 else shape


def at_least_float32(x: Array) -> Array:
    """The same in float32, or in float64 if it was."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dropped_out(h: Array, rate: float, key: Key | None) -> Array:
    """Zeros with probability `rate`, the rest scaled up; h itself without a key."""
    if key is None or rate == 0:
        return h
    kept = jax.random.bernoulli(key, 1 - rate, h.shape)
    return jnp.where(kept, h / (1 - rate), 0)


def call(module: Any, *inputs: Any, remat: bool) -> Any:
    """`module(*inputs)`; with `remat`, what is inside is computed again for the gradient."""
    if not remat:
        return module(*inputs)
    graph, params = nnx.split(module)
    return jax.checkpoint(lambda params, *inputs: nnx.merge(graph, params)(*inputs))(
        params, *inputs
    )


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018, 1803.08494) of one image (H, W, C).

    NNX's own takes the first axis for a batch, and is wrong on one image.

    Args:
        width: channels; the groups are the most, up to 32, that divide them and hold at least 4
            channels each (Karras et al. 2022).
        eps: added to the variance.

    >>> GroupNorm(96).num_groups, GroupNorm(36).num_groups, GroupNorm(6).num_groups
    (24, 9, 1)
    """

    def __init__(self, width: int, *, eps: float = 1e-5):
        most = max(1, min(32, width // 4))
        self.num_groups = max(n for n in range(1, most + 1) if width % n == 0)
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def _over_group(self, x: Array) -> Array:
        """For each channel, the mean over the pixels of its group."""
        of_group = jnp.mean(x, (0, 1)).reshape(self.num_groups, -1).mean(1)
        return jnp.repeat(of_group, x.shape[2] // self.num_groups)

    def __call__(self, x: Array) -> Array:
        """The normalised image, in x's dtype."""
        wide = at_least_float32(x)
        centred = wide - self._over_group(wide)
        spread = jax.lax.rsqrt(self._over_group(centred**2) + self.eps)
        return (centred * (spread * self.scale[...]) + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to a context.

    Args:
        width: C, of the sequence.
        num_heads: a divisor of it.
        context_size: E, of the context; None for attention to itself.
        zero: whether the last layer, and so the answer, starts at zero.
        dtype: of the computation, as in `Conv`.
        rngs: the source of the initial weights.

    >>> attend = Attention(8, 2, context_size=5, rngs=nnx.Rngs(0))
    >>> answer, weights = attend(jnp.ones((6, 8)), jnp.ones((3, 5)))
    >>> answer.shape, weights.shape
    ((6, 8), (2, 6, 3))
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        context_size: int | None = None,
        zero: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dtype = dtype
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key_value = nnx.Linear(context_size or width, 2 * width, dtype=dtype, rngs=rngs)
        initial = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.leave = nnx.Linear(width, width, kernel_init=initial, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, context: Array | None = None) -> tuple[Array, Array]:
        """`(answer, weights)`: (L, C), and (heads, L, length of the context) in float32."""
        context = h if context is None else context
        q = self.query(h).reshape(h.shape[0], self.num_heads, -1)
        k, v = jnp.split(self.key_value(context), 2, axis=-1)
        k, v = (value.reshape(context.shape[0], self.num_heads, -1) for value in (k, v))
        # Heads first: in the middle they take XLA's CPU backend several times as long.
        q, k, v = (jnp.swapaxes(value, 0, 1) for value in (q, k, v))
        scores = at_least_float32(q @ jnp.swapaxes(k, 1, 2)) / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores, axis=-1)
        answer = jnp.swapaxes(weights.astype(v.dtype) @ v, 0, 1)
        return self.leave(answer.reshape(h.shape)), weights


class NoiseEmbedding(nnx.Module):
    """An embedding of the noise level, with that of a label added to it.

    Args:
        width: its size.
        dtype: of the answer; the sines are in float32.
        rngs: the source of the initial weights.

    >>> NoiseEmbedding(16, rngs=nnx.Rngs(0))(jnp.array(0.3)).shape
    (16,)
    """

    def __init__(self, width: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.dtype = dtype
        self.inner = nnx.Linear(64, width, rngs=rngs)
        self.outer = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, c_noise: Array, label: Array | None = None) -> Array:
        """silu(W_2 silu(W_1 e(c_noise)) + label)."""
        c_noise = at_least_float32(jnp.asarray(c_noise, jnp.result_type(c_noise, float)))
        found = self.outer(nnx.silu(self.inner(sinusoidal_embedding(c_noise, 64))))
        found = nnx.silu(found if label is None else found + label)
        return found if self.dtype is None else found.astype(self.dtype)
