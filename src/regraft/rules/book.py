"""Rule books: TOML files that say how one layout of a model family becomes another.

name = "mixtral"
left = "transformers-v4"
right = "transformers-v5"
model_types = ["mixtral"]

[[equation]]
name = "expert down"
text = '''
{*p}.layers.{l}.block_sparse_moe.experts.{e}.w2.weight : o f
    == {*p}.layers.{l}.mlp.experts.down_proj : e o f
where e = config.num_local_experts
'''
left_kind = "linear"
right_kind = "experts"

[[carry]]
keys = ["{*p}.layers.{l}.self_attn.{*q}"]
why = "attention is the same in both"

[[parameters]]
side = "right"
module = "{*p}.layers.{l}.mlp.experts"
names = ["gate_up_proj", "down_proj"]
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from regraft.equation.lower import check_equation
from regraft.equation.notation import (
    Equation,
    Expr,
    Hole,
    Key,
    Segments,
    Term,
    axes_of,
    parse_equation,
    parse_key,
)
from regraft.equation.sizes import undetermined
from regraft.errors import BadInputError, Finding
from regraft.import_path import entry_points_of
from regraft.rules.direction import SIDES, Direction, Side
from regraft.rules.kinds import KINDS, NONE, OUT
from regraft.rules.meet import meet
from regraft.rules.said import said, saying
from regraft.storage.probe import open_regular
from regraft.values import replace

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from regraft.names.keys import Group
    from regraft.rules.templates import KeyTable
    from regraft.rules.terms import RuleTerm


class _EquationTable(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    text: str
    left_kind: str | list[str] = "linear"
    right_kind: str | list[str] = "linear"
    reads: Side | None = None


class _CarryTable(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    keys: list[str] = []
    modules: list[str] = []
    why: str
    kind: str = "any"
    where: str = ""


class _DropTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right"]
    keys: list[str]
    why: str


class _AbsentTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right"]
    keys: list[str]
    why: str


class _ParametersTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right", "both"]
    module: str
    names: list[str]


class _ModuleTable(msgspec.Struct, forbid_unknown_fields=True):
    left: str = ""
    right: str = ""
    text: str = ""
    name: str = ""
    kind: str = ""
    left_kind: str | list[str] = ""
    right_kind: str | list[str] = ""
    where: str = ""


class _SpecialTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right", "both"]
    module: str
    tensors: list[str]
    called: bool = True
    why: str = ""


class _PartTable(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    equation: list[Any] = []
    carry: list[Any] = []
    drop: list[Any] = []
    absent: list[Any] = []
    parameters: list[Any] = []
    module: list[Any] = []
    special: list[Any] = []


class _AdaptersTable(msgspec.Struct, forbid_unknown_fields=True):
    left: str | None = None
    right: str | None = None


class _BookTable(_PartTable, forbid_unknown_fields=True, kw_only=True):
    name: str
    title: str
    left: str
    right: str
    model_types: list[str]
    adapters: _AdaptersTable | None = None
    reclaimed: list[str] = []
    reclaimed_model_types: list[str] = []
    source: str = ""
    tells: Literal["left", "right", "both"] = "both"
    mtp: bool = True
    include: list[str] = []


_T = TypeVar("_T", bound=_PartTable)
_LIBRARY = Path(__file__).with_name("library")
GROUP = "regraft.books"
"""The entry points of packages that bring rule books."""


class Rule(Struct, frozen=True, cache_hash=True, dict=True):
    """One equation of a book, with the kinds of its tensors and the line it stands on."""

    name: str
    equation: Equation
    left_kinds: tuple[str, ...]
    right_kinds: tuple[str, ...]
    book: str
    where: str
    """``file:line``."""
    module: str = ""
    """The name of the module rule that it is a part of."""
    reads: Side | None = None
    """The one side that it reads, where that is another form of what other rules write; ``None`` for either."""

    @cached_property
    def ways(self) -> dict[Direction, Way]:
        """The rule, read in either direction."""
        from regraft.rules.indices import stacks_of

        equation = self.equation
        stacks = {term: stacks_of(equation, term) for term in (*equation.left, *equation.right)}
        renames = _renames(equation, stacks)
        left, right = (equation.left, self.left_kinds), (equation.right, self.right_kinds)
        return {
            Direction.FORWARD: Way(self, Direction.FORWARD, *left, *right, stacks, renames),
            Direction.BACKWARD: Way(self, Direction.BACKWARD, *right, *left, stacks, renames),
        }

    def sides(self, direction: Direction) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
        """The terms of the side that is read and of the side that is written."""
        return self.equation.sides(reverse=direction.backward)

    def side(self, side: Side) -> Iterator[tuple[Term, str]]:
        """The terms of a side, with their kinds."""
        if side == "left":
            return zip(self.equation.left, self.left_kinds, strict=True)
        return zip(self.equation.right, self.right_kinds, strict=True)

    def kinds(self, direction: Direction) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The kinds of the side that is read and of the side that is written."""
        kinds = (self.left_kinds, self.right_kinds)
        return kinds[::-1] if direction.backward else kinds

    def __str__(self) -> str:
        return f"{self.book}/{self.name} ({self.where})"


class Way(Struct, frozen=True, eq=False):
    """A rule, read in one direction, with what follows from that alone."""

    rule: Rule
    direction: Direction
    read: tuple[Term, ...]
    """The terms of the side that is read."""
    read_kinds: tuple[str, ...]
    written: tuple[Term, ...]
    """The terms of the side that is written."""
    written_kinds: tuple[str, ...]
    stacks: Mapping[Term, tuple[Expr, ...]]
    """The holes of each term's key that count the tensors of a stack."""

    renames: bool
    """Whether every tensor that is written is one that is read, byte by byte."""


def _renames(equation: Equation, stacks: Mapping[Term, tuple[Expr, ...]]) -> bool:
    if len(equation.left) != 1 or len(equation.right) != 1 or equation.copies:
        return False
    left, right = equation.left[0], equation.right[0]
    axes = {tuple(n for hole in stacks[term] for n in axes_of(hole)) for term in (left, right)}
    return left.dims == right.dims and len(axes) == 1


class Carry(Struct, frozen=True):
    """Keys that are the same in both layouts. ``term`` has dims where the book knows their sizes."""

    term: Term
    equation: Equation
    why: str
    kind: str
    where: str


class Word(Struct, frozen=True, eq=False):
    """A key that a book speaks of."""

    key: Key
    rule: str | None = None
    """The name of the rule that it is a term of; ``None`` for a carry-over."""
    layout: str | None = None
    """The layout of which the rule reads it; ``None`` where it only writes it, and for a carry-over."""
    carry: Carry | None = None
    """The carry-over, where it is that of one."""


class Drop(Struct, frozen=True):
    """Keys of one layout that the other has no use for."""

    sides: tuple[Side, ...]
    key: Key
    why: str
    where: str


class Absent(Struct, frozen=True):
    """Keys of one layout for which the other has no place, so that what stands on them is refused."""

    sides: tuple[Side, ...]
    key: Key
    why: str
    where: str


class Gap(Struct, frozen=True):
    """A key of the right layout for which there is no rule, and why."""

    key: Key
    why: str


class Parameters(Struct, frozen=True):
    """The parameters of a module in the order in which the module registers them."""

    sides: tuple[Side, ...]
    module: Key
    names: tuple[str, ...]
    where: str = ""
    """``file:line``."""


class Unordered(Struct, frozen=True):
    """A module with several stacked parameters, of which a book does not say in which order it registers them."""

    module: str
    names: tuple[str, ...]
    """Its parameters as the book comes to them, which says nothing of their order."""
    rule: Rule
    """A rule about one of them."""


def _is_nested(kind: str) -> bool:
    """Whether PEFT adapts tensors of a kind as parameters, one around the other."""
    return not KINDS[kind].module and KINDS[kind].role(0) != NONE


def table_of(side: str, module: str, names: Iterable[str]) -> str:
    """The table that a book lacks, in one line each, as TOML.

    >>> print(table_of("right", "layers.{l}.experts", ["up", "down"]))
    [[parameters]]
    side = "right"
    module = "layers.{l}.experts"
    names = ["up", "down"]
    """
    listed = ", ".join(f'"{name}"' for name in names)
    return f'[[parameters]]\nside = "{side}"\nmodule = "{module}"\nnames = [{listed}]'


class ModuleRule(Struct, frozen=True):
    """A rule for whole modules: their weights, and the biases, move as the equation says.

    The equation's keys are paths of modules, its dims those of their weights.
    """

    name: str
    equation: Equation
    left_kinds: tuple[str, ...]
    right_kinds: tuple[str, ...]
    where: str
    """``file:line``."""


class Shared(Struct, frozen=True):
    """A module that stands in two places in the left layout, and only in the second in the right one."""

    first: str
    second: str


class Special(Struct, frozen=True):
    """A module that PEFT cannot treat like any other."""

    sides: tuple[Side, ...]
    module: Key
    tensors: tuple[str, ...]
    """All its tensors: PEFT saves and loads a module of ``modules_to_save`` as a whole."""
    called: bool
    """False where the model reads the module's weight and does not call the module: a LoRA on it has no effect."""
    why: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Book:
    """A rule book: two layouts of one model family, and what leads from one to the other.

    Most commands need one of regraft's own books, and of the others what stands in their heads. So the rules of those
    are read when they are first asked for: Python calls ``__getattr__`` for a slot that was never filled, and there
    the whole file is read, once. In all other books every slot is filled from the start.
    """

    name: str
    title: str
    left: str
    right: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    carries: tuple[Carry, ...]
    parameters: tuple[Parameters, ...]
    specials: tuple[Special, ...]
    reclaimed: tuple[str, ...]
    """Leaf names that PEFT moves from ``target_modules`` to the experts' parameters, whatever they name."""
    reclaimed_model_types: tuple[str, ...]
    """Model types for which PEFT up to 0.21.2 does that."""
    path: str
    source: str
    drops: tuple[Drop, ...] = ()
    gaps: tuple[Gap, ...] = ()
    """What could not be imported."""
    respelled: tuple[Rule, ...] = ()
    """From the left names as a file spells them to those that are usual, where these differ."""
    module_rules: tuple[ModuleRule, ...] = ()
    """Of which some of the rules are parts."""
    left_adapters: str | None = None
    """The dialect and version that adapters of the left layout usually are in (``peft-0.18``); ``None`` for any."""
    right_adapters: str | None = None
    absents: tuple[Absent, ...] = ()
    tells: Literal["left", "right", "both"] = "both"
    """The side whose own names tell that something is of these models; other books speak of the other one."""
    mtp: bool = True
    """Whether the layout that ``tells`` has the names of MTP layers that follow from those of the others."""
    package: str | None = None
    """The installed package that it comes with; ``None`` for regraft's and a user's own."""
    shared: tuple[Shared, ...] = ()
    """Modules of the left layout that stand in two places."""
    tables: dict[str, KeyTable[Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was asked for by key, see `terms`, `carried` and `words`."""
    owned: dict[str, list[tuple[Key, str]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was asked for by side, see `moving_parameters`."""
    passed: dict[Side, tuple[tuple[str, ...], ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was asked for by side, see `modules`."""

    if not TYPE_CHECKING:  # so that types are checked as if every slot were filled

        def __getattr__(self, name: str) -> Any:
            slots = [each.name for each in fields(Book)]
            if name not in slots:
                raise AttributeError(f"a book has no {name!r}", name=name, obj=self)
            file = _LIBRARY / self.path
            whole = load_book(file, self.path, sound=True)
            for slot in slots:
                object.__setattr__(self, slot, getattr(whole, slot))
            return getattr(self, name)

    @property
    def layouts(self) -> tuple[str, str]:
        """Both layouts, the left one first."""
        return self.left, self.right

    @property
    def is_addition(self) -> bool:
        """Whether it moves nothing, and only says of some keys that they stay or go: it stands beside other books."""
        return not self.rules

    def layout(self, side: Side) -> str:
        """The layout that a side speaks of."""
        return self.left if side == "left" else self.right

    def terms(self, side: Side) -> KeyTable[RuleTerm]:
        """The terms of the rules' one side, by key."""
        # Numbers of keys take numpy, and much that asks a book asks for its head alone.
        from regraft.rules.templates import KeyTable
        from regraft.rules.terms import RuleTerm

        if side not in self.tables:
            terms = (
                (rule, number, term, kind)
                for rule in self.rules
                if rule.reads in (None, side)
                for number, (term, kind) in enumerate(rule.side(side))
            )
            found = [RuleTerm.of(place, *each) for place, each in enumerate(terms)]
            self.tables[side] = KeyTable((each.key, each) for each in found)
        return self.tables[side]

    @property
    def carried(self) -> KeyTable[Carry]:
        """The carry-overs by key."""
        from regraft.rules.templates import KeyTable

        if "carried" not in self.tables:
            self.tables["carried"] = KeyTable(
                (carry.term.key, carry) for carry in self.carries if carry.term.key is not None
            )
        return self.tables["carried"]

    @property
    def words(self) -> KeyTable[Word]:
        """All keys that it has a word for, of rules in both layouts and of carry-overs."""
        from regraft.rules.templates import KeyTable

        if "words" not in self.tables:
            found = [
                Word(term.key, rule.name, self.layout(side) if rule.reads in (None, side) else None)
                for rule in self.rules
                for side in SIDES
                for term, _ in rule.side(side)
                if term.key is not None
            ]
            carried = ((carry.term.key, carry) for carry in self.carries)
            found += [Word(key, carry=carry) for key, carry in carried if key is not None]
            self.tables["words"] = KeyTable((word.key, word) for word in found)
        return self.tables["words"]

    def moving_parameters(self, modules: Group) -> dict[str, tuple[str, ...]]:
        """The rules that move parameters of modules, for each layout in which these have parameters of their own."""
        if not self.parameters:
            return {}
        from regraft.rules.templates import match_group

        return {
            self.layout(side): rules
            for side in SIDES
            if (rules := tuple(r for key, r in self._owners(side) if match_group(key, modules)))
        }

    def _owners(self, side: Side) -> list[tuple[Key, str]]:
        """The modules of a side that have parameters of their own, each with the rule that moves one of these."""
        known = f"owners {side}"
        if known not in self.owned:
            terms = [(str(t.key), rule.name) for rule in self.rules for t, _ in rule.side(side)]
            self.owned[known] = [
                (
                    table.module,
                    next(
                        (r for key, r in terms if key.startswith(f"{table.module}.")),
                        str(table.module),
                    ),
                )
                for table in self.parameters
                if side in table.sides
            ]
        return self.owned[known]

    def unordered(self, side: Side) -> list[Unordered]:
        """The modules of a side with several stacked parameters that no table puts in order."""
        found: dict[str, dict[str, Rule]] = {}
        for rule in self.rules:
            for term, kind in rule.side(side):
                module, _, name = str(term.key or "").rpartition(".")
                if module and "{" not in name and _is_nested(kind):
                    found.setdefault(module, {}).setdefault(name, rule)
        return [
            Unordered(module, tuple(names), next(iter(names.values())))
            for module, names in found.items()
            if len(names) > 1 and not self._puts_in_order(side, parse_key(module), names)
        ]

    def _puts_in_order(self, side: Side, module: Key, names: Iterable[str]) -> bool:
        return any(
            side in table.sides
            and set(names) <= set(table.names)
            and meet(table.module, module) is not None
            for table in self.parameters
        )

    def modules(self, side: Side) -> tuple[tuple[str, ...], ...]:
        """For each key that a side has whole, from the model's root: the modules that it is in, the outermost first.

        Holes and numbers are marks (`module_template`).
        """
        if side not in self.passed:
            terms = [carry.term for carry in self.carries]
            terms += [term for rule in self.rules for term, _ in rule.side(side)]
            keys = [term.key.parts for term in terms if term.key is not None]
            names = dict.fromkeys(
                module_template("".join("#" if isinstance(p, Hole) else str(p) for p in parts))
                for parts in keys
                if not any(isinstance(part, Segments) for part in parts)
            )
            self.passed[side] = tuple(_paths_above(name) for name in names)
        return self.passed[side]

    def adapters(self, layout: str) -> str | None:
        """The dialect and version that adapters of a layout usually are in, as far as the book says."""
        sides = {self.left: self.left_adapters, self.right: self.right_adapters}
        return sides.get(layout)

    def usual_spelling(self) -> Book:
        """The book that leads from a file's own spelling of the left names to the usual one."""
        odd = {str(rule.equation.left[0].key) for rule in self.respelled}
        carries = list(self.carries)
        for rule in self.rules:
            for term in rule.equation.left:
                if term.key is not None and str(term.key) not in odd:
                    equation = parse_equation(f"{term.key} : ... == {term.key} : ...")
                    why = "it is spelled as usual"
                    carries.append(Carry(equation.left[0], equation, why, "any", rule.where))
        return dataclasses.replace(
            self,
            left=f"{self.left} as it is spelled",
            right=self.left,
            rules=self.respelled,
            carries=tuple(carries),
            drops=(),
            gaps=(),
            module_rules=(),
            respelled=(),
        )


_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def module_template(path: str) -> str:
    """A module's path with a mark in place of each number between dots.

    >>> module_template("model.layers.12.mlp.w1")
    'model.layers.#.mlp.w1'
    """
    return _NUMBER.sub("#", path)


def _paths_above(name: str) -> tuple[str, ...]:
    segments = name.split(".")
    return tuple(".".join(segments[:end]) for end in range(1, len(segments)))


def read_book(path: Path | Traversable) -> str:
    """The text of a rule book.

    Raises ``BadInputError`` for what is no regular file of a moderate size, or no text.
    """
    if not isinstance(path, Path):
        return path.read_text(encoding="utf-8")
    file, size = open_regular(path)
    with file:
        if size > _MOST_BYTES:
            message = (
                f"the file has {size} bytes, and at most {_MOST_BYTES} are read as a rule book"
            )
            raise BadInputError(Finding("file-too-large", message, where=str(path)))
        data = file.read(_MOST_BYTES)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInputError(
            Finding("not-utf8", f"not UTF-8 text (line {line})", where=f"{path}:{line}")
        ) from None


_MOST_BYTES = 10_000_000


def _is_file(path: Path | Traversable) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def load_book(
    path: str | os.PathLike[str] | Traversable,
    shown: str | None = None,
    folder: Path | Traversable | None = None,
    *,
    sound: bool = False,
) -> Book:
    """Read and check a rule book; everything that is wrong with it is reported together, with file and line.

    ``include`` names files beside it whose equations, carry-overs and parameters become part of it.

    ``shown`` is what messages call the file, ``folder`` where the files are that it includes, if not beside it.
    A ``sound`` book is one of regraft's own, whose equations its tests have checked.

    Raises ``BadInputError``.
    """
    if isinstance(path, str | os.PathLike):
        path = Path(path)
    shown = str(path) if shown is None else shown
    text = read_book(path)
    table = _convert(text, shown, _BookTable)
    findings: list[Finding] = []
    rules: list[Rule] = []
    carries: list[Carry] = []
    drops: list[Drop] = []
    absents: list[Absent] = []
    parameters: list[Parameters] = []
    specials: list[Special] = []
    module_rules: list[ModuleRule] = []
    of_modules: list[Rule] = []
    parts: list[tuple[str, str, _PartTable]] = [(shown, text, table)]
    if folder is None:
        folder = path.parent if isinstance(path, Path) else _LIBRARY
    for name in table.include:
        part = folder / name
        if not _is_file(part):
            line = _line_of_field(text, "`include`")
            message = f"include: there is no file {name} beside it"
            findings.append(Finding("rule-book", message, where=f"{shown}:{line}"))
            continue
        included = read_book(part)
        parts.append((name, included, _convert(included, name, _PartTable)))
    for where, source, part_table in parts:
        loader = _Loader(where, source, table.name, sound=sound)
        rules += filter(None, (loader.rule(i, raw) for i, raw in enumerate(part_table.equation)))
        carries += [c for i, raw in enumerate(part_table.carry) for c in loader.carry(i, raw)]
        drops += [d for i, raw in enumerate(part_table.drop) for d in loader.drop(i, raw)]
        absents += [a for i, raw in enumerate(part_table.absent) for a in loader.absent(i, raw)]
        parameters += filter(
            None, (loader.parameters(i, raw) for i, raw in enumerate(part_table.parameters))
        )
        for i, raw in enumerate(part_table.module):
            for module_rule, expanded in loader.module(i, raw):
                module_rules.append(module_rule)
                of_modules += expanded
        specials += filter(
            None, (loader.special(i, raw) for i, raw in enumerate(part_table.special))
        )
        findings += loader.findings
    if table.left == table.right:
        findings.append(Finding("rule-book", "left and right are one layout", where=f"{shown}:1"))
    findings += _unknown_versions(table, shown)
    seen: dict[str, str] = {}
    for rule in rules:
        if seen.setdefault(rule.name, rule.where) != rule.where:
            message = f"two equations are called {rule.name!r}; the first is at {seen[rule.name]}"
            findings.append(Finding("rule-book", message, where=rule.where))
    if findings:
        raise BadInputError(findings)
    return Book(
        **_head(table, shown),
        rules=(*rules, *of_modules),
        carries=tuple(carries),
        parameters=tuple(parameters),
        specials=tuple(specials),
        drops=tuple(drops),
        module_rules=tuple(module_rules),
        absents=tuple(absents),
    )


BUILT_IN = "built-in"
"""What stands for all rule books that come with regraft and with installed packages, where books are named."""

Rules: TypeAlias = "Book | str | os.PathLike[str] | Iterable[Book | str | os.PathLike[str]]"
"""One rule book or several, as `only_books` takes them."""


@contextmanager
def only_books(books: Rules) -> Iterator[None]:
    """Let these books stand in for the library, in this thread, as long as this lasts; none at all change nothing.

    A text is a book's file, the name of one of regraft's, or ``"built-in"`` for all of those: books that are named
    before it come first, and take the place of one that leads between the same layouts for the same model types.
    Books that have no equations, and only say of some keys that they stay or go, stand beside regraft's.
    """
    with saying(books=_standing_in(books)):
        yield


def _standing_in(books: Rules) -> tuple[Book, ...]:
    given = tuple(_named(books))
    if given and all(book.is_addition for book in given):
        given += built_in()
    return given


ENVIRONMENT = "REGRAFT_RULES"
"""The variable that lists rule books as ``--rules`` takes them, separated as in ``PATH``, for where none are given."""


def _given() -> tuple[Book, ...]:
    """The books that stand in for the library: those of `only_books`, else those of the environment; or none."""
    text = os.environ.get(ENVIRONMENT, "")
    return said().books or (_environment_books(text, _changed(text)) if text else ())


def _changed(text: str) -> tuple[int, ...]:
    """When the files of the environment's books changed, so that one that was edited is read again."""
    found = []
    for name in text.split(os.pathsep):
        try:
            found.append(os.stat(name).st_mtime_ns)  # noqa: PTH116
        except OSError:
            found.append(0)
    return tuple(found)


@lru_cache(maxsize=4)
def _environment_books(text: str, changed: tuple[int, ...]) -> tuple[Book, ...]:
    try:
        with saying(books=built_in()):  # names are those of regraft's own
            return _standing_in(name for name in text.split(os.pathsep) if name)
    except BadInputError as error:
        raise BadInputError(
            dataclasses.replace(each, message=f"{each.message} (named by {ENVIRONMENT})")
            for each in error.findings
        ) from None


def _named(books: Rules) -> Iterator[Book]:
    for each in (books,) if isinstance(books, Book | str | os.PathLike) else books:
        if isinstance(each, Book):
            yield each
        elif each == BUILT_IN:
            yield from built_in()
        else:
            yield find_book(os.fspath(each))


def own_books() -> tuple[Book, ...]:
    """The books of the user's own that stand in for the library, or beside it."""
    given = _given()
    return tuple(b for b in given if all(b is not each for each in built_in())) if given else ()


def own_rules() -> list[str]:
    """Names of the user's own books that are in force, and whether the environment named them; for reports."""
    origin = "" if said().books else f" ({ENVIRONMENT})"
    return [f"{book.path}{origin}" for book in own_books()]


def rules_words() -> list[str]:
    """What a command line that is shown says of the rule books that were given; the environment's speak for themselves.

    ``["--rules", "mine.toml", "--rules", "built-in"]`` for a book of the user's own before all of regraft's.
    """
    given = said().books
    if not given:
        return []
    ours = {id(book) for book in built_in()}
    is_all = ours <= {id(book) for book in given}
    names = [
        book.path if id(book) not in ours else BUILT_IN if is_all else book.name for book in given
    ]
    return [word for name in dict.fromkeys(names) for word in ("--rules", name)]


def is_complete() -> bool:
    """Whether the library is all that is to be asked: books stand in for it, and not beside it."""
    given = _given()
    return bool(given) and not {id(book) for book in built_in()} <= {id(book) for book in given}


def covers(books: Sequence[Book], model_types: Iterable[str]) -> bool:
    """Whether some books know a model with all its parts; a user's own are not asked for more than they say."""
    own = {id(book) for book in own_books() if not book.is_addition}
    if is_complete() or any(id(book) in own for book in books):
        return True
    known = {name for book in books for name in book.model_types if book.tells == "both"}
    return all(name in known for name in model_types)


def library() -> tuple[Book, ...]:
    """The rule books in force: those that come with regraft and with installed packages, or what stands in for them."""
    books, family = _given() or built_in(), said().family
    return books if family is None else tuple(books_for([family], books))


@lru_cache(maxsize=1)
def built_in() -> tuple[Book, ...]:
    """The rule books that come with regraft and with installed packages."""
    return (*_shipped(), *installed_books())


def _shipped_book(name: str, table: _BookTable) -> Book:
    """A book of regraft's own of which only the head has been read, in a hundredth of the time; see `Book`."""
    book = Book.__new__(Book)
    for slot, value in _head(table, name).items():
        object.__setattr__(book, slot, value)
    return book


def _head_text(file: Path) -> str:
    return _TABLES.split(read_book(file), maxsplit=1)[0]


_TABLE = re.compile(r"^[ \t]*\[\[(\w+)\]\]", re.MULTILINE)
"""A table of rules, with its name."""
_TABLES = re.compile(r"^\[\[", re.MULTILINE)
"""The first table of rules; what stands before it is the head. No text of several lines stands in a head."""


def _unknown_versions(table: _BookTable, shown: str) -> Iterator[Finding]:
    """Versions of ``[adapters]`` that no book of regraft's names: nothing writes adapters so."""
    told = table.adapters or _AdaptersTable()
    named = [each for each in (told.left, told.right) if each is not None]
    if not named:
        return
    versions = {each for book in _shipped() for each in (book.left_adapters, book.right_adapters)}
    known = sorted(each for each in versions if each)
    for each in named:
        if each not in known:
            yield Finding(
                "rule-book",
                f"[adapters] says {each!r}, and adapters are written as {' or '.join(known)}",
                where=f"{shown}:1",
                fix="give one of these, or leave the line out",
            )


def _head(table: _BookTable, shown: str) -> dict[str, Any]:
    """What a book says of itself before its rules."""
    adapters = table.adapters or _AdaptersTable()
    return {
        "name": table.name,
        "title": table.title,
        "left": table.left,
        "right": table.right,
        "model_types": tuple(table.model_types),
        "reclaimed": tuple(table.reclaimed),
        "reclaimed_model_types": tuple(table.reclaimed_model_types),
        "path": shown,
        "source": table.source,
        "tells": table.tells,
        "mtp": table.mtp,
        "left_adapters": adapters.left,
        "right_adapters": adapters.right,
        "package": None,
    }


HEADS = _LIBRARY / "heads.json"
"""The heads of regraft's own books in one file, which is read in a tenth of the time; `heads_of_library` makes it."""


class _KeptHead(Struct):
    size: int
    """That of the book's file when its head was kept, in bytes; one of another size is read itself."""
    head: _BookTable


def heads_of_library() -> str:
    """What belongs into `HEADS`, a line for each book."""
    import json

    lines = []
    for file in sorted(_LIBRARY.glob("[!_]*.toml")):
        kept = {"size": file.stat().st_size, "head": _toml(_head_text(file), file.name)}
        lines.append(f"{json.dumps(file.name)}: {json.dumps(kept)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@lru_cache(maxsize=1)
def _shipped() -> tuple[Book, ...]:
    kept: dict[str, _KeptHead] = {}
    if HEADS.is_file():
        kept = msgspec.json.decode(HEADS.read_bytes(), type=dict[str, _KeptHead])
    with os.scandir(_LIBRARY) as entries:
        sizes = {e.name: e.stat().st_size for e in entries if e.name.endswith(".toml")}
    books = []
    for name in sorted(name for name in sizes if not name.startswith("_")):
        known = kept.get(name)
        if known is not None and known.size == sizes[name]:
            table = known.head
        else:
            table = _convert(_head_text(_LIBRARY / name), name, _BookTable)
        books.append(_shipped_book(name, table))
    return tuple(books)


@lru_cache(maxsize=1)
def installed_books() -> tuple[Book, ...]:
    """The rule books of installed packages: the entry points ``regraft.books`` name packages with TOML files in them.

    Raises ``BadInputError`` where one of them cannot be loaded.
    """
    found: list[Book] = []
    entries = entry_points_of(GROUP)
    if not entries:
        return ()
    from importlib import resources

    for entry in entries:
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            folder = resources.files(entry.value)
            files = sorted(
                (f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name
            )
            books = [
                load_book(f, f"{package}: {f.name}", folder)
                for f in files
                if not f.name.startswith("_")
            ]
        except (ImportError, OSError) as error:
            message = f"the rule books of the installed package {package} cannot be read: {error}"
            fix = "install it again, or remove it"
            raise BadInputError(Finding("rule-book", message, where=package, fix=fix)) from error
        found += (dataclasses.replace(book, package=package) for book in books)
    return tuple(found)


def _toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"not TOML: {error}"
    except RecursionError:
        message = "arrays or tables are nested too deep"
    except ValueError as error:  # Python's limit on the digits of a number
        message = f"not TOML: {str(error).partition(';')[0]}"
    raise BadInputError(Finding("toml", message, where=shown, fix="correct the file"))


def _convert(text: str, shown: str, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(_toml(text, shown), kind)
    except msgspec.ValidationError as error:
        line = _line_of_field(text, str(error))
        raise BadInputError(Finding("rule-book", str(error), where=f"{shown}:{line}")) from None


class _Loader:
    def __init__(self, path: str, text: str, book: str, *, sound: bool) -> None:
        self.path, self.text, self.book, self.sound = path, text, book, sound
        self.findings: list[Finding] = []
        self.carried: set[str] = set()
        self.lines: dict[str, list[int]] = {}
        at, line = 0, 1
        for found in _TABLE.finditer(text):
            line += text.count("\n", at, found.start())
            at = found.start()
            self.lines.setdefault(found[1], []).append(line)

    def line(self, table: str, number: int) -> int:
        lines = self.lines.get(table, ())
        return lines[number] if number < len(lines) else 1

    def report(self, code: str, message: str, line: int) -> None:
        self.findings.append(Finding(code, message, where=f"{self.path}:{line}"))

    def convert(self, table: str, number: int, raw: Any, kind: type[Any]) -> Any:
        try:
            return msgspec.convert(raw, kind)
        except msgspec.ValidationError as error:
            self.report("rule-book", f"[[{table}]]: {error}", self.line(table, number))
            return None

    def parse(self, text: str, line: int) -> Equation | None:
        try:
            equation = parse_equation(text)
            if not self.sound:
                check_equation(equation)
        except BadInputError as error:
            for finding in error.findings:
                self.report(finding.code, finding.message, line)
            return None
        return equation

    def rule(self, number: int, raw: Any) -> Rule | None:
        line = self.line("equation", number)
        table = self.convert("equation", number, raw, _EquationTable)
        if table is None:
            return None
        equation = self.parse(table.text, line)
        if equation is None:
            return None
        if equation.left[0].key is None:
            self.report("rule-book", f"{table.name}: a rule's terms need keys", line)
            return None
        self.check_sizes(table.name, equation, line, table.reads)
        kinds = self.kinds(table.name, equation, table.left_kind, table.right_kind, line)
        where = f"{self.path}:{line}"
        return Rule(table.name, equation, *kinds, self.book, where, reads=table.reads)

    def check_sizes(
        self, rule: str, equation: Equation, line: int, reads: Side | None = None
    ) -> None:
        """Report a rule whose sizes cannot be known in every direction in which it is read."""
        for direction in () if self.sound else Direction:
            if reads not in (None, direction.read):
                continue
            loose = undetermined(equation, reverse=direction.backward)
            if loose:
                self.report(
                    "undetermined",
                    f"{rule}: read {direction.value}, nothing says how large {', '.join(loose)} is",
                    line,
                )

    def kinds(
        self,
        rule: str,
        equation: Equation,
        left_kind: str | list[str],
        right_kind: str | list[str],
        line: int,
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The kinds of both sides, one for each term; those that do not fit are reported."""
        kinds = []
        for side, kind in ((equation.left, left_kind), (equation.right, right_kind)):
            each = [kind] * len(side) if isinstance(kind, str) else kind
            if len(each) != len(side):
                self.report(
                    "kind", f"{rule}: {len(each)} kinds for a side of {len(side)} terms", line
                )
            for term, name in zip(side, each, strict=False):
                if name not in KINDS:
                    known = ", ".join(KINDS)
                    self.report("kind", f"{rule}: no kind {name!r}; known: {known}", line)
                elif not KINDS[name].fits(term):
                    self.report("kind", f"{rule}: {term} has not the dims of kind {name!r}", line)
            kinds.append(tuple(each))
        return kinds[0], kinds[1]

    def carry(self, number: int, raw: Any) -> Iterable[Carry]:
        line = self.line("carry", number)
        table = self.convert("carry", number, raw, _CarryTable)
        if table is None:
            return
        if table.kind not in KINDS:
            self.report("kind", f"no kind {table.kind!r}; known: {', '.join(KINDS)}", line)
            return
        if not table.keys and not table.modules:
            self.report("rule-book", "[[carry]]: it names neither keys nor modules", line)
        tensors = [f"{module}.{name}" for module in table.modules for name in ("weight", "bias")]
        tensors = [key for key in tensors if key not in self.carried]
        self.carried.update(key.partition(" : ")[0] for key in (*table.keys, *tensors))
        for key in (*table.keys, *tensors):
            term = key if " : " in key else f"{key} : ..."
            text = f"{term} == {term}" + (f" where {table.where}" if table.where else "")
            equation = self.parse(text, line)
            if equation is not None:
                yield Carry(
                    equation.left[0], equation, table.why, table.kind, f"{self.path}:{line}"
                )

    def drop(self, number: int, raw: Any) -> Iterable[Drop]:
        line = self.line("drop", number)
        table = self.convert("drop", number, raw, _DropTable)
        for text in table.keys if table is not None else ():
            key = self.key(text, line)
            if key is not None:
                yield Drop(_sides(table.side), key, table.why, f"{self.path}:{line}")

    def absent(self, number: int, raw: Any) -> Iterable[Absent]:
        line = self.line("absent", number)
        table = self.convert("absent", number, raw, _AbsentTable)
        for text in table.keys if table is not None else ():
            key = self.key(text, line)
            if key is not None:
                yield Absent(_sides(table.side), key, table.why, f"{self.path}:{line}")

    def parameters(self, number: int, raw: Any) -> Parameters | None:
        line = self.line("parameters", number)
        table = self.convert("parameters", number, raw, _ParametersTable)
        key = self.key(table.module, line) if table else None
        if key is None:
            return None
        return Parameters(_sides(table.side), key, tuple(table.names), f"{self.path}:{line}")

    def module(self, number: int, raw: Any) -> Iterable[tuple[ModuleRule, list[Rule]]]:
        """A rule for modules, and the equations for their tensors that it stands for."""
        line = self.line("module", number)
        table = self.convert("module", number, raw, _ModuleTable)
        if table is None:
            return
        if bool(table.text) == bool(table.left and table.right):
            message = "[[module]]: give either left and right, or text"
            self.report("rule-book", message, line)
            return
        left_kind, right_kind = (
            kind or table.kind or "linear" for kind in (table.left_kind, table.right_kind)
        )
        text = table.text
        if not text:
            try:
                text = f"{table.left} : {PLAIN[left_kind]} == {table.right} : {PLAIN[right_kind]}"
            except (KeyError, TypeError):
                known = ", ".join(PLAIN)
                self.report(
                    "kind",
                    f"[[module]]: no kind {left_kind!r} or {right_kind!r}; known: {known}",
                    line,
                )
                return
        if table.where:
            text += f" where {table.where}"
        equation = self.parse(text, line)
        if equation is None:
            return
        name = table.name or _module_name(equation)
        kinds = self.kinds(name, equation, left_kind, right_kind, line)
        where = f"{self.path}:{line}"
        module_rule = ModuleRule(name, equation, *kinds, where)
        rules = expand_module(module_rule, self.book)
        for rule in rules:
            self.check_sizes(rule.name, rule.equation, line)
        yield module_rule, rules

    def special(self, number: int, raw: Any) -> Special | None:
        line = self.line("special", number)
        table = self.convert("special", number, raw, _SpecialTable)
        key = self.key(table.module, line) if table else None
        if key is None:
            return None
        tensors, where = tuple(table.tensors), f"{self.path}:{line}"
        return Special(_sides(table.side), key, tensors, table.called, table.why, where)

    def key(self, text: str, line: int) -> Key | None:
        try:
            return parse_key(text)
        except BadInputError as error:
            self.report("notation", error.findings[0].message, line)
            return None


PLAIN = {
    "linear": "o i",
    "conv": "o i ...",
    "conv1d": "i o",
    "embedding": "v d",
    "vector": "d",
    "any": "...",
}
"""The dims of a module's weight where it only gets another name."""


def _module_name(equation: Equation) -> str:
    """What a module rule is called that has no name: the last words of its first path."""
    words = [w for w in str(equation.right[0].key).split(".") if not w.startswith("{")]
    return " ".join(words[-3:]) or str(equation.right[0].key)


def expand_module(module: ModuleRule, book: str) -> list[Rule]:
    """The equations for the weights and the biases of a module rule.

    A bias lies along the out dims of its weight. Where these are not whole on both sides (two matrices that are added
    to one output, say), there is no rule for biases.
    """
    rules = [_part(module, book, "weight", module.equation, module.left_kinds, module.right_kinds)]
    sides = []
    for terms, kinds in (
        (module.equation.left, module.left_kinds),
        (module.equation.right, module.right_kinds),
    ):
        dims = [_bias_dims(term, kind) for term, kind in zip(terms, kinds, strict=True)]
        sides.append(
            tuple(
                Term(t.key, d, t.start) for t, d in zip(terms, dims, strict=True) if d is not None
            )
        )
        if None in dims:
            return rules
    left, right = sides
    named = {n for t in (*left, *right) for e in (*t.dims, *t.holes) for n in axes_of(e)}
    where = tuple(
        c for c in module.equation.where if c.axis in named and all(n in named for n in c.axes)
    )
    equation = replace(
        module.equation,
        left=left,
        right=right,
        where=where,
        bounds=tuple(b for b in module.equation.bounds if b.axis in named),
        begins=tuple(b for b in module.equation.begins if b.axis in named),
        copies=tuple(axis for axis in module.equation.copies if axis in named),
        fills=tuple(fill for fill in module.equation.fills if fill.axis in named),
    )
    bias = _part(module, book, "bias", equation, *(tuple("any" for _ in side) for side in sides))
    try:
        check_equation(bias.equation)
    except BadInputError:
        return rules
    return [*rules, bias]


def _bias_dims(term: Term, kind: str) -> tuple[Expr, ...] | None:
    """The dims of a module's bias; ``None`` where it has none."""
    if kind in ("vector", "any"):
        return term.dims
    roles = KINDS[kind].roles if kind in KINDS else None
    if roles is None or kind == "embedding" or OUT not in roles:
        return None
    return (term.dims[roles.index(OUT)],) if len(term.dims) > roles.index(OUT) else None


def _part(
    module: ModuleRule,
    book: str,
    leaf: str,
    equation: Equation,
    left_kinds: tuple[str, ...],
    right_kinds: tuple[str, ...],
) -> Rule:
    def named(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(
            Term(Key((*term.key.parts, f".{leaf}")) if term.key else None, term.dims, term.start)
            for term in terms
        )

    equation = replace(equation, left=named(equation.left), right=named(equation.right))
    equation = parse_equation(str(equation))
    return Rule(
        f"{module.name} {leaf}", equation, left_kinds, right_kinds, book, module.where, module.name
    )


def _sides(side: Literal["left", "right", "both"]) -> tuple[Side, ...]:
    return ("left", "right") if side == "both" else (side,)


def _line_of_field(text: str, message: str) -> int:
    field = re.search(r"\$\.(\w+)", message) or re.search(r"`(\w+)`", message)
    if field:
        name = field[1]
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip().startswith((name, f"[[{name}", f"[{name}")):
                return number
    return 1


def books_for(model_types: Sequence[str], books: Iterable[Book] | None = None) -> list[Book]:
    """The books that know one of the model types; a book that names none is for any.

    A book of the user's own takes the place of regraft's, and that of an installed package's, if both lead between
    the same layouts and the first knows all of the model types that the second does.
    """
    wanted = set(model_types)
    known = library() if books is None else books
    found = [b for b in known if not b.model_types or wanted & set(b.model_types)]
    if len(found) < 2:
        return found
    ranks = {id(b): 2 if b.package else 1 for b in built_in()}
    return [
        b
        for b in found
        if not any(
            ranks.get(id(a), 0) < ranks.get(id(b), 0) and _replaces(a, b, wanted) for a in found
        )
    ]


def _replaces(one: Book, other: Book, wanted: set[str]) -> bool:
    """Whether a book says all that another would, for some model types."""
    if one.is_addition:
        return False
    if {one.left, one.right} != {other.left, other.right}:
        return False
    types = wanted & set(other.model_types) if other.model_types else wanted
    return not one.model_types or types <= set(one.model_types)


def find_book(name: str) -> Book:
    """A book from its file, or from the library by its name.

    Raises ``BadInputError``.
    """
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        found = next((book for book in library() if book.name == name), None)
        if found is not None:
            return found
        from difflib import get_close_matches  # slow to import, and asked of misspelled names only

        near = get_close_matches(name, [book.name for book in library()], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        message = f"there is no such file, and no built-in rule book is called {name!r}"
        fix = f"{hint}`regraft rules list` shows what is built in"
        raise BadInputError(Finding("rule-book", message, where=name, fix=fix))
    try:
        return load_book(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInputError(
            Finding("rule-book", f"it cannot be read: {reason}", where=name, fix="check the path")
        ) from None
