"""A Flax NNX module as a plain function of a parameter pytree.

Hot paths are pure functions: an NNX module is split once, its graph definition becomes a static,
hashable value, and every later call goes through `jax.jit` without NNX's own dispatch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmh_jax.typing import Array

__all__ = ["Apply", "one_example", "split"]


def one_example(call: Callable[..., Array], *inputs: Any) -> Array:
    """Call a network that wants a batch axis (many Flax layers do) on one example.

    Every leaf of every input gets a leading axis of size 1; the answer loses it.

    >>> one_example(lambda x, y: x + y[:, None], jnp.ones(2), 1.0)
    Array([2., 2.], dtype=float32)
    """
    return call(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], inputs))[0]


@dataclasses.dataclass(frozen=True)
class Apply:
    """`apply(params, *inputs)` for one example of a split NNX module.

    Two splits of equal modules compare equal, so `jax.jit` does not compile twice.

    Attributes:
        graph: the module's graph definition.
        batched: whether the module wants a leading batch axis on every input and its output.
    """

    graph: Any
    batched: bool = False

    def __call__(self, params: Any, *inputs: Any, **options: Any) -> Array:
        """The answer for one example; with `batched`, the module sees a batch of one.

        Options, such as a network's `key=` for dropout, are handed on as they are.
        """
        module = functools.partial(nnx.merge(self.graph, params), **options)
        return one_example(module, *inputs) if self.batched else module(*inputs)


def split(module: nnx.Module, *, batched: bool = False) -> tuple[Apply, Any]:
    """The module as `(apply, params)`, `apply(params, *inputs)` on one example.

    Args:
        module: in the mode in which it is to be used (`module.eval()` for dropout and the like).
        batched: whether it wants a batch axis.  NNX normalisation layers over images do.

    >>> apply, params = split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> apply(params, jnp.ones(2)).shape
    (3,)
    """
    graph, params = nnx.split(module)
    return Apply(graph, batched), params
