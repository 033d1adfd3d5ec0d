"""The estimators that read data, as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from mmh_jax.lid.duplicates import find_duplicates
from mmh_jax.lid.methods import DATA_METHODS, DataMethod
from mmh_jax.lid.neighbors import nearest_neighbors

__all__ = ["LID"]


class LID(BaseEstimator):
    """Local intrinsic dimension of data, at every point and overall.

    The attributes are named as in scikit-dimension.

    Args:
        method: one of `mmh_jax.lid.DATA_METHODS`: "mle", "two_nn", "ess", "local_pca", ...
            Those of a set ("corr_int", "fisher_s", "danco") take it whole for `dimension_`, and at
            each point its neighbours.
        num_neighbors: k.  With k or fewer other points all of them are taken, and a warning says
            so.
        duplicates: "atoms" leaves equal points be what they are, atoms of dimension 0, which are
            neighbours of each other.  "merge" takes them for one point, whose answer all of them
            have and which counts once in `dimension_`, as `mmh-jax lid data --merge` does; for
            near-duplicates see `lid.find_duplicates`.

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
    >>> twice = np.concatenate([X, X])
    >>> round(LID(method="ess", num_neighbors=50, duplicates="merge").fit(twice).dimension_, 1)
    3.0
    """

    def __init__(self, method: str = "mle", num_neighbors: int = 20, duplicates: str = "atoms"):
        self.method = method
        self.num_neighbors = num_neighbors
        self.duplicates = duplicates

    def fit(self, X: Any, y: Any = None) -> LID:
        """Find neighbours, and the dimension at each point.

        Args:
            X: (N, D) real numbers.
            y: not read.

        Raises:
            ValueError: for an unknown method or treatment of duplicates, too few neighbours or
                points, NaN or infinity in X.
        """
        points: Any = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        method = self._checked_method()
        cluster = np.arange(len(points))
        if self.duplicates == "merge":
            twins = find_duplicates(points)
            points, cluster = points[twins.first], twins.cluster
        self.num_neighbors_ = self._possible_neighbors(method, len(points), len(cluster))
        neighbors = nearest_neighbors(points, self.num_neighbors_)
        found = method.at_points(points, neighbors)
        self.dimension_pw_, self.dimension_pw_stderr_ = (field[cluster] for field in found)
        self.dimension_, self.dimension_stderr_ = method.overall(neighbors, found, points)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> np.ndarray:
        """`fit(X).dimension_pw_`."""
        return self.fit(X).dimension_pw_

    def _checked_method(self) -> DataMethod:
        if self.method not in DATA_METHODS:
            names = ", ".join(DATA_METHODS)
            raise ValueError(f"`LID(method={self.method!r})`: there are {names}.")
        method, k = DATA_METHODS[self.method], self.num_neighbors
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < method.least:
            raise ValueError(
                f"`LID(num_neighbors={k!r})` must be an integer; method {self.method!r} needs "
                f"{method.least} at least."
            )
        if self.duplicates not in ("atoms", "merge"):
            raise ValueError(f"`LID(duplicates={self.duplicates!r})` must be 'atoms' or 'merge'.")
        return method

    def _possible_neighbors(self, method: DataMethod, num_points: int, num_samples: int) -> int:
        """As many as asked for, or all others: of `num_points` that are left of the samples."""
        if self.num_neighbors < num_points:
            return int(self.num_neighbors)
        left = "" if num_points == num_samples else f", of which {num_points} differ"
        if num_points <= method.least:
            raise ValueError(
                f"method {self.method!r} needs {method.least} neighbours of each point, and X "
                f"has n_samples={num_samples}{left}."
            )
        warnings.warn(
            f"num_neighbors={self.num_neighbors} is not below the {num_points} points; "
            f"{num_points - 1} are taken.",
            stacklevel=3,
        )
        return num_points - 1
