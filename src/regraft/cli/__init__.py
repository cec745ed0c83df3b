"""The command line: it parses, calls and prints, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit status.

    ===  ==============================================================================
      0  done
      1  bad input: files, keys or configs that are wrong, unexplained or ambiguous
      2  usage: an unknown command, option or layout
      3  refused: the input is sound, but what was asked for has no exact image
          4  the answer is no: `verify` or `diff` found a difference, `rules lint` an error,
         `explain` that a key does not arrive
         70  a bug in regraft. Not 1, so that a script never takes a bug for bad input; it is
         what sysexits.h calls EX_SOFTWARE
    130  interrupted (143 by a request to terminate); nothing is left behind, save
         the hidden work folder of a checkpoint, from which --resume continues
    ===  ==============================================================================
    """
    try:
        if args is None:
            from regraft.import_path import leave_current_folder

            leave_current_folder()
        from regraft.cli.run import run

        return run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:
        return 130
