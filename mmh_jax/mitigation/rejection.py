r"""Rejection by dimension: what is about to become a copy is begun again.

A sampler runs to a noise level at which it is decided whether a copy is being made, and a measure d
(`measure`) is taken there.  Where d is below its target the state is noised back to a higher level,

    x' = x + sqrt(sigma_back^2 - sigma_decide^2) z,

and carried down again, until it is accepted.  With sigma_back the first level nothing of it is
left, and what is accepted has the model's law given d >= target; between the levels a picture of
the same kind tends to come back, at less cost.  No gradient is taken, unless the way down is then
that of a guided denoiser: only those that need it pay for guidance.  The target is a quantile
over runs that end in no copy (`reference_target`): on average that share of them is begun again,
too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.sample import Step, heun, solve, solve_path
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key, check_level

__all__ = ["Selected", "sample_selected"]


class Selected(NamedTuple):
    """Samples that were accepted, or given up.

    Attributes:
        samples: (N, *shape).
        measured: (N,) the measure at the last decision.
        accepted: (N,) whether that was at or above the target; False after `max_tries`, and where
            the measure is NaN.
        tries: (N,) how often each was decided.
        evaluations: for one sample, on average, those of the measure included, without those of
            `again`.
        evaluations_again: those of `again`, of which each may cost many.
    """

    samples: np.ndarray
    measured: np.ndarray
    accepted: np.ndarray
    tries: np.ndarray
    evaluations: float
    evaluations_again: float = 0.0


def sample_selected(
    denoiser: Denoiser,
    num: int,
    *,
    key: Key,
    sigmas: ArrayLike,
    measure: Any,
    target: Any,
    decide_at: float,
    back_to: float = float("inf"),
    step: Step = heun(),  # noqa: B008 (a frozen value)
    again: Any = None,
    max_tries: int = 8,
    shape: tuple[int, ...] | None = None,
    conditions: Any = None,
    chunk_size: int = 256,
) -> Selected:
    """Draw samples, and begin again those whose measure is below the target.

    Args:
        denoiser: the model.
        num: N, how many.
        key: draws the noise; the first try starts from that of `sample.sample` with this key.
        sigmas: (S,) decreasing noise levels, as for `sample.solve`.
        measure: a `Measure`.
        target: a `Target`, or any pytree called with a noise level.
        decide_at: the noise level of the decision: the last of `sigmas` not below it.
        back_to: where a refused state goes: the first of `sigmas` not above it.
        step: as for `sample.solve`.
        again: the denoiser that carries refused states down to the decision, such as a
            `LidGuided` one; by default the same.  What is measured is `denoiser` always.
        max_tries: of one sample.
        shape: of a point; by default the denoiser's.
        conditions: (N, ...), a pytree: one for each sample, bound by `condition` in the denoiser
            and the measure; None for both as they are.
        chunk_size: samples at once.

    Returns:
        `Selected`.

    Cost: with e evaluations a step, M of the measure, b and c the steps before the level of return
    and of decision: e (S - 1) + 2 + M, and each further try e (c - b) + 1 + M.

    Raises:
        ValueError: if no shape is known, a noise level is not positive, `sigmas` do not decrease,
            a level is out of their range, or `back_to` is not above `decide_at`.

    >>> from mmh_jax.mitigation import JacobianTrace, Target
    >>> pair = lambda x, sigma: jnp.tanh(x / sigma**2)           # two atoms, at -1 and 1
    >>> usual = Target(jnp.array([0.1, 1.0]), jnp.array([0.0, 0.0]))
    >>> found = sample_selected(
    ...     pair, 3, key=jax.random.key(0), sigmas=jnp.geomspace(5.0, 0.05, 9), shape=(1,),
    ...     measure=JacobianTrace(), target=usual, decide_at=0.5)
    >>> found.accepted.tolist(), found.evaluations
    ([True, True, True], 20.0)
    """
    key = check_key("sample_selected", key)
    shape = getattr(denoiser, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError(
            "`sample_selected(denoiser)` does not know the shape of a point; pass `shape=`."
        )
    if max_tries < 1 or num < 1:
        raise ValueError(
            f"`sample_selected(num={num}, max_tries={max_tries})`: both are at least 1."
        )
    if wrong := [leaf for leaf in jax.tree.leaves(conditions) if jnp.shape(leaf)[:1] != (num,)]:
        raise ValueError(
            f"`sample_selected(conditions=...)` has an array of shape {jnp.shape(wrong[0])} for "
            f"{num} samples; pass one condition for each."
        )
    levels = check_level("sample_selected", sigmas, jnp.result_type(float))
    back, decide = _places(np.asarray(levels), float(back_to), float(decide_at))
    conditions = jax.tree.map(np.asarray, conditions)
    chunk = min(chunk_size, num)
    start_key, key = jax.random.split(key)
    states = np.array(levels[0] * jax.random.normal(start_key, (num, *shape)))
    measured, tries = np.zeros(num, states.dtype), np.zeros(num, int)
    rows, since, calls, calls_again, way = np.arange(num), 0, 0, 0, denoiser
    for turn in range(1, max_tries + 1):
        keys = jax.random.split(jax.random.fold_in(key, turn), num)[rows]
        part = levels[since : decide + 1]
        these = jax.tree.map(lambda leaf, rows=rows: leaf[rows], conditions)
        # A state that was refused gets noise to where it goes on from; a fresh one has it.
        added = 0.0 if turn == 1 else _root_of_difference(levels[back], levels[decide])
        states[rows], measured[rows] = _by_chunks(
            chunk, _down, way, denoiser, measure, step, part, added,
            mapped=(states[rows], these, keys),
        )  # fmt: skip
        tries[rows] += 1
        work = len(rows) * (step.evaluations * (decide - since) + 1)
        calls, calls_again = (
            (calls + work, calls_again) if way is denoiser else (calls, calls_again + work)
        )
        rows = rows[~(measured[rows] >= float(target(levels[decide])))]  # NaN, too
        if not len(rows):
            break
        since, way = back, denoiser if again is None else again
    accepted = np.ones(num, bool)
    accepted[rows] = False
    keys = jax.random.split(jax.random.fold_in(key, max_tries + 1), num)
    samples = _by_chunks(
        chunk, _end, denoiser, step, levels[decide:], mapped=(states, conditions, keys)
    )
    calls += num * (step.evaluations * (len(levels) - 1 - decide) + 1)
    calls += int(tries.sum()) * measure.evaluations(int(np.prod(shape)))
    return Selected(samples, measured, accepted, tries, calls / num, calls_again / num)


def _places(levels: np.ndarray, back_to: float, decide_at: float) -> tuple[int, int]:
    """The numbers of the levels of return and of decision."""
    if levels.ndim != 1 or len(levels) < 2 or np.any(np.diff(levels) >= 0):
        raise ValueError(
            f"`sample_selected(sigmas=...)` has shape {levels.shape}; it takes a vector of two or "
            "more noise levels that decrease."
        )
    # To rounding: a level that is one of them, in another precision.
    at_or_above = np.flatnonzero(levels >= decide_at * (1 - 1e-5))
    at_or_below = np.flatnonzero(levels <= back_to * (1 + 1e-5))
    back = int(at_or_below[0]) if len(at_or_below) else len(levels)
    decide = int(at_or_above[-1]) if len(at_or_above) else 0
    if not back < decide:
        raise ValueError(
            f"`sample_selected(decide_at={decide_at:g}, back_to={back_to:g})`: the first level not "
            "above `back_to` must be above the last not below `decide_at`; `sigmas` go from "
            f"{levels[0]:g} to {levels[-1]:g}."
        )
    return back, decide


def _root_of_difference(high: Array, low: Array) -> Array:
    return jnp.sqrt((high - low) * (high + low))


def _bound(of: Any, condition: Any) -> Any:
    return of if condition is None else of.condition(condition)


@eqx.filter_jit
def _down(
    way: Any, denoiser: Any, measure: Any, step: Step, sigmas: Array, added: ArrayLike, mapped: Any
) -> tuple[Array, Array]:
    """States at the last level, carried there by `way`, and what is measured there."""

    def one(x: Array, condition: Any, key: Key) -> tuple[Array, Array]:
        noise_key, step_key = jax.random.split(key)
        x = x + added * jax.random.normal(noise_key, x.shape, x.dtype)
        bound = _bound(way, condition)
        x = solve_path(bound, x, sigmas, step=step, key=step_key).states[-1]
        return x, _bound(measure, condition)(_bound(denoiser, condition), x, sigmas[-1])

    return jax.vmap(one)(*mapped)


@eqx.filter_jit
def _end(denoiser: Any, step: Step, sigmas: Array, mapped: Any) -> Array:
    def one(x: Array, condition: Any, key: Key) -> Array:
        return solve(_bound(denoiser, condition), x, sigmas, step=step, key=key)

    return jax.vmap(one)(*mapped)


def _by_chunks(chunk: int, function: Any, *shared: Any, mapped: Any) -> Any:
    """`function` over the leading axis of `mapped`, always as many at once: one program."""
    num, parts = len(mapped[0]), []
    for start in range(0, num, chunk):
        index = np.minimum(np.arange(start, start + chunk), num - 1)
        found = function(*shared, jax.tree.map(lambda leaf, index=index: leaf[index], mapped))
        keep = min(chunk, num - start)
        parts.append(jax.tree.map(lambda leaf, keep=keep: np.asarray(leaf)[:keep], found))
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)
