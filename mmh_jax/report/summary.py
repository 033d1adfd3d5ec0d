"""What an audit says: one row for each point, and one summary for all."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import jax
import numpy as np

from mmh_jax.memorization import Label, Verdict
from mmh_jax.report.measure import Chosen
from mmh_jax.typing import Estimate

__all__ = ["columns_of", "columns_of_model", "environment", "quantiles", "summary_of"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def columns_of_model(
    index: np.ndarray, labels: np.ndarray | None, chosen: Chosen
) -> dict[str, np.ndarray]:
    """The columns that a model alone gives, each (N,).

    Args:
        index: where each point is in the source.
        labels: of the source's points, of which the rows of `index` are taken, or None.
        chosen: LID_theta.
    """
    measured = chosen.measured
    return (
        {"index": index}
        | ({} if labels is None else {"label": np.asarray(labels)[index]})
        | {
            "lid_theta": chosen.lid.value,
            "lid_theta_stderr": chosen.lid.stderr,
            "sigma": chosen.sigma,
            "num_plateaus": chosen.num_plateaus,
            "flipd": measured.flipd,
            "jacobian_rank": measured.rank.astype(int),
            "residual": measured.residual,
            "off_manifold": measured.off_manifold.astype(int),
        }
    )


def columns_of(
    index: np.ndarray,
    labels: np.ndarray | None,
    chosen: Chosen,
    lid_star: Estimate,
    verdicts: Verdict,
    nearest: tuple[np.ndarray, np.ndarray],
) -> dict[str, np.ndarray]:
    """The columns of `points.csv`, each (N,).

    Args:
        index, labels, chosen: as for `columns_of_model`.
        lid_star: of the same points.
        verdicts: of the same points.
        nearest: the index of each point's nearest other point, and its distance in data units.
    """
    titles = [Label(int(code)).title for code in verdicts.label]
    return columns_of_model(index, labels, chosen) | {
        "lid_star": lid_star.value,
        "lid_star_stderr": lid_star.stderr,
        "z": np.asarray(verdicts.z),
        "verdict": np.asarray(titles),
        "nearest_index": nearest[0],
        "nearest_distance": nearest[1],
    }


def quantiles(values: np.ndarray) -> dict[str, float | None]:
    """Some quantiles of the finite values, for JSON."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {f"{q:g}": None for q in _QUANTILES}
    return {f"{q:g}": float(np.quantile(finite, q)) for q in _QUANTILES}


def environment() -> dict[str, str]:
    """Versions, and the device that did the work."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    device = jax.devices()[0]
    try:
        own = metadata.version("mmh-jax")
    except metadata.PackageNotFoundError:  # on the path, as a checkout
        own = "not installed"
    return (
        {"mmh_jax": own, "python": platform.python_version()}
        | {name: metadata.version(name) for name in packages}
        | {"platform": device.platform, "device": device.device_kind}
    )


def summary_of(
    columns: dict[str, np.ndarray],
    *,
    settings: dict[str, Any],
    command: str,
    sigmas: np.ndarray,
    timings: dict[str, float],
    found: dict[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`, with what else was `found`.

    The quantiles of `lid_theta` are over the points that have a plateau, or a given noise level;
    the timings, in seconds, those of the run that finished.  Without data to compare with there are
    no verdicts and no `lid_star`.
    """
    compared: dict[str, Any] = {}
    if "verdict" in columns:
        titles = list(columns["verdict"])
        compared["verdicts"] = {label.title: titles.count(label.title) for label in Label}
        compared["lid_star"] = quantiles(columns["lid_star"])
    return {
        "command": command,
        "settings": settings,
        "environment": environment(),
        "sigma": float(np.median(columns["sigma"])),
        "sigmas": [float(sigma) for sigma in sigmas],
        "num_points": len(columns["index"]),
        "lid_theta": quantiles(columns["lid_theta"][columns["num_plateaus"] != 0]),
        **compared,
        **found,
        "timings": timings,
    }
