"""Tensors that the user says are left out (``--drop``), or stay as they are (``--keep``), whatever the rules say.

What is kept is noted in the result's metadata, so that the way back keeps it without being told; what was dropped is
noted, too, and the way back says that it is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

import numpy as np
from msgspec import Struct

from regraft.adapters.provenance import Remembered
from regraft.checkpoints.source import Source
from regraft.equation.notation import parse_equation
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Group
from regraft.names.patterns import patterns
from regraft.planning.identify import Detected
from regraft.planning.model import ModelConfig
from regraft.planning.plan import Carried, Headers, Plan
from regraft.rules.book import Book, Carry
from regraft.rules.mtp import mtp_among
from regraft.rules.templates import match_group
from regraft.values import replace

_KEPT = "kept as it is, as was asked for (--keep)"


class Aside(Struct, frozen=True):
    """What patterns of the user set aside in a checkpoint, key by key."""

    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    """What was dropped on the way to this checkpoint, by its metadata, and is not in it."""

    def without(self, groups: Iterable[Group]) -> list[Group]:
        """Everything that is converted."""
        kept = set(self.kept)
        left = (_take(group, kept, wanted=False) for group in groups)
        return [group for group in left if len(group)]

    def beside(self, plan: Plan, headers: Headers) -> Plan:
        """A plan of everything else with what is kept in it; ``headers`` are those of all tensors."""
        kept = set(self.kept)
        groups = [
            g for g in (_take(group, kept, wanted=True) for group in headers.groups) if len(g)
        ]
        carried = [Carried(group, _carry()) for group in groups]
        return replace(plan, headers=headers, carried=(*plan.carried, *carried))

    def words(self) -> list[str]:
        """What the report says of it."""
        said = []
        for what, names in (
            ("dropped, as was asked for (--drop)", self.dropped),
            (_KEPT, self.kept),
            ("dropped on the way here, and not brought back", self.gone),
        ):
            if names:
                shown = ", ".join(pattern for pattern, _ in patterns(names))
                said.append(f"{len(names)} tensors {what}: {shown}".replace("it is", "they are"))
        return said


def find_aside(
    source: Source, drop: Sequence[str], keep: Sequence[str], remembered: Sequence[Remembered]
) -> Aside:
    """What patterns match among the names of a checkpoint; those that its metadata says were kept before stay so.

    ``remembered`` is what its metadata says. A pattern is a whole name with ``*`` for any text, dots included.

    Raises ``BadInputError`` for patterns that match nothing, and names that both kinds match; all together.
    """
    names = source.tensors.names
    findings: list[Finding] = []
    found: dict[str, dict[str, None]] = {"--drop": {}, "--keep": {}}
    for option, given in (("--drop", drop), ("--keep", keep)):
        for pattern in dict.fromkeys(given):
            fits = re.compile(translate(pattern)).match
            hits = [name for name in names if name == pattern or fits(name)]
            found[option].update(dict.fromkeys(hits))
            if not hits:
                findings.append(
                    Finding(
                        "option",
                        f"{option}: no tensor has a name that it matches",
                        where=source.where,
                        key=pattern,
                        fix="give whole names, with * for any text in them; `regraft inspect` shows them",
                    )
                )
    both = [name for name in found["--drop"] if name in found["--keep"]]
    findings += (
        Finding(
            "option",
            "it is to be dropped and to be kept",
            where=source.where,
            key=name,
            fix="say one of the two",
        )
        for name in both
    )
    if findings:
        raise BadInputError(findings)
    there = set(names) if any(each.set_aside or each.dropped for each in remembered) else set()
    dropped, kept = list(found["--drop"]), dict(found["--keep"])
    gone: dict[str, None] = {}
    for before in remembered:
        kept.update((k, None) for k in before.set_aside if k in there and k not in dropped)
        gone.update((k, None) for k in before.dropped if k not in there)
    return Aside(tuple(dropped), tuple(kept), tuple(gone))


def check_kept(
    known: Detected,
    books: Sequence[Book],
    kept: Sequence[str],
    headers: Headers,
    model: ModelConfig | None,
    where: str,
) -> None:
    """Raises ``BadInputError`` for what is kept although a rule on the way moves it: no loader would find it.

    MTP layers may stay, since nothing loads them with the model.
    """
    parts = (part for _, part in model.parts()) if model is not None else ()
    names = set(kept) - mtp_among(kept, parts).names()
    findings = []
    for group in headers.groups:
        mine = _take(group, names, wanted=True)
        hit = next((h for book in books for h in _claims(book, known, mine)), None)
        if hit is not None:
            findings.append(
                Finding(
                    "option",
                    "--keep: a rule moves it, and as it is nothing would find it in the new layout",
                    where=where,
                    key=mine.name(0),
                    rule=hit,
                    fix="leave it to the rule, or leave it out with --drop",
                )
            )
    if findings:
        raise BadInputError(findings)


def drop_rows(source: Source, names: Iterable[str]) -> Source:
    """A checkpoint without some tensors."""
    gone = set(names)
    if not gone:
        return source
    tensors = source.tensors
    rows = [row for row, name in enumerate(tensors.names) if name not in gone]
    if not rows:
        message = "--drop: nothing would be left"
        fix = "give patterns that match less"
        raise BadInputError(Finding("option", message, where=source.where, fix=fix))
    left = replace(
        tensors,
        names=[tensors.names[row] for row in rows],
        dtypes=[tensors.dtypes[row] for row in rows],
        shapes=[tensors.shapes[row] for row in rows],
        files=tensors.files[rows],
        starts=tensors.starts[rows],
        sizes=tensors.sizes[rows],
    )
    return replace(source, tensors=left)


def _claims(book: Book, known: Detected, group: Group) -> Iterable[str]:
    """The rules of a book that read keys of a group, and do not leave them where they are."""
    scope = known.scopes[book.name]
    if not len(group) or not scope.admits(group.template):
        return
    reads = book.right if known.layout == book.right else book.left
    for rule in book.rules:
        terms = rule.equation.right if reads == book.right else rule.equation.left
        if any(term.key is not None and match_group(term.key, group) for term in terms):
            yield str(rule)


def _take(group: Group, names: set[str], *, wanted: bool) -> Group:
    return group.take(np.array([(name in names) == wanted for name in group.names()], dtype=bool))


def _carry() -> Carry:
    equation = parse_equation("{*p} : ... == {*p} : ...")
    return Carry(equation.left[0], equation, _KEPT, "any", "--keep")
