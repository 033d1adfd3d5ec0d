"""What an audit found: verdicts, the table of points, and the sentences that say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mmh_jax import memorization
from mmh_jax.data import sources
from mmh_jax.data.splits import deduplicated
from mmh_jax.memorization import Label
from mmh_jax.report.measure import LEARNED, Chosen
from mmh_jax.report.page import Exhibit, Page, data_uri
from mmh_jax.report.pictures import Pictures, Role
from mmh_jax.report.samples import Judged
from mmh_jax.report.summary import columns_of_model, environment, quantiles
from mmh_jax.typing import Estimate

__all__ = [
    "About",
    "Curves",
    "Findings",
    "closed_form",
    "columns",
    "evidence",
    "find",
    "flat_dimension",
    "headline",
    "limits",
    "page",
    "summary",
]

RATE = 0.05  # of false discoveries
MOST_EXHIBITS = 24
COMPLEXITY = ("score_png_bytes", "score_pixel_variance")
SHOWN = (
    "index", "role", "copies", "planted", "label", "verdict", "extracted", "sigma_mem",
    "separation", "p_value", "lid_theta", "lid_star", "lid_plateau", "reason",
)  # fmt: skip
ENOUGH = 8  # copies: the dose that the audit is asked about


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


class About(NamedTuple):
    """An audit but for its findings.

    Attributes:
        data: the source.
        settings: of the audit.
        has_reference: whether there was a model that never saw the points.
        diagnostics: of LID_theta.
        sigmas: its noise levels.
    """

    data: sources.Source
    settings: dict[str, Any]
    has_reference: bool
    diagnostics: dict[str, Any]
    sigmas: np.ndarray

    @property
    def noun(self) -> str:
        """What a point is called."""
        return "picture" if self.data.is_image else "point"


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
        p_value = np.where(is_control, np.nan, memorization.conformal_p_values(scale.value, null))
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
    if labels is not None:  # what is held out may be of elsewhere, but then has no labels here
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


def _plural(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def headline(found: Findings, about: About) -> str:
    """The verdict in one sentence."""
    num = int(found.judged.sum())
    asked = f"{num:,} {about.noun}s"
    od, dd = found.count(Label.OD_MEM), found.count(Label.DD_MEM)
    rows = int(found.pictures.copies[found.memorized].sum())
    where = f" at a false discovery rate of {100 * RATE:.0f}%" if len(found.null) else ""
    if od + dd:
        kinds = [
            f"{dd} that the data repeat (DD-Mem)" if dd else "",
            f"{od} that occur once (OD-Mem)" if od else "",
        ]
        several = f" ({rows:,} rows)" if rows > od + dd else ""
        return (
            f"{od + dd} of {asked}{several} {'is' if od + dd == 1 else 'are'} memorized{where}: "
            f"{' and '.join(kind for kind in kinds if kind)}."
        )
    if about.diagnostics["full"] > num / 2:
        return (
            "Undecided: the model has not learned this noise level, since its dimension is that of "
            "the whole space; train longer."
        )
    if found.count(Label.UNDECIDED) > num / 2:
        return (
            f"Undecided: at {found.count(Label.UNDECIDED):,} of {asked} the model has no dimension."
        )
    return f"None of {asked} is found to be memorized{where}."


def evidence(found: Findings, about: About, judged: Judged) -> list[str]:
    """Sentences that say what the verdict rests on."""
    sentences, noun = [], about.noun
    if found.dose is not None:
        hits, planted, low, high = found.dose.at_least(ENOUGH)
        if planted:
            sentences.append(
                f"This audit finds what is there {ENOUGH} times or more with probability "
                f"{hits / planted:.2f} (95% interval {low:.2f} to {high:.2f}): it found {hits} of "
                f"{planted} {noun}s that it had planted."
            )
    if len(found.null):
        false = int(np.sum(found.null >= 1))
        sentences.append(
            f"Of {len(found.null):,} scores of {noun}s under a model that never saw them, {false} "
            "look memorized."
        )
    extracted = found.judged & (found.extracted > 0)
    both, num = int(np.sum(extracted & found.memorized)), int(found.memorized.sum())
    sentences.append(
        f"{int(judged.memorized.sum()):,} of {len(judged.nearest):,} samples copy "
        f"{_plural(int(extracted.sum()), noun)} of those judged; {both} of the {num} memorized "
        f"are among them, and {int(extracted.sum()) - both} others."
    )
    undecided = found.count(Label.UNDECIDED)
    if undecided:
        reasons, counts = np.unique(
            found.reason[found.judged & (found.label == Label.UNDECIDED)].astype(str),
            return_counts=True,
        )
        most = reasons[np.argmax(counts)]
        sentences.append(f"{_plural(undecided, noun)} undecided, most because {most}.")
    return sentences


def limits(found: Findings, about: About) -> list[str]:
    """Sentences that say what the audit cannot say."""
    noun, result = about.noun, []
    if not len(found.null):
        result.append(
            f"No {noun}s were held out (--held-out), so that no false discovery rate is known."
        )
    else:
        least = int(np.ceil(found.judged.sum() / (RATE * (1 + len(found.null)))))
        result.append(
            f"With {len(found.null):,} scores of controls a rate of {100 * RATE:.0f}% can be "
            f"reached only if about {least} or more {noun}s that occur once are memorized; fewer "
            "that look so are undecided."
        )
    if found.dose is None:
        result.append(
            "Nothing was planted, so that what this audit would have missed is not known."
        )
    if not about.has_reference:
        result.append(
            "No model that never saw the data was there to compare with (--reference): in its "
            "place stands a flat distribution of the dimension that the data show."
        )
    held = int(np.sum(found.pictures.role != Role.JUDGED))
    if about.settings["model"] is None:
        result.append(
            f"The model is one that this audit trained; another may memorize otherwise. {held} "
            f"{noun}s were its controls, and are not judged."
        )
    result.append(
        f"Near-copies that are not equal count as different {noun}s; a memorized part of a {noun} "
        "is not looked for."
    )
    return result


def summary(found: Findings, about: About, judged: Judged) -> dict[str, Any]:
    """The content of `summary.json` but for settings and timings."""
    rows = {
        label.title: int(found.pictures.copies[found.judged & (found.label == label)].sum())
        for label in Label
    }
    controls: dict[str, Any] = {
        "held_out": int(np.sum(found.pictures.role == Role.HELD_OUT)),
        "null_scores": len(found.null),
        "null_memorized": int(np.sum(found.null >= 1)),
        "false_discovery_rate": RATE if len(found.null) else None,
    }
    if found.dose is not None:
        controls["dose_response"] = [
            {
                "copies": int(c),
                "planted": int(p),
                "found": int(f),
                "low": float(a),
                "high": float(b),
            }
            for c, p, f, a, b in zip(*found.dose, strict=True)
        ]
    return {
        "verdict": headline(found, about),
        "evidence": evidence(found, about, judged),
        "limits": limits(found, about),
        "verdicts": {label.title: found.count(label) for label in Label},
        "verdicts_in_rows": rows,
        "agreement": found.agreement(),
        "controls": controls,
        "num_points": int(found.judged.sum()),
        "sigma": float(np.median(found.chosen.sigma)),
        "sigmas": [float(sigma) for sigma in about.sigmas],
        "separation": quantiles(found.apart.scale[found.judged]),
        "sigma_mem": quantiles((found.scale.value * found.apart.scale)[found.judged]),
        "lid_theta": quantiles(found.lid_theta.value[found.judged]),
        "lid_star": quantiles(found.lid_star.value[found.judged]),
        "lid_plateau": quantiles(found.plateau.value[found.judged]),
        "diagnostics": about.diagnostics,
        "samples": judged.summary(),
        "environment": environment(),
    }


def page(
    found: Findings,
    about: About,
    columns: dict[str, np.ndarray],
    curves: Curves,
    samples: np.ndarray,
    judged: Judged,
    timings: dict[str, float],
) -> Page:
    """The report; rows of the table in the order of what is of interest.

    Args:
        found, about: of the audit.
        columns: of `points.csv`.
        curves: of both sides.
        samples, judged: of the model, and what they copy.
        timings: seconds by stage.
    """
    order = np.lexsort((-found.scale.value, -found.extracted, ~found.memorized, ~found.judged))
    order = order[found.judged[order] | (found.pictures.role[order] == Role.PLANTED)]
    shown = {name: column[order] for name, column in columns.items() if name in SHOWN}
    scores = [name for name in columns if name in COMPLEXITY]
    shown |= {name: columns[name][order] for name in scores}
    settings = {name: value for name, value in about.settings.items() if value is not None}
    names = settings["detectors"]
    return Page(
        title=f"Audit of {about.data.name}",
        verdict=headline(found, about),
        evidence=evidence(found, about, judged),
        limits=limits(found, about),
        noun=about.noun,
        counts={label.title: found.count(label) for label in reversed(Label)},
        agreement=found.agreement(),
        dose=found.dose,
        columns=shown,
        sigmas=curves.sigmas,
        theta=np.asarray(curves.theta.value)[order],
        star=np.asarray(curves.star.value)[order],
        exhibits=_exhibits(found, about, order, samples, judged) if about.data.is_image else (),
        complexity=scores[0] if scores else None,
        tables={
            "Settings": settings | {"detectors": ", ".join(names)},
            "Versions": environment(),
            "Cost in seconds": {stage: f"{seconds:.1f}" for stage, seconds in timings.items()},
        },
    )


def _exhibits(
    found: Findings, about: About, order: np.ndarray, samples: np.ndarray, judged: Judged
) -> list[Exhibit]:
    """The first of the memorized pictures."""
    result = []
    for row in order[found.memorized[order]][:MOST_EXHIBITS]:
        index = int(found.pictures.rows[row])
        # Of repeated pictures samples name the first that was trained on, which is the first row.
        copies = np.flatnonzero(judged.memorized & (judged.nearest == index))[:3]
        times = int(found.pictures.copies[row])
        there = "once" if times == 1 else f"{times} times"
        result.append(
            Exhibit(
                index,
                data_uri(found.pictures.points[row]),
                [data_uri(samples[copy]) for copy in copies],
                data_uri(about.data.points[int(found.apart.nearest[row])]),
                f"Row {index}, {Label(int(found.label[row])).title}: there {there}, copied by "
                f"{int(found.extracted[row])} samples; {found.reason[row]}.",
            )
        )
    return result
