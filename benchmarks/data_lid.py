"""LID of data: accuracy of every method on sets of known dimension, and time and memory.

Accuracy: the mean absolute error at the points, for each method of `lid.DATA_METHODS` and each set
of `data.registry` below `--largest-dim` coordinates, from 2,000 points and `--num-neighbors`
neighbours; then that of four methods at the plateau of each point's own curve over k.

Time: maximum likelihood, TwoNN, local PCA and ESS at every point, neighbours included, beside
scikit-dimension (which loops over points for the last two: it is timed on `--num-looped` points,
and the loop is divided by the number of cores, as if its `n_jobs` had no cost).  Growth: exponents
of a line fitted to log time.  Search: time and recall of searches that may miss some neighbours,
on Gaussians of 5 and of 50 dimensions in R^50.  Memory: the largest resident set of a process of
its own.

    python benchmarks/data_lid.py --preset cpu
    python benchmarks/data_lid.py --preset cpu --images /usr/share/datasets/fashion-mnist/...idx3...

`--images` takes an idx file of pictures, FashionMNIST for example (Debian: dataset-fashion-mnist);
without it the second timing is on a Gaussian of as many dimensions.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import tyro
from common import console, finish, header, table

from mmh_jax import lid
from mmh_jax.data import registry, sources

FAMILIES = ("benchmark", "embedded", "affine", "curved", "warped")
OVER_K = ("mle", "two_nn", "ess", "local_pca")
TIMED = ("mle", "two_nn", "local_pca", "ess")
Part = Literal["accuracy", "time", "growth", "search", "memory"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a preset measures."""

    num_points: int
    num_looped: int
    timed: tuple[tuple[int, int], ...]
    num_neighbors: tuple[int, ...]
    growth: int
    memory: tuple[tuple[int, int, int], ...]


SIZES = {
    "smoke": Sizes(300, 5, ((600, 10),), (20,), 200, ((3_000, 20, 3_000), (20_000, 16, 100))),
    "cpu": Sizes(
        2_000, 40, ((20_000, 50), (10_000, 784)), (20, 100), 2_500,
        ((60_000, 784, 60_000), (1_000_000, 64, 2_000)),
    ),
    "accelerator": Sizes(
        5_000, 100, ((20_000, 50), (10_000, 784), (200_000, 50)), (20, 100), 10_000,
        ((60_000, 784, 60_000), (1_000_000, 64, 100_000)),
    ),
}  # fmt: skip


def sets_below(largest_dim: int, only: list[str] | None) -> list[registry.KnownSet]:
    """Of the registry, one law of the affine sets: the dimension does not depend on it."""
    return [
        known
        for known in registry.sets().values()
        if known.ambient_dim <= largest_dim
        and known.family in FAMILIES
        and not known.name.startswith(("Gaussian", "Laplace"))
        and (only is None or known.name in only)
    ]


def accuracy(
    known: registry.KnownSet, num: int, k: int, methods: list[str]
) -> dict[str, float | None]:
    """The mean absolute error at the points, for each method, from one search."""
    labelled = known.sample(num, key=jax.random.key(registry.TEST_SEED))
    points, truth = np.asarray(labelled.points), np.asarray(labelled.lid)
    levels = np.unique(np.geomspace(8, max(2 * k, 32), 9).astype(int))
    neighbors = lid.nearest_neighbors(points, int(levels[-1]))
    near = lid.Neighbors(neighbors.distances[:, :k], neighbors.indices[:, :k])
    row: dict[str, float | None] = {}

    def error(value: Any) -> float | None:
        difference = np.abs(np.asarray(value, float) - truth)
        return float(difference.mean()) if np.isfinite(difference).all() else None

    for name in methods:
        row[name] = error(lid.DATA_METHODS[name].at_points(points, near).value)
    for name in OVER_K:
        curve = lid.neighbor_curve(name, points, neighbors, levels.tolist())
        row[f"{name} over k"] = error(lid.at_plateau(curve).value)
    return row


def ours(points: np.ndarray, k: int) -> dict[str, float]:
    """Seconds: of the search, of each method, and of all together."""
    start = time.perf_counter()
    neighbors = lid.nearest_neighbors(points, k)
    seconds = {"neighbours": time.perf_counter() - start}
    for name in TIMED:
        begin = time.perf_counter()
        method = lid.DATA_METHODS[name]
        if name == "two_nn":  # one number for all, as there
            assert method.pooled is not None
            jax.block_until_ready(method.pooled(neighbors.distances))
        else:
            method.at_points(points, neighbors)
        seconds[name] = time.perf_counter() - begin
    return seconds | {"total": time.perf_counter() - start}


def theirs(points: np.ndarray, k: int, num_looped: int) -> dict[str, float]:
    """The same of scikit-dimension; what loops over points is scaled up from `num_looped`."""
    import skdim

    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        return result

    points = points.astype(np.float64)
    get_nn: Any = skdim._commonfuncs.get_nn
    found = timed("neighbours", lambda: get_nn(points, k=k, n_jobs=os.cpu_count()))
    timed("mle", lambda: skdim.id.MLE().fit(points, precomputed_knn_arrays=found, n_neighbors=k))
    timed("two_nn", lambda: skdim.id.TwoNN().fit(points))
    rows = np.random.default_rng(0).choice(len(points), num_looped, replace=False)
    scale = len(points) / num_looped / (os.cpu_count() or 1)
    near = [points[np.append(row, found[1][row])] for row in rows]
    skdim.id.ESS().fit_once(near[0])  # compiled
    for name, run in (
        ("local_pca", lambda x: skdim.id.lPCA().fit(x)),
        ("ess", lambda x: skdim.id.ESS().fit_once(x)),
    ):
        timed(name, lambda run=run: [run(x) for x in near])
        seconds[name] *= scale
    return seconds | {"total": sum(seconds.values())}


def data_of(n: int, dim: int, images: Path | None) -> tuple[str, np.ndarray]:
    """Pictures where there are some of that size, else a Gaussian of 10 dimensions and noise."""
    if images is not None and dim == 784:
        points = sources.load(images, max_points=n).points.reshape(-1, dim)
        if len(points) == n:
            return images.name, points
    rng = np.random.default_rng(0)
    points = rng.normal(size=(n, 10)) @ rng.normal(size=(10, dim))
    return "Gaussian", (points + 0.1 * rng.normal(size=(n, dim))).astype(np.float32)


def timing(sizes: Sizes, images: Path | None) -> list[dict[str, Any]]:
    """Side by side; ours warm, the median of three, or one if it takes longer than 20 seconds."""
    rows = []
    for k in sizes.num_neighbors:
        for n, dim in sizes.timed:
            name, points = data_of(n, dim, images)
            num_runs = 3 if ours(points, k)["total"] < 20 else 1
            runs = sorted((ours(points, k) for _ in range(num_runs)), key=lambda run: run["total"])
            mine, other = runs[num_runs // 2], theirs(points, k, sizes.num_looped)
            about = {"data": name, "n": n, "D": dim, "k": k}
            rows.append({"by": "mmh_jax", **about, **mine, "ratio": None})
            ratio = other["total"] / mine["total"]
            rows.append({"by": "scikit-dimension", **about, **other, "ratio": ratio})
            totals = f"{mine['total']:.1f} s and {other['total']:.1f} s, {ratio:.1f} times"
            console.print(f"{name}, n = {n}, D = {dim}, k = {k}: {totals}", style="dim")
    return rows


def growth(smallest: int) -> list[dict[str, Any]]:
    """Seconds of the search and of all together with n, and with D; fitted exponents."""
    by_n = [(smallest * 2**i, 50) for i in range(4)]
    by_dim = [(2 * smallest, 25 * 4**i) for i in range(3)]
    rows = []
    for name, cases in (("n", by_n), ("D", by_dim)):
        measured = []
        for n, dim in cases:
            points = data_of(n, dim, None)[1]
            ours(points, 20)
            measured.append(min((ours(points, 20) for _ in range(2)), key=lambda run: run["total"]))
        x = np.log([n if name == "n" else dim for n, dim in cases])
        fits = {
            part: float(np.polyfit(x, np.log([run[part] for run in measured]), 1)[0])
            for part in ("neighbours", "total")
        }
        seconds = ", ".join(f"{run['total']:.2f}" for run in measured)
        span = f"{cases[0][0 if name == 'n' else 1]} to {cases[-1][0 if name == 'n' else 1]}"
        rows.append({"grows with": name, "from": span, "seconds": seconds} | fits)
    return rows


def memory_task(path: str, k: int, num_queries: int) -> None:
    """What the process of its own does: neighbours and LID from a memory-mapped file."""
    points = np.load(path, mmap_mode="r")
    rows = np.arange(len(points)) if num_queries >= len(points) else np.arange(num_queries)
    start = time.perf_counter()
    neighbors = lid.nearest_neighbors(points, k, queries=points[rows], exclude=rows)
    value = np.median(lid.DATA_METHODS["mle"].at_points(points, neighbors).value)
    seconds = time.perf_counter() - start
    print(f"{seconds} {_peak()} {value}")


def _peak() -> float:
    """The largest resident set so far, GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` remembers the process that this one was forked from
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(sizes: Sizes, images: Path | None, scratch: Path) -> list[dict[str, Any]]:
    """The largest resident set, in GiB, of a process that reads the points from a file."""
    rows = []
    for n, dim, num_queries in sizes.memory:
        name, points = data_of(n, dim, images)
        path = scratch / "points.npy"
        np.save(path, points)
        del points
        command = [sys.executable, __file__, "--memory-of", str(path), str(num_queries)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak, value = map(float, done.stdout.split()[-3:])
        rows.append({
            "data": name, "n": n, "D": dim, "queries": num_queries, "k": 20,
            "seconds": seconds, "peak, GiB": peak, "median LID (mle)": value,
        })  # fmt: skip
        path.unlink()
    return rows


def mean_rows(found: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    """A row for each method: over the sets, the mean relative error, and how often it is best."""
    truths = {name: float(np.mean(registry.sets()[name].dims)) for name in found}
    methods = list(next(iter(found.values())))
    best = [min((v, m) for m, v in row.items() if v is not None)[1] for row in found.values()]
    rows = []
    for method in methods:
        values = {name: row[method] for name, row in found.items()}
        relative = [v / truths[name] for name, v in values.items() if v is not None]
        rows.append({
            "method": method,
            "median error / d": float(np.median(relative)) if relative else None,
            "mean error / d": float(np.mean(relative)) if relative else None,
            "best on": best.count(method),
            "not finite on": sum(v is None for v in values.values()),
        })  # fmt: skip
    return rows


def searches(num: int, ambient_dim: int, k: int) -> list[dict[str, Any]]:
    """Searches that may miss some neighbours beside the exact one, and what that does to MLE."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for dim in (5, ambient_dim):
        points = (
            rng.normal(size=(num, dim)) @ np.linalg.qr(rng.normal(size=(ambient_dim, dim)))[0].T
        )
        points = points.astype(np.float32)
        exact = None
        for name, search in (
            ("exact", None), ("approximate", lid.approximate()), ("nn_descent", lid.nn_descent()),
        ):  # fmt: skip
            lid.nearest_neighbors(points[:500], k, search=search)  # compiles what it can
            start = time.perf_counter()
            found = lid.nearest_neighbors(points, k, search=search)
            seconds = time.perf_counter() - start
            exact = found if exact is None else exact
            hits = sum(
                len(np.intersect1d(*pair))
                for pair in zip(found.indices, exact.indices, strict=True)
            )
            rows.append(
                {
                    "d": dim, "D": ambient_dim, "n": num, "k": k, "search": name,
                    "seconds": seconds, "recall": hits / exact.indices.size,
                    "mean MLE": float(
                        lid.DATA_METHODS["mle"].at_points(points, found).value.mean()
                    ),
                }
            )  # fmt: skip
    return rows


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    sets: tuple[str, ...] | None = None,
    num_neighbors: int = 50,
    largest_dim: int = 100,
    methods: tuple[str, ...] | None = None,
    images: Path | None = None,
    parts: tuple[Part, ...] = ("accuracy", "time", "growth", "search", "memory"),
    out: Path = Path("data_lid.json"),
) -> int:
    """Run, print, write.

    Args:
        preset: how much.
        sets: names of `data.registry`; by default all below `largest_dim`.
        num_neighbors: k of the accuracy table.
        largest_dim: of the coordinates of a set.
        methods: in the accuracy table, of `lid.DATA_METHODS`; by default all.
        images: an idx file of pictures.
        parts: what to measure.
        out: the JSON file.
    """
    about, sizes, content, failures = header(), SIZES[preset], {}, []
    if preset == "smoke" and sets is None:
        sets = ("M7 roll", "M2 affine")
    if "accuracy" in parts:
        if methods is None:
            few = (*OVER_K, "tle", "local_pca_gap")
            methods = few if preset == "smoke" else tuple(lid.DATA_METHODS)
        found: dict[str, dict[str, float | None]] = {}
        for known in sets_below(largest_dim, None if sets is None else list(sets)):
            found[known.name] = accuracy(known, sizes.num_points, num_neighbors, list(methods))
            console.print(f"{known.name}: done", style="dim")
        half = (len(next(iter(found.values()))) + 2) // 3
        columns = list(next(iter(found.values())))
        title = f"mean absolute error at the points, {sizes.num_points} points, k = {num_neighbors}"
        for start in range(0, len(columns), half):
            part = columns[start : start + half]
            rows = [{"set": name} | {m: row[m] for m in part} for name, row in found.items()]
            table(title, rows)
        summary = mean_rows(found)
        table("over all sets; d the mean dimension of a set", summary)
        content |= {"accuracy": found, "summary": summary}
    if "time" in parts:
        content["time"] = timing(sizes, images)
        table("seconds, neighbours included", content["time"])
        slow = [row for row in content["time"] if row["ratio"] is not None and row["ratio"] < 10]
        if preset != "smoke":
            failures += [f"only {r['ratio']:.1f} times faster at n = {r['n']}" for r in slow]
    if "growth" in parts:
        content["growth"] = growth(sizes.growth)
        table("exponents of the time", content["growth"])
    if "search" in parts:
        content["search"] = searches({"smoke": 1_000}.get(preset, 50_000), 50, 20)
        table("searches that may miss some neighbours", content["search"])
    if "memory" in parts:
        with tempfile.TemporaryDirectory() as scratch:
            content["memory"] = memory(sizes, images, Path(scratch))
        table("largest resident set of a process", content["memory"])
        failures += [
            f"{row['peak, GiB']:.2f} GiB at n = {row['n']}"
            for row in content["memory"]
            if row["peak, GiB"] > 2
        ]
    return finish(out, about, content, failures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-of"]:
        memory_task(sys.argv[2], 20, int(sys.argv[3]))
    else:
        sys.exit(tyro.cli(main))
