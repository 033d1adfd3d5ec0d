"""What each step of the Stable Diffusion experiment costs for one image: evaluations, seconds,
memory.

Each is one program, compiled before it is timed; medians over the rounds.  Memory is what XLA says
of the program: arguments, among them the parameters, results, and what it keeps on the way.
Several images at once share the parameters, and their seconds are divided by their number.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import clock, table
from flax import nnx

from diffusion import published
from mmh_jax import denoise, lid, linalg, sample
from mmh_jax.pretrained.run import levels

GUIDANCE = 7.5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a preset: what is tried, probes of FLIPD, steps of the sampler, rounds."""

    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    probes: int
    steps: int
    rounds: int


SIZES = {
    "smoke": Sizes(("float32",), (1,), 2, 2, 2),
    "cpu": Sizes(("float32",), (1,), 2, 2, 2),
    "accelerator": Sizes(("float32", "bfloat16"), (1, 4), 8, 50, 5),
}


class Operation(NamedTuple):
    """A step for one latent: `function(x, *others)`, with its evaluations of the U-Net."""

    name: str
    evaluations: float
    function: Callable[..., Any]
    others: tuple[Any, ...]
    in_batches: bool = False


def operations(parts: published.Parts, sizes: Sizes, sigma: float) -> Iterator[Operation]:
    """All of them."""
    probes = linalg.rademacher(sizes.probes, chunk_size=1)
    sigmas, _ = levels(parts.process, sizes.steps)

    def dimension(x: Any, model: Any) -> Any:
        return lid.flipd(model, x, sigma, trace=probes, key=jax.random.key(0)).value

    def drawn(x: Any, pair: Any) -> Any:
        guided = denoise.Guided(*pair, jnp.float32(GUIDANCE))
        return sample.solve(guided, sigmas[0] * x, sigmas, step=sample.ddim())

    def decoded(x: Any, vae: Any) -> Any:
        module = nnx.merge(parts.vae[0].graph, vae)
        return module.decode(module.unscale(x))

    def encoded(x: Any, vae: Any) -> Any:
        module = nnx.merge(parts.vae[0].graph, vae)
        # An image of the latent's own numbers, of the size that belongs to it.
        image = jax.image.resize(x[..., :3], published.image_of(parts.vae, parts.shape), "nearest")
        return module.encode(image)[0]

    def read(x: Any, text: Any) -> Any:
        ids = jnp.zeros(published.NUM_TOKENS, int) + (x.ravel()[0] > 1e9)
        return parts.text[0](text, ids).last

    model, pair = (parts.conditional,), ((parts.conditional, parts.unconditional),)
    yield Operation("text encoded", 0, read, (parts.text[1],))
    yield Operation("image encoded", 0, encoded, (parts.vae[1],))
    yield Operation("latent decoded", 0, decoded, (parts.vae[1],))
    yield Operation("denoised", 1, lambda x, model: model(x, sigma), model, True)
    yield Operation(f"FLIPD, {sizes.probes} probes", 1.0 + sizes.probes, dimension, model, True)
    yield Operation(f"sampled, {sizes.steps} guided steps", 2 * len(sigmas), drawn, pair)


class Program(NamedTuple):
    """An operation on several latents, lowered."""

    operation: Operation
    x: Any
    lowered: Any

    def compiled(self) -> Any:
        """Ready to run."""
        return self.lowered.compile()


def lowered(operation: Operation, shape: tuple[int, ...], batch: int) -> Program:
    """The program for a batch."""
    others = operation.others
    many = jax.vmap(operation.function, in_axes=(0, *[None] * len(others)))
    x = jax.random.normal(jax.random.key(1), (batch, *shape))
    return Program(operation, x, jax.jit(many).lower(x, *others))


def measured(program: Program, compiled: Any, rounds: int) -> tuple[float, float]:
    """Seconds, and GiB of memory."""
    given = (program.x, *program.operation.others)
    jax.block_until_ready(compiled(*given))
    seconds = [clock(lambda: compiled(*given)) for _ in range(rounds)]
    # Parameters that two models share are there once.
    arguments = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(given)}
    memory = compiled.memory_analysis()
    total = sum(arguments.values()) + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return float(np.median(seconds)), total / 2**30


def rows_of(parts: published.Parts, sizes: Sizes, dtype: str) -> list[dict[str, Any]]:
    """One for each operation and batch."""
    # t = .01 of the training's times, where the paper looks at Stable Diffusion.
    sigma, rows = float(parts.process.schedule.sigma(0.01 * parts.process.num_steps)), []
    programs = [
        lowered(operation, parts.shape, batch)
        for operation in operations(parts, sizes, sigma)
        for batch in (sizes.batches if operation.in_batches else sizes.batches[:1])
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(Program.compiled, programs))
    for program, ready in zip(programs, compiled, strict=True):
        batch = len(program.x)
        try:
            seconds, memory = measured(program, ready, sizes.rounds)
        except jax.errors.JaxRuntimeError as error:  # of the device, in its own words: no room
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = memory = float("nan")
        rows.append({
            "operation": program.operation.name, "dtype": dtype, "images at once": batch,
            "evaluations": program.operation.evaluations, "s / image": seconds / batch,
            "memory, GiB": memory,
        })  # fmt: skip
    return rows


def run(preset: str, model: Path | None) -> list[dict[str, Any]]:
    """A table for each dtype."""
    sizes, rows = SIZES[preset], []
    for dtype in sizes.dtypes:
        if model is None:
            parts = published.at_random(preset != "accelerator", dtype)
        else:
            parts = published.of_folder(model, dtype)
        own = rows_of(parts, sizes, dtype)
        table(f"{parts.what}, {dtype}, on {jax.devices()[0].device_kind}", own)
        rows += own
    return rows
