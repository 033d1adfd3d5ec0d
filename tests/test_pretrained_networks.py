"""Networks with published names beside the PyTorch ones, whose answers are in `data/pretrained`."""

import copy
import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmh_jax import denoise, nn, noise, pretrained
from mmh_jax.pretrained import layers

DATA = Path(__file__).parent / "data" / "pretrained"
# The others are in the pipelines of `test_pretrained_pipeline`, or slow.
QUICKLY = {
    ("unet", "ncsnpp"), ("conditional_unet", "sdxl"),
}  # fmt: skip
ALL = [
    pytest.param(family, case, marks=() if (family, case) in QUICKLY else pytest.mark.slow)
    for family, members in cases.FAMILIES.items()
    for case in members
]
# Programs this small take longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def builder(family, case, **options):
    kind = getattr(pretrained, cases.CLASSES[family])
    return lambda: kind(cases.FAMILIES[family][case], rngs=nnx.Rngs(0), **options)


@functools.cache
def drawn(family, case):
    return cases.weights(pretrained.layout(pretrained.abstract(builder(family, case))))


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


@pytest.mark.parametrize(
    ("family", "case"),
    [("unet", "old"), pytest.param("conditional_unet", "sdxl", marks=pytest.mark.slow)],
)
def test_gradients_and_batches(family, case):
    """One program: values and gradients of two points at once."""
    given, expected = cases.inputs(family, case), published(family, case)
    params, maps = functions(family, case, network_of(family, case))
    function = maps["y"][0]
    weight = cases.draw("weight", expected["y"].shape)
    points = jnp.stack([given["x"], given["dx"]])

    def loss(x):
        y = function(params, x)
        return jnp.sum(weight * y), y

    grad = jax.vmap(jax.value_and_grad(loss, has_aux=True))
    (_, values), gradients = jax.jit(grad, compiler_options=QUICK)(points)
    assert error(values[0], expected["y"]) < 1e-5
    # <w, J dx> = <J^T w, dx>, with the JVP of the published network.
    adjoint = np.sum(np.asarray(gradients[0]) * given["dx"])
    np.testing.assert_allclose(adjoint, np.sum(weight * expected["dy"]), rtol=1e-4)
    assert not np.allclose(values[0], values[1])


def test_bfloat16():
    found = network_of("autoencoder", "sd", "bfloat16")
    leaves = jax.tree.leaves(nnx.state(found))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    graph, params = nnx.split(found)
    z, expected = cases.inputs("autoencoder", "sd")["z"], published("autoencoder", "sd")["image"]

    def both(params, z):
        decode = nnx.merge(graph, params).decode
        return decode(z), decode(z.astype(jnp.bfloat16))

    single, half = jax.jit(both, compiler_options=QUICK)(params, z)
    assert single.dtype == jnp.float32  # the wider one of latent and parameters
    assert half.dtype == jnp.bfloat16
    for value in (single, half):
        assert error(np.asarray(value, np.float32), expected) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), [("unet", "ddpm"), ("conditional_unet", "sdxl")])
def test_bfloat16_of_unets(family, case):
    found, expected = answers(family, case, "bfloat16"), published(family, case)
    for name, value in expected.items():
        assert error(found[name].astype(np.float32), value) < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), [("conditional_unet", "sd2"), ("autoencoder", "sd")])
def test_chunks_of_attention_change_nothing(family, case):
    for name, value in answers(family, case, attention_chunk=7).items():
        assert error(value, published(family, case)[name]) < 5e-5, name


def equations_in(jaxpr):
    """All equations of a program, those inside its loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations_in(inner)


def sizes_in(jaxpr):
    """The sizes of all arrays that a program makes."""
    for equation in equations_in(jaxpr):
        yield from (np.prod(var.aval.shape, dtype=int) for var in equation.outvars)


@pytest.mark.parametrize(
    "order", ["value", "jvp", "grad", pytest.param("jvp of grad", marks=pytest.mark.slow)]
)
def test_chunked_attention_has_no_large_scores(order):

    q, k, v = (jnp.asarray(cases.draw(name, (36, 2, 3))) for name in "qkv")
    bias = jnp.where(jnp.tri(36, dtype=bool), 0.0, -jnp.inf)

    def make(chunk):
        def value(q):
            return layers.attend(q, k, v, bias=bias, chunk=chunk)

        def grad(q):
            return jax.grad(lambda q: jnp.sum(jnp.sin(value(q))))(q)

        return {
            "value": value,
            "grad": grad,
            "jvp": lambda q: jax.jvp(value, (q,), (v,))[1],
            "jvp of grad": lambda q: jax.jvp(grad, (q,), (v,))[1],
        }[order]

    np.testing.assert_allclose(jax.jit(make(5))(q), jax.jit(make(None))(q), rtol=1e-4, atol=1e-5)
    # The scores of all queries have 2 x 36 x 36 elements, those of a chunk 2 x 5 x 36; the mask
    # itself has 40 x 36.
    whole, parts = (max(sizes_in(jax.make_jaxpr(make(chunk))(q).jaxpr)) for chunk in (None, 5))
    assert whole >= 2 * 36 * 36 > parts


def test_statistics_and_softmax_are_in_float32():
    half = jnp.ones((6, 2, 4), jnp.bfloat16)
    group, layer = layers.GroupNorm(2, 4), layers.LayerNorm(4)
    for function, name in (
        (lambda x: layers.attend(x, x, x), "exp"),
        (lambda x: layers.attend(x, x, x, chunk=4), "exp"),
        (group, "rsqrt"),
        (group, "reduce_sum"),
        (layer, "rsqrt"),
        (layer, "reduce_sum"),
    ):
        assert jax.eval_shape(function, half).dtype == jnp.bfloat16
        equations = equations_in(jax.make_jaxpr(function)(half).jaxpr)
        found = [e.outvars[0].aval.dtype for e in equations if e.primitive.name == name]
        assert found
        assert set(found) == {jnp.dtype("float32")}, name


@pytest.mark.slow
def test_a_jvp_of_stable_diffusion_fits_an_accelerator():
    """Of the full size, by shapes: compiled, not run.  Without chunks 1.1 GB more."""
    network = pretrained.abstract(
        lambda: pretrained.UNet2DConditionModel(FULL["sd15_unet"], rngs=nnx.Rngs(0))
    )
    apply, params = nn.split(network)
    latent = jax.ShapeDtypeStruct((64, 64, 4), jnp.float32)
    text = jax.ShapeDtypeStruct((77, 768), jnp.float32)

    def both(params, x, text):
        return jax.jvp(lambda x: apply(params, x, 500.0, text), (x,), (x,))

    compiled = jax.jit(both).lower(params, latent, text).compile(QUICK)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 4 * PARAMETERS["sd15_unet"]
    assert memory.temp_size_in_bytes < 1e9


def test_a_network_becomes_a_denoiser():
    cond = pretrained.Condition(**{
        name: jnp.asarray(value) for name, value in cases.inputs(SMALL, "sdxl").items()
        if name in ("context", "text_embeds", "time_ids")
    })  # fmt: skip
    model = denoise.from_nnx(
        network_of(SMALL, "sdxl"), noise.ddpm_scaled_linear(), shape=(8, 8, 4)
    ).condition(cond)
    x = jnp.ones((3, 8, 8, 4))
    assert jax.eval_shape(jax.vmap(lambda x: model(x, 0.5)), x).shape == x.shape


def test_old_names_of_attention():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, array in drawn("unet", "ddpm").items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = array
    assert sum("proj_attn" in name for name in tensors) == 8
    build = builder("unet", "ddpm")
    with pytest.raises(ValueError, match="32 tensors are missing"):
        pretrained.restore(build, tensors, caller="load")
    network = pretrained.restore(build, tensors, caller="load", rename=pretrained.current_name)
    for name, array in pretrained.flatten(network).items():
        np.testing.assert_array_equal(array, drawn("unet", "ddpm")[name])


def test_latents_are_scaled():
    network = network_of("autoencoder", "sd3")
    z = cases.draw("z", (2, 2, 6))
    np.testing.assert_allclose(network.scale(z), (z - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(network.unscale(network.scale(z)), z, rtol=1e-5, atol=1e-6)
    plain = network_of("autoencoder", "sd")
    np.testing.assert_allclose(plain.scale(z), z * 0.18215, rtol=1e-6)


SMALL, LARGE = "conditional_unet", "autoencoder"


@pytest.mark.parametrize(
    ("family", "case", "change", "match"),
    [
        ("unet", "ddpm", {"more_heads": 3}, "not known here: more_heads"),
        ("unet", "ddpm", {"block_out_channels": [8]}, "must agree"),
        ("unet", "ddpm", {"block_out_channels": [8, 0]}, "positive"),
        ("unet", "ddpm", {"block_out_channels": "8"}, "block_out_channels=8; it takes"),
        ("unet", "ddpm", {"block_out_channels": [8, -1]}, "it takes"),
        ("unet", "ddpm", {"block_out_channels": [8, 10**9]}, "it takes"),
        ("unet", "ddpm", {"block_out_channels": [8, True]}, "it takes"),
        ("unet", "ddpm", {"norm_eps": float("nan")}, "norm_eps=nan"),
        ("unet", "ddpm", {"layers_per_block": 10**5}, "layers_per_block"),
        ("unet", "ddpm", {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "'KDownBlock2D'"),
        ("unet", "ddpm", {"up_block_types": ["X", "UpBlock2D"]}, "up_block_types"),
        ("unet", "ddpm", {"in_channels": 0}, "at least 1"),
        ("unet", "ddpm", {"mid_block_type": "X"}, "mid_block_type='X'"),
        ("unet", "ddpm", {"act_fn": "exec"}, "act_fn='exec'"),
        ("unet", "ddpm", {"norm_num_groups": 3}, "do not divide"),
        ("unet", "ddpm", {"time_embedding_type": "x"}, "time_embedding_type"),
        ("unet", "ddpm", {"attention_head_dim": 99}, "attention_head_dim=99"),
        ("unet", "learned", {"num_train_timesteps": None}, "num_train_timesteps"),
        (SMALL, "sd1", {"attention_head_dim": 3}, "number of heads"),
        (SMALL, "sd1", {"attention_head_dim": [1, 2, 4]}, "3 values for 2"),
        (SMALL, "sd1", {"dual_cross_attention": True}, "dual_cross_attention=True"),
        (SMALL, "sd1", {"attention_type": "gated"}, "'gated'"),
        (SMALL, "sd1", {"num_attention_heads": 2}, "num_attention_heads=2"),
        (SMALL, "sd1", {"addition_embed_type": "image"}, "'image'"),
        (SMALL, "sd1", {"transformer_layers_per_block": 10**5}, "transformer_layers"),
        (SMALL, "sdxl", {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        (SMALL, "sdxl", {"projection_class_embeddings_input_dim": None}, "must be given"),
        (LARGE, "sd", {"latents_mean": [0.0] * 4}, "latents_mean"),
        (LARGE, "sd", {"up_block_types": ["UpBlock2D"] * 2}, "'UpBlock2D'"),
        (LARGE, "sd", {"scaling_factor": 0}, "scaling_factor"),
    ],
)
def test_configurations_that_are_refused(family, case, change, match):
    config = copy.deepcopy(cases.FAMILIES[family][case]) | change
    kind = getattr(pretrained, cases.CLASSES[family])
    with pytest.raises((ValueError, TypeError), match=match):
        pretrained.abstract(lambda: kind(config, rngs=nnx.Rngs(0)))


def test_calls_that_are_refused():
    x, text = jnp.ones((8, 8, 4)), jnp.ones((5, 6))
    sd1, sdxl = network_of(SMALL, "sd1"), network_of(SMALL, "sdxl")
    ddpm, labelled = network_of("unet", "ddpm"), network_of("unet", "shifted")
    for call, match in (
        (lambda: sd1(x[None], 1, text), r"x=.*jax\.vmap"),
        (lambda: sd1(x[..., :3], 1, text), r"takes \(H, W, 4\)"),
        (lambda: sd1(x, 1, text[None]), r"cond=.*jax\.vmap"),
        (lambda: sd1(x, 1, text[:, :5]), r"takes \(L, 6\)"),
        (lambda: sd1(x, 1, pretrained.Condition(text, label=3)), "does not take"),
        (lambda: sdxl(x, 1, text), "has no text_embeds"),
        (lambda: sdxl(x, 1, pretrained.Condition(text, text_embeds=jnp.ones(5))), "no time_ids"),
        (lambda: ddpm(x[None, ..., :3], 1), r"jax\.vmap"),
        (lambda: ddpm(x[..., :3], 1, 2), "not conditional"),
        (lambda: labelled(x[..., :3], 1), "Pass its label"),
        (lambda: jax.eval_shape(lambda: ddpm(jnp.ones((7, 7, 3)), 1)), "multiples of 2"),
        (lambda: network_of(LARGE, "sd").decode(x[None]), r"z=.*jax\.vmap"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


FULL = json.loads((DATA / "full_size.json").read_text())
PARAMETERS = {
    "sd15_unet": 859_520_964, "sd21_unet": 865_910_724, "sdxl_unet": 2_567_463_684,
    "sd_vae": 83_653_863, "ddpm_cifar10_32": 35_746_307,
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_of_a_full_size_network(name):
    """Names and shapes of the published files, none missing and none left over."""
    config = FULL[name]
    kind = getattr(pretrained, config["_class_name"])
    network = pretrained.abstract(lambda: kind(config, rngs=nnx.Rngs(0)))
    found = {key: list(shape) for key, shape in pretrained.layout(network).items()}
    assert found == json.loads(gzip.decompress((DATA / "layouts.json.gz").read_bytes()))[name]
    assert sum(int(np.prod(shape)) for shape in found.values()) == PARAMETERS[name]
