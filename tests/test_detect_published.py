"""`mmh-jax detect` on published pipelines: what it writes is what the library says."""

import csv
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmh_jax import lid, linalg, pretrained
from mmh_jax import memorization as mem
from mmh_jax.cli import main
from mmh_jax.report import asked, looked

slow = pytest.mark.slow
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "caption", "image", "memorized"]), some)
    ),
    max_leaves=6,
)
PROMPTS = ["a painting of the sea", "1984"]  # a number is a text, too
QUICK = ["--num-steps", "3", "--probes", "2", "--curve-levels", "2", "--seed", "5"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with prompts and pictures."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": prompt, "memorized": place == 0} for place, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "pictures").mkdir()
    for number, shape in enumerate([(40, 30, 3), (16, 16, 3), (20, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def rows_of(name):
    with open(name) as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def interrupted(*_):
    raise KeyboardInterrupt


def test_what_is_drawn_for_prompts(published, here, monkeypatch, capsys):
    """Numbers are the library's; killed at the end, it goes on there."""
    command = ["detect", "--model", str(published("sd1")), "--prompts", "prompts.jsonl", "--out",
               "found.csv", "--generate", "2", "--detectors", "flipd", "residual", "png_bytes",
               *QUICK, "--curve-levels", "0"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(
            looked.Looked, "detection", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main(command) == 130
    assert not (here / "found.csv").exists()
    with monkeypatch.context() as patch:  # nothing is drawn or scored again
        patch.setattr(pretrained.StableDiffusion, "sample", None)
        patch.setattr(mem, "scores", None)
        assert main(command) == 0
    assert "4 samples" in " ".join(capsys.readouterr().out.split())
    rows, summary = rows_of("found.csv"), json.loads((here / "found.json").read_text())
    assert [row["prompt"] for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [row["memorized"] for row in rows] == ["True"] * 2 + ["False"] * 2
    assert not (here / "found.csv.work").exists()

    sd = pretrained.load(published("sd1"))
    assert isinstance(sd, pretrained.StableDiffusion)
    key = jax.random.key(5)
    draw_key = jax.random.fold_in(jax.random.fold_in(key, 0), 2)
    latents = sd.sample(PROMPTS[1], 2, key=draw_key, num_steps=3)
    image = Image.open(here / "found.images" / "00003.png")
    np.testing.assert_allclose(np.asarray(image) / 255, sd.decode(latents[1]), atol=0.51 / 255)
    assert int(rows[3]["png_bytes"]) == mem.png_bytes(np.asarray(image)[None] / 255)[0]

    # The paper's level, t = .01; the residual draws nothing, and has the prompt.
    sigma = summary["sigma"]
    assert sigma == pytest.approx(float(sd.process.schedule.sigma(10)))
    model = sd.denoiser(PROMPTS[1])
    residual = mem.score_norm(model, latents[1], sigma)
    assert column(rows, "score_residual")[3] == pytest.approx(-float(residual), rel=1e-4)
    assert residual != pytest.approx(float(mem.score_norm(sd.denoiser(), latents[1], sigma)))
    per_bit = column(rows, "score_flipd") / (8 * column(rows, "png_bytes"))
    np.testing.assert_allclose(column(rows, "score_flipd_per_bit"), per_bit, rtol=1e-5)

    # Two prompts, one of either kind, are too few for a rate.
    assert summary["detection"]["flipd"] is None
    assert summary["evaluations"] == 3 + 1  # FLIPD and the residual
    assert not (here / "found.png").exists()


@slow
def test_curves(published, here):
    command = ["detect", "--model", str(published("sd1")), "--prompts", "prompts.jsonl", "--out",
               "found.csv", "--generate", "2", "--detectors", "residual", *QUICK]  # fmt: skip
    assert main(command) == 0
    summary = json.loads((here / "found.json").read_text())
    sd = pretrained.load(published("sd1"))
    assert isinstance(sd, pretrained.StableDiffusion)
    key, sigma, model = jax.random.key(5), summary["sigma"], sd.denoiser(PROMPTS[1])
    draw_key = jax.random.fold_in(jax.random.fold_in(key, 0), 2)
    latents = sd.sample(PROMPTS[1], 2, key=draw_key, num_steps=3)
    curves = np.load(here / "found.curves.npz")
    probes = jax.random.split(jax.random.fold_in(key, 2), 4)[3]
    for name, denoiser in {"flipd": model, "flipd_unconditional": sd.denoiser()}.items():
        expected = lid.flipd(
            denoiser, latents[1], curves["sigmas"][1], trace=linalg.rademacher(2), key=probes
        )
        assert curves[name][3, 1] == pytest.approx(float(expected.value), rel=1e-4)
    assert curves["memorized"].tolist() == [True, True, False, False]
    assert curves["sigmas"][0] == pytest.approx(sigma)
    assert curves["sigmas"][1] == pytest.approx(float(sd.process.schedule.sigma(500)), rel=1e-5)
    assert (here / "found.png").stat().st_size > 1_000
    assert summary["evaluations"] == 1 + 2 * 2 * 3  # the residual; 2 curves of 2 levels


@slow
def test_samples_of_a_model_without_prompts(published, here):
    command = ["detect", "--model", str(published("ddpm")), "--generate", "3", "--out", "found.csv",
               "--num-steps", "3", "--probes", "2", "--curve-levels", "0",
               "--detectors", "flipd"]  # fmt: skip
    assert main(command) == 0
    rows = rows_of("found.csv")
    assert len(rows) == 3
    assert "score_flipd" in rows[0]
    assert "prompt" not in rows[0]
    assert not (here / "found.png").exists()
    assert json.loads((here / "found.json").read_text())["detection"] is None


@slow
def test_pictures_with_prompts_and_without(published, here):
    lines = [
        {"image": f"pictures/{place}.png", "caption": PROMPTS[place % 2], "memorized": place % 2}
        for place in (0, 1, 2, 1)
    ]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = str(published("sd1"))
    command = ["detect", "--model", model, *QUICK]
    assert main([*command, "--images", "pairs.jsonl", "--out", "a.csv"]) == 0
    with_prompts, summary = rows_of("a.csv"), json.loads((here / "a.json").read_text())
    assert "score_cfg_norm_encoded" in with_prompts[0]
    assert 0 <= summary["detection"]["flipd"]["auroc"]["value"] <= 1
    sd = pretrained.load(model)
    image = asked.picture(here / "pictures" / "1.png", (16, 16, 3))
    latent = sd.encode(image)
    residual = mem.score_norm(sd.denoiser(PROMPTS[1]), latent, summary["sigma"])
    assert column(with_prompts, "score_residual")[1] == pytest.approx(-float(residual), rel=1e-4)
    assert main([*command, "--images", "pictures", "--out", "b.csv"]) == 0
    without = rows_of("b.csv")
    assert len(without) == 3
    assert "score_flipd_unconditional" not in without[0]
    assert not (here / "b.images").exists()
    residual = mem.score_norm(sd.denoiser(), latent, summary["sigma"])
    assert column(without, "score_residual")[1] == pytest.approx(-float(residual), rel=1e-4)


@slow
@pytest.mark.parametrize(
    ("kind", "prompts"), [("xl", PROMPTS), ("sd3", PROMPTS), ("dit", ["0", "2"])]
)
def test_other_pipelines(published, here, kind, prompts):
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    model = published(kind)
    command = ["detect", "--model", str(model), "--prompts", "prompts.jsonl", "--out",
               "found.csv", *QUICK]  # fmt: skip
    if kind == "sd3":  # as published, with a third text encoder
        index = json.loads((model / "model_index.json").read_text())
        index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
        (model / "model_index.json").write_text(json.dumps(index))
        assert main(command) == 2
        command.append("--skip-t5")
    assert main(command) == 0
    rows = rows_of("found.csv")
    assert np.all(np.isfinite(column(rows, "score_flipd")))
    assert np.all(column(rows, "score_cfg_norm") > 0)


def test_a_picture_is_fitted(here):
    flat = np.zeros((20, 40, 3), np.uint8)
    flat[:, 10:30] = 255  # the middle square
    Image.fromarray(flat).save("wide.png")
    np.testing.assert_array_equal(asked.picture(here / "wide.png", (8, 8, 3)), 1)
    assert asked.picture(here / "wide.png", (8, 8, 1)).shape == (8, 8, 1)


BAD = [
    ([], "--prompts FILE, --images FOLDER"),
    (["--prompts", "prompts.jsonl", "--images", "pictures"], "leave one out"),
    (["--prompts", "prompts.jsonl", "--data", "digits"], "--data is of models of"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--images", "prompts.jsonl"], "line 1 has no `image`"),
    (["--images", "empty"], "holds no pictures"),
    (["--prompts", "prompts.jsonl", "--generate", "0"], "--generate is 0"),
    (["--prompts", "prompts.jsonl", "--probes", "1"], "--probes is 1"),
    (["--prompts", "prompts.jsonl", "--curve-levels", "1"], "no curve"),
    (["--prompts", "prompts.jsonl", "--detectors", "nothing"], "unknown detector 'nothing'"),
    (["--prompts", "prompts.jsonl", "--detectors", "spikiness"], "`spikiness` looks inside"),
    (["--prompts", "prompts.jsonl", "--detectors", "png_bytes"], "asks the model"),
    (["--images", "pictures", "--detectors", "cfg_norm"], "there are none"),
    (["--prompts", "prompts.jsonl", "--guidance-scale", "inf"], "must be finite"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(published, here, capsys, options, message):
    (here / "empty").mkdir()
    command = ["detect", "--model", str(published("sd1")), "--out", "found.csv", *options]
    assert main(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (here / "found.csv.work").exists()


def test_a_model_without_prompts_is_not_asked_for_any(published, here, capsys):
    command = ["detect", "--model", str(published("ddpm")), "--out", "found.csv"]
    assert main([*command, "--prompts", "prompts.jsonl"]) == 2
    assert "takes no prompts" in " ".join(capsys.readouterr().err.split())


def test_options_of_published_pipelines_are_refused_for_others(here, capsys):
    command = ["detect", "--model", "trained", "--data", "digits", "--out", "found.csv"]
    assert main([*command, "--curve-levels", "0"]) == 2
    assert "--curve-levels is of published pipelines" in " ".join(capsys.readouterr().err.split())


def test_what_is_there_is_not_replaced(published, here, capsys):
    (here / "found.json").write_text("{}")
    command = ["detect", "--model", str(published("sd1")), "--out", "found.csv"]
    assert main([*command, "--prompts", "prompts.jsonl"]) == 2
    assert "choose another --out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        ("[1]", "line 2 is no object"),
        ("{}", "line 2 has no `prompt`"),
        ('{"prompt": 1}', "line 2 has a `prompt` that is no string"),
        ('{"prompt": "a", "image": []}', "line 2 has a `image` that is no string"),
        ('{"prompt": "a", "memorized": "yes"}', "neither true nor false"),
        ('"' + "a" * (1 << 20) + '"', "line 2 is longer than"),
    ],
)
def test_wrong_lines(here, line, message):
    path = here / "lines.jsonl"
    path.write_text(f'"a dog"\n{line}\n')
    with pytest.raises(ValueError, match=message):
        asked.read_prompts(path)


def test_lines(here):
    path = here / "lines.jsonl"
    path.write_text('"a dog"\n\n{"caption": "a cat", "memorized": 0, "url": "x"}\n')
    assert asked.read_prompts(path) == [
        asked.Asked("a dog", None, None), asked.Asked("a cat", None, False)
    ]  # fmt: skip
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        asked.read_prompts(path)
    path.write_text('{"image": "nowhere.png"}')
    with pytest.raises(ValueError, match=r"nowhere\.png, which is not there"):
        asked.read_pictures(path)


@given(st.lists(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()), max_size=5))
@settings(deadline=None)
def test_any_lines_are_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    found, said = [], "--prompts"
    try:
        found = asked.read_prompts(path)
    except ValueError as error:
        said = str(error)
    assert "--prompts" in said
    assert all(isinstance(row.prompt, str) for row in found)
