"""Where the sampler ends from noisy points, level by level, in files that can be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import mapping, memorization
from mmh_jax.report.files import kept_array
from mmh_jax.report.measure import Progress
from mmh_jax.train import ModelConfig
from mmh_jax.typing import Key

__all__ = ["ends"]


def ends(
    denoiser: Any,
    config: ModelConfig,
    points: np.ndarray,
    sigmas: np.ndarray,
    *,
    key: Key,
    num: int,
    folder: Path,
    progress: Progress,
) -> np.ndarray:
    """(P, L, K) how far from each point the sampler ends; infinite where that is not known.

    Args:
        denoiser: the model.
        config: for the range of the trained noise levels, beyond which nothing is known.
        points: (P, *shape).
        sigmas: (P, L) noise levels in data units.
        key: draws the noise, the same for all points and levels.
        num: K.
        folder: where each finished level is kept.
        progress: called as `progress(done, L)`.
    """
    folder.mkdir(exist_ok=True)

    def distances(denoiser: Any, x: Any, sigma: Any, smallest: Any) -> Any:
        return memorization.regeneration_distances(
            denoiser, x, sigma, key=key, num_samples=num, sigma_min=smallest
        )

    mapped = mapping.over_points(distances, (None, 0, 0, None), chunk_size=16)
    smallest, columns = np.float32(config.sigma_min), []
    for number, sigma in enumerate(sigmas.T.astype(np.float32)):
        column = kept_array(
            folder / f"{number}.npy",
            lambda sigma=sigma: mapped(denoiser, points, sigma, smallest),
        )
        columns.append(np.where((sigma <= config.sigma_max)[:, None], column, np.inf))
        progress(number + 1, sigmas.shape[1])
    return np.nan_to_num(np.stack(columns, axis=1), nan=np.inf, posinf=np.inf)
