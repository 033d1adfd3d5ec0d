"""The onset of memorization: what a model does at moments of its training.

At each moment: the share of its samples that are copies of training points, LID_theta of training
and of held-out points at one noise level, and the denoising loss of both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from mmh_jax import lid
from mmh_jax.evaluation.loss_gap import LossCurve, loss_curve, loss_gap
from mmh_jax.mapping import over_points
from mmh_jax.memorization.labels import copies
from mmh_jax.sample import sample
from mmh_jax.typing import Array, Denoiser, Estimate, Key

__all__ = ["Moment", "Onset"]


class Moment(NamedTuple):
    """What was measured after so many steps of training.

    Attributes:
        step: of the training.
        memorized: the share of memorized samples.
        lid_train, lid_held_out: LID_theta, means over points, with their standard errors.
        loss_train, loss_held_out: denoising losses over noise levels.
    """

    step: int
    memorized: Estimate
    lid_train: Estimate
    lid_held_out: Estimate
    loss_train: LossCurve
    loss_held_out: LossCurve

    @property
    def gap(self) -> Estimate:
        """Held-out loss less training loss, at each noise level."""
        return loss_gap(self.loss_train, self.loss_held_out)

    def row(self) -> dict[str, Any]:
        """Numbers and lists, for a table or JSON."""
        gap = self.gap
        estimates = {
            "memorized": self.memorized,
            "lid_train": self.lid_train,
            "lid_held_out": self.lid_held_out,
        }
        flat: dict[str, Any] = {"step": self.step}
        for name, found in estimates.items():
            flat |= {name: float(found.value), f"{name}_stderr": float(found.stderr)}
        return flat | {"gap": gap.value.tolist(), "gap_stderr": gap.stderr.tolist()}


@dataclasses.dataclass(frozen=True, eq=False)
class Onset:
    """What is measured at every moment, on the same points with the same noise.

    Attributes:
        points: (N, *shape) all training points, in data units; the samples are compared with them.
        train, held_out: (M, *shape) those at which dimension and loss are measured: some of the
            training points, and as many that the model never saw.
        sigma: the noise level of LID_theta, in data units.
        sigmas: those of the losses.
        num_samples: of the model.
        sigma_range: the least and the largest noise level of sampling.
        key: draws samples and noise, the same at each moment.
        num_levels: of the sampler.
    """

    points: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    sigma: float
    sigmas: np.ndarray
    num_samples: int
    sigma_range: tuple[float, float]
    key: Key
    num_levels: int = 24

    def __call__(self, denoiser: Denoiser, step: int) -> Moment:
        """Measure a model after `step` steps."""
        sample_key, train_key, held_out_key = jax.random.split(self.key, 3)
        low, high = self.sigma_range
        samples = sample(
            denoiser, self.num_samples, key=sample_key, sigma_min=low, sigma_max=high,
            num_levels=self.num_levels, shape=self.points.shape[1:],
        )  # fmt: skip
        return Moment(
            step,
            copies(np.asarray(samples), self.points).fraction,
            self._dimension(denoiser, self.train),
            self._dimension(denoiser, self.held_out),
            loss_curve(denoiser, self.train, self.sigmas, key=train_key),
            loss_curve(denoiser, self.held_out, self.sigmas, key=held_out_key),
        )

    def _dimension(self, denoiser: Denoiser, points: np.ndarray) -> Estimate:
        values = _expected(denoiser, points, np.float32(self.sigma))
        error = values.std(ddof=1) / len(values) ** 0.5
        return Estimate(float(values.mean()), float(error))


def _expected_flipd(denoiser: Denoiser, x: Array, sigma: Array) -> Array:
    return lid.jacobian_spectrum(denoiser, x, sigma).expected_flipd


_expected = over_points(_expected_flipd, (None, 0, None), chunk_size=8)
