r"""LID_theta of a saved model at many points, at a noise level chosen without labels.

The level: projected FLIPD of a random subset on a logarithmic grid, from the smallest level that
the model was trained at to half the spread of the data; `lid.choose_scale` picks one of them.
The dimension: projected FLIPD at that level.  Its standard error: the spread over the level and its
two neighbours on the grid, since a dimension that depends on the scale is known no better.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import lid, mapping
from mmh_jax.report.files import read_array, write_array
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Estimate

__all__ = ["Measured", "choose_levels", "diagnostics", "measure", "random_subset", "spectra"]

NUM_LEVELS = 15
NUM_SUBSET = 128
BLOCK_SIZE = 64

Progress = Callable[[int, int], None]
Spectra = Callable[[Any, np.ndarray, float], lid.Spectrum]


class Measured(NamedTuple):
    """What Jacobians say at N points and S noise levels; each field is (N, S).

    Attributes:
        projected: FLIPD without the negative eigenvalues.
        thresholded: FLIPD without those smaller in size than the most negative one, too.
        flipd: FLIPD.
        rank: how many eigenvalues exceed one half.
        residual: |x - D(x; sigma)|^2 / sigma^2; large where x is off the model's manifold.
        off_manifold: 1 where it is too large for a point of the manifold, else 0.
        asymmetry: of the Jacobian, 0 to 1; see `lid.Spectrum`.
    """

    projected: np.ndarray
    thresholded: np.ndarray
    flipd: np.ndarray
    rank: np.ndarray
    residual: np.ndarray
    off_manifold: np.ndarray
    asymmetry: np.ndarray

    @property
    def lid(self) -> Estimate:
        """Projected FLIPD at the middle level, and its standard deviation over the levels."""
        middle = self.projected.shape[1] // 2
        return Estimate(self.projected[:, middle], self.projected.std(axis=1, ddof=1))


def random_subset(num_points: int, num: int, *, seed: int) -> np.ndarray:
    """At most `num` different indices below `num_points`, in increasing order."""
    if num >= num_points:
        return np.arange(num_points)
    return np.sort(np.random.default_rng(seed).choice(num_points, num, replace=False))


def spectra(shape: tuple[int, ...]) -> Spectra:
    """`spectra(shape)(model, points, sigma)`: a `Spectrum` whose leaves have a leading axis of N.

    Keep the returned function: all its calls evaluate chunks of one size, with one program.
    """
    # A chunk's Jacobians hold at most 2^24 numbers.
    chunk_size = int(np.clip(2**24 // int(np.prod(shape)) ** 2, 1, BLOCK_SIZE))
    mapped = mapping.over_points(lid.jacobian_spectrum, (None, 0, None), chunk_size=chunk_size)

    def in_whole_chunks(model: Any, points: np.ndarray, sigma: float) -> lid.Spectrum:
        num_chunks = -(-len(points) // chunk_size)
        index = np.minimum(np.arange(num_chunks * chunk_size), len(points) - 1)
        result = mapped(model, points[index], np.float32(sigma))
        return jax.tree.map(lambda leaf: leaf[: len(points)], result)

    return in_whole_chunks


def choose_levels(
    model: Any,
    config: ModelConfig,
    points: np.ndarray,
    *,
    seed: int,
    spectra: Spectra,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Three noise levels in data units: the chosen one, between its neighbours on the grid.

    Args:
        model: a denoiser.
        config: its configuration, for the range of noise levels.
        points: (N, *shape), of which at most 128 are used.
        seed: picks them.
        spectra, folder, progress: as in `measure`.
    """
    highest = min(0.5 * config.scale, config.sigma_max)
    grid = np.geomspace(config.sigma_min, highest, NUM_LEVELS)
    subset = points[random_subset(len(points), NUM_SUBSET, seed=seed)]
    curves = measure(model, subset, grid, spectra=spectra, folder=folder, progress=progress)
    index = lid.choose_scale(grid, curves.projected, ambient_dim=points[0].size)
    return grid[index - 1 : index + 2]


def measure(
    model: Any,
    points: np.ndarray,
    sigmas: np.ndarray,
    *,
    spectra: Spectra,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Dimensions of a model at points and noise levels, block by block.

    Args:
        model: a denoiser.
        points: (N, *shape).
        sigmas: (S,) noise levels in data units.
        spectra: from `spectra`.
        folder: where each finished block is kept; blocks found there are not computed again.
        progress: called as `progress(done, total)`, in points times noise levels.
    """
    if folder is not None:
        folder.mkdir(exist_ok=True)
    blocks = []
    total = len(points) * len(sigmas)
    for start in range(0, len(points), BLOCK_SIZE):
        part = points[start : start + BLOCK_SIZE]
        path = None if folder is None else folder / f"{start:09d}.npy"
        block = None if path is None else read_array(path)
        if block is None:
            columns = []
            for sigma in sigmas:
                columns.append(_read(spectra(model, part, sigma)))
                if progress is not None:
                    progress(start * len(sigmas) + len(columns) * len(part), total)
            block = np.stack(columns, axis=-1)
            if path is not None:
                write_array(path, block)
        blocks.append(block)
    return Measured(*np.concatenate(blocks, axis=1))


def diagnostics(measured: Measured, column: int, sigma: float, config: ModelConfig) -> dict:
    """What says whether to believe the dimensions at one noise level.

    Args:
        measured: at N points.
        column: which of its noise levels.
        sigma: that level, in data units.
        config: of the model, for the range of its training.

    Returns:
        `off_manifold` and `negative_flipd`, numbers of points; `asymmetry`, the median over points;
        `sigma_outside_training`, a boolean.
    """
    return {
        "num_points": len(measured.flipd),
        "off_manifold": int(np.sum(measured.off_manifold[:, column] > 0)),
        "negative_flipd": int(np.sum(measured.flipd[:, column] < 0)),
        "asymmetry": float(np.median(measured.asymmetry[:, column])),
        "sigma_outside_training": not config.sigma_min * 0.999 <= sigma <= config.sigma_max * 1.001,
    }


def _read(spectrum: lid.Spectrum) -> np.ndarray:
    rank = lid.rank_by_threshold(spectrum.eigenvalues)
    fields = (
        spectrum.projected_flipd,
        spectrum.thresholded_flipd,
        spectrum.flipd,
        rank,
        spectrum.residual,
        spectrum.off_manifold,
        spectrum.asymmetry,
    )
    return np.stack([np.asarray(field, np.float32) for field in fields])
