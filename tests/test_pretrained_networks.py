"""Networks with published names beside the PyTorch ones, whose answers are in `data/pretrained`."""

import functools
from pathlib import Path

import jax
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmh_jax import nn, pretrained

DATA = Path(__file__).parent / "data" / "pretrained"
ALL = [(family, case) for family, members in cases.FAMILIES.items() for case in members]
FEW = [("unet", "ncsnpp"), ("conditional_unet", "sd1"), ("autoencoder", "sd")]
# Programs this small take longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def builder(family, case, **options):
    kind = getattr(pretrained, cases.CLASSES[family])
    return lambda: kind(cases.FAMILIES[family][case], rngs=nnx.Rngs(0), **options)


@functools.cache
def drawn(family, case):
    return cases.weights(pretrained.layout(nnx.eval_shape(builder(family, case))))


def network_of(family, case, dtype="float32", **options):
    build = builder(family, case, **options)
    return pretrained.restore(build, drawn(family, case), caller="test", dtype=dtype)


def condition_of(given):
    extra = {name: given[name] for name in ("text_embeds", "time_ids", "label", "guidance")
             if name in given}  # fmt: skip
    return pretrained.Condition(given["context"], **extra) if extra else given["context"]


def functions(family, case, network):
    """The maps of a case, of parameters and a point, as in `make.py`; and the parameters."""
    given = cases.inputs(family, case)
    apply, params = nn.split(network)
    point = given["x"], given["dx"]
    if family == "autoencoder":
        graph = apply.graph
        latent = given["z"], given["dz"]
        return params, {
            "mean": (lambda p, x: nnx.merge(graph, p).encode(x).mean, *point),
            "log_variance": (lambda p, x: nnx.merge(graph, p).encode(x).log_variance, *point),
            "image": (lambda p, z: nnx.merge(graph, p).decode(z), *latent),
        }
    if family == "unet":
        label = given.get("label")
        return params, {"y": (lambda p, x: apply(p, x, given["t"], label), *point)}
    cond = condition_of(given)
    return params, {"y": (lambda p, x: apply(p, x, given["t"], cond), *point)}


def answers(family, case, dtype="float32", **options):
    """Values and JVPs by name, compiled once."""
    params, maps = functions(family, case, network_of(family, case, dtype, **options))

    def everything(params):
        found = {}
        for name, (function, point, direction) in maps.items():
            along = functools.partial(function, params)
            found[name], found[f"d{name}"] = jax.jvp(along, (point,), (direction,))
        return found

    found = jax.jit(everything, compiler_options=QUICK)(params)
    return {name: np.asarray(value) for name, value in found.items()}


def published(family, case):
    whole = load_file(DATA / f"{family}.safetensors")
    return {
        name.removeprefix(f"{case}."): value
        for name, value in whole.items()
        if name.startswith(f"{case}.")
    }


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("family", "case"), ALL)
def test_equals_the_published_network(family, case):
    found, expected = answers(family, case), published(family, case)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == np.float32
        limit = 1e-3 if name.startswith("d") else 1e-4
        assert error(found[name], value) < limit / 20, name
