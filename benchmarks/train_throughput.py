"""Time of a training step of the U-Net, beside PyTorch and beside its products alone.

The same step on both sides, on the same network with the same weights (the script compares the
answers first): EDM noise and loss, gradient, clipping, Adam, a running average of the weights.
Ours is the step of `train.fit`, many in one compiled scan.  Both are timed in turn, one round each,
and the medians of the rounds are compared.

One weight gradient is timed with and without `nn.compiler_options()`: see `nn.conv`.

The time of the products is that of every convolution and matrix product in the gradient, with the
shapes they have there, in one program without anything else.

    python benchmarks/train_throughput.py --preset cpu            (needs torch)
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import clock, console, finish, header, table
from flax import nnx

from mmh_jax import denoise, nn, train
from mmh_jax.train.compiled import compiled
from mmh_jax.train.step import step as train_step
from mmh_jax.train.store import named_arrays

SIZE = 28
PRODUCTS = ("dot_general", "conv_general_dilated", "convolve", "convolve_to_input")
PRODUCTS += ("convolve_to_kernel",)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset."""

    width: int
    batch: int
    steps: int
    rounds: int


SIZES = {
    "smoke": Sizes(8, 8, 2, 2),
    "cpu": Sizes(32, 64, 8, 9),
    "accelerator": Sizes(128, 512, 50, 9),
}


def median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def subjaxprs(value: Any) -> Iterator[Any]:
    """Of a parameter of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from subjaxprs(value.jaxpr)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from subjaxprs(item)


def products(jaxpr: Any) -> Iterator[Any]:
    """All equations that are convolutions or matrix products, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        else:
            for value in equation.params.values():
                for inner in subjaxprs(value):
                    yield from products(inner)


def products_alone(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], int]:
    """A compiled program of the products in `function(*args)`, on random numbers."""
    equations = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    rng = np.random.default_rng(0)
    inputs = [
        [jnp.asarray(rng.normal(size=v.aval.shape), v.aval.dtype) for v in equation.invars]
        for equation in equations
    ]

    @compiled()
    def run(inputs: Any) -> Any:
        pairs = zip(equations, inputs, strict=True)
        return [e.primitive.bind(*values, **e.params) for e, values in pairs]

    jax.block_until_ready(run(inputs))
    return lambda: run(inputs), len(equations)


def model_of(sizes: Sizes) -> denoise.NetworkDenoiser:
    """The network, with weights that are not zero anywhere."""
    apply, params = nn.split(nn.UNet((SIZE, SIZE, 1), width=sizes.width, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.03 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(structure, moved)
    return denoise.precondition(apply, params, sigma_data=1.0, shape=(SIZE, SIZE, 1))


def ours(
    model: denoise.NetworkDenoiser, points: np.ndarray, sizes: Sizes, config: train.TrainConfig
) -> Callable[[], Any]:
    """A round of steps, in one program; its state goes on from call to call."""
    batches = jnp.asarray(points).reshape(sizes.steps, sizes.batch, SIZE, SIZE, 1)
    state = train.init_state(model, config)

    @compiled()
    def run(state: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), sizes.steps)
        scanned = jax.lax.scan(
            lambda s, x: train_step(config, model, s, (x[0], None), x[1]), state, (batches, keys)
        )
        return scanned[0]

    def round_() -> Any:
        nonlocal state
        state = run(state)
        return state.step

    round_()
    return round_


def theirs(
    model: denoise.NetworkDenoiser, points: np.ndarray, sizes: Sizes, config: train.TrainConfig
) -> tuple[Callable[[], Any], float]:
    """The same in PyTorch, and the largest difference of the two networks' answers."""
    import torch
    import torch_unet

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    network = torch_unet.UNet(1, width=sizes.width)
    torch_unet.load_ours(network, named_arrays(model.params))
    x, c_noise = points[:4], np.linspace(-1, 1, 4, dtype=np.float32)
    apply = model.apply.apply  # pyright: ignore[reportFunctionMemberAccess]
    mine = jax.vmap(lambda x, c: apply(model.params, x, c))(x, c_noise)
    planes = torch.tensor(np.moveaxis(points, 3, 1)).reshape(
        sizes.steps, sizes.batch, 1, SIZE, SIZE
    )
    with torch.no_grad():
        answer = network(planes.flatten(0, 1)[:4], torch.tensor(c_noise))
    difference = float(np.abs(np.moveaxis(answer.numpy(), 1, 3) - np.asarray(mine)).max())
    network, planes = network.to(device), planes.to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    mean = copy.deepcopy(network)
    averages, weights = list(mean.parameters()), list(network.parameters())

    def round_() -> Any:
        for x0 in planes:
            log_sigma = torch.empty(sizes.batch, device=device).uniform_(-6, 2)
            sigma = torch.exp(log_sigma)[:, None, None, None]
            total = (sigma**2 + 1).sqrt()
            noisy = x0 + sigma * torch.randn_like(x0)
            raw = network(noisy / total, sigma.flatten().log() / 4)
            error = noisy / total**2 + sigma / total * raw - x0
            loss = ((1 + sigma**2) / sigma**2 * error**2).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1e-3)
        if device == "cuda":
            torch.cuda.synchronize()
        return None

    round_()
    return round_, difference


def gradient_products(
    model: denoise.NetworkDenoiser, points: np.ndarray, sizes: Sizes, config: train.TrainConfig
) -> tuple[Callable[[], Any], int]:
    """The products of one step's gradient."""
    state = train.init_state(model, config)
    batch = jnp.asarray(points[: sizes.batch])
    return products_alone(
        lambda state, batch: train_step(config, model, state, (batch, None), jax.random.key(0)),
        state,
        batch,
    )


def weight_gradient(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """That of one convolution of twice the width, with and without the options."""
    rng = np.random.default_rng(0)
    x, y = (
        jnp.asarray(rng.normal(size=(sizes.batch, SIZE, SIZE, 2 * sizes.width)), jnp.float32)
        for _ in range(2)
    )
    kernel = jnp.zeros((3, 3, 2 * sizes.width, 2 * sizes.width))

    def gradient(x: Any, y: Any) -> Any:
        return jax.vjp(lambda k: jax.vmap(nn.convolve, (0, None))(x, k), kernel)[1](y)

    programs = {
        "with options": jax.jit(gradient, compiler_options=nn.compiler_options()),
        "without": jax.jit(gradient),
    }
    for program in programs.values():
        jax.block_until_ready(program(x, y))
    return {name: lambda p=program: p(x, y) for name, program in programs.items()}


def main(
    preset: Literal["smoke", "cpu", "accelerator"] = "cpu",
    out: Path = Path("train_throughput.json"),
) -> int:
    """Time, print, write.

    Args:
        preset: sizes of network, batch and rounds.
        out: the JSON file.
    """
    about, sizes, failures = header(), SIZES[preset], []
    model = model_of(sizes)
    config = train.TrainConfig(batch_size=sizes.batch)
    points = np.random.default_rng(0).normal(size=(sizes.steps * sizes.batch, SIZE, SIZE, 1))
    points = points.astype(np.float32)
    rounds = {"mmh_jax, a step": (ours(model, points, sizes, config), sizes.steps)}
    alone, count = gradient_products(model, points, sizes, config)
    rounds[f"its {count} products alone"] = (alone, 1)
    content: dict[str, Any] = {"parameters": sum(a.size for a in jax.tree.leaves(model.params))}
    if importlib.util.find_spec("torch") is None:
        console.print("torch is not there: no comparison")
    else:
        run, content["difference"] = theirs(model, points, sizes, config)
        rounds["PyTorch, a step"] = (run, sizes.steps)
        # Accelerators multiply float32 in fewer bits.
        if content["difference"] > (1e-3 if jax.default_backend() == "cpu" else 0.1):
            failures.append(f"the networks differ by {content['difference']:.2g}")
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(sizes.rounds):
        for name, (run, steps) in rounds.items():
            seconds[name].append(clock(run) / steps)
    step, product, *torch_step = (median(values) for values in seconds.values())
    table(
        f"U-Net of {content['parameters']:,} parameters, batch {sizes.batch} of {SIZE} x {SIZE}; "
        "medians",
        [
            {
                "what": name, "seconds": median(values), "least": min(values),
                "relative to our step": median(values) / step,
            }
            for name, values in seconds.items()
        ],
    )  # fmt: skip
    content |= {"seconds": seconds, "over products": step / product}
    console.print(f"a step takes {step / product:.2f} times its products")
    gradients = weight_gradient(sizes)
    times = {name: [clock(run) for _ in range(5)] for name, run in gradients.items()}
    content["weight gradient"] = {name: median(values) for name, values in times.items()}
    table("seconds of one weight gradient", [content["weight gradient"]])
    if torch_step:
        content["throughput beside PyTorch"] = torch_step[0] / step
        console.print(f"throughput relative to PyTorch: {torch_step[0] / step:.2f}")
    if preset != "smoke":
        if content.get("throughput beside PyTorch", 1.0) < 1.0:
            failures.append("slower than PyTorch")
        if step / product > 1.3:
            failures.append("more than 1.3 times its products")
    return finish(out, about, content, failures)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
