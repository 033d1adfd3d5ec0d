"""`mmh-jax detect`: its rows are what the library says, it continues, and it says what is wrong."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, sample, train
from mmh_jax import memorization as mem
from mmh_jax.cli import main
from mmh_jax.report import detectors, given, samples

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(60, 3)).astype(np.float32)
SCORE_KEY = jax.random.split(jax.random.key(2))[1]  # with --seed 2


def save_model(folder, shape=(3,), network="ResidualMLP", **options):
    """An untrained model, its last layer not at zero, as it is before the first step."""
    config = train.ModelConfig(
        network=network,
        network_options={"width": 16, "depth": 1} | options,
        shape=shape,
        scale=1.0,
        sigma_data=1.0,
        sigma_min=0.01,
        sigma_max=5.0,
    )
    model = train.build(config, np.zeros(shape, np.float32), key=jax.random.key(0))
    leaves, tree = jax.tree.flatten(model.inner.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    inner = model.inner.replace(params=jax.tree.unflatten(tree, leaves))
    train.save(folder, config, model.replace(inner=inner))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with sources and a `model`."""
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", POINTS)
    np.savez("labelled.npz", points=POINTS, labels=np.arange(60) % 7)
    np.save("plane.npy", POINTS[:, :2])
    save_model(tmp_path / "model")
    return tmp_path


def rows_of(name):
    with Path(name).open() as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def detect(*arguments):
    return main(["detect", "--model", "model", "--seed", "2", "--out", "out.csv", *arguments])


def assert_scores(rows, direct):
    for name, value in direct.value.items():
        close = {"rtol": 1e-4, "atol": 1e-5, "err_msg": name}
        np.testing.assert_allclose(column(rows, f"score_{name}"), value, **close)
        if np.any(direct.stderr[name] != 0):
            stderr = column(rows, f"score_{name}_stderr")
            np.testing.assert_allclose(stderr, direct.stderr[name], **close)
        else:
            assert f"score_{name}_stderr" not in rows[0]


def test_points_of_a_trained_model_have_the_scores_that_the_library_gives(here, capsys):
    command = ["train", "labelled.npz", "--preset", "smoke", "--num-steps", "20", "--out", "new"]
    assert main(command) == 0
    save_model(here / "other")
    names = ["flipd", "denoised_spread", "score_norm", "regeneration_log_ratio_baseline"]
    names += ["danger_zone", "nearest_distance"]
    extra = ["--sigma", "0.3", "--num-points", "23", "--chunk-size", "8", "--baseline", "other"]
    assert detect("--model", "new", "--data", "labelled.npz", *extra, "--detectors", *names) == 0
    rows = rows_of("out.csv")
    index = column(rows, "index").astype(int)
    assert len(set(index)) == 23
    np.testing.assert_array_equal(column(rows, "label"), index % 7)

    # The model says that these are its training data: the nearest of them but the point itself.
    distances = np.linalg.norm(POINTS[index, None] - POINTS, axis=2)
    distances[np.arange(23), index] = np.inf
    np.testing.assert_array_equal(column(rows, "nearest_index"), distances.argmin(axis=1))
    np.testing.assert_allclose(column(rows, "nearest_distance"), distances.min(axis=1), rtol=1e-4)
    scored = column(rows, "score_nearest_distance")
    np.testing.assert_array_equal(scored, -column(rows, "nearest_distance"))

    subject = mem.Subject(
        POINTS[index], train.load("new"), baseline=train.load("other"), data=jnp.asarray(POINTS)
    )
    config = train.load_config("new")
    noised = sample.karras_levels(
        9, sigma_min=config.sigma_min, sigma_max=config.scale * config.sigma_data / 2
    )
    settings = mem.Settings(0.3, regeneration_levels=noised)
    direct = mem.scores(names[:-1], subject, settings, key=SCORE_KEY)
    assert_scores(rows, direct)
    summary = json.loads(Path("out.json").read_text())
    assert summary["evaluations"] == direct.total
    assert summary["sigma"] == 0.3
    assert summary["num_points"] == 23
    for name in names[:-1]:
        assert summary["detectors"][name] == {
            "evaluations": direct.evaluations[name],
            "median": pytest.approx(np.median(direct.value[name]), rel=1e-3, abs=1e-5),
            "not_finite": 0,
        }
    assert f"{direct.total:g}" in capsys.readouterr().out
    assert not list(here.glob("*.work"))
    assert not Path("out.samples.npz").exists()


@pytest.mark.slow  # compiles the lot; test_cli and others ask for some by name
def test_defaults_are_what_applies(here):
    assert detect("--data", "points.npy", "--sigma", "0.3") == 0
    rows = rows_of("out.csv")
    # This model does not say what it was trained on.
    names = ["expected_flipd", "projected_trace", "denoised_spread", "score_norm", "pixel_variance"]
    assert [name for name in rows[0] if not name.endswith("stderr")] == [
        "index",
        *(f"score_{name}" for name in names),
    ]
    assert detect("--data", "points.npy", "--trained-on", "points.npy", "--overwrite") == 0
    assert "score_nearest_distance" in rows_of("out.csv")[0]
    summary = json.loads(Path("out.json").read_text())
    assert 0.01 <= summary["sigma"] <= 0.5
    assert summary["settings"]["sigma"] is None


def partial_memory(folder, shape):
    """A model of four training points, and of a wide Gaussian elsewhere."""
    wide = analytic.LinearGaussian(jnp.full(3, 20.0), jnp.eye(3), jnp.full(3, 2.0))
    narrow = [
        analytic.LinearGaussian(jnp.asarray(point), jnp.eye(3), jnp.full(3, 1e-3))
        for point in POINTS[:4]
    ]
    model = analytic.Mixture((wide, *narrow), jnp.array([0.5, 0.2, 0.1, 0.1, 0.1]))
    return model, dataclasses.replace(train.load_config(folder), sigma_max=100.0)


def test_copies_among_samples_are_found(here, capsys, monkeypatch):
    monkeypatch.setattr(given, "load_model", partial_memory)
    data = np.concatenate([POINTS, POINTS[:1], POINTS[:1]])
    np.save("data.npy", data)
    names = ["expected_flipd", "denoising_loss", "nearest_distance"]
    extra = ["--generate", "70", "--sigma", "0.1", "--detectors", *names]
    assert detect("--data", "data.npy", *extra) == 0
    rows = rows_of("out.csv")
    with np.load("out.samples.npz", allow_pickle=False) as file:
        drawn, nearest, ratio = file["samples"], file["nearest"], file["ratio"]
    found = mem.copies(drawn, data)
    np.testing.assert_array_equal(column(rows, "nearest_index"), found.nearest)
    np.testing.assert_array_equal(nearest, found.nearest)
    np.testing.assert_array_equal(column(rows, "memorized"), found.memorized)
    np.testing.assert_allclose(column(rows, "ratio"), found.ratio, rtol=1e-4)
    np.testing.assert_allclose(ratio, found.ratio, rtol=1e-4)
    calibrated = mem.calibrated_copies(drawn, data).ratio
    np.testing.assert_allclose(column(rows, "calibrated"), calibrated, rtol=1e-4)
    assert 20 < found.memorized.sum() < 50

    model, _ = partial_memory("model", (3,))
    direct = mem.scores(names[:2], mem.Subject(drawn, model), mem.Settings(0.1), key=SCORE_KEY)
    assert_scores(rows, direct)
    summary = json.loads(Path("out.json").read_text())
    assert summary["samples"]["memorized"] == found.memorized.sum()
    assert summary["samples"]["extracted_points"] == np.sum(mem.extraction(found).counts > 0)
    for name in names:
        score = column(rows, f"score_{name}")
        expected = mem.detection(score, found.memorized, seed=2)
        one = summary["detection"][name]
        assert one["auroc"] == pytest.approx(expected.auroc._asdict())
        assert one["tpr_at_1%_fpr"] == pytest.approx(expected.tpr._asdict())
        assert one["num_positive"] + one["num_negative"] == 70
    assert summary["detection"]["expected_flipd"]["auroc"]["value"] == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "AUROC 1.000 [1.000, 1.000]" in printed
    assert f"{found.memorized.sum()} of 70 samples" in printed


def test_a_model_that_copies_exactly_is_counted_exactly():
    points = np.concatenate([POINTS[:5], POINTS[:1]])
    config = train.ModelConfig("", {}, (3,), 1.0, 1.0, 0.01, 20.0)
    model = analytic.Empirical(jnp.asarray(points))
    drawn = samples.draw(model, config, 90, key=jax.random.key(0))
    np.testing.assert_array_equal(samples.draw(model, config, 7, key=jax.random.key(0)), drawn[:7])
    judged = samples.judge(drawn, points)
    distances = np.linalg.norm(drawn[:, None] - points, axis=2)
    assert distances.min(axis=1).max() < 1e-3
    of = distances.argmin(axis=1)
    counts = np.bincount(of, minlength=6)
    assert counts[5] == 0  # a duplicate shares the count of the first
    np.testing.assert_array_equal(judged.extracted, [*counts[:5], counts[0]])
    assert counts[0] > counts[1:5].max()
    np.testing.assert_array_equal(judged.nearest, of)
    assert judged.summary()["fraction"] == 1
    assert judged.summary()["extracted_points"] == 6


def test_an_audit_counts_what_comes_out(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["mmh_jax.report.audit"], "load_model", partial_memory)
    data = np.concatenate([POINTS, POINTS[:1], POINTS[:1]])
    np.save("data.npy", data)
    command = ["audit", "data.npy", "--model", "model", "--preset", "smoke", "--out", "out"]
    assert main([*command, "--detectors", "score_norm", "--num-samples", "50"]) == 0
    rows = rows_of("out/points.csv")  # one for each different point
    extracted, index = column(rows, "extracted"), column(rows, "index")
    with np.load("out/samples.npz", allow_pickle=False) as file:
        of, memorized = file["nearest"], file["memorized"]
    assert len(of) == 50
    counts = np.bincount(of[memorized], minlength=62)
    assert np.all(counts[:4] > 0)
    np.testing.assert_array_equal(index, np.arange(60))
    np.testing.assert_array_equal(extracted, counts[:60])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{memorized.sum()} of 50 samples" in printed
    assert "of 4 training points" in printed


def test_samples_that_are_not_finite_are_counted_and_stop_nothing():
    drawn = POINTS[:4].copy()
    drawn[1, 0], drawn[2] = np.nan, np.inf
    judged = samples.judge(drawn, POINTS)
    np.testing.assert_array_equal(judged.nearest, [0, -1, -1, 3])
    np.testing.assert_array_equal(judged.memorized, [True, False, False, True])
    assert np.isnan(judged.ratio[1:3]).all()
    assert judged.summary()["not_finite"] == 2
    assert np.isnan(samples.calibrated_distance(drawn, POINTS)[1])
    none = samples.judge(drawn[1:3], POINTS).summary()
    assert none["fraction"] is None
    assert none["extracted_points"] == 0
    value = np.array([3.0, np.nan, 1.0, np.nan, 2.0])
    found = detectors.detection_of(value, np.array([1, 1, 0, 0, 0], bool), seed=0)
    assert found["auroc"]["value"] == pytest.approx((3 + 0.5) / 6)  # NaN ranks last
    assert detectors.detection_of(value, np.array([1, 0, 0, 0, 0], bool), seed=0) is None


def test_an_interrupted_call_continues_and_refuses_another(here, monkeypatch, capsys):
    monkeypatch.setattr(detectors, "BLOCK_SIZE", 16)
    command = ["--data", "points.npy", "--detectors", "denoising_loss", "expected_flipd"]
    command += ["--generate", "60", "--sigma", "0.2", "--chunk-size", "16"]
    assert detect(*command, "--out", "one.csv") == 0
    original, written = detectors.write_array, []

    def killed(path, array):
        if path.suffix == ".npy":
            original(path, array)
        written.append(path.parent.name)
        if len(written) == 2 or path.suffix != ".npy":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(detectors, "write_array", killed)
        assert detect(*command) == 130
    assert written == ["scores", "scores"]
    assert not Path("out.csv").exists()
    capsys.readouterr()
    assert detect(*command, "--seed", "4") == 2
    assert "holds an unfinished detection with another seed; repeat" in capsys.readouterr().err

    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(detectors, "write_array", lambda path, array: written.append(path.name))
        patch.setattr(samples, "write_array", lambda path, array: written.append(path.name))
        with monkeypatch.context() as last:  # once more, with the samples written and no table
            last.setattr(sys.modules["mmh_jax.report.detect"], "write_json", killed)
            assert detect(*command) == 130
        assert Path("out.samples.npz").exists()
        written.clear()
        assert detect(*command) == 0
    assert written == ["000000032-000000048.npy", "000000048-000000060.npy"]
    assert Path("out.csv").read_bytes() == Path("one.csv").read_bytes()
    assert not list(here.glob("*.work"))

    capsys.readouterr()
    assert detect(*command) == 2
    assert "out.csv exists; pass --overwrite" in capsys.readouterr().err
    Path("out.csv").unlink()
    assert detect(*command) == 2
    assert "out.json, to be written beside out.csv, exists; choose" in capsys.readouterr().err
    Path("out.json").write_text("{}")  # of somebody else
    assert detect(*command, "--overwrite") == 2
    assert Path("out.json").read_text() == "{}"


@pytest.mark.slow  # a conditional network compiles for a minute
def test_each_point_is_conditioned_on_its_label(here):
    images = RNG.uniform(size=(10, 8, 8)).astype(np.float32)
    labels = np.arange(10) % 3
    np.savez("images.npz", images=images, labels=labels)
    save_model(here / "by_label", (8, 8), "DiT", patch_size=4, num_heads=1, num_classes=3)
    names = ["score_norm", "cfg_norm", "cfg_norm_encoded", "spikiness", "png_bytes"]
    extra = ["--model", "by_label", "--data", "images.npz", "--label", "--sigma", "0.4"]
    assert detect(*extra, "--detectors", *names) == 0
    model, config = train.load("by_label"), train.load_config("by_label")
    subject = mem.Subject(images, model, conditions=labels.astype(np.int32))
    direct = mem.scores(names, subject, detectors.settings_of(config, 0.4), key=SCORE_KEY)
    assert np.ptp(direct.value["cfg_norm"]) > 0
    assert_scores(rows_of("out.csv"), direct)

    assert detect(*extra, "--detectors", "cfg_norm", "--generate", "9", "--overwrite") == 0
    rows = rows_of("out.csv")
    drawn, label = np.load("out.samples.npz")["samples"], column(rows, "label").astype(np.int32)
    assert len(set(label)) > 1
    subject = mem.Subject(drawn, model, conditions=label)
    direct = mem.scores(["cfg_norm"], subject, mem.Settings(0.4), key=SCORE_KEY)
    assert_scores(rows, direct)


BAD = {
    "--detectors magic": "--detectors: unknown detector 'magic'; there are flipd, projected_flipd",
    "--detectors flipd flipd": "--detectors flipd flipd: name at least one, and none twice",
    "--detectors cfg_norm": "`cfg_norm` compares the model with and without a condition; pass",
    "--detectors curvature_difference_baseline": "with another one; pass `--baseline FOLDER`",
    "--detectors nearest_distance": "reads the training data; pass `--trained-on SOURCE`",
    "--detectors step_stability": "needs normal runs to compare with",
    "--detectors pairwise_radius": "reads several generations of each condition",
    "--detectors bright_ending": "looks inside a UNet or DiT; this model is a ResidualMLP",
    "--detectors png_bytes": "`png_bytes` is of pictures",
    "--detectors zlib_bytes": "`zlib_bytes` is of values from 0 to 1; those of points go from -",
    "--label": "--label: the model takes no labels",
    "--model nothing": "no model in nothing: config.json is missing",
    "--baseline nothing": "no model in nothing: config.json is missing",
    "--data plane.npy": "takes points of shape (3,), but those of the source have shape (2,)",
    "--trained-on plane.npy": "plane.npy has points of shape (2,), and --data those of shape (3,)",
    "--sigma 0": "--sigma is 0; it must be a positive number",
    "--generate 0": "--generate is 0; it must be at least 1",
    "--chunk-size 0": "--chunk-size is 0",
    "--generate 5 --num-points 5": "--num-points is of the points of --data",
    "--out out.json": "out.json is the table; give it the suffix .csv",
    "--out model": "model exists; it is a folder",
    "--seed -1": "--seed is -1",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_is_said_before_any_work(here, capsys, line):
    before = {path.name for path in here.rglob("*")}
    assert detect("--data", "points.npy", *line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert BAD[line] in printed.err
    assert {path.name for path in here.rglob("*")} == before


def test_labels_and_attention_are_asked_for_where_there_are_none(here, capsys):
    save_model(here / "dit", (8, 8), "DiT", patch_size=4, num_heads=1, num_classes=3)
    images = RNG.uniform(size=(7, 8, 8)).astype(np.float32)
    np.save("images.npy", images)
    np.savez("seven.npz", images=images, labels=np.arange(7))
    np.savez("words.npz", images=images, labels=np.array(list("abcdefg")))
    messages = {
        "--data images.npy --detectors bright_ending": "to tokens, and this DiT has none",
        "--data images.npy --label": "--label: the source images has no labels",
        "--data seven.npz --label": "seven has labels from 0 to 6; the model knows 0 to 2",
        "--data words.npz --label": "the labels of words are no whole numbers",
    }
    for line, message in messages.items():
        assert detect("--model", "dit", *line.split()) == 2
        assert message in capsys.readouterr().err
