r"""Which training points a model gives away: extracted by at least one of so many samples.

A training point is labelled memorized because a sample of the model is a copy of it, never because
it was planted or often repeated.  If k of N independent samples copy it, its rate, the chance that
one sample does, has the exact interval of Clopper & Pearson (1934),

    low = B(a; k, N - k + 1),     high = B(1 - a; k + 1, N - k),     a = (1 - level) / 2,

with B(q; ., .) the quantile of a Beta law; low is 0 for k = 0, and high is 1 for k = N.  "Not
extracted" is a statement about N samples: the rate may still be as large as `high`, about
3.7 / N at 95%.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special

from mmh_jax.memorization.labels import Copies
from mmh_jax.typing import ArrayLike

__all__ = ["Extraction", "extraction", "rate_interval"]


class Extraction(NamedTuple):
    """What was extracted of N training points; fields (N,) but for the last.

    Attributes:
        memorized: whether at least one sample is a copy of the point.
        counts: how many samples are.  Points that count as one share theirs.
        rate: `counts` over the number of samples.
        low, high: the ends of its interval.
        closest: the least ratio of any sample nearest to the point, copy or not; infinite if it
            is nearest to none.  What grades the points that were not extracted.
        num_samples: of the model.
    """

    memorized: np.ndarray
    counts: np.ndarray
    rate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    closest: np.ndarray
    num_samples: int


def extraction(copied: Copies, *, level: float = 0.95) -> Extraction:
    """Label training points by the samples that copy them.

    Args:
        copied: what `copies`, `calibrated_copies` or `feature_copies` found, for independent
            samples of the model.
        level: of the intervals, each by itself.

    Raises:
        ValueError: if `level` is not between 0 and 1.

    >>> from mmh_jax.memorization.labels import copies
    >>> points = np.array([[0.0], [4.0], [4.0]])
    >>> found = extraction(copies(np.array([[0.1], [2.0], [4.1], [4.2]]), points))
    >>> found.counts.tolist(), found.low.round(3).tolist(), found.high.round(3).tolist()
    ([1, 2, 2], [0.006, 0.068, 0.068], [0.806, 0.932, 0.932])
    """
    num = len(copied.ratio)
    cluster = copied.cluster
    of_first = np.zeros(len(cluster), int)
    np.add.at(of_first, cluster, copied.counts)
    closest = np.full(len(cluster), np.inf)
    np.minimum.at(closest, cluster[copied.nearest], copied.ratio)
    counts = of_first[cluster]
    low, high = rate_interval(counts, num, level=level)
    return Extraction(counts > 0, counts, counts / num, low, high, closest[cluster], num)


def rate_interval(
    counts: ArrayLike, num: int, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the Clopper-Pearson interval of a rate, elementwise.

    It covers the true rate at least so often as `level`, whatever the rate.

    Args:
        counts: how often it happened, of `num` independent trials; 0 to `num`.
        num: at least 1.
        level: of the interval.

    Raises:
        ValueError: if a count is not between 0 and `num`, or `level` not between 0 and 1.

    >>> [end.round(4).tolist() for end in rate_interval(np.array([0, 5]), 100)]
    [[0.0, 0.0164], [0.0362, 0.1128]]
    """
    counts = np.asarray(counts)
    if num < 1 or np.any(counts < 0) or np.any(counts > num):
        raise ValueError(f"`rate_interval(counts=..., num={num})`: counts lie between 0 and `num`.")
    if not 0 < level < 1:
        raise ValueError(f"`rate_interval(level={level})` must lie between 0 and 1.")
    tail = (1 - level) / 2
    # Arguments of the Beta law are positive; the ends that need none are put in after.
    low = special.betaincinv(np.maximum(counts, 1), num - counts + 1, tail)
    high = special.betaincinv(counts + 1, np.maximum(num - counts, 1), 1 - tail)
    return np.where(counts == 0, 0.0, low), np.where(counts == num, 1.0, high)
