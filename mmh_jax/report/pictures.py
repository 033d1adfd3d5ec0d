"""The points that an audit scores: distinct ones of a source, each with what was done with it."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

from mmh_jax import memorization
from mmh_jax.data.splits import deduplicated

__all__ = ["Pictures", "Role", "scored_pictures"]


class Role(enum.IntEnum):
    """What a point is to an audit."""

    JUDGED = 0
    HELD_OUT = 1
    PLANTED = 2

    @property
    def title(self) -> str:
        """As in `points.csv`."""
        return ("judged", "held out", "planted")[self.value]


class Pictures(NamedTuple):
    """P distinct points, in the order of their rows; those that are held out may be of elsewhere.

    Attributes:
        points: (P, *shape).
        rows: (P,) the first row of each in the source; of points of another source, which are held
            out, that row counted on from the last of the source.
        copies: (P,) how many rows of the source are equal to it.
        planted: (P,) how many rows of the training set are, for positive controls; else 0.
        role: (P,) codes of `Role`.
    """

    points: np.ndarray
    rows: np.ndarray
    copies: np.ndarray
    planted: np.ndarray
    role: np.ndarray

    @property
    def is_judged(self) -> np.ndarray:
        """(P,) whether a point is one of the data that are asked about."""
        return self.role == Role.JUDGED

    @property
    def is_repeated(self) -> np.ndarray:
        """(P,) whether a point occurs more than once in the source."""
        return self.copies > 1


def scored_pictures(
    points: np.ndarray,
    controls: memorization.Controls | None,
    num_judged: int,
    *,
    seed: int,
    held_out: np.ndarray | None = None,
) -> Pictures:
    """The points to score: controls, repeated points, and others at random up to a number.

    Args:
        points: (N, *shape), the source.
        controls: of the source; None if the model is given.
        num_judged: of the points that are no controls, at most.
        seed: of the choice.
        held_out: (H, *shape) points of another source that no model saw, if there are.
    """
    unique = deduplicated(points)
    num = len(unique.first)
    role, planted = np.zeros(num, int), np.zeros(num, int)
    if controls is not None:
        role[unique.cluster[controls.held_out]] = Role.HELD_OUT
        role[unique.cluster[controls.planted]] = Role.PLANTED
        planted[unique.cluster[controls.planted]] = controls.counts
    candidates = np.random.default_rng(seed).permutation(np.flatnonzero(role == Role.JUDGED))
    # Stable: repeated ones first, at random among themselves.
    candidates = candidates[np.argsort(unique.counts[candidates] < 2, kind="stable")]
    kept = np.sort(np.concatenate([candidates[:num_judged], np.flatnonzero(role)]))
    found = Pictures(
        unique.points[kept], unique.first[kept], unique.counts[kept], planted[kept], role[kept]
    )
    if held_out is None:
        return found
    others = deduplicated(held_out)
    own = {point.tobytes() for point in unique.points + 0}
    apart = np.array([(point + 0).tobytes() not in own for point in others.points], bool)
    if not apart.any():
        raise ValueError("--held-out: all its points are among those of the source.")
    more = Pictures(
        others.points[apart],
        len(points) + others.first[apart],
        np.ones(int(apart.sum()), int),
        np.zeros(int(apart.sum()), int),
        np.full(int(apart.sum()), int(Role.HELD_OUT)),
    )
    return Pictures(*(np.concatenate(pair) for pair in zip(found, more, strict=True)))
