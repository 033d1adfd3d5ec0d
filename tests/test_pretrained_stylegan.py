"""StyleGAN2-ADA beside a fixture of the published PyTorch generator, whose code is not here."""

import gzip
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

from mmh_jax import lid, nn
from mmh_jax.pretrained import StyleGAN2Generator, abstract, flatten, layout, restore
from mmh_jax.pretrained.stylegan2 import load_stylegan2
from mmh_jax.pretrained.stylegan2_blocks import convolved_up

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_stylegan as making  # noqa: E402

FIXTURE = load_file(HERE / "stylegan.safetensors")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def network_of(case, **options):
    def build():
        return StyleGAN2Generator(making.CASES[case], rngs=nnx.Rngs(0), **options)

    return restore(build, making.weights(layout(abstract(build)), case), caller="load")


def error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def call(generator, case):
    psi = making.TRUNCATION.get(case, 1.0)
    return lambda z: generator(z, making.LABELS.get(case), truncation=psi)


@pytest.mark.parametrize("case", making.CASES)
def test_images_and_jvps_are_those_of_the_published_generator(case):
    network, given = network_of(case), making.inputs(case)

    def all_of(z, dz, ws):
        w = network.mapping(z, making.LABELS.get(case), truncation=making.TRUNCATION.get(case, 1.0))
        return *jax.jvp(call(network, case), (z,), (dz,)), w, network.synthesis(ws)

    found = jax.jit(all_of, compiler_options=QUICK)(given["z"], given["dz"], given["ws"])
    for name, value in zip(("y", "dy", "w", "of_ws"), found, strict=True):
        assert value.dtype == np.float32
        assert error(value, FIXTURE[f"{case}.{name}"]) < 2e-5, name


def export(folder, case, **changes):
    """What the documented recipe writes, for a model with drawn weights."""
    config = making.CASES[case] | changes
    folder.mkdir()
    state = {k: np.array(v, order="C") for k, v in flatten(network_of(case)).items()}
    taps = np.float32(making.CASES[case]["synthesis_kwargs"].get("resample_filter", [1, 3, 3, 1]))
    state["synthesis.b8.conv0.resample_filter"] = np.outer(taps, taps) / taps.sum() ** 2
    # Unused, and of the default whatever the configuration says.
    default = np.float32(np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64)
    state["synthesis.b8.conv1.resample_filter"] = default
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", ["plain", "classes"])
def test_reading_an_exported_folder(tmp_path, case):
    generator = load_stylegan2(export(tmp_path / case, case, _class_name="Generator"))
    found = jax.jit(call(generator, case), compiler_options=QUICK)(making.inputs(case)["z"])
    assert error(found, FIXTURE[f"{case}.y"]) < 2e-5


def test_without_noise(tmp_path):
    generator = load_stylegan2(export(tmp_path / "x", "plain"), noise_mode="none")
    found = jax.jit(call(generator, "plain"), compiler_options=QUICK)(making.inputs("plain")["z"])
    assert error(found, FIXTURE["plain.without_noise"]) < 2e-5
    assert error(found, FIXTURE["plain.y"]) > 1e-2


def test_many_latents_by_vmap_and_parameters_apart():
    network = network_of("silent")
    apply, params = nn.split(network)
    z = cases.draw("many", (3, 6))
    found = jax.jit(jax.vmap(lambda z: apply(params, z)), compiler_options=QUICK)(z)
    one = jax.jit(network, compiler_options=QUICK)
    np.testing.assert_allclose(found, [one(each) for each in z], atol=2e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 2, 4, 1), (1, 2, 3, 5, 2, 1)])
def test_doubling_is_what_its_parts_are(taps):
    x, kernel = cases.draw("x", (3, 5, 2)), cases.draw("k", (3, 3, 2, 4))
    size, p = len(taps), len(taps) // 2
    expected = np.zeros((6, 10, 4))
    whole = np.zeros((6 + 2 + size, 10 + 2 + size, 4))  # all sums, from index 0 of both on
    both = np.outer(taps, taps) * 4 / sum(taps) ** 2
    for i, j, a, b, c, d in np.ndindex(3, 5, 3, 3, size, size):
        whole[2 * i + a + c, 2 * j + b + d] += both[c, d] * (x[i, j] @ kernel[a, b])
    expected = whole[p : p + 6, p : p + 10]
    np.testing.assert_allclose(convolved_up(jnp.asarray(x), kernel, taps), expected, atol=1e-4)


# LID


def test_the_dimension_of_what_it_generates():
    """z is divided by its length, so that the direction of z itself is flat."""
    generator, given = network_of("silent"), making.inputs("silent")
    spectrum = jax.jit(lid.decoder_spectrum, static_argnums=0, compiler_options=QUICK)
    values = spectrum(generator.__call__, given["z"])
    assert values.shape == (6,)
    assert lid.rank_by_threshold(values / values[0], 1e-4) == 5
    assert values[4] > 1e-2 * values[0]
    push = jax.jit(lambda z, v: jax.jvp(generator, (z,), (v,))[1], compiler_options=QUICK)
    along, across = push(given["z"], given["z"]), push(given["z"], given["dz"])
    assert np.abs(along).max() < 1e-5 * np.abs(across).max()
    # Nothing divides w.
    of_w = spectrum(generator.synthesis.__call__, given["ws"][0])
    assert lid.rank_by_threshold(of_w / of_w[0], 1e-4) == 8


# Full size


PARAMETERS = {"stylegan2_ffhq1024": 30_370_060, "stylegan2_cifar10": 20_215_315}  # of PyTorch


@pytest.mark.parametrize("name", making.PUBLISHED)
def test_every_tensor_of_a_full_size_model(name):
    """Names and shapes of the published code, none missing and none left over."""
    config = making.PUBLISHED[name]
    shapes = layout(abstract(lambda: StyleGAN2Generator(config, rngs=nnx.Rngs(0))))
    expected = json.loads(gzip.decompress((HERE / "layouts.json.gz").read_bytes()))[name]
    assert {key: list(shape) for key, shape in shapes.items()} == expected
    trained = {k: v for k, v in shapes.items() if not k.endswith(("noise_const", "w_avg"))}
    assert sum(int(np.prod(shape)) for shape in trained.values()) == PARAMETERS[name]


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_option": 1}, "new_option"),
        ({"_class_name": "Discriminator"}, "Discriminator"),
        ({"img_resolution": 24}, "img_resolution=24.*power of 2"),
        ({"img_resolution": 2}, "img_resolution=2"),
        ({"w_dim": 0}, "w_dim=0"),
        ({"c_dim": None}, "no c_dim"),
        ({"mapping_kwargs": {"normalize": True}}, "normalize"),
        ({"mapping_kwargs": {"num_layers": 0}}, "num_layers=0"),
        ({"mapping_kwargs": {"activation": "relu"}}, "activation='relu'"),
        ({"synthesis_kwargs": {"architecture": "resnet"}}, "architecture='resnet'.*'skip'"),
        ({"synthesis_kwargs": {"architecture": "orig"}}, "architecture='orig'"),
        ({"synthesis_kwargs": {"activation": "swish"}}, "activation='swish'"),
        ({"synthesis_kwargs": {"kernel_size": 5}}, "kernel_size"),
        ({"synthesis_kwargs": {"channel_base": 8}}, "channel_base=8"),
        ({"synthesis_kwargs": {"resample_filter": [1, 2, 1]}}, "2, 4 or 6 taps"),
        ({"synthesis_kwargs": {"conv_clamp": -1}}, "conv_clamp=-1"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, message):
    config = making.CASES["plain"] | change
    with pytest.raises(ValueError, match=message):
        abstract(lambda: StyleGAN2Generator(config, rngs=nnx.Rngs(0)))


def test_options_that_are_no_options():
    config = making.CASES["plain"] | {"mapping_kwargs": [1]}
    with pytest.raises(TypeError, match="mapping_kwargs"):
        abstract(lambda: StyleGAN2Generator(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("mode", "message"), [("random", "no function of"), ("x", "'none'")])
def test_noise_modes(tmp_path, mode, message):
    with pytest.raises(ValueError, match=message):
        load_stylegan2(export(tmp_path / "x", "plain"), noise_mode=mode)


def test_files_that_do_not_fit(tmp_path):
    folder = export(tmp_path / "x", "plain")
    path, state = folder / "model.safetensors", load_file(folder / "model.safetensors")
    faults = {
        "1 tensors are missing: mapping.w_avg": {
            k: v for k, v in state.items() if "w_avg" not in k
        },
        "not of this network: mapping.fc9": state | {"mapping.fc9.weight": np.zeros((8, 8), "f4")},
        r"b4.const has shape \(16, 4, 2\)": state
        | {"synthesis.b4.const": np.zeros((16, 4, 2), "f4")},
        "conv0.resample_filter that is not of its config": state
        | {"synthesis.b8.conv0.resample_filter": np.full((4, 4), 1 / 16, "f4")},
    }
    for message, tensors in faults.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_stylegan2(folder)
    path.rename(folder / "model.pkl")
    with pytest.raises(ValueError, match="is a pickle"):
        load_stylegan2(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_stylegan2(folder)


def test_latents_labels_and_truncation():
    plain, classes, z = network_of("plain"), network_of("classes"), making.inputs("plain")["z"]
    for function, message in (
        (lambda: plain(z[None]), r"z=...\)` has shape \(1, 6\).*vmap"),
        (lambda: plain(z[:5]), r"takes \(6,\). Pass one"),
        (lambda: plain(z, 1), "without classes"),
        (lambda: classes(z), "Pass its label"),
        (lambda: classes(z, 3), "0 to 2"),
        (lambda: plain.synthesis(jnp.ones((5, 8))), r"takes \(8,\) or \(6, 8\)"),
        (lambda: plain.synthesis(jnp.ones((2, 6, 8))), "vmap"),
        (lambda: network_of("silent")(z, truncation=0.5), "w_avg_beta is null"),
    ):
        with pytest.raises(ValueError, match=message):
            function()
    vector = classes.mapping(z, np.float32([0, 1, 0]), truncation=0.9)
    assert error(vector, FIXTURE["classes.w"]) < 2e-5
    np.testing.assert_allclose(plain.mapping(z, truncation=0.0), plain.mapping.w_avg[...])
