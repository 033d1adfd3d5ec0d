r"""How well scores find what is memorized: AUROC, AUPRC, TPR at a small FPR, with intervals.

All three are of one ranking, higher = more memorized, never turned round when it is bad:

    AUROC     the chance that a memorized example scores higher than another, ties counted half;
    AUPRC     average precision, sum_i (R_i - R_{i-1}) P_i over the distinct scores, descending:
              the prevalence for scores that say nothing, not one half;
    TPR@FPR   the largest true positive rate of a threshold whose false positive rate is at most
              so much.  Not interpolated: a threshold that exists.

A rate of 1% is one of a hundred negatives: with fewer than a thousand its error bar is most of the
answer.  Intervals are percentiles of a bootstrap that draws positives and negatives apart, with
their numbers kept; they contain the choice of examples, not that of the trained model, which
`over_seeds` is for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmh_jax.linalg.operator import t_factor
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["Comparison", "Detection", "Interval", "compare", "detection", "over_seeds"]

# Resamples are taken in chunks of so many numbers.
_CHUNK = 2**22


class Interval(NamedTuple):
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Detection(NamedTuple):
    """How well one score finds the memorized; see `detection`."""

    auroc: Interval
    auprc: Interval
    tpr: Interval
    num_positive: int
    num_negative: int


class Comparison(NamedTuple):
    """One score less another on the same examples; see `compare`.

    Attributes:
        auroc, auprc, tpr: the differences.
        p_value: of AUROC, two-sided: how often a resample has the other sign, twice.
    """

    auroc: Interval
    auprc: Interval
    tpr: Interval
    p_value: float


class _Ranking(NamedTuple):
    """Examples by descending score, equal ones in one group."""

    order: np.ndarray
    starts: np.ndarray

    def grouped(self, weights: np.ndarray) -> np.ndarray:
        """Sums of the weights (B, n) over the groups, (B, G)."""
        return np.add.reduceat(weights[:, self.order], self.starts, axis=1)


def _ranking(scores: np.ndarray) -> _Ranking:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    return _Ranking(order, starts)


def _metrics(
    ranking: _Ranking, positive: np.ndarray, negative: np.ndarray, max_fpr: float
) -> np.ndarray:
    """(3, B): the metrics for weights (B, n) of the positive and of the negative examples."""
    hits, alarms = ranking.grouped(positive), ranking.grouped(negative)
    true, false = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
    num_true, num_false = true[:, -1:], false[:, -1:]
    # An example is above all negatives of later groups, and ties with those of its own.
    above = num_false - false + alarms / 2
    auroc = np.sum(hits * above, axis=1) / (num_true * num_false)[:, 0]
    found = true + false
    precision = true / np.where(found == 0, 1, found)
    auprc = np.sum(hits * precision, axis=1) / num_true[:, 0]
    # Resampled weights are whole numbers: nothing is rounded in the comparison.
    allowed = false <= max_fpr * num_false + 1e-9
    tpr = np.max(np.where(allowed, true, 0), axis=1) / num_true[:, 0]
    return np.stack([auroc, auprc, tpr])


def _resamples(labels: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, n) how often each example is drawn; positives and negatives apart."""
    weights = np.zeros((num, len(labels)))
    for value in (True, False):
        members = np.flatnonzero(labels == value)
        equal = np.full(len(members), 1 / len(members))
        weights[:, members] = rng.multinomial(len(members), equal, size=num)
    return weights


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def detection(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int,
    max_fpr: float = 0.01,
    num_resamples: int = 1_000,
) -> Detection:
    """AUROC, AUPRC and the true positive rate at a small false positive rate.

    Args:
        scores: (n,), higher = more memorized.
        labels: (n,) whether an example is memorized.
        seed: of the resamples.
        max_fpr: the false positive rate that is allowed.
        num_resamples: of the bootstrap.

    Raises:
        ValueError: if shapes differ, a score is NaN, one of the two kinds is missing, or `max_fpr`
            is not between 0 and 1.

    >>> found = detection([0.9, 0.8, 0.3, 0.1], [True, False, True, False], seed=0)
    >>> found.auroc.value, found.tpr.value, round(found.auprc.value, 3)
    (0.75, 0.5, 0.833)
    """
    scores, labels = _checked("detection", scores, labels)
    _check_settings("detection", max_fpr, num_resamples)
    values, resampled = _bootstrap([scores], labels, seed, max_fpr, num_resamples)
    auroc, auprc, tpr = map(_interval, values[0], resampled[0])
    return Detection(auroc, auprc, tpr, int(labels.sum()), int((~labels).sum()))


def compare(
    scores: ArrayLike,
    others: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int,
    max_fpr: float = 0.01,
    num_resamples: int = 1_000,
) -> Comparison:
    """By how much one score is better than another, on the same examples and resamples.

    Args:
        scores, others: (n,), higher = more memorized.
        labels, seed, max_fpr, num_resamples: as for `detection`.

    Raises:
        ValueError: as `detection`.

    >>> labels = np.arange(100) < 50
    >>> found = compare(labels + 0.0, np.arange(100) % 2, labels, seed=0)
    >>> found.auroc.value, found.p_value < 0.01
    (0.5, True)
    """
    first, truth = _checked("compare", scores, labels)
    second, _ = _checked("compare", others, labels, name="others")
    _check_settings("compare", max_fpr, num_resamples)
    values, resampled = _bootstrap([first, second], truth, seed, max_fpr, num_resamples)
    difference, draws = values[0] - values[1], resampled[0] - resampled[1]
    auroc, auprc, tpr = map(_interval, difference, draws)
    # One more on either side, as in a permutation test: never 0 from finitely many.
    sides = [(np.sum(draws[0] <= 0) + 1), (np.sum(draws[0] >= 0) + 1)]
    p_value = min(1.0, 2 * float(min(sides)) / (num_resamples + 1))
    return Comparison(auroc, auprc, tpr, p_value)


def over_seeds(values: ArrayLike) -> Estimate:
    """The mean over training seeds, and a standard error such that +-1.96 of it is a 95% interval.

    Student's t for so few: with three seeds the factor is 2.2.  One seed: NaN.

    Raises:
        ValueError: if there is none, the values are no vector, or one is not finite.

    >>> over_seeds([0.25, 0.5, 0.75])
    Estimate(value=0.5, stderr=0.316...)
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"`over_seeds(values=...)` has shape {values.shape} and "
            f"{np.sum(~np.isfinite(values))} values that are not finite; pass one for each seed."
        )
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]), float("nan"))
    return Estimate(float(values.mean()), t_factor(n) * float(values.std(ddof=1)) / n**0.5)


def _bootstrap(
    scores: list[np.ndarray], labels: np.ndarray, seed: int, max_fpr: float, num: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each of the scores: the metrics, (3,), and those of the resamples, (3, num)."""
    rankings, rng = [_ranking(each) for each in scores], np.random.default_rng(seed)
    once = np.ones((1, len(labels)))
    values = [_metrics(each, once * labels, once * ~labels, max_fpr)[:, 0] for each in rankings]
    size, parts = max(1, _CHUNK // len(labels)), []
    for start in range(0, num, size):
        weights = _resamples(labels, min(size, num - start), rng)
        parts.append(
            [_metrics(each, weights * labels, weights * ~labels, max_fpr) for each in rankings]
        )
    return values, [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]


def _checked(
    caller: str, scores: ArrayLike, labels: ArrayLike, name: str = "scores"
) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, float), np.asarray(labels)
    if labels.dtype != bool:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"`{caller}(labels=...)` are not true or false, 1 or 0.")
        labels = labels.astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"`{caller}({name}=...)` has shape {scores.shape} for labels of shape {labels.shape}; "
            "pass one score and one label for each example."
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"`{caller}({name}=...)` is NaN for {int(np.isnan(scores).sum())} of {len(scores)} "
            "examples; leave these out, or decide how they rank (-inf: as not memorized)."
        )
    if labels.all() or not labels.any():
        raise ValueError(
            f"`{caller}(labels=...)` has {int(labels.sum())} memorized of {len(labels)} examples; "
            "there must be some of both."
        )
    return scores, labels


def _check_settings(caller: str, max_fpr: float, num_resamples: int) -> None:
    if not 0 < max_fpr < 1:
        raise ValueError(f"`{caller}(max_fpr={max_fpr})` must lie between 0 and 1.")
    if num_resamples < 100:
        raise ValueError(f"`{caller}(num_resamples={num_resamples})` must be at least 100.")
