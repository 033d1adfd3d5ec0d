r"""Plateaus of a curve sigma -> F(x; sigma): where a dimension does not depend on the scale.

A dimension is what the curve says over a range of noise levels: dF / d log sigma = 0.  Data with
structure at several scales have several plateaus; a network has one more at the noise levels it
never learned, where it returns x and F = D.  With u = log sigma the *roughness* at level j is

    rho_j = rms over j - 1, j, j + 1 of |dF / du|, divided by max(|F_j|, 1):

the relative change of the dimension per e-fold of sigma, over a neighbourhood, so that a curve that
merely turns around (a maximum) is not taken for flat.  A plateau is a local minimum of rho below
`max_slope`, extended to both sides as far as F stays within `tolerance` of its value, or within two
standard errors of the probes (but no further than half a dimension: what lies beyond is another
dimension).  No label and no ground truth is read.

Where one value must be had, it is that of the finest plateau that is flat to 1% per e-fold, and of
the flattest if none is.  Not of the flattest always: the curve of a point near an edge of the data
is flat at the dimension while sigma is below the distance, and often flatter still, one dimension
lower, above it; the finer is the local one.

Each point has its own scale here: on a mixture of dimensions no single sigma is right for all.
`choose_scale` is for the case that one must be had.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmh_jax.lid.flipd import Curve

__all__ = ["AtPlateau", "Plateau", "at_plateau", "knee", "plateaus"]

# Of plateaus rougher than this the flattest is taken, of the others the finest.
_FLAT = 0.01


class Plateau(NamedTuple):
    """A range of noise levels over which a curve is flat.

    Attributes:
        value: the curve where it is flattest.
        stderr: the probes' standard error there, and the standard deviation of the curve over that
            level and its two neighbours, in quadrature.
        sigma: the flattest level.
        sigma_low, sigma_high: the first and the last level of the plateau.
        roughness: relative change per e-fold of sigma, at `sigma`.
    """

    value: float
    stderr: float
    sigma: float
    sigma_low: float
    sigma_high: float
    roughness: float


class AtPlateau(NamedTuple):
    """One plateau of each of N points; fields of `Plateau`, (N,) each.

    Attributes:
        value, stderr, sigma, sigma_low, sigma_high, roughness: as in `Plateau`.
        num_plateaus: how many there are; where 0, the other fields are those of the flattest level
            (of those below .95 D, if the curve has any), and the value is no dimension.  NaN where
            no level is finite.
        dispersion: how the probes' variance grows with the dimension, as in `Curve`.
    """

    value: np.ndarray
    stderr: np.ndarray
    sigma: np.ndarray
    sigma_low: np.ndarray
    sigma_high: np.ndarray
    roughness: np.ndarray
    num_plateaus: np.ndarray
    dispersion: np.ndarray


class _Rule(NamedTuple):
    max_slope: float
    tolerance: float


def plateaus(curve: Curve, *, max_slope: float = 0.1, tolerance: float = 0.05) -> list[Plateau]:
    """Every plateau of one curve, from the smallest noise level up; an empty list if none.

    Args:
        curve: of one point: fields of shape (S,), S at least 4, sigmas increasing; on a grid with
            two or more levels for each factor of 2.
        max_slope: the largest roughness of a plateau: change per e-fold, relative to max(F, 1).
        tolerance: how far the curve moves within one, relative to max(F, 1).

    Returns:
        The list.  The ends of the grid are no plateau's flattest level.

    Raises:
        ValueError: if the shapes do not fit or the noise levels do not increase.

    >>> sigmas = np.geomspace(1e-3, 3, 24)           # 3 directions of width 1, 2 of width .01
    >>> value = 3 / (1 + sigmas**2) + 2 / (1 + (sigmas / 0.01) ** 2)
    >>> found = plateaus(Curve(sigmas, value, np.zeros(24), np.zeros(24)))
    >>> [round(p.value, 1) for p in found]
    [5.0, 3.0]
    """
    sigmas, values, stderrs = _checked_one("plateaus", curve)
    return _find(sigmas, values, stderrs, _Rule(max_slope, tolerance))


def at_plateau(
    curves: Curve,
    *,
    ambient_dim: int | None = None,
    max_slope: float = 0.1,
    tolerance: float = 0.05,
) -> AtPlateau:
    """For each of N points the dimension at one plateau, with its standard error.

    Of the plateaus of roughness .01 or less the one at the smallest noise level; if there is none,
    the flattest.

    Args:
        curves: fields `sigmas` (S,) or (N, S) with equal rows, `value` and `stderr` (N, S), as
            `over_points` returns `flipd_curve`; of projected FLIPD for a trained network.
        ambient_dim: D, to pass over plateaus above .95 D where there is another: a network that has
            learned nothing at a small sigma returns x, and its FLIPD is D there.
        max_slope, tolerance: as in `plateaus`.

    Raises:
        ValueError: as `plateaus`.

    >>> sigmas = np.geomspace(0.01, 1, 12)
    >>> value = np.array([[2.0], [5.0]]) / (1 + sigmas**2)
    >>> result = at_plateau(Curve(sigmas, value, 0 * value, 0 * value))
    >>> result.value.round(2), result.num_plateaus
    (array([2., 5.]), array([1, 1]))
    """
    sigmas, values, stderrs = _checked(curves)
    rule = _Rule(max_slope, tolerance)
    rows = [
        _choose(sigmas, value, stderr, rule, ambient_dim)
        for value, stderr in zip(np.atleast_2d(values), np.atleast_2d(stderrs), strict=True)
    ]
    fields = [np.array(column) for column in zip(*rows, strict=True)]
    growth = np.asarray(curves.dispersion, float)  # as mapped, one number may stand for all levels
    growth = growth if growth.ndim == values.ndim else growth[..., None]
    chosen = np.searchsorted(sigmas, np.nan_to_num(fields[2]))
    growth = np.atleast_2d(np.broadcast_to(growth, values.shape))[np.arange(len(rows)), chosen]
    return AtPlateau(*fields, dispersion=growth)


def _choose(
    sigmas: np.ndarray,
    values: np.ndarray,
    stderrs: np.ndarray,
    rule: _Rule,
    ambient_dim: int | None,
) -> tuple[float | int, ...]:
    found = _find(sigmas, values, stderrs, rule)
    candidates = found or _find(sigmas, values, stderrs, _Rule(np.inf, rule.tolerance))
    if ambient_dim is not None:
        candidates = [p for p in candidates if p.value <= 0.95 * ambient_dim] or candidates
    if not candidates:
        return (*6 * (np.nan,), 0)
    flat = [plateau for plateau in candidates if plateau.roughness <= _FLAT]
    chosen = flat[0] if flat else min(candidates, key=lambda plateau: plateau.roughness)
    return (*chosen, len(found))


def _checked(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sigmas, values = np.asarray(curve.sigmas, np.float64), np.asarray(curve.value, np.float64)
    stderrs = np.broadcast_to(np.asarray(curve.stderr, np.float64), values.shape)
    if sigmas.ndim == 2 and np.all(sigmas == sigmas[:1]):
        sigmas = sigmas[0]
    fits = values.ndim in (1, 2) and values.shape[-1:] == sigmas.shape
    if sigmas.ndim != 1 or sigmas.size < 4 or not fits:
        raise ValueError(
            f"the curve has sigmas of shape {np.shape(curve.sigmas)} and values of shape "
            f"{values.shape}; they must be (S,) and (S,) or (N, S), with S at least 4 (or sigmas "
            "(N, S) with equal rows)."
        )
    if not (np.all(sigmas > 0) and np.all(np.diff(sigmas) > 0)):
        raise ValueError("the curve's `sigmas` must be positive and increasing.")
    return sigmas, values, stderrs


def _checked_one(caller: str, curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sigmas, values, stderrs = _checked(curve)
    if values.ndim != 1:
        raise ValueError(
            f"`{caller}(curve=...)` has values of shape {values.shape}; it takes the curve of one "
            "point. For many, `at_plateau`."
        )
    return sigmas, values, stderrs


def _roughness(sigmas: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(S,), infinite at the two ends and where a value nearby is not finite."""
    with np.errstate(invalid="ignore"):  # a curve may be infinite: no plateau is there
        slope2 = np.gradient(values, np.log(sigmas)) ** 2
    mean = (slope2[:-2] + slope2[1:-1] + slope2[2:]) / 3
    inner = np.sqrt(mean) / np.maximum(np.abs(values[1:-1]), 1)
    return np.pad(np.where(np.isfinite(inner), inner, np.inf), 1, constant_values=np.inf)


def _find(
    sigmas: np.ndarray, values: np.ndarray, stderrs: np.ndarray, rule: _Rule
) -> list[Plateau]:
    rough = _roughness(sigmas, values)
    found: list[Plateau] = []
    taken = np.zeros(sigmas.size, bool)
    # The flattest first; what belongs to it belongs to no other.
    for j in np.argsort(rough, kind="stable"):
        lowest = rough[j] <= min(rough[max(j - 1, 0)], rough[min(j + 1, sigmas.size - 1)])
        if not np.isfinite(rough[j]) or rough[j] > rule.max_slope or taken[j] or not lowest:
            continue
        allowed = max(rule.tolerance * max(abs(values[j]), 1.0), min(2 * stderrs[j], 0.5))
        inside = (np.abs(values - values[j]) <= allowed) & ~taken
        low, high = _run_around(inside, j)
        taken[low : high + 1] = True
        spread = np.std(values[j - 1 : j + 2], ddof=1)
        stderr = np.hypot(stderrs[j], spread)
        ends = (sigmas[j], sigmas[low], sigmas[high])
        found.append(Plateau(*map(float, (values[j], stderr, *ends, rough[j]))))
    return sorted(found, key=lambda plateau: plateau.sigma)


def _run_around(inside: np.ndarray, index: int) -> tuple[int, int]:
    """The first and last index of the run of True that holds `index`."""
    outside = np.flatnonzero(~inside)
    before, after = outside[outside < index], outside[outside > index]
    return (
        int(before[-1]) + 1 if before.size else 0,
        int(after[0]) - 1 if after.size else inside.size - 1,
    )


def knee(curve: Curve) -> float:
    """The value at the knee of one curve, the rule of the FLIPD paper, to compare with.

    Kneedle (Satopaa et al. 2011) on F against log sigma, decreasing and convex; the paper (Kamkari
    et al. 2024, 2406.03537) takes it against the time of its VP schedule.  NaN where there is none.

    Raises:
        ImportError: if the package `kneed` is not installed.
        ValueError: as `plateaus`.
    """
    try:
        from kneed import KneeLocator
    except ImportError:
        raise ImportError("`knee` needs the package `kneed`: pip install kneed") from None
    sigmas, values, _ = _checked_one("knee", curve)
    if not np.all(np.isfinite(values)):
        return float("nan")
    found = KneeLocator(np.log(sigmas), values, curve="convex", direction="decreasing").knee
    return float("nan") if found is None else float(np.interp(found, np.log(sigmas), values))
