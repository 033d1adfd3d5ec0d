"""What commands share: the types of their options, and the library, imported when one runs."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import tyro

__all__ = ["PresetName", "Source", "library"]

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
