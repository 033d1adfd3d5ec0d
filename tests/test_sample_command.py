"""`mmh-jax sample`: what it writes is what the library says, and it continues."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from PIL import Image
from test_detect import POINTS, column, rows_of, save_model

from mmh_jax import analytic, lid, sample, train
from mmh_jax import memorization as mem
from mmh_jax.cli import main
from mmh_jax.mitigation import DenoisedLid, LidGuided, Target, sample_selected
from mmh_jax.report import (
    SampleOptions,
    drawing,
    guiding,
    mitigate,
    reference,
    samples,
    sampling,
)
from mmh_jax.typing import Estimate

FILES = {"samples.npz", "samples.csv", "grid.png", "summary.json"}
ANGLES = np.linspace(0, 6, 40)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
# At one noise level, which is quick.
QUICK = ["--sigma", "0.3", "--levels", "8", "--seed", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `circle.npy`, and a `model` of it."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "circle.npy", CIRCLE)
    command = ["train", str(folder / "circle.npy"), "--preset", "smoke", "--num-steps", "200"]
    assert main([*command, "--out", str(folder / "model")]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a source and an untrained `model` that names none."""
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", POINTS)
    np.save("plane.npy", POINTS[:, :2])
    np.save("few.npy", POINTS[:20])
    save_model(tmp_path / "model")
    return tmp_path


def draw(*arguments, model="model", out="out"):
    return main(["sample", "--model", str(model), "--out", out, *QUICK, *arguments])


def samples_of(out="out"):
    with np.load(f"{out}/samples.npz", allow_pickle=False) as file:
        return file["samples"]


def summary_of(out="out"):
    return json.loads(Path(out, "summary.json").read_text())


def keys(seed=2):
    return jax.random.split(jax.random.key(seed), 3)


def test_what_is_written_is_what_the_library_gives(trained, here, capsys):
    extra = ["--guidance", "lid", "--num", "20", "--references", "30", "--quantile", "0.3"]
    assert draw(*extra, model=trained / "model") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert {path.name for path in Path("out").iterdir()} == FILES
    model, config = train.load(trained / "model"), train.load_config(trained / "model")
    drawn, rows, summary = samples_of(), rows_of("out/samples.csv"), summary_of()
    assert drawn.shape == (20, 2)
    with np.load("out/samples.npz", allow_pickle=False) as file:
        assert file["seed"] == 2

    copied = mem.copies(drawn, CIRCLE)  # the model names its data
    np.testing.assert_array_equal(column(rows, "memorized"), copied.memorized)
    np.testing.assert_array_equal(column(rows, "nearest_index"), copied.nearest)
    np.testing.assert_allclose(column(rows, "nearest_distance"), copied.distance, rtol=1e-4)
    np.testing.assert_allclose(column(rows, "ratio"), copied.ratio, rtol=1e-4)
    num = int(copied.memorized.sum())
    assert f"{num} of 20 samples" in printed
    ends = [float(end) for end in mem.rate_interval(num, 20)]
    assert summary["samples"]["fraction_interval"] == pytest.approx(ends)
    assert summary["samples"]["memorized"] == num
    assert summary["data"] == {"source": "circle", "is_training_data": True}

    at = jax.vmap(lambda x: lid.jacobian_spectrum(model, x, 0.3))(drawn)
    np.testing.assert_allclose(column(rows, "lid_theta"), at.expected_flipd, atol=1e-4)
    np.testing.assert_allclose(column(rows, "lid_theta_stderr"), at.network_error, atol=1e-4)
    assert summary["lid_theta"]["0.5"] == pytest.approx(np.median(at.expected_flipd), abs=1e-4)
    star = mem.neighbor_lid(CIRCLE, rows=copied.nearest)
    np.testing.assert_allclose(column(rows, "lid_star"), star.value, rtol=1e-4)
    theta = mem.verdict(Estimate(at.expected_flipd, at.network_error), star)
    titles = [mem.Label(int(code)).title for code in theta.label]
    assert [row["verdict"] for row in rows] == titles

    # The usual dimensions, on runs that end in no copy.
    sigmas = sample.karras_levels(8, sigma_min=config.sigma_min, sigma_max=config.sigma_max)
    noise_key, _ = jax.random.split(jax.random.fold_in(keys()[1], 0))
    noise = sigmas[0] * jax.random.normal(noise_key, (64, 2))[:30]
    paths = jax.vmap(lambda x: sample.solve_path(model, x, sigmas))(noise)
    spread = config.scale * config.sigma_data
    measure = DenoisedLid(0.3 * spread, keys()[2], num_samples=8)
    found = jax.vmap(jax.vmap(lambda *at: measure(model, *at)))(paths.states, paths.sigmas)
    usual = np.asarray(found)[~mem.copies(paths.denoised[:, -1], CIRCLE).memorized]
    inside = (sigmas >= 0.2 * spread) & (sigmas <= spread)
    assert 0 < inside.sum() < 8
    assert summary["reference"]["kept"] == len(usual) < 30
    assert "no copy of the training data" in summary["reference"]["rule"]
    expected = np.sort(usual, axis=0)[int(0.3 * (len(usual) + 1)) - 1, inside]
    np.testing.assert_allclose(summary["reference"]["target"], expected, atol=1e-3)

    target = Target(
        jnp.array(summary["reference"]["sigmas"]), jnp.array(summary["reference"]["target"])
    )
    numbers = map(jnp.asarray, (1e4, 1.0, 0.2 * spread, spread))
    guided = LidGuided(model, target, measure, *numbers)
    direct = sample.sample(
        guided, 64, key=jax.random.fold_in(keys()[0], 0), num_levels=8,
        sigma_min=config.sigma_min, sigma_max=config.sigma_max, shape=(2,),
    )  # fmt: skip
    np.testing.assert_allclose(drawn, direct[:20], atol=1e-3)
    with Image.open("out/grid.png") as image:
        assert np.ptp(np.asarray(image)) > 0

    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert draw(*extra, model=trained / "model") == 2
    assert "out holds a finished sampling; pass --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.slow
def test_by_default_each_sample_is_measured_at_its_own_plateau(trained, here, capsys):
    command = ["sample", "--model", str(trained / "model"), "--out", "out", "--num", "9"]
    assert main(command) == 0
    rows = rows_of("out/samples.csv")
    assert len(rows) == 9
    assert np.all(column(rows, "num_plateaus") >= 0)
    assert len(summary_of()["sigmas"]) >= 7
    apart = column(rows, "sigma")[:, None] / np.array(summary_of()["sigmas"])
    assert np.abs(apart - 1).min(axis=1).max() < 1e-5


@pytest.mark.slow
def test_data_that_have_changed_are_not_the_training_data(trained, here, capsys):
    np.save("circle.npy", CIRCLE + 1)
    config = json.loads((trained / "model" / "config.json").read_text())
    config["training"]["path"] = "circle.npy"
    (here / "model" / "config.json").write_text(json.dumps(config))
    weights = (trained / "model" / "params.safetensors").read_bytes()
    (here / "model" / "params.safetensors").write_bytes(weights)
    assert draw("--num", "3") == 0
    assert "pass --data" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert summary_of()["data"] is None
    names = list(rows_of("out/samples.csv")[0])
    assert "lid_theta" in names
    assert not {"memorized", "lid_star", "verdict", "nearest_index"} & set(names)
    assert draw("--num", "3", "--data", "circle.npy", "--overwrite") == 0
    assert summary_of()["data"] == {"source": "circle", "is_training_data": False}
    np.save("circle.npy", CIRCLE)
    assert draw("--num", "3", "--overwrite") == 0
    assert summary_of()["data"]["is_training_data"] is True


def test_lid_guidance_moves_samples_and_with_strength_0_does_not(here, capsys):
    lid_options = ["--guidance", "lid", "--references", "20", "--quantile", "0.5"]
    assert draw("--num", "12") == 0
    assert draw("--num", "12", *lid_options, out="guided") == 0
    assert draw("--num", "12", *lid_options, "--strength", "0", out="not") == 0
    plain, guided = samples_of(), samples_of("guided")
    np.testing.assert_allclose(samples_of("not"), plain, rtol=1e-4, atol=1e-4)
    moved = np.linalg.norm(guided - plain, axis=1)
    assert moved.max() > 0.05
    assert np.sum(moved > 1e-3) >= 4
    found = summary_of("guided")["reference"]
    assert found["kept"] == 20  # of all: this model names no data
    assert found["copies"] is None
    assert "no training data are known" in found["rule"]
    assert not Path("guided/grid.png").exists()  # of 3 coordinates


def test_copies_among_the_reference_runs_are_left_out():
    config = train.ModelConfig("", {}, (3,), 1.0, 1.0, 0.1, 4.0)
    options = SampleOptions("lid", levels=7, references=40, quantile=0.2)
    inside = options.is_inside(options.sigmas(config), config)
    dimensions = np.where(inside, np.arange(40.0)[:, None], np.nan)
    is_copy = np.arange(40) % 3 == 0
    drawn = np.zeros((40, 3))
    drawn[4], dimensions[5, np.flatnonzero(inside)[0]] = np.inf, np.nan
    runs = reference.Reference(drawn, dimensions)
    target, num = runs.target(options, config, is_copy)
    kept = [row for row in range(40) if row % 3 and row not in (4, 5)]
    assert num == len(kept)
    np.testing.assert_array_equal(target.values, kept[int(0.2 * (num + 1)) - 1])
    np.testing.assert_array_equal(target.sigmas, options.sigmas(config)[inside])
    target, num = runs.target(options, config, None)
    assert num == 38
    np.testing.assert_array_equal(target.values, 8)  # the seventh, without 4 and 5


def test_a_model_of_copies_has_nothing_usual(here, capsys, monkeypatch):
    config = dataclasses.replace(train.load_config("model"), sigma_max=20.0)
    model = analytic.Empirical(jnp.asarray(POINTS))
    monkeypatch.setattr(sampling, "load_model", lambda folder, shape: (model, config))
    more = ["--guidance", "lid", "--data", "points.npy", "--references", "20", "--num", "9"]
    assert draw(*more, "--levels", "32") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "only 0 of 20 reference samples are finite and no copies; a quantile of 0.2 " in message
    assert not Path("out/samples.npz").exists()


@struct.dataclass
class Classes:
    """Three Gaussians of width .1 at 0, 10 and 20 in R^2; without a label all of them."""

    label: jax.Array | None = None

    def __call__(self, x, sigma):
        centres = jnp.array([[0.0, 0], [10, 0], [20, 0]])
        near = (0.01 * x + sigma**2 * centres) / (0.01 + sigma**2)
        if self.label is not None:
            return near[self.label]
        distance = jnp.sum((x - centres) ** 2, axis=1)
        return jax.nn.softmax(-distance / 2 / (0.01 + sigma**2)) @ near

    def condition(self, label):
        return Classes(label)


@pytest.fixture
def classes(here, monkeypatch):
    """The model is `Classes`."""
    config = train.ModelConfig("UNet", {"num_classes": 3}, (2,), 10.0, 1.0, 0.01, 100.0)
    monkeypatch.setattr(sampling.train, "load_config", lambda folder: config)
    for module in (sampling, drawing, mitigate):
        monkeypatch.setattr(module, "load_model", lambda folder, shape: (Classes(), config))


def test_classifier_free_guidance_draws_each_label_where_it_is(classes, capsys):
    more = ["--guidance", "cfg", "--num", "40", "--levels", "32"]
    assert draw(*more, "--scale", "1.5") == 0
    labels = column(rows_of("out/samples.csv"), "label")
    assert set(labels) == {0, 1, 2}
    np.testing.assert_allclose(samples_of()[:, 0], 10 * labels, atol=1)
    with np.load("out/samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["label"], labels)
    assert summary_of()["evaluations"] == {"guided": 126, "unguided": 63}
    assert Path("out/grid.png").exists()
    assert draw(*more, "--label", "2", out="two") == 0
    np.testing.assert_allclose(samples_of("two")[:, 0], 20, atol=1)
    # With a scale of 0 it is the model without a label, whatever the labels.
    assert draw(*more, "--scale", "0", out="zero") == 0
    assert draw("--num", "40", "--levels", "32", out="none") == 0
    np.testing.assert_allclose(samples_of("zero"), samples_of("none"), atol=1e-3)
    assert np.abs(samples_of("none")[:, 0] - 10 * labels).max() > 5
    assert "label" not in rows_of("none/samples.csv")[0]
    assert draw("--num", "40", "--levels", "32", "--label", "1", out="one") == 0
    np.testing.assert_allclose(samples_of("one")[:, 0], 10, atol=1)


def test_guidance_that_begins_late_comes_too_late(classes, capsys):
    more = ["--guidance", "cfg", "--num", "40", "--levels", "32", "--label", "2"]
    # At a tenth of a spread of 10 a centre has been chosen; at four spreads none has.
    for begin, near in (("4", 1.0), ("0.1", 0.6)):
        assert draw(*more, "--begin", begin, out=begin) == 0
        share = np.mean(np.abs(samples_of(begin)[:, 0] - 20) < 1)
        assert share == 1 if near == 1 else share < near
    assert summary_of("4")["settings"]["begin"] == 4
    assert draw("--begin", "1") == 2
    assert "--begin is of --guidance cfg" in capsys.readouterr().err
    assert draw(*more, "--begin", "0", out="never") == 2
    assert "--begin is 0; it must be positive" in capsys.readouterr().err


def test_labels_are_refused_where_the_model_does_not_know_them(classes, capsys):
    assert draw("--label", "3") == 2
    assert "--label is 3; the model knows 0 to 2" in capsys.readouterr().err


def test_pictures_are_drawn_in_a_grid(here, capsys, monkeypatch):
    images = np.random.default_rng(0).uniform(size=(30, 4, 5)).astype(np.float32)
    np.save("images.npy", images)
    config = train.ModelConfig("UNet", {}, (4, 5), 0.3, 1.0, 0.01, 20.0)
    monkeypatch.setattr(sampling.train, "load_config", lambda folder: config)
    model = analytic.Empirical(jnp.asarray(images))
    monkeypatch.setattr(sampling, "load_model", lambda folder, shape: (model, config))
    assert draw("--num", "9", "--data", "images.npy", "--levels", "32") == 0
    assert samples_of().shape == (9, 4, 5)
    assert np.all(column(rows_of("out/samples.csv"), "memorized") == 1)
    with Image.open("out/grid.png") as image:
        seen = np.asarray(image.convert("L"))
    assert len(np.unique(seen)) > 50
    assert summary_of()["data"]["is_training_data"] is None  # the model does not say


def test_samples_that_are_not_finite_stop_nothing(here, capsys, monkeypatch):
    original = samples.draw

    def with_nan(*args, **kwargs):
        drawn = np.array(original(*args, **kwargs))
        drawn[1, 0] = np.nan
        return drawn

    monkeypatch.setattr(samples, "draw", with_nan)
    assert draw("--num", "5", "--data", "points.npy") == 0
    rows = rows_of("out/samples.csv")
    assert rows[1]["verdict"] == "undecided"
    assert rows[1]["nearest_index"] == "-1"
    assert rows[1]["lid_theta"] == rows[1]["lid_star"] == "nan"
    assert all(np.isfinite(float(row["lid_star"])) for row in rows[:1] + rows[2:])
    assert summary_of()["samples"]["not_finite"] == 1


@pytest.mark.parametrize("guidance", ["lid", pytest.param("reject", marks=pytest.mark.slow)])
def test_an_interrupted_call_continues_to_the_same_samples(here, capsys, monkeypatch, guidance):
    for module in (samples, reference):
        monkeypatch.setattr(module, "BLOCK_SIZE", 8)
    command = ["--guidance", guidance, "--num", "20", "--references", "20", "--step", "ancestral"]
    command += ["--data", "points.npy", "--probes", "2"]
    assert draw(*command, out="whole") == 0
    written = []

    def killed_at(name, module):
        original = module.write_array

        def write(path, array):
            original(path, array)
            written.append(f"{path.parent.name}/{path.name}")
            if written[-1] == name:
                raise KeyboardInterrupt

        return module, "write_array", write

    for name, module in (
        ("reference/000000008.npy", reference),
        ("samples/000000000.npy", samples),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*killed_at(name, module))
            assert draw(*command) == 130
        assert not Path("out/summary.json").exists()
    capsys.readouterr()
    assert draw(*command, "--low", "0.3") == 2
    assert "holds an unfinished sampling with another low; repeat" in capsys.readouterr().err
    written.clear()
    with monkeypatch.context() as patch:
        for module in (reference, samples):
            patch.setattr(*killed_at("", module))
        assert draw(*command) == 0
    assert written == ["samples/000000008.npy", "samples/000000016.npy"]
    np.testing.assert_array_equal(samples_of(), samples_of("whole"))
    assert Path("out/samples.csv").read_bytes() == Path("whole/samples.csv").read_bytes()
    assert not Path("out/.work").exists()


@pytest.mark.parametrize("step", guiding.STEPS)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_evaluations_are_counted_as_they_happen(step, with_baseline):
    config = train.ModelConfig("", {}, (3,), 1.0, 1.0, 0.1, 4.0)
    options = SampleOptions("lid", levels=7, step=step, probes=4)
    asked = []

    def counting(x, sigma):
        asked.append(float(sigma))
        return x / (1 + sigma**2)

    with jax.disable_jit():
        sample.solve(
            counting, jnp.ones(3), jnp.asarray(options.sigmas(config)),
            step=guiding.STEPS[step](), key=jax.random.key(0),
        )  # fmt: skip
    measure = options.measure(config, counting if with_baseline else None, key=jax.random.key(0))
    each = 9 if with_baseline else 5
    inside = sum(0.2 <= sigma <= 1.0 for sigma in asked)
    found = options.evaluations(config, measure)
    assert found["unguided"] == len(asked)
    assert found["guided"] == len(asked) - inside + inside * (3 * each + 2)
    levels = sum(0.2 <= sigma <= 1.0 for sigma in options.sigmas(config).tolist())
    assert found["reference"] == len(asked) + levels * each
    cfg = SampleOptions("cfg", levels=7, step=step).evaluations(config)
    assert cfg == {"guided": 2 * len(asked), "unguided": len(asked)}


@pytest.mark.parametrize("step", ["heun", "ancestral"])
def test_evaluations_of_rejection_are_those_of_the_library(step):
    config = train.ModelConfig("", {}, (3,), 1.0, 1.0, 0.1, 4.0)
    options = SampleOptions("reject", levels=7, step=step, probes=4, low=0.2)
    back, decide = options.places(config)
    sigmas = options.sigmas(config)
    assert sigmas[back] <= 2 < sigmas[back - 1]
    assert sigmas[decide] >= 0.2 > sigmas[decide + 1]
    measure = options.measure(config, None, key=jax.random.key(0))
    direct = sample_selected(
        lambda x, sigma: x / (1 + sigma**2), 6, key=jax.random.key(0), sigmas=sigmas, shape=(3,),
        measure=measure, target=Target(jnp.ones(1), jnp.full(1, 9.0)), decide_at=0.2, back_to=2.0,
        step=guiding.STEPS[step](),
    )  # fmt: skip
    assert direct.tries.mean() == 8
    found = options.evaluations(config, measure, tries=direct.tries.mean())
    assert found["guided"] == pytest.approx(direct.evaluations)
    assert found["reference"] == found["unguided"] + 5


@pytest.mark.parametrize(
    ("more", "low", "back_to"),
    [
        ([], 0.0, 2.0),
        pytest.param(["--low", ".2", "--back-to", "inf"], 0.2, np.inf, marks=pytest.mark.slow),
    ],
)
def test_rejection_is_that_of_the_library(trained, here, capsys, more, low, back_to):
    extra = ["--guidance", "reject", "--num", "20", "--references", "30", "--quantile", "0.4"]
    extra += [*more, "--probes", "2"]
    assert draw(*extra, model=trained / "model") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    model, config = train.load(trained / "model"), train.load_config(trained / "model")
    spread, summary = config.scale * config.sigma_data, summary_of()
    sigmas = sample.karras_levels(8, sigma_min=config.sigma_min, sigma_max=config.sigma_max)
    found = summary["reference"]
    decide = int(np.sum(np.asarray(sigmas) >= low * spread)) - 1
    assert (decide == 7) == (low == 0)
    np.testing.assert_allclose(found["sigmas"], [sigmas[decide]], rtol=1e-6)
    direct = sample_selected(
        model, 64, key=jax.random.fold_in(keys()[0], 0), sigmas=sigmas, shape=(2,),
        measure=DenoisedLid(0.4 * spread, keys()[2], num_samples=2, spread=True),
        target=Target(jnp.array(found["sigmas"]), jnp.array(found["target"])),
        decide_at=float(sigmas[decide]), back_to=back_to * spread,
    )  # fmt: skip
    np.testing.assert_allclose(samples_of(), direct.samples[:20], atol=1e-3)
    rows = rows_of("out/samples.csv")
    np.testing.assert_array_equal(column(rows, "accepted"), direct.accepted[:20])
    np.testing.assert_array_equal(column(rows, "tries"), direct.tries[:20])
    share, tries = direct.accepted[:20].mean(), direct.tries[:20].mean()
    assert tries > 1
    assert summary["selection"] == {"accepted": share, "mean_tries": pytest.approx(tries)}
    assert f"accepted {share:.1%}" in printed
    # Those of the first try start from the noise of the sampler without guidance.
    assert draw("--num", "20", model=trained / "model", out="plain") == 0
    plain, once = samples_of("plain"), direct.tries[:20] == 1
    assert once.any()
    np.testing.assert_allclose(samples_of()[once], plain[once], atol=1e-3)
    assert np.abs(samples_of()[~once] - plain[~once]).max() > 0.05
    assert summary_of("plain")["selection"] is None
    assert "accepted" not in rows_of("plain/samples.csv")[0]


def test_what_is_not_given_is_that_of_the_guidance(here, capsys):
    unread = dict.fromkeys(("scale", "begin", "strength", "trust", "high", "back_to"))
    expected = {
        "lid": {"quantile": 0.2, "strength": 1e4, "trust": 1.0, "low": 0.2, "high": 1.0,
                "probes": 8, "references": 128},
        "reject": {"quantile": 0.1, "low": 0.0, "back_to": 2.0, "probes": 32, "references": 128},
    }  # fmt: skip
    for guidance, values in expected.items():
        found = SampleOptions(guidance).settings()
        assert {name: found[name] for name in unread | values} == unread | values
    assert SampleOptions("cfg").scale == 1
    assert SampleOptions("cfg").begin == np.inf
    config = train.ModelConfig("", {}, (3,), 2.0, 0.5, 0.1, 4.0)
    key = jax.random.key(0)
    for baseline in (None, len):  # of the measure: the finished sample, from a spread of 1
        measure = SampleOptions("reject").measure(config, baseline, key=key)
        assert measure == DenoisedLid(measure.sigma, key, baseline, num_samples=32, spread=True)
        assert float(measure.sigma) == pytest.approx(0.4)
    # What is given is kept, and the summary says what held.
    command = ["--guidance", "reject", "--num", "6", "--references", "12", "--quantile", "0.25"]
    assert draw(*command) == 0
    found = summary_of()["settings"]
    assert {name: found[name] for name in ("quantile", "low", "back_to", "probes")} == {
        "quantile": 0.25, "low": 0, "back_to": 2, "probes": 32
    }  # fmt: skip
    assert summary_of()["reference"]["measured_at"] == pytest.approx(0.4)


def test_dimensions_are_relative_to_a_baseline(here, capsys):
    options = ["--guidance", "reject", "--num", "6", "--references", "9", "--probes", "2"]
    assert draw(*options, "--baseline", "model") == 0
    found = summary_of()["reference"]
    assert found["is_relative"]
    assert found["measured_at"] == pytest.approx(0.4)
    # Of the model to itself: the logarithm of 1, and nothing is refused.
    assert found["target"] == [0.0]
    assert summary_of()["selection"] == {"accepted": 1.0, "mean_tries": 1.0}
    assert summary_of()["evaluations"]["guided"] == 15 + 1 + 5
    assert draw(*options, out="alone") == 0
    found = summary_of("alone")["reference"]
    assert not found["is_relative"]
    assert found["measured_at"] == pytest.approx(0.4)
    assert found["target"] != [0.0]
    save_model(here / "larger", (4,))
    assert draw(*options, "--baseline", "larger", out="no") == 2
    assert "larger takes points of shape (4,), and the model those" in capsys.readouterr().err
    assert draw(*options, "--baseline", "nothing", out="no") == 2
    assert "no model in nothing" in capsys.readouterr().err


def test_a_label_is_bound_in_the_baseline(classes, capsys):
    more = ["--guidance", "reject", "--num", "6", "--references", "9", "--levels", "12"]
    more += ["--baseline", "model", "--label", "2"]
    assert draw(*more) == 0
    np.testing.assert_allclose(samples_of()[:, 0], 20, atol=1)
    assert summary_of()["reference"]["target"] == [0.0]


BAD = {
    "--guidance cfg": "--guidance cfg: the model takes no labels; leave it out, or train one with",
    "--label 1": "--label: the model takes no labels",
    "--num 0": "--num is 0; it must be at least 1",
    "--levels 1": "--levels is 1; it must be at least 2",
    "--scale 2": "--scale is of --guidance cfg, and this is --guidance none; leave it out",
    "--strength 2": "--strength is of --guidance lid, and this is --guidance none; leave it out",
    "--guidance lid --strength -1": "--strength is -1; it must be finite and at least 0",
    "--guidance lid --trust nan": "--trust is nan; it must be finite and at least 0",
    "--guidance lid --low 1": "--low is 1 and --high 1; --low must be at least 0 and below",
    "--guidance lid --low .2 --high .21": "none of the 8 noise levels is between 0.2 and 0.21",
    "--guidance lid --quantile 1": "--quantile is 1, of --references 128; it must lie between",
    "--guidance lid --quantile 0": "--quantile is 0, of --references 128; it must lie between",
    "--guidance lid --references 3": "--quantile is 0.2, of --references 3; it must lie between",
    "--guidance lid --references 0": "--references is 0; it must be at least 1",
    "--guidance lid --probes 0": "--probes is 0; it must be at least 1",
    "--guidance lid --scale nan": "--scale is of --guidance cfg, and this is --guidance lid",
    "--quantile 0.2": "--quantile is of --guidance lid or reject, and this is --guidance none",
    "--guidance lid --back-to 3": "--back-to is of --guidance reject, and this is --guidance lid",
    "--guidance reject --high 3": "--high is of --guidance lid, and this is --guidance reject",
    "--guidance reject --probes 1": "--probes is 1; it must be at least 2",
    "--guidance reject --references 8": "--quantile is 0.1, of --references 8; it must lie between",
    "--guidance reject --quantile 0": "--quantile is 0, of --references 128; it must lie between",
    "--guidance reject --low 2 --back-to 1": "--low is 2 and --back-to 1; --low must be at least 0",
    "--guidance reject --low 3": "--low is 3 and --back-to 2; --low must be at least 0 and below",
    "--guidance reject --low 9 --back-to inf": "from 5 to 0.01 spreads of the data, have none",
    "--guidance reject --low 0.2 --back-to 0.21": "--low 0.2 --back-to 0.21: the 8 noise levels",
    "--baseline model": "--baseline is of --guidance lid or reject, and this is --guidance none",
    "--sigma 0": "--sigma is 0; it must be a positive number",
    "--seed -1": "--seed is -1",
    "--model nothing": "no model in nothing: config.json is missing",
    "--data plane.npy": "plane.npy has points of shape (2,), and the model takes points of shape",
    "--data nothing.npy": "nothing.npy",
    "--data few.npy": "few has 20 points, too few for 20 neighbours of each; lower --num-neigh",
    "--num-neighbors 3": "--num-neighbors is 3; it must be at least 4",
    "--out model": "the model model lies in the output model; choose another output",
    "--out points.npy": "points.npy is a file; the output is a folder",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_is_said_before_any_work(here, capsys, line):
    before = {path.name for path in here.rglob("*")}
    assert draw(*line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert BAD[line] in printed.err
    assert {path.name for path in here.rglob("*")} == before


def test_options_of_a_program_are_checked_too():
    config = train.ModelConfig("", {"num_classes": 2}, (3,), 1.0, 1.0, 0.1, 4.0)
    for options, message in (
        (SampleOptions("magic"), "--guidance is 'magic'; choose one of none, lid, reject"),
        (SampleOptions(step="euler"), "--step is 'euler'; choose one of heun, ddim"),
        (SampleOptions("cfg", scale=float("nan")), "--scale is nan; it must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            options.check(config)
    assert SampleOptions("lid").least_references == 4
    SampleOptions("lid", references=4).check(config)


def test_a_figure_needs_matplotlib_before_any_work(trained, here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw("--num", "2", model=trained / "model") == 2
    assert "pip install 'mmh-jax[plot]'" in capsys.readouterr().err
    assert not Path("out").exists()
