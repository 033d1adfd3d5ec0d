"""Improved DDPM's U-Net beside a fixture of the published PyTorch one, whose code is not here."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmh_jax.pretrained import abstract, layout, restore, save
from mmh_jax.pretrained.iddpm import IDDPMUNet, load_iddpm

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_iddpm as making  # noqa: E402

FIXTURE = load_file(HERE / "iddpm.safetensors")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def network_of(case):
    def build():
        return IDDPMUNet(making.CASES[case], rngs=nnx.Rngs(0))

    return restore(build, cases.weights(layout(abstract(build))), caller="load")


def error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.spread(2)
@pytest.mark.parametrize("case", making.CASES)
def test_values_and_jvps_are_those_of_the_published_network(case):
    network, given = network_of(case), making.inputs(case)

    def pair(x, dx):
        call = lambda x: network(x, making.TIME, making.LABELS.get(case))  # noqa: E731
        return jax.jvp(call, (x,), (dx,))

    found = jax.jit(pair, compiler_options=QUICK)(given["x"], given["dx"])
    for name, value in zip(("y", "dy"), found, strict=True):
        assert error(value, FIXTURE[f"{case}.{name}"]) < 2e-5, name


def test_reading_an_exported_folder(tmp_path):
    save(tmp_path / "model.safetensors", network_of("learned"))
    (tmp_path / "config.json").write_text(json.dumps(making.CASES["learned"]))
    denoiser = load_iddpm(tmp_path)
    # The network is told 1000 t / 400; at t of TIME it sees alpha x and answers eps.
    t = making.TIME * 400 / 1000
    alpha, s = map(float, denoiser.schedule(t))
    x = making.inputs("learned")["x"]
    found = jax.jit(lambda x: denoiser(x, s / alpha), compiler_options=QUICK)(x / alpha)
    np.testing.assert_allclose(
        found, (x - s * FIXTURE["learned.y"][..., :3]) / alpha, rtol=1e-3, atol=2e-4
    )
    assert denoiser.schedule.t_max == 399


def test_the_full_size_has_the_published_parameters():
    # CIFAR10, as its flags are published: 52.5 million parameters (table 2 of the paper's code).
    config = {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True}
    shapes = layout(abstract(lambda: IDDPMUNet(config, rngs=nnx.Rngs(0))))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(52.5e6, rel=0.01)
    assert "output_blocks.2.0.skip_connection.weight" in shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_schedule": "sigmoid"}, "noise_schedule='sigmoid'"),
        ({"image_size": 48, "channel_mult": None}, "image_size=48"),
        ({"image_size": 9}, "cannot be halved"),
        ({"attention_resolutions": "a"}, "attention_resolutions='a'"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"new_option": 1}, "new_option"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, message):
    config = making.CASES["learned"] | change
    with pytest.raises(ValueError, match=message):
        abstract(lambda: IDDPMUNet(config, rngs=nnx.Rngs(0)))


def test_labels_and_images():
    x = making.inputs("learned")["x"]
    with pytest.raises(ValueError, match="Leave the label out"):
        network_of("learned")(x, 1.0, 3)
    network = network_of("classes")
    with pytest.raises(ValueError, match="Pass its label"):
        network(x, 1.0)
    with pytest.raises(ValueError, match="0 to 999"):
        network(x, 1.0, 1000)
    with pytest.raises(ValueError, match="vmap"):
        network(x[None], 1.0, 3)
