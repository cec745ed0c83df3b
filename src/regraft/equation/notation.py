"""The notation: one equation between named axes says what a layout change is.

    layers.{l}.experts.{e}.w1.weight : a i
    layers.{l}.experts.{e}.w3.weight : b i
        == layers.{l}.experts.gate_up_proj : e (a + b) i
    where a = b, e = config.num_experts

A term is ``key : dims`` (or only the dims). Terms stand one to a line or separated by commas. ``( )`` is a
product of axes, row major; ``+`` is a sum, pieces laid one after the other; ``...`` is the last dims of every
tensor, as one axis. A hole ``{e}`` in a key is an index, ``{*p}`` any number of whole segments. ``where`` adds
what the shapes of the side that is read do not say: ``a = b``, ``k = 1``, ``e = config.num_experts |
config.n_experts``, ``d = config.hidden_size / h``, ``h = shape(SOME.key, 0)``, and ``l < config.num_layers``: an
index beyond it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from regraft.errors import BadInputError, Finding

REST = "..."
_KEY_ENDS = " \t\r\n:,()"


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis; ``...`` is one too."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Product:
    """Axes laid out row major: the last one runs fastest."""

    factors: tuple[Expr, ...]

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.factors)) + ")"


@dataclass(frozen=True, slots=True)
class Sum:
    """Pieces laid one after the other."""

    terms: tuple[Expr, ...]

    def __str__(self) -> str:
        inner = (
            str(t)[1:-1] if isinstance(t, Product) and len(t.factors) > 1 else str(t)
            for t in self.terms
        )
        return "(" + " + ".join(inner) + ")"


Expr = Axis | Product | Sum


@dataclass(frozen=True, slots=True)
class Hole:
    """An index in a key: an axis, or a product or sum of axes."""

    expr: Expr

    def __str__(self) -> str:
        return "{" + str(self.expr) + "}"


@dataclass(frozen=True, slots=True)
class Segments:
    """``{*p}``: any number of whole segments, the same text on both sides."""

    name: str

    def __str__(self) -> str:
        return "{*" + self.name + "}"


@dataclass(frozen=True, slots=True)
class Key:
    """A key template: text, holes and ``{*p}`` in order."""

    parts: tuple[str | Hole | Segments, ...]

    def __str__(self) -> str:
        return "".join(map(str, self.parts))

    @property
    def holes(self) -> tuple[Expr, ...]:
        """The index expressions, from left to right."""
        return tuple(part.expr for part in self.parts if isinstance(part, Hole))

    @property
    def rests(self) -> tuple[str, ...]:
        """The names of the ``{*p}`` parts, from left to right."""
        return tuple(part.name for part in self.parts if isinstance(part, Segments))


@dataclass(frozen=True, slots=True)
class Term:
    """One tensor of a side: its key (``None`` where only dims were written) and one expression per dim."""

    key: Key | None
    dims: tuple[Expr, ...]
    start: int
    """Where the term begins in the equation's text."""

    @property
    def ends_open(self) -> bool:
        """Whether the last dim is ``...``."""
        return bool(self.dims) and self.dims[-1] == Axis(REST)

    def __str__(self) -> str:
        dims = " ".join(map(str, self.dims))
        return f"{self.key} : {dims}" if self.key is not None else dims


@dataclass(frozen=True, slots=True)
class ConfigPath:
    """``config.a.b | config.c``: the first field that the model's config has."""

    paths: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return " | ".join("config." + ".".join(path) for path in self.paths)


@dataclass(frozen=True, slots=True)
class ShapeOf:
    """``shape(KEY, dim)``: a size of a tensor of the target."""

    key: Key
    dim: int

    def __str__(self) -> str:
        return f"shape({self.key}, {self.dim})"


Value = int | Axis | ConfigPath | ShapeOf


@dataclass(frozen=True, slots=True)
class Where:
    """``axis = value * value / value``."""

    axis: str
    values: tuple[tuple[str, Value], ...]
    """Pairs of ``*`` or ``/`` and a value; the first is always ``*``."""
    start: int

    def __str__(self) -> str:
        text = "".join(f" {op} {value}" for op, value in self.values)
        return f"{self.axis} = {text[3:]}"


@dataclass(frozen=True, slots=True)
class Bound:
    """``loop < value``: an index that the base model does not have is an error."""

    axis: str
    values: tuple[tuple[str, Value], ...]
    start: int

    def __str__(self) -> str:
        return f"{self.axis} < " + "".join(f" {op} {value}" for op, value in self.values)[3:]


@dataclass(frozen=True, slots=True)
class Equation:
    """Two sides that hold the same elements. Its inverse is itself, read right to left."""

    text: str
    left: tuple[Term, ...]
    right: tuple[Term, ...]
    where: tuple[Where, ...]
    bounds: tuple[Bound, ...] = ()

    def sides(self, reverse: bool = False) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
        """The side that is read and the side that is written."""
        return (self.right, self.left) if reverse else (self.left, self.right)

    def __str__(self) -> str:
        sides = " == ".join(", ".join(map(str, side)) for side in (self.left, self.right))
        clauses = ", ".join(map(str, (*self.where, *self.bounds)))
        return sides + (f" where {clauses}" if clauses else "")


def notation_error(
    text: str, at: int, message: str, *, where: str | None = None, code: str = "notation"
) -> BadInputError:
    """An error that shows the line of ``text`` at offset ``at`` with a mark under the part that is wrong."""
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    line = text[start : end if end >= 0 else len(text)]
    drawing = f"{message}\n    {line}\n    {' ' * (at - start)}^"
    return BadInputError(Finding(code, drawing, where=where))


def axes_of(expr: Expr) -> Iterator[str]:
    """Every axis name in an expression, from left to right.

    >>> list(axes_of(Product((Axis("g"), Sum((Axis("n"), Axis("k")))))))
    ['g', 'n', 'k']
    """
    if isinstance(expr, Axis):
        yield expr.name
    else:
        for part in expr.factors if isinstance(expr, Product) else expr.terms:
            yield from axes_of(part)


@lru_cache(maxsize=4096)
def loops_of(equation: Equation) -> tuple[str, ...]:
    """Axes that stand alone in holes and meet no shape: any values, gaps allowed."""
    bare: dict[str, None] = {}
    sized: set[str] = set()
    for term in (*equation.left, *equation.right):
        for hole in term.key.holes if term.key else ():
            if isinstance(hole, Axis):
                bare[hole.name] = None
            else:
                sized.update(axes_of(hole))
        for dim in term.dims:
            sized.update(axes_of(dim))
    return tuple(name for name in bare if name not in sized)


@lru_cache(maxsize=4096)
def parse_equation(text: str) -> Equation:
    """Parse an equation; the result is cached and immutable.

    >>> str(parse_equation("(h d two) i == (h two d) i where two = 2"))
    '(h d two) i == (h two d) i where two = 2'

    Raises ``BadInputError`` with the equation and a mark under the part that is wrong.
    """
    scanner = _Scanner(text)
    left = scanner.side(("==",))
    scanner.expect("==", "an equation has two sides with == between them")
    right = scanner.side(("where", ""))
    clauses: list[Where | Bound] = []
    if scanner.take_word("where"):
        clauses.append(scanner.clause())
        while scanner.take(","):
            clauses.append(scanner.clause())
    scanner.skip()
    if scanner.at < len(text):
        raise scanner.error("this was not expected here")
    where = tuple(c for c in clauses if isinstance(c, Where))
    return Equation(text, left, right, where, tuple(c for c in clauses if isinstance(c, Bound)))


@lru_cache(maxsize=4096)
def parse_key(text: str) -> Key:
    """Parse a key template.

    >>> parse_key("layers.{l}.experts.{(t + v)}.weight").holes
    (Axis(name='l'), Sum(terms=(Axis(name='t'), Axis(name='v'))))
    """
    scanner = _Scanner(text)
    key = scanner.key()
    if scanner.at < len(text):
        raise scanner.error("this was not expected in a key")
    return key


_DEEPEST = 40
"""How deep brackets may be nested; everything that walks an equation recurses as deep."""
_LONGEST = 18
"""How many digits a number may have: sizes are 64-bit integers."""


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def error(self, message: str, at: int | None = None) -> BadInputError:
        return notation_error(self.text, self.at if at is None else at, message)

    def skip(self, newlines: bool = True) -> None:
        blanks = " \t\r\n" if newlines else " \t\r"
        while self.at < len(self.text) and self.text[self.at] in blanks:
            self.at += 1

    def take(self, token: str) -> bool:
        self.skip()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def take_word(self, word: str) -> bool:
        self.skip()
        if self.ends((word,)):
            self.at += len(word)
            return True
        return False

    def expect(self, token: str, message: str) -> None:
        if not self.take(token):
            raise self.error(message)

    def ends(self, stops: tuple[str, ...], at: int | None = None) -> bool:
        """Whether one of the stops stands here; a stop that is a word must be a whole one."""
        at = self.at if at is None else at
        return any(
            at >= len(self.text)
            if not stop
            else self.text.startswith(stop, at) and self._whole(stop, at)
            for stop in stops
        )

    def _whole(self, stop: str, at: int) -> bool:
        if not stop.isalpha():
            return True
        before, after = self.text[:at][-1:], self.text[at + len(stop) :][:1]
        return (not before or before.isspace() or before == ",") and (not after or after.isspace())

    def side(self, stops: tuple[str, ...]) -> tuple[Term, ...]:
        terms = []
        while True:
            self.skip()
            while self.take(","):
                self.skip()
            if self.ends(stops) or self.at >= len(self.text):
                break
            terms.append(self.term(stops))
        if not terms:
            raise self.error("a side needs at least one term")
        return tuple(terms)

    def term(self, stops: tuple[str, ...]) -> Term:
        start = self.at
        key: Key | None = None
        if self._has_key(stops):
            key = self.key()
            self.expect(":", "a key is followed by : and its dims")
        dims: list[Expr] = []
        while True:
            self.skip(newlines=False)
            if self.at >= len(self.text) or self.text[self.at] in ",\n" or self.ends(stops):
                break
            dims.append(self.atom())
        for dim in dims[:-1]:
            if dim == Axis(REST):
                raise self.error("... stands for the last dims, so it must come last", start)
        return Term(key, tuple(dims), start)

    def _has_key(self, stops: tuple[str, ...]) -> bool:
        for position in range(self.at, len(self.text)):
            char = self.text[position]
            if char in ":{}":
                return True
            if char in ",\n" or self.ends(tuple(filter(None, stops)), position):
                return False
        return False

    def key(self) -> Key:
        parts: list[str | Hole | Segments] = []
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in _KEY_ENDS:
            if self.text[self.at] == "{":
                parts.append(self._hole())
            else:
                begin = self.at
                while self.at < len(self.text) and self.text[self.at] not in _KEY_ENDS + "{":
                    if self.text[self.at] == "}":
                        raise self.error("this } closes no {")
                    self.at += 1
                parts.append(self.text[begin : self.at])
        if not parts:
            raise self.error("a key was expected", start)
        segments = [i for i, part in enumerate(parts) if isinstance(part, Segments)]
        for left, right in pairwise(segments):
            between = "".join(part for part in parts[left:right] if isinstance(part, str))
            if any(map(str.isdigit, between)) and not any(map(str.isalpha, between)):
                raise self.error("a number between two {*...} cannot be told from theirs", start)
        for position, part in enumerate(parts):
            if isinstance(part, Segments):
                before = parts[position - 1] if position else "."
                after = parts[position + 1] if position + 1 < len(parts) else "."
                if not (isinstance(before, str) and before.endswith(".")) or not (
                    isinstance(after, str) and after.startswith(".")
                ):
                    raise self.error(
                        f"{part} holds whole segments: dots must stand around it", start
                    )
        return Key(tuple(parts))

    def _hole(self) -> Hole | Segments:
        opened = self.at
        self.at += 1
        if self.text.startswith("*", self.at):
            self.at += 1
            name = self.name("a name was expected after {*")
            part: Hole | Segments = Segments(name)
        else:
            self.skip()
            part = Hole(self.atom())
        self.skip()
        if not self.text.startswith("}", self.at):
            raise self.error(
                "this { is not closed (a sum or product in a hole needs brackets)", opened
            )
        self.at += 1
        return part

    def name(self, message: str = "the name of an axis was expected") -> str:
        start = self.at
        while self.at < len(self.text) and (
            self.text[self.at].isalnum() or self.text[self.at] == "_"
        ):
            self.at += 1
        name = self.text[start : self.at]
        if not name or name[0].isdigit():
            raise self.error(message, start)
        return name

    def atom(self) -> Expr:
        self.skip(newlines=False)
        if self.text.startswith(REST, self.at):
            self.at += len(REST)
            return Axis(REST)
        if not self.text.startswith("(", self.at):
            return Axis(self.name())
        opened = self.at
        if self.depth == _DEEPEST:
            raise self.error(f"brackets are nested more than {_DEEPEST} deep")
        self.depth += 1
        self.at += 1
        terms = [self.product(opened)]
        while self.take("+"):
            terms.append(self.product(opened))
        if not self.take(")"):
            raise self.error("this ( is not closed", opened)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def product(self, opened: int) -> Expr:
        factors: list[Expr] = []
        while True:
            self.skip()
            if self.at >= len(self.text):
                raise self.error("this ( is not closed", opened)
            if self.text[self.at] in "+)":
                break
            if self.text.startswith(REST, self.at):
                raise self.error("... cannot stand inside brackets")
            factors.append(self.atom())
        if not factors:
            raise self.error("an axis was expected here")
        return factors[0] if len(factors) == 1 else Product(tuple(factors))

    def clause(self) -> Where | Bound:
        self.skip()
        start = self.at
        axis = self.name()
        bound = self.take("<")
        if not bound:
            self.expect("=", "a where clause reads: axis = value, or: loop < value")
        values: list[tuple[str, Value]] = [("*", self.value())]
        while True:
            if self.take("*"):
                values.append(("*", self.value()))
            elif self.take("/"):
                values.append(("/", self.value()))
            elif bound:
                return Bound(axis, tuple(values), start)
            else:
                return Where(axis, tuple(values), start)

    def value(self) -> Value:
        self.skip()
        if self.at < len(self.text) and self.text[self.at].isdigit():
            start = self.at
            while self.at < len(self.text) and self.text[self.at].isdigit():
                self.at += 1
            if self.at - start > _LONGEST:
                raise self.error(f"a number has at most {_LONGEST} digits", start)
            return int(self.text[start : self.at])
        start = self.at
        if self.text.startswith("config.", self.at):
            paths = [self._config_path()]
            while self.take("|"):
                self.skip()
                if not self.text.startswith("config.", self.at):
                    raise self.error("another config field was expected after |")
                paths.append(self._config_path())
            return ConfigPath(tuple(paths))
        if self.text.startswith("shape(", self.at):
            self.at += len("shape(")
            self.skip()
            key = self.key()
            self.expect(",", "shape(KEY, dim) needs the number of the dim")
            dim = self.value()
            if not isinstance(dim, int):
                raise self.error("the dim of shape(KEY, dim) is a number", start)
            self.expect(")", "this shape( is not closed")
            return ShapeOf(key, dim)
        return Axis(self.name("a number, an axis, config.FIELD or shape(KEY, dim) was expected"))

    def _config_path(self) -> tuple[str, ...]:
        self.at += len("config.")
        path = [self.name("a config field was expected")]
        while self.text.startswith(".", self.at):
            self.at += 1
            path.append(self.name("a config field was expected"))
        return tuple(path)
