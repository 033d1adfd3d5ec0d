"""`mmh-jax train` with networks for images: what it makes, and what it refuses before any work."""

import json

import numpy as np
import pytest

import mmh_jax
from mmh_jax import report, train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "ResidualMLP", "by_label": True}, "needs --network UNet"),
        ({"network": "UNet", "budget": 1.0, "num_steps": 5}, "without --num-steps"),
        ({"network": "UNet", "budget": -1.0}, "must be positive"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report.train_model("digits", tmp_path / "m", seed=0, preset="smoke", **options)
    assert not (tmp_path / "m").exists()


def test_sources_that_do_not_fit(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 3)))
    np.save(tmp_path / "images.npy", np.random.default_rng(0).uniform(size=(50, 8, 8)))
    with pytest.raises(ValueError, match="is for images"):
        report.train_model(tmp_path / "points.npy", tmp_path / "m", seed=0, network="DiT")
    with pytest.raises(ValueError, match="has no labels"):
        report.train_model(
            tmp_path / "images.npy", tmp_path / "m", seed=0, network="UNet", by_label=True
        )


def test_a_transformer_by_label_in_a_budget(tmp_path):
    report.train_model(
        "digits", tmp_path / "m", seed=0, preset="smoke", network="DiT", by_label=True, budget=0.05
    )
    config = train.load_config(tmp_path / "m")
    assert config.network == "DiT"
    assert config.network_options["num_classes"] == 10
    steps = [row["step"] for row in train.read_json_lines(tmp_path / "m" / "metrics.jsonl")]
    assert steps[-1] >= config.training["num_steps"] >= 1
    assert json.loads((tmp_path / "m" / "config.json").read_text())["training"]["budget"] == 0.05
    model = mmh_jax.load(tmp_path / "m")
    x = np.zeros((8, 8), np.float32)
    answers = [model.condition(c)(x, 0.5) for c in (np.int32(3), np.int32(10), None)]
    np.testing.assert_allclose(answers[1], answers[2], rtol=1e-6)
    assert all(np.isfinite(answer).all() for answer in answers)
