r"""Changing chosen tokens of a prompt: masked, drawn at random, or the nearest others.

A *rewriter* is called as `rewriter(tokens, places, key=key)` with the embeddings (L, E) of a prompt
and the k places to change, and returns embeddings (L, E).  With a vocabulary v_1, ..., v_V,

    mask       e_i becomes one fixed vector, such as that of padding
    random     e_i becomes v_j, j uniform over the others: the baseline of any choice of words
    nearest    e_i becomes the v_j != e_i for which |v_j - e_i| is least, the smallest change that
               is still a token

Embeddings are those of the table in front of a text encoder, or of a model whose tokens are read
from a table; what an encoder puts out has no vocabulary, and only a mask.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.mitigation.attribution import check_tokens
from mmh_jax.typing import Array, ArrayLike, Key, check_key, is_traced

__all__ = ["Rewriter", "mask", "nearest_tokens", "perturb", "random_tokens"]


class Rewriter(Protocol):
    """From the tokens of a prompt to other tokens at some places."""

    def __call__(self, tokens: Array, places: Array, *, key: Key | None) -> Array:
        """(L, E) from (L, E) and (k,) places; what is elsewhere does not count."""
        ...


@struct.dataclass
class _Mask:
    vector: Array

    def __call__(self, tokens: Array, places: Array, *, key: Key | None) -> Array:
        if self.vector.shape != tokens.shape[1:]:
            raise ValueError(
                f"`mask(vector=...)` has shape {self.vector.shape}; these tokens have "
                f"{tokens.shape[1:]}."
            )
        return tokens.at[places].set(self.vector.astype(tokens.dtype))


@struct.dataclass
class _Random:
    vocabulary: Array

    def __call__(self, tokens: Array, places: Array, *, key: Key | None) -> Array:
        vocabulary = _fitting("random_tokens", self.vocabulary, tokens)
        otherwise = ", or take `nearest_tokens`, which draws nothing"
        keys = jax.random.split(check_key("random_tokens", key, otherwise=otherwise), len(places))

        def drawn(at: tuple[Array, Array]) -> Array:
            token, own_key = at
            is_other = jnp.any(vocabulary != token, axis=1)
            return vocabulary[jax.random.categorical(own_key, jnp.where(is_other, 0.0, -jnp.inf))]

        return tokens.at[places].set(jax.lax.map(drawn, (tokens[places], keys)))


@struct.dataclass
class _Nearest:
    vocabulary: Array

    def __call__(self, tokens: Array, places: Array, *, key: Key | None) -> Array:
        vocabulary = _fitting("nearest_tokens", self.vocabulary, tokens)

        def nearest(token: Array) -> Array:
            # Of differences, not by an inner product: its rounding would make a token not itself.
            squared = jnp.sum((vocabulary - token) ** 2, axis=1)
            is_other = jnp.any(vocabulary != token, axis=1)
            return vocabulary[jnp.argmin(jnp.where(is_other, squared, jnp.inf))]

        return tokens.at[places].set(jax.lax.map(nearest, tokens[places]))


def mask(vector: ArrayLike) -> Rewriter:
    """Put one vector in each place.

    Args:
        vector: (E,), such as the embedding of padding.

    >>> perturb(jnp.ones((3, 2)), jnp.array([1]), mask(jnp.zeros(2)), key=None)
    Array([[1., 1.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """
    vector = jnp.asarray(vector)
    if vector.ndim != 1:
        raise ValueError(f"`mask(vector=...)` has shape {vector.shape}; it is one token, (E,).")
    return _Mask(vector)


def random_tokens(vocabulary: ArrayLike) -> Rewriter:
    """Put in each place a token drawn from the vocabulary, each of the others alike.

    Two places may get the same.  Rows that are equal to the token there are not drawn, unless there
    are no others.

    Args:
        vocabulary: (V, E) embeddings, V >= 2.

    Cost: V E comparisons for each place, one place at a time.

    >>> words = jnp.array([[0.0], [1.0]])
    >>> perturb(words, jnp.array([0]), random_tokens(words), key=jax.random.key(0))[:, 0]
    Array([1., 1.], dtype=float32)
    """
    return _Random(_checked_vocabulary("random_tokens", vocabulary))


def nearest_tokens(vocabulary: ArrayLike) -> Rewriter:
    """Put in each place the nearest other token of the vocabulary, by Euclidean distance.

    Args:
        vocabulary: (V, E) embeddings, V >= 2.  Rows that are equal to the token are not others;
            of rows that are equally near, the first.

    Cost: V E differences for each place, one place at a time.

    >>> words = jnp.array([[0.0], [1.0], [3.0]])
    >>> perturb(words, jnp.array([0, 2]), nearest_tokens(words), key=None)[:, 0]
    Array([1., 1., 1.], dtype=float32)
    """
    return _Nearest(_checked_vocabulary("nearest_tokens", vocabulary))


def perturb(tokens: ArrayLike, places: ArrayLike, rewriter: Rewriter, *, key: Key | None) -> Array:
    """The tokens with those at some places rewritten, and all others as they are.

    Args:
        tokens: (L, E) the embeddings of one prompt.
        places: (k,) integers, of `choose_tokens`.
        rewriter: `mask`, `random_tokens`, `nearest_tokens`, or a `Rewriter` of your own.
        key: for a rewriter that draws; None for one that does not.

    Returns:
        (L, E), of the dtype of the tokens; NaN everywhere if a traced place is outside the prompt.

    Raises:
        TypeError: for tokens or places of a wrong dtype, or a drawing rewriter without a key.
        ValueError: for wrong shapes, or a place outside the prompt.

    >>> twice = lambda tokens, places, *, key: 2 * tokens
    >>> perturb(jnp.ones((3, 1)), jnp.array([2, 0]), twice, key=None)[:, 0]
    Array([2., 1., 2.], dtype=float32)
    """
    tokens = check_tokens("perturb", tokens)
    places = _checked_places(places, len(tokens))
    rewritten = jnp.asarray(rewriter(tokens, places, key=key))
    if rewritten.shape != tokens.shape:
        raise ValueError(
            f"`perturb(rewriter=...)` returns shape {rewritten.shape} for tokens of shape "
            f"{tokens.shape}; it returns all tokens, changed at the places."
        )
    is_chosen = jnp.zeros(len(tokens), bool).at[places].set(True)
    result = jnp.where(is_chosen[:, None], rewritten.astype(tokens.dtype), tokens)
    return jnp.where(jnp.all((places >= 0) & (places < len(tokens))), result, jnp.nan)


def _checked_places(places: ArrayLike, length: int) -> Array:
    if not is_traced(places):
        values = np.asarray(places)
        if values.size and not (values.min() >= 0 and values.max() < length):
            raise ValueError(
                f"`perturb(places=...)` is {values}; places are 0 to {length - 1} of this prompt."
            )
    places = jnp.asarray(places)
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise TypeError(
            f"`perturb(places=...)` has dtype {places.dtype}; places are integers, of "
            "`choose_tokens`. For a mask, `jnp.flatnonzero(mask)`."
        )
    if places.ndim != 1:
        raise ValueError(f"`perturb(places=...)` has shape {places.shape}; it takes (k,) places.")
    return places


def _checked_vocabulary(caller: str, vocabulary: ArrayLike) -> Array:
    vocabulary = jnp.asarray(vocabulary)
    if vocabulary.ndim != 2 or len(vocabulary) < 2:
        raise ValueError(
            f"`{caller}(vocabulary=...)` has shape {vocabulary.shape}; it is (V, E) embeddings, at "
            "least 2."
        )
    return vocabulary


def _fitting(caller: str, vocabulary: Array, tokens: Array) -> Array:
    if vocabulary.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"`{caller}(vocabulary=...)` has embeddings of size {vocabulary.shape[1]}; these "
            f"tokens are of size {tokens.shape[1]}."
        )
    return vocabulary.astype(tokens.dtype)
