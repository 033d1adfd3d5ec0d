"""Models on disk: exact round trips, and files that are not ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmh_jax
from mmh_jax import train


@pytest.fixture
def saved(tmp_path):
    config = train.ModelConfig(
        network="ResidualMLP",
        network_options={"width": 16, "depth": 1, "num_frequencies": 2},
        shape=(2, 3),
        scale=2.5,
        sigma_data=1.0,
        sigma_min=0.01,
        sigma_max=10.0,
        training={"seed": 1},
    )
    shift = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = train.build(config, shift, key=jax.random.key(1))
    # The last layer starts at zero; a round trip must be seen in the output.
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.inner.params)
    model = model.replace(inner=model.inner.replace(params=params))
    train.save(tmp_path / "model", config, model)
    return tmp_path / "model", config, model


def test_round_trip_is_exact(saved):
    folder, config, model = saved
    loaded = mmh_jax.load(folder)
    x = jax.random.normal(jax.random.key(0), (2, 3))
    np.testing.assert_array_equal(loaded(x, 0.7), model(x, 0.7))
    assert loaded.shape == (2, 3)
    assert train.load_config(folder) == config
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.safetensors"]


def test_untrained_model_is_the_linear_denoiser_of_white_data(saved):
    _, config, _ = saved
    model = train.build(config, np.zeros((2, 3), np.float32), key=jax.random.key(1))
    x, sigma = jnp.ones((2, 3)), 1.5
    gain = config.scale**2 / (config.scale**2 + sigma**2)
    np.testing.assert_allclose(model(x, sigma), gain * x, rtol=1e-5)


def test_loading_does_not_compile_twice(saved):
    folder, _, _ = saved
    traces = []

    @jax.jit
    def call(model, x):
        traces.append(1)
        return model(x, 0.1)

    call(mmh_jax.load(folder), jnp.ones((2, 3)))
    call(mmh_jax.load(folder), jnp.ones((2, 3)))
    assert len(traces) == 1


def corrupt(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def test_damaged_files_are_refused(saved):
    folder, _, _ = saved
    original = (folder / "params.safetensors").read_bytes()
    for damage in (lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b"PK\x03\x04" + b[4:]):
        corrupt(folder, "params.safetensors", damage)
        with pytest.raises(ValueError, match="truncated or no safetensors"):
            mmh_jax.load(folder)
        (folder / "params.safetensors").write_bytes(original)
    mmh_jax.load(folder)
    (folder / "params.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole folder"):
        mmh_jax.load(folder)


def test_foreign_arrays_are_refused(saved):
    folder, _, _ = saved
    path = folder / "params.safetensors"
    arrays = load_file(path)
    name = next(iter(sorted(arrays)))
    for change in (
        {k: v for k, v in arrays.items() if k != name},
        arrays | {"extra": np.zeros(1, np.float32)},
        arrays | {name: np.zeros((1, 1), np.float32)},
        arrays | {name: arrays[name].astype(np.float16)},
    ):
        save_file(change, path)
        with pytest.raises(ValueError, match="1 are missing, unknown or of another shape"):
            mmh_jax.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "not json", "not a JSON object"),
        (lambda c: "[1, 2]", "not a JSON object"),
        (lambda c: json.dumps({"model_type": "clip"}), "has format None"),
        (lambda c: json.dumps(c | {"format": "mmh_jax.model/99"}), "reads 'mmh_jax.model/1'"),
        (lambda c: json.dumps(c | {"network": "os.system"}), "names the network 'os.system'"),
        (lambda c: json.dumps(c | {"surprise": 1}), "does not describe a model"),
        (lambda c: json.dumps(c | {"shape": ["a"]}), "does not describe a model"),
        (lambda c: json.dumps(c | {"network_options": {"wide": 1}}), "does not describe a model"),
    ],
)
def test_foreign_configs_are_refused(saved, change, message):
    folder, _, _ = saved
    path = folder / "config.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        mmh_jax.load(folder)


def test_missing_model_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model in .*config\.json is missing"):
        mmh_jax.load(tmp_path)
