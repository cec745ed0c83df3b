"""The plan of a conversion, without carrying it out."""

from __future__ import annotations

import os
from pathlib import Path

from regraft.checkpoints.source import is_checkpoint
from regraft.converting.convert import convert
from regraft.converting.slices import prepare_slices
from regraft.errors import AmbiguousError, Finding
from regraft.layouts.spelled import LayoutName
from regraft.planning.plan import Plan
from regraft.rules.book import Rules
from regraft.sources.places import leave, locate, opened


def plan(
    src: str | os.PathLike[str],
    *,
    to: LayoutName | str,
    model: str | os.PathLike[str] | None = None,
    source: LayoutName | str | None = None,
    rules: Rules = (),
) -> Plan | None:
    """Where every tensor of a checkpoint, or of one adapter, would go. Reads headers only; writes nothing.

    Args:
        src: what `regraft.convert` takes.
        to: the layout, such as ``"transformers-v5"``.
        model: the base model's folder or its ``config.json``.
        source: the layout of ``src``, or the family of its model; detected if omitted.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Returns:
        The plan: ``print`` shows its rules, keys and shapes, ``to_dict`` and ``result_shapes`` give them as data. Of an
        adapter it speaks of the tensors of the base that it adapts. ``None`` where nothing moves.

    Raises:
        BadInputError, UnmatchedKeysError, AmbiguousError, RefusedError: as ``convert`` does.

    >>> found = plan("tests/golden/bases/mixtral", to="transformers-v5")
    >>> found.fired()["mixtral/experts down (mixtral.toml:31)"], len(found.result_shapes())
    (2, 21)
    """
    before = opened()
    try:
        path = locate(src)
        if is_checkpoint(path):
            base = None if model is None else Path(model)
            return prepare_slices(path, to, base, source, rules).plan
    finally:
        leave(before)
    report = convert(src, _NOWHERE, to=to, model=model, source=source, rules=rules, dry_run=True)
    if len(report.adapters) > 1:
        names = ", ".join(adapter.name for adapter in report.adapters)
        message = f"there are several adapters here: {names}"
        fix = "give the folder of one of them"
        raise AmbiguousError(Finding("which-adapter", message, where=str(src), fix=fix))
    trace = report.adapters[0].trace
    return None if trace is None else trace.plan


_NOWHERE = Path("regraft-plan")
"""A destination that nothing is written to."""
