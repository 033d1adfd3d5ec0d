r"""Data sets with planted duplicates, near-duplicates and templates.

What a model memorizes depends on how often it sees a point.  To measure this, some points are put
into a set a known number of times, and a record says which rows they are:

    exact duplicates    `plant_duplicates(points, copies=(1, 4, 16), num_planted=10, key=key)`
    near-duplicates     the same with `perturb=augment.noise(0.01)`, `augment.shift(1)` ...
    templates           `plant_template`: part of the picture is copied, the rest varies

A point that occurs n times among N is an atom of mass n / N, of dimension 0.  A template's rows
share the values within a mask of m coordinates: a set of dimension D - m at most, for which the
mask is the truth that a method of localisation is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.data.augment import Augmentation
from mmh_jax.data.splits import check_points, deduplicated
from mmh_jax.typing import ArrayLike, Key, check_key

__all__ = ["Planted", "Template", "plant_duplicates", "plant_template", "rectangle"]

# Copies that are perturbed in one call.
_CHUNK = 1024


class Planted(NamedTuple):
    """A set with planted copies.

    Attributes:
        points: (M, *shape), the N given rows first, unchanged, then the copies.
        origin: (M,) the row, 0 to N - 1, of which each row is a copy; its own for the first N.
            Labels go along as `labels[origin]`.
        distance: (M,) Euclidean distance to the origin, in data units: 0 for exact copies.
        rows: (P,) the chosen rows, those of the first count first.
        counts: (P,) how many rows of `points` come from each of them, itself included.
    """

    points: np.ndarray
    origin: np.ndarray
    distance: np.ndarray
    rows: np.ndarray
    counts: np.ndarray


class Template(NamedTuple):
    """A set some rows of which share a part.

    Attributes:
        points: (N, *shape), the given rows; those planted with the shared part put in.
        rows: (P,) the rows that share it, that from which it was taken first.
        mask: (*shape) bool, True within the part.
    """

    points: np.ndarray
    rows: np.ndarray
    mask: np.ndarray


def plant_duplicates(
    points: ArrayLike,
    *,
    copies: int | Sequence[int],
    num_planted: int,
    key: Key,
    perturb: Augmentation | None = None,
) -> Planted:
    """Put some rows into a set a known number of times.

    Args:
        points: (N, *shape).
        copies: in how many rows each chosen point is to be, itself included; 1 leaves it single, as
            a control.  A sequence, for example (1, 4, 16, 64, 256): `num_planted` points for each.
        num_planted: how many points are chosen for each count, at random among those that have no
            duplicate already, so that the counts are exact.
        key: draws the choice and the perturbations.
        perturb: changes each copy (not the row itself): an augmentation that keeps the shape, as
            `augment.noise(sigma)`; it may leave a copy as it was, see `Planted.distance`.

    Returns:
        `Planted`; N + num_planted * sum(copies - 1) rows, on the host.

    Raises:
        TypeError: for points of another kind than numbers.
        ValueError: if a count is below 1, if there are not enough different points, or if `perturb`
            changes the shape.

    >>> points = np.arange(10.0)[:, None]
    >>> planted = plant_duplicates(points, copies=(1, 3), num_planted=2, key=jax.random.key(0))
    >>> planted.points.shape, planted.counts, np.bincount(planted.origin)[planted.rows]
    ((14, 1), array([1, 1, 3, 3]), array([1, 1, 3, 3]))
    """
    array = check_points("plant_duplicates", points)
    counts = np.repeat(_check_copies(copies), _check_count("num_planted", num_planted))
    choice_key, perturb_key = jax.random.split(check_key("plant_duplicates", key))
    unique = deduplicated(array)
    single = np.flatnonzero(unique.counts[unique.cluster] == 1)
    rows = _chosen("plant_duplicates", single, len(counts), choice_key, "have no duplicate")
    origin = np.repeat(rows, counts - 1)
    added = array[origin]
    if perturb is not None and len(added):
        added = _perturbed(added, perturb, perturb_key)
    moved = added.astype(np.float64) - array[origin]
    distance = np.sqrt(np.sum(moved**2, axis=tuple(range(1, moved.ndim))))
    return Planted(
        np.concatenate([array, added]),
        np.concatenate([np.arange(len(array)), origin]),
        np.concatenate([np.zeros(len(array)), distance]),
        rows,
        counts,
    )


def _perturbed(points: np.ndarray, perturb: Augmentation, key: Key) -> np.ndarray:
    change = jax.jit(jax.vmap(lambda x, one_key: perturb(x, key=one_key)))
    keys = jax.random.split(key, len(points))
    parts = []
    for start in range(0, len(points), _CHUNK):
        part = slice(start, start + _CHUNK)
        parts.append(np.asarray(change(jnp.asarray(points[part]), keys[part])))
    changed = np.concatenate(parts).astype(points.dtype)
    if changed.shape != points.shape:
        raise ValueError(
            f"`plant_duplicates(perturb=...)` makes points of shape {changed.shape[1:]} of points "
            f"of shape {points.shape[1:]}. Take one that keeps the shape, such as `augment.shift`."
        )
    return changed


def rectangle(
    shape: tuple[int, ...], *, top: int, left: int, height: int, width: int
) -> np.ndarray:
    """A mask for `plant_template`: True within a rectangle of a picture, in all channels.

    Args:
        shape: of a point, (H, W) or (H, W, C).
        top, left, height, width: in pixels.

    Raises:
        ValueError: if the rectangle is empty or reaches over the edge.

    >>> rectangle((3, 4), top=1, left=2, height=2, width=1).astype(int)
    array([[0, 0, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 0]])
    """
    inside = top >= 0 and left >= 0 and height > 0 and width > 0
    if len(shape) not in (2, 3) or not inside or top + height > shape[0] or left + width > shape[1]:
        raise ValueError(
            f"`rectangle(shape={shape}, top={top}, left={left}, height={height}, width={width})` "
            "must lie within a picture of shape (H, W) or (H, W, C), and hold a pixel."
        )
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def plant_template(points: ArrayLike, *, mask: ArrayLike, num_planted: int, key: Key) -> Template:
    """Give some rows the same values within a mask; outside of it they stay as they are.

    One row is the template, chosen at random among those that share their part with no other row,
    so that exactly `num_planted` rows have it afterwards.  The others are chosen at random.

    Args:
        points: (N, *shape).
        mask: (*shape) bool, True within the part; `rectangle(...)` makes one.
        num_planted: how many rows are to share the part, at least 2, the template included.
        key: draws the choices.

    Raises:
        TypeError: for points of another kind than numbers.
        ValueError: if the mask has another shape, or is empty or everything (which is
            `plant_duplicates`), or if there are not enough rows.

    >>> points = np.arange(12.0).reshape(4, 3)
    >>> mask = np.array([True, False, True])
    >>> planted = plant_template(points, mask=mask, num_planted=3, key=jax.random.key(0))
    >>> np.ptp(planted.points[planted.rows], axis=0) == 0
    array([ True, False,  True])
    """
    array = check_points("plant_template", points)
    mask = np.asarray(mask)
    if mask.shape != array.shape[1:] or mask.dtype != bool or mask.all() or not mask.any():
        raise ValueError(
            f"`plant_template(mask=...)` is {mask.dtype} of shape {mask.shape}, True in "
            f"{np.count_nonzero(mask)} places; it takes bool of shape {array.shape[1:]}, True in "
            "some places and not in all. See `rectangle`."
        )
    if _check_count("num_planted", num_planted) < 2:
        raise ValueError("`plant_template(num_planted=1)` must be at least 2: rows share a part.")
    template_key, others_key = jax.random.split(check_key("plant_template", key))
    parts = deduplicated(array[:, mask])
    single = np.flatnonzero(parts.counts[parts.cluster] == 1)
    (template,) = _chosen("plant_template", single, 1, template_key, "have this part alone")
    rest = np.delete(np.arange(len(array)), template)
    others = _chosen("plant_template", rest, num_planted - 1, others_key, "are left")
    planted = array.copy()
    planted[others] = np.where(mask, array[template], array[others])
    return Template(planted, np.concatenate([[template], others]), mask)


def _check_count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}={value!r}` must be a positive integer.")
    return value


def _check_copies(copies: int | Sequence[int]) -> np.ndarray:
    counts = np.atleast_1d(np.asarray(copies))
    whole = np.issubdtype(counts.dtype, np.integer)
    if counts.ndim != 1 or not len(counts) or not whole or counts.min() < 1:
        raise ValueError(
            f"`plant_duplicates(copies={copies!r})` must be an integer of at least 1, or several: "
            "a point that is there once has 1."
        )
    return counts.astype(np.int64)


def _chosen(caller: str, candidates: np.ndarray, num: int, key: Key, what: str) -> np.ndarray:
    if num > len(candidates):
        raise ValueError(
            f"`{caller}` needs {num} rows, but only {len(candidates)} {what}. Plant fewer, or pass "
            "more points."
        )
    picks = np.asarray(jax.random.permutation(key, len(candidates)))[:num]
    return candidates[picks].astype(np.int64)
