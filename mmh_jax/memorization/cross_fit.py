r"""LID_* by cross-fitting: twin models on disjoint halves of the data.

No estimator that reads data reaches the dimension of images, but a model does.  So let a model that
never saw x say what the data are like there.  Two models are trained alike, one on each half:

    LID_theta(x)    from the twin that saw x,
    LID_*(x)        from the twin that never did.

OD-Mem is then a negative difference with a standard error, and DD-Mem is both small: what is simple
in the data is simple for either twin.  Both sides have the biases of the same kind of network, the
same estimator and the same number of points, so that these cancel in the difference; what one twin
learned otherwise than the other for reasons that have nothing to do with x does not, and is
measured at points that neither saw.

What repeats must lie in one half.  If equal points were in both, each twin would have seen x, and
what the model memorized would look like a property of the data.  But then the twin that never saw x
does not know that it repeats, either, and takes the law around it for LID_*.  That a repeated point
is an atom, of dimension 0, is known from the data alone, and is put in.

LID_theta is that of a model trained on half of the data, which memorizes sooner than one trained on
all; a model trained on all takes its place if it is given.

The twin that never saw x may not have x on its manifold, above all where it has memorized its own
half.  There the residual |x - D|^2 / sigma^2 is large, and what the twin says is no dimension.
Noise levels at which that is so are left out; where no plateau is left, LID_* is not known, and the
point is undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mmh_jax.data.splits import Halves, deduplicated
from mmh_jax.lid.flipd import Curve, residual_bound
from mmh_jax.lid.plateau import at_plateau
from mmh_jax.mapping import Progress, over_points
from mmh_jax.memorization.data_dimension import check_rows
from mmh_jax.memorization.verdict import Verdict, verdict
from mmh_jax.typing import ArrayLike, ChiSquareEstimate, Denoiser, Key

__all__ = ["CrossFit", "check_halves", "cross_fit"]


class CrossFit(NamedTuple):
    """Both dimensions of each of M points, and the verdicts.

    Attributes:
        lid_theta: (M,) of the model that saw the point.
        lid_star: (M,) of the twin that never did.
        verdict: (M,) labels and z.
        curve_theta, curve_star: fields (M, S), as the LID function gave them; None if it gives
            numbers.
        off_manifold: (M,) whether the point, no atom, is on the manifold of the twin that never saw
            it at no noise level; its LID_* is then NaN.
        disagreement: standard deviation of the twins' difference where neither saw the point,
            beyond their standard errors; in dimensions, and in both standard errors above.  0 if
            there are no held-out points.
    """

    lid_theta: ChiSquareEstimate
    lid_star: ChiSquareEstimate
    verdict: Verdict
    curve_theta: Curve | None
    curve_star: Curve | None
    off_manifold: np.ndarray
    disagreement: float


class _Reading(NamedTuple):
    estimate: ChiSquareEstimate
    curve: Curve | None
    off_manifold: np.ndarray


def cross_fit(
    first: Denoiser,
    second: Denoiser,
    points: ArrayLike,
    halves: Halves,
    lid: Callable[..., Any],
    *,
    rows: ArrayLike | None = None,
    model: Denoiser | None = None,
    held_out: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    atoms: ArrayLike | None = None,
    max_residual: Callable[[Any], Any] | None = residual_bound,
    small: float = 0.5,
    z_critical: float = 1.96,
    key: Key | None = None,
    chunk_size: int = 64,
    progress: Progress | None = None,
) -> CrossFit:
    """LID_theta, LID_* and verdicts from two models trained on disjoint halves of the data.

    Args:
        first, second: denoisers trained on `points[halves.first]` and `points[halves.second]`;
            see `train.train_twins`.
        points: (N, *shape), all the data.
        halves: from `data.splits.disjoint_halves`.
        lid: a function of a denoiser and one point, with `key=` if a key is given.  It returns
            value and standard error first (`Estimate`, `lid.flipd`), or a curve
            (`lid.spectral_curve` or `lid.flipd_curve` at fixed noise levels), which is read at the
            plateau of each point.
        rows: (M,) the points that are asked for, or None for all.
        model: a denoiser trained on all points, in place of the twin that saw the point.
        held_out: (P, *shape) points that no model saw, P at least 2: what the twins disagree about
            there goes into the standard errors.
        groups: (N,) what was passed to `disjoint_halves`, to be checked.
        atoms: (N,) whether LID_* is 0 at a point, whatever the twin says; None: at those that are
            equal to another.  With near-duplicates, `lid.find_duplicates(...).is_duplicate`.
        max_residual: of a point on a manifold, as a function of the dimension; a larger one makes
            what the model says NaN.  None: any residual.  Of what has no `residual`, none is seen.
        small, z_critical: as for `verdict`.
        key: for a LID function that draws; both models have the same draws.
        chunk_size: points evaluated at once.
        progress: as in `over_points`, for each of the two to five passes by itself.

    Cost: two evaluations of the LID function at each point, three with `model`, and two at each
    held-out one.  Before that, two trainings on half the points each: as long as one training on
    all for the same number of passes over the data, twice as long for the same number of steps.

    Raises:
        TypeError, ValueError: if the halves are no two halves of the points, or equal points or
            those of one group are in both; if the LID function returns something else; for held-out
            points of another shape or at fewer than two of which both twins have a dimension.

    >>> import jax.numpy as jnp
    >>> from mmh_jax import analytic, lid
    >>> points = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [6.0, 0.0]])
    >>> line = analytic.LinearGaussian(jnp.zeros(2), jnp.eye(2, 1), jnp.array([5.0]))
    >>> atoms = analytic.Empirical(jnp.asarray(points[:2], float))
    >>> found = cross_fit(
    ...     atoms, line, points, Halves(np.array([0, 1]), np.array([2, 3])),
    ...     lambda denoiser, x: lid.flipd(denoiser, x, 0.1), rows=np.array([0, 1]),
    ... )
    >>> found.lid_theta.value.round(1), found.lid_star.value.round(1), found.verdict.label.tolist()
    (array([0., 0.], dtype=float32), array([1., 1.], dtype=float32), [1, 1])
    """
    array = np.asarray(points)
    saw_first, is_atom = check_halves(array, halves, groups=groups), _atoms(array, atoms)
    rows = check_rows("cross_fit", rows, len(array))
    mapped = over_points(lid, (None, 0), chunk_size=chunk_size, progress=progress)

    def read(denoiser: Denoiser, at: np.ndarray) -> _Reading:
        return _read(mapped(denoiser, at, key=key), at[0].size, max_residual)

    asked = array[rows]
    one, other = read(first, asked), read(second, asked)
    seen_by_first = saw_first[rows]
    theta, star = _chosen(seen_by_first, one, other), _chosen(~seen_by_first, one, other)
    if model is not None:
        theta = read(model, asked)
    spread = 0.0
    if held_out is not None:
        apart = np.asarray(held_out)
        if apart.ndim == 0 or apart.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"`cross_fit(held_out=...)` has shape {apart.shape}; its points must be like those "
                f"of `points`, {array.shape[1:]}."
            )
        spread = _disagreement(read(first, apart).estimate, read(second, apart).estimate)
    lid_theta, lid_star = (_widened(side.estimate, spread) for side in (theta, star))
    lid_star = ChiSquareEstimate(*(np.where(is_atom[rows], 0, field) for field in lid_star))
    judged = verdict(lid_theta, lid_star, small=small, z_critical=z_critical)
    off = star.off_manifold & ~is_atom[rows]
    return CrossFit(lid_theta, lid_star, judged, theta.curve, star.curve, off, spread)


def check_halves(
    points: ArrayLike, halves: Halves, *, groups: ArrayLike | None = None
) -> np.ndarray:
    """(N,) whether each point is in the first half.

    Args:
        points: (N, *shape).
        halves: rows of the points.
        groups: (N,) numbers of what belongs together, beside equal points.

    Raises:
        ValueError: if the halves have a row in common or not all of them together, or if equal
            points, or points of one group, are on both sides.

    >>> points = np.array([[1.0], [2.0], [1.0]])
    >>> check_halves(points, Halves(np.array([0, 2]), np.array([1]))).tolist()
    [True, False, True]
    """
    array = np.asarray(points)
    side = np.zeros(len(array), int)
    for half in halves:
        rows = check_rows("cross_fit", half, len(array))
        np.add.at(side, rows, 1)
    if np.any(side != 1):
        raise ValueError(
            f"`cross_fit(halves=...)`: {int(np.sum(side == 0))} of {len(array)} points are in "
            f"neither half and {int(np.sum(side > 1))} in both; each must be in one. Take "
            "`data.splits.disjoint_halves`."
        )
    in_first = np.zeros(len(array), bool)
    in_first[halves.first] = True
    together = [("equal points", deduplicated(array).cluster)]
    if groups is not None:
        numbers = np.asarray(groups)
        if numbers.shape != (len(array),):
            raise ValueError(
                f"`cross_fit(groups=...)` has shape {numbers.shape}; it takes one number for each "
                f"of the {len(array)} points."
            )
        together.append(("groups", np.unique(numbers, return_inverse=True)[1]))
    for name, cluster in together:
        share = np.bincount(cluster, in_first) / np.bincount(cluster)
        parted = np.sum((share > 0) & (share < 1))
        if parted:
            raise ValueError(
                f"`cross_fit(halves=...)` has {name} in both halves ({int(parted)} times): a model "
                "that is taken not to have seen them has. Take `data.splits.disjoint_halves`, "
                "which keeps them together, and train again."
            )
    return in_first


def _read(found: Any, ambient_dim: int, max_residual: Callable[[Any], Any] | None) -> _Reading:
    """The estimate in what a LID function returned for many points; NaN off the manifold."""
    if not isinstance(found, tuple) or len(found) < 2:
        raise TypeError(
            f"`cross_fit(lid=...)` returns a {type(found).__name__}; it must return value and "
            "standard error, or a `lid.Curve`."
        )
    is_curve = isinstance(found, Curve)
    value, stderr = (found.value, found.stderr) if is_curve else found[:2]
    value = np.asarray(value)
    if value.ndim != 1 + is_curve:
        raise ValueError(
            f"`cross_fit(lid=...)` returns values of shape {value.shape[1:]} at a point; it must "
            f"return {'one for each noise level' if is_curve else 'one number'}."
        )
    residual = getattr(found, "residual", None)
    off = np.zeros(value.shape, bool)
    if max_residual is not None and residual is not None:
        # The dimension stands for the trace, which not every curve has.
        off = np.asarray(residual > np.asarray(max_residual(value)))
    kept = np.where(off, np.nan, value)
    if not is_curve:
        growth = np.broadcast_to(getattr(found, "dispersion", 0), kept.shape)
        return _Reading(ChiSquareEstimate(kept, np.asarray(stderr), growth), None, off)
    plateau = at_plateau(found._replace(value=kept), ambient_dim=ambient_dim)
    chosen = np.where(plateau.num_plateaus > 0, plateau.value, np.nan)
    estimate = ChiSquareEstimate(chosen, plateau.stderr, plateau.dispersion)
    return _Reading(estimate, found, np.asarray(off.all(axis=1)))


def _chosen(from_one: np.ndarray, one: _Reading, other: _Reading) -> _Reading:
    """At each point one of two readings."""

    def pick(a: Any, b: Any) -> np.ndarray:
        a, b = np.asarray(a), np.asarray(b)
        return np.where(from_one.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    curve = None
    if one.curve is not None and other.curve is not None:
        curve = Curve(*map(pick, one.curve, other.curve))
    estimate = ChiSquareEstimate(*map(pick, one.estimate, other.estimate))
    return _Reading(estimate, curve, pick(one.off_manifold, other.off_manifold))


def _disagreement(one: ChiSquareEstimate, other: ChiSquareEstimate) -> float:
    difference = one.value - other.value
    known = np.isfinite(difference)
    if known.sum() < 2:
        raise ValueError(
            f"`cross_fit(held_out=...)`: at {int(known.sum())} of {len(known)} points both twins "
            "have a dimension; there must be two at least. Pass more, or other noise levels."
        )
    explained = one.stderr[known] ** 2 + other.stderr[known] ** 2
    return float(np.sqrt(max(np.mean(difference[known] ** 2 - explained), 0.0)))


def _atoms(points: np.ndarray, atoms: ArrayLike | None) -> np.ndarray:
    if atoms is None:
        equal = deduplicated(points)
        return equal.counts[equal.cluster] > 1
    array = np.asarray(atoms)
    if array.shape != (len(points),) or array.dtype != bool:
        raise ValueError(
            f"`cross_fit(atoms=...)` is {array.dtype} of shape {array.shape}; it takes true or "
            f"false for each of the {len(points)} points."
        )
    return array


def _widened(estimate: ChiSquareEstimate, spread: float) -> ChiSquareEstimate:
    """Half of the variance of the twins' difference on each side."""
    return estimate._replace(stderr=np.hypot(estimate.stderr, spread / 2**0.5))
