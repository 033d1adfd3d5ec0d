"""Pictures with labels, of a side that small networks can take."""

from __future__ import annotations

import numpy as np

from mmh_jax.data import sources


def pictures(source: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and their labels; those of 28 x 28 are made smaller by means.

    Where `side` does not divide 28, after padding them to 32 x 32.
    """
    found = sources.load(source)
    points = found.points
    if found.labels is None or points.ndim != 3:
        raise SystemExit(f"{source} is not grey images with labels.")
    if points.shape[1:] == (28, 28):
        border = 0 if 28 % side == 0 else 2
        step = (28 + 2 * border) // side
        points = np.pad(points, ((0, 0), (border, border), (border, border)))
        points = points.reshape(-1, side, step, side, step).mean(axis=(2, 4))
    return np.asarray(points, np.float32), np.asarray(found.labels)
