"""The command line: bad input gives one line and leaves nothing behind; good input, files."""

import csv
import errno
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mmh_jax import lid, train
from mmh_jax.cli import main
from mmh_jax.report import PRESETS, files, measure

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(60, 3)).astype(np.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a source `points.npy` and an untrained `model` for it."""
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", POINTS)
    save_model(tmp_path / "model", (3,))
    return tmp_path


def save_model(folder, shape):
    config = train.ModelConfig(
        network="ResidualMLP",
        network_options={"width": 8, "depth": 1},
        shape=shape,
        scale=1.0,
        sigma_data=1.0,
        sigma_min=0.01,
        sigma_max=5.0,
    )
    train.save(
        folder, config, train.build(config, np.zeros(shape, np.float32), key=jax.random.key(0))
    )


def contents(folder):
    """Every path below a folder with its bytes."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def error_of(arguments, capsys):
    """Run, demand exit code 2 and one line on stderr, and return that line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def with_value(value):
    points = POINTS.copy()
    points[5, 1] = value
    return points


def write_images(*sizes):
    Path("bad").mkdir()
    for number, size in enumerate(sizes):
        Image.new("L", size, number).save(f"bad/{number}.png")


def cut(path, size=200):
    path.write_bytes(path.read_bytes()[:size])


# A word that the message must contain, and how to make such a source.
BAD_ARRAYS = {
    "NaN": with_value(np.nan),
    "infinite": with_value(np.inf),
    "constant": np.ones((40, 3)),
    "int64": np.arange(90).reshape(30, 3),
    "8 of the 16 points occur once, and 9 must": np.repeat(POINTS[:12], [1] * 8 + [2] * 4, axis=0),
}
BAD_PATHS = {
    "does not exist": lambda: "nothing.npy",
    "truncated": lambda: cut(Path("points.npy")) or "points.npy",
    "images": lambda: write_images() or "bad",
    "mixes images": lambda: write_images((4, 4), (4, 5)) or "bad",
    "kind": lambda: Path("bad.txt").write_text("?") and "bad.txt",
}


@pytest.mark.parametrize("word", [*BAD_ARRAYS, *BAD_PATHS])
def test_a_bad_source_stops_an_audit_before_it_writes(here, capsys, word):
    if word in BAD_ARRAYS:
        np.save("bad.npy", BAD_ARRAYS[word])
    source = BAD_PATHS.get(word, lambda: "bad.npy")()
    before = contents(here)
    assert word in error_of(["audit", source, "--out", "out"], capsys)
    assert contents(here) == before


@pytest.mark.parametrize("command", ["train", "lid"])
def test_a_bad_source_stops_the_other_commands_too(here, capsys, command):
    np.save("bad.npy", with_value(np.nan))
    before = contents(here)
    arguments = (
        ["bad.npy", "--out", "out"] if command == "train" else ["model", "bad.npy", "--out", "out"]
    )
    assert "NaN or infinite" in error_of([command, *arguments], capsys)
    assert contents(here) == before


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


BAD_MODELS = {
    "points of shape (2, 2), but those of the source have shape (3,)": (
        lambda folder: save_model(folder, (2, 2))
    ),
    "truncated or no safetensors file": lambda folder: cut(folder / "params.safetensors"),
    "does not hold the arrays": (
        lambda folder: save_file({"w": np.ones(3)}, folder / "params.safetensors")
    ),
    "has no params.safetensors": lambda folder: (folder / "params.safetensors").unlink(),
    "has format None": write("config.json", '{"model_type": "bert"}'),
    "is not a JSON object": write("config.json", "{"),
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("command", ["audit", "lid"])
@pytest.mark.parametrize("message", BAD_MODELS)
def test_a_bad_model_is_refused(here, capsys, command, message):
    BAD_MODELS[message](here / "model")
    before = contents(here)
    arguments = {"audit": ["points.npy", "--model", "model"], "lid": ["model", "points.npy"]}
    assert message in error_of([command, *arguments[command], "--out", "out"], capsys)
    assert contents(here) == before


BAD_SETTINGS = {
    "audit points.npy --out out --preset quick": "unknown preset 'quick'; choose one of smoke, cpu",
    "audit points.npy --out out --num-points 0": "--num-points is 0; it must be at least 1",
    "audit points.npy --out out --reference model": "--reference is for a model that is given",
    "audit --out out": "name a source to audit, or --demo",
    "audit points.npy --demo --out out": "name a source to audit, or --demo",
    "audit points.npy --out out --seed -1": "--seed is -1; it must be at least 0 and below 2^32",
    "audit points.npy --out . --model model": "the model model lies in the output",
    "audit points.npy --out out --num-samples 0": "--num-samples is 0; it must be at least 1",
    "audit points.npy --out out --detectors magic": "unknown detector 'magic'; there are flipd, ",
    "audit points.npy --out out --detectors cfg_norm": "`cfg_norm` compares the model with and",
    "audit points.npy --out out --detectors spikiness": "this model is a ResidualMLP",
    "train points.npy --out out --preset quick": "unknown preset 'quick'",
    "train points.npy --out out --num-steps 0": "--num-steps is 0",
    "train points.npy --out model": "model holds a finished model; pass --overwrite or choose",
    "lid model points.npy --out out.csv --sigma 0": "--sigma is 0; it must be a positive number",
    "lid model points.npy --out out.csv --sigma -0.1": "--sigma is -0.1",
    "lid model points.npy --out out.csv --sigma nan": "--sigma is nan",
    "lid model points.npy --out points.npy": "points.npy exists; pass --overwrite or choose",
    "lid model points.npy --out model": "model exists; it is a folder",
}


@pytest.mark.parametrize("line", BAD_SETTINGS)
def test_a_bad_setting_is_named(here, capsys, line):
    before = contents(here)
    assert BAD_SETTINGS[line] in error_of(line.split(), capsys)
    assert contents(here) == before


@pytest.mark.parametrize("names", [["summary.json"], ["points.csv"], ["model/weights.bin"]])
@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_files_that_no_audit_wrote_are_never_replaced(here, capsys, names, extra):
    for name in names:
        path = here / "out" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    before = contents(here)
    message = error_of(["audit", "points.npy", "--out", "out", *extra], capsys)
    assert "choose another folder" in message
    assert contents(here) == before


def test_a_file_in_the_way_of_the_output_is_named(here, capsys):
    (here / "out").write_text("mine")
    before = contents(here)
    assert "out is a file" in error_of(["audit", "points.npy", "--out", "out"], capsys)
    message = error_of(["audit", "points.npy", "--out", "out/deeper"], capsys)
    assert message.startswith("out")
    assert contents(here) == before


@pytest.mark.parametrize("command", ["audit", "train", "lid"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_output_that_cannot_be_written_is_found_out_first(
    here, capsys, monkeypatch, code, command
):
    def refuse(path, content):
        path.touch()  # as on a full disk: the name is there, the bytes are not
        raise OSError(code, "it cannot be", str(path))

    before = contents(here)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    arguments = ["model", "points.npy"] if command == "lid" else ["points.npy"]
    out = "new/out.csv" if command == "lid" else "new"
    message = error_of([command, *arguments, "--out", out], capsys)
    assert "it cannot be; " in message
    assert contents(here) == before


def test_a_disk_that_fills_up_leaves_no_half_file_and_the_run_continues(here, capsys, monkeypatch):
    original = files.os.replace

    def full(source, target):
        if str(target).endswith("points.csv"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    command = ["audit", "points.npy", "--model", "model", "--preset", "smoke", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: out/points.csv: No space left on device; free some space, then run the same "
        "command again"
    )
    assert {path.name for path in (here / "out").iterdir()} == {".work", "samples.npz"}
    message = error_of([*command, "--seed", "1"], capsys)
    assert "holds an unfinished audit with another seed; repeat its command" in message
    assert main(command) == 0
    names = {path.name for path in (here / "out").iterdir()}
    tables = {"points.csv", "points.parquet"}
    assert names == {*tables, "report.html", "samples.npz", "lid.png", "summary.json"}


def test_matplotlib_is_asked_for_before_any_work(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = contents(here)
    message = error_of(["audit", "nothing.npy", "--out", "out"], capsys)
    assert "pip install 'mmh-jax[plot]'" in message
    assert contents(here) == before


def test_an_interrupt_is_no_traceback(here, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmh_jax.report.model.train.train_model", interrupt)
    assert main(["train", "points.npy", "--preset", "smoke", "--out", "out"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted; run the same command again to continue"


def test_a_defect_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr("mmh_jax.report.model.train.train_model", lambda *_, **__: np.stack([]))
    with pytest.raises(ValueError, match="need at least one array"):
        main(["train", "points.npy", "--preset", "smoke", "--out", "out"])


@pytest.mark.parametrize("command", ["train", "audit"])
def test_a_model_is_at_least_as_wide_as_a_point(command, here):
    points = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    np.save("wide.npy", points)
    recipe = train.RECIPES["smoke"]
    assert recipe.width < 100
    steps = {"train": ["--num-steps", "2"], "audit": ["--num-points", "4"]}[command]
    assert main([command, "wide.npy", "--preset", "smoke", *steps, "--out", "wide"]) == 0
    folder = {"train": here / "wide", "audit": here / "wide" / "model"}[command]
    assert train.load_config(folder).training["width"] == 125


def test_train_writes_a_model_of_so_many_steps_that_lid_reads(here, capsys):
    settings = ["--preset", "smoke", "--num-steps", "20", "--seed", "5"]
    assert main(["train", "points.npy", *settings, "--out", "new"]) == 0
    names = {path.name for path in (here / "new").iterdir()}
    assert names == {"config.json", "params.safetensors", "metrics.jsonl"}
    training = train.load_config("new").training
    assert (training["num_steps"], training["seed"]) == (20, 5)

    methods = ["flipd", "projected", "thresholded", "rank", "tangential", "expected"]
    command = ["lid", "new", "points.npy", "--out", "tables/lid.csv", "--sigma", "0.3", "--method"]
    assert main([*command, *methods]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "0.3" in printed
    assert "of 60 points off the model's manifold" in printed
    assert "asymmetry of the Jacobian" in printed
    assert "outside the trained range" not in printed
    with (here / "tables" / "lid.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["index", "sigma", *methods, "stderr", "residual", "off_manifold"]
    assert list(rows[0]) == names
    assert {float(row["sigma"]) for row in rows} == {0.3}
    assert [int(row["index"]) for row in rows] == list(range(60))
    expected = lid.jacobian_spectrum(train.load("new"), POINTS[7], 0.3)
    found = {name: float(value) for name, value in rows[7].items()}
    dimensions = {
        "flipd": expected.flipd,
        "projected": expected.projected_flipd,
        "thresholded": expected.thresholded_flipd,
        "expected": expected.expected_flipd,
        "tangential": expected.tangential_flipd,
        "stderr": expected.network_error,
        "residual": expected.residual,
    }
    for name, value in dimensions.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert int(rows[7]["off_manifold"]) == expected.off_manifold
    assert int(rows[7]["rank"]) == lid.rank_by_threshold(expected.eigenvalues)

    far = ["lid", "new", "points.npy", "--out", "far.csv", "--sigma", "1e4", "--num-points", "5"]
    assert main(far) == 0
    assert "sigma outside the trained range" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )


def test_lid_chooses_a_scale_and_points_by_the_seed(here, capsys):
    np.savez("labelled.npz", points=POINTS, labels=np.arange(60) % 7)
    command = ["lid", "model", "labelled.npz", "--num-points", "11", "--seed", "2", "--out"]
    assert main([*command, "one.csv"]) == 0
    assert main([*command, "two.csv"]) == 0
    one, two = (Path(name).read_bytes() for name in ("one.csv", "two.csv"))
    assert one == two
    rows = list(csv.DictReader(one.decode().splitlines()))
    names = ["index", "label", "sigma", "num_plateaus", "expected", "stderr"]
    assert list(rows[0]) == [*names, "residual", "off_manifold"]
    assert len(rows) == 11
    assert all(int(row["label"]) == int(row["index"]) % 7 for row in rows)


def test_help_is_complete_and_needs_no_heavy_import():
    program = (
        "import sys; from mmh_jax.cli import main; code = main(sys.argv[1:]); "
        "assert not {'matplotlib', 'sklearn', 'mmh_jax.report'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "audit", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for option in ("--out", "--model", "--preset", "--seed", "--num-points", "--demo"):
        assert option in result.stdout
    assert "{smoke,cpu,accelerator}" in result.stdout
    assert set(PRESETS) == set(train.RECIPES) == {"smoke", "cpu", "accelerator"}


def test_usage_errors_exit_with_2(capsys):
    assert main([]) == 2
    assert main(["audit"]) == 2
    assert main(["audit", "digits", "--out", "x", "--seed", "one"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_killed_measurement_continues_and_refuses_another(here, monkeypatch, capsys):
    command = ["lid", "model", "points.npy", "--out", "one.csv"]
    assert main(command) == 0
    assert not list(here.glob("*.work"))
    original, written = measure.write_array, []

    def killed(path, array):
        original(path, array)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_array", killed)
        assert main([*command[:-1], "two.csv"]) == 130
    assert [path.parent.name for path in written] == ["sigma", "lid_theta"]
    assert not (here / "two.csv").exists()
    capsys.readouterr()
    line = error_of([*command[:-1], "two.csv", "--seed", "4"], capsys)
    assert "holds an unfinished measurement with another seed; repeat" in line

    found = []
    monkeypatch.setattr(measure, "write_array", lambda path, array: found.append(path))
    assert main([*command[:-1], "two.csv"]) == 0
    assert found == []  # nothing was left to do
    assert (here / "two.csv").read_bytes() == (here / "one.csv").read_bytes()
    assert not list(here.glob("*.work"))
