"""`mmh-jax mitigate`: its rows are what the library says of the samples it keeps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sample_command import CIRCLE, Classes, classes, here, trained  # noqa: F401

from mmh_jax import evaluation, plotting, sample
from mmh_jax import memorization as mem
from mmh_jax.cli import main
from mmh_jax.report import MitigationPlan, drawing, mitigate, mitigate_model
from mmh_jax.train import ModelConfig

QUICK = ["--levels", "8", "--seed", "2", "--num", "60"]
BY_DIMENSION = ["--quantiles", "0.3", "--references", "30", "--probes", "4"]


def compare(*arguments, model="model", out="out"):
    return main(["mitigate", "--model", str(model), "--out", out, *QUICK, *arguments])


def rows_of(out="out"):
    with Path(out, "frontier.csv").open() as file:
        return list(csv.DictReader(file))


def samples_of(name, out="out"):
    with np.load(f"{out}/samples/{name}.npz", allow_pickle=False) as file:
        return file["samples"]


def test_the_rows_are_what_the_samples_say(trained, here, capsys):  # noqa: F811
    model = trained / "model"
    assert compare(*BY_DIMENSION, model=model) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert {path.name for path in Path("out").iterdir()} == {
        "frontier.csv", "frontier.png", "samples", "summary.json"
    }  # fmt: skip
    rows = rows_of()
    assert [row["way"] for row in rows] == ["plain", "copies left out", "lid", "reject"]
    summary = json.loads(Path("out/summary.json").read_text())
    assert [row["copies"] for row in summary["rows"]] == [int(row["copies"]) for row in rows]

    # The set to compare with is the plain sampler's of the next seed, without copies.
    sampler = ["sample", "--model", str(model), "--levels", "8", "--sigma", "0.3", "--num", "60"]
    assert main([*sampler, "--seed", "3", "--out", "others"]) == 0
    with np.load("others/samples.npz", allow_pickle=False) as file:
        others = file["samples"]
    usual = others[~mem.copies(others, CIRCLE).memorized].astype(float)
    names = {"plain": "plain", "lid": "lid_0.3", "reject": "reject_0.3"}
    plain = np.mean(mem.copies(samples_of("plain"), CIRCLE).memorized)
    assert 0 < plain < 1
    for row in rows:
        if row["way"] == "copies left out":
            assert row["copies"] == "0"
            assert float(row["removed"]) == 1
            continue
        drawn = samples_of(names[row["way"]]).astype(float)
        copied = mem.copies(drawn.astype(np.float32), CIRCLE).memorized
        assert int(row["copies"]) == copied.sum()
        ends = mem.rate_interval(copied.sum(), 60)
        assert [float(row[f"share_{end}"]) for end in ("low", "high")] == pytest.approx(
            list(map(float, ends))
        )
        # In two coordinates the principal components are a rotation.
        distance = evaluation.frechet_distance(drawn, usual).value
        assert float(row["frechet"]) == pytest.approx(distance, rel=1e-5, abs=1e-8)
        near = evaluation.prdc(drawn, usual)
        assert float(row["recall"]) == pytest.approx(near.recall.value)
        assert float(row["precision"]) == pytest.approx(near.precision.value)
        if row["way"] == "plain":
            assert row["removed"] == ""
            assert float(row["evaluations"]) == 15
        else:
            assert float(row["removed"]) == pytest.approx(1 - copied.mean() / plain)
            assert float(row["evaluations"]) > 15
    assert f"{plain:.1%} copies" in printed

    # The ways are those of `mmh-jax sample`, from the same noise.
    options = ["--guidance", "reject", "--quantile", "0.3", "--references", "30", "--probes", "4"]
    assert main([*sampler, "--seed", "2", "--out", "reject", *options]) == 0
    with np.load("reject/samples.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(samples_of("reject_0.3"), file["samples"], atol=1e-4)
    with Image.open("out/frontier.png") as image:
        assert np.ptp(np.asarray(image)) > 0
    assert compare(*BY_DIMENSION, model=model) == 2
    assert "holds a finished mitigation; pass --overwrite" in capsys.readouterr().err


def test_guidance_to_a_label_begins_late_or_is_weaker(classes, here, capsys):  # noqa: F811
    np.save("six.npy", np.array([[x, y] for x in (0, 10, 20) for y in (-5, 5)], np.float32))
    more = ["--data", "six.npy", "--scale", "2", "--begins", "0.05", "--scales", "0"]
    assert compare(*more, "--levels", "24") == 0
    rows = rows_of()
    assert [row["way"] for row in rows] == ["plain", "copies left out", "late", "weaker"]
    assert [row["strength"] for row in rows] == ["", "", "0.05", "0"]
    plain, late, weaker = (samples_of(name) for name in ("plain", "late_0.05", "weaker_0"))
    options, config = (
        MitigationPlan(scale=2.0).plain,
        ModelConfig("UNet", {"num_classes": 3}, (2,), 10.0, 1.0, 0.01, 100.0),
    )
    labels = drawing.Sampler(Classes(), None, config, options, 2).labels(60)
    assert np.mean(np.abs(plain[:, 0] - 10 * labels) < 1) > 0.95
    for drawn in (late, weaker):  # without a label any of the three
        assert np.mean(np.abs(drawn[:, 0] - 10 * labels) < 1) < 0.6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "the training data of model are not known"),
        (["--num", "23"], "--num is 23; it must be at least 24"),
        (["--quantiles"], "there is nothing to try"),
        (["--quantiles", "1.5"], "--quantile is 1.5"),
        (["--scale", "2"], "the model takes no labels"),
        (["--begins", "4"], "--begins is read with --scale only; add --scale, or leave it out"),
        (["--scales"], "--scales is read with --scale only"),
        (["--scale", "2", "--quantiles", "0.1"], "--quantiles is of ways by dimension, and there"),
        (["--scale", "2", "--probes", "8"], "--probes is of ways by dimension"),
        (["--scale", "2", "--references", "9"], "--references is of ways by dimension"),
        (["--scale", "2", "--baseline", "model"], "none with --scale; leave one of them out"),
        (["--scale", "2", "--begins"], "there is nothing to try"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_work(here, capsys, more, message):  # noqa: F811
    assert compare(*more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()


def test_what_is_not_given_is_that_of_the_way():
    plan = MitigationPlan(references=64)
    asked = [(way.name, way.strength, way.options.probes) for way in plan.ways()]
    assert asked == [
        *(("lid", share, 8) for share in (0.1, 0.2, 0.3)),
        *(("reject", share, 32) for share in (0.1, 0.15, 0.2)),
    ]
    assert {way.options.references for way in plan.ways()} == {64}
    settings = plan.settings()
    assert settings["quantiles"] == {"lid": [0.1, 0.2, 0.3], "reject": [0.1, 0.15, 0.2]}
    assert settings["probes"] == {"lid": 8, "reject": 32}
    assert settings["begins"] is None
    given = MitigationPlan(quantiles=(0.4,), probes=3)
    asked = [(way.name, way.strength, way.options.probes) for way in given.ways()]
    assert asked == [("lid", 0.4, 3), ("reject", 0.4, 3)]
    assert given.references == 256
    late = MitigationPlan(scale=2.0)
    assert [way.strength for way in late.ways()] == [4, 2, 1]
    assert late.settings()["quantiles"] is None


def test_an_interrupted_comparison_continues(classes, here, monkeypatch):  # noqa: F811
    np.save("six.npy", np.array([[x, y] for x in (0, 10, 20) for y in (-5, 5)], np.float32))
    plan = MitigationPlan(scale=2.0, begins=(1.0, 0.1), levels=12)
    run = {"seed": 0, "plan": plan, "num": 40, "data": "six.npy"}
    whole = mitigate_model("model", "whole", **run)
    draw, drawn = sample.sample, []

    def killed(*inputs, **options):
        drawn.append(len(drawn))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*inputs, **options)

    monkeypatch.setattr(sample, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        mitigate_model("model", "parts", **run)
    again = mitigate_model("model", "parts", **run)
    assert len(drawn) == 5  # the three that were finished are not drawn again
    assert again["rows"] == whole["rows"]
    assert not (Path("parts") / ".work").exists()


def test_samples_of_which_all_are_copies_cannot_be_compared_with():
    with pytest.raises(ValueError, match="only 3 samples of the model are finite and no copies"):
        mitigate._quality(np.zeros((3, 2)))


def test_the_figure_has_a_point_for_each_row():
    row = {"way": "plain", "strength": None, "share": 0.1, "share_low": 0.05, "share_high": 0.2,
           "frechet": 1.0, "recall": 0.9, "evaluations": 63}  # fmt: skip
    rows = [row, row | {"way": "lid", "share": 0.05, "frechet": None, "strength": 0.1}]
    rows.append(rows[1] | {"frechet": 2.0})
    figure = plotting.frontier_figure(rows)
    points = [
        [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
        for axes in figure.axes
    ]
    assert points == [[1, 1], [1, 2], [1, 2]]
