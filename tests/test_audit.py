"""The whole pipeline on small data: what it writes, that it repeats itself, and that it resumes."""

import csv
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
from mmh_jax.report import measure
from mmh_jax.report.audit import DETECTORS
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
    assert names == {"points.csv", "summary.json", "samples.npz", "lid.png", "model"}
    model = {path.name for path in (finished / "out" / "model").iterdir()}
    assert model == {"config.json", "params.safetensors", "metrics.jsonl"}
    with Image.open(finished / "out" / "lid.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 1_000


def test_the_rows_say_what_the_library_says(finished):
    points = np.load(finished / "images.npy")
    rows = rows_of(finished / "out")
    index = np.array([int(row["index"]) for row in rows])
    assert len(rows) == len(set(index)) == 96
    column = {
        name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "verdict"
    }
    np.testing.assert_array_equal(index, np.sort(index))

    distances = np.linalg.norm((points[:, None] - points[index]).reshape(330, 96, -1), axis=-1)
    distances[index, np.arange(96)] = np.inf
    np.testing.assert_allclose(column["nearest_distance"], distances.min(0), atol=1e-6)
    nearest = distances[column["nearest_index"].astype(int), np.arange(96)]
    np.testing.assert_allclose(nearest, distances.min(0), atol=1e-6)
    duplicate = index >= 300
    np.testing.assert_array_equal(column["lid_star"][duplicate], 0)
    assert abs(np.median(column["lid_star"][~duplicate]) - 2) < 0.5

    summary = json.loads((finished / "out" / "summary.json").read_text())
    model = train.load(finished / "out" / "model")
    for position in (0, 50):
        sigma = column["sigma"][position]
        assert min(abs(sigma - level) for level in summary["sigmas"]) < 1e-6 * sigma
        spectrum = measure.lid.jacobian_spectrum(model, points[index[position]], sigma)
        np.testing.assert_allclose(
            [column[name][position] for name in ("lid_theta", "flipd", "residual")],
            [spectrum.expected_flipd, spectrum.flipd, spectrum.residual],
            rtol=1e-3,
            atol=1e-3,
        )
        assert column["lid_theta_stderr"][position] >= 0.999 * spectrum.network_error
    plateau = column["num_plateaus"] > 0
    verdicts = memorization.verdict(
        Estimate(np.where(plateau, column["lid_theta"], np.nan), column["lid_theta_stderr"]),
        Estimate(column["lid_star"], column["lid_star_stderr"]),
    )
    titles = [memorization.Label(int(code)).title for code in verdicts.label]
    assert titles == [row["verdict"] for row in rows]
    assert {title: titles.count(title) for title in titles} == {
        title: count for title, count in summary["verdicts"].items() if count
    }


def test_samples_say_what_was_extracted_and_detectors_stand_beside_it(finished):
    points, rows = np.load(finished / "images.npy"), rows_of(finished / "out")
    summary = json.loads((finished / "out" / "summary.json").read_text())
    index = np.array([int(row["index"]) for row in rows])
    with np.load(finished / "out" / "samples.npz", allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files}
    assert set(kept) == {"samples", "nearest", "ratio", "memorized"}
    assert kept["samples"].shape == (64, 4, 4)
    assert np.abs(kept["samples"] - 0.5).max() < 1  # of a trained model, not noise
    found = memorization.copies(kept["samples"], points)
    np.testing.assert_array_equal(kept["nearest"], found.nearest)
    np.testing.assert_array_equal(kept["memorized"], found.memorized)
    np.testing.assert_allclose(kept["ratio"], found.ratio, rtol=1e-5)
    counts = memorization.extraction(found).counts
    np.testing.assert_array_equal([int(row["extracted"]) for row in rows], counts[index])
    assert summary["samples"] == {
        "num": 64,
        "not_finite": 0,
        "memorized": found.memorized.sum(),
        "fraction": pytest.approx(found.fraction.value),
        "fraction_stderr": pytest.approx(found.fraction.stderr),
        "extracted_points": np.sum(counts > 0),
    }

    names = [name for name in rows[0] if name.startswith("score_")]
    detectors = [*DETECTORS, "png_bytes"]
    assert names == [f"score_{name}" for name in detectors]
    column = {name: np.array([float(row[name]) for row in rows]) for name in names}
    np.testing.assert_array_equal(
        column["score_nearest_distance"], [-float(row["nearest_distance"]) for row in rows]
    )
    subject = memorization.Subject(points[index], train.load(finished / "out" / "model"))
    names = [name for name in detectors if name != "nearest_distance"]
    direct = memorization.scores(
        names,
        subject,
        memorization.Settings(summary["sigma"]),
        key=jax.random.split(jax.random.key(3))[1],
    )
    for name in names:
        np.testing.assert_allclose(
            column[f"score_{name}"], direct.value[name], rtol=1e-4, atol=1e-3, err_msg=name
        )
    assert summary["evaluations"] == direct.total == 1 + 16


def test_the_summary_is_complete(finished):
    summary = json.loads((finished / "out" / "summary.json").read_text())
    assert summary["command"].startswith("mmh-jax audit images.npy --preset smoke")
    assert summary["settings"] | {"data": ""} == {
        "source": "images.npy",
        "data": "",
        "model": None,
        "preset": "smoke",
        "seed": 3,
        "num_points": 96,
        "num_neighbors": 20,
        "num_samples": 64,
        "detectors": [*DETECTORS, "png_bytes"],
    }
    assert summary["environment"]["jax"] == jax.__version__
    assert summary["sigmas"] == sorted(summary["sigmas"])
    assert 7 <= len(summary["sigmas"]) <= 15
    assert summary["sigmas"][0] < summary["sigma"] < summary["sigmas"][-1]
    found = summary["diagnostics"]
    assert found["num_points"] == summary["num_points"]
    assert 0 <= found["off_manifold"] <= found["num_points"]
    assert 0 < found["asymmetry"] < 1
    assert found["sigma_outside_training"] is False
    stages = ["model", "lid_star", "sigma", "lid_theta", "samples", "copies", "detectors", "figure"]
    assert list(summary["timings"]) == stages
    rows = rows_of(finished / "out")
    lid_theta = [float(row["lid_theta"]) for row in rows if int(row["num_plateaus"]) > 0]
    assert found["no_plateau"] == len(rows) - len(lid_theta)
    assert summary["lid_theta"]["0.5"] == pytest.approx(np.median(lid_theta), rel=1e-5)


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


def test_a_model_that_is_passed_is_not_trained_again(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--model", "out/model", "--out", "new"]) == 0
    assert points_of(tmp_path / "new") == points_of(finished / "out")
    assert not (tmp_path / "new" / "model").exists()
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert "model" not in summary["timings"]


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
    "the points": "owner = sys.modules['mmh_jax.report.audit']; name = 'write_csv'",
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
