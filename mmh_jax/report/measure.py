r"""LID_theta of a saved model at many points, each at a noise level chosen without labels.

The levels: expected FLIPD of a random subset on a logarithmic grid, from the smallest level that
the model was trained at to half the spread of the data; of the grid the part is kept that holds the
plateaus of nearly all points of the subset, with their neighbours.
The dimension: expected FLIPD at a plateau of each point's own curve over that part.  Its standard
error has what the network's Jacobian says of its own error, and the spread over that level and its
two neighbours, since a dimension that depends on the scale is known no better.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import denoise, lid, mapping
from mmh_jax.report.files import read_array, write_array
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Estimate

__all__ = [
    "Chosen",
    "Measured",
    "at_level",
    "at_plateau",
    "choose_level",
    "choose_levels",
    "diagnostics",
    "extended",
    "measure",
    "random_subset",
    "spectra",
]

LEARNED = 0.95  # of the coordinates: a larger LID_theta is that of a network that returns its input
NUM_LEVELS = 15
MIN_LEVELS = 7
NUM_SUBSET = 128
BLOCK_SIZE = 64

Progress = Callable[[int, int], None]
Spectra = Callable[[Any, np.ndarray, float], lid.Spectrum]


class Measured(NamedTuple):
    """What Jacobians say at N points and S noise levels; each field is (N, S).

    Attributes:
        tangential: FLIPD of the tangent space alone.
        network_error: its standard error, as far as the network's error shows; for `expected` it
            is large.
        expected: FLIPD of the tangent space from the eigenvalues alone.
        projected: FLIPD without the negative eigenvalues.
        thresholded: FLIPD without those smaller in size than the most negative one, too.
        flipd: FLIPD.
        rank: how many eigenvalues exceed one half.
        residual: |x - D(x; sigma)|^2 / sigma^2; large where x is off the model's manifold.
        off_manifold: 1 where it is too large for a point of the manifold, else 0.
        asymmetry: of the Jacobian, 0 to 1; see `lid.Spectrum`.
    """

    tangential: np.ndarray
    network_error: np.ndarray
    expected: np.ndarray
    projected: np.ndarray
    thresholded: np.ndarray
    flipd: np.ndarray
    rank: np.ndarray
    residual: np.ndarray
    off_manifold: np.ndarray
    asymmetry: np.ndarray


class Chosen(NamedTuple):
    """What is measured at one noise level for each of N points.

    Attributes:
        lid: expected FLIPD and its standard error.
        sigma: (N,) the noise levels, in data units.
        num_plateaus: (N,) of each point's curve; where 0 there is no dimension, -1 where the level
            was given.
        measured: all readings at that level, (N,) each.
    """

    lid: Estimate
    sigma: np.ndarray
    num_plateaus: np.ndarray
    measured: Measured

    @property
    def dimension(self) -> Estimate:
        """`lid`, with NaN in place of a value where there is no plateau."""
        value = np.where(self.num_plateaus == 0, np.nan, self.lid.value)
        return Estimate(value, self.lid.stderr)

    def learned(self, ambient_dim: int) -> Estimate:
        """`dimension`, also NaN off the model's manifold, and where it is that of the space."""
        value = self.dimension.value
        unknown = (self.measured.off_manifold > 0) | (value > LEARNED * ambient_dim)
        return Estimate(np.where(unknown, np.nan, value), self.lid.stderr)


def at_plateau(measured: Measured, sigmas: np.ndarray, ambient_dim: int) -> Chosen:
    """Each point at a plateau of its own curve of expected FLIPD; see `lid.at_plateau`."""
    found = lid.at_plateau(_curves(measured, sigmas), ambient_dim=ambient_dim)
    # A curve that is nowhere finite has no flattest level: any will do.
    column = np.abs(sigmas - np.nan_to_num(found.sigma)[:, None]).argmin(axis=1)
    rows = np.arange(len(column))
    there = Measured(*(field[rows, column] for field in measured))
    estimate = Estimate(found.value, found.stderr)
    return Chosen(estimate, np.asarray(sigmas)[column], found.num_plateaus, there)


def at_level(measured: Measured, sigma: float) -> Chosen:
    """Each point at the one level that was measured."""
    there = Measured(*(field[:, 0] for field in measured))
    num = len(there.flipd)
    estimate = Estimate(there.expected, there.network_error)
    return Chosen(estimate, np.full(num, sigma), np.full(num, -1), there)


def _curves(measured: Measured, sigmas: np.ndarray) -> lid.Curve:
    return lid.Curve(sigmas, measured.expected, measured.network_error, measured.residual)


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
    """The noise levels, in data units, among which each point finds its own.

    Args:
        model: a denoiser.
        config: its configuration, for the range of noise levels.
        points: (N, *shape), of which at most 128 are used.
        seed: picks them.
        spectra, folder, progress: as in `measure`.

    Returns:
        (S,): at least 7 neighbouring levels of the grid of 15; those at which 90% of the points
        looked at have their plateaus, and two more on both sides.

    Raises:
        ValueError: if the model was not trained below half the spread of its data, or is finite at
            no level.
    """
    grid, sigma = _plateaus(
        model, config, points, seed=seed, spectra=spectra, folder=folder, progress=progress
    )
    ends = np.quantile(sigma, [0.05, 0.95], method="nearest")
    low, high = np.abs(np.log(grid) - np.log(ends)[:, None]).argmin(axis=1)
    low, high = _window(int(low), int(high))
    return grid[low : high + 1]


def extended(sigmas: np.ndarray, highest: float) -> np.ndarray:
    """Levels in a geometric progression, and as many more of it as reach `highest`.

    >>> extended(np.array([1.0, 2.0]), 7.0)
    array([1., 2., 4., 8.])
    """
    ratio = sigmas[1] / sigmas[0]
    more = max(int(np.ceil(np.log(highest / sigmas[-1]) / np.log(ratio) - 1e-9)), 0)
    return np.concatenate([sigmas, sigmas[-1] * ratio ** np.arange(1, more + 1)])


def choose_level(
    model: Any,
    config: ModelConfig,
    points: np.ndarray,
    *,
    seed: int,
    spectra: Spectra,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> float:
    """One noise level for all points, in data units: the median of their plateaus.

    Args, Raises: as `choose_levels`, which finds levels among which each point has its own.
    """
    _, sigma = _plateaus(
        model, config, points, seed=seed, spectra=spectra, folder=folder, progress=progress
    )
    return float(np.median(sigma))


def _plateaus(
    model: Any,
    config: ModelConfig,
    points: np.ndarray,
    *,
    seed: int,
    spectra: Spectra,
    folder: Path | None,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The grid of levels, and the level of a plateau of each point looked at that has one."""
    highest = min(0.5 * config.scale, config.sigma_max)
    if not config.sigma_min < highest:
        raise ValueError(
            f"the model was trained at noise levels from sigma_min = {config.sigma_min:g} up, and "
            f"half the spread of its data is {0.5 * config.scale:g}: there is no level between "
            "them at which a dimension could be seen.  Train a model with a smaller sigma_min."
        )
    grid = np.geomspace(config.sigma_min, highest, NUM_LEVELS)
    subset = points[random_subset(len(points), NUM_SUBSET, seed=seed)]
    curves = measure(model, subset, grid, spectra=spectra, folder=folder, progress=progress)
    found = lid.at_plateau(_curves(curves, grid), ambient_dim=points[0].size)
    sigma = found.sigma[found.num_plateaus > 0]
    if not len(sigma):
        sigma = found.sigma[np.isfinite(found.sigma)]
    if not len(sigma):
        raise ValueError(
            "no noise level has a finite dimension; the model is untrained on this range, or the "
            "points are far from its data."
        )
    return grid, sigma


def _window(low: int, high: int) -> tuple[int, int]:
    """The first and the last level to look at, if those of the plateaus are `low` and `high`."""
    low, high = max(low - 2, 0), min(high + 2, NUM_LEVELS - 1)
    missing = max(MIN_LEVELS - 1 - (high - low), 0)
    low = max(low - missing // 2, 0)
    high = min(max(high, low + MIN_LEVELS - 1), NUM_LEVELS - 1)
    return min(low, high - MIN_LEVELS + 1), high


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


def diagnostics(chosen: Chosen, model: Any, ambient_dim: int) -> dict[str, Any]:
    """What says whether to believe the dimensions.

    Args:
        chosen: at N points.
        model: the denoiser, for the range of its training.
        ambient_dim: D.

    Returns:
        `not_finite`, `no_plateau`, `full`, `off_manifold` and `negative_flipd`, numbers of points;
        `asymmetry`, the median over the finite points, or None; `sigma_outside_training`, a
        boolean.  `full` counts dimensions above .95 D: the data fill the space there, or the
        network returns its input, having learned nothing at any level with a plateau.
    """
    measured = chosen.measured
    finite = np.isfinite(measured.flipd) & np.isfinite(measured.asymmetry)
    return {
        "num_points": len(chosen.sigma),
        "not_finite": int(np.sum(~finite)),
        "no_plateau": int(np.sum(chosen.num_plateaus == 0)),
        "full": int(np.sum(chosen.dimension.value > LEARNED * ambient_dim)),
        "off_manifold": int(np.sum(measured.off_manifold > 0)),
        "negative_flipd": int(np.sum(measured.flipd < 0)),
        "asymmetry": float(np.median(measured.asymmetry[finite])) if finite.any() else None,
        "sigma_outside_training": bool(np.any(denoise.outside_training(model, chosen.sigma))),
    }


def _read(spectrum: lid.Spectrum) -> np.ndarray:
    fields = {
        "tangential": spectrum.tangential_flipd,
        "network_error": spectrum.network_error,
        "expected": spectrum.expected_flipd,
        "projected": spectrum.projected_flipd,
        "thresholded": spectrum.thresholded_flipd,
        "flipd": spectrum.flipd,
        "rank": lid.rank_by_threshold(spectrum.eigenvalues),
        "residual": spectrum.residual,
        "off_manifold": spectrum.off_manifold,
        "asymmetry": spectrum.asymmetry,
    }
    return np.stack([np.asarray(fields[name], np.float32) for name in Measured._fields])
