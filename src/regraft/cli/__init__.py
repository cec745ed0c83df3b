"""The command line: it parses, calls and prints, and nothing else."""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # what is imported here is imported before Ctrl-C is caught
    from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit status, a `regraft.errors.codes.Status`.

    A bug is not 1, so that a script never takes a bug for bad input; it is what sysexits.h calls EX_SOFTWARE.
    An interrupted run leaves nothing behind, save the hidden work folder of a checkpoint, from which --resume
    continues.
    """
    try:
        _open_streams()
        if args is None:
            # Most of what a command makes at its start stays. Python would go through it again and again.
            gc.set_threshold(_OBJECTS)
            from regraft.import_path import leave_current_folder

            leave_current_folder()
        from regraft.cli.run import run

        return run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:  # before there is anything that could say more
        sys.stderr.write("regraft: interrupted\n")
        return 130
    finally:
        if args is None:
            # The process ends now. Python would go through every object of every module again to free it.
            gc.freeze()


_OBJECTS = 100_000
"""After so many new objects Python looks for those that only refer to each other; after 700 if nothing is said."""


def _open_streams() -> None:
    """Let what is written to a closed stdout or stderr go nowhere; Python has ``None`` in its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
