"""One error for all ways in which a device says that its memory is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from mmh_jax.train.config import TrainConfig

__all__ = ["out_of_memory_explained"]


@contextlib.contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turn a device's error into one that says what to do.

    Raises:
        MemoryError: in place of the device's `RESOURCE_EXHAUSTED`.

    >>> with out_of_memory_explained(TrainConfig(batch_size=8)):
    ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    Traceback (most recent call last):
    MemoryError: a step of 8 points does not fit on the device: ...
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
            raise
        raise MemoryError(
            f"a step of {config.batch_size} points does not fit on the device: take a smaller "
            f"batch, or `accumulate` more than {config.accumulate} parts of it, or `remat`, or a "
            "smaller network. What was saved is still there."
        ) from error
