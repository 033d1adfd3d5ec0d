"""LID_* at points of a data set, from their nearest neighbours in it by maximum likelihood."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from mmh_jax.lid.mle import mle
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.report.measure import Progress
from mmh_jax.typing import Estimate

__all__ = ["check_neighbors", "lid_star"]


def check_neighbors(source: str | Path, num_points: int, num_neighbors: int) -> None:
    """Raise ValueError if there are too few points for so many neighbours of each."""
    if num_points <= num_neighbors:
        raise ValueError(
            f"{source} has {num_points} points, too few for {num_neighbors} neighbours of each; "
            "lower --num-neighbors."
        )


def lid_star(
    points: np.ndarray,
    index: np.ndarray,
    num_neighbors: int,
    *,
    progress: Progress | None = None,
) -> tuple[Estimate, tuple[np.ndarray, np.ndarray]]:
    """LID_* at some of the points; the index of their nearest other point, and its distance.

    Args:
        points: (N, *shape), all the data.
        index: (M,) the rows that are asked for.
        num_neighbors: k.
        progress: called as `progress(done, M)`.

    Cost: the distances of M points to N.
    """
    found = nearest_neighbors(
        points, num_neighbors, queries=points[index], exclude=index, progress=progress
    )
    value, stderr = map(np.asarray, jax.vmap(mle)(found.distances))
    return Estimate(value, stderr), (found.indices[:, 0], found.distances[:, 0])
