"""The U-Nets beside those of diffusers in PyTorch: seconds of a value and of a JVP, in turn.

Both have the same weights, and the answers are compared first.  PyTorch is run as it comes, without
`torch.compile`, values in `inference_mode`; its fused attention has no forward-mode derivative, so
that the JVP is of its plain attention.  Ours is what `jax.jit` makes of it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import compared, console, table
from flax import nnx

from diffusion import published
from mmh_jax import nn, pretrained

CIFAR = {
    "in_channels": 3, "out_channels": 3, "sample_size": 32, "layers_per_block": 2,
    "block_out_channels": [128, 256, 256, 256], "norm_num_groups": 32, "norm_eps": 1e-6,
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
QUARTER = published.SD1 | {"block_out_channels": [80, 160, 320, 320], "norm_num_groups": 16}
TIME = 500
# On a GPU both multiply in TF32.
TOLERANCE = {"cpu": 1e-3, "gpu": 3e-2}


class Case(NamedTuple):
    """A network of both sides, on images or latents of a side."""

    name: str
    kind: str
    config: dict[str, Any]
    side: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset."""

    cases: tuple[Case, ...]
    batches: tuple[int, ...]
    rounds: int


TINY = Case("tiny Stable Diffusion 1", "UNet2DConditionModel", published.TINY, 8)
SIZES = {
    "smoke": Sizes((TINY,), (1,), 2),
    "cpu": Sizes((
        Case("ddpm-cifar10-32", "UNet2DModel", CIFAR, 32),
        Case("Stable Diffusion 1, a quarter of the width", "UNet2DConditionModel", QUARTER, 32),
    ), (1, 4), 7),
    "accelerator": Sizes((
        Case("ddpm-cifar10-32", "UNet2DModel", CIFAR, 32),
        Case("Stable Diffusion 1", "UNet2DConditionModel", published.SD1, 64),
    ), (1, 4), 7),
}  # fmt: skip


def ours(case: Case) -> tuple[Any, nn.Apply, Any]:
    """The network, whole and split."""
    build = functools.partial(getattr(pretrained, case.kind), case.config, rngs=nnx.Rngs(0))
    network = published.network(build)
    return network, *nn.split(network)


def theirs(case: Case, network: Any) -> Any:
    """The same of diffusers, with the same weights."""
    import diffusers
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")
    made = getattr(diffusers, case.kind)(**case.config).eval().requires_grad_(False)
    weights = pretrained.flatten(network)
    made.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return made.to("cuda" if on_gpu else "cpu")


def our_calls(
    apply: nn.Apply, params: Any, given: dict[str, np.ndarray]
) -> list[Callable[[], Any]]:
    """A value and a JVP of a batch."""
    cond = () if "context" not in given else (jnp.asarray(given["context"]),)
    x, v = jnp.asarray(given["x"]), jnp.asarray(given["v"])

    def many(params: Any, x: Any, *cond: Any) -> Any:
        axes = (None, 0, None, *[0] * len(cond))
        return jax.vmap(apply, in_axes=axes)(params, x, jnp.float32(TIME), *cond)

    value = jax.jit(many)
    product = jax.jit(
        lambda params, x, v, *cond: jax.jvp(lambda x: many(params, x, *cond), (x,), (v,))
    )
    return [lambda: value(params, x, *cond), lambda: product(params, x, v, *cond)[1]]


def their_calls(network: Any, given: dict[str, np.ndarray]) -> Calls:
    """The same of PyTorch, as arrays with the channels last."""
    import torch
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    x, v = (
        torch.from_numpy(given[name].transpose(0, 3, 1, 2).copy()).to(network.device)
        for name in ("x", "v")
    )
    cond = {}
    if "context" in given:
        cond = {"encoder_hidden_states": torch.from_numpy(given["context"]).to(network.device)}

    def attend_by(processor: Any) -> None:
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)

    def answer(x: Any) -> Any:
        return network(x, TIME, **cond).sample

    def read(found: Any) -> np.ndarray:
        return found.numpy(force=True).transpose(0, 2, 3, 1)

    def value() -> np.ndarray:
        attend_by(AttnProcessor2_0())
        with torch.inference_mode():
            return read(answer(x))

    def contiguous(module: Any, args: Any) -> Any:
        return (args[0].clone(memory_format=torch.contiguous_format),)

    def product() -> np.ndarray:
        attend_by(AttnProcessor())
        # The forward mode of the group norm takes nothing else.
        norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
        hooks = [module.register_forward_pre_hook(contiguous) for module in norms]
        with torch.no_grad():
            found = read(torch.func.jvp(answer, (x,), (v,))[1])
        for hook in hooks:
            hook.remove()
        return found

    return [value, product]


def rows_of(case: Case, sizes: Sizes) -> list[dict[str, Any]]:
    """One for each call and batch."""
    network, apply, params = ours(case)
    other, rng, rows = theirs(case, network), np.random.default_rng(0), []
    for batch in sizes.batches:
        shape = (batch, case.side, case.side, case.config["in_channels"])
        given = {name: rng.standard_normal(shape, np.float32) for name in ("x", "v")}
        if "cross_attention_dim" in case.config:
            size = (batch, published.NUM_TOKENS, case.config["cross_attention_dim"])
            given["context"] = rng.standard_normal(size, np.float32)
        calls = zip(
            ("value", "JVP"), our_calls(apply, params, given), their_calls(other, given),
            strict=True,
        )  # fmt: skip
        for name, mine, its in calls:
            expected = its()
            error = float(np.abs(np.asarray(mine()) - expected).max() / np.abs(expected).max())
            found = compared(mine, its, sizes.rounds)
            rows.append({
                "network": case.name, "of": name, "batch": batch, "error": error,
                "s, ours": found["ours"], "s, diffusers": found["theirs"],
                "diffusers / ours": found["ratio"],
            })  # fmt: skip
    return rows


def run(preset: str, model: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """A table, and where the other side is faster or the answers differ."""
    del model
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        console.print("speed: torch or diffusers is not there: skipped")
        return [], []
    sizes = SIZES[preset]
    rows = [row for case in sizes.cases for row in rows_of(case, sizes)]
    table(f"float32, the same weights, on {jax.default_backend()}", rows)
    failures = [
        f"{row['network']}, {row['of']}: answers differ by {row['error']:.1g}"
        for row in rows if not row["error"] < TOLERANCE[jax.default_backend()]
    ]  # fmt: skip
    if preset != "smoke":
        failures += [
            f"{row['network']}, {row['of']}, batch {row['batch']}: "
            f"{1 / row['diffusers / ours']:.2f} times the seconds of diffusers"
            for row in rows if row["diffusers / ours"] < 1
        ]  # fmt: skip
    return rows, failures
