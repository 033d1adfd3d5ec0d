"""What an estimate of the dimension costs: time and memory, in network evaluations.

One nonlinear network (`bottleneck`), of D = 10 to 16384, under every estimator of a model.  Times
are medians of samples of at least 20 ms; each sample is followed by one of the baselines, and
multiples are medians of the ratios of such neighbours.  There are two baselines: an evaluation of
one example ("alone"), and its share in a batch of 32 ("in a batch"), which is what more examples
cost.  The published FLIPD recipe in PyTorch (`torch_recipe`) is measured against the evaluations of
PyTorch; without torch it is left out.

On a machine shared with other jobs set OPENBLAS_NUM_THREADS=1: the threads of a QR or eigenproblem
spin while they wait for each other, up to 30 times as long as the work takes.

    python benchmarks/lid_speed.py --preset cpu
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import bottleneck
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import console, finish, header, table

from mmh_jax import lid, linalg
from mmh_jax.typing import Array, Denoiser, Key

Estimator = Callable[[Denoiser, Array, Array, Key], Any]
Call = Callable[[], object]

DIMS = (10, 100, 800, 3072, 16384)
SIGMA = 0.1
BATCH, NUM_BATCHES = 32, 4
SAMPLE = 0.020  # seconds
HAS_TORCH = find_spec("torch") is not None
EVALUATION, TORCH_EVALUATION = "one evaluation", "PyTorch, one evaluation"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes."""

    dims: tuple[int, ...]
    largest_cubic: int  # D up to which estimators that cost D^3 are run
    claimed: tuple[int, ...]  # D of the claims about cost
    compared: int  # D of the comparison at equal standard error
    seconds: float  # spent on each row
    has_peaks: bool


PRESETS = {
    "smoke": Preset((20,), 20, (20,), 20, 0.05, False),
    "cpu": Preset(DIMS, 800, (800, 3072), 3072, 0.7, True),
    "accelerator": Preset(DIMS, 3072, (800, 3072), 3072, 0.7, False),
}


def flipd(trace: linalg.Trace) -> Estimator:
    return lambda model, x, sigma, key: lid.flipd(model, x, sigma, trace=trace, key=key)


def evaluation(model: Denoiser, x: Array, sigma: Array, key: Key) -> Array:
    return model(x, sigma)


def richardson(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    return lid.richardson(model, x, sigma, trace=linalg.rademacher(8), key=key)


def curve(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    sigmas = sigma * jnp.geomspace(1, 10, 16)
    return lid.flipd_curve(model, x, sigmas, trace=linalg.rademacher(8), key=key)


def jacobian_spectrum(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    return lid.jacobian_spectrum(model, x, sigma)


def normal_bundle(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    return lid.normal_bundle_spectrum(model, x, sigma, key=key)


def denoising_loss(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    return lid.denoising_loss(model, x, sigma, key=key, num_samples=64)


def soft_rank(model: Denoiser, x: Array, sigma: Array, key: Key) -> Any:
    return lid.soft_rank_lanczos(model, x, sigma, key=key)


CURVE = "flipd_curve, 16 x rademacher(8)"
CUBIC = ("flipd, positive_exact()", "jacobian_spectrum", "normal_bundle_spectrum")
TORCH = ("PyTorch recipe, 1 probe", "PyTorch recipe, 50 probes", "PyTorch recipe, all unit vectors")


def estimators(ambient_dim: int) -> dict[str, Estimator]:
    """The rows of the table, by name."""
    products = 3 * bottleneck.rank(ambient_dim) + 20
    return {
        "flipd, exact()": flipd(linalg.exact()),
        "flipd, rademacher(1)": flipd(linalg.rademacher(1)),
        "flipd, rademacher(8)": flipd(linalg.rademacher(8)),
        "flipd, rademacher(50)": flipd(linalg.rademacher(50)),
        "flipd, xtrace(3d+20)": flipd(linalg.xtrace(products)),
        "flipd, hutchpp(3d+20)": flipd(linalg.hutchpp(products)),
        "flipd, positive_exact()": flipd(linalg.positive_exact()),
        "flipd, positive_lanczos(8, 16)": flipd(linalg.positive_lanczos(8, 16)),
        "richardson, rademacher(8)": richardson,
        CURVE: curve,
        "jacobian_spectrum": jacobian_spectrum,
        "normal_bundle_spectrum": normal_bundle,
        "denoising_loss, 64 samples": denoising_loss,
        "soft_rank_lanczos": soft_rank,
    }


class Program:
    """A compiled estimator and its arguments: no weight and no noise level is a constant of it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.arguments = arguments
        self.compiled = jax.jit(function).lower(*arguments).compile()

    def __call__(self) -> None:
        """Run and wait."""
        jax.block_until_ready(self.compiled(*self.arguments))

    @property
    def temp_bytes(self) -> int:
        """What XLA sets aside for intermediate results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


class Timed:
    """A call, warm, and how many of them make a sample."""

    def __init__(self, call: Call):
        self.call = call
        for _ in range(2):
            start = time.perf_counter()
            call()
            self.seconds = time.perf_counter() - start
            if self.seconds > 1:
                break
        self.repeats = math.ceil(SAMPLE / self.seconds)

    def sample(self) -> float:
        """Milliseconds per call."""
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return 1e3 * (time.perf_counter() - start) / self.repeats


def interleave(calls: list[Timed], seconds: float) -> np.ndarray:
    """(rounds, calls): one sample of each call in turn, 3 to 15 times; once if slow."""
    once = sum(call.seconds * call.repeats for call in calls)
    rounds = min(max(int(seconds / once), 3 if once < 1 else 1), 15)
    return np.array([[call.sample() for call in calls] for _ in range(rounds)])


class Problem:
    """The network of one D, points, and the two baselines."""

    def __init__(self, ambient_dim: int, seed: int, with_baselines: bool = True):
        self.ambient_dim = ambient_dim
        self.arrays = bottleneck.weights(ambient_dim, seed)
        self.model = bottleneck.load(self.arrays)
        rng = np.random.default_rng(seed + 1)
        latent = rng.normal(size=(NUM_BATCHES, BATCH, bottleneck.rank(ambient_dim)))
        self.points = jnp.asarray(latent @ self.arrays["frame"].T, jnp.float32)
        self.sigma = jnp.float32(SIGMA)
        self.key = jax.random.key(seed + 2)
        self.baselines: list[Timed] = []
        if with_baselines:
            many = lambda model, batches, sigma: jax.lax.map(  # noqa: E731
                lambda batch: jax.vmap(model, (0, None))(batch, sigma), batches
            )
            batched = Program(many, self.model, self.points, self.sigma)
            self.baselines = [Timed(self.program(evaluation)), Timed(batched)]

    @property
    def x(self) -> Array:
        """One point."""
        return self.points[0, 0]

    def program(self, estimator: Estimator) -> Program:
        """At one point."""
        return Program(estimator, self.model, self.x, self.sigma, self.key)

    def batch_program(self, estimator: Estimator) -> Program:
        """At 32 points, by `vmap`."""
        keys = jax.random.split(self.key, BATCH)
        mapped = jax.vmap(estimator, (None, 0, None, 0))
        return Program(mapped, self.model, self.points[0], self.sigma, keys)


def costs(
    call: Call, baselines: list[Timed], batch: int, seconds: float
) -> tuple[float, float, float]:
    """Milliseconds; multiples of an evaluation alone, and of one in a batch."""
    samples = interleave([*baselines, Timed(call)], seconds)
    alone, batched, own = samples.T
    return (
        float(np.median(own)),
        float(np.median(own / alone)),
        float(np.median(own / (batched / batch))),
    )


def row(name: str, milliseconds: Any, alone: Any, batched: Any, temp: Any) -> dict[str, Any]:
    return {
        "estimator": name,
        "ms per point": milliseconds,
        "evaluations alone": alone,
        "evaluations in a batch": batched,
        "temp MB": temp,
    }


def torch_rows(problem: Problem, seconds: float) -> list[dict[str, Any]]:
    import torch_recipe

    x = np.asarray(problem.x)
    _, _, calls = torch_recipe.callables(problem.arrays, x, SIGMA)
    baselines = [Timed(calls[TORCH_EVALUATION]), Timed(calls["PyTorch, a batch of 32"])]
    rows = [row(name, *costs(calls[name], baselines, BATCH, seconds), "") for name in TORCH]
    alone, batched = (float(np.median(t)) for t in interleave(baselines, seconds).T)
    first = row(TORCH_EVALUATION, alone, 1.0, alone / (batched / BATCH), "")
    return [first, *rows]


def measure(problem: Problem, preset: Preset) -> list[dict[str, Any]]:
    """The table of one D."""
    baselines, batch = problem.baselines, BATCH * NUM_BATCHES
    first = problem.program(evaluation)
    rows = [row(EVALUATION, *costs(first, baselines, batch, preset.seconds), 0.0)]
    for name, estimator in estimators(problem.ambient_dim).items():
        if name in CUBIC and problem.ambient_dim > preset.largest_cubic:
            rows.append(row(name, "left out", "", "", ""))
            continue
        program = problem.program(estimator)
        cost = costs(program, baselines, batch, preset.seconds)
        rows.append(row(name, *cost, program.temp_bytes / 1e6))
    return rows + (torch_rows(problem, preset.seconds) if HAS_TORCH else [])


def claim(text: str, dim: int, value: float, limit: float, beside: str, least: bool = False) -> Any:
    """A line of the table of claims: `value` at most `limit`, or at least."""
    passes = value >= limit if least else value <= limit
    return {
        "claim": text,
        "D": dim,
        "measured": value,
        "limit": f"{'>=' if least else '<='} {limit:.4g}",
        "": "pass" if passes else "fail",
        "beside it": beside,
    }


def cost_claims(problem: Problem, rows: list[dict[str, Any]], seconds: float) -> list[Any]:
    """Claims (a), (b) and (c), of the rows of one D."""
    dim = problem.ambient_dim
    by_name = {row["estimator"]: row for row in rows}
    exact = by_name["flipd, exact()"]
    claims = [
        claim(
            "(a) exact: evaluations / D",
            dim,
            exact["evaluations in a batch"] / dim,
            0.8,
            f"{exact['evaluations alone'] / dim:.3g} alone",
        )
    ]
    limits = {f"flipd, rademacher({k})": ("b", 1.2 * (k + 1)) for k in (1, 8, 50)}
    for name, (letter, limit) in (limits | {CURVE: ("c", 160.0)}).items():
        program = problem.batch_program(estimators(dim)[name])
        together = costs(program, problem.baselines, BATCH * NUM_BATCHES, seconds)[2] / BATCH
        value = by_name[name]["evaluations alone"]
        beside = f"{together:.4g} in a batch of 32"
        claims.append(
            claim(f"({letter}) {name.removeprefix('flipd, ')}", dim, value, limit, beside)
        )
    return claims


def print_peak(name: str, ambient_dim: int) -> None:
    """Run one estimator once and print the peak of resident memory from then on, kB (Linux)."""
    if name.startswith("PyTorch"):
        import torch_recipe

        arrays = bottleneck.weights(ambient_dim)
        call = torch_recipe.callables(arrays, arrays["frame"][:, 0], SIGMA)[2][name]
        forget_peak()
        call()
    else:
        problem = Problem(ambient_dim, seed=0, with_baselines=False)
        forget_peak()
        problem.program((estimators(ambient_dim) | {EVALUATION: evaluation})[name])()
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def forget_peak() -> None:
    """Drawing the weights must not hide what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(name: str, ambient_dim: int) -> float:
    """MB, in a process of its own."""
    code = f"import lid_speed; lid_speed.print_peak({name!r}, {ambient_dim})"
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(result.stdout.split()[-1]) / 1e3


def peaks(ambient_dim: int, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The table of peak memory, and claim (d)."""
    few, many = "flipd, rademacher(1)", "flipd, rademacher(50)"
    temp = {row["estimator"]: row["temp MB"] for row in rows}
    groups = [(EVALUATION, few, many, "flipd, exact()")]
    if HAS_TORCH:
        groups.append((TORCH_EVALUATION, *TORCH[:2]))
    result = []
    for group in groups:
        base = peak(group[0], ambient_dim)
        result.append({"process": group[0], "peak MB": base, "growth MB": 0.0, "temp MB": ""})
        for name in group[1:]:
            total = peak(name, ambient_dim)
            entry = {"process": name, "peak MB": total, "growth MB": total - base}
            result.append(entry | {"temp MB": temp[name]})
    total = {row["process"]: row["peak MB"] for row in result}
    beside = f"temp {temp[few]:.3g} and {temp[many]:.3g} MB"
    text = "(d) peak memory, 50 probes / 1"
    return result, [claim(text, ambient_dim, total[many] / total[few], 1.3, beside)]


@functools.cache
def deviation(problem: Problem, trace: linalg.Trace, num_keys: int = 64) -> float:
    """Standard deviation of FLIPD at one point, over keys."""

    def values(model: Denoiser, x: Array, sigma: Array, keys: Array) -> Array:
        return jax.lax.map(lambda key: flipd(trace)(model, x, sigma, key).value, keys)

    keys = jax.random.split(problem.key, num_keys)
    return float(jnp.std(jax.jit(values)(problem.model, problem.x, problem.sigma, keys), ddof=1))


def ours_for(problem: Problem, target: float) -> dict[str, tuple[Call, float]]:
    """Enough signs, and the fewest products of XTrace on a grid; with the deviations measured."""
    d = bottleneck.rank(problem.ambient_dim)
    count = math.ceil((deviation(problem, linalg.rademacher(1), 256) / target) ** 2)
    signs = linalg.rademacher(count)
    chosen = {f"rademacher({count})": (signs, deviation(problem, signs))}
    for products in (4, *range(8 * d // 5, 3 * d + 20, d // 5)):
        spread = deviation(problem, trace := linalg.xtrace(products))
        if spread <= target:
            chosen[f"xtrace({products})"] = trace, spread
            break
    return {
        name: (problem.program(flipd(trace)), spread) for name, (trace, spread) in chosen.items()
    }


def recipe_for(problem: Problem, target: float) -> tuple[str, Call, float]:
    """Enough Gaussian probes, or all unit vectors if these are fewer; with the deviation."""
    import torch_recipe

    recipe, x, _ = torch_recipe.callables(problem.arrays, np.asarray(problem.x), SIGMA)
    single = recipe.deviation(x)
    count = math.ceil((single / target) ** 2)
    if count < problem.ambient_dim:
        name = f"PyTorch recipe, {count} probes"
        return name, lambda: recipe.probes(x, count), single / math.sqrt(count)
    name = f"PyTorch recipe, all unit vectors (for {count} probes)"
    return name, lambda: recipe.exact(x), 0.0


def equal_error(problem: Problem, seconds: float) -> tuple[list[dict[str, Any]], list[Any]]:
    """Ways to the same standard error, and claim (e)."""
    dim = problem.ambient_dim
    d = bottleneck.rank(dim)
    rows, claims = [], []
    for target, share, limit in ((dim / 100, "1% of D", 0.0), (d / 100, "1% of d", 10.0)):
        ways = ours_for(problem, target)
        name, call, spread = recipe_for(problem, target)
        ways[name] = call, spread
        samples = interleave([Timed(call) for call, _ in ways.values()], 8 * seconds)
        for (name, (_, spread)), times in zip(ways.items(), samples.T, strict=True):
            milliseconds = float(np.median(times))
            rows.append({"target": target, "by": name, "error": spread, "ms": milliseconds})
        best = int(np.argmin(np.median(samples[:, :-1], axis=0)))
        ratio = float(np.median(samples[:, -1] / samples[:, best]))
        line = claim(
            f"(e) recipe / ours at {share}",
            dim,
            ratio,
            limit,
            f"against {list(ways)[best]}",
            least=True,
        )
        claims.append(line if limit else line | {"limit": "none", "": "not judged"})
    return rows, claims


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    seed: int = 0,
    out: Path = Path("results/lid_speed.json"),
) -> int:
    about = header() | {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "not set")}
    sizes = PRESETS[preset]
    start = time.perf_counter()
    if HAS_TORCH:
        import torch_recipe

        about |= torch_recipe.versions()
    else:
        console.print("torch is not installed: the rows of the PyTorch recipe are left out")
    tables: dict[str, Any] = {}
    claims: list[dict[str, Any]] = []
    for dim in sizes.dims:
        problem = Problem(dim, seed)
        rows = measure(problem, sizes)
        tables[str(dim)] = rows
        table(f"D = {dim}, d = {bottleneck.rank(dim)}", rows)
        if dim in sizes.claimed:
            claims += cost_claims(problem, rows, sizes.seconds)
        if dim == sizes.compared and sizes.has_peaks:
            tables["peaks"], more = peaks(dim, rows)
            table(f"peak of resident memory, one process each, D = {dim}", tables["peaks"])
            claims += more
        if dim == sizes.compared and HAS_TORCH:
            tables["equal error"], more = equal_error(problem, sizes.seconds)
            table(f"at equal standard error, D = {dim}", tables["equal error"])
            claims += more
    table("claims: (a) in evaluations in a batch, (b) and (c) in evaluations alone", claims)
    failures = [
        f"{line['claim']}, D = {line['D']}: {line['measured']:.4g}, not {line['limit']}"
        for line in claims
        if line[""] == "fail" and preset != "smoke"
    ]
    seconds = time.perf_counter() - start
    content = {"preset": preset, "seed": seed, "seconds": seconds, "claims": claims}
    return finish(out, about, content | {"tables": tables}, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
