"""The whole pipeline on small data: what it writes, that it repeats itself, and that it resumes."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import jax
import numpy as np
import pytest
from PIL import Image

from mmh_jax import memorization, train
from mmh_jax.cli import main
from mmh_jax.report import findings, measure, pictures, samples
from mmh_jax.report.summary import environment
from mmh_jax.typing import Estimate

pytestmark = pytest.mark.xdist_group("audit")  # one process, so that the fixtures run once

COMMAND = ["audit", "images.npy", "--preset", "smoke", "--num-points", "96", "--seed", "3"]


def write_source(folder):
    """Images of 4 x 4: a smooth two-dimensional family, and one image 30 times."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, (330, 2, 1, 1))
    row, column = np.mgrid[:4, :4] / 4
    images = 0.5 + 0.25 * np.sin(angle[:, 0] + 3 * row) + 0.25 * np.cos(angle[:, 1] + 2 * column)
    images[300:] = images[300]
    np.save(folder / "images.npy", images.astype(np.float32))
    return images


def rows_of(folder):
    with (folder / "points.csv").open() as file:
        return list(csv.DictReader(file))


def points_of(folder):
    return (folder / "points.csv").read_bytes()


def comparable(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return summary | {"timings": sorted(summary["timings"])}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the data and with a finished audit `out`, and what was printed."""
    folder = tmp_path_factory.mktemp("audit")
    write_source(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*COMMAND, "--out", "out"]) == 0
    return folder


def test_it_writes_a_report_and_leaves_no_partial_results(finished):
    names = {path.name for path in (finished / "out").iterdir()}
    assert names == {
        "points.csv", "points.parquet", "report.html", "summary.json", "samples.npz", "lid.png",
        "model",
    }  # fmt: skip
    model = {path.name for path in (finished / "out" / "model").iterdir()}
    assert model == {"config.json", "params.safetensors", "metrics.jsonl"}
    with Image.open(finished / "out" / "lid.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 1_000


def test_each_distinct_point_has_one_row_and_one_role(finished):
    points, rows = np.load(finished / "images.npy"), rows_of(finished / "out")
    index = np.array([int(row["index"]) for row in rows])
    np.testing.assert_array_equal(index, np.unique(index))
    assert 300 in index
    assert index.max() == 300
    roles = [row["role"] for row in rows]
    assert roles.count("judged") == 96
    assert roles.count("held out") == 100  # a third of those that occur once
    planted = sorted(int(row["planted"]) for row in rows if row["role"] == "planted")
    assert planted == [2, 2, 2, 4, 8, 16, 32]
    repeated = rows[-1]
    assert (repeated["copies"], repeated["role"]) == ("30", "judged")
    for row in rows:
        others = np.linalg.norm((points - points[int(row["index"])]).reshape(330, -1), axis=1)
        held_out = [int(r["index"]) for r in rows if r["role"] == "held out"]
        others[held_out] = np.inf  # what is held out is no training point
        others[others == 0] = np.inf
        np.testing.assert_allclose(float(row["nearest_distance"]), others.min(), atol=1e-6)
        np.testing.assert_allclose(others[int(row["nearest_index"])], others.min(), atol=1e-6)


def test_the_rows_say_what_the_library_says(finished):
    points = np.load(finished / "images.npy")
    rows = rows_of(finished / "out")
    model = train.load(finished / "out" / "model")
    for row in (rows[0], rows[50]):
        spectrum = measure.lid.jacobian_spectrum(
            model, points[int(row["index"])], float(row["sigma"])
        )
        np.testing.assert_allclose(
            [float(row[name]) for name in ("flipd", "residual")],
            [spectrum.flipd, spectrum.residual],
            rtol=1e-3,
            atol=1e-3,
        )
    summary = json.loads((finished / "out" / "summary.json").read_text())
    judged = [row for row in rows if row["role"] == "judged"]
    for title, count in summary["verdicts"].items():
        assert sum(row["verdict"] == title for row in judged) == count
        assert sum(summary["agreement"][title].values()) == count
    assert all(row["verdict"] == "" for row in rows if row["role"] != "judged")
    for row in judged:
        large = float(row["sigma_mem"]) >= 0.999 * float(row["separation"])
        assert large or row["verdict"] in ("undecided", "not memorized")
        assert row["reason"]


def test_samples_say_what_was_extracted_and_detectors_stand_beside_it(finished):
    points, rows = np.load(finished / "images.npy"), rows_of(finished / "out")
    summary = json.loads((finished / "out" / "summary.json").read_text())
    with np.load(finished / "out" / "samples.npz", allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files}
    assert set(kept) == {"samples", "nearest", "ratio", "memorized"}
    assert kept["samples"].shape == (64, 4, 4)
    assert np.abs(kept["samples"] - 0.5).max() < 1  # of a trained model, not noise
    held_out = [int(row["index"]) for row in rows if row["role"] == "held out"]
    training = np.setdiff1d(np.arange(330), held_out)
    found = memorization.copies(kept["samples"], points[training])
    np.testing.assert_array_equal(kept["nearest"], training[found.nearest])
    np.testing.assert_array_equal(kept["memorized"], found.memorized)
    counts = np.zeros(330, int)
    counts[training] = memorization.extraction(found).counts
    assert [int(row["extracted"]) for row in rows] == [counts[int(row["index"])] for row in rows]
    assert summary["samples"]["memorized"] == found.memorized.sum()
    column = np.array([float(row["score_png_bytes"]) for row in rows])
    index = [int(row["index"]) for row in rows]
    np.testing.assert_array_equal(column, -memorization.png_bytes(points[index]))


def test_the_summary_is_complete(finished):
    summary = json.loads((finished / "out" / "summary.json").read_text())
    assert summary["command"].startswith("mmh-jax audit images.npy --preset smoke")
    assert summary["settings"] | {"data": ""} == {
        "source": "images.npy",
        "data": "",
        "model": None,
        "reference": None,
        "held_out": None,
        "controls": True,
        "preset": "smoke",
        "seed": 3,
        "num_points": 96,
        "num_samples": 64,
        "detectors": ["png_bytes"],
    }
    assert summary["environment"]["jax"] == jax.__version__
    assert summary["sigmas"] == sorted(summary["sigmas"])
    found = summary["diagnostics"]
    assert found["num_points"] == 96 + 100 + 7
    assert found["sigma_outside_training"] is False
    assert list(summary["timings"]) == [
        "model", "folds", "separation", "sigma", "lid_theta", "lid_star", "regeneration",
        "samples", "copies", "detectors", "figure", "report",
    ]  # fmt: skip
    controls = summary["controls"]
    assert (controls["held_out"], controls["null_scores"]) == (100, 100 + 95)
    assert [dose["copies"] for dose in controls["dose_response"]] == [2, 4, 8, 16, 32]
    assert sum(summary["verdicts"].values()) == 96
    assert summary["verdict"]
    assert summary["evidence"]
    assert summary["limits"]


@pytest.mark.parametrize(("num_large", "verdict"), [(3, "undecided"), (60, "OD-Mem")])
def test_that_many_were_trained_on_does_not_vouch_for_a_few(num_large, verdict):
    """All 200 points return from a little noise, as those that models never saw do not."""
    points = np.arange(200.0)[:, None]
    found_pictures = pictures.scored_pictures(points, None, 200, seed=0)
    share = np.zeros((200, 3))
    share[:, 0], share[:num_large] = 1, 1
    level = np.ones(200)
    chosen = measure.Chosen(Estimate(level, level), level, level.astype(int),
                            measure.Measured(*np.zeros((10, 200))))  # fmt: skip
    curve = Estimate(np.ones((200, 2)), np.ones((200, 2)))
    found = findings.find(
        found_pictures, memorization.Separation(level, level, np.zeros(200, int)),
        np.array([0.5, 1.0, 2.0]), share, np.zeros((200, 3)), 16, chosen,
        findings.Curves.at(np.array([0.5, 1.0]), curve, curve, level),
        samples.judge(np.full((2, 1), 300.0), points), 5,
    )  # fmt: skip
    titles = [memorization.Label(int(code)).title for code in found.label]
    assert titles == [verdict] * num_large + ["not memorized"] * (200 - num_large)


def test_a_model_that_has_learned_nothing_has_no_verdict(finished, tmp_path, monkeypatch):
    """Nothing is "not memorized" where the model has no dimension."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.uniform(size=(60, 4, 4)).astype(np.float32))
    recipe = dataclasses.replace(train.RECIPES["smoke"], num_steps=1)
    train.train_model(np.load(tmp_path / "images.npy"), recipe, tmp_path / "model", seed=0)
    monkeypatch.chdir(tmp_path)
    command = ["audit", "images.npy", "--preset", "smoke", "--model", "model", "--out", "out"]
    assert main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["verdicts"] == {
        "undecided": 60, "not memorized": 0, "OD-Mem": 0, "DD-Mem": 0
    }  # fmt: skip
    assert "has not learned this noise level" in summary["verdict"]
    assert any("--held-out" in limit for limit in summary["limits"])


def test_a_finished_audit_is_kept_unless_told_otherwise(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before = (finished / "out" / "points.csv").stat().st_mtime_ns
    assert main([*COMMAND, "--out", "out"]) == 2
    assert "holds a finished audit; pass --overwrite or choose" in capsys.readouterr().err
    assert (finished / "out" / "points.csv").stat().st_mtime_ns == before


def test_overwriting_gives_the_same_bytes_and_spares_other_files(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "points.csv").write_text("old")
    (tmp_path / "out" / "model" / "params.safetensors").write_text("old")
    assert main([*COMMAND, "--out", "out", "--overwrite"]) == 0
    assert points_of(tmp_path / "out") == points_of(finished / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_given_model_is_compared_with_another_and_with_what_it_never_saw(
    finished, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    rows = rows_of(finished / "out")
    apart = [int(row["index"]) for row in rows if row["role"] == "held out"]
    points = np.load("images.npy")
    np.save("apart.npy", points[apart])
    np.save("images.npy", np.delete(points, apart, axis=0))
    train.train_model(points[apart], train.RECIPES["smoke"], tmp_path / "other", seed=5)
    command = [*COMMAND, "--model", "out/model", "--held-out", "apart.npy", "--reference", "other"]
    assert main([*command, "--out", "new"]) == 0
    assert not (tmp_path / "new" / "model").exists()
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert "model" not in summary["timings"]
    assert "folds" not in summary["timings"]
    assert summary["controls"]["held_out"] == 100
    last = [int(row["index"]) for row in rows_of(tmp_path / "new") if row["role"] == "held out"]
    assert last == list(range(230, 330))  # counted on from the source's own
    assert "dose_response" not in summary["controls"]
    assert any("planted" in limit for limit in summary["limits"])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--held-out", "images.npy"], "--held-out is for a model that is given"),
        (["--model", "out/model", "--held-out", "images.npy"], "among those of the source"),
    ],
)
def test_controls_that_cannot_be_are_refused(finished, monkeypatch, capsys, options, fault):
    monkeypatch.chdir(finished)
    assert main([*COMMAND, *options, "--out", "bad"]) == 2
    assert fault in capsys.readouterr().err
    assert not (finished / "bad").exists()


@pytest.mark.slow
def test_an_interrupted_process_ends_cleanly_and_continues(finished, tmp_path):
    write_source(tmp_path)
    command = [sys.executable, "-m", "mmh_jax", *COMMAND, "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".work" / "checkpoints").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted; run the same command again to continue"
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert points_of(tmp_path / "out") == points_of(finished / "out")


# What a killed run replaces, so that it ends with SIGKILL right after doing it once.
KILL_AFTER = {
    "a checkpoint": "from mmh_jax.train import Checkpoints as owner; name = 'save'",
    "a block": "import mmh_jax.report.measure as owner; name = 'write_array'",
    "scores": "import mmh_jax.report.detectors as owner; name = 'write_array'",
    "the points": "owner = sys.modules['mmh_jax.report.audit']; name = 'write_table'",
}
KILLED = """
import os, signal, sys
import mmh_jax.report
{import_line}
original = getattr(owner, name)
def once(*args, **kwargs):
    original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, once)
from mmh_jax.cli import main
main(sys.argv[1:])
"""


SLOW = [
    pytest.param(moment, marks=pytest.mark.slow) for moment in KILL_AFTER if "check" not in moment
]


@pytest.mark.parametrize("moment", ["a checkpoint", *SLOW])
def test_a_killed_run_ends_as_one_that_was_not(finished, tmp_path, monkeypatch, moment):
    write_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--out", "out"]
    program = KILLED.format(import_line=KILL_AFTER[moment])
    killed = subprocess.run([sys.executable, "-c", program, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "summary.json").exists()
    assert list((tmp_path / "out" / ".work").iterdir())
    assert main(command) == 0
    assert points_of(tmp_path / "out") == points_of(finished / "out")
    assert comparable(tmp_path / "out") == comparable(finished / "out")
    assert not (tmp_path / "out" / ".work").exists()


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    found = metadata.version

    def version(name):
        if name == "mmh-jax":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    assert environment()["mmh_jax"] == "not installed"
    assert environment()["jax"] == jax.__version__
