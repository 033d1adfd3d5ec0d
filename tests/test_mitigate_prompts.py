"""`mmh-jax mitigate` on published pipelines: its rows are what the library says of its pictures."""

import csv
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained_folders as folders
import pytest
from PIL import Image
from test_rewriter import completion, ok, server  # noqa: F401

from mmh_jax import linalg, mitigation, plotting, pretrained
from mmh_jax import memorization as mem
from mmh_jax.cli import main
from mmh_jax.denoise import Guided
from mmh_jax.lid import flipd
from mmh_jax.pretrained.run import levels
from mmh_jax.report import PromptPlan, mitigate_prompts, prompted, reworded, trials
from mmh_jax.report.changed import Trial
from mmh_jax.report.reworded import Words

pytestmark = pytest.mark.xdist_group("prompts")  # one process, so that the fixtures run once

PROMPTS = folders.PROMPTS
SEED, STEPS, PROBES, NUM = 3, 4, 2, 2
SMALL = {"num_steps": STEPS, "probes": PROBES, "generate": NUM, "num_tokens": (2,)}
WAYS = ("tokens", "random", "late", "weaker")  # what takes no long to compile
SMALL |= {"optimise_steps": (2,), "begins": (0.6,), "scales": (1.0,)}
NORM = jax.jit(mem.cfg_norm)


@jax.jit
def DIMENSION(model, x, sigma, key):  # noqa: N802
    return flipd(model, x, sigma, trace=linalg.rademacher(PROBES), key=key).value


def guided(model, condition, scale=7.5, high=np.inf, outside=1.0):
    """Of arrays, so that all are one program."""
    numbers = (jnp.float32(value) for value in (scale, 0.0, high, outside))
    return Guided(model.denoiser().condition(condition), model.denoiser(), *numbers)


def write_prompts(folder, lines):
    path = Path(folder) / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def finished(published, tmp_path_factory):
    """A run on Stable Diffusion 1, and the pieces of it."""
    root = tmp_path_factory.mktemp("run")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    Image.fromarray(pixels).save(root / "trained.png")
    lines = [{"prompt": PROMPTS[0], "memorized": True, "image": "trained.png"}]
    lines += [{"prompt": PROMPTS[1], "memorized": False}]
    plan = PromptPlan(write_prompts(root, lines), **SMALL | {"ways": WAYS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompted.shutil, "rmtree", lambda *a, **k: None)
        summary = mitigate_prompts(published("sd1"), root / "out", plan, seed=SEED)
    return root / "out", summary


def rows_of(out):
    with (Path(out) / "table.csv").open() as file:
        return list(csv.DictReader(file))


def noise_of(number, shape, num=NUM):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), number)
    return np.asarray(jax.random.normal(key, (num, *shape)))


def first(model, noise):
    """Where the sampler starts, and its level: the t of the scheduler is known by its level."""
    sigma = levels(model.process, STEPS)[0][0]
    return noise / model.process.schedule.alpha(model.process.schedule.time(sigma)), sigma


def measured(model, condition, latents, noise, number):
    """CFG norm and FLIPD by hand."""
    with_it, without = model.denoiser().condition(condition), model.denoiser()
    start, sigma = first(model, noise)
    t = 0.01 * model.process.num_steps / model.process.time_scale
    low = float(model.process.schedule.sigma(t))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 1), number)
    keys = jax.random.split(key, len(latents))
    return (
        np.mean([NORM(with_it, without, x, sigma) for x in start]),
        np.mean([DIMENSION(with_it, x, low, k) for x, k in zip(latents, keys, strict=True)]),
    )


def pictures_of(model, latents):
    return np.stack([np.asarray(model.decode(each)) for each in latents])


def shown(out, name):
    files = sorted((out / "pictures").glob(f"{name}_?.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]) / 255


def kept(out, folder, name):
    return np.load(out / ".work" / folder / f"{name}.npy")


def test_plain_is_the_pipelines_sampler_and_rows_are_the_librarys(finished, loaded):
    out, summary = finished
    model, rows = loaded("sd1"), rows_of(out)
    assert [row["way"] for row in rows] == [
        "plain", "tokens", "random", "late", "weaker"
    ] * 2  # fmt: skip
    for number, prompt in enumerate(PROMPTS):
        noise = noise_of(number, model.shape)
        latents = model.sample(prompt, noise=noise, num_steps=STEPS)
        np.testing.assert_allclose(kept(out, "latents", f"{number:05d}_plain"), latents, atol=1e-4)
        pictures = pictures_of(model, latents)
        np.testing.assert_allclose(shown(out, f"{number:05d}_plain"), pictures, atol=0.6 / 255)
        row = rows[5 * number]
        norm, dimension = measured(model, model.embed(prompt), latents, noise, number)
        assert float(row["cfg_norm"]) == pytest.approx(norm, rel=1e-4)
        assert float(row["flipd"]) == pytest.approx(dimension, rel=1e-4)
        assert float(row["radius"]) == pytest.approx(float(mem.pairwise_radius(pictures)), rel=1e-4)
        assert float(row["cosine"]) == pytest.approx(1)
        assert float(row["to_plain"]) == 0
        assert row["changed"] == row["blamed"] == row["strength"] == ""
        assert float(row["evaluations"]) == 2 * (STEPS + 1)  # and the last level, of t = 0
    assert rows[0]["memorized"] == "True"
    # The training picture, its middle rows, at the size of the pipeline's.
    trained = np.asarray(Image.open(out.parent / "trained.png"))[2:18] / 255
    model_pictures = pictures_of(model, kept(out, "latents", "00000_late_0.6"))
    each = [float(mem.tiled_distance(one, trained)) for one in model_pictures]
    late = next(row for row in rows if row["way"] == "late")
    assert [float(v) for v in late["to_image"].split(" | ")] == pytest.approx(each, rel=1e-4)
    assert rows[5]["to_image"] == ""
    assert summary["num_prompts"] == 2
    for name, numbers in {"rows": [0, 1], "memorized": [0], "others": [1]}.items():
        for place, mean in enumerate(summary[name]):
            own = [rows[5 * number + place] for number in numbers]
            assert mean["way"] == own[0]["way"]
            for field in ("cfg_norm", "flipd", "radius", "cosine", "to_plain", "evaluations"):
                expected = np.mean([float(row[field]) for row in own])
                assert mean[field] == pytest.approx(expected, rel=1e-5)
    assert summary["rows"][3]["to_image"] == pytest.approx(np.mean(each), rel=1e-4)
    assert summary["others"][3]["to_image"] is None
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_late_and_weaker_guidance_from_the_same_noise(finished, loaded):
    out, _ = finished
    model, prompt = loaded("sd1"), PROMPTS[1]
    noise = noise_of(1, model.shape)
    weaker = model.sample(prompt, noise=noise, num_steps=STEPS, guidance_scale=1.0)
    np.testing.assert_allclose(kept(out, "latents", "00001_weaker_1"), weaker, atol=1e-4)
    high = model.process.schedule.sigma(600.0)
    denoiser = guided(model, model.embed(prompt), high=high, outside=0.0)
    late = model.sample(None, noise=noise, num_steps=STEPS, denoiser=denoiser)
    np.testing.assert_allclose(kept(out, "latents", "00001_late_0.6"), late, atol=1e-4)
    row = next(row for row in rows_of(out)[5:] if row["way"] == "weaker")
    plain = pictures_of(model, kept(out, "latents", "00001_plain"))
    pairs = zip(pictures_of(model, weaker), plain, strict=True)
    expected = np.mean([mem.tiled_distance(*pair) for pair in pairs])
    assert float(row["to_plain"]) == pytest.approx(expected, rel=1e-3)


def test_tokens_are_blamed_replaced_and_encoded_again(finished, loaded):
    out, _ = finished
    model, rows = loaded("sd1"), rows_of(out)
    tokenizer = model.texts[0].tokenizer
    for number, prompt in enumerate(PROMPTS):
        noise = noise_of(number, model.shape)
        blame = kept(out, "changes", f"{number:05d}_blame")  # by hand: below, slow
        before, end = tokenizer(prompt), 1 + len(tokenizer.encode(prompt))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 2), number)
        key = jax.random.split(jax.random.fold_in(key, 0))[0]
        allowed = (np.arange(77) > 0) & (np.arange(77) < end)
        places = np.sort(mitigation.choose_tokens(blame, 2, key=key, allowed=allowed))
        for way in ("tokens", "random"):
            row = next(row for row in rows[5 * number :] if row["way"] == way)
            text = (out / ".work" / "changes" / f"{number:05d}_{way}_2.json").read_text()
            [found] = json.loads(text)["found"]
            [ids] = np.asarray(found["ids"])
            changed = np.flatnonzero(ids != before)
            assert len(changed) == 2
            assert np.all((changed > 0) & (changed < end))
            assert not set(ids[changed]) & tokenizer.special_ids
            assert row["blamed"] == " | ".join(tokenizer.text([before[at]]) for at in changed)
            assert row["changed"] == tokenizer.text(ids[1:end])
            if way == "tokens":
                assert changed.tolist() == places.tolist()
            encoding = model.texts[0].of_ids(ids)
            pooled = np.asarray(encoding.pooled), np.asarray(model.texts[0](prompt).pooled)
            cosine = pooled[0] @ pooled[1] / np.prod([np.linalg.norm(each) for each in pooled])
            assert float(row["cosine"]) == pytest.approx(cosine, rel=1e-5)
            latents = kept(out, "latents", f"{number:05d}_{way}_2_0")
            norm, dimension = measured(model, encoding.last, latents, noise, number)
            assert float(row["cfg_norm"]) == pytest.approx(norm, rel=1e-4)
            assert float(row["flipd"]) == pytest.approx(dimension, rel=1e-4)
            # An attribution is 2 evaluations with a gradient, shared by the pictures.
            extra = 6 / NUM if way == "tokens" else 0
            assert float(row["evaluations"]) == 2 * (STEPS + 1) + extra


@pytest.mark.slow
def test_an_embedding_moves_as_the_library_moves_it(published, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted.shutil, "rmtree", lambda *a, **k: None)
    out, prompts = tmp_path / "out", write_prompts(tmp_path, PROMPTS[:1])
    plan = PromptPlan(prompts, **SMALL | {"ways": ("embedding",)})
    mitigate_prompts(published("sd1"), out, plan, seed=SEED)
    model, noise = loaded("sd1"), noise_of(0, loaded("sd1").shape)
    start, sigma = first(model, noise)
    moved = jax.jit(
        lambda m, c, x, s: (
            mitigation.optimise_condition(
                m, c, x, s, criterion=mem.cfg_norm, optimizer=optax.adamw(0.05), num_steps=2
            ).value
        )
    )(model.denoiser(), model.embed(PROMPTS[0]), start[0], sigma)
    np.testing.assert_allclose(kept(out, "changes", "00000_embedding_2"), moved, atol=1e-3)
    row = next(row for row in rows_of(out) if row["way"] == "embedding")
    norm, _ = measured(model, moved, noise[:1], noise, 0)
    assert float(row["cfg_norm"]) == pytest.approx(norm, rel=1e-2)
    assert float(row["cfg_norm"]) < float(rows_of(out)[0]["cfg_norm"])
    assert float(row["evaluations"]) == 2 * (STEPS + 1) + 3 * 6 / NUM
    latents = model.sample(
        None, noise=noise, num_steps=STEPS, denoiser=guided(model, moved)
    )  # fmt: skip
    np.testing.assert_allclose(kept(out, "latents", "00000_embedding_2"), latents, atol=2e-2)


def test_the_figure_is_drawn_of_what_is_memorized(finished, monkeypatch):
    out, summary = finished
    with Image.open(out / "tradeoff.png") as image:
        assert np.ptp(np.asarray(image)) > 0
    figure = plotting.tradeoff_figure(summary["memorized"])
    assert len(figure.axes) == 3
    assert len(plotting.tradeoff_figure(summary["others"]).axes) == 2
    drawn = []
    monkeypatch.setattr(plotting, "tradeoff_figure", lambda rows: drawn.append(rows) or figure)
    for groups in (summary, {"rows": summary["rows"]}):
        prompted._draw(out.parent / "again.png", groups)
    assert drawn == [summary["memorized"], summary["rows"]]
    [plain] = [line for line in figure.axes[0].lines if line.get_label() == "plain"]
    mean = summary["memorized"][0]
    assert [*plain.get_xdata(), *plain.get_ydata()] == [mean["cosine"], mean["cfg_norm"]]


def test_a_killed_run_goes_on(finished, published, tmp_path, monkeypatch):
    out, _ = finished
    settings = json.loads((out / "summary.json").read_text())["settings"]
    plan = PromptPlan(Path(settings["prompts"]), **SMALL | {"ways": WAYS})
    seen, whole = [], trials.Trials.row

    def killed(self, case, trial, plain):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append((case.number, trial.name))
        return whole(self, case, trial, plain)

    monkeypatch.setattr(trials.Trials, "row", killed)
    run = {"seed": SEED}
    with pytest.raises(KeyboardInterrupt):
        mitigate_prompts(published("sd1"), tmp_path / "out", plan, **run)
    assert not (tmp_path / "out" / "table.csv").exists()
    with pytest.raises(ValueError, match="unfinished mitigation with another seed"):
        mitigate_prompts(published("sd1"), tmp_path / "out", plan, seed=SEED + 1)
    done = seen.copy()
    seen[:] = [None] * 100
    mitigate_prompts(published("sd1"), tmp_path / "out", plan, **run)
    assert not set(seen[100:]) & set(done)
    assert len(seen[100:]) + len(done) == 10
    assert not (tmp_path / "out" / ".work").exists()
    for path in (out / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "pictures" / path.name).read_bytes()
    assert (tmp_path / "out" / "table.csv").read_text() == (out / "table.csv").read_text()
    with pytest.raises(ValueError, match="finished mitigation; pass --overwrite"):
        mitigate_prompts(published("sd1"), tmp_path / "out", plan, **run)
    less = PromptPlan(plan.prompts, **SMALL | {"ways": ("late",)})
    mitigate_prompts(published("sd1"), tmp_path / "out", less, **run, overwrite=True)
    names = {path.name[6:-6] for path in (tmp_path / "out" / "pictures").iterdir()}
    assert names == {"plain", "late_0.6"}


def test_what_is_not_finite_stays_visible():
    rows = [{"way": "late", "strength": 0.6, "to_plain": 1.0, "cfg_norm": 2.0, "flipd": 1.0}]
    rows += [{"way": "late", "strength": 0.6, "to_plain": None, "cfg_norm": 3.0, "flipd": None}]
    rows[0]["to_image"], rows[1]["to_image"] = [0.1, 0.3], [None, None]
    [mean] = prompted._means(rows)
    assert (mean["num"], mean["not_finite"], mean["flipd"], mean["cfg_norm"]) == (2, 1, 1.0, 2.5)
    assert (mean["to_image"], mean["radius"]) == (0.2, None)
    assert prompted._columns(rows)["to_image"] == ["0.1 | 0.3", " | "]


def test_a_language_model_rewrites_words(published, tmp_path, server, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("MMH_JAX_CHAT_KEY", "secret-of-mine")
    lines = [{"prompt": " The DOG  isn't sleeping!"}]
    server.answers = [ok(completion(json.dumps(["a  cat sleeps", "a bird sings"])))]
    arguments = ["mitigate", "--model", str(published("sd1")), "--out", str(tmp_path / "out")]
    arguments += ["--prompts", str(write_prompts(tmp_path, lines)), "--ways", "tokens"]
    arguments += ["--num-tokens", "1", "--rewriter", "chat", "--chat-url", server.url]
    arguments += ["--chat-model", "m", "--rewrites", "2", "--generate", str(NUM)]
    arguments += ["--num-steps", str(STEPS), "--probes", str(PROBES), "--seed", str(SEED)]
    whole = trials.Trials.row

    def killed(self, case, trial, plain):
        row = whole(self, case, trial, plain)
        if trial.rewrite == 0:
            raise KeyboardInterrupt
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.Trials, "row", killed)
        assert main(arguments) == 130
    server.answers = [ok("down", 400)]
    assert main(arguments) == 0, capsys.readouterr().err  # the answer was kept
    [(_, headers, body)] = server.seen
    assert headers["Authorization"] == "Bearer secret-of-mine"
    task = json.loads(body["messages"][-1]["content"])
    assert task["prompt"] == "The DOG isn't sleeping!"
    assert task["count"] == 2
    rows = rows_of(tmp_path / "out")[1:]
    assert [row["changed"] for row in rows] == ["a cat sleeps", "a bird sings"]
    [avoided] = task["avoid"]
    assert rows[0]["blamed"] in avoided.lower()
    model = pretrained.load(published("sd1"))
    latents = model.sample("a bird sings", noise=noise_of(0, model.shape), num_steps=STEPS)
    np.testing.assert_allclose(
        shown(tmp_path / "out", "00000_tokens_1_1"), pictures_of(model, latents), atol=0.6 / 255
    )
    encodings = [np.asarray(model.texts[0](p).pooled) for p in ("a bird sings", lines[0]["prompt"])]
    cosine = encodings[0] @ encodings[1] / np.prod([np.linalg.norm(each) for each in encodings])
    assert float(rows[1]["cosine"]) == pytest.approx(cosine, rel=1e-5)
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.is_dir() or b"secret-of-mine" not in path.read_bytes()
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "tokens, 1 CFG norm" in printed


def words(model, prompt):
    return Words(model, prompt)


def test_what_may_be_replaced_is_neither_special_nor_padding(loaded):
    model = loaded("sd1")
    tokenizer = model.texts[0].tokenizer
    allowed = words(model, "a dog").allowed
    num = len(tokenizer.encode("a dog"))
    assert np.flatnonzero(allowed).tolist() == list(range(1, 1 + num))
    assert not words(model, "").allowed.any()
    mark = "<|startoftext|>a<|endoftext|>dog"
    assert np.flatnonzero(words(model, mark).allowed).tolist() == [2]
    long = words(model, "the sea " * 60)
    assert np.flatnonzero(long.allowed).tolist() == list(range(1, 76))
    blame = np.where(np.arange(77) == 2, 1.0, 0.0)
    for seed in range(5):
        key = jax.random.key(seed)
        assert words(model, "a dog").choose(blame, 99, key=key) == list(range(1, 1 + num))
        assert set(long.choose(np.zeros(77), 8, key=key)) <= set(range(1, 76))
    frequent = [words(model, "a dog").choose(blame, 1, key=jax.random.key(s))[0] for s in range(20)]
    assert np.mean(np.equal(frequent, 2)) > 0.9


def test_tokens_left_out_close_up(loaded):
    model = loaded("sd1")
    tokenizer = model.texts[0].tokenizer
    prompt = words(model, "a small dog")
    ids = tokenizer.encode("a small dog")
    [found] = prompt.without([1, 3])
    assert found.tolist() == tokenizer.padded([ids[1], *ids[3:]]).tolist()
    long = words(model, "the " * 100)
    [found] = long.without([5, 6])
    inner = tokenizer.encode("the " * 100)[:75]
    assert found.tolist() == tokenizer.padded(inner[2:]).tolist()


def test_words_of_tokens(loaded):
    model = loaded("sd1")
    text = " A  small\tsupercalifragilistic\u00a0dog isn't here "
    there, places = words(model, text).words_at([1])
    assert there == ["A", "small", "supercalifragilistic", "dog", "isn't", "here"]
    assert places == [0]
    pieces = [model.texts[0].tokenizer.encode(word) for word in there]
    at = 1
    for number, piece in enumerate(pieces):
        for place in range(at, at + len(piece)):
            assert words(model, text).words_at([place])[1] == [number]
        at += len(piece)


def test_the_tokenizer_by_word_and_back(loaded):
    tokenizer = loaded("sd1").texts[0].tokenizer
    for text in folders.make_tokenizer.TEXTS:
        ids = [number for _, own in tokenizer.by_word(text) for number in own]
        assert ids == tokenizer.encode(text)
        np.testing.assert_array_equal(tokenizer.padded(ids[:75]), tokenizer(text))
    assert (
        tokenizer.text(tokenizer.encode("Ünï 二 <|endoftext|> cat")) == "ünï 二 <|endoftext|> cat"
    )
    assert tokenizer.text(tokenizer.encode("二")[:1]) == "\ufffd"
    with pytest.raises(ValueError, match="has 76; there is room for 75"):
        tokenizer.padded([0] * 76)


def same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "xl", "sd3"))]
)
def test_a_prompt_by_its_ids(loaded, kind):
    model = loaded(kind)
    same(model.embed_ids(list(words(model, PROMPTS[0]).ids)), model.embed(PROMPTS[0]))


def test_where_tokenizers_differ_nothing_is_replaced(loaded):
    model = loaded("sd1")
    [text] = model.texts
    other = pretrained.Tokenizer({"a</w>": 0}, {}, begin=1, end=2, pad=2, unknown=2)
    both = type(model)(
        model.vae, model.process, model.shape, (text, text._replace(tokenizer=other)), model.unet
    )
    with pytest.raises(ValueError, match="different vocabularies"):
        reworded.check_tokenizers(both)
    reworded.check_tokenizers(model)


def test_trials_are_ways_at_strengths(tmp_path):
    plan = PromptPlan(tmp_path, ways=("noise", "tokens", "late"), num_tokens=(1, 3), rewrites=2)
    assert [trial.name for trial in plan.trials()] == [
        "noise_20", "tokens_1_0", "tokens_1_1", "tokens_3_0", "tokens_3_1", "late_0.8", "late_0.6"
    ]  # fmt: skip
    assert Trial("plain").name == "plain"


FAULTS = {
    "no prompts": ([], "published pipeline; pass --prompts FILE"),
    "num": (["--prompts", "p", "--num", "30"], "--num is of models of `mmh-jax train`"),
    "scale": (["--prompts", "p", "--scale", "3"], "--scale is of models of"),
    "way": (["--prompts", "p", "--ways", "lid"], "--ways 'lid' is unknown; there are tokens"),
    "twice": (["--prompts", "p", "--ways", "late", "late"], "--ways: name at least one, and none"),
    "begins": (["--prompts", "p", "--begins", "4"], "--begins has 4; of prompts it is a share"),
    "strengths": (["--prompts", "p", "--scales", "1", "1"], "--scales are .1.0, 1.0.; name at"),
    "tokens": (["--prompts", "p", "--num-tokens", "0"], "--num-tokens is 0; it must be at least 1"),
    "generate": (["--prompts", "p", "--generate", "0"], "--generate is 0"),
    "probes": (["--prompts", "p", "--probes", "1"], "--probes is 1; it must be at least 2"),
    "finite": (["--prompts", "p", "--guidance-scale", "inf"], "guidance scale is inf"),
    "chat": (["--prompts", "p", "--rewriter", "chat"], "pass --chat-url ADDRESS and --chat-model"),
    "url": (["--prompts", "p", "--chat-url", "x"], "are of --rewriter chat; leave them out"),
    "address": (
        ["--prompts", "p", "--rewriter", "chat", "--chat-url", "x", "--chat-model", "m"],
        "no address of http or https",
    ),
    "missing": (["--prompts", "there.jsonl"], "there.jsonl: No such file"),
    "image": (["--prompts", "image.jsonl"], "names nowhere.png, which is not there"),
    "line": (["--prompts", "bad.jsonl"], "line 1 has no `prompt`"),
    "seed": (["--prompts", "p", "--seed", "-1"], "--seed is -1"),
    "empty": (["--prompts", "empty.jsonl"], "has no token to replace"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said(name, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p").write_text('"a dog"\n')
    Path("image.jsonl").write_text('{"prompt": "a dog", "image": "nowhere.png"}\n')
    Path("bad.jsonl").write_text('{"image": "p"}\n')
    Path("empty.jsonl").write_text('""\n')
    more, message = FAULTS[name]
    assert main(["mitigate", "--model", str(published("sd1")), "--out", "out", *more]) == 2
    import re

    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not Path("out", "summary.json").exists()


def test_models_of_another_kind_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p").write_text('"a dog"\n')
    for kind in ("DDPMPipeline", "DiTPipeline"):
        Path(kind).mkdir()
        Path(kind, "model_index.json").write_text(json.dumps({"_class_name": kind}))
        assert main(["mitigate", "--model", kind, "--out", "out", "--prompts", "p"]) == 2
        assert f"{kind} is a {kind}, which takes no prompts" in capsys.readouterr().err
    Path("trained").mkdir()
    for more in (["--prompts", "p"], ["--ways", "late"], ["--skip-t5"], ["--chunk-size", "2"]):
        assert main(["mitigate", "--model", "trained", "--out", "out", *more]) == 2
        assert f"{more[0]} is of published pipelines" in capsys.readouterr().err
    assert main(["mitigate", "--model", str(tmp_path), "--out", ".", "--prompts", "p"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["cfg_norm", "sharpness", "score_norm", "flipd"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl", "sd3"])
def test_all_pipelines_and_criteria(published, loaded, tmp_path, kind, criterion, monkeypatch):
    """Attribution, embedding and noise by hand, through the context alone."""
    monkeypatch.setattr(prompted.shutil, "rmtree", lambda *a, **k: None)
    out, prompts = tmp_path / "out", write_prompts(tmp_path, [PROMPTS[0]])
    ways = ("tokens", "embedding", "noise")
    plan = PromptPlan(prompts, **SMALL | {"ways": ways, "criterion": criterion})
    mitigate_prompts(published(kind), out, plan, seed=SEED)
    model, prompt = loaded(kind), PROMPTS[0]
    noise, condition = noise_of(0, model.shape), model.embed(prompt)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 4), 0)
    start, sigma = first(model, noise)
    unit = 1.0
    if kind == "sd3":
        unit = (1 + sigma) ** {"cfg_norm": 1, "score_norm": 1, "sharpness": 4, "flipd": 0}[
            criterion
        ]
    trace = linalg.rademacher(PROBES, chunk_size=1)
    by_name = {
        "cfg_norm": mem.cfg_norm, "sharpness": mem.sharpness,
        "score_norm": mitigation.score_norm_criterion,
        "flipd": mitigation.flipd_criterion(trace=trace, key=key),
    }  # fmt: skip

    def scaled(*of):
        return unit * by_name[criterion](*of)

    x, level = start[0], sigma
    if criterion == "flipd":
        from mmh_jax import sample

        sigmas = levels(model.process, STEPS)[0]
        path = sample.solve_path(model.denoiser(prompt, 7.5), x, sigmas, step=sample.ddim())
        x, level = path.states[3], sigmas[3]  # of 4 steps, after .8 of them

    def bound(tokens):
        if not hasattr(condition, "context"):
            return model.denoiser().condition(tokens)
        context = condition.context.at[:77].set(tokens)
        return model.denoiser().condition(condition._replace(context=context))

    tokens = getattr(condition, "context", condition)[:77]

    def blamed(tokens):
        return scaled(bound(tokens), model.denoiser(), x, level)

    blame = jnp.linalg.norm(jax.jit(jax.grad(blamed))(tokens), axis=1)
    found = kept(out, "changes", "00000_blame")
    np.testing.assert_allclose(found, blame, rtol=2e-2, atol=1e-3 * float(blame.max()))
    assert found.shape == (77,)
    row = {row["way"]: row for row in rows_of(out)}
    # Moved from the same point by the same rule, the criterion is lower, and the rest is as it was.
    moved = kept(out, "changes", "00000_embedding_2")
    assert moved.shape == tokens.shape
    assert np.isfinite(moved).all()
    assert 0.01 < np.abs(moved - tokens).max() < 0.2
    assert float(blamed(jnp.asarray(moved))) < float(blamed(tokens))
    z = kept(out, "changes", "00000_noise_2")
    np.testing.assert_allclose(
        np.linalg.norm(z.reshape(NUM, -1), axis=1),
        np.linalg.norm(noise.reshape(NUM, -1), axis=1), rtol=1e-4,
    )  # fmt: skip
    assert 0.01 < np.abs(z - noise).max() < 0.3
    if criterion in ("cfg_norm", "sharpness"):
        run = jax.jit(lambda x: scaled(model.denoiser(prompt), model.denoiser(), x, sigma))
        before, after = [np.mean([run(x) for x in first(model, z)[0]]) for z in (noise, z)]
        assert after < before
    norm, dimension = measured(model, condition, kept(out, "latents", "00000_noise_2"), z, 0)
    assert float(row["noise"]["cfg_norm"]) == pytest.approx(norm, rel=1e-3)
    assert float(row["noise"]["flipd"]) == pytest.approx(dimension, rel=1e-3)
    latents = model.sample(prompt, noise=z, num_steps=STEPS)
    np.testing.assert_allclose(kept(out, "latents", "00000_noise_2"), latents, atol=1e-3)
    [ids] = json.loads((out / ".work" / "changes" / "00000_tokens_2.json").read_text())["found"]
    ids = np.asarray(ids["ids"])
    before = np.stack([text.tokenizer(prompt) for text in model.texts])
    assert len(ids) == len(model.texts)
    assert all((np.flatnonzero(one != two) == np.flatnonzero(ids[0] != before[0])).all()
               for one, two in zip(ids, before, strict=True))  # fmt: skip
    assert len(np.flatnonzero(ids[0] != before[0])) == 2
    shutil.rmtree(out / "pictures", ignore_errors=True)
