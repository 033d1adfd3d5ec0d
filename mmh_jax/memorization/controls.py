r"""Controls of an audit: what it would have found, and what it would have found by chance.

*Negative control*: pictures held out, which no model was trained on.  If a model treats x as it
treats them, the score of x and theirs are exchangeable, and

    p(x) = (1 + how many scores of the control are at least that of x) / (1 + size of the control)

has P(p <= a) <= a for every a (Vovk et al. 2005; Bates et al. 2023, 2104.08279, who prove that the
procedure of Benjamini and Hochberg then holds the false discovery rate, the p-values sharing one
control).  The least p-value is 1 / (1 + size): with k memorized points among M nothing can be
discovered at a rate q unless the control has M / (q k) scores.

*Positive control*: single pictures put into the training set a known number of times.  How many of
them are found is the dose-response.

A held-out picture must be like those that are judged: single, and drawn from them at random.  A
picture that occurs more than once is never held out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control

from mmh_jax.data.splits import deduplicated
from mmh_jax.memorization.extraction import rate_interval
from mmh_jax.typing import ArrayLike

__all__ = [
    "Controls",
    "DoseResponse",
    "conformal_p_values",
    "discoveries",
    "dose_response",
    "plan_controls",
]

DOSES = (2, 4, 8, 16, 32)
# Rows of each dose, of all rows; pictures of each dose at most; a dose is this part of the rows at
# most; rows that are held out at least, and of the single pictures at most this part.
_SHARE_PLANTED = 0.02
_MOST_PLANTED = 20
_LARGEST_DOSE = 0.1
_LEAST_HELD_OUT = 100
_MOST_HELD_OUT = 3


class Controls(NamedTuple):
    """Rows of a data set by what is done with them.

    Attributes:
        training: (T,) the rows to train on, planted ones as often as they are planted.
        held_out: (H,) rows that no model is trained on, ascending.
        planted: (P,) rows that are planted; none is held out.
        counts: (P,) how often.
    """

    training: np.ndarray
    held_out: np.ndarray
    planted: np.ndarray
    counts: np.ndarray


def plan_controls(
    points: ArrayLike, *, seed: int, share: float = 0.1, plant: bool = True
) -> Controls:
    """Choose the controls of an audit at random among the points that occur once.

    Args:
        points: (N, *shape).
        seed: of the choice.
        share: of the single points that is held out; at least 100 of them, and at most a third.
        plant: whether to plant some 2, 4, 8, 16 and 32 times: each dose up to 20 points and about
            2% of the rows, one point at least; no dose of more than a tenth of the rows.

    Raises:
        ValueError: if fewer than 9 points occur once, or `share` is not between 0 and 1.

    >>> plan = plan_controls(np.arange(60.0)[:, None], seed=0)
    >>> len(plan.held_out), plan.counts.tolist(), len(plan.training)
    (20, [2, 4], 44)
    """
    if not 0 < share < 1:
        raise ValueError(f"`plan_controls(share={share})` must lie between 0 and 1.")
    unique = deduplicated(points)
    num, single = len(unique.cluster), unique.first[unique.counts == 1]
    if len(single) < _MOST_HELD_OUT**2:
        raise ValueError(
            f"`plan_controls(points=...)`: {len(single)} of the {num} points occur once, and "
            f"{_MOST_HELD_OUT**2} must, to hold some of them out."
        )
    order = np.random.default_rng(seed).permutation(single)
    wanted = max(_LEAST_HELD_OUT, round(share * len(single)))
    held_out = order[: min(wanted, len(single) // _MOST_HELD_OUT)]
    counts = _doses(num) if plant else np.zeros(0, int)
    planted = order[len(held_out) :][: len(counts)]
    counts = counts[: len(planted)]
    times = np.ones(num, int)
    times[held_out], times[planted] = 0, counts
    return Controls(np.repeat(np.arange(num), times), np.sort(held_out), planted, counts)


def _doses(num: int) -> np.ndarray:
    """How often each control is planted among `num` rows, ascending."""
    doses = [dose for dose in DOSES if dose <= _LARGEST_DOSE * num] or [DOSES[0]]
    numbers = [int(np.clip(_SHARE_PLANTED * num / dose, 1, _MOST_PLANTED)) for dose in doses]
    return np.repeat(doses, numbers)


def conformal_p_values(scores: ArrayLike, control: ArrayLike) -> np.ndarray:
    """The chance of so large a score among the controls, (M,); see the module.

    Ties count against the point.

    Args:
        scores: (M,), large where a point seems memorized; NaN has the p-value NaN.
        control: (H,) scores of points that are not, all finite.

    Raises:
        ValueError: if the control is empty or not finite.

    >>> conformal_p_values([0.5, 2.0], [0.0, 0.5, 1.0]).tolist()
    [0.75, 0.25]
    """
    scores, control = np.asarray(scores, float), np.sort(np.asarray(control, float))
    if control.ndim != 1 or not len(control) or not np.all(np.isfinite(control)):
        raise ValueError(
            "`conformal_p_values(control=...)` must be finite scores, one at least; it has shape "
            f"{control.shape}."
        )
    larger = len(control) - np.searchsorted(control, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + larger) / (1 + len(control)))


def discoveries(
    p_values: ArrayLike, *, rate: float = 0.05, families: ArrayLike | None = None
) -> np.ndarray:
    """Which points are discovered at a false discovery rate, by Benjamini and Hochberg; (M,) bool.

    Args:
        p_values: (M,); NaN is no discovery, and does not count as a test.
        rate: the false discovery rate.
        families: (M,) integers: each family is tested by itself, and holds the rate by itself.
            It must be known without the scores, such as whether a picture is repeated in the data.

    >>> discoveries([0.01, 0.04, 0.5]).tolist()
    [True, False, False]
    """
    p_values = np.asarray(p_values, float)
    family = np.zeros(len(p_values), int) if families is None else np.asarray(families)
    found = np.zeros(len(p_values), bool)
    for number in np.unique(family):
        rows = np.flatnonzero((family == number) & ~np.isnan(p_values))
        if len(rows):
            found[rows] = false_discovery_control(p_values[rows]) <= rate
    return found


class DoseResponse(NamedTuple):
    """How many of the planted points were found; each field is (L,), by dose.

    Attributes:
        copies: how often a point was planted.
        planted: how many points.
        found: how many of them were found.
        low, high: ends of a 95% interval of the probability to find one (Clopper and Pearson).
    """

    copies: np.ndarray
    planted: np.ndarray
    found: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at_least(self, copies: int) -> tuple[int, int, float, float]:
        """Of all doses of at least so many copies: found, planted and the interval."""
        there = self.copies >= copies
        found, planted = int(self.found[there].sum()), int(self.planted[there].sum())
        if not planted:
            return 0, 0, 0.0, 1.0
        low, high = rate_interval(found, planted)
        return found, planted, float(low), float(high)


def dose_response(counts: ArrayLike, found: ArrayLike) -> DoseResponse:
    """The dose-response of positive controls.

    Args:
        counts: (P,) how often each was planted.
        found: (P,) whether it was found.

    >>> dose_response([2, 2, 8], [False, True, True]).found.tolist()
    [1, 1]
    """
    counts, found = np.asarray(counts, int), np.asarray(found, bool)
    copies = np.unique(counts)
    planted = np.array([np.sum(counts == dose) for dose in copies], int)
    hits = np.array([np.sum(found[counts == dose]) for dose in copies], int)
    ends = [rate_interval(hit, int(num)) for hit, num in zip(hits, planted, strict=True)]
    low, high = np.array(ends, float).reshape(len(copies), 2).T
    return DoseResponse(copies, planted, hits, low, high)
