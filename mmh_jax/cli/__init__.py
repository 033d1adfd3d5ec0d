"""The command line, `mmh-jax`: train, sample, measure dimensions, detect memorization, avoid it,
audit data.

Results go to files, one summary to stdout; progress and errors to stderr.  Exit codes: 0 done, 2 an
error that the message explains, 130 interrupted.  What only a command needs is imported in it, so
that `mmh-jax --help` is quick.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.markup import escape

from mmh_jax import console
from mmh_jax.cli.data import Audit, LidData
from mmh_jax.cli.detection import Detect
from mmh_jax.cli.mitigation import Mitigate
from mmh_jax.cli.models import Lid, Train
from mmh_jax.cli.sampling import Sample

__all__ = ["Audit", "Detect", "Lid", "LidData", "Mitigate", "Sample", "Train", "main"]

_CURES = {
    errno.ENOSPC: "; free some space, then run the same command again",
    errno.EDQUOT: "; free some space, then run the same command again",
    errno.EROFS: "; choose another output",
    errno.EACCES: "; choose another output, or change its permissions",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        argv: the arguments; by default those of the process, which an interrupt then ends here.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    commands = {"train": Train, "sample": Sample, "lid": Lid, "lid-data": LidData}
    commands |= {"detect": Detect, "mitigate": Mitigate, "audit": Audit}
    if argv[:2] == ["lid", "data"]:  # a folder `data` is written `./data`
        argv = ["lid-data", *argv[2:]]
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="mmh-jax",
            description="Local intrinsic dimension and memorization in generative models.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run(shlex.join(["mmh-jax", *argv]))
    except SystemExit as end:  # from the parser: 0 after --help, 2 for a usage error
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        console.print_error("interrupted; run the same command again to continue")
        if is_process:
            # XLA's threads may still compute; Python's own way out would crash beneath them.
            sys.stdout.flush()
            os._exit(130)
        return 130
    except (
        ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError
    ) as error:  # fmt: skip
        if not _is_explained(error):
            raise
        console.print_error(f"[bold red]error:[/] {escape(_one_line(error))}")
        return 2
    return 0


def _is_explained(error: Exception) -> bool:
    """Whether the message is meant for the user: a fault of the system, or raised by this package.

    Among the faults of the system is memory that is full, which a device reports in its own way.

    A TypeError or ValueError that arose inside another package is a defect of this one: its
    traceback must be seen.
    """
    if isinstance(error, OSError | ImportError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(console.__file__).parent)


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        text = name + error.strerror + _CURES.get(error.errno or 0, "")
    if "RESOURCE_EXHAUSTED" in text or not text:  # of a device, or of Python itself
        text = f"out of memory: {text or 'nothing is left'}; take a smaller preset or fewer points"
    return " ".join(text.split())
