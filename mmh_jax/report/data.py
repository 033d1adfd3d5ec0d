"""LID of the points of a data set, by any of the estimators that read data, as a CSV file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import lid
from mmh_jax.data import sources
from mmh_jax.report import output
from mmh_jax.report.files import hash_of, read_array, write_array, write_csv
from mmh_jax.report.measure import random_subset
from mmh_jax.report.stages import Progress, Stages, check_count, check_seed
from mmh_jax.typing import Estimate

__all__ = ["lid_of_data"]

# Over so many neighbours, where each point finds its own.
LEVELS = (8, 11, 16, 23, 32, 45, 64, 91, 128)
MIN_LEVELS = 5


def lid_of_data(
    source: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = ("mle",),
    num_neighbors: int | None = 20,
    num_points: int | None = None,
    tolerance: float = 0.0,
    merge: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Dimensions of data from neighbourhoods that are found once.

    Neighbours, and the answers of each method, are kept beside the file, in `<out>.work`, until it
    is written: a call that is killed continues there.

    Args:
        source: what `data.sources.load` reads.
        out: the file to write.
        methods: of `lid.DATA_METHODS`, two columns each.
        num_neighbors: k; None takes for each point and method the one on a plateau of its curve
            over 8 to 128 neighbours, and adds two columns: that k, 0 where the curve is nowhere
            finite, and how many plateaus there are; with 0 there is no dimension.
        num_points: write the rows of so many points, chosen at random; all are neighbours.
        tolerance: in data units; points linked by steps no longer than it are duplicates.
        merge: whether duplicates are one point, the first of them, whose answer all of them have.
            Otherwise they are neighbours of each other: an atom, of dimension 0, if exact.
        seed: of the choice of points.
        overwrite: whether the file may be replaced.
        progress: called as `progress(stage, done, total, note)`.

    Returns:
        `(columns, summary)`: what was written, and one dimension of all points for each method,
        with its standard error, how many points are duplicates and how many clusters they make.

    Raises:
        ValueError, OSError: for what cannot be used or written; before any work.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.work")
    _check(methods, num_points, tolerance)
    check_seed(seed)
    output.check_file(out, overwrite=overwrite)
    data = sources.load(source)
    stages = Stages(progress)
    with stages("duplicates"):
        twins = lid.find_duplicates(data.points, tolerance=tolerance)
    points = data.points[twins.first] if merge else data.points
    levels = _levels(source, methods, num_neighbors, len(points))
    settings = {
        "source": str(source),
        "data": hash_of(data.points),
        "num_neighbors": levels,
        "tolerance": tolerance,
        "merge": merge,
    }
    output.check_writable(out.parent)
    work = output.claim(partial, output.DATA_MEASUREMENT, settings, overwrite=overwrite)
    with stages("neighbors") as report:
        neighbors = _neighbors(points, levels[-1], work, report)
    answers, summary = {}, {}
    with stages("lid_star") as report:
        for number, name in enumerate(methods):
            report(number, len(methods), name)
            answers[name] = _answer(name, points, neighbors, levels, work)
            if len(levels) == 1:
                at_points = Estimate(*answers[name][:2])
                summary[name] = lid.DATA_METHODS[name].overall(neighbors, at_points, points)
    index = random_subset(len(data.points), num_points or len(data.points), seed=seed)
    place = twins.cluster[index] if merge else index
    columns = {"index": index}
    if data.labels is not None:
        columns["label"] = np.asarray(data.labels)[index]
    for name, (value, stderr, k, num_plateaus) in answers.items():
        columns |= {name: value[place], f"{name}_stderr": stderr[place]}
        if len(levels) > 1:
            columns[f"{name}_num_neighbors"] = k[place].astype(int)
            columns[f"{name}_num_plateaus"] = num_plateaus[place].astype(int)
    back = twins.first if merge else np.arange(len(points))
    columns["nearest_index"] = back[neighbors.indices[place, 0]]
    columns["nearest_distance"] = neighbors.distances[place, 0]
    columns["copies"] = twins.counts[twins.cluster[index]]
    write_csv(out, columns)
    shutil.rmtree(partial)
    about = {
        "num_points": len(data.points),
        "duplicates": int(twins.is_duplicate.sum()),
        "clusters": int((twins.counts > 1).sum()),
        "overall": summary,
    }
    return columns, about


def _check(methods: Sequence[str], num_points: int | None, tolerance: float) -> None:
    unknown = [name for name in methods if name not in lid.DATA_METHODS]
    if unknown or not methods:
        fault = f"unknown method {', '.join(unknown)!r}" if unknown else "no method"
        raise ValueError(f"{fault}; there are {', '.join(lid.DATA_METHODS)}.")
    check_count("--num-points", num_points)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"--tolerance is {tolerance:g}; it must be finite and at least 0.")


def _levels(
    source: str | Path, methods: Sequence[str], num_neighbors: int | None, num_points: int
) -> list[int]:
    """The numbers of neighbours: one, or those of the curve.  `num_points` remain."""
    least = max(lid.DATA_METHODS[name].least for name in methods)
    if num_neighbors is None:
        levels = [k for k in LEVELS if least <= k < num_points]
        if len(levels) < MIN_LEVELS:
            raise ValueError(
                f"{source} has {num_points} points to look at, too few for a curve over the number "
                "of neighbours; give --num-neighbors a number."
            )
        return levels
    check_count("--num-neighbors", num_neighbors, least=least)
    if num_neighbors >= num_points:
        raise ValueError(
            f"{source} has {num_points} points to look at, too few for {num_neighbors} neighbours "
            "of each; lower --num-neighbors."
        )
    return [num_neighbors]


def _neighbors(points: np.ndarray, k: int, work: Path, report: Any) -> lid.Neighbors:
    paths = [work / f"{name}.npy" for name in lid.Neighbors._fields]
    kept = [read_array(path) for path in paths]
    if all(array is not None and array.shape == (len(points), k) for array in kept):
        return lid.Neighbors(*kept)
    found = lid.nearest_neighbors(points, k, progress=report)
    for path, array in zip(paths, found, strict=True):
        write_array(path, array)
    return found


def _answer(
    name: str, points: np.ndarray, neighbors: lid.Neighbors, levels: list[int], work: Path
) -> np.ndarray:
    """(4, N): value, standard error, number of neighbours and of plateaus (-1 without a curve)."""
    path = work / f"method_{name}.npy"
    kept = read_array(path)
    if kept is not None and kept.shape == (4, len(points)):
        return kept
    if len(levels) == 1:
        value, stderr = lid.DATA_METHODS[name].at_points(points, neighbors)
        answer = np.stack([value, stderr, np.full(len(points), levels[0]), -np.ones(len(points))])
    else:
        found = lid.at_plateau(lid.neighbor_curve(name, points, neighbors, levels))
        k = np.nan_to_num(found.sigma)
        answer = np.stack([found.value, found.stderr, k, found.num_plateaus])
    write_array(path, answer)
    return answer
