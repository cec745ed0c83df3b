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

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from regraft.equation.lower import check_equation
from regraft.equation.notation import Equation, Key, Term, parse_equation, parse_key
from regraft.equation.sizes import undetermined
from regraft.errors import BadInputError, Finding
from regraft.rules.kinds import KINDS

Side = Literal["left", "right"]


class _EquationTable(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    text: str
    left_kind: str | list[str] = "linear"
    right_kind: str | list[str] = "linear"


class _CarryTable(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[str]
    why: str
    kind: str = "any"
    where: str = ""


class _DropTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right"]
    keys: list[str]
    why: str


class _ParametersTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right", "both"]
    module: str
    names: list[str]


class _ModuleTable(msgspec.Struct, forbid_unknown_fields=True):
    side: Literal["left", "right", "both"]
    module: str
    tensors: list[str]
    called: bool = True
    why: str = ""


class _PartTable(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    equation: list[Any] = []
    carry: list[Any] = []
    drop: list[Any] = []
    parameters: list[Any] = []
    module: list[Any] = []


class _BookTable(_PartTable, forbid_unknown_fields=True, kw_only=True):
    name: str
    title: str
    left: str
    right: str
    model_types: list[str]
    reclaimed: list[str] = []
    reclaimed_model_types: list[str] = []
    source: str = ""
    include: list[str] = []


_T = TypeVar("_T", bound=_PartTable)
_PACKAGE, _FOLDER = "regraft.rules", "library"


@dataclass(frozen=True, slots=True)
class Rule:
    """One equation of a book, with the kinds of its tensors and the line it stands on."""

    name: str
    equation: Equation
    left_kinds: tuple[str, ...]
    right_kinds: tuple[str, ...]
    book: str
    where: str
    """``file:line``."""

    def kinds(self, reverse: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The kinds of the side that is read and of the side that is written."""
        kinds = (self.left_kinds, self.right_kinds)
        return kinds[::-1] if reverse else kinds

    def __str__(self) -> str:
        return f"{self.book}/{self.name} ({self.where})"


@dataclass(frozen=True, slots=True)
class Carry:
    """Keys that are the same in both layouts. ``term`` has dims where the book knows their sizes."""

    term: Term
    equation: Equation
    why: str
    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Keys of one layout that the other has no use for."""

    sides: tuple[Side, ...]
    key: Key
    why: str
    where: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A key of the right layout for which there is no rule, and why."""

    key: Key
    why: str


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a module in the order in which the module registers them."""

    sides: tuple[Side, ...]
    module: Key
    names: tuple[str, ...]
    where: str = ""
    """``file:line``."""


@dataclass(frozen=True, slots=True)
class Module:
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
    """A rule book: two layouts of one model family, and what leads from one to the other."""

    name: str
    title: str
    left: str
    right: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    carries: tuple[Carry, ...]
    parameters: tuple[Parameters, ...]
    modules: tuple[Module, ...]
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
        return replace(
            self,
            left=f"{self.left} as it is spelled",
            right=self.left,
            rules=self.respelled,
            carries=tuple(carries),
            drops=(),
            gaps=(),
            respelled=(),
        )


def load_book(path: Path | Traversable, shown: str | None = None) -> Book:
    """Read and check a rule book; everything that is wrong with it is reported together, with file and line.

    ``include`` names files beside it whose equations, carry-overs and parameters become part of it.

    ``shown`` is what messages call the file.

    Raises ``BadInputError``.
    """
    shown = str(path) if shown is None else shown
    text = path.read_text(encoding="utf-8")
    table = _convert(text, shown, _BookTable)
    findings: list[Finding] = []
    rules: list[Rule] = []
    carries: list[Carry] = []
    drops: list[Drop] = []
    parameters: list[Parameters] = []
    modules: list[Module] = []
    parts: list[tuple[str, str, _PartTable]] = [(shown, text, table)]
    folder = path.parent if isinstance(path, Path) else resources.files(_PACKAGE) / _FOLDER
    for name in table.include:
        part = folder / name
        if not part.is_file():
            line = _line_of_field(text, "`include`")
            message = f"include: there is no file {name} beside it"
            findings.append(Finding("rule-book", message, where=f"{shown}:{line}"))
            continue
        included = part.read_text(encoding="utf-8")
        parts.append((name, included, _convert(included, name, _PartTable)))
    for where, source, part_table in parts:
        loader = _Loader(where, source, table.name)
        rules += filter(None, (loader.rule(i, raw) for i, raw in enumerate(part_table.equation)))
        carries += [c for i, raw in enumerate(part_table.carry) for c in loader.carry(i, raw)]
        drops += [d for i, raw in enumerate(part_table.drop) for d in loader.drop(i, raw)]
        parameters += filter(
            None, (loader.parameters(i, raw) for i, raw in enumerate(part_table.parameters))
        )
        modules += filter(None, (loader.module(i, raw) for i, raw in enumerate(part_table.module)))
        findings += loader.findings
    if table.left == table.right:
        findings.append(Finding("rule-book", "left and right are one layout", where=f"{shown}:1"))
    seen: dict[str, str] = {}
    for rule in rules:
        if seen.setdefault(rule.name, rule.where) != rule.where:
            message = f"two equations are called {rule.name!r}; the first is at {seen[rule.name]}"
            findings.append(Finding("rule-book", message, where=rule.where))
    if findings:
        raise BadInputError(findings)
    return Book(
        table.name,
        table.title,
        table.left,
        table.right,
        tuple(table.model_types),
        tuple(rules),
        tuple(carries),
        tuple(parameters),
        tuple(modules),
        tuple(table.reclaimed),
        tuple(table.reclaimed_model_types),
        shown,
        table.source,
        tuple(drops),
    )


_ONLY: ContextVar[tuple[Book, ...]] = ContextVar("only", default=())


@contextmanager
def only_books(books: Iterable[Book]) -> Iterator[None]:
    """Let these books stand in for the library, in this thread, as long as this lasts; none at all change nothing."""
    token = _ONLY.set(tuple(books))
    try:
        yield
    finally:
        _ONLY.reset(token)


def own_books() -> tuple[Book, ...]:
    """The books that stand in for the library; none where it speaks itself."""
    return _ONLY.get()


def own_layouts() -> tuple[str, ...]:
    """The layouts of the books that stand in for the library."""
    return tuple(dict.fromkeys(name for book in _ONLY.get() for name in (book.left, book.right)))


def library() -> tuple[Book, ...]:
    """The rule books that come with regraft, or those that stand in for them."""
    return _ONLY.get() or _shipped()


@lru_cache(maxsize=1)
def _shipped() -> tuple[Book, ...]:
    folder = resources.files(_PACKAGE) / _FOLDER
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return tuple(load_book(file, file.name) for file in files if not file.name.startswith("_"))


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
    def __init__(self, path: str, text: str, book: str) -> None:
        self.path, self.text, self.book = path, text, book
        self.findings: list[Finding] = []
        self.lines = {
            name: [
                self.text.count("\n", 0, m.start()) + 1
                for m in re.finditer(rf"^[ \t]*\[\[{name}\]\]", self.text, re.MULTILINE)
            ]
            for name in ("equation", "carry", "drop", "parameters", "module")
        }

    def line(self, table: str, number: int) -> int:
        lines = self.lines[table]
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
        for reverse, direction in ((False, "left to right"), (True, "right to left")):
            loose = undetermined(equation, reverse)
            if loose:
                self.report(
                    "undetermined",
                    f"{table.name}: read {direction}, nothing says how large {', '.join(loose)} is",
                    line,
                )
        kinds = []
        for side, kind in ((equation.left, table.left_kind), (equation.right, table.right_kind)):
            each = [kind] * len(side) if isinstance(kind, str) else kind
            if len(each) != len(side):
                self.report(
                    "kind", f"{table.name}: {len(each)} kinds for a side of {len(side)} terms", line
                )
            for term, name in zip(side, each, strict=False):
                if name not in KINDS:
                    known = ", ".join(KINDS)
                    self.report("kind", f"{table.name}: no kind {name!r}; known: {known}", line)
                elif not KINDS[name].fits(term):
                    self.report(
                        "kind", f"{table.name}: {term} has not the dims of kind {name!r}", line
                    )
            kinds.append(tuple(each))
        return Rule(table.name, equation, kinds[0], kinds[1], self.book, f"{self.path}:{line}")

    def carry(self, number: int, raw: Any) -> Iterable[Carry]:
        line = self.line("carry", number)
        table = self.convert("carry", number, raw, _CarryTable)
        if table is None:
            return
        if table.kind not in KINDS:
            self.report("kind", f"no kind {table.kind!r}; known: {', '.join(KINDS)}", line)
            return
        for key in table.keys:
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

    def parameters(self, number: int, raw: Any) -> Parameters | None:
        line = self.line("parameters", number)
        table = self.convert("parameters", number, raw, _ParametersTable)
        key = self.key(table.module, line) if table else None
        if key is None:
            return None
        return Parameters(_sides(table.side), key, tuple(table.names), f"{self.path}:{line}")

    def module(self, number: int, raw: Any) -> Module | None:
        line = self.line("module", number)
        table = self.convert("module", number, raw, _ModuleTable)
        key = self.key(table.module, line) if table else None
        if key is None:
            return None
        tensors, where = tuple(table.tensors), f"{self.path}:{line}"
        return Module(_sides(table.side), key, tensors, table.called, table.why, where)

    def key(self, text: str, line: int) -> Key | None:
        try:
            return parse_key(text)
        except BadInputError as error:
            self.report("notation", error.findings[0].message, line)
            return None


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
    """The books that know one of the model types; a book that names none is for any."""
    wanted = set(model_types)
    known = library() if books is None else books
    return [b for b in known if not b.model_types or wanted & set(b.model_types)]


def find_book(name: str) -> Book:
    """A book from its file, or from the library by its name.

    Raises ``BadInputError``.
    """
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        found = next((book for book in library() if book.name == name), None)
        if found is not None:
            return found
        known = ", ".join(book.name for book in library())
        raise BadInputError(
            Finding("rule-book", f"there is no rule book {name!r}; the library has {known}")
        )
    try:
        return load_book(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInputError(
            Finding("rule-book", f"it cannot be read: {reason}", where=name, fix="check the path")
        ) from None
