"""How a consumer is run and reported: one line for each tool and model."""

import sys
import tempfile
from pathlib import Path

from shared.pinned import NotThereError


def main(tool, models, run, ready=lambda: None):
    """Run one tool over its models and exit; 1 if one is off, or with `--strict` if the tool is not there.

    `run(folder, model)` gives the largest difference; `ready()` raises `NotThereError`.
    """
    sys.exit(bool(rows(tool, models, run, ready)))


def rows(tool, models, run, ready=lambda: None):
    """The same, and returns what went wrong."""
    try:
        ready()
    except (NotThereError, ImportError) as problem:
        print(f"{tool:14} skipped: {problem}")
        return [tool] if "--strict" in sys.argv else []
    wrong = []
    for model in models:
        error, why = None, ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                error = run(Path(folder), model)
            except Exception as problem:
                # Whatever a tool raises is its verdict on what it was given.
                why = f"{type(problem).__name__}: {str(problem)[:300]}"
        if error is None or not error < 1e-5:
            wrong.append(f"{tool} {model}")
        print(f"{tool:14} {model:24} {why if error is None else f'off by {error:.1e}'}")
    return wrong
