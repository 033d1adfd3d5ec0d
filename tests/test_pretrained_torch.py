"""Networks with published names beside those of diffusers, which run on PyTorch."""

import importlib.util
import json

import jax
import numpy as np
import pretrained_cases as cases
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_pretrained_networks import ALL, DATA, answers, error, network_of, published

from mmh_jax import pretrained

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize(("family", "case"), [(p.values[0], p.values[1]) for p in ALL])
def test_diffusers_loads_what_is_saved(family, case, tmp_path):
    """A folder with our parameters, opened strictly; and its answers are the committed ones."""
    torch.set_num_threads(1)
    config = cases.FAMILIES[family][case] | {"_class_name": cases.CLASSES[family]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pretrained.save(tmp_path / "diffusion_pytorch_model.safetensors", network_of(family, case))
    kind = getattr(diffusers, cases.CLASSES[family])
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "build", lambda *_: loaded.eval().requires_grad_(False))
        for name, (function, point, _) in make.functions(family, case).items():
            assert error(make.last(function(point)), published(family, case)[name]) < 1e-5


def test_a_full_size_folder_of_diffusers_has_our_layout(tmp_path):
    """What diffusers itself writes, in several files and in half precision, is read."""
    network = make.build("unet", "ddpm")
    network.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    files = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 1
    tensors = pretrained.open_weights(tmp_path / "sharded", caller="load")
    ours = pretrained.flatten(network_of("unet", "ddpm"))
    assert tensors.keys() == ours.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(tensors[name], value)
    network.half().save_pretrained(tmp_path / "half", variant="fp16")
    config = pretrained.read_json(tmp_path / "half" / "config.json", caller="load")
    tensors = pretrained.open_weights(tmp_path / "half", caller="load", variant="fp16")
    assert {tensors[name].dtype for name in tensors} == {np.dtype(np.float16)}
    found = pretrained.restore(
        lambda: pretrained.UNet2DModel(config, rngs=None), tensors, caller="load"
    )
    for name, value in pretrained.flatten(found).items():
        np.testing.assert_allclose(value, ours[name], atol=2e-3)


HALVING = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
CROSS = ["DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]
UP = {"Down": "Up", "Downsample": "Upsample"}


def turned(kinds):
    return [
        kind.replace("Downsample", "Upsample").replace("Down", "Up") for kind in reversed(kinds)
    ]


@st.composite
def unets(draw):
    num = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(HALVING), min_size=num, max_size=num))
    return {
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16]), min_size=num, max_size=num)),
        "down_block_types": kinds,
        "up_block_types": turned(kinds),
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": draw(st.sampled_from([2, 4, 8])),
        "attention_head_dim": draw(st.sampled_from([None, 2, 8])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "add_attention": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "act_fn": draw(st.sampled_from(["silu", "mish", "gelu"])),
        "center_input_sample": draw(st.booleans()),
        "time_embedding_type": draw(st.sampled_from(["positional", "fourier"])),
        "num_class_embeds": draw(st.sampled_from([None, 4])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    }


@st.composite
def conditional(draw):
    num = draw(st.integers(1, 3))

    def each(*values):
        one = st.sampled_from(values)
        return draw(one | st.lists(one, min_size=num, max_size=num))

    kinds = draw(st.lists(st.sampled_from(CROSS), min_size=num, max_size=num))
    return {
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16]), min_size=num, max_size=num)),
        "down_block_types": kinds,
        "up_block_types": turned(kinds),
        "layers_per_block": each(1, 2),
        "norm_num_groups": draw(st.sampled_from([2, 4])),
        "attention_head_dim": each(1, 2, 4),
        "transformer_layers_per_block": each(1, 2),
        "only_cross_attention": each(False, True),
        "cross_attention_dim": 6,
        "use_linear_projection": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "resnet_skip_time_act": draw(st.booleans()),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "mid_block_type": draw(
            st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])
        ),
        "num_class_embeds": draw(st.sampled_from([None, 4])),
        "time_embedding_act_fn": draw(st.sampled_from([None, "silu"])),
    }


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pair=st.tuples(st.just("unet"), unets()) | st.tuples(st.just("conditional_unet"), conditional())
)
def test_random_configurations_equal_diffusers(pair):
    family, config = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.FAMILIES[family], "random", config)
        try:
            expected = make.answers(family, "random")
        except ValueError:  # diffusers itself refuses it
            assume(False)
        found = fresh_answers(family)
    for name, value in expected.items():
        limit = 1e-3 if name.startswith("d") else 1e-4
        assert error(found[name], value) < limit, (name, config)
    jax.clear_caches()


def fresh_answers(family):
    from test_pretrained_networks import drawn

    drawn.cache_clear()
    try:
        return answers(family, "random")
    finally:
        drawn.cache_clear()
