"""Karras' networks beside a fixture of the published PyTorch ones, whose code is not here."""

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

from mmh_jax.pretrained import abstract, flatten, layout, restore
from mmh_jax.pretrained.edm_blocks import doubled, halved
from mmh_jax.pretrained.edm_models import EDMOptions, _table, edm_denoiser, edm_network, load_edm

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_edm as making  # noqa: E402

FIXTURE = load_file(HERE / "edm.safetensors")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def network_of(case, dtype="float32", **options):
    def build():
        return edm_network(making.CASES[case], rngs=nnx.Rngs(0), **options)

    return restore(build, cases.weights(layout(abstract(build))), caller="load", dtype=dtype)


def denoiser_of(case, *args, **options):
    denoiser = edm_denoiser(network_of(case, *args, **options), making.CASES[case])
    return denoiser.condition(making.LABELS[case]) if case in making.LABELS else denoiser


def answers(denoiser, case):
    given, sigma = making.inputs(case), FIXTURE[f"{case}.sigma"][0]

    def pair(x, dx):
        return jax.jvp(lambda x: denoiser(x, sigma), (x,), (dx,))

    found = jax.jit(pair, compiler_options=QUICK)(given["x"], given["dx"])
    return dict(zip(("y", "dy"), found, strict=True))


def error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.spread(3)
@pytest.mark.parametrize("case", making.CASES)
def test_values_and_jvps_are_those_of_the_published_model(case):
    for name, found in answers(denoiser_of(case), case).items():
        assert found.dtype == np.float32
        assert error(found, FIXTURE[f"{case}.{name}"]) < 2e-5, name


@pytest.mark.slow
def test_bfloat16_is_near():
    found = answers(denoiser_of("ddpmpp", "bfloat16"), "ddpmpp")["y"]
    assert 1e-4 < error(found, FIXTURE["ddpmpp.y"]) < 3e-2


def test_noise_levels_of_the_training():
    expected = {"ddpmpp": (0.002, 80), "skip": (0.02, 100), "vp": (1e-3, 44.7), "iddpm": (0, 1e3)}
    for case, (low, high) in expected.items():
        config = making.CASES[case]
        network = abstract(lambda config=config: edm_network(config, rngs=nnx.Rngs(0)))
        found = list(map(float, edm_denoiser(network, config).trained_range))
        assert 0 < found[0] < 0.1, case
        assert low * 0.9 < found[0], case
        assert found[1] < high * 1.05, case
    # Rising, and the published one where the reference was asked.
    table = _table(EDMOptions(8, 3, M=50))
    assert (np.diff(table) > 0).all()
    assert table[making.STEP] == pytest.approx(float(FIXTURE["iddpm.sigma"][0]), rel=1e-4)


def export(folder, case, **changes):
    """What the documented recipe writes, for a model with drawn weights."""
    config = making.CASES[case] | changes
    folder.mkdir()
    state = {f"model.{k}": v for k, v in flatten(network_of(case)).items()}
    taps = np.float32(making.CASES[case].get("resample_filter", [1, 1]))
    buffer = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    state["model.enc.4x4_down.conv0.resample_filter"] = buffer
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", ["ncsnpp", pytest.param("adm", marks=pytest.mark.slow)])
def test_reading_an_exported_folder(tmp_path, case):
    folder = export(tmp_path / case, case, use_fp16=False, dropout=0.13, sigma_max=float("inf"))
    denoiser = load_edm(folder)
    if case in making.LABELS:
        denoiser = denoiser.condition(making.LABELS[case])
    for name, found in answers(denoiser, case).items():
        assert error(found, FIXTURE[f"{case}.{name}"]) < 2e-5, name
    assert denoiser.shape == (8, 8, 3)


def test_a_filter_that_is_not_that_of_the_configuration(tmp_path):
    folder = export(tmp_path / "x", "ncsnpp", resample_filter=[1, 1])
    with pytest.raises(ValueError, match=r"4x4_down.conv0.resample_filter.*not of its config"):
        load_edm(folder)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 1)])
def test_doubling_is_the_adjoint_of_halving(taps):
    x, y = jnp.asarray(cases.draw("a", (6, 8, 2))), jnp.asarray(cases.draw("b", (3, 4, 2)))
    np.testing.assert_allclose(
        jnp.vdot(halved(x, taps), y) * 4, jnp.vdot(x, doubled(y, taps)), rtol=1e-4
    )


# The published models: arguments, and number of parameters as the paper has it.
PUBLISHED = {
    "cifar10-ddpmpp": (
        {"_class_name": "EDMPrecond", "img_resolution": 32, "img_channels": 3, "augment_dim": 9}
        | {"model_type": "SongUNet", "channel_mult": [2, 2, 2]},
        55_733_891,
    ),
    "cifar10-ncsnpp": (
        {"_class_name": "EDMPrecond", "img_resolution": 32, "img_channels": 3, "augment_dim": 9}
        | {"model_type": "SongUNet", "channel_mult": [2, 2, 2], "embedding_type": "fourier"}
        | {"encoder_type": "residual", "channel_mult_noise": 2}
        | {"resample_filter": [1, 3, 3, 1]},
        None,
    ),
    "imagenet64-adm": (
        {"_class_name": "EDMPrecond", "img_resolution": 64, "img_channels": 3}
        | {"model_type": "DhariwalUNet", "label_dim": 1000},
        295_900_000,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_size_has_the_published_parameters(name):
    config, expected = PUBLISHED[name]
    shapes = layout(abstract(lambda: edm_network(config, rngs=nnx.Rngs(0))))
    if expected is not None:
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(
            expected, rel=1e-3
        )
    assert f"enc.{config['img_resolution']}x{config['img_resolution']}_conv.weight" in shapes


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("ddpmpp", {"_class_name": "CTPrecond"}, "CTPrecond"),
        ("ddpmpp", {"model_type": "VGG"}, "model_type='VGG'"),
        ("ddpmpp", {"embedding_type": "learned"}, "embedding_type='learned'"),
        ("ddpmpp", {"encoder_type": "other"}, "encoder_type='other'"),
        ("ddpmpp", {"decoder_type": "residual"}, "decoder_type='residual'"),
        ("ddpmpp", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("ddpmpp", {"img_resolution": 9}, "cannot be halved"),
        ("ddpmpp", {"num_blocks": 0}, "num_blocks=0"),
        ("ddpmpp", {"new_option": 1}, "new_option"),
        ("adm", {"embedding_type": "fourier"}, "embedding_type"),
    ],
)
def test_what_is_not_known_is_refused_by_name(case, change, message):
    config = making.CASES[case] | change
    with pytest.raises(ValueError, match=message):
        abstract(lambda: edm_network(config, rngs=nnx.Rngs(0)))


def test_a_configuration_without_a_size():
    config = {k: v for k, v in making.CASES["adm"].items() if k != "img_resolution"}
    with pytest.raises(ValueError, match="no img_resolution"):
        edm_network(config, rngs=nnx.Rngs(0))


def test_labels_and_images():
    config = making.SONG | {"_class_name": "EDMPrecond", "label_dim": 3, "channel_mult": [1]}

    def build():
        return edm_network(config, rngs=nnx.Rngs(0))

    network = restore(build, cases.weights(layout(abstract(build))), caller="load")
    x = making.inputs("ddpmpp")["x"]
    call = jax.jit(lambda vector: network(x, 0.1, vector), compiler_options=QUICK)
    of_label = jax.jit(lambda label: network(x, 0.1, label), compiler_options=QUICK)
    np.testing.assert_allclose(of_label(1), call(np.float32([0, 1, 0])), atol=1e-5)
    assert np.isnan(of_label(3)).all()
    with pytest.raises(ValueError, match="0 to 2"):
        network(x, 0.1, 3)
    with pytest.raises(ValueError, match="vmap"):
        network(x, 0.1, np.array([1, 2]))
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8, 3\).*vmap"):
        network(x[None], 0.1)
    with pytest.raises(ValueError, match="without classes"):
        network_of("vp")(x, 0.1, 1)
