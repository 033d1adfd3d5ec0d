"""The dimension of data as a function of the number of neighbours: a curve, with its plateaus.

The ball that holds the k nearest neighbours is the scale of an estimate from neighbours, as the
noise level is that of an estimate from a model: small balls are noisy, and see the noise of the
data; large ones see curvature, edges and the next piece.  Between them the curve has a plateau, or
there is no dimension to be had from so many points.  The curve is the `Curve` of the model side,
with k in the place of sigma, and `plateaus`, `at_plateau` and `knee` read it; a slope is then a
change for each factor e of k, of the radius for each factor e^(1/d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmh_jax.lid.flipd import Curve
from mmh_jax.lid.methods import DATA_METHODS
from mmh_jax.lid.neighbors import Neighbors
from mmh_jax.typing import ArrayLike

__all__ = ["neighbor_curve"]


def neighbor_curve(
    method: str,
    points: ArrayLike,
    neighbors: Neighbors,
    num_neighbors: Sequence[int],
    *,
    pooled: bool = False,
) -> Curve:
    """One of `DATA_METHODS` at several numbers of neighbours, from neighbourhoods found once.

    Args:
        method: its name.
        points: (N, *shape).
        neighbors: `nearest_neighbors(points, k)` with k the largest of `num_neighbors`, or more.
        num_neighbors: (S,) increasing, each at least what the method needs; for `plateaus` at least
            4, and two or more for each factor of 2.
        pooled: one curve for all points together, far less noisy than those of the points.

    Returns:
        `Curve`: `sigmas` are the numbers of neighbours, (S,); `value` and `stderr` (N, S), or (S,)
        if pooled; the standard error is NaN where the method has none.

    Raises:
        ValueError: for an unknown method, or numbers of neighbours that do not increase, are too
            small for the method, or exceed those that were found.

    >>> from mmh_jax import lid
    >>> points = np.random.default_rng(0).normal(size=(1000, 2)) @ np.eye(2, 5)
    >>> neighbors = lid.nearest_neighbors(points, 80)
    >>> curve = neighbor_curve("mle", points, neighbors, [10, 14, 20, 28, 40, 56, 80], pooled=True)
    >>> [round(p.value) for p in lid.plateaus(curve)]
    [2]
    """
    if method not in DATA_METHODS:
        raise ValueError(
            f"`neighbor_curve(method={method!r})`: there are {', '.join(DATA_METHODS)}."
        )
    levels, chosen = np.asarray(num_neighbors), DATA_METHODS[method]
    distances, indices = np.asarray(neighbors.distances), np.asarray(neighbors.indices)
    most = distances.shape[1]
    if (
        levels.ndim != 1 or not levels.size or not np.issubdtype(levels.dtype, np.integer)
        or np.any(np.diff(levels) <= 0) or not chosen.least <= levels[0] <= levels[-1] <= most
    ):  # fmt: skip
        raise ValueError(
            f"`neighbor_curve(num_neighbors={list(num_neighbors)})` must be whole numbers that "
            f"increase from at least {chosen.least}, for {method!r}, to at most {most}, as many as "
            "`neighbors` holds."
        )
    found: list[Any] = []
    for k in levels:
        near = Neighbors(distances[:, :k], indices[:, :k])
        at_points = chosen.at_points(points, near)
        found.append(chosen.overall(near, at_points, points) if pooled else at_points)
    value, stderr = (np.stack([np.asarray(e[i], float) for e in found], axis=-1) for i in (0, 1))
    return Curve(levels.astype(float), value, stderr, np.zeros_like(value))
