"""How many steps of a training fit into so many minutes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmh_jax.train.config import TrainConfig
from mmh_jax.train.loop import Metrics

__all__ = ["steps_within"]


def steps_within(
    budget: float,
    began: float,
    work: Path,
    fingerprint: str,
    config: TrainConfig,
    train: Callable[[TrainConfig], Iterator[Metrics]],
) -> int:
    """How many steps fit into so many minutes since `began`; of a run begun before, as many."""
    if not 0 < budget < float("inf"):
        raise ValueError(f"`train_model(budget={budget})` must be positive, in minutes.")
    path = work.with_name(work.name + "_steps.json")
    try:
        found = json.loads(path.read_text())
        if found["fingerprint"] == fingerprint:
            return int(found["num_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: tried again
    # Short rounds, for a step may take a second; of very short steps too few are promised.
    rounds = train(dataclasses.replace(config, steps_per_round=5, num_steps=10**9))
    compiled = next(rounds).step
    now = start = time.monotonic()
    done = compiled
    while now - start < min(5.0, 3 * budget):
        done, now = next(rounds).step, time.monotonic()
    # The same again to compile with the right number of steps.
    left = 60 * budget - 2 * (start - began) - (now - start)
    num_steps = max(int(left * (done - compiled) / (now - start)), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"fingerprint": fingerprint, "num_steps": num_steps}))
    os.replace(partial, path)
    return num_steps
