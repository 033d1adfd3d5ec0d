r"""The different rows of a set, and sets split in two.

A model that never saw a point says what the data are like there; to have one for every point, the
set is split into two halves and one model is trained on each.  For that the halves must have
nothing in common: rows that are equal stay on one side, and so do rows of one group, such as the
near-duplicates that `lid.find_duplicates` links.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import jax
import numpy as np

from mmh_jax.typing import ArrayLike, Key, check_key

__all__ = ["Halves", "Unique", "check_points", "deduplicated", "disjoint_halves"]


class Halves(NamedTuple):
    """Two disjoint sets of rows which together are all.

    Attributes:
        first, second: ascending; the first has at least as many.
    """

    first: np.ndarray
    second: np.ndarray


class Unique(NamedTuple):
    """A set without its duplicates; fields as those of `lid.Duplicates`.

    Attributes:
        points: (C, *shape), each different row once, in the order of first appearance.
        counts: (C,) how often each occurs.
        first: (C,) where each first occurs, ascending.
        cluster: (N,) which of them each row is: `points[cluster]` is the given set.
    """

    points: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    cluster: np.ndarray


def deduplicated(points: ArrayLike) -> Unique:
    """The different rows of a set, with their counts.

    Rows are compared by a 256-bit hash of their bytes, and are equal if all values are (0 and -0
    are).  Cost: one reading of the set.  For near-duplicates see `lid.find_duplicates`.

    Raises:
        TypeError: if `points` are not of a floating or integer dtype.
        ValueError: if there are none, or a value is NaN.

    >>> unique = deduplicated(np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    >>> unique.counts, unique.first, unique.cluster
    (array([2, 1]), array([0, 1]), array([0, 1, 0]))
    """
    array = check_points("deduplicated", points)
    cluster, numbers = np.empty(len(array), np.int64), {}
    for row, point in enumerate(array):
        # The sum makes 0 of -0, which has other bytes.
        digest = hashlib.sha256((point + 0).tobytes()).digest()
        cluster[row] = numbers.setdefault(digest, len(numbers))
    first = np.full(len(numbers), len(array))
    np.minimum.at(first, cluster, np.arange(len(array)))
    return Unique(array[first], np.bincount(cluster), first, cluster)


def disjoint_halves(points: ArrayLike, *, key: Key, groups: ArrayLike | None = None) -> Halves:
    """Split a set in two at random, without parting rows that belong together.

    Equal rows belong together, and rows of one group; and what is linked by these.  Groups are
    dealt the largest first, each to the side that has fewer rows: with enough single rows the
    halves differ by one at most.

    Args:
        points: (N, *shape), N at least 2.
        key: draws the split.
        groups: (N,) integers, for example `lid.find_duplicates(points, tolerance=...).cluster` or
            `Planted.origin`.

    Raises:
        TypeError: for points of another kind than numbers.
        ValueError: if `groups` are not one integer for each row, or if all rows belong together.

    >>> points = np.array([[0.0], [1.0], [0.0], [2.0]])
    >>> halves = disjoint_halves(points, key=jax.random.key(0))
    >>> any({0, 2} <= set(half) for half in halves), len(halves.first), len(halves.second)
    (True, 2, 2)
    """
    array = check_points("disjoint_halves", points)
    key = check_key("disjoint_halves", key)
    group = deduplicated(array).cluster
    if groups is not None:
        group = _joined(group, _check_groups(groups, len(array)))
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise ValueError(
            f"`disjoint_halves(points=...)` has {len(array)} rows that all belong together. "
            "Remove links: a smaller tolerance makes smaller groups."
        )
    order = np.asarray(jax.random.permutation(key, len(sizes)))
    order = order[np.argsort(-sizes[order], kind="stable")]
    side, filled = np.zeros(len(sizes), np.int64), np.zeros(2, np.int64)
    for number in order:
        side[number] = np.argmin(filled)
        filled[side[number]] += sizes[number]
    larger = int(np.argmax(filled))
    halves = [np.flatnonzero(side[group] == half) for half in (larger, 1 - larger)]
    return Halves(*halves)


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The components of rows that share a number in either of two groupings."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    num = int(first.max()) + 1
    size = num + int(second.max()) + 1
    links = coo_matrix((np.ones(len(first)), (first, second + num)), shape=(size, size))
    component = connected_components(links, directed=False)[1][first]
    return np.unique(component, return_inverse=True)[1]


def _check_groups(groups: ArrayLike, num: int) -> np.ndarray:
    array = np.asarray(groups)
    if array.shape != (num,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`disjoint_halves(groups=...)` is {array.dtype} of shape {array.shape}; it takes one "
            f"integer for each of the {num} rows."
        )
    return np.unique(array, return_inverse=True)[1]


def check_points(caller: str, points: ArrayLike) -> np.ndarray:
    """Return (N, *shape) numbers as an array, or say what is wrong with them.

    Raises:
        TypeError: if they are no integers or floats.
        ValueError: if there are none, or one is NaN.
    """
    array = np.asarray(points)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"`{caller}(points=...)` has dtype {array.dtype}; it takes numbers.")
    if array.ndim < 2 or array.size == 0:
        raise ValueError(
            f"`{caller}(points=...)` has shape {array.shape}; it takes N points, (N, *shape)."
        )
    if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
        raise ValueError(f"`{caller}(points=...)` has NaN, which equals nothing. Remove its rows.")
    return array
