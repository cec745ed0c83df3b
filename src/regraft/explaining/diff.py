"""What two checkpoints or adapters have in common: under which renames and equations, and what only one of them has."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.adapters.convert import convert_adapter
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.dialects.opening import find_source
from regraft.errors import RegraftError
from regraft.errors.codes import Status
from regraft.explaining.subject import Subject, open_subject
from regraft.layouts.graph import route_between
from regraft.layouts.names import Layout
from regraft.learning.content import Content, Tensor, content_of, open_content
from regraft.learning.propose import Proposal, compare, propose
from regraft.names.patterns import patterns
from regraft.planning.compose import plan_along
from regraft.planning.model import load_model
from regraft.report import logged
from regraft.rules.book import Rules, only_books
from regraft.rules.said import saying
from regraft.shown import Shown
from regraft.sources.places import check_there, locate, visiting


@dataclass(frozen=True, slots=True)
class Some:
    """Tensors whose names are alike."""

    pattern: str
    count: int


@dataclass(frozen=True, slots=True)
class Moved:
    """What one rule makes of the first file, and whether the second has it."""

    rule: str
    """Its name, with file and line where it is in a file."""
    equation: str
    equal: int
    """How many of the second file's tensors it makes, bit for bit."""
    differ: tuple[Some, ...]
    """Those that it makes otherwise, or that are not there."""
    targets: tuple[Some, ...]
    sources: tuple[Some, ...] = ()
    """What it reads of the first file."""


@dataclass(frozen=True, slots=True)
class Differs:
    """Tensors of one name that are not the same."""

    some: Some
    why: str


@dataclass(frozen=True, slots=True, repr=False)
class Diff(Shown):
    """Two files compared."""

    a: str
    b: str
    kind: str
    """``checkpoint`` or ``adapter``."""
    layouts: tuple[str | None, str | None]
    same: tuple[Some, ...]
    """Same name, same content."""
    moved: tuple[Moved, ...]
    differ: tuple[Differs, ...]
    only_a: tuple[Some, ...]
    only_b: tuple[Some, ...]
    book: str | None = None
    """The rule book that was proposed, as TOML."""
    verified: bool = False
    """Whether that book leads from the one to the other and back, bit for bit."""
    notes: tuple[str, ...] = ()
    book_file: str | None = None
    """Where the book was written, if that was asked for."""

    @property
    def equal(self) -> bool:
        """Whether both hold the same, whatever it is called and however it is laid out."""
        return not (
            self.differ or self.only_a or self.only_b or any(each.differ for each in self.moved)
        )

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.equal else Status.NO

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {**Shown.to_dict(self), "equal": self.equal}


@logged
def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    propose_book: bool = False,
    architecture: str | None = None,
    rules: Rules = (),
) -> Diff:
    """Compare two checkpoints, or two adapters.

    Where rule books know both layouts, they say what should be equal; otherwise, and with ``propose_book``, a book is
    proposed from the contents. Reads both files whole.

    Args:
        a: a checkpoint or an adapter.
        b: another one.
        model: the base model's folder or its ``config.json``.
        propose_book: propose a book even where regraft has one.
        architecture: the model's class, where its config names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Raises ``BadInputError`` where one of them cannot be read.
    """
    with only_books(rules), saying(architecture=architecture), visiting():
        one, other = locate(a), locate(b)
        known = locate(model) if model is not None else None
        check_there(one, other, model=known)
        left, right = open_content(one), open_content(other)
        subjects = _subject(one, known), _subject(other, known)
        return _Comparison(left, right, subjects, known).run(propose_book=propose_book)


def _subject(path: Path, model: Path | None) -> Subject | None:
    try:
        return open_subject(path, None, model)
    except RegraftError:
        return None  # then the contents alone are compared


class _Comparison:
    def __init__(
        self,
        left: Content,
        right: Content,
        subjects: tuple[Subject | None, Subject | None],
        model: Path | None,
    ) -> None:
        self.left, self.right, self.subjects, self.model = left, right, subjects, model
        self.moved: list[Moved] = []
        self.used_a: set[str] = set()
        self.used_b: set[str] = set()
        self.notes: list[str] = []

    @property
    def layouts(self) -> tuple[str | None, str | None]:
        one, other = self.subjects
        return (one.layout if one else None, other.layout if other else None)

    def run(self, *, propose_book: bool) -> Diff:
        a, b = self.left.tensors, self.right.tensors
        same = [n for n, t in a.items() if n in b and t.look == b[n].look]
        proposal: Proposal | None = None
        apart = len(same) < len(a) or len(same) < len(b)
        if apart and not propose_book:
            self.by_library()
        if apart and not self.moved:
            proposal = self.by_content(set(same))
        same = [n for n in same if n not in self.used_b]
        self.used_a.update(same)
        self.used_b.update(same)
        both = [n for n in a if n in b and n not in self.used_a and n not in self.used_b]
        return Diff(
            self.left.where,
            self.right.where,
            self.left.kind,
            self.layouts,
            _some(same),
            tuple(self.moved),
            tuple(_differences(both, a, b)),
            _some(n for n in a if n not in self.used_a and n not in both),
            _some(n for n in b if n not in self.used_b and n not in both),
            proposal.text if proposal is not None else None,
            proposal is not None and proposal.verified,
            tuple(self.notes),
        )

    def by_library(self) -> None:
        """What the rule books that know both layouts make of the first file."""
        one, other = self.subjects
        if one is None or other is None or None in (one.layout, other.layout):
            return
        if one.layout == other.layout or one.kind != other.kind or not one.books:
            return
        assert other.layout is not None
        if one.kind == "adapter":
            self.convert_adapter(one, other.layout)
            return
        named = (name for group in one.headers.groups for name in group.names())
        packed = next((name for name in named if name not in self.left.tensors), None)
        if packed is not None:
            self.notes.append(
                f"rule books speak of whole weights, and the first has {packed} in several quantised tensors: contents "
                f"alone are compared; to compare by the books, convert it to {other.layout} first"
            )
            return
        try:
            route = route_between(one.books, one.layout, other.layout, one.where)
            plan = plan_along(one.headers, route.steps, scopes=one.scopes, where=one.where)
        except RegraftError as error:
            self.notes.append(f"the rule books of {one.layout} do not fit: {error.findings[0]}")
            return
        table: dict[str, tuple[list[str], list[str], list[str]]] = defaultdict(lambda: ([], [], []))
        try:
            for rule, *parts in compare(plan, self.left.tensors, self.right.tensors):
                for column, part in zip(table[rule], parts, strict=True):
                    column.extend(part)
        except RegraftError as error:
            self.notes.append(f"the rule books cannot be carried out: {error.findings[0]}")
            return
        texts = {str(rule): str(rule.equation) for book in plan.books for rule in book.rules}
        self.used_a.update(name for group in one.headers.groups for name in group.names())
        for rule, (read, made, wrong) in table.items():
            self.used_b.update(made)
            if not rule:
                self.used_a.difference_update(wrong)
                self.used_b.difference_update(made)
                continue
            bad = set(wrong)
            self.moved.append(
                Moved(
                    rule, texts[rule], len(made) - len(bad), _some(wrong), _some(made), _some(read)
                )
            )

    def convert_adapter(self, one: Subject, layout: str) -> None:
        """What converting the first adapter gives."""
        source = find_source(Path(one.where)).one()
        model = load_model(self.model) if self.model is not None else None
        try:
            done = convert_adapter(source, Layout(layout), model, foreign=InstalledTransformers())
        except RegraftError as error:
            self.notes.append(f"the first cannot be converted to {layout}: {error.findings[0]}")
            return
        made = content_of(done.tensors, one.where)
        equal = [n for n, t in made.items() if _equal(t, self.right.tensors.get(n))]
        wrong = [n for n in made if n not in set(equal)]
        self.used_a.update(self.left.tensors)
        self.used_b.update(made)
        rules = ", ".join(rule for rule, times in done.report.rules.items() if times)
        self.moved.append(
            Moved(
                f"conversion to {layout}" + (f" by {rules}" if rules else ""),
                "",
                len(equal),
                _some(wrong),
                _some(made),
                _some(self.left.tensors),
            )
        )

    def by_content(self, same: set[str]) -> Proposal | None:
        """What the contents alone show."""
        one = self.subjects[0] or self.subjects[1]
        model = one.model if one is not None else None
        layouts = self.layouts
        if None in layouts or layouts[0] == layouts[1]:
            names = Path(self.left.where).stem, Path(self.right.where).stem
            layouts = names if names[0] != names[1] else (f"{names[0]}-a", f"{names[1]}-b")
        proposal = propose(
            self.left.tensors,
            self.right.tensors,
            name="proposed",
            layouts=(str(layouts[0]), str(layouts[1])),
            model_types=tuple(dict.fromkeys(model.model_types())) if model is not None else (),
        )
        if proposal is None:
            return None
        self.used_a.update(proposal.explained - same)
        self.used_b.update(proposal.makes - same)
        for made in proposal.made:
            self.moved.append(
                Moved(
                    made.rule.name,
                    made.rule.equation.text.strip(),
                    len(made.names) - len(made.wrong),
                    _some(made.wrong),
                    _some(made.names),
                    _some(made.reads),
                )
            )
        if proposal.ambiguous:
            self.notes.append(
                f"{proposal.ambiguous} tensors are equal to others (all ones, say): only their names told "
                "which is which"
            )
        if not proposal.verified:
            self.notes.append(
                "the proposed rule book does not lead from the one to the other and back: see what differs"
            )
        if self.left.kind == "adapter":
            self.notes.append(
                "the rules speak of the adapters' own tensors; a rule book for convert speaks of the base's"
            )
        return proposal


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.look == other.look


def _some(names: Iterable[str]) -> tuple[Some, ...]:
    return tuple(Some(pattern, count) for pattern, count in patterns(names))


def _differences(
    names: Iterable[str], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Iterable[Differs]:
    """Names that both have, by what is not the same."""
    table: dict[str, list[str]] = defaultdict(list)
    for name in names:
        one, other = a[name], b[name]
        if one.dtype != other.dtype:
            why = f"dtype {one.dtype} and {other.dtype}"
        elif one.shape != other.shape:
            why = f"shape {list(one.shape)} and {list(other.shape)}"
        else:
            why = "other numbers"
        table[why].append(name)
    for why, same in table.items():
        yield from (Differs(some, why) for some in _some(same))
