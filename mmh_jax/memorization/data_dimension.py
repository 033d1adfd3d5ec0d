r"""LID_* at the points of a data set, from the data alone.

Two sources with one answer, an `Estimate` for each point asked for, as `verdict` takes it:

    neighbor_lid     distances to the nearest neighbours;
    diffusion_lid    the closed-form diffusion of the data, each point left out in its turn, at the
                     plateau of its own curve (`lid.closed_form_curve`, `lid.at_plateau`).

The third, `cross_fit`, asks a model that never saw the point; it is the one for images, where the
distances between points say nothing about a dimension.

Duplicates come first in both.  A point that occurs more than once is an atom of the law, and the
dimension there is 0, exactly: that is what data-driven memorization means.  For the other points
equal ones count as one, since an atom elsewhere does not change the dimension here, only the
distances by which it is told.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from mmh_jax.lid.closed_form import closed_form_curve
from mmh_jax.lid.duplicates import Duplicates, find_duplicates
from mmh_jax.lid.flipd import Curve
from mmh_jax.lid.mle import mle
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.lid.plateau import at_plateau
from mmh_jax.mapping import Progress
from mmh_jax.typing import Array, ArrayLike, Estimate

__all__ = ["check_rows", "diffusion_curve", "diffusion_lid", "neighbor_lid"]

_NUM_LEVELS = 16
# Points whose distances tell the noise levels.
_NUM_ASKED = 256


def neighbor_lid(
    points: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    num_neighbors: int = 20,
    estimator: Callable[[Array], Estimate] = mle,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> Estimate:
    """LID_* from the distances to the nearest neighbours.

    Args:
        points: (N, *shape), all the data.
        rows: (M,) the points that are asked for, or None for all.
        num_neighbors: k, of different points.
        estimator: a function of the distances (k,), such as `lid.mle` or `lid.mom`.
        tolerance: points linked by steps no longer than it are duplicates
            (`lid.find_duplicates`).
        progress: as in `lid.nearest_neighbors`.

    Returns:
        `Estimate`, (M,) NumPy arrays; value and standard error 0 at duplicates.

    Cost: the distances of M points to N; a sort for the duplicates.

    Raises:
        TypeError, ValueError: as `lid.find_duplicates` and `lid.nearest_neighbors`; or if `rows`
            are no rows of the points.

    >>> plane = np.random.default_rng(0).normal(size=(400, 2)) @ np.eye(2, 5)
    >>> plane[7] = plane[3]
    >>> found = neighbor_lid(plane, rows=np.array([3, 7]))
    >>> found.value.tolist(), found.stderr.tolist()
    ([0.0, 0.0], [0.0, 0.0])
    >>> float(np.median(neighbor_lid(plane).value).round())
    2.0
    """
    array, rows, clusters, single = _asked("neighbor_lid", points, rows, tolerance)
    value, stderr = np.zeros(len(rows)), np.zeros(len(rows))
    if len(single):
        here = rows[single]
        found = nearest_neighbors(
            array[clusters.first], num_neighbors, queries=array[here],
            exclude=clusters.cluster[here], progress=progress,
        )  # fmt: skip
        value[single], stderr[single] = jax.vmap(estimator)(found.distances)
    return Estimate(value, stderr)


def diffusion_curve(
    points: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    sigmas: ArrayLike | None = None,
    num_neighbors: int = 20,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> Curve:
    """The curve of the closed-form diffusion at points of the data, each left out in its turn.

    Args:
        points, rows, tolerance: as for `neighbor_lid`.
        sigmas: (S,) noise levels in data units, or None: 16 levels from half the median distance
            to the nearest neighbour to twice that to the k-th, at no more than 256 of the points;
            the same ones whatever is asked for.
        num_neighbors: k; fewer if there are no more.
        progress: as in `lid.closed_form_curve`.

    Returns:
        `Curve`, its fields (M, S); 0 at duplicates, the limit of small noise.

    Cost: M N (D + S) operations.

    Raises:
        TypeError, ValueError: as `neighbor_lid` and `lid.closed_form_curve`; or if no noise levels
            are given and all points are one, so that no distance tells them.

    >>> plane = np.random.default_rng(0).normal(size=(400, 2)) @ np.eye(2, 5)
    >>> diffusion_curve(plane, rows=np.arange(3)).value.shape
    (3, 16)
    """
    array, rows, clusters, single = _asked("diffusion_curve", points, rows, tolerance)
    different, here = array[clusters.first], rows[single]
    own = clusters.cluster[here]
    levels = _levels(different, num_neighbors) if sigmas is None else np.asarray(sigmas, float)
    value, stderr, residual = np.zeros((3, len(rows), len(levels)))
    if len(single):
        # In a unit of the levels: squares of very small or large numbers have no number.
        unit = 2.0 ** float(np.frexp(levels[-1])[1])
        curve = closed_form_curve(
            different / unit, levels / unit, queries=array[here] / unit, exclude=own,
            progress=progress,
        )  # fmt: skip
        value[single], stderr[single] = curve.value, curve.stderr
        residual[single] = curve.residual
    nothing = np.zeros(value.shape, int)
    return Curve(levels, value, stderr, residual, nothing, nothing)


def diffusion_lid(
    points: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    sigmas: ArrayLike | None = None,
    num_neighbors: int = 20,
    tolerance: float = 0.0,
    max_slope: float = 0.25,
    progress: Progress | None = None,
) -> Estimate:
    """LID_* from the closed-form diffusion, at the plateau of each point's own curve.

    Where there are plateaus its standard error is half that of the maximum likelihood estimate from
    20 neighbours, and the deviation from the truth 1.0 to 1.1 of it: for 400 points on a circle 90%
    have one, for 1,000 on a sphere of two dimensions all, for 400 normal points of three dimensions
    62%, for 1,000 of eight 9%, two dimensions too low.  It is for few dimensions or many points.

    Args:
        points, rows, sigmas, num_neighbors, tolerance, progress: as for `diffusion_curve`.
        max_slope: of a plateau, as for `lid.at_plateau`; more than there, since the curve of a few
            points is never flat to 10%.  At .1 half of the points of the circle have one.

    Returns:
        `Estimate`, (M,) NumPy arrays; 0 at duplicates, value NaN where there is no plateau.

    Cost: that of `diffusion_curve`.

    Raises:
        TypeError, ValueError: as `diffusion_curve`.

    >>> plane = np.random.default_rng(0).normal(size=(400, 2)) @ np.eye(2, 5)
    >>> plane[7] = plane[3]
    >>> found = diffusion_lid(plane)
    >>> found.value[[3, 7]].tolist(), float(np.nanmedian(found.value).round())
    ([0.0, 0.0], 2.0)
    """
    array, rows, _, single = _asked("diffusion_lid", points, rows, tolerance)
    value, stderr = np.zeros(len(rows)), np.zeros(len(rows))
    if len(single):
        curve = diffusion_curve(
            array, rows=rows[single], sigmas=sigmas, num_neighbors=num_neighbors,
            tolerance=tolerance, progress=progress,
        )  # fmt: skip
        found = at_plateau(curve, max_slope=max_slope)
        value[single] = np.where(found.num_plateaus > 0, found.value, np.nan)
        stderr[single] = found.stderr
    return Estimate(value, stderr)


def _levels(points: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Noise levels of the size of the distances between different points."""
    k = min(num_neighbors, len(points) - 1)
    if k < 1:
        raise ValueError(
            "`diffusion_curve(sigmas=None)`: all points are one, so that no distance tells the "
            "noise levels; pass `sigmas`."
        )
    some = np.unique(np.linspace(0, len(points) - 1, min(len(points), _NUM_ASKED)).astype(int))
    near = nearest_neighbors(points, k, queries=points[some], exclude=some)
    nearest, farthest = np.median(np.asarray(near.distances, float)[:, [0, -1]], axis=0)
    return np.geomspace(nearest / 2, 2 * farthest, _NUM_LEVELS)


def check_rows(caller: str, rows: ArrayLike | None, num_points: int) -> np.ndarray:
    """(M,) different or equal rows of `num_points` points, or None for all of them.

    Raises:
        ValueError: if they are no whole numbers from 0 to below `num_points`, or there are none.
    """
    if rows is None:
        return np.arange(num_points)
    array = np.asarray(rows)
    whole = array.ndim == 1 and array.size > 0 and np.issubdtype(array.dtype, np.integer)
    if not whole or array.min() < 0 or array.max() >= num_points:
        raise ValueError(
            f"`{caller}(rows=...)` is {array.dtype} of shape {array.shape}; it takes row numbers "
            f"from 0 to {num_points - 1}, (M,), at least one."
        )
    return array


def _asked(
    caller: str, points: ArrayLike, rows: ArrayLike | None, tolerance: float
) -> tuple[np.ndarray, np.ndarray, Duplicates, np.ndarray]:
    """Points, rows, clusters of equal points, and which of the rows are not duplicates."""
    array = np.asarray(points)
    clusters = find_duplicates(array, tolerance=tolerance)
    rows = check_rows(caller, rows, len(array))
    return array, rows, clusters, np.flatnonzero(clusters.counts[clusters.cluster[rows]] == 1)
