"""`nn.UNet` in PyTorch, layer by layer, with the same weights: what training is timed against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmh_jax.nn.layers import GroupNorm as OurGroupNorm

NUM_SINES = 64


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(OurGroupNorm(width).num_groups, width, eps=1e-5)


class Attention(nn.Module):
    """Of the pixels to each other."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(width)
        self.query, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor) -> Tensor:
        """For a batch, (N, C, H, W)."""
        num, width, height, _ = h.shape
        x = self.norm(h).flatten(2).transpose(1, 2)
        k, v = self.key_value(x).chunk(2, dim=-1)
        q, k, v = (
            value.view(num, -1, self.num_heads, width // self.num_heads).transpose(1, 2)
            for value in (self.query(x), k, v)
        )
        found = (
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(num, -1, width)
        )
        return h + self.leave(found).transpose(1, 2).reshape(num, width, height, -1)


class Block(nn.Module):
    """A residual block, and attention if it has heads."""

    def __init__(self, num_in: int, num_out: int, embedding: int, num_heads: int | None):
        super().__init__()
        self.norm_in, self.norm_out = group_norm(num_in), group_norm(num_out)
        self.conv_in = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.conv_out = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * num_out)
        self.skip = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else None
        self.attention = Attention(num_out, num_heads) if num_heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """For a batch, (N, C, H, W)."""
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_out(functional.silu(self.norm_out(h) * (1 + scale) + shift))
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class Halved(nn.Module):
    """A strided convolution, with the padding of 'SAME': one row below, none above."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """For a batch, (N, C, H, W)."""
        return self.conv(functional.pad(h, (0, 1, 0, 1)))


class Doubled(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """For a batch, (N, C, H, W)."""
        return self.conv(functional.interpolate(h, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """Unconditional, for images of one or more channels, (N, C, H, W); even sizes at each level."""

    def __init__(
        self,
        channels: int,
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 1,
    ):
        super().__init__()
        embedding, last = 4 * width, len(multipliers) - 1
        self.inner, self.outer = nn.Linear(NUM_SINES, embedding), nn.Linear(embedding, embedding)
        here, kept, down, up = width, [width], [], []
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        for level, factor in enumerate(multipliers):
            if level > 0:
                down.append(Halved(here))
                kept.append(here)
            for _ in range(num_blocks):
                down.append(Block(here, width * factor, embedding, 1 if level == last else None))
                here = width * factor
                kept.append(here)
        self.middle = nn.ModuleList([Block(here, here, embedding, 1) for _ in range(2)])
        for level, factor in reversed(list(enumerate(multipliers))):
            for _ in range(num_blocks + 1):
                heads = 1 if level == last else None
                up.append(Block(here + kept.pop(), width * factor, embedding, heads))
                here = width * factor
            if level > 0:
                up.append(Doubled(here))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm = group_norm(here)
        self.leave = nn.Conv2d(here, channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """For a batch, (N, C, H, W)."""
        frequencies = torch.logspace(0, math.log10(64), NUM_SINES // 2, device=x.device)
        angles = c_noise[:, None] * frequencies
        sines = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding = functional.silu(self.outer(functional.silu(self.inner(sines))))
        h = self.enter(x)
        kept = [h]
        for module in self.down:
            h = module(h, embedding)
            kept.append(h)
        for module in self.middle:
            h = module(h, embedding)
        for module in self.up:
            if isinstance(module, Block):
                h = torch.cat([h, kept.pop()], dim=1)
            h = module(h, embedding)
        return self.leave(functional.silu(self.norm(h)))


def _pairs(network: UNet, ours: dict[str, Any]) -> Iterator[tuple[nn.Parameter, np.ndarray]]:
    """Every parameter of the PyTorch network with our array, in its layout."""
    names = {
        "attention.norm": "attention.norm", "attention.query": "attention.itself.query",
        "attention.key_value": "attention.itself.key_value",
        "attention.leave": "attention.itself.leave",
    }  # fmt: skip
    for name, parameter in network.named_parameters():
        path, kind = name.rsplit(".", 1)
        for theirs, own in names.items():
            if path.endswith(theirs):
                path = path.removesuffix(theirs) + own
        if path in ("inner", "outer"):
            path = f"embed.{path}"
        if path.startswith("down.") and path.endswith(".conv"):
            path = path.removesuffix(".conv")
        if kind == "bias":
            yield parameter, ours[f"{path}.bias"]
        elif f"{path}.scale" in ours:
            yield parameter, ours[f"{path}.scale"]
        else:
            kernel = ours[f"{path}.kernel"]
            yield parameter, kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def load_ours(network: UNet, ours: dict[str, Any]) -> None:
    """Give it the arrays of `nn.UNet`, by the names of `train.store`; all are used, once."""
    pairs = list(_pairs(network, ours))
    if len(pairs) != len(ours):
        raise ValueError(f"{len(ours)} arrays for {len(pairs)} parameters.")
    with torch.no_grad():
        for parameter, array in pairs:
            if parameter.shape != array.shape:
                raise ValueError(f"a parameter of shape {parameter.shape}, {array.shape} of ours.")
            parameter.copy_(torch.tensor(np.array(array)))
