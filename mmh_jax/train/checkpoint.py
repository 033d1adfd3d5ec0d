"""Checkpoints of a running training, with orbax: written under a temporary name and renamed.

A run that is killed at any moment leaves at least its last finished checkpoint.  Each carries a
fingerprint of the run, so that a folder is never continued with other data or settings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmh_jax.train.loop import TrainConfig, TrainState

__all__ = ["Checkpoints", "run_fingerprint"]


def run_fingerprint(points: Any, config: TrainConfig, **settings: Any) -> str:
    """A hash of the data, the training settings and whatever else decides the result."""
    points = np.ascontiguousarray(points)
    digest = hashlib.sha256(points.tobytes())
    what: list[Any] = [points.shape, str(points.dtype), repr(config), settings]
    if config.symmetry > 0:
        what.append(config.symmetry)
    text = json.dumps(what, default=repr)
    digest.update(text.encode())
    return digest.hexdigest()


class Checkpoints:
    """A folder of training states.  Use it as a context manager.

    Args:
        folder: where to keep them; made if it does not exist.
        fingerprint: identifies the run (`run_fingerprint`).
        keep: how many of the latest to keep.
    """

    def __init__(self, folder: str | Path, fingerprint: str, *, keep: int = 2):
        # Here, for it takes a tenth of the time of `import mmh_jax` and only training needs it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._fingerprint = fingerprint
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Write the state; a state of the same step is not written twice."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        ocp = self._ocp
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave({"fingerprint": self._fingerprint}),
        )
        self._manager.save(step, args=items)

    def latest(self, like: TrainState) -> TrainState | None:
        """The last saved state, or None.

        Args:
            like: a state of the right structure, from `init_state`.

        Raises:
            ValueError: if the folder belongs to a run with other data or settings.
        """
        ocp = self._ocp
        step = self._manager.latest_step()
        if step is None:
            return None
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
            "run"
        ]
        if run["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the checkpoints in {self._manager.directory} come from a run with other data or "
                "settings; delete the folder, or choose another output."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=items)["state"]
