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
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.mapping import Progress
from mmh_jax.typing import ArrayLike

__all__ = ["Duplicates", "find_duplicates"]


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

    Cost: a sort of the rows; with a tolerance also the nearest neighbours of what is left, and
    again with twice as many for points that have more than 8 within the tolerance.

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
    points = _checked(points)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(
            f"`find_duplicates(tolerance={tolerance})` must be a finite number of at least 0."
        )
    exact = _grouped(np.unique(_rows_as_bytes(points), return_inverse=True)[1])
    if tolerance == 0 or len(exact.first) == 1:
        return exact
    near = _linked(points[exact.first], tolerance, progress)
    return _grouped(near[exact.cluster])


def _checked(points: ArrayLike) -> np.ndarray:
    points = np.asarray(points)
    if not np.issubdtype(points.dtype, np.floating):
        raise TypeError(
            f"`find_duplicates(points=...)` has dtype {points.dtype}; points are in real data "
            "units. Convert them, for example `x.astype(float) / 255`."
        )
    if points.ndim == 0 or points.size == 0 or not np.all(np.isfinite(points)):
        raise ValueError(
            f"`find_duplicates(points=...)` of shape {points.shape} must hold at least one point "
            "and neither NaN nor infinity."
        )
    return points.reshape(len(points), -1)


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
    num, num_neighbors = len(points), min(8, len(points) - 1)
    found = nearest_neighbors(points, num_neighbors, progress=progress)
    distances, indices = np.asarray(found.distances), np.asarray(found.indices)
    rows, queries, links = [], np.arange(num), []
    while True:
        close = distances <= tolerance
        row, column = np.nonzero(close)
        rows.append(queries[row])
        links.append(indices[row, column])
        # All of its neighbours are within the tolerance: there may be more.
        queries = queries[close.all(axis=1)]
        if num_neighbors == num - 1 or not len(queries):
            break
        num_neighbors = min(2 * num_neighbors, num - 1)
        found = nearest_neighbors(points, num_neighbors, queries=points[queries], exclude=queries)
        distances, indices = np.asarray(found.distances), np.asarray(found.indices)
    start, end = np.concatenate(rows), np.concatenate(links)
    graph = coo_matrix((np.ones(len(start), bool), (start, end)), shape=(num, num))
    return connected_components(graph, directed=False)[1]
