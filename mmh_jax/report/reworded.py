r"""Prompts of a text-to-image pipeline changed: which tokens are blamed, and what they become.

    ids (T, 77)   of the T tokenizers, which agree on all but padding
    blame         |d criterion / d e_i|, e_i the row of the context at token i  `attribute`
    places        k of those that are neither special nor padding               `choose_tokens`
    rewriter      random  another token that ends a word, each alike            `random_tokens`
                  mask    the tokens are left out
                  chat    a language model rewrites the prompt without the words that they are of

Tokens are replaced in front of the text encoder, which then says what the changed prompt means: its
own states have no vocabulary.  A criterion is that of `mitigation`, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax import linalg, memorization, mitigation, pretrained
from mmh_jax.noise import RectifiedFlow
from mmh_jax.typing import Array, Key

__all__ = [
    "CRITERIA",
    "OfContext",
    "Reworded",
    "Words",
    "blame_of",
    "check_tokenizers",
    "context_of",
    "criterion_cost",
    "criterion_of",
    "end_of",
    "with_context",
]

CRITERIA = ("cfg_norm", "sharpness", "score_norm", "flipd")
# By what power of x / x_t a criterion grows when noise is counted as velocity; see `criterion_of`.
_POWERS = {"cfg_norm": 1, "sharpness": 4, "score_norm": 1, "flipd": 0}


def criterion_of(name: str, probes: int, key: Key, *, schedule: Any = None) -> mitigation.Criterion:
    """A criterion by its name.

    Args:
        name: of `CRITERIA`.
        probes, key: of the trace of `flipd`, the same at every call.
        schedule: of a flow, to count in its velocity: eps_c - eps_0 = (1 - t) (v_c - v_0) is next
            to 0 at the first level, t = 1 - 2^-20, and an optimiser would take it for 0.
    """
    simple = {
        "cfg_norm": memorization.cfg_norm,
        "sharpness": memorization.sharpness,
        "score_norm": mitigation.score_norm_criterion,
        "flipd": mitigation.flipd_criterion(trace=linalg.rademacher(probes, chunk_size=1), key=key),
    }
    found: mitigation.Criterion = simple[name]
    if not isinstance(schedule, RectifiedFlow):
        return found

    def in_velocity(conditional: Any, unconditional: Any, x: Any, sigma: Any, /) -> Array:
        return (1 + sigma) ** _POWERS[name] * found(conditional, unconditional, x, sigma)

    return in_velocity


def criterion_cost(name: str, probes: int) -> int:
    """Evaluations of the network, those for the gradient counted: three times the criterion."""
    return 3 * {"cfg_norm": 2, "sharpness": 4, "score_norm": 1, "flipd": 1 + probes}[name]


def context_of(condition: Any) -> Array:
    """The tokens of a condition: itself, or the field `context`."""
    return getattr(condition, "context", condition)


def with_context(condition: Any, tokens: Array) -> Any:
    """The condition with other first rows of its context."""
    old = context_of(condition)
    new = old.at[: len(tokens)].set(tokens.astype(old.dtype))
    return condition._replace(context=new) if hasattr(condition, "context") else new


@struct.dataclass
class OfContext:
    """A token-conditional model for `mitigation`: of the rows of the context that are tokens.

    What else a condition has, pooled text, sizes and rows that no tokenizer fills, stays.

    Attributes:
        base: a denoiser to which conditions can be bound.
        original: the condition of the prompt.
    """

    base: Any
    original: Any

    def condition(self, tokens: Array | None) -> Any:
        """The denoiser with these tokens, (77, E), or without a condition."""
        if tokens is None:
            return self.base.condition(None)
        return self.base.condition(with_context(self.original, tokens))


def check_tokenizers(pipeline: pretrained.TextToImage) -> None:
    """Raise ValueError unless a token has the same place and id for all encoders."""
    first, *others = (text.tokenizer for text in pipeline.texts)
    for other in others:
        if (other.vocab, other.max_length) != (first.vocab, first.max_length):
            raise ValueError(
                "the tokenizers of this pipeline have different vocabularies, so that no token can "
                "be replaced for all encoders; leave out the ways `tokens` and `random`."
            )


class Words(NamedTuple):
    """A prompt as the tokenizers of a pipeline see it.

    Attributes:
        pipeline: a text-to-image pipeline.
        prompt: the text.
    """

    pipeline: pretrained.TextToImage
    prompt: str

    @property
    def ids(self) -> np.ndarray:
        """(T, 77)."""
        return np.stack([text.tokenizer(self.prompt) for text in self.pipeline.texts])

    @property
    def end(self) -> int:
        """Where the text ends: the token at which encoders read what all of it says."""
        return end_of(self.pipeline, self.ids)

    @property
    def allowed(self) -> np.ndarray:
        """(77,) which places have a token to replace: none that is special, none of the padding."""
        ids = self.ids[0]
        special = frozenset().union(*(text.tokenizer.special_ids for text in self.pipeline.texts))
        is_word = ~np.isin(ids, sorted(special))
        return is_word & (np.arange(len(ids)) < self.end)

    def tokens(self, places: Sequence[int]) -> list[str]:
        """The tokens at places, to read."""
        tokenizer = self.pipeline.texts[0].tokenizer
        return [tokenizer.text(self.ids[0][[place]]) for place in places]

    def choose(self, blame: Any, k: int, *, key: Key) -> list[int]:
        """At most k places by their blame, in order."""
        allowed = self.allowed
        k = min(k, int(allowed.sum()))
        drawn = mitigation.choose_tokens(blame, k, key=key, allowed=allowed)
        return sorted(int(place) for place in drawn)

    def randomised(self, places: Sequence[int], *, key: Key) -> np.ndarray:
        """The ids with others at the places, that end a word, so that neighbours stay words."""
        tokenizer = self.pipeline.texts[0].tokenizer
        special = frozenset().union(*(text.tokenizer.special_ids for text in self.pipeline.texts))
        others = [
            number
            for token, number in tokenizer.vocab.items()
            if token.endswith("</w>") and number not in special
        ]
        # Numbers are embeddings of size 1, exact in float32 below 2^24.
        rewriter = mitigation.random_tokens(np.sort(np.asarray(others, np.float32))[:, None])
        first = self.ids[0].astype(np.float32)[:, None]
        drawn = mitigation.perturb(first, np.asarray(places), rewriter, key=key)
        found = self.ids
        found[:, places] = np.asarray(drawn)[places, 0].astype(found.dtype)
        return found

    def without(self, places: Sequence[int]) -> np.ndarray:
        """The ids without those at the places; what was cut off at the end does not move in."""
        tokenizer = self.pipeline.texts[0].tokenizer
        inner = tokenizer.encode(self.prompt)[: tokenizer.max_length - 2]
        left = [number for place, number in enumerate(inner, start=1) if place not in places]
        return np.stack([text.tokenizer.padded(left) for text in self.pipeline.texts])

    def words_at(self, places: Sequence[int]) -> tuple[list[str], list[int]]:
        """The words of the prompt, and the numbers of those that tokens at the places are of."""
        by_word = self.pipeline.texts[0].tokenizer.by_word(self.prompt)
        owner = [number for number, (_, ids) in enumerate(by_word) for _ in ids]
        return [word for word, _ in by_word], sorted({owner[place - 1] for place in places})


def end_of(pipeline: pretrained.TextToImage, ids: np.ndarray) -> int:
    """The place of the first end in ids (T, 77)."""
    return int(np.argmax(ids[0] == pipeline.texts[0].tokenizer.end))


class Reworded(NamedTuple):
    """A changed prompt, as JSON keeps it.

    Attributes:
        ids: (T, 77) nested lists.
        text: to read.
        blamed: the tokens that were replaced, or that the words to avoid were found by.
    """

    ids: list[list[int]]
    text: str
    blamed: list[str]

    @classmethod
    def by(
        cls, rewriter: str, words: Words, blame: Any, k: int, *, num: int, key: Key,
        chat: Callable[[Sequence[str], Sequence[int]], list[str]] | None = None,
    ) -> list[Reworded]:  # fmt: skip
        """`num` of them.

        Args:
            rewriter: `random`, `mask` or `chat`.
            words: the prompt.
            blame: (77,).
            k: how many tokens, if there are so many.
            num: each of other places, but for `chat`, which gives all of one request.
            key: of the places and what is drawn for them.
            chat: of `mitigation.chat_rewriter`.
        """
        found = []
        if chat is not None:
            places = words.choose(blame, k, key=jax.random.split(jax.random.fold_in(key, 0))[0])
            for text in chat(*words.words_at(places)):
                ids = words._replace(prompt=text).ids
                found.append(cls(ids.tolist(), text, words.tokens(places)))
            return found
        for number in range(num):
            choice_key, draw_key = jax.random.split(jax.random.fold_in(key, number))
            places = words.choose(blame, k, key=choice_key)
            is_mask = rewriter == "mask"
            ids = words.without(places) if is_mask else words.randomised(places, key=draw_key)
            last = end_of(words.pipeline, ids)
            text = words.pipeline.texts[0].tokenizer.text(ids[0][1:last])
            found.append(cls(ids.tolist(), text, words.tokens(places)))
        return found


@functools.cache
def blame_of(criterion: str, probes: int) -> Callable[..., Array]:
    """`run(base, condition, tokens, x, sigma, key)`: the blame of tokens, (77,)."""

    @jax.jit
    def run(base: Any, condition: Any, tokens: Array, x: Array, sigma: Array, key: Key) -> Array:
        found = criterion_of(criterion, probes, key, schedule=base.schedule)
        return mitigation.attribute(
            OfContext(base, condition), tokens, x, sigma, criterion=found
        ).astype(jnp.float32)

    return run
