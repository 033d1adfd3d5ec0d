"""What an audit says: its verdict in a sentence, what that rests on, and what it cannot know."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mmh_jax.data import sources
from mmh_jax.data.splits import deduplicated
from mmh_jax.memorization import Label
from mmh_jax.report.findings import RATE, Curves, Findings
from mmh_jax.report.page import Exhibit, Page, data_uri
from mmh_jax.report.pictures import Role
from mmh_jax.report.samples import Judged
from mmh_jax.report.summary import environment, quantiles

__all__ = ["About", "evidence", "headline", "limits", "page", "summary"]

MOST_EXHIBITS = 24
COMPLEXITY = ("score_png_bytes", "score_pixel_variance")
SHOWN = (
    "index", "role", "copies", "planted", "label", "verdict", "extracted", "sigma_mem",
    "separation", "p_value", "lid_theta", "lid_star", "lid_plateau", "reason",
)  # fmt: skip
ENOUGH = 8  # copies: the dose that the audit is asked about


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
    # Of points, not of rows.
    extracted = judged.extracted[deduplicated(about.data.points).first] > 0
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
        "samples": judged.summary() | {"extracted_points": int(extracted.sum())},
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
