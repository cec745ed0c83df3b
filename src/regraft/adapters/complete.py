"""Whether an adapter has all that it promises: a name that adapts every expert there is says which there must be."""

from __future__ import annotations

from regraft.adapters.protocol import Opened, Reading
from regraft.errors import BadInputError, Finding
from regraft.planning.gaps import gaps_in
from regraft.planning.side import Side


def check_whole(opened: Opened, reading: Reading, side: Side) -> None:
    """Where a name adapts every expert, an expert that is not in the file was lost.

    That is the file's fault, whatever is made of it; experts that no such name speaks of are not adapted, and are
    zeros where a layout stacks them.

    Example: with ``target_modules: ["w1"]`` and factors for ``experts.{0,2}.w1`` of three experts, 1 was lost.

    Raises ``BadInputError``.
    """
    promise = reading.promise
    if promise is None:
        return
    findings = []
    for gap in gaps_in(reading.adapter.headers.groups, side, all_seen=promise.all_seen):
        modules = [name.removesuffix(".weight") for name in gap.names()]
        lost = [m for m in modules if any(m == e or m.endswith(f".{e}") for e in promise.ends)]
        if lost:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            findings.append(
                Finding(
                    "missing",
                    f"{promise.field} names it and the base model has it, but the file has no factors for it{more}",
                    where=opened.where,
                    key=opened.spelling.spell(lost[0]),
                    fix="check that --model is the base it was trained on, otherwise save it again; if it was left "
                    f"out on purpose, name the modules that are there one by one in {promise.field}",
                )
            )
    if findings:
        raise BadInputError(findings)


__all__ = ["check_whole"]
