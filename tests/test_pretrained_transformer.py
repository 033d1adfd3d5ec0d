"""DiT and Stable Diffusion 3's transformer against diffusers (and a fixture of it)."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmh_jax import nn
from mmh_jax.pretrained import abstract, layout, process_of, restore, save
from mmh_jax.pretrained.sd3 import JointCondition, SD3Transformer2DModel
from mmh_jax.pretrained.transformer import DiTTransformer2DModel

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_transformer as making  # noqa: E402

FIXTURE = load_file(HERE / "transformer.safetensors")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS = {
    "DiTTransformer2DModel": DiTTransformer2DModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
}


def network_of(case, dtype="float32", **options):
    kind = KINDS[making.name_of(case)]

    def build():
        return kind(making.CASES[case], rngs=nnx.Rngs(0), **options)

    return restore(build, cases.weights(layout(abstract(build))), caller="load", dtype=dtype)


def answers(case, dtype="float32", **options):
    given = making.inputs(case)
    network = network_of(case, dtype, **options)
    cond = given.get("label")
    if case.startswith("sd3"):
        cond = JointCondition(given["context"], given["pooled"])

    def call(x):
        whole = network.whole if isinstance(network, DiTTransformer2DModel) else network
        return whole(x, given["t"], cond)

    pair = jax.jit(lambda x, dx: jax.jvp(call, (x,), (dx,)), compiler_options=QUICK)
    return dict(zip(("y", "dy"), pair(given["x"], given["dx"]), strict=True))


def error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", making.CASES)
def test_values_and_jvps_are_those_of_the_fixture(case):
    for name, found in answers(case).items():
        assert found.dtype == np.float32
        assert error(found, FIXTURE[f"{case}.{name}"]) < 1e-5, name


def test_chunks():
    for name, found in answers("dit", attention_chunk=5).items():
        assert error(found, FIXTURE[f"dit.{name}"]) < 1e-5, name


def test_bfloat16_is_near():
    assert 1e-4 < error(answers("sd35", "bfloat16")["y"], FIXTURE["sd35.y"]) < 5e-2


@pytest.mark.parametrize("case", making.CASES)
def test_the_fixture_is_of_diffusers(case, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    save(tmp_path / "diffusion_pytorch_model.safetensors", network_of(case))
    module = getattr(diffusers, making.name_of(case))(**making.CASES[case])
    module.save_config(tmp_path)
    module = module.from_pretrained(tmp_path).eval().requires_grad_(False)  # what we saved
    for name, expected in making.answers(case, module).items():
        assert error(FIXTURE[f"{case}.{name}"], expected) < 1e-5, name


# The published networks: options, number of tensors, number of parameters.  In DiT's layout each
# block has the embeddings of time and class for itself.
PUBLISHED = {
    "DiT-XL-2-256": (
        {"_class_name": "Transformer2DModel", "activation_fn": "gelu-approximate"}
        | {"attention_bias": True, "attention_head_dim": 72, "cross_attention_dim": None}
        | {"double_self_attention": False, "dropout": 0.0, "in_channels": 4}
        | {"norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero"}
        | {"num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28}
        | {"num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8}
        | {"patch_size": 2, "sample_size": 32, "upcast_attention": False}
        | {"use_linear_projection": False},
        "DiTTransformer2DModel",
        (28 * 19 + 6, None),
    ),
    "sd3-medium": (
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        | {"pos_embed_max_size": 192},
        "SD3Transformer2DModel",
        (None, 2_084_951_104),
    ),
}


@pytest.mark.parametrize(
    "name", ["DiT-XL-2-256", pytest.param("sd3-medium", marks=pytest.mark.slow)]
)
def test_the_full_size_is_that_of_diffusers(name):
    config, kind, (tensors, parameters) = PUBLISHED[name]
    shapes = layout(abstract(lambda: KINDS[kind](config, rngs=nnx.Rngs(0))))
    assert tensors in (None, len(shapes))
    assert parameters in (None, sum(int(np.prod(shape)) for shape in shapes.values()))
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = {k: v for k, v in config.items() if not k.startswith("_")}
        keep = ("cross_attention_dim", "double_self_attention", "num_vector_embeds")
        keep += ("only_cross_attention", "use_linear_projection")
        module = getattr(diffusers, kind)(**{k: v for k, v in ours.items() if k not in keep})
    assert shapes == {k: tuple(v.shape) for k, v in module.state_dict().items()}


def test_dit_answers_with_the_first_half_and_no_label_is_the_null_class():
    network = network_of("dit")
    given = making.inputs("dit")
    call = jax.jit(lambda x, label: network(x, given["t"], label), compiler_options=QUICK)
    np.testing.assert_allclose(
        call(given["x"], given["label"]), FIXTURE["dit.y"][..., :3], atol=1e-4
    )
    alone = jax.jit(lambda x: network(x, given["t"]), compiler_options=QUICK)
    none = alone(given["x"])
    np.testing.assert_allclose(none, call(given["x"], 10), atol=1e-6)
    assert np.isnan(call(given["x"], 11)).all()
    with pytest.raises(ValueError, match=r"label=11.*0 to 9, and 10"):
        network(given["x"], 3.0, 11)
    with pytest.raises(TypeError, match="vmap"):
        network(given["x"], 3.0, np.array([1, 2]))


def test_sd3_as_a_denoiser():
    process = process_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    apply, params = nn.split(network_of("sd3"))
    given = making.inputs("sd3")
    condition = JointCondition(given["context"], given["pooled"])
    denoiser = process.denoiser(apply, params, shape=(6, 8, 4)).condition(condition)
    t = float(given["t"]) / 1000
    # At t the network sees x_t, and x0 = x_t - t F.
    call = jax.jit(lambda x, sigma: denoiser(x, sigma), compiler_options=QUICK)
    found = call(given["x"] / (1 - t), t / (1 - t))
    np.testing.assert_allclose(found, given["x"] - t * FIXTURE["sd3.y"], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("dit", {"norm_type": "ada_norm"}, "norm_type='ada_norm'"),
        ("dit", {"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ("dit", {"attention_head_dim": 7, "num_attention_heads": 3}, "multiple of 4"),
        ("dit", {"patch_size": 0}, "patch_size=0"),
        ("dit", {"num_layers": 0}, "num_layers=0"),
        ("dit", {"caption_channels": 8}, "caption_channels"),
        ("sd3", {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ("sd3", {"caption_projection_dim": 8}, "caption_projection_dim=8"),
        ("sd3", {"dual_attention_layers": [2]}, "dual_attention_layers"),
        ("sd3", {"new_option": 1}, "new_option"),
        ("sd3", {"pos_embed_max_size": 2000}, "pos_embed_max_size=2000"),
    ],
)
def test_what_is_not_known_is_refused_by_name(case, change, message):
    config = making.CASES[case] | change
    with pytest.raises(ValueError, match=message):
        abstract(lambda: KINDS[making.name_of(case)](config, rngs=nnx.Rngs(0)))


def test_wrong_images():
    network = network_of("sd3")
    condition = JointCondition(jnp.ones((4, 5)), jnp.ones(7))
    with pytest.raises(ValueError, match=r"\(7, 8, 4\).*multiples of 2"):
        network(jnp.ones((7, 8, 4)), 1.0, condition)
    with pytest.raises(ValueError, match="vmap"):
        network(jnp.ones((1, 8, 8, 4)), 1.0, condition)
    with pytest.raises(ValueError, match="7 x 4 patches"):
        network(jnp.ones((14, 8, 4)), 1.0, condition)
    with pytest.raises(ValueError, match="pooled"):
        network(jnp.ones((8, 8, 4)), 1.0, JointCondition(jnp.ones((1, 4, 5)), jnp.ones(7)))
