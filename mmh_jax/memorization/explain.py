"""Why a point has its verdict: both dimensions, their curves, its neighbours and its scores.

Nothing is computed here but the nearest neighbours and the rank of each score; what was measured
for all points is put together for one, in words for a reader and in plain numbers for a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmh_jax.lid.flipd import Curve
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.memorization.data_dimension import check_rows
from mmh_jax.memorization.verdict import Label, Verdict
from mmh_jax.typing import ArrayLike, Estimate

__all__ = ["Explanation", "Score", "explain"]


class Score(NamedTuple):
    """A detector's score of one point, and the share of the other points that score lower."""

    value: float
    above: float


class Explanation(NamedTuple):
    """What is known of one point.

    Attributes:
        row: of the data.
        label: the verdict.
        z: how many standard errors LID_theta is above LID_*; negative: it is smaller.
        lid_theta, lid_star: numbers.
        neighbors: rows of the nearest other points that are not equal to it, nearest first.
        distances: to these, in data units.
        num_equal: how many points are equal to it, itself among them.
        curves: for `lid_theta` and `lid_star`, where given: a `Curve` of fields (S,).
        scores: by name.
    """

    row: int
    label: Label
    z: float
    lid_theta: Estimate
    lid_star: Estimate
    neighbors: tuple[int, ...]
    distances: tuple[float, ...]
    num_equal: int
    curves: Mapping[str, Curve]
    scores: Mapping[str, Score]

    @property
    def words(self) -> str:
        """The explanation as a paragraph."""
        sentences = [f"Point {self.row}: {self.label.title}.", self._verdict_in_words()]
        if self.num_equal > 1:
            sentences.append(f"It occurs {self.num_equal} times in the data.")
        sentences += [_curve_in_words(name, curve) for name, curve in self.curves.items()]
        if self.neighbors:
            near = ", ".join(map(str, self.neighbors))
            apart = ", ".join(f"{distance:.3g}" for distance in self.distances)
            sentences.append(f"Nearest other points: {near}; at distances {apart}.")
        for name, score in self.scores.items():
            share = f"above {score.above:.0%} of the others" if score.above >= 0 else "not ranked"
            sentences.append(f"{name}: {score.value:.3g}, {share}.")
        return " ".join(sentences)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists, for JSON; None for what is not finite."""
        estimates = {"lid_theta": self.lid_theta, "lid_star": self.lid_star}
        plain: dict[str, Any] = {
            "row": self.row,
            "verdict": self.label.title,
            "z": _plain(self.z),
            "neighbors": list(self.neighbors),
            "distances": list(self.distances),
            "num_equal": self.num_equal,
        }
        for name, estimate in estimates.items():
            plain |= {name: _plain(estimate.value), f"{name}_stderr": _plain(estimate.stderr)}
        plain["curves"] = {
            name: {
                field: [_plain(number) for number in getattr(curve, field)]
                for field in ("sigmas", "value", "stderr", "residual")
            }
            for name, curve in self.curves.items()
        }
        plain["scores"] = {
            name: {"value": _plain(score.value), "above": _plain(score.above)}
            for name, score in self.scores.items()
        }
        return plain

    def _verdict_in_words(self) -> str:
        theta, star = (_in_words(side) for side in (self.lid_theta, self.lid_star))
        both = f"the model has {theta} dimensions there, the data have {star}"
        gap = f"{abs(self.z):.1f} standard errors"
        match self.label:
            case Label.OD_MEM:
                return f"Overfitting: {both}, {gap} more."
            case Label.DD_MEM:
                return f"A property of the data: {both}, both few."
            case Label.UNDECIDED:
                missing = [
                    name
                    for name, side in (("the model", self.lid_theta), ("the data", self.lid_star))
                    if not (np.isfinite(side.value) and np.isfinite(side.stderr))
                ]
                return f"The dimension of {' and '.join(missing) or 'neither'} is not known."
        if self.z >= 0:
            return f"No dimension is lost: {both}."
        return f"No dimension is lost that the errors would not explain: {both}, {gap} more."


def explain(
    points: ArrayLike,
    row: int,
    lid_theta: Estimate,
    lid_star: Estimate,
    verdicts: Verdict,
    *,
    rows: ArrayLike | None = None,
    curve_theta: Curve | None = None,
    curve_star: Curve | None = None,
    scores: Mapping[str, ArrayLike] | None = None,
    num_neighbors: int = 5,
) -> Explanation:
    """Put together what is known of one point.

    Args:
        points: (N, *shape), the data.
        row: the point.
        lid_theta, lid_star, verdicts: of all points that were measured, (M,) each.
        rows: (M,) which points these are, or None for all N.
        curve_theta, curve_star: fields (M, S), sigmas (S,) or (M, S).
        scores: of detectors by name, (M,) each.
        num_neighbors: how many to name.

    Cost: the distances from one point to N.

    Raises:
        ValueError: if the point is not one of `rows`, or an array has not M entries.

    >>> points = np.array([[0.0], [0.1], [5.0], [9.0]])
    >>> theta, star = (Estimate(np.full(4, value), np.full(4, 0.1)) for value in (0.0, 1.0))
    >>> verdicts = Verdict(np.full(4, 1), np.full(4, -7.1))
    >>> print(explain(points, 2, theta, star, verdicts, num_neighbors=2).words)
    Point 2: OD-Mem. Overfitting: the model has 0.0 ± 0.1 dimensions there, the data have 1.0 ± 0.1,
    7.1 standard errors more. Nearest other points: 3, 1; at distances 4, 4.9.
    """
    array = np.asarray(points)
    measured = check_rows("explain", rows, len(array))
    place = np.flatnonzero(measured == row)
    if not len(place):
        raise ValueError(f"`explain(row={row})` is none of the {len(measured)} measured points.")
    at = int(place[0])
    sides = {"lid_theta": lid_theta, "lid_star": lid_star}
    columns = {f"{name}.{field}": getattr(side, field) for name, side in sides.items()
               for field in ("value", "stderr")}  # fmt: skip
    columns |= {"verdicts.label": verdicts.label, "verdicts.z": verdicts.z}
    columns |= {f"scores[{name!r}]": score for name, score in (scores or {}).items()}
    for name, column in columns.items():
        if np.shape(column) != measured.shape:
            raise ValueError(
                f"`explain({name})` has shape {np.shape(column)}; it must have one entry for each "
                f"of the {len(measured)} measured points."
            )
    num_equal, neighbors, distances = _around(array, row, num_neighbors)
    given = {"lid_theta": curve_theta, "lid_star": curve_star}
    return Explanation(
        row=int(row),
        label=Label(int(verdicts.label[at])),
        z=float(verdicts.z[at]),
        lid_theta=_number(lid_theta, at),
        lid_star=_number(lid_star, at),
        neighbors=neighbors,
        distances=distances,
        num_equal=num_equal,
        curves={name: _at(curve, at) for name, curve in given.items() if curve is not None},
        scores={n: _ranked(np.asarray(score, float), at) for n, score in (scores or {}).items()},
    )


def _number(estimate: Estimate, at: int) -> Estimate:
    return Estimate(float(estimate.value[at]), float(estimate.stderr[at]))


def _around(
    points: np.ndarray, row: int, num_neighbors: int
) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """How many points are equal to one, and the nearest of the others."""
    flat = points.reshape(len(points), -1)
    others = np.flatnonzero(np.any(flat != flat[row], axis=1))
    num = min(num_neighbors, len(others))
    if num < 1:
        return len(points) - len(others), (), ()
    found = nearest_neighbors(points[others], num, queries=points[row : row + 1])
    neighbors = tuple(int(index) for index in others[found.indices[0]])
    return len(points) - len(others), neighbors, tuple(map(float, found.distances[0]))


def _at(curve: Curve, at: int) -> Curve:
    """Of one point."""
    fields = (curve.sigmas, curve.value, curve.stderr, curve.residual)
    shape = np.shape(curve.value)
    return Curve(*(np.broadcast_to(np.asarray(field), shape)[at] for field in fields))


def _ranked(scores: np.ndarray, at: int) -> Score:
    known = np.delete(scores, at)
    known = known[~np.isnan(known)]
    if np.isnan(scores[at]) or not len(known):
        return Score(float(scores[at]), float("nan"))
    return Score(float(scores[at]), float(np.mean(known < scores[at])))


def _in_words(estimate: Estimate) -> str:
    if not np.isfinite(estimate.value):
        return "an unknown number of"
    return f"{estimate.value:.1f} ± {estimate.stderr:.1f}"


def _curve_in_words(name: str, curve: Curve) -> str:
    symbol = {"lid_theta": "LID_theta", "lid_star": "LID_*"}[name]
    ends = [f"{curve.value[end]:.1f} at sigma {curve.sigmas[end]:.3g}" for end in (0, -1)]
    return f"{symbol} is {ends[0]} and {ends[1]}."


def _plain(number: Any) -> float | None:
    number = float(number)
    return number if np.isfinite(number) else None
