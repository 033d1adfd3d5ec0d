"""`mmh-jax train` with networks for images: what it makes, and what it refuses before any work."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from test_cli import contents, error_of, save_model

import mmh_jax
from mmh_jax import data, noise, report, train
from mmh_jax.cli import main

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(64, 8, 8)).astype(np.float32)
LABELS = RNG.integers(0, 10, 64)
MODEL_FILES = ("config.json", "params.safetensors")
UNET = ["--network", "UNet", "--preset", "smoke", "--out", "out"]


def out_of_memory(*_, **__):
    raise MemoryError


def with_label(value):
    return np.where(np.arange(64) == 3, value, LABELS)


# A word of the message, and the source; each with and without a finished model in the way.
BAD_INPUT = {
    "cannot be halved 1 times": (RNG.uniform(size=(64, 7, 7)), LABELS),
    "out of range: label -1 in row 3": (IMAGES, with_label(-1)),
    "out of range: label 1000000000 in row 3": (IMAGES, with_label(10**9)),
    "dtype float32; it takes one whole number": (IMAGES, LABELS.astype(np.float32)),
    "its units are not known": ((255 * IMAGES).astype(np.int16), LABELS),
    "the bytes 0 and 1 alone": ((IMAGES > 0.5).astype(np.uint8), LABELS),
    "channels come first": (RNG.integers(0, 256, (64, 3, 8, 8), np.uint8), LABELS),
}


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("words", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_all_as_it_was(
    words, is_there, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    points, labels = BAD_INPUT[words]
    np.savez("bad.npz", points=points, labels=labels)
    if is_there:
        save_model(tmp_path / "out", (3,))
    before = contents(tmp_path)
    command = ["train", "bad.npz", *UNET, "--by-label"]
    assert words in error_of([*command, *(["--overwrite"] if is_there else [])], capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kill", ["training", "replacing"])
def test_the_old_model_stays_until_the_new_one_is_finished(kill, tmp_path, monkeypatch, capsys):
    """Whether the training fails, or the run is killed while one model replaces the other."""
    from mmh_jax.report import output
    from mmh_jax.train import loop

    monkeypatch.chdir(tmp_path)
    np.save("points.npy", RNG.normal(size=(64, 3)).astype(np.float32))
    command = ["train", "points.npy", "--preset", "smoke", "--num-steps", "40"]
    assert main([*command, "--out", "new"]) == 0
    save_model(tmp_path / "out", (3,))
    before = {name: (tmp_path / "out" / name).read_bytes() for name in MODEL_FILES}
    with monkeypatch.context() as patch:
        if kill == "training":
            patch.setattr(loop, "_part", out_of_memory)
            patch.setattr(loop, "_round", out_of_memory)
        else:
            patch.setattr(output.shutil, "copyfile", out_of_memory)
        assert main([*command, "--out", "out", "--overwrite"]) == 2
    if kill == "training":
        after = {name: (tmp_path / "out" / name).read_bytes() for name in MODEL_FILES}
        assert after == before
    else:
        with pytest.raises(FileNotFoundError):
            mmh_jax.load(tmp_path / "out")
    assert main([*command, "--out", "out", "--overwrite"]) == 0
    capsys.readouterr()
    for name in MODEL_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "metrics.jsonl", "params.safetensors",
    ]  # fmt: skip


@pytest.mark.spread(2)
@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory."), MemoryError()]
)
def test_out_of_memory_keeps_what_was_saved(error, tmp_path, monkeypatch, capsys):
    from mmh_jax.train import loop

    def fail(*inputs):
        if inputs[2].step >= 40:
            raise error
        return original(*inputs)

    original = loop._round
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", points=IMAGES)
    command = ["train", "images.npz", *UNET, "--num-steps", "60"]
    monkeypatch.setattr(loop, "_round", fail)
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "does not fit on the device" in last or "out of memory" in last
    # The same command continues from the last state.
    first = []

    def counted(*inputs):
        first.append(int(inputs[2].step))
        return original(*inputs)

    monkeypatch.setattr(loop, "_round", counted)
    assert main(command) == 0
    assert first == [40]
    rows = train.read_json_lines("out/metrics.jsonl")
    assert [row["step"] for row in rows] == [20, 40, 60]


def test_memory_that_is_full_for_a_real_model():
    recipe = train.Recipe(
        network="DiT", width=2**21, options=(("depth", 1), ("patch_size", 8)), num_steps=1
    )
    with pytest.raises(MemoryError, match="smaller network"):
        train.train_model(IMAGES, recipe, "never", seed=0)


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        ((255 * IMAGES).astype(np.uint8), TypeError, "dtype uint8"),
        (np.where(IMAGES > 0.9, np.nan, IMAGES), ValueError, "NaN or infinite values in 63 of 64"),
        (np.ones(5, np.float32), ValueError, r"takes \(N, \*shape\)"),
    ],
)
def test_points_that_cannot_be_trained_on(points, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train.train_model(points, train.IMAGE_RECIPES["smoke"], tmp_path / "m", seed=0)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "ResidualMLP", "by_label": True}, "needs --network UNet"),
        ({"network": "UNet", "budget": 1.0, "num_steps": 5}, "without --num-steps"),
        ({"network": "UNet", "budget": -1.0}, "must be positive"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report.train_model("digits", tmp_path / "m", seed=0, preset="smoke", **options)
    assert not (tmp_path / "m").exists()


def test_sources_that_do_not_fit(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 3)))
    np.save(tmp_path / "images.npy", np.random.default_rng(0).uniform(size=(50, 8, 8)))
    with pytest.raises(ValueError, match="is for images"):
        report.train_model(tmp_path / "points.npy", tmp_path / "m", seed=0, network="DiT")
    with pytest.raises(ValueError, match="has no labels"):
        report.train_model(
            tmp_path / "images.npy", tmp_path / "m", seed=0, network="UNet", by_label=True
        )


def test_a_transformer_by_label_in_a_budget(tmp_path):
    report.train_model(
        "digits", tmp_path / "m", seed=0, preset="smoke", network="DiT", by_label=True, budget=0.05
    )
    config = train.load_config(tmp_path / "m")
    assert config.network == "DiT"
    assert config.network_options["num_classes"] == 10
    steps = [row["step"] for row in train.read_json_lines(tmp_path / "m" / "metrics.jsonl")]
    assert steps[-1] >= config.training["num_steps"] >= 1
    assert json.loads((tmp_path / "m" / "config.json").read_text())["training"]["budget"] == 0.05
    model = mmh_jax.load(tmp_path / "m")
    x = np.zeros((8, 8), np.float32)
    answers = [model.condition(c)(x, 0.5) for c in (np.int32(3), np.int32(10), None)]
    np.testing.assert_allclose(answers[1], answers[2], rtol=1e-6)
    assert all(np.isfinite(answer).all() for answer in answers)


def scalars(folder):
    """What TensorBoard would show: `(step, value)` by name."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return found


def test_metrics_for_tensorboard_are_those_of_the_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", points=IMAGES)
    command = ["train", "images.npz", *UNET, "--num-steps", "60", "--tensorboard", "events"]
    assert main(command) == 0
    rows = train.read_json_lines("out/metrics.jsonl")
    for _ in range(50):  # another thread writes, within a second
        found = scalars(tmp_path / "events")
        if len(found.get("points_per_second", ())) == len(rows):
            break
        time.sleep(0.1)
    assert set(found) == {"loss", "seconds", "points_per_second"}
    for name, values in found.items():
        steps, numbers = zip(*values, strict=True)
        assert list(steps) == [row["step"] for row in rows] == [20, 40, 60]
        np.testing.assert_allclose(numbers, [row[name] for row in rows], rtol=1e-6)
    for row in rows:
        assert row["points_per_second"] == pytest.approx(16 * row["step"] / row["seconds"])
    # The bar shows the rate of the rounds after the first.
    assert "points/s" in capsys.readouterr().err


def test_a_model_is_trained_by_several_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    recipe = train.Recipe(width=80, depth=1, num_steps=30, batch_size=64)
    points = IMAGES.reshape(64, 64)
    train.train_model(points, recipe, tmp_path / "one", seed=0)
    train.train_model(points, recipe, tmp_path / "many", seed=0, mesh=mesh, shard_params=True)
    one, many = (train.read_json_lines(tmp_path / n / "metrics.jsonl") for n in ("one", "many"))
    np.testing.assert_allclose(
        [row["loss"] for row in many], [row["loss"] for row in one], rtol=1e-5
    )


def test_every_setting_of_a_recipe_reaches_the_training():
    recipe = train.Recipe(
        num_steps=7, batch_size=6, learning_rate=0.2, ema_half_life=3.0, accumulate=3,
        noise_levels=train.log_normal(-2.0, 0.5), augment=data.augment.shift(1),
        ema_widths=(0.1,), weight=train.noise_weight, steps_per_round=4, condition_dropout=0.3,
    )  # fmt: skip
    config = recipe.train_config(num_classes=5)
    shared = {f.name for f in dataclasses.fields(config)} & {
        f.name for f in dataclasses.fields(recipe)
    }
    assert len(shared) == 12
    for name in shared:
        assert getattr(config, name) == getattr(recipe, name), name
    assert config.null_condition == 5
    assert dataclasses.replace(recipe, symmetry=0.1, accumulate=1).train_config().symmetry == 0.1
    assert recipe.train_config().condition_dropout == 0


def test_a_recipe_for_vp(tmp_path):
    schedule = noise.VP()
    recipe = train.Recipe(
        network="DiT", width=16, options=(("patch_size", 4), ("depth", 1)), objective="vp",
        noise_levels=train.uniform_time(schedule, 0.01, 1.0), weight=train.noise_weight,
        num_steps=60, batch_size=16, steps_per_round=4,
    )  # fmt: skip
    train.train_model(IMAGES, recipe, tmp_path / "m", seed=0, keep_every=8)
    config = train.load_config(tmp_path / "m")
    shift, _ = train.normalisation(IMAGES)
    start = train.build(config, shift, key=jax.random.key(0))
    x = RNG.normal(size=(8, 8)).astype(np.float32)
    # The network starts at zero: no noise is predicted, and none is taken away.
    np.testing.assert_allclose(start(x, 0.7), x, rtol=1e-4, atol=1e-5)
    model = mmh_jax.load(tmp_path / "m")
    assert abs(model(x, 0.7) - x).max() > 1e-3
    fingerprint = config.training["fingerprint"]
    with train.Checkpoints(tmp_path / "m" / "checkpoints", fingerprint) as checkpoints:
        assert {8, 16} <= set(checkpoints.steps)


def test_the_saved_weights_are_the_average(tmp_path):
    recipe = train.Recipe(width=80, depth=1, num_steps=20, batch_size=32, steps_per_round=4)
    points = IMAGES.reshape(64, 64)
    train.train_model(points, recipe, tmp_path, seed=0, keep_every=20)
    model, config = train.load(tmp_path), train.load_config(tmp_path)
    like = train.init_state(model.inner, recipe.train_config())
    with train.Checkpoints(tmp_path / "checkpoints", config.training["fingerprint"]) as kept:
        state = kept.latest(like)
    assert int(state.step) == 20
    for saved, mean, last in zip(
        *map(jax.tree.leaves, (model.inner.params, state.ema, state.params)), strict=True
    ):
        np.testing.assert_array_equal(saved, mean)
        assert not np.array_equal(saved, last)
