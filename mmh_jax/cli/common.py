"""What commands share: the types of their options, and the library, imported when one runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Annotated, Any

import tyro

__all__ = ["PresetName", "Source", "check_kind", "library"]

Source = Annotated[str, tyro.conf.Positional]
PresetName = Annotated[str, tyro.conf.arg(metavar="{smoke,cpu,accelerator}")]


def library() -> Any:
    """`mmh_jax.report`, imported only once a command needs it."""
    # Before LAPACK is loaded: its threads fight with XLA's over batches of small matrices, and are
    # many times slower for it on busy cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mmh_jax import report

    # Orbax logs, with a traceback, the errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return report


def check_kind(command: Any, others: Iterable[str], *, is_published: bool) -> None:
    """Raise ValueError if a command was given options of the other kind of model.

    Args:
        command: the options, None or False where they were not given.
        others: names of those of the other kind.
        is_published: whether the model is a published pipeline.
    """
    kinds = ["a model of `mmh-jax train`", "a published pipeline"]
    plurals = ["models of `mmh-jax train`", "published pipelines"]
    for name in others:
        value = getattr(command, name)
        if value is not None and value is not False:  # 0 was given
            raise ValueError(
                f"--{name.replace('_', '-')} is of {plurals[not is_published]}, and "
                f"{command.model} is {kinds[is_published]}; leave it out."
            )
