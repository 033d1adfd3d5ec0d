"""Checkpoints of a running training, with orbax: written under a temporary name and renamed.

A run that is killed at any moment leaves at least its last finished checkpoint.  Each carries a
fingerprint of the run, so that a folder is never continued with other data or settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmh_jax.train.config import TrainConfig
from mmh_jax.train.ema import reconstruct
from mmh_jax.train.step import TrainState

__all__ = ["Checkpoints", "run_fingerprint"]


def run_fingerprint(points: Any, config: TrainConfig, **settings: Any) -> str:
    """A hash of the data, the training settings and whatever else decides the result."""
    points = np.ascontiguousarray(points)
    digest = hashlib.sha256(points.tobytes())
    own, *later = config.identity()
    what: list[Any] = [points.shape, str(points.dtype), own, settings, *later]
    text = json.dumps(what, default=repr)
    digest.update(text.encode())
    return digest.hexdigest()


class Checkpoints:
    """A folder of training states.  Use it as a context manager.

    Args:
        folder: where to keep them; made if it does not exist.
        fingerprint: identifies the run (`run_fingerprint`).
        keep: how many of the latest to keep.
        keep_every: states at multiples of so many steps are kept for good: what a figure over
            training time, or `average`, reads afterwards.
    """

    def __init__(
        self, folder: str | Path, fingerprint: str, *, keep: int = 2, keep_every: int | None = None
    ):
        # Here, for it takes a tenth of the time of `import mmh_jax` and only training needs it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._fingerprint = fingerprint
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Of the states that are there, ascending."""
        return sorted(self._manager.all_steps())

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
            ValueError: if the folder belongs to a run with other data or settings, or the state is
                half-written or of another architecture.  Nothing is deleted: the message says from
                which earlier state the run can continue.
        """
        step = self._manager.latest_step()
        return None if step is None else self.at(step, like)

    def at(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` steps, one of `steps`.

        Args:
            step: which.
            like: a state of the right structure, from `init_state`; placed on devices as it is.

        Raises:
            KeyError: if there is no state of this step.
            ValueError: as `latest`.
        """
        ocp = self._ocp
        if step not in self._manager.all_steps():
            raise KeyError(f"no state of step {step} in {self._manager.directory}: {self.steps}.")
        items = ocp.args.Composite(run=ocp.args.JsonRestore())
        with self._damage_reported(step):
            found = self._manager.restore(step, args=items)["run"]["fingerprint"]
        if found != self._fingerprint:
            raise ValueError(
                f"the checkpoints in {self._manager.directory} come from a run with other data or "
                "settings; delete the folder, or choose another output."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with self._damage_reported(step):
            return self._manager.restore(step, args=items)["state"]

    @contextlib.contextmanager
    def _damage_reported(self, step: int) -> Iterator[None]:
        """Turn what orbax raises on a bad state into one error, which keeps the states before."""
        try:
            yield
        except (KeyError, OSError, TypeError, ValueError) as error:
            folder, earlier = self._manager.directory, [s for s in self.steps if s < step]
            cure = "Delete the folder, or choose another output."
            if earlier:
                cure = f"Delete {folder / str(step)}; the run continues from step {earlier[-1]}."
            fault = str(error).strip().partition("\n")[0][:160]
            raise ValueError(
                f"the checkpoint of step {step} in {folder} does not hold the arrays of this "
                f"model; it is half-written, damaged, or of another architecture ({fault}). {cure}"
            ) from error

    def average(
        self, like: TrainState, widths: Sequence[float], *, width: float, step: int | None = None
    ) -> Any:
        """Weights averaged with another relative width than those that were tracked (`train.ema`).

        Reads every state that is there, one at a time: keep several, evenly spread, with
        `keep_every`.

        Args:
            like: a state of the right structure, from `init_state`.
            widths: `TrainConfig.ema_widths` of the run.
            width: the relative width that is wanted.
            step: where the average ends; by default at the last state.

        Raises:
            ValueError: if the run tracked no such averages, or there is no state; as `latest`.
        """
        steps = [number for number in self.steps if number > 0]
        if not steps or not widths:
            raise ValueError(
                f"{self._manager.directory} has {len(steps)} states of a run that tracked the "
                f"widths {tuple(widths)}: train with `TrainConfig(ema_widths=(0.05, 0.1))` and "
                "`Checkpoints(keep_every=...)`."
            )
        return reconstruct(
            (average for number in steps for average in self.at(number, like).averages),
            [number for number in steps for _ in widths],
            list(widths) * len(steps),
            step=steps[-1] if step is None else step,
            width=width,
        )
