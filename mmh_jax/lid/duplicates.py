r"""Duplicates and near-duplicates: which points of a data set are one point.

A point that occurs n times among N is an atom of mass n / N of the empirical law, and the dimension
of a law at an atom is 0: the probability of a ball of radius r does not fall with r.  Every
estimator here that reads distances says so, value 0, where a neighbour lies at distance 0.

Near-duplicates, closer than some tolerance, are the same at scales above the tolerance and not
below.  They are joined by single linkage: two points belong together if a chain of points leads
from one to the other, each step of at most the tolerance.  Which tolerance is a question to the
data; `nearest_neighbors(points, 1).distances` shows whether there is a gap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.lid.points import check_finite, check_points, rounded, rounding_offset
from mmh_jax.mapping import Progress
from mmh_jax.typing import ArrayLike

__all__ = ["Duplicates", "find_duplicates"]

# Neighbours that are looked at first.
_FEW = 8
# Numbers in a block of differences or distances.
_BLOCK = 2**22


class Duplicates(NamedTuple):
    """The clusters of equal, or nearly equal, points; numbered as they first appear.

    Attributes:
        cluster: (N,) the number of each point's cluster, 0 to C - 1.
        first: (C,) the first point of each cluster, ascending: `points[first]` are the data without
            duplicates, and `values[cluster]` brings back to all N what was found for these.
        counts: (C,) how many points each has.
    """

    cluster: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    @property
    def is_duplicate(self) -> np.ndarray:
        """(N,) whether a point has another in its cluster."""
        return self.counts[self.cluster] > 1


def find_duplicates(
    points: ArrayLike, *, tolerance: float = 0.0, progress: Progress | None = None
) -> Duplicates:
    """Group equal points, and with a tolerance those linked by steps no longer than it.

    Steps are measured in the precision of the points, not in that of `nearest_neighbors`.

    Cost: a sort of the rows; with a tolerance also the 8 nearest neighbours of what is left, and
    for points with all 8 within the tolerance their distances to all others, in blocks.

    Args:
        points: (N, *shape), floating.  0 and -0 are equal.
        tolerance: in data units, at least 0.
        progress: as in `nearest_neighbors`; with a tolerance only.

    Raises:
        TypeError: if `points` are not of a floating dtype.
        ValueError: if there are none, if a value is NaN or infinite, or for a tolerance that is
            negative or not finite.

    >>> points = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.1]])
    >>> find_duplicates(points).cluster, find_duplicates(points, tolerance=0.2).counts
    (array([0, 1, 0, 2]), array([2, 2]))
    """
    array = check_points("find_duplicates", "points", points)
    check_finite("find_duplicates", "points", array)
    rows = array.reshape(len(array), -1)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(
            f"`find_duplicates(tolerance={tolerance})` must be a finite number of at least 0."
        )
    exact = _grouped(np.unique(_rows_as_bytes(rows), return_inverse=True)[1])
    if tolerance == 0 or len(exact.first) == 1:
        return exact
    near = _linked(rows[exact.first], tolerance, progress)
    return _grouped(near[exact.cluster])


def _rows_as_bytes(points: np.ndarray) -> np.ndarray:
    """(N,) one opaque value for each row, equal for equal rows."""
    rows = np.ascontiguousarray(points + 0.0)  # -0 + 0 is 0
    return rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]


def _grouped(labels: np.ndarray) -> Duplicates:
    """Clusters of equal labels, numbered in order of their first point."""
    _, first, inverse, counts = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return Duplicates(number[inverse], first[order], counts[order])


def _linked(points: np.ndarray, tolerance: float, progress: Progress | None) -> np.ndarray:
    """(N,) a label for each of N different points, equal for those that a chain links."""
    num = len(points)
    found = nearest_neighbors(points, min(_FEW, num - 1), progress=progress)
    # They are found in the working precision, in which a step may look longer than it is.
    largest = np.abs(rounded(points, rounding_offset(points))).max()
    blur = 4 * points.shape[1] ** 0.5 * np.finfo(found.distances.dtype).eps * largest
    near = found.distances <= tolerance + blur
    starts, column = np.nonzero(near)
    ends = found.indices[starts, column]
    short = _lengths(points, starts, ends) <= tolerance
    labels = connected(num, starts[short], ends[short])
    # Where a few neighbours are all near there may be more, in other groups.
    crowded = np.flatnonzero(near.all(axis=1) & (near.shape[1] < num - 1))
    return connected(labels.max() + 1, *_between_groups(points, labels, crowded, tolerance))[labels]


def _lengths(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of the steps between pairs of points, in the precision of the points."""
    lengths = np.empty(len(starts))
    step = max(_BLOCK // points.shape[1], 1)
    for begin in range(0, len(starts), step):
        part = slice(begin, begin + step)
        lengths[part] = np.linalg.norm(points[starts[part]] - points[ends[part]], axis=1)
    return lengths


def _between_groups(
    points: np.ndarray, labels: np.ndarray, rows: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of labels that some of the `rows` link, from their distances to all points."""
    from scipy.spatial.distance import cdist

    pairs = [np.zeros((2, 0), labels.dtype)]
    step = max(_BLOCK // len(points), 1)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        here, there = np.nonzero(cdist(points[part], points) <= tolerance)
        pairs.append(np.unique(np.stack([labels[part[here]], labels[there]]), axis=1))
    starts, ends = np.concatenate(pairs, axis=1)
    return starts, ends


def connected(num: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(num,) the connected component of each node of a graph."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(starts), bool), (starts, ends)), shape=(num, num))
    return connected_components(graph, directed=False)[1]
