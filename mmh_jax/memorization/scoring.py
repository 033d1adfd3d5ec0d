r"""Many detectors at many points, what they share computed once.

    scores(["expected_flipd", "projected_trace", "cfg_norm"], subject, Settings(0.1), key=key)

evaluates what is asked for and counts the evaluations: all detectors that read the spectrum of the
Jacobian cost one spectrum.  One program is compiled for a set of detectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmh_jax.mapping import over_points
from mmh_jax.memorization.detectors import DETECTORS, Detector
from mmh_jax.memorization.evidence import evaluations_of, gather
from mmh_jax.memorization.subject import At, Settings, Subject
from mmh_jax.typing import Estimate, Key, check_key

__all__ = ["Scores", "scores"]


class Scores(NamedTuple):
    """What `scores` found.

    Attributes:
        value: for each detector by name, (M,) scores; NaN where a number could not be had.
        stderr: the same for their standard errors, 0 where nothing is drawn or only one draw is
            made (the noise of a noisy point).
        evaluations: for each detector by name, network evaluations for one point, alone.
        total: for one point and all detectors together, what they share counted once.
    """

    value: dict[str, np.ndarray]
    stderr: dict[str, np.ndarray]
    evaluations: dict[str, float]
    total: float


def scores(
    detectors: Sequence[str | Detector],
    subject: Subject,
    settings: Settings,
    *,
    key: Key,
    chunk_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    mesh: Mesh | None = None,
) -> Scores:
    """Scores of many points by several detectors, computed together.

    Args:
        detectors: names of `DETECTORS`, or detectors of your own.
        subject: points and models.
        settings: noise levels and sizes.
        key: draws noise and probes; a point's numbers depend on the key and its position, not on
            which other detectors are asked for.  (M,) keys are one for each point: with slices
            of `jax.random.split(key, M)`, slices of the points have the numbers of all at once;
            with one key M times, `jnp.broadcast_to(key, (M,))`, all points see the same noise,
            which may order them better and makes their errors dependent.
        chunk_size: points at once.
        progress, mesh: as for `over_points`.

    Returns:
        `Scores`.

    Cost: `Scores.total` evaluations for each point.  One compilation for a set of detectors, and
    none for another model of the same structure.

    Raises:
        TypeError: without a key.
        ValueError: for an unknown or repeated name, or where the subject or the settings lack what
            a detector reads.

    >>> import jax.numpy as jnp
    >>> flat = lambda x, sigma: x * jnp.array([1.0, 0.0, 0.0])
    >>> found = scores(
    ...     ["flipd", "projected_trace", "eigenvalue_count"],
    ...     Subject(np.zeros((2, 3), np.float32), flat), Settings(0.1), key=jax.random.key(0)
    ... )
    >>> found.value["projected_trace"], found.total                  # 1 + 3 JVPs, twice
    (array([-1., -1.], dtype=float32), 8)
    """
    key = check_key("scores", key)
    chosen = tuple(_chosen(detector) for detector in detectors)
    names = [detector.name for detector in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`scores(detectors={names})` must be different names, at least one.")
    subject = _completed(subject)
    for detector in chosen:
        _check_reads(detector, subject, settings)
    mapped_names = tuple(detector for detector in chosen if detector.on_host is None)
    found: dict[str, Estimate] = {}
    if mapped_names:
        shared = (
            subject.denoiser,
            subject.unconditional,
            subject.baseline,
            subject.data,
            subject.reference,
            settings,
        )
        mapped = (subject.points, subject.conditions, subject.generations)
        leaves, static = _divided(shared)
        run = _program(mapped_names, static, chunk_size, mesh)
        found = run(leaves, mapped, key=key, progress=progress)
    for detector in chosen:
        if detector.on_host is not None:
            value = np.asarray(detector.on_host(np.asarray(subject.points)))
            found[detector.name] = Estimate(value, np.zeros_like(value))
    size = int(np.prod(np.shape(subject.points)[1:], dtype=int))
    quantities = [name for detector in chosen for name in detector.quantities]
    return Scores(
        {name: found[name].value for name in names},
        {name: found[name].stderr for name in names},
        {detector.name: detector.evaluations(size, settings) for detector in chosen},
        evaluations_of(quantities, size, settings),
    )


def _chosen(detector: str | Detector) -> Detector:
    if isinstance(detector, Detector):
        return detector
    if detector not in DETECTORS:
        raise ValueError(
            f"`scores(detectors=...)` names {detector!r}; there are {', '.join(DETECTORS)}."
        )
    return DETECTORS[detector]


def _completed(subject: Subject) -> Subject:
    """With the model without condition, where conditions are given."""
    if subject.conditions is None:
        return subject
    if not hasattr(subject.denoiser, "condition"):
        raise ValueError(
            "`Subject(conditions=...)`: its denoiser has no method `condition`; bind the condition "
            "yourself, and score the points of one condition at a time."
        )
    if subject.unconditional is not None:
        return subject
    return subject.replace(unconditional=subject.denoiser.condition(None))  # pyright: ignore


def _check_reads(detector: Detector, subject: Subject, settings: Settings) -> None:
    for field in detector.reads:
        owner = settings if hasattr(settings, field) else subject
        if getattr(owner, field) is None:
            raise ValueError(
                f"the detector `{detector.name}` reads `{type(owner).__name__}({field}=...)`, "
                "which is not given."
            )


class _Static(NamedTuple):
    """What of the shared arguments is part of the program: structure, functions, their places."""

    tree: Any
    others: tuple[tuple[int, Any], ...]


def _divided(shared: Any) -> tuple[list[Any], _Static]:
    """The arrays and numbers of a pytree, and the rest: a plain function may be a denoiser."""
    leaves, tree = jax.tree.flatten(shared)
    is_array = [hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float) for leaf in leaves]
    arrays = [leaf for leaf, kept in zip(leaves, is_array, strict=True) if kept]
    others = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array[i])
    return arrays, _Static(tree, others)


def _joined(arrays: Sequence[Any], static: _Static) -> Any:
    leaves = list(arrays)
    for place, leaf in static.others:
        leaves.insert(place, leaf)
    return jax.tree.unflatten(static.tree, leaves)


def _program(
    detectors: tuple[Detector, ...], static: _Static, chunk_size: int, mesh: Mesh | None
) -> Callable[..., Any]:
    """The compiled function of all points, the same one for the same arguments."""
    try:
        return _kept_program(detectors, static, chunk_size, mesh)
    except TypeError:  # a static field that cannot be hashed: compiled each time
        return _kept_program.__wrapped__(detectors, static, chunk_size, mesh)


@functools.lru_cache(maxsize=16)
def _kept_program(
    detectors: tuple[Detector, ...], static: _Static, chunk_size: int, mesh: Mesh | None
) -> Callable[..., Any]:
    quantities = tuple(name for detector in detectors for name in detector.quantities)

    def at_point(arrays: Sequence[Any], mapped: Any, *, key: Key) -> dict[str, Estimate]:
        denoiser, unconditional, baseline, data, reference, settings = _joined(arrays, static)
        x, condition, generations = mapped
        bound = denoiser if condition is None else denoiser.condition(condition)
        at = At(x, bound, unconditional, baseline, data, generations, reference, settings)
        found = gather(quantities, at, key)
        return {d.name: d.score(found) for d in detectors if d.score is not None}

    return over_points(at_point, (None, 0), chunk_size=chunk_size, mesh=mesh)
