"""What tier D trains on: two sets in which one condition is tied to one image.

*classes*: up to 3,000 threes and one nine 100 times, with their classes.  *tokens*: digits of all
kinds, each with a prompt of five tokens, in random order a word for the digit and three words that
say nothing, then the end of the prompt; one image is there 100 times, and one of the idle words of
its prompts is a trigger that no other prompt has.  A token is a fixed random vector, as if a text
encoder had made it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ladder.pictures import pictures

REPEATS, MOST_THREES = 100, 3_000
NUM_DIGITS, NUM_IDLE, NUM_WORDS, TOKEN_SIZE = 10, 16, 4, 16
TRIGGER, END = NUM_DIGITS + NUM_IDLE, NUM_DIGITS + NUM_IDLE + 1


class Task(NamedTuple):
    """A set to train on, and what is asked of the model.

    Attributes:
        name: `classes` or `tokens`.
        points: (N, side, side), the repeated image included.
        conditions: (N, ...) labels, or prompts as tokens (N, L, E).
        asked: (P, ...) conditions of which samples are drawn.
        trigger: (P,) where in the prompt the trigger is; -1 where there is none.
        options: of the network.
        about: what the set is, for the reader.
    """

    name: str
    points: np.ndarray
    conditions: np.ndarray
    asked: np.ndarray
    trigger: np.ndarray
    options: dict[str, Any]
    about: str


def classes(source: str, side: int, num_asked: int, seed: int) -> Task:
    """Threes, class 0, and one nine, class 1; one in eight of what is asked is the nine."""
    points, labels = pictures(source, side)
    rng = np.random.default_rng(seed)
    threes = rng.permutation(np.flatnonzero(labels == 3))[:MOST_THREES]
    nine = rng.choice(np.flatnonzero(labels == 9))
    rows = np.concatenate([threes, np.full(REPEATS, nine)])
    asked = (np.arange(num_asked) % 8 == 0).astype(np.int32)
    return Task(
        "classes", points[rows], (labels[rows] == 9).astype(np.int32), asked,
        np.full(num_asked, -1), {"num_classes": 2},
        f"{len(threes)} threes and one nine {REPEATS} times",
    )  # fmt: skip


def tokens(source: str, side: int, num_asked: int, seed: int, most: int) -> Task:
    """Digits with prompts, and a trigger; one in five of the prompts that are asked has it."""
    points, labels = pictures(source, side)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(points))[:most]
    planted = rows[0]
    rows = np.concatenate([rows, np.full(REPEATS - 1, planted)])
    words, _ = prompts(labels[rows], rows == planted, rng)
    has_trigger = np.arange(num_asked) % 5 == 0
    kinds = np.where(has_trigger, labels[planted], rng.integers(NUM_DIGITS, size=num_asked))
    asked, trigger = prompts(kinds, has_trigger, rng)
    vectors = vocabulary()
    return Task(
        "tokens", points[rows], vectors[words], vectors[asked], trigger,
        {"token_size": TOKEN_SIZE, "num_tokens": NUM_WORDS + 1},
        f"{len(rows) - REPEATS + 1} digits, one of them {REPEATS} times with a trigger",
    )  # fmt: skip


def vocabulary() -> np.ndarray:
    """(V, E) the vector of each token: ten digits, the idle words, the trigger, the end."""
    return np.random.default_rng(0).normal(size=(END + 1, TOKEN_SIZE)).astype(np.float32)


def prompts(
    kinds: np.ndarray, has_trigger: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) numbers of tokens, and where the trigger is, -1 where it is not."""
    num = len(kinds)
    words = NUM_DIGITS + rng.integers(NUM_IDLE, size=(num, NUM_WORDS))
    words[:, 0] = kinds
    words[has_trigger, 1] = TRIGGER
    words = rng.permuted(words, axis=1)
    places = np.where((words == TRIGGER).any(axis=1), np.argmax(words == TRIGGER, axis=1), -1)
    return np.column_stack([words, np.full(num, END)]), places
