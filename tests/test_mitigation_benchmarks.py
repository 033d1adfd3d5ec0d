"""What the benchmarks of mitigation compute beside the library's own functions."""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmh_jax import sample


@pytest.fixture(scope="module")
def steering():
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        pytest.importorskip("matplotlib")
        import steering.conditional
        import steering.prompt_methods
        import steering.prompts
        import steering.quality
        import steering.speed

        yield steering
    finally:
        sys.path.remove(folder)


@struct.dataclass
class Around:
    """A Gaussian around the mean of the tokens, a wider one around 0 without any."""

    tokens: Any = None
    shift: float = 0.0
    scale: float = 1.0
    shape: tuple[int, ...] = struct.field(pytree_node=False, default=(2, 2))

    @property
    def inner(self):
        return self

    def condition(self, cond):
        return self.replace(tokens=cond)

    def __call__(self, x, sigma):
        centre = 0.0 if self.tokens is None else self.tokens.mean(0).reshape(self.shape)
        return centre + (x - centre) / (1 + (1 if self.tokens is None else 4) * sigma**2)


@pytest.fixture(scope="module")
def setting(steering):
    rng = np.random.default_rng(0)
    words = rng.normal(size=(12, 4)).astype(np.float32)
    prompts = words[rng.integers(12, size=(70, 5))]
    return steering.prompts.Setting(
        Around(), prompts[:30], rng.normal(size=(30, 2, 2)).astype(np.float32),
        sample.karras_levels(6, sigma_min=0.02, sigma_max=10.0), words, prompts[30:],
        rng.normal(size=(50, 2, 2)).astype(np.float32), jax.random.key(0), 3,
    )  # fmt: skip


def test_equal_sets_are_of_the_best_quality(steering):
    rng = np.random.default_rng(0)
    pictures = rng.uniform(size=(40, 8, 8)).astype(np.float32) ** 3
    judge = steering.quality.quality(pictures)
    labels = np.asarray(steering.quality.answers(judge.classifier, pictures)[1]).argmax(axis=1)
    found = judge(pictures, labels)
    assert found["Frechet"] < 1e-3
    assert found["precision"] == found["recall"] == found["agreement"] == 1
    assert "agreement" not in judge(pictures)
    grey = judge(np.full((40, 8, 8), 0.5, np.float32) + 0.01 * pictures, (labels + 1) % 10)
    assert grey["Frechet"] > 1
    assert grey["recall"] == 0
    assert grey["agreement"] < 1


def test_total_variation_is_of_what_is_seen(steering):
    columns = np.tile([0.0, 1.0, 0.0, 1.0], (3, 4, 1))
    assert steering.quality.total_variation(columns) == 0.5
    assert steering.quality.total_variation(5 * columns) == 0.5


@pytest.mark.parametrize(
    ("method", "strength"),
    [
        ("tokens: random", 0), ("tokens: CFG norm", 0), ("embedding: CFG norm", 0),
        ("embedding: FLIPD trace", 0), ("noise: sharpness", 0), ("late guidance", np.inf),
        ("rescaled", 0), ("clamped", np.inf), ("LID guidance", 0),
    ],
)  # fmt: skip
def test_a_method_of_no_strength_does_nothing(steering, setting, method, strength):
    method = next(each for each in steering.prompt_methods.METHODS if each.name == method)
    found, none = method.draw(setting, strength), steering.prompt_methods.plain(setting)
    np.testing.assert_allclose(found.samples, none.samples, rtol=1e-4, atol=1e-4)
    assert found.evaluations >= none.evaluations == 22


@pytest.mark.parametrize(
    ("method", "strength"),
    [("tokens: random", 1), ("embedding: CFG norm", 0.9), ("noise: CFG norm", 0.9),
     ("late guidance", 0.3), ("rescaled", 1), ("clamped", -1.0)],
)  # fmt: skip
def test_a_method_of_some_strength_does_something(steering, setting, method, strength):
    method = next(each for each in steering.prompt_methods.METHODS if each.name == method)
    none = steering.prompt_methods.plain(setting)
    assert np.abs(method.draw(setting, strength).samples - none.samples).max() > 0.01


def test_rejection_of_nothing_is_one_try(steering, setting):
    found = steering.prompt_methods.by_rejection(setting, 0)
    # A run, the denoised point at the decision, and the measure there, all of two networks.
    assert found.evaluations == 2 * (11 + 1 + 5)
    assert found.samples.shape == (30, 2, 2)


def test_rewriting_more_tokens_rewrites_those_of_fewer(steering, setting):
    blame = np.tile([0.0, 0, 9, 0, 0], (30, 1)).astype(np.float32)
    changed = []
    for k in range(6):
        tokens = steering.prompts.rewrites(
            setting.prompts, blame, setting.words, jnp.int32(k), key=jax.random.key(0)
        )
        changed.append((tokens != setting.prompts).any(axis=2))
        assert (changed[-1].sum(axis=1) == k).all()
    assert all((more >= fewer).all() for fewer, more in itertools.pairwise(changed))
    assert changed[1][:, 2].mean() > 0.9


def test_stop_levels_are_quantiles_of_normal_runs(steering, setting):
    of = dataclasses.replace(setting)
    values = steering.prompts.of_criterion("CFG norm", 4)[0](
        of.model, of.normal.prompts, *of.at(False, of.normal.prompts, of.normal.noise)
    )
    stops = [float(steering.prompt_methods.stop_level(of, "CFG norm", s)) for s in (0, 0.1, 0.5)]
    assert np.isinf(stops[0])
    np.testing.assert_allclose(stops[1:], np.quantile(values, [0.9, 0.5]), rtol=1e-6)


def test_calls_are_those_of_the_sampler(steering):
    calls, levels = steering.prompts.calls, jnp.array([8.0, 4.0, 2.0, 1.0])
    seen = []

    def denoiser(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma)
        return 0 * x

    jax.block_until_ready(sample.solve(denoiser, jnp.ones(1), levels))
    jax.effects_barrier()
    assert calls(levels) == len(seen) == 7
    assert calls(levels, 2.0, 4.0) == sum(2 <= s <= 4 for s in seen) == 4


def test_held_out_pictures_are_of_the_digits_and_unseen(steering):
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(60, 3, 3)).astype(np.float32)
    labels, wanted = np.arange(60) % 3, np.array([2, 0, 2, 1, 0] * 4)
    found = steering.conditional.held_out(points, labels, points[:20], wanted, 0)
    rows = [int(np.flatnonzero((points == each).all(axis=(1, 2)))[0]) for each in found]
    assert (labels[rows] == wanted).all()
    assert min(rows) >= 20
    assert len(set(rows)) == len(rows)


def test_the_digit_of_a_prompt_is_read(steering):
    conditions = steering.conditional.conditions
    rng, kinds = np.random.default_rng(0), np.arange(50) % 10
    words, _ = conditions.prompts(kinds, kinds == 3, rng)
    vectors = conditions.vocabulary()
    assert np.array_equal(steering.conditional.digits_of(vectors[words], vectors), kinds)


def rows_of(**changed):
    """Two seeds of a table in which everything holds, but for what is changed."""
    none = {"copies": 0.2, "Frechet": 10.0, "agreement": 0.9, "evaluations": 40.0}
    table = {
        ("held-out digits", 0): none | {"copies": 0.0}, ("none", 0): none,
        ("tokens: random", 1): none | {"copies": 0.15},
        ("tokens: CFG norm", 1): none | {"copies": 0.02},
        ("LID rejection", 0.1): none | {"copies": 0.03, "evaluations": 70.0},
    }  # fmt: skip
    for name, values in changed.items():
        key = next(key for key in table if key[0].replace(" ", "_").endswith(name))
        table[key] = table[key] | values
    return [
        {"method": method, "seed": seed, "strength": s} | values | {"copies": values["copies"] + d}
        for (method, s), values in table.items() for seed, d in ((0, -0.01), (1, 0.01))
    ]  # fmt: skip


def test_the_frontier_is_the_mean_over_seeds(steering):
    rows = steering.conditional.frontier(rows_of())
    none = next(row for row in rows if row["method"] == "none")
    assert len(rows) == 5
    assert none["copies"] == pytest.approx(0.2)
    assert none["+- copies"] > 0.01
    assert none["+- Frechet"] == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None), ({"CFG_norm": {"copies": 0.16}}, "CFG norm do not dominate"),
        ({"CFG_norm": {"agreement": 0.8}}, "CFG norm do not dominate"),
        ({"CFG_norm": {"Frechet": 11.0}}, "CFG norm do not dominate"),
        ({"rejection": {"copies": 0.06}}, "removes 70%"),
        ({"rejection": {"agreement": 0.8}}, "agreement 0.800 from 0.900"),
        ({"rejection": {"Frechet": 11.0}}, "no LID guidance"),
        ({"rejection": {"evaluations": 130.0}}, "at 3.2 times"),
    ],
)  # fmt: skip
def test_bars_say_what_does_not_hold(steering, changed, said):
    failures = steering.conditional.bars(steering.conditional.frontier(rows_of(**changed)))
    assert len(failures) == (said is not None)
    assert said is None or said in failures[0]


def test_the_frontier_is_drawn(steering, tmp_path):
    rows = steering.conditional.frontier(rows_of())
    steering.conditional.draw(rows, "by hand", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_samplers_are_timed_in_turn(steering):
    order = []

    def waits(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    found = steering.speed.compared(waits("a", 0.01), waits("b", 0.05), 3)
    assert order == ["a", "b"] * 4
    assert found["ours"] >= 0.01
    assert found["theirs"] >= 0.05
    assert found["ratio"] > 1


def test_speed_is_skipped_without_the_other_side(steering, monkeypatch):
    monkeypatch.setattr(steering.speed.importlib.util, "find_spec", lambda name: None)
    assert steering.speed.run("smoke", 1, Path(), ()) == ({}, [])


def test_both_networks_are_of_one_size(steering):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    model, network = steering.speed.ours(8, (1, 2)), steering.speed.theirs(8, (1, 2))
    mine = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    other = sum(leaf.numel() for leaf in network.parameters())
    assert abs(mine / other - 1) < 0.1


@pytest.mark.parametrize("name", ["DDIM", "DPM-Solver++(2M)"])
def test_both_samplers_ask_as_often(steering, name):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    network, asked = steering.speed.theirs(8, (1, 2)), []
    network.register_forward_hook(lambda *_: asked.append(1))
    found = steering.speed.their_sampler(network, name, 4, 2)()
    times = steering.speed.scheduler(name, 4).timesteps.numpy()
    assert len(asked) == len(times) == 4
    mine = steering.speed.our_sampler(steering.speed.ours(8, (1, 2)), name, times, 2)()
    assert mine.shape == (2, 28, 28, 1)
    assert found.shape == (2, 1, 28, 28)
