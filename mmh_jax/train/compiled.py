"""`jax.jit` for programs of training, with the options that they need to be fast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from mmh_jax import nn

__all__ = ["compiled"]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `jax.jit(function, **options)` with `nn.compiler_options()`.

    These depend on the device, and are asked for at the first call, not on import.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def program() -> Callable[..., Any]:
            return jax.jit(function, compiler_options=nn.compiler_options(), **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return program()(*args, **kwargs)

        return call

    return decorate
