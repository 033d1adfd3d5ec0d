"""`mmh-jax lid data`: files in, one table out, and nothing lost on the way."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mmh_jax import lid
from mmh_jax.cli import main
from mmh_jax.report import data, lid_of_data

RNG = np.random.default_rng(0)
POINTS = (RNG.normal(size=(200, 2)) @ np.eye(2, 5)).astype(np.float32)
POINTS[150:170] = POINTS[:20]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("points.npz", points=POINTS, labels=np.arange(200) % 3)
    return tmp_path


def rows_of(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_what_the_methods_find(here, capsys):
    command = ["lid", "data", "points.npz", "--out", "lid.csv", "--num-neighbors", "15"]
    assert main([*command, "--method", "mle", "ess", "local_pca"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "40 of 200 points, in 20 clusters" in printed
    rows = rows_of("lid.csv")
    methods = [f"{m}{s}" for m in ("mle", "ess", "local_pca") for s in ("", "_stderr")]
    nearest = ["nearest_index", "nearest_distance", "copies"]
    assert list(rows[0]) == ["index", "label", *methods, *nearest]
    neighbors = lid.nearest_neighbors(POINTS, 15)
    for name in ("mle", "ess"):
        found = lid.DATA_METHODS[name].at_points(POINTS, neighbors)
        np.testing.assert_allclose([float(r[name]) for r in rows], found.value, rtol=1e-5)
        column = [float(r[f"{name}_stderr"]) for r in rows]
        np.testing.assert_allclose(column, found.stderr, rtol=1e-4)
    assert [int(r["nearest_index"]) for r in rows] == neighbors.indices[:, 0].tolist()
    assert [int(r["label"]) for r in rows] == [i % 3 for i in range(200)]
    assert {int(r["copies"]) for r in rows[:20]} == {2}
    # Exact duplicates are atoms.
    assert all(float(r["mle"]) == 0 for r in rows[:20])
    assert np.median([float(r["mle"]) for r in rows[20:150]]) == pytest.approx(2, abs=0.4)
    assert not Path("lid.csv.work").exists()


def test_merged_duplicates_share_the_answer_of_one_point(here):
    columns, about = lid_of_data("points.npz", "lid.csv", merge=True, num_neighbors=15)
    np.testing.assert_array_equal(columns["mle"][150:170], columns["mle"][:20])
    assert np.all(columns["mle"] > 0.5)
    kept = np.delete(POINTS, np.arange(150, 170), axis=0)
    expected = lid.DATA_METHODS["mle"].at_points(kept, lid.nearest_neighbors(kept, 15))
    np.testing.assert_allclose(columns["mle"][:150], expected.value[:150], rtol=1e-5)
    # The nearest are numbered as in the file, and none is a copy of the point.
    gap = np.linalg.norm(POINTS - POINTS[columns["nearest_index"]], axis=1)
    np.testing.assert_allclose(gap, columns["nearest_distance"], rtol=1e-5)
    assert np.all(gap > 0)
    assert about["clusters"] == 20
    overall = lid.DATA_METHODS["mle"].overall(lid.nearest_neighbors(kept, 15), expected)
    assert about["overall"]["mle"].value == pytest.approx(overall.value)


def test_each_point_finds_its_own_number_of_neighbours(here):
    columns, about = lid_of_data("points.npz", "lid.csv", num_neighbors=None, num_points=30, seed=4)
    again, _ = lid_of_data("points.npz", "two.csv", num_neighbors=None, num_points=30, seed=4)
    assert len(columns["index"]) == 30
    np.testing.assert_array_equal(columns["index"], again["index"])
    assert set(columns["mle_num_neighbors"]) <= set(data.LEVELS)
    assert len(set(columns["mle_num_neighbors"])) > 1
    neighbors = lid.nearest_neighbors(POINTS, 128)
    found = lid.at_plateau(lid.neighbor_curve("mle", POINTS, neighbors, data.LEVELS))
    index = columns["index"]
    np.testing.assert_array_equal(columns["mle_num_plateaus"], found.num_plateaus[index])
    np.testing.assert_allclose(columns["mle"], found.value[index])
    assert about["overall"] == {}


def test_a_curve_that_is_nowhere_finite_says_so(here):
    lattice = np.stack(np.meshgrid(*[np.arange(12.0)] * 2), -1).reshape(-1, 2)
    np.save("lattice.npy", lattice.astype(np.float32))
    columns, _ = lid_of_data("lattice.npy", "lid.csv", methods=("two_nn",), num_neighbors=None)
    nowhere = columns["two_nn_num_neighbors"] == 0
    assert nowhere.any()
    np.testing.assert_array_equal(columns["two_nn_num_plateaus"][nowhere], 0)
    assert np.isnan(columns["two_nn"][nowhere]).all()


def test_a_killed_run_continues_and_the_table_is_the_same(here, monkeypatch):
    whole, _ = lid_of_data("points.npz", "whole.csv", methods=("mle", "ess"))
    real, calls = data._answer, []

    def dies(name, *rest):
        calls.append(name)
        if name == "ess":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(data, "_answer", dies)
    with pytest.raises(KeyboardInterrupt):
        lid_of_data("points.npz", "cut.csv", methods=("mle", "ess"))
    assert not Path("cut.csv").exists()
    monkeypatch.setattr(data, "_answer", real)

    def never(*_, **__):
        raise AssertionError("the neighbours were found already")

    monkeypatch.setattr(lid, "nearest_neighbors", never)
    again, _ = lid_of_data("points.npz", "cut.csv", methods=("mle", "ess"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])
    assert Path("cut.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "best"], "unknown method 'best'; there are mle"),
        (["--num-neighbors", "2"], "--num-neighbors is 2; it must be at least 4"),
        (["--num-neighbors", "200"], "200 points to look at, too few for 200 neighbours"),
        (["--tolerance", "-1"], "--tolerance is -1"),
        (["--num-points", "0"], "--num-points is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(options, words, here, capsys):
    assert main(["lid", "data", "points.npz", "--out", "lid.csv", *options]) == 2
    assert words in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"points.npz"}


def test_a_file_is_not_replaced_unasked_and_few_points_have_no_curve(here, capsys):
    Path("lid.csv").write_text("mine")
    assert main(["lid", "data", "points.npz", "--out", "lid.csv"]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert Path("lid.csv").read_text() == "mine"
    np.save("few.npy", POINTS[:20])
    command = ["lid", "data", "few.npy", "--out", "few.csv", "--num-neighbors"]
    assert main([*command, "auto"]) == 2
    assert "too few for a curve" in capsys.readouterr().err
    assert main([*command, "10"]) == 0


@pytest.mark.parametrize(("dim", "num"), [(20, 1000), (1, 300)])
def test_where_the_closed_form_has_no_plateau_it_has_no_value(dim, num):
    points = np.random.default_rng(3).normal(size=(num, dim))
    neighbors, method = lid.nearest_neighbors(points, 20), lid.DATA_METHODS["closed_form"]
    found = method.at_points(points, neighbors)
    known = np.isfinite(found.value)
    if dim == 20:  # it would be .6
        assert known.mean() < 0.1
    else:
        assert known.mean() > 0.4
        overall = method.overall(neighbors, found, points)  # it would be 80
        assert abs(overall.value - 1) < 3 * overall.stderr < 0.5


def test_one_point_does_not_move_the_dimension_of_all():
    points = np.random.default_rng(0).normal(size=(300, 3))
    points[0] = 1e6
    for name in ("mom", "closed_form"):
        method = lid.DATA_METHODS[name]
        neighbors = lid.nearest_neighbors(points, 20)
        found = method.at_points(points, neighbors)
        found.value[0] = 1e8
        assert 2 < method.overall(neighbors, found, points).value < 4
