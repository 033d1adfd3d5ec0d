"""Pictures with labels, of a side that small networks can take; samples beside what they copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmh_jax import plotting
from mmh_jax.data import sources


def pictures(source: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and their labels; those of 28 x 28 are made smaller by means.

    Where `side` does not divide 28, after padding them to 32 x 32.  Those of 8 x 8 are made larger
    for a side of 28, and are as they are for any other.
    """
    found = sources.load(source)
    points = found.points
    if found.labels is None or points.ndim != 3:
        raise SystemExit(f"{source} is not grey images with labels.")
    if points.shape[1:] == (8, 8) and side == 28:
        points = enlarged(points)
    elif points.shape[1:] == (28, 28):
        border = 0 if 28 % side == 0 else 2
        step = (28 + 2 * border) // side
        points = np.pad(points, ((0, 0), (border, border), (border, border)))
        points = points.reshape(-1, side, step, side, step).mean(axis=(2, 4))
    return np.asarray(points, np.float32), np.asarray(found.labels)


def enlarged(points: np.ndarray) -> np.ndarray:
    """(N, 28, 28) of (N, 8, 8): each pixel as 3 x 3, with a margin."""
    large = np.kron(points, np.ones((1, 3, 3), np.float32))
    return np.pad(large, ((0, 0), (2, 2), (2, 2)))


def draw_beside(
    samples: np.ndarray, nearest: np.ndarray, labels: list[str], title: str, path: Path
) -> None:
    """Up to 24 samples in two rows, each above the training picture nearest to it."""
    pairs, texts = [], []
    for start in range(0, min(24, len(samples)), 12):
        row = slice(start, start + 12)
        pairs += [samples[row], nearest[row]]
        texts += [*labels[row], *[""] * len(labels[row])]
    figure = plotting.image_grid(
        np.concatenate(pairs), num_columns=12, labels=texts,
        title=f"{title}; below each the nearest training picture",
    )  # fmt: skip
    figure.savefig(path.with_suffix(".png"), dpi=120)
