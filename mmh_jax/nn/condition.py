r"""Conditions of a network: a class label or a sequence of tokens, and the null condition.

A network that is trained with its condition dropped now and then is two models: D(x; sigma, c), and
D(x; sigma) where the condition is null (Ho & Salimans 2022, 2207.12598).  Null is learned: for K
classes it is the label K, for tokens it is a sequence of parameters.  A call without a condition
is a call with null, so `denoiser.condition(None)` is the unconditional model and

    denoise.Guided(denoiser.condition(c), denoiser.condition(None), scale)

the guided one.  In training, with `c` of one example and its own key,

    drop_condition(c, 0.1, key=key, null=null_condition(apply, params))

inside the loss: the learned tokens are parameters, and get their gradient this way.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.nn.functional import Apply
from mmh_jax.typing import Array, ArrayLike, Key, is_traced

__all__ = ["Conditioning", "drop_condition", "null_condition"]


def drop_condition(cond: Any, probability: ArrayLike, *, key: Key, null: Any) -> Any:
    """The condition, or with some probability the null condition: for one example in training.

    Args:
        cond: a label or tokens (any pytree of arrays).
        probability: of null, 0 to 1.
        key: draws once for the whole condition.
        null: of the same structure and shapes; see `null_condition`.

    Raises:
        ValueError: if a concrete probability is not between 0 and 1, or shapes differ.

    >>> keys = jax.random.split(jax.random.key(0), 6)
    >>> jax.vmap(lambda key: drop_condition(3, 0.5, key=key, null=10))(keys).tolist()
    [3, 10, 3, 10, 10, 3]
    """
    if not is_traced(probability) and not 0 <= np.asarray(probability) <= 1:
        raise ValueError(f"`drop_condition(probability={probability})` must be between 0 and 1.")
    for ours, nulls in zip(jax.tree.leaves(cond), jax.tree.leaves(null), strict=True):
        if jnp.shape(ours) != jnp.shape(nulls):
            raise ValueError(
                f"`drop_condition(cond=...)` has shape {jnp.shape(ours)} and null has "
                f"{jnp.shape(nulls)}; one is to stand for the other. Did you mean `jax.vmap`?"
            )
    dropped = jax.random.bernoulli(key, probability)
    return jax.tree.map(lambda ours, nulls: jnp.where(dropped, nulls, ours), cond, null)


def null_condition(apply: Apply, params: Any) -> Any:
    """The null condition of a network: the label after the last, or the learned tokens.

    Args:
        apply, params: of a conditional network, as `split` made them.

    Raises:
        ValueError: if the network takes no condition.

    >>> from mmh_jax import nn
    >>> network = nn.UNet((8, 8, 1), width=8, multipliers=(1, 2), num_classes=10, rngs=nnx.Rngs(0))
    >>> null_condition(*nn.split(network))
    10
    """
    network = nnx.merge(apply.graph, params)
    conditioning = getattr(network, "conditioning", None)
    null = None if conditioning is None else conditioning.null
    if null is None:
        raise ValueError(
            "`null_condition(apply=...)` is of a network without conditions; build it with "
            "`num_classes=` or `token_size=`."
        )
    return null


class Conditioning(nnx.Module):
    """What a network does with its condition: a vector for its embedding, or tokens to attend to.

    Args:
        width: the size of the vector for a label.
        num_classes: labels 0 to num_classes - 1, and num_classes for null; None for no labels.
        token_size: the size E of a token; None for no tokens.  Labels or tokens, not both.
        num_tokens: the length of the learned null sequence.
        rngs: the source of the initial values.

    >>> labels = Conditioning(4, num_classes=3, rngs=nnx.Rngs(0))
    >>> vector, tokens = labels(2)
    >>> vector.shape, tokens, labels.null
    ((4,), None, 3)
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int | None = None,
        token_size: int | None = None,
        num_tokens: int = 1,
        rngs: nnx.Rngs,
    ):
        if num_classes is not None and token_size is not None:
            raise ValueError(
                "`num_classes=` and `token_size=` are both given; a network is conditioned on "
                "labels or on tokens. Make the label one of the tokens."
            )
        for name, value in {"num_classes": num_classes, "token_size": token_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1, or None.")
        if num_tokens < 1:
            raise ValueError(f"`num_tokens={num_tokens}` must be at least 1.")
        self.num_classes, self.token_size, self.num_tokens = num_classes, token_size, num_tokens
        rows = (0 if num_classes is None else num_classes + 1, width)
        self.labels = (
            None if num_classes is None else nnx.Param(jax.random.normal(rngs.params(), rows))
        )
        self.null_tokens = (
            None
            if token_size is None
            else nnx.Param(jax.random.normal(rngs.params(), (num_tokens, token_size)))
        )

    @property
    def null(self) -> Any:
        """The null condition: a label, tokens, or None where there are no conditions."""
        return self.num_classes if self.null_tokens is None else self.null_tokens[...]

    def __call__(self, cond: Any = None) -> tuple[Array | None, Array | None]:
        """`(vector, tokens)` of a condition, of which one or both are None; null for None."""
        if self.labels is not None:
            label = _checked_label(self.null if cond is None else cond, self.num_classes)
            return self.labels[...].at[label].get(mode="fill", fill_value=jnp.nan), None
        if self.null_tokens is not None:
            return None, self.null if cond is None else _checked_tokens(cond, self.token_size)
        if cond is not None:
            raise ValueError(
                "`network(cond=...)` was given to a network without conditions; build it with "
                "`num_classes=` or `token_size=`, or call it without."
            )
        return None, None


def _checked_label(cond: Any, num_classes: Any) -> Array:
    label = jnp.asarray(cond)
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(
            f"`network(cond=...)` has dtype {label.dtype}; this network takes a label, an integer."
        )
    if label.ndim != 0:
        raise ValueError(
            f"`network(cond=...)` has shape {label.shape}; it takes one label for one example. "
            "Did you mean `jax.vmap`?"
        )
    if not is_traced(cond) and not 0 <= int(cond) <= num_classes:
        raise ValueError(
            f"`network(cond={int(cond)})` is no label of this network; it knows 0 to "
            f"{num_classes - 1}, and {num_classes} for the null condition."
        )
    # A traced label cannot be looked at: outside the range it becomes NaN, never another label.
    return jnp.where((label < 0) | (label > num_classes), num_classes + 1, label)


def _checked_tokens(cond: Any, token_size: Any) -> Array:
    tokens = jnp.asarray(cond)
    if tokens.ndim != 2 or tokens.shape[1] != token_size or tokens.shape[0] == 0:
        raise ValueError(
            f"`network(cond=...)` has shape {tokens.shape}; it takes tokens (L, {token_size}). "
            + ("Did you mean `jax.vmap`?" if tokens.ndim == 3 else "Project them to that size.")
        )
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(
            f"`network(cond=...)` has dtype {tokens.dtype}; tokens are embeddings, real numbers."
        )
    return tokens
