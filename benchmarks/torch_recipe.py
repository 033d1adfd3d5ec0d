"""The published FLIPD recipe in plain PyTorch, on the network of `bottleneck`.

Kamkari et al. (NeurIPS 2024, 2406.03537), after the description: Hutchinson's trace with Gaussian
probes of the Jacobian of sigma^2 times the score, products by forward-mode differentiation,
vectorised over chunks of 128 probes, with the network itself evaluated anew for each chunk; or all
D unit vectors, in such chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

# Threads that spin at every barrier take 10 to 50 times as long where cores are shared with others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.func import jvp, vmap

CHUNK = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(os.cpu_count() or 1)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "torch threads": str(torch.get_num_threads())}


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(array), device=DEVICE)


class Recipe:
    """FLIPD of one network at one noise level."""

    def __init__(self, arrays: dict[str, np.ndarray], sigma: float):
        self.weights = {name: tensor(array) for name, array in arrays.items()}
        self.sigma = torch.tensor(sigma, device=DEVICE)

    def denoiser(self, x: torch.Tensor) -> torch.Tensor:
        """D(x; sigma) of points (..., D)."""
        w = self.weights
        u = x @ w["frame"]
        h = u @ w["enter"]
        for inner, outer, time in zip(w["inner"], w["outer"], w["time"], strict=True):
            h = h + torch.nn.functional.silu(h @ inner + torch.log(self.sigma) * time) @ outer
        return (u / (1 + self.sigma**2) + h @ w["leave"]) @ w["frame"].T

    def scaled_score(self, x: torch.Tensor) -> torch.Tensor:
        """sigma^2 times the score."""
        return self.denoiser(x) - x

    def forms(self, x: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """v^T J v of the scaled score for each row v, the network evaluated once on the way."""
        products = vmap(lambda probe: jvp(self.scaled_score, (x,), (probe,))[1])(probes)
        return (probes * products).sum(-1)

    def flipd(self, x: torch.Tensor, chunks: Iterator[torch.Tensor], count: int) -> torch.Tensor:
        """FLIPD from the probes in `chunks`, the sum of whose forms is `count` times the trace."""
        trace = sum(self.forms(x, probes).sum() for probes in chunks) / count
        return x.numel() + trace + (self.scaled_score(x) / self.sigma).square().sum()

    @torch.no_grad()
    def probes(self, x: torch.Tensor, num_probes: int) -> float:
        """FLIPD with Gaussian probes."""
        sizes = [min(CHUNK, num_probes - done) for done in range(0, num_probes, CHUNK)]
        chunks = (torch.randn(size, x.numel(), device=DEVICE) for size in sizes)
        return float(self.flipd(x, chunks, num_probes))

    @torch.no_grad()
    def exact(self, x: torch.Tensor) -> float:
        """FLIPD with all unit vectors."""
        rows = torch.arange(x.numel(), device=DEVICE).split(CHUNK)
        units = (torch.nn.functional.one_hot(row, x.numel()).to(x.dtype) for row in rows)
        return float(self.flipd(x, units, 1))

    @torch.no_grad()
    def deviation(self, x: torch.Tensor, num_probes: int = 512) -> float:
        """Standard deviation of the trace from one probe."""
        parts = torch.randn(num_probes, x.numel(), device=DEVICE).split(CHUNK)
        return float(torch.cat([self.forms(x, part) for part in parts]).std())

    @torch.no_grad()
    def evaluate(self, x: torch.Tensor) -> np.ndarray:
        """D(x; sigma), waited for."""
        return self.denoiser(x).cpu().numpy()


def callables(
    arrays: dict[str, np.ndarray], x: np.ndarray, sigma: float
) -> tuple[Recipe, torch.Tensor, dict[str, Callable[[], object]]]:
    """The network, the point, and what is timed; each call ends when its number is there."""
    recipe, point = Recipe(arrays, sigma), tensor(x)
    batch = point.expand(32, -1).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "PyTorch, one evaluation": lambda: recipe.evaluate(point),
        "PyTorch, a batch of 32": lambda: recipe.evaluate(batch),
        "PyTorch recipe, 1 probe": lambda: recipe.probes(point, 1),
        "PyTorch recipe, 8 probes": lambda: recipe.probes(point, 8),
        "PyTorch recipe, 50 probes": lambda: recipe.probes(point, 50),
        "PyTorch recipe, all unit vectors": lambda: recipe.exact(point),
    }
    return recipe, point, calls
