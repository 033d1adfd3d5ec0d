"""CLIP's text encoder against transformers (and a fixture of it), and files that are wrong."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmh_jax.pretrained import abstract, layout, restore, save
from mmh_jax.pretrained.clip import CLIPTextModel, load_text_encoder, published_name

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_clip as making  # noqa: E402

FIXTURE = load_file(HERE / "clip.safetensors")


def build(config):
    return CLIPTextModel(config, rngs=nnx.Rngs(0))


def ours(case, dtype="float32"):
    def make():
        return build(making.CASES[case])

    tensors = cases.weights(layout(abstract(make)))
    return restore(make, tensors, caller="load", dtype=dtype)


def answers(encoder):
    found = jax.jit(jax.vmap(lambda ids: encoder(ids)))(making.IDS)
    pooled = found.pooled if found.projected is None else found.projected
    return {"last": found.last, "pooled": pooled, "before": found.hidden[-2]}


def error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", making.CASES)
def test_answers_are_those_of_the_fixture(case):
    for name, found in answers(ours(case)).items():
        assert error(found, FIXTURE[f"{case}.{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", ["sd1", "xl2"])
def test_bfloat16_is_near(case):
    for name, found in answers(ours(case, "bfloat16")).items():
        assert found.dtype == jnp.bfloat16
        assert 1e-4 < error(found, FIXTURE[f"{case}.{name}"]) < 3e-2, name


@pytest.mark.parametrize("case", making.CASES)
def test_answers_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    module = making.reference(case)
    for name, expected in making.answers(case, module).items():
        assert error(FIXTURE[f"{case}.{name}"], expected) < 1e-5, name
    expected = making.answers(case, module.to(torch.bfloat16))
    for name, found in answers(ours(case, "bfloat16")).items():
        assert error(found, expected[name]) < 3e-2, name


def test_transformers_reads_what_is_saved_and_the_other_way_round(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for case in ("sd1", "xl2"):
        folder = tmp_path / case
        folder.mkdir()
        save(folder / "model.safetensors", ours(case))
        (folder / "config.json").write_text(json.dumps(making.CASES[case]))
        kind = getattr(transformers, making.CASES[case].get("architectures", ["CLIPTextModel"])[0])
        module = kind.from_pretrained(folder).eval()
        for name, expected in making.answers(case, module).items():
            assert error(FIXTURE[f"{case}.{name}"], expected) < 1e-5, name
        module.save_pretrained(tmp_path / "theirs")
        for name, found in answers(load_text_encoder(tmp_path / "theirs")).items():
            assert error(found, FIXTURE[f"{case}.{name}"]) < 1e-5, name


def test_skipped_layers():
    encoder = ours("sd1")
    encoding = jax.jit(lambda ids: encoder(ids))(making.IDS[0])
    np.testing.assert_allclose(encoder.skipped(encoding, 0), encoding.last, atol=1e-6)
    fewer = making.CASES["sd1"] | {"num_hidden_layers": 2}
    names = layout(abstract(lambda: build(fewer)))
    shorter = restore(lambda: build(fewer), cases.weights(names), caller="load")
    expected = jax.jit(lambda ids: shorter(ids))(making.IDS[0])
    np.testing.assert_allclose(encoder.skipped(encoding, 1), expected.last, atol=1e-6)
    with pytest.raises(ValueError, match="from 0 to 3"):
        encoder.skipped(encoding, 4)


# The published text encoders: configuration, number of tensors, number of parameters.
PUBLISHED = {
    "sd15": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        | {"num_hidden_layers": 12, "projection_dim": 768},
        (196, 123_060_480),
    ),
    "sd21": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        | {"num_hidden_layers": 23, "hidden_act": "gelu", "projection_dim": 512},
        (372, 340_387_840),
    ),
    "xl2": (
        {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
        | {"num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280}
        | {"architectures": ["CLIPTextModelWithProjection"]},
        (517, 694_659_840),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_size_has_the_published_parameters(name):
    config, (tensors, parameters) = PUBLISHED[name]
    shapes = layout(abstract(lambda: build(config)))
    assert len(shapes) == tensors
    assert sum(map(np.prod, shapes.values())) == parameters
    assert shapes["text_model.embeddings.token_embedding.weight"] == (49408, config["hidden_size"])
    assert "text_model.encoder.layers.0.self_attn.q_proj.bias" in shapes


def test_old_and_new_names():
    assert published_name("text_model.embeddings.position_ids") is None
    assert published_name("encoder.layers.0.mlp.fc1.bias") == (
        "text_model.encoder.layers.0.mlp.fc1.bias"
    )
    assert published_name("text_projection.weight") == "text_projection.weight"


def test_wrong_ids():
    encoder = ours("sd1")
    with pytest.raises(ValueError, match=r"shape \(3, 7\).*vmap"):
        encoder(making.IDS)
    with pytest.raises(ValueError, match="from 1 to 9"):
        encoder(jnp.zeros(10, int))
    with pytest.raises(TypeError, match="integers"):
        encoder(jnp.zeros(3))
    found = jax.jit(lambda ids: encoder(ids).last)(jnp.array([58, 60, 59]))
    assert np.isnan(found).all()  # never another word in silence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5'.*CLIPTextModel"),
        ({"architectures": ["CLIPVisionModel"]}, "CLIPVisionModel.*CLIPTextModel"),
        ({"hidden_act": "tanh"}, "'tanh'"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": "16"}, "hidden_size '16'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"layer_norm_eps": 0}, "layer_norm_eps 0"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(making.CASES["sd1"] | change))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_text_encoder(tmp_path)
