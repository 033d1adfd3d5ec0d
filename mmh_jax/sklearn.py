"""The estimators that read data, as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from mmh_jax.lid.methods import DATA_METHODS
from mmh_jax.lid.neighbors import nearest_neighbors

__all__ = ["LID"]


class LID(BaseEstimator):
    """Local intrinsic dimension of data, at every point and overall.

    The attributes are named as in scikit-dimension.  Duplicates count as what they are, atoms of
    dimension 0.

    Args:
        method: one of `mmh_jax.lid.DATA_METHODS`: "mle", "two_nn", "ess", "local_pca", ...
            Those of a set ("corr_int", "fisher_s", "danco") take it whole for `dimension_`, and at
            each point its neighbours.
        num_neighbors: k.  With k or fewer other points all of them are taken, and a warning says
            so.

    Attributes:
        dimension_: one number for all points.
        dimension_stderr_: its standard error, NaN where there is none.
        dimension_pw_: (N,), one at each point.
        dimension_pw_stderr_: (N,), NaN where there is no theory.
        num_neighbors_: as many as were taken.
        n_features_in_: D.

    >>> X = np.random.default_rng(0).normal(size=(500, 3)) @ np.eye(3, 10)
    >>> round(LID(method="ess", num_neighbors=50).fit(X).dimension_, 1)
    3.0
    """

    def __init__(self, method: str = "mle", num_neighbors: int = 20):
        self.method = method
        self.num_neighbors = num_neighbors

    def fit(self, X: Any, y: Any = None) -> LID:
        """Find neighbours, and the dimension at each point.

        Args:
            X: (N, D) real numbers.
            y: not read.

        Raises:
            ValueError: for an unknown method, too few neighbours or points, NaN or infinity in X.
        """
        points: Any = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        if self.method not in DATA_METHODS:
            names = ", ".join(DATA_METHODS)
            raise ValueError(f"`LID(method={self.method!r})`: there are {names}.")
        method, k = DATA_METHODS[self.method], self.num_neighbors
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < method.least:
            raise ValueError(
                f"`LID(num_neighbors={k!r})` must be an integer; method {self.method!r} needs "
                f"{method.least} at least."
            )
        if k >= len(points):
            if len(points) <= method.least:
                raise ValueError(
                    f"method {self.method!r} needs {method.least} neighbours of each point, and X "
                    f"has n_samples={len(points)}."
                )
            warnings.warn(
                f"num_neighbors={k} is not below the {len(points)} points; "
                f"{len(points) - 1} are taken.",
                stacklevel=2,
            )
        self.num_neighbors_ = min(int(k), len(points) - 1)
        neighbors = nearest_neighbors(points, self.num_neighbors_)
        found = method.at_points(points, neighbors)
        self.dimension_pw_, self.dimension_pw_stderr_ = found
        self.dimension_, self.dimension_stderr_ = method.overall(neighbors, found, points)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> np.ndarray:
        """`fit(X).dimension_pw_`."""
        return self.fit(X).dimension_pw_
