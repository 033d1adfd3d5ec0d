"""Searches that may miss some neighbours, as values for `nearest_neighbors(search=...)`.

A missed neighbour makes the radii after it too large, each by the step to the next.  Which search
pays: on a TPU `approximate`, whose selection runs at the speed of the matrix product, where the
exact one does not; on a CPU, with very many points of low intrinsic dimension, `nn_descent`
(measured in `docs/which_estimator.md`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Approximate", "NNDescent", "Search", "approximate", "nn_descent"]


@dataclasses.dataclass(frozen=True)
class Approximate:
    """`lax.approx_min_k` in place of the exact selection; made by `approximate`.

    Attributes:
        recall: the share of the neighbours that is to be found in each block, on average.
    """

    recall: float


@dataclasses.dataclass(frozen=True)
class NNDescent:
    """Nearest-neighbour descent; made by `nn_descent`.

    Attributes:
        seed: of its random trees.
        options: of `pynndescent.NNDescent`, as pairs of name and value.
    """

    seed: int
    options: tuple[tuple[str, Any], ...]

    def candidates(self, points: np.ndarray, queries: np.ndarray | None, num: int) -> np.ndarray:
        """(M, num) rows of `points` near each query (the points, if None), or -1, in any order."""
        from pynndescent import NNDescent as Graph

        num = min(num, len(points))
        # Its graph of very few neighbours is not connected enough to search in.
        width = min(max(num, 15), len(points))
        with warnings.catch_warnings():
            # Of points for which it finds too few, as among many duplicates: they come back as -1.
            warnings.filterwarnings("ignore", "Failed to correctly find n_neighbors")
            graph = Graph(points, n_neighbors=width, random_state=self.seed, **dict(self.options))
        if queries is None:
            found: Any = graph.neighbor_graph
            return np.asarray(found[0])[:, :num]
        graph.prepare()
        return np.asarray(graph.query(queries, k=num)[0])


Search: TypeAlias = Approximate | NNDescent


def approximate(recall: float = 0.95) -> Approximate:
    """Select with `lax.approx_min_k` (Chern et al. 2022, 2206.14286), fast on TPU.

    Elsewhere the selection is exact, so that next to nothing is missed, and little is gained.

    Args:
        recall: the share of the neighbours in a block of points that is found, on average.

    Raises:
        ValueError: if `recall` is not between 0 and 1.

    >>> approximate(0.9)
    Approximate(recall=0.9)
    """
    if not 0 < recall < 1:
        raise ValueError(
            f"`approximate(recall={recall!r})` must lie between 0 and 1; for 1 leave out `search`."
        )
    return Approximate(float(recall))


def nn_descent(*, seed: int = 0, **options: Any) -> NNDescent:
    """Search a graph by nearest-neighbour descent (Dong et al. 2011), with `pynndescent`.

    Time grows nearly in proportion to the number of points.  The first call compiles, for half a
    minute.  All points must fit in memory.

    Args:
        seed: of its random trees: the same one, the same neighbours.
        **options: of `pynndescent.NNDescent`, such as `n_trees` or `n_iters`.

    Raises:
        ImportError: if `pynndescent` is not there; `pip install 'mmh-jax[neighbors]'`.

    >>> import pytest
    >>> if importlib.util.find_spec("pynndescent") is None:
    ...     pytest.skip("needs pynndescent")
    >>> nn_descent(n_iters=8).options
    (('n_iters', 8),)
    """
    if importlib.util.find_spec("pynndescent") is None:
        raise ImportError("`nn_descent` needs pynndescent: `pip install 'mmh-jax[neighbors]'`.")
    return NNDescent(seed, tuple(options.items()))
