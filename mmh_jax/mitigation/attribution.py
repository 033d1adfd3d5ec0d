r"""Which tokens of a condition a detector blames: the gradient of the detector by each embedding.

A *criterion* is a number that is larger where a condition is memorized,

    criterion(conditional, unconditional, x, sigma) -> scalar,

such as `memorization.cfg_norm` and `memorization.sharpness` as they are, and the two made here,

    score norm    |x - D_c| / sigma
    FLIPD         -tr dD_c/dx,   or with its residual   -(tr dD_c/dx + |x - D_c|^2 / sigma^2).

The blame of token i, with embedding e_i, is |d criterion / d e_i| (Ross et al. 2025, 2411.00113),
and k places are drawn by it, without replacement, with probabilities proportional to

    softmax(blame / (temperature scale)) + floor.

The softmax depends on the units of the blame, which are those of the criterion over those of the
embeddings: `scale`, by default the largest blame, is what counts as 1, and is ours.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax import lid, linalg
from mmh_jax.memorization import score_norm
from mmh_jax.memorization.conditional import norm
from mmh_jax.mitigation.measure import JacobianTrace
from mmh_jax.typing import Array, ArrayLike, Denoiser, Key, check_key, check_point, is_traced

__all__ = [
    "Criterion",
    "attribute",
    "attribute_along",
    "choose_tokens",
    "flipd_criterion",
    "score_norm_criterion",
]


class Criterion(Protocol):
    """A number that is larger where a condition is memorized, differentiable in both denoisers."""

    def __call__(self, conditional: Any, unconditional: Any, x: Any, sigma: Any, /) -> Array:
        """The criterion at one point and one noise level, a scalar."""
        ...


def score_norm_criterion(
    conditional: Denoiser, unconditional: Denoiser, x: ArrayLike, sigma: ArrayLike
) -> Array:
    """|x - D_c| / sigma as a criterion; the unconditional model is not asked.

    Cost: 1 evaluation.

    Raises:
        TypeError, ValueError: as `memorization.score_norm`.

    >>> none = lambda x, sigma: 0 * x
    >>> score_norm_criterion(none, none, jnp.array([3.0, 4.0]), 2.0)
    Array(2.5, dtype=float32)
    """
    return score_norm(conditional, x, sigma)


@struct.dataclass
class _MinusFlipd:
    key: Key | None = None
    trace: linalg.Trace = struct.field(pytree_node=False, default=linalg.exact(), kw_only=True)
    residual: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def __call__(
        self, conditional: Denoiser, unconditional: Denoiser, x: ArrayLike, sigma: ArrayLike
    ) -> Array:
        if self.residual:
            return -lid.flipd(conditional, x, sigma, trace=self.trace, key=self.key).value
        # Not the value less the residual: off the manifold that would be rounding.
        x, sigma = check_point("flipd_criterion", conditional, x, sigma)
        return -JacobianTrace(self.key, trace=self.trace)(conditional, x, sigma)


def flipd_criterion(
    *,
    trace: linalg.Trace = linalg.exact(),  # noqa: B008 (a frozen value)
    key: Key | None = None,
    residual: bool = False,
) -> Criterion:
    """Minus the dimension of the conditional model, as a criterion.

    By default the trace of the Jacobian alone.  The other part of FLIPD, |x - D|^2 / sigma^2, is no
    dimension off the model's manifold, where the states of a guided sampler are, and there its
    gradient drowns that of the trace: a condition would be moved so that the point is off the
    manifold, not so that the dimension is larger.

    Args:
        trace: how to take the trace, as in `lid.flipd`.
        key: for a stochastic trace; the same probes at every call, so that it may be optimised.
        residual: whether the residual is added, as in the definition of FLIPD.

    Cost: that of `lid.flipd`; with a reverse pass, about three times as much.

    >>> ball = lambda x, sigma: x / (1 + sigma**2)             # a standard Gaussian in the plane
    >>> flipd_criterion()(ball, ball, jnp.array([2.0, 0.0]), 1.0)
    Array(-1., dtype=float32)
    >>> flipd_criterion(residual=True)(ball, ball, jnp.array([2.0, 0.0]), 1.0)
    Array(-2., dtype=float32)
    """
    return _MinusFlipd(key, trace=trace, residual=residual)


def attribute(
    model: Any, tokens: ArrayLike, x: ArrayLike, sigma: ArrayLike, *, criterion: Criterion
) -> Array:
    """|d criterion / d e_i|, the blame of each token of one prompt (Ross et al. 2025).

    Args:
        model: token-conditional: `model.condition(tokens)`, and `model.condition(None)` without.
        tokens: (L, E) the embeddings of one prompt.
        x: one noisy point: pure noise at the first level for the CFG norm and the sharpness, a late
            state of the sampler for FLIPD.
        sigma: its noise level, in data units.
        criterion: larger = more memorized; see the module.

    Returns:
        (L,), not negative, in units of the criterion over those of an embedding.  Padding and the
        ends of a prompt have a blame, too: pass `allowed=` to `choose_tokens`.

    Cost: that of the criterion and one reverse pass through it; of the CFG norm 2 evaluations and 1
    VJP.  Bias: a gradient tells of small changes; a token whose effect is saturated has none.

    Raises:
        TypeError: for integer tokens, or as the criterion raises.
        ValueError: for tokens of another shape, or a criterion that is not one number.

    >>> from mmh_jax import memorization
    >>> @struct.dataclass
    ... class Second:                                  # only its second token does anything
    ...     tokens: Any = None
    ...     def condition(self, tokens): return self.replace(tokens=tokens)
    ...     def __call__(self, x, sigma): return 0 * x if self.tokens is None else self.tokens[1]
    >>> tokens, x = 2 * jnp.eye(3)[:, :2], jnp.zeros(2)
    >>> attribute(Second(), tokens, x, 2.0, criterion=memorization.cfg_norm)
    Array([0. , 0.5, 0. ], dtype=float32)
    """
    tokens = check_tokens("attribute", tokens)
    null = model.condition(None)

    def blamed(embeddings: Array) -> Array:
        return one_number("attribute", criterion(model.condition(embeddings), null, x, sigma))

    return jax.vmap(norm)(jax.grad(blamed)(tokens))


def attribute_along(
    model: Any, tokens: ArrayLike, states: ArrayLike, sigmas: ArrayLike, *, criterion: Criterion
) -> Array:
    """The share of each token in the blame, averaged over the states of a trajectory.

    At each state the blame is divided by its sum over tokens.  The size of a criterion and of its
    gradient change by orders of magnitude with the noise level, so that a mean of the blame itself
    would be that of one or two states; of shares each state has one vote, those where the condition
    hardly acts too.  This is ours; for other weights, map `attribute` over states.

    Args:
        model, tokens, criterion: as for `attribute`.
        states: (S, *shape), such as `sample.solve_path(...).states`, or some of them.
        sigmas: (S,) their noise levels.

    Returns:
        (L,), with sum 1; less, if at some states no token is blamed.

    Cost: S times that of `attribute`, one state at a time.

    Raises:
        TypeError, ValueError: as `attribute`; or if there is not one level for each state.

    >>> from mmh_jax import memorization
    >>> @struct.dataclass
    ... class Mean:
    ...     tokens: Any = None
    ...     def condition(self, tokens): return self.replace(tokens=tokens)
    ...     def __call__(self, x, sigma):
    ...         return 0 * x if self.tokens is None else self.tokens.mean(0)
    >>> states, sigmas = jnp.zeros((2, 3)), jnp.array([10.0, 0.1])
    >>> attribute_along(Mean(), jnp.ones((4, 3)), states, sigmas, criterion=memorization.cfg_norm)
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    states, sigmas = jnp.asarray(states), jnp.asarray(sigmas)
    if sigmas.ndim != 1 or states.shape[:1] != sigmas.shape or sigmas.size == 0:
        raise ValueError(
            f"`attribute_along(states=..., sigmas=...)` have shapes {states.shape} and "
            f"{sigmas.shape}; pass (S, *shape) states and their (S,) noise levels."
        )

    def share(at: tuple[Array, Array]) -> Array:
        blame = attribute(model, tokens, *at, criterion=criterion)
        total = jnp.sum(blame)
        return blame / jnp.where(total == 0, 1, total)

    return jnp.mean(jax.lax.map(share, (states, sigmas)), axis=0)


def choose_tokens(
    blame: ArrayLike,
    k: int,
    *,
    key: Key,
    temperature: ArrayLike = 0.1,
    floor: ArrayLike = 1e-3,
    scale: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
) -> Array:
    """k different places, drawn by their blame without replacement (Ross et al. 2025).

    One after the other, each with the probabilities of the module among those that are left.

    Args:
        blame: (L,), of `attribute` or `attribute_along`.
        k: how many places, in the paper 1 to 8.
        key: draws them.
        temperature: small to take those blamed most, large to take any.
        floor: added to each share of the softmax, so that no token is safe.
        scale: the blame that counts as 1; None for the largest, so that the units of the criterion
            do not matter; 1.0 for the blame as it is.
        allowed: (L,) which places may be drawn; None for all.

    Returns:
        (k,) of integers, in the order drawn; all -1 if a traced blame is not finite.

    Raises:
        ValueError: for a blame that is not a vector of finite numbers of at least 0, a k that is
            not 1 to L (the number allowed), or a temperature or floor that is not positive.
        TypeError: without a key.

    >>> choose_tokens(jnp.array([0.0, 5.0, 0.0]), 1, key=jax.random.key(0))
    Array([1], dtype=int32)
    """
    blame = _checked_blame(blame, k, allowed)
    for name, value in {"temperature": temperature, "floor": floor}.items():
        if not is_traced(value) and not 0 < np.asarray(value) < np.inf:
            raise ValueError(f"`choose_tokens({name}={value})` must be a finite positive number.")
    largest = jnp.max(blame)
    unit = jnp.where(largest == 0, 1, largest) if scale is None else jnp.asarray(scale)
    weights = jax.nn.softmax(blame / (temperature * unit)) + floor
    if allowed is not None:
        weights = jnp.where(jnp.asarray(allowed), weights, 0)
    key = check_key("choose_tokens", key, otherwise="")
    places = jax.random.choice(key, blame.size, (k,), replace=False, p=weights / jnp.sum(weights))
    return jnp.where(jnp.all(jnp.isfinite(weights)), places, -1)


def _checked_blame(blame: ArrayLike, k: int, allowed: ArrayLike | None) -> Array:
    if not is_traced(blame):
        values = np.asarray(blame)
        if not (np.all(np.isfinite(values)) and np.all(values >= 0)):
            raise ValueError(
                "`choose_tokens(blame=...)` has a value that is negative or not finite; it is a "
                "length, of `attribute`."
            )
    blame = jnp.asarray(blame, jnp.result_type(blame, float))
    if blame.ndim != 1:
        raise ValueError(
            f"`choose_tokens(blame=...)` has shape {blame.shape}; it takes (L,) of one prompt. "
            "Did you mean `jax.vmap`?"
        )
    if allowed is not None and np.shape(allowed) != blame.shape:
        raise ValueError(
            f"`choose_tokens(allowed=...)` has shape {np.shape(allowed)}; it says of each of the "
            f"{blame.size} tokens whether it may be drawn."
        )
    known = allowed is not None and not is_traced(allowed)
    most = int(np.sum(np.asarray(allowed, bool))) if known else blame.size
    if not 1 <= k <= most:
        raise ValueError(f"`choose_tokens(k={k})`: there are {most} tokens to draw from.")
    return blame


def check_tokens(caller: str, tokens: ArrayLike) -> Array:
    """Tokens as an array, or what is wrong with them.

    Raises:
        TypeError: if they are not of a floating dtype.
        ValueError: if they are not (L, E).
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0:
        cure = " Did you mean `jax.vmap`?" if tokens.ndim == 3 else ""
        raise ValueError(
            f"`{caller}(tokens=...)` has shape {tokens.shape}; it takes the embeddings (L, E) of "
            f"one prompt.{cure}"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(tokens=...)` has dtype {tokens.dtype}; tokens are embeddings, real "
            "numbers. Look the numbers of words up in their table."
        )
    return tokens


def one_number(caller: str, value: Array) -> Array:
    """A criterion's value, or that it is not one number.

    Raises:
        ValueError: if it has another shape than ().
    """
    value = jnp.asarray(value)
    if value.ndim != 0:
        raise ValueError(
            f"`{caller}(criterion=...)` returns shape {value.shape}; a criterion is one number, "
            "larger where more is memorized."
        )
    return value
