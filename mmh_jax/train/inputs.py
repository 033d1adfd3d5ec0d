"""What a training is given, looked at before any work: points, labels, and a network for them."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.train.config import TrainConfig
from mmh_jax.train.recipe import Recipe

__all__ = [
    "check_labels",
    "checked_labels",
    "checked_points",
    "known_classes",
    "normalisation",
    "warn_if_narrow",
]

# A label beyond these, and the number of points, is no class but a damaged number.
MOST_CLASSES = 2**16


def normalisation(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean point, and the standard deviation of all coordinates around it.

    One number scales every coordinate, so that noise stays isotropic in data units.

    Raises:
        ValueError: if the points are all the same.
    """
    shift = points.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean((points - shift) ** 2)))
    if not scale > 0:
        raise ValueError(
            "all points are equal: there is nothing to learn from a constant data set."
        )
    return shift.astype(np.float32), scale


def warn_if_narrow(recipe: Recipe, size: int) -> None:
    """Say of an MLP that it has fewer hidden units than a point has coordinates."""
    if recipe.network == "ResidualMLP" and recipe.width < size:
        warnings.warn(
            f"a network of width {recipe.width} on points of {size} coordinates: its Jacobian has "
            f"at least {size - recipe.width} eigenvalues near 1 at small noise levels, so that no "
            f"LID below {size - recipe.width} will be found.  Use `recipe.wide_enough({size})`.",
            stacklevel=3,
        )


def checked_points(points: np.ndarray) -> np.ndarray:
    """The points as float32."""
    points = np.asarray(points)
    if not np.issubdtype(points.dtype, np.floating):
        raise TypeError(
            f"`train_model(points=...)` has dtype {points.dtype}; it takes real numbers in data "
            "units: bytes become such by `points / np.float32(255)`, as `data.load` reads them."
        )
    points = points.astype(np.float32, copy=False)
    if points.ndim < 2 or points.size == 0:
        raise ValueError(
            f"`train_model(points=...)` has shape {points.shape}; it takes (N, *shape), N points."
        )
    bad = ~np.isfinite(points).reshape(len(points), -1).all(axis=1)
    if bad.any():
        raise ValueError(
            f"`train_model(points=...)` has NaN or infinite values in {bad.sum()} of "
            f"{len(points)} rows, row {np.argmax(bad)} the first; remove them."
        )
    return points


def checked_labels(
    labels: np.ndarray | None, num: int, recipe: Recipe
) -> tuple[np.ndarray | None, int | None]:
    """The labels as int32, and how many classes there are."""
    if labels is None:
        return None, None
    labels = np.asarray(labels)
    if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`train_model(labels=...)` has shape {labels.shape} and dtype {labels.dtype}; it "
            f"takes one whole number, from 0, for each of the {num} points."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= max(num, MOST_CLASSES):
        wrong, row = (low, labels.argmin()) if low < 0 else (high, labels.argmax())
        raise ValueError(
            f"`train_model(labels=...)` is out of range: label {wrong} in row {row}; classes are "
            f"counted from 0, and there are at most {max(num, MOST_CLASSES)}. "
            "`np.unique(labels, return_inverse=True)[1]` counts those that occur."
        )
    if recipe.network in ("ResidualMLP", "GradientMLP"):
        raise ValueError(
            f"`train_model(labels=...)`: a {recipe.network} takes no condition; use a recipe with "
            "the network `UNet` or `DiT`."
        )
    return labels.astype(np.int32), high + 1


def known_classes(denoiser: NetworkDenoiser, config: TrainConfig) -> int | None:
    """How many labels the network knows, or else the null condition of the settings says."""
    network = getattr(denoiser.apply, "apply", denoiser.apply)
    if isinstance(network, nn.Apply):
        module = nnx.merge(network.graph, denoiser.params)
        known = getattr(getattr(module, "conditioning", None), "num_classes", None)
        if known is not None:
            return known
    last = config.null_condition
    return last if isinstance(last, int) else None


def check_labels(what: str, conditions: Any, num_classes: int | None) -> None:
    """Here, because a compiled step can but make NaN of a label that is none."""
    for leaf in jax.tree.leaves(conditions):
        if num_classes is None or not jnp.issubdtype(leaf.dtype, jnp.integer) or not leaf.size:
            continue
        low, high = int(leaf.min()), int(leaf.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{what} holds labels from {low} to {high}; this network has {num_classes} "
                f"classes, which go from 0 to {num_classes - 1}."
            )
