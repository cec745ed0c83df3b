"""What is said of a plan for a whole model, for its report."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.names.patterns import patterns
from regraft.planning.identify import Detected
from regraft.planning.plan import Plan
from regraft.report import count_in_words
from regraft.rules.mtp import WHY as MTP


def notes_of(plan: Plan, known: Detected) -> list[str]:
    """What goes a way of its own, is dropped, or is not there; and whose rules were read."""
    notes = []
    if known.mtp.groups:
        notes.append(
            f"{len(known.mtp)} tensors under {', '.join(known.mtp.roots)} are those of {MTP}; they are converted "
            "like its own layers"
        )
    notes += _left(plan)
    notes += [
        f"rule book {book.name} comes with the installed package {book.package}"
        for book in plan.books
        if book.package
    ]
    if known.unstacked.carried:
        notes.append(
            f"{len(known.unstacked)} expert weights stay one by one: {known.unstacked.why}"
        )
    return notes


def _left(plan: Plan) -> Iterator[str]:
    """What was left or dropped, and what is not there."""
    dropped: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    for item in plan.dropped:
        dropped.setdefault(item.drop.why, []).extend(item.group.names())
    for drop in plan.lacking():
        lacking.setdefault(drop.why, []).append(str(drop.key))
    for entry in dict.fromkeys((*plan.entries, *plan.demands)):
        for name, count in entry.cut.items():
            yield f"the last {count} of {name} are padding that no value depends on, and are left"
    for why, names in dropped.items():
        shown = ", ".join(pattern for pattern, _ in patterns(names))
        yield f"dropped {count_in_words(len(names), 'tensor')}: {shown}: {why}"
    for why, names in lacking.items():
        yield f"{plan.target_layout} has these, too, and they are not made: {', '.join(names)}: {why}"
