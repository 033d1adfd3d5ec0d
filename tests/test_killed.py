"""A training that is killed at any moment continues, and ends with the same parameters."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mmh_jax import train

SCRIPT = """
import dataclasses, sys
from mmh_jax import data, train
recipe = dataclasses.replace(
    train.IMAGE_RECIPES["smoke"], num_steps=int(sys.argv[2]), ema_widths=(0.1,),
    augment=data.augment.shift(1),
)
points = data.load("digits", max_points=320)
# No time between checkpoints: kills come while they are written, too.
train.train_model(
    points.points, recipe, sys.argv[1], seed=0, labels=points.labels, save_every=0.0, keep_every=40,
    progress=lambda step, total, loss: print(step, flush=True),
)
"""


# Rounds of 20 steps: more than any start comes to before its kill, so that all kills take place.
STEPS_PER_KILL = 140


def start(folder, num_steps):
    # Without the cache of compiled programs: killed in the middle of an entry, it would leave half
    # of one to every later process.
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(num_steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow  # each start compiles; test_audit has kills in the default run
@pytest.mark.parametrize("kills", [2, 20])
def test_killed_at_random_moments(kills, tmp_path):
    num_steps = STEPS_PER_KILL * kills
    whole = start(tmp_path / "whole", num_steps)
    assert whole.communicate(timeout=600)[0].split()[-1] == str(num_steps)
    rng, first_steps, num_killed = np.random.default_rng(0), [], 0
    while True:
        process = start(tmp_path / "killed", num_steps)
        if 0 < num_killed < kills and rng.uniform() < 0.2:
            # Before the first round: while it starts, or reads what is there.
            time.sleep(rng.uniform(0, 10))
            process.kill()
        else:
            first_steps.append(int(process.stdout.readline()))
        if num_killed < kills:
            for _ in range(rng.integers(0, 4)):
                process.stdout.readline()
            # Within a round, or in a checkpoint after it.
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
        process.communicate(timeout=600)
        if process.returncode == 0:
            break
        assert process.returncode == -9, "it failed on what was left behind"
        num_killed += 1
    assert num_killed == kills
    assert first_steps == sorted(first_steps)
    assert first_steps[-1] > first_steps[0]
    for name in ("params.safetensors", "config.json"):
        ours, theirs = ((tmp_path / run / name).read_bytes() for run in ("killed", "whole"))
        assert ours == theirs
    rows = train.read_json_lines(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(20, num_steps + 1, 20))
    assert [row["loss"] for row in rows] == [
        row["loss"] for row in train.read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    ]
