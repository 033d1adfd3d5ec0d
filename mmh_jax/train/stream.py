"""Batches of a data set that is larger than memory, each a function of its number alone.

A batch that is asked for by number needs no iterator's state in a checkpoint: a run that continues
at step n asks for batch n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Source", "Stream", "grain_stream"]


class Source(Protocol):
    """A data set with random access: a memory-mapped array, a `torch`-style data set, ..."""

    def __len__(self) -> int:
        """How many points there are."""
        ...

    def __getitem__(self, index: Any) -> Any:
        """One point, or a point and its condition."""
        ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches by number.

    Attributes:
        batch: `batch(n)`, points (B, *shape) and their conditions with a leading axis of B, or
            None; normalised, and the same for the same n.

    >>> import numpy as np
    >>> Stream(lambda n: (np.full((4, 2), float(n)), None)).batch(3)[0].shape
    (4, 2)
    """

    batch: Callable[[int], tuple[Any, Any]]


def grain_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
) -> Stream:
    """A data set with random access, shuffled anew in every epoch, by Google's `grain`.

    Args:
        source: its items are points, or pairs of a point and its condition.
        batch_size: of `TrainConfig`.
        seed: of the order.
        transform: applied to every item: decoding, normalisation.

    Raises:
        ImportError: if `grain` is not there; `pip install 'mmh-jax[grain]'`.
        ValueError: if there are fewer items than a batch.

    >>> import importlib.util, pytest
    >>> if importlib.util.find_spec("grain") is None:
    ...     pytest.skip("needs grain")
    >>> import numpy as np
    >>> points = np.arange(10.0, dtype=np.float32)[:, None]
    >>> stream = grain_stream(points, batch_size=5, seed=0)
    >>> epoch = np.concatenate([stream.batch(0)[0], stream.batch(1)[0]])
    >>> sorted(epoch[:, 0].tolist()) == list(range(10))
    True
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("`grain_stream` needs grain: `pip install 'mmh-jax[grain]'`.") from error
    if len(source) < batch_size:
        raise ValueError(
            f"`grain_stream(source=...)` has {len(source)} items, fewer than "
            f"batch_size={batch_size}; take a smaller batch, or `fit` on the array."
        )
    shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        shuffled = shuffled.map(transform)
    batches = shuffled.batch(batch_size, drop_remainder=True)

    def batch(index: int) -> tuple[Any, Any]:
        found = batches[index]
        return found if isinstance(found, tuple) else (found, None)

    return Stream(batch)
