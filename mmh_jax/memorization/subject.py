r"""What a detector may look at: points, models, and the noise levels at which it looks."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import struct

from mmh_jax import linalg
from mmh_jax.typing import Array, ArrayLike

__all__ = ["At", "Settings", "Subject"]


@struct.dataclass
class Subject:
    """What is looked at: points, and what is known of how they came about.

    Attributes:
        points: (M, *shape), generated or of the data, in data units.
        denoiser: the model.  With `conditions` it is bound to each point's own.
        unconditional: the model without condition; with `conditions`, `denoiser.condition(None)`
            by default.
        baseline: a model of the same data that has not memorized them: of an early checkpoint, or
            trained on other data.
        data: (N, *shape), the training data.
        conditions: (M, ...), a pytree: the condition of each point.
        generations: (M, n, *shape), n generations of each point's condition.
        reference: a `StepReference` of normal runs on the levels of `Settings`.
    """

    points: Any
    denoiser: Any
    unconditional: Any = None
    baseline: Any = None
    data: Any = None
    conditions: Any = None
    generations: Any = None
    reference: Any = None


@struct.dataclass
class Settings:
    """Noise levels and sizes of what is computed; one for all detectors, so that they compare.

    Attributes:
        sigma: the noise level of dimensions, curvatures and noisy points, in data units.  To be
            chosen without a look at the labels.
        levels: (S,) decreasing noise levels of the sampler, such as `sample.karras_levels`; the
            first is sigma_max.
        encode_levels: (S,) increasing noise levels, to carry a clean point up.
        spread: the standard deviation of the data per coordinate.
        trace: of FLIPD.
        curvature_trace: of the curvature difference, linear.
        num_samples: draws of noise for the denoising loss and the spread of the denoised.
        regeneration_levels: (S,) decreasing noise levels; the first is that of the noise from which
            a point is regenerated, best about half of the spread.
        num_regenerations: of each point.
        bundle_samples: for the normal bundle; 4 D by default.
        soft_probes, soft_order: of `lid.soft_rank_lanczos`.
        danger_samples: draws of noise for the danger zone.
        tiles: along each side, for distances between generations; 1 for points that are no images.
        token: which one ends a prompt.
    """

    sigma: ArrayLike
    levels: Any = None
    encode_levels: Any = None
    spread: ArrayLike = 1.0
    trace: Any = struct.field(pytree_node=False, default=linalg.exact())
    curvature_trace: Any = struct.field(pytree_node=False, default=linalg.rademacher(16))
    num_samples: int = struct.field(pytree_node=False, default=64)
    regeneration_levels: Any = None
    num_regenerations: int = struct.field(pytree_node=False, default=16)
    bundle_samples: int | None = struct.field(pytree_node=False, default=None)
    soft_probes: int = struct.field(pytree_node=False, default=8)
    soft_order: int = struct.field(pytree_node=False, default=16)
    danger_samples: int = struct.field(pytree_node=False, default=16)
    tiles: int = struct.field(pytree_node=False, default=4)
    token: int = struct.field(pytree_node=False, default=-1)


class At(NamedTuple):
    """One point and its models, as quantities see them; a field that is not known is None."""

    x: Array
    denoiser: Any
    unconditional: Any
    baseline: Any
    data: Any
    generations: Any
    reference: Any
    settings: Settings

    @property
    def pair(self) -> tuple[Any, Any]:
        """The models with and without the condition, in this order."""
        return self.denoiser, self.unconditional

    @property
    def sigma(self) -> Any:
        """The noise level of the point."""
        return self.settings.sigma

    @property
    def sigma_max(self) -> Any:
        """Where sampling begins."""
        return self.settings.levels[0]
