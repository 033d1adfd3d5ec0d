r"""Moving a condition, or the noise a sampler starts from, until a detector falls.

With a criterion L that is larger where more is memorized, at one point and one noise level,

    condition    e  <-  e - step of the gradient of L by the embeddings         Wen et al. 2024
    noise        z  <-  |z| (z - step of P dL/dz) / |z - step of P dL/dz|,      x = sigma z,

P = I - z z^T / |z|^2.  The first is the prompt optimisation of Wen et al. (2024, 2407.21720), with
the CFG norm at the first step of the sampler, and of Ross et al. (2025, 2411.00113), with FLIPD at
a late one.  The second is the idea of sharpness-aware initialisation (Jeon et al. 2025, 2412.04140,
L the sharpness) and of adjusted initial noise (Han et al. 2025, 2510.08625, L the CFG norm).

Nearly all of N(0, I) in D dimensions is at |z| = sqrt(D), so that noise of another length is
nothing that the model has seen.  Keeping the length instead of paying for it is ours, and so is P:
without it an optimiser with a step for each coordinate, such as Adam, leaves the minimum on the
sphere, where the gradient is along z but not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmh_jax.memorization.conditional import norm
from mmh_jax.mitigation.attribution import Criterion, check_tokens, one_number
from mmh_jax.typing import Array, ArrayLike, Denoiser, check_point, is_traced

__all__ = ["Optimised", "optimise_condition", "optimise_noise"]


class Optimised(NamedTuple):
    """What was moved, and how the criterion fell.

    Attributes:
        value: the tokens or the noise at the end.
        history: (num_steps + 1,) the criterion before each step and at the end; it need not fall
            at each of them, and the end need not be the least.
    """

    value: Any
    history: Any


def optimise_condition(
    model: Any,
    tokens: ArrayLike,
    x: ArrayLike,
    sigma: ArrayLike,
    *,
    criterion: Criterion,
    optimizer: optax.GradientTransformation = optax.adamw(0.05),  # noqa: B008
    num_steps: int = 20,
    stop_below: ArrayLike = -float("inf"),
) -> Optimised:
    """Move the embeddings of one prompt until the criterion is below a bound (Wen et al. 2024).

    Args:
        model: token-conditional: `model.condition(tokens)`, and `model.condition(None)` without.
        tokens: (L, E) the embeddings of one prompt; all of them move.
        x: one noisy point: for the CFG norm pure noise at the sampler's first level, for FLIPD a
            late state of it, 40 of 50 in Ross et al.
        sigma: its noise level, in data units.
        criterion: larger = more memorized; see `attribution`.
        optimizer: of optax; Ross et al. take AdamW with a rate of 0.05, in units of an embedding.
        num_steps: at most so many.
        stop_below: where the criterion is at or below it, nothing moves any more; L is known only
            before a step, so that the step that crosses it is taken in full.

    Returns:
        `Optimised`, its value (L, E).  NaN if the gradient is.

    Cost: (num_steps + 1) times that of `attribute`, also where it stopped, so that it may be mapped
    and differentiated.  Bias: it is tuned to one draw of noise; what it does to others, and to what
    the prompt means, is to be measured.  Pushed too far, a condition means nothing.

    Raises:
        TypeError, ValueError: as `attribute`; or for a negative number of steps.

    >>> from flax import struct
    >>> from mmh_jax import memorization
    >>> @struct.dataclass
    ... class Mean:
    ...     tokens: Any = None
    ...     def condition(self, tokens): return self.replace(tokens=tokens)
    ...     def __call__(self, x, sigma):
    ...         return 0 * x if self.tokens is None else self.tokens.mean(0)
    >>> found = optimise_condition(
    ...     Mean(), jnp.ones((4, 3)), jnp.zeros(3), 1.0, criterion=memorization.cfg_norm,
    ...     stop_below=1.0)
    >>> found.history.shape, bool(found.history[0] > 1.7), bool(found.history[-1] < 1.0)
    ((21,), True, True)
    """
    tokens = check_tokens("optimise_condition", tokens)
    null = model.condition(None)

    def loss(embeddings: Array) -> Array:
        value = criterion(model.condition(embeddings), null, x, sigma)
        return one_number("optimise_condition", value)

    _check_steps("optimise_condition", num_steps)
    return _descend(loss, tokens, optimizer, num_steps, stop_below)


def optimise_noise(
    conditional: Denoiser,
    unconditional: Denoiser,
    noise: ArrayLike,
    sigma: ArrayLike,
    *,
    criterion: Criterion,
    optimizer: optax.GradientTransformation = optax.adam(0.05),  # noqa: B008
    num_steps: int = 20,
    stop_below: ArrayLike = -float("inf"),
) -> Optimised:
    """Move the noise a sampler starts from, at constant length, until the criterion is low.

    The condition stays what it is: only where sampling begins changes.  Start a sampler from
    `sigma * found.value`.

    Args:
        conditional, unconditional: as for `memorization.cfg_norm`.
        noise: z, one draw of N(0, I) of the shape of a point.
        sigma: the sampler's first noise level, in data units.
        criterion: at x = sigma z: `memorization.sharpness` for sharpness-aware initialisation,
            `memorization.cfg_norm` for that of Han et al.
        optimizer: of optax, with a rate in units of z.  Weight decay does nothing.
        num_steps, stop_below: as for `optimise_condition`.

    Returns:
        `Optimised`, its value of the noise's shape and length.  Only the length is kept: what the
        criterion likes may be rare otherwise, and many steps make it so.

    Cost: num_steps + 1 times that of the criterion with its gradient by x; of the sharpness, whose
    gradient is of second order, about 3 times its 4 evaluations.

    Raises:
        TypeError, ValueError: as the criterion; for noise that is 0, or a negative number of steps.

    >>> from mmh_jax import memorization
    >>> tall, flat = (lambda x, sigma: x * jnp.array([2.0, 1.0])), (lambda x, sigma: 0 * x)
    >>> found = optimise_noise(
    ...     tall, flat, jnp.array([3.0, 4.0]), 1.0, criterion=memorization.cfg_norm, num_steps=200)
    >>> jnp.abs(found.value).round(2)
    Array([0., 5.], dtype=float32)
    """
    noise, sigma = check_point("optimise_noise", conditional, noise, sigma)
    _check_steps("optimise_noise", num_steps)
    if not is_traced(noise) and not np.any(np.asarray(noise)):
        raise ValueError("`optimise_noise(noise=...)` is 0 everywhere; draw it from N(0, I).")
    length = norm(noise)

    def loss(z: Array) -> Array:
        return one_number("optimise_noise", criterion(conditional, unconditional, sigma * z, sigma))

    def tangent(z: Array, slope: Array) -> Array:
        return slope - jnp.sum(slope * z) / jnp.sum(z**2) * z

    def to_length(z: Array) -> Array:
        return length / norm(z) * z

    return _descend(loss, noise, optimizer, num_steps, stop_below, tangent, to_length)


def _descend(
    loss: Callable[[Array], Array],
    start: Array,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    stop_below: ArrayLike,
    tangent: Callable[[Array, Array], Array] = lambda point, slope: slope,
    project: Callable[[Array], Array] = lambda point: point,
) -> Optimised:
    def advance(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        point, state = carry
        value, slope = jax.value_and_grad(loss)(point)
        updates, next_state = optimizer.update(tangent(point, slope), state, point)
        moved = (project(point + jnp.asarray(updates, point.dtype)), next_state)
        is_there = value <= stop_below
        return jax.tree.map(lambda old, new: jnp.where(is_there, old, new), carry, moved), value

    begin = (start, optimizer.init(start))
    (end, _), history = jax.lax.scan(advance, begin, length=num_steps)
    return Optimised(end, jnp.append(history, loss(end)))


def _check_steps(caller: str, num_steps: int) -> None:
    if not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"`{caller}(num_steps={num_steps!r})` is a number of steps, at least 0.")
