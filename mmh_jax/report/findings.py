"""What an audit found: verdicts, and the table of points."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mmh_jax import memorization
from mmh_jax.data.splits import deduplicated
from mmh_jax.memorization import Label
from mmh_jax.report.measure import LEARNED, Chosen
from mmh_jax.report.pictures import Pictures, Role
from mmh_jax.report.samples import Judged
from mmh_jax.report.summary import columns_of_model
from mmh_jax.typing import Estimate

__all__ = [
    "RATE",
    "Curves",
    "Findings",
    "closed_form",
    "columns",
    "find",
    "flat_dimension",
]

RATE = 0.05  # of false discoveries


class Curves(NamedTuple):
    """Dimensions of both sides over noise levels; values and errors (P, S).

    Attributes:
        sigmas: (S,) in data units.
        theta: of the model.
        star: of the model that never saw a point, or of the closed-form diffusion.
        column: (P,) the level next to each point's separation scale, at which both are compared.
    """

    sigmas: np.ndarray
    theta: Estimate
    star: Estimate
    column: np.ndarray

    @staticmethod
    def at(sigmas: np.ndarray, theta: Estimate, star: Estimate, sigma: np.ndarray) -> Curves:
        """The curves read at given levels."""
        column = np.abs(np.log(sigmas) - np.log(sigma)[:, None]).argmin(axis=1)
        return Curves(sigmas, theta, star, column)

    def compared(self, side: Estimate) -> Estimate:
        """(P,) of one side, at the level of comparison."""
        rows = np.arange(len(self.column))
        return Estimate(*(np.asarray(field)[rows, self.column] for field in side))


class Findings(NamedTuple):
    """The verdict of P points and what it rests on; each array is (P,).

    Attributes:
        pictures: the points.
        apart: their separation from the training set.
        scale: sigma_mem of the model, in separation scales.
        null: (H,) the same of models that never saw the points; empty if there are none.
        p_value: of `scale` among `null`; NaN of what is held out, and if there is no null.
        label: codes of `Label`.
        reason: a phrase for each.
        lid_theta, lid_star: at the noise level next to the separation scale.
        plateau: the model's dimension at its own plateau; NaN where it has none.
        chosen: what else was measured at the plateau.
        extracted: how many samples copy each point.
        dose: of the planted ones, or None.
    """

    pictures: Pictures
    apart: memorization.Separation
    scale: memorization.BasinScale
    null: np.ndarray
    p_value: np.ndarray
    label: np.ndarray
    reason: np.ndarray
    lid_theta: Estimate
    lid_star: Estimate
    plateau: Estimate
    chosen: Chosen
    extracted: np.ndarray
    dose: memorization.DoseResponse | None

    @property
    def judged(self) -> np.ndarray:
        """(P,) which points are asked about."""
        return self.pictures.is_judged

    @property
    def memorized(self) -> np.ndarray:
        """(P,) which of the points that are asked about are memorized."""
        return self.judged & np.isin(self.label, [Label.OD_MEM, Label.DD_MEM])

    def count(self, label: Label) -> int:
        """Points of one verdict."""
        return int(np.sum(self.judged & (self.label == label)))

    def agreement(self) -> dict[str, dict[str, int]]:
        """Verdict against extraction: points of each kind."""
        return {
            label.title: {
                "extracted": int(np.sum(self.judged & (self.label == label) & of)),
                "not extracted": int(np.sum(self.judged & (self.label == label) & ~of)),
            }
            for label in Label
            for of in [self.extracted > 0]
        }


def find(
    pictures: Pictures,
    apart: memorization.Separation,
    levels: np.ndarray,
    share: np.ndarray,
    unseen: np.ndarray | None,
    num_regenerations: int,
    chosen: Chosen,
    curves: Curves,
    judged: Judged,
    ambient_dim: int,
) -> Findings:
    """The verdicts.

    Args:
        pictures, apart: P points and their separation.
        levels: (L,) noise levels in separation scales.
        share: (P, L) of the ends that return, by the model.
        unseen: the same by models that never saw the points, or None.
        num_regenerations: how many ends.
        chosen: LID_theta at its plateaus.
        curves: of both sides.
        judged: the samples.
        ambient_dim: D.
    """
    scale = memorization.basin_scale(levels, share, num_regenerations)
    is_control = pictures.role == Role.HELD_OUT
    null = scale.value[is_control]
    if unseen is not None:
        single = pictures.is_judged & ~pictures.is_repeated
        others = memorization.basin_scale(levels, unseen[single], num_regenerations)
        null = np.concatenate([null, others.value])
    p_value, discovered = np.full(len(share), np.nan), np.ones(len(share), bool)
    if len(null):
        # Below the separation a score counts as 0, among the controls, too: a model returns from
        # some noise to all that it was trained on, and these must not vouch for a few others.
        scores, control = (np.where(value >= 1, value, 0) for value in (scale.value, null))
        p_value = np.where(is_control, np.nan, memorization.conformal_p_values(scores, control))
        family = np.where(pictures.role == Role.PLANTED, 2, pictures.is_repeated.astype(int))
        discovered = memorization.discoveries(p_value, rate=RATE, families=family)
    faults = _faults(chosen, ambient_dim)
    label = memorization.basin_verdict(
        scale.value, np.ones(len(share)), repeated=pictures.is_repeated,
        discovered=discovered, known=faults == "",
    )  # fmt: skip
    dose = None
    planted = pictures.role == Role.PLANTED
    if planted.any():
        hit = (scale.value >= 1) & discovered
        dose = memorization.dose_response(pictures.planted[planted], hit[planted])
    extracted = np.where(is_control, 0, judged.extracted[np.where(is_control, 0, pictures.rows)])
    plateau = Estimate(np.where(faults == "", chosen.lid.value, np.nan), chosen.lid.stderr)
    theta, star = curves.compared(curves.theta), curves.compared(curves.star)
    found = Findings(
        pictures, apart, scale, null, p_value, label, faults, theta, star, plateau, chosen,
        extracted, dose,
    )  # fmt: skip
    return found._replace(reason=_reasons(found, len(judged.nearest)))


def _faults(chosen: Chosen, ambient_dim: int) -> np.ndarray:
    """(P,) why the model has no dimension at a point; empty where it has one."""
    measured, value = chosen.measured, chosen.dimension.value
    faults = np.full(len(value), "", object)
    faults[chosen.num_plateaus == 0] = "LID_theta has no plateau there"
    faults[measured.off_manifold > 0] = "it is off the model's manifold"
    faults[value > LEARNED * ambient_dim] = (
        "the model has not learned this noise level (LID_theta is that of the whole space)"
    )
    faults[~np.isfinite(measured.flipd)] = "the model is not finite there"
    return faults


def _reasons(found: Findings, num_samples: int) -> np.ndarray:
    """(P,) a phrase for each verdict."""
    reasons = []
    for row, label in enumerate(found.label):
        scale = found.scale.value[row]
        times = (
            f"{scale:.2g} of" if np.isfinite(found.scale.high[row]) else f"{scale:.2g} or more of"
        )
        returns = (
            f"the model returns to it from {times} the noise that hides it from others"
            if scale > 0
            else "the model does not return to it"
        )
        reason = returns
        if label == Label.UNDECIDED:
            reason = found.reason[row] or (
                f"{returns}, but the controls do not exclude chance (p = {found.p_value[row]:.2g})"
            )
        elif label == Label.NOT_MEMORIZED and found.extracted[row]:
            reason = (
                f"{found.extracted[row]} of {num_samples} samples copy it, and yet {returns}; "
                "1 and more is memorized"
            )
        reasons.append(reason)
    return np.array(reasons, object)


def closed_form(
    points: np.ndarray,
    asked: np.ndarray,
    levels: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(2, P, S) values and errors of the closed-form diffusion, the point itself left out."""
    rows, there, different = _places(points, asked)
    result = np.full((2, len(asked), len(levels)), np.nan)
    curve = memorization.diffusion_curve(different, rows=rows, sigmas=levels, progress=progress)
    result[:, there] = curve.value, curve.stderr
    return result


def flat_dimension(points: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(P,) of the closed-form diffusion; where it has none, the median of the others, or D."""
    rows, there, different = _places(points, asked)
    dimension = np.full(len(asked), np.nan)
    dimension[there] = memorization.diffusion_lid(different, rows=rows).value
    known = dimension[np.isfinite(dimension)]
    typical = float(np.median(known)) if len(known) else float(points[0].size)
    return np.maximum(np.where(np.isfinite(dimension), dimension, typical), 1.0)


def _places(points: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows among the different points of what is asked for, which are there, and these points."""
    different = deduplicated(points).points
    row_of = {(point + 0).tobytes(): row for row, point in enumerate(different)}
    rows = np.array([row_of.get((point + 0).tobytes(), -1) for point in asked])
    return rows[rows >= 0], rows >= 0, different


def columns(found: Findings, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """The columns of `points.csv`, each (P,)."""
    pictures, scale, apart = found.pictures, found.scale, found.apart
    verdicts = [Label(int(code)).title for code in found.label]
    is_judged = pictures.is_judged
    own = columns_of_model(pictures.rows, None, found.chosen)
    if labels is not None:  # what is held out may be of another source, whose labels are not known
        inside = pictures.rows < len(labels)
        own["label"] = np.where(inside, np.asarray(labels)[np.where(inside, pictures.rows, 0)], -1)
    index = own.pop("index")
    return {
        "index": index,
        "role": np.array([Role(int(code)).title for code in pictures.role]),
        "copies": pictures.copies,
        "planted": pictures.planted,
        "verdict": np.where(is_judged, verdicts, ""),
        "extracted": found.extracted,
        "sigma_mem": scale.value * apart.scale,
        "sigma_mem_low": scale.low * apart.scale,
        "sigma_mem_high": scale.high * apart.scale,
        "separation": apart.scale,
        "p_value": found.p_value,
        "lid_theta": found.lid_theta.value,
        "lid_theta_stderr": found.lid_theta.stderr,
        "lid_star": found.lid_star.value,
        "lid_star_stderr": found.lid_star.stderr,
        "lid_plateau": found.plateau.value,
        "lid_plateau_stderr": found.plateau.stderr,
        **{name: own[name] for name in own if not name.startswith("lid_theta")},
        "nearest_index": apart.nearest,
        "nearest_distance": apart.distance,
        "reason": np.where(is_judged, found.reason, ""),
    }
