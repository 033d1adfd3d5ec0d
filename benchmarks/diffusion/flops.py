"""Floating-point operations of the full sizes, counted by XLA on shapes alone: nothing is run.

Attention is not chunked for the count, for XLA counts a loop once, however often it is run.  A
product with the Jacobian is what `jax.jvp` takes beyond the value; in a linearised network, where
the value is computed once for all probes, it is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import table
from flax import nnx

from diffusion import published
from mmh_jax import nn, pretrained

PROBES, STEPS = 8, 50


def counted(function: Callable[..., Any], *shapes: Any) -> float:
    """Operations of one call, in units of 10^12."""
    cost: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(cost["flops"]) / 1e12


def abstract(build: Callable[[], Any]) -> tuple[nn.Apply, Any]:
    return nn.split(pretrained.abstract(build))


def shaped(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def of_network(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A row: of one evaluation, one product, and what is made of them."""
    apply, params = abstract(functools.partial(published.unet, config, attention_chunk=None))
    x = shaped((config["sample_size"], config["sample_size"], 4))
    time, cond = shaped(()), published.condition(config, shaped)

    def product(params: Any, x: Any, v: Any, t: Any, cond: Any) -> Any:
        return jax.jvp(lambda x: apply(params, x, t, cond), (x,), (v,))

    def pulled(params: Any, x: Any, v: Any, t: Any, cond: Any) -> Any:
        return jax.vjp(lambda x: apply(params, x, t, cond), x)[1](v)

    value = counted(apply, params, x, time, cond)
    forward = counted(product, params, x, x, time, cond) - value
    return {
        "network": name, "parameters": published.num_parameters(params),
        "latent": f"{x.shape[0]} x {x.shape[1]}", "D": x.size,
        "evaluation": value, "JVP": forward,
        "VJP": counted(pulled, params, x, x, time, cond) - value,
        f"FLIPD, {PROBES} probes": value + PROBES * forward,
        f"sample, {STEPS} guided steps": 2 * STEPS * value,
    }  # fmt: skip


def of_coder(name: str, build: Callable[[], Any], call: str, x: Any) -> dict[str, Any]:
    """A row for what surrounds the U-Net."""
    apply, params = abstract(build)

    def run(params: Any, x: Any) -> Any:
        module = nnx.merge(apply.graph, params)
        return getattr(module, call)(x)

    count = published.num_parameters(params)
    return {"network": name, "parameters": count, "evaluation": counted(run, params, x)}


def run(preset: str, model: Path | None) -> dict[str, Any]:
    """Two tables, of 10^12 operations; the smoke preset counts the tiny ones."""
    del model
    is_tiny = preset == "smoke"
    unets = {"tiny": published.TINY} if is_tiny else published.UNETS
    rows = [of_network(name, config) for name, config in unets.items()]
    table("TFLOP of full-size networks, float32, counted" if not is_tiny else "TFLOP", rows)
    config = published.TINY_VAE if is_tiny else published.VAE
    text = published.TINY_TEXT if is_tiny else published.TEXT

    def vae() -> Any:
        return pretrained.AutoencoderKL(config, attention_chunk=None, rngs=nnx.Rngs(0))

    side = config["sample_size"]
    image, latent = shaped((side, side, 3)), shaped((side // 8, side // 8, 4))
    ids = jax.ShapeDtypeStruct((published.NUM_TOKENS,), jnp.int32)
    encoder = functools.partial(pretrained.CLIPTextModel, text, rngs=nnx.Rngs(0))
    around = [
        of_coder("encoder of images", vae, "encode", image),
        of_coder("decoder of images", vae, "decode", latent),
        of_coder("encoder of texts", encoder, "__call__", ids),
    ]
    table(f"TFLOP around it, images of {side} x {side}", around)
    return {"networks": rows, "around": around}
