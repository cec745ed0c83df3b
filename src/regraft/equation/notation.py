"""The notation: one equation between named axes says what a layout change is.

    layers.{l}.experts.{e}.w1.weight : a i
    layers.{l}.experts.{e}.w3.weight : b i
        == layers.{l}.experts.gate_up_proj : e (a + b) i
    where a = b, e = config.num_experts

A term is ``key : dims`` (or only the dims). Terms stand one to a line or separated by commas. ``( )`` is a
product of axes, row major; ``+`` is a sum, pieces laid one after the other; ``1`` is a dim of one position;
``...`` is the last dims of every tensor, as one axis. A hole ``{e}`` in a key is an index, ``{3 b + r + 1}`` a
number computed from indices, ``{*p}`` any number of whole segments. ``where`` adds what the shapes of the side
that is read do not say: ``a = b``, ``m = 4 q``, ``k = 1``, ``e = config.num_experts | config.n_experts``, ``d =
config.hidden_size / h``, ``l is config.num_layers - 1 | last``, ``h = shape(SOME.key, 0)``; ``l <
config.num_layers``: an index beyond it is an error; ``copies t``: what lies along ``t`` is the same each time;
``fill p = 0``: padding along ``p``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import prod

from msgspec import Struct

from regraft.errors import BadInputError, Finding

REST = "..."
_KEY_ENDS = " \t\r\n:,()"
_KEY_LETTERS = re.compile(r"[^ \t\r\n:,(){}]+")
_BLANKS, _BLANKS_OF_A_LINE = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r]*")
_SEPARATORS = re.compile(r"[ \t\r\n,]*")
_WORD = re.compile(r"\w*")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE]-?[0-9]+)?")


class Axis(Struct, frozen=True):
    """A named axis; ``...`` is one too."""

    name: str

    def __str__(self) -> str:
        return self.name


class Product(Struct, frozen=True):
    """Axes laid out row major: the last one runs fastest."""

    factors: tuple[Expr, ...]

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.factors)) + ")" if self.factors else "1"


class Sum(Struct, frozen=True):
    """Pieces laid one after the other."""

    terms: tuple[Expr, ...]

    def __str__(self) -> str:
        inner = (
            str(t)[1:-1] if isinstance(t, Product) and len(t.factors) > 1 else str(t)
            for t in self.terms
        )
        return "(" + " + ".join(inner) + ")"


class Affine(Struct, frozen=True):
    """A number in a key, computed from indices: ``3 b + r + 1``. It stands in holes only."""

    terms: tuple[tuple[int, str], ...]
    """Factors and indices."""
    constant: int

    def __str__(self) -> str:
        text = ""
        for factor, name in self.terms:
            shown = name if abs(factor) == 1 else f"{abs(factor)} {name}"
            text += f" {'-' if factor < 0 else '+'} {shown}"
        if self.constant > 0 and self.terms[0][0] < 0:
            return f"{self.constant}{text}"
        if self.constant:
            text += f" {'-' if self.constant < 0 else '+'} {abs(self.constant)}"
        return text.removeprefix(" + ").removeprefix(" ")


Expr = Axis | Product | Sum | Affine
"""``Product(())`` is a dim of one position, written ``1``."""

UNIT = Product(())


class Hole(Struct, frozen=True):
    """An index in a key: an axis, or a product or sum of axes."""

    expr: Expr

    def __str__(self) -> str:
        return "{" + str(self.expr) + "}"


class Segments(Struct, frozen=True):
    """``{*p}``: any number of whole segments, the same text on both sides."""

    name: str

    def __str__(self) -> str:
        return "{*" + self.name + "}"


class Key(Struct, frozen=True, cache_hash=True, dict=True):
    """A key template: text, holes and ``{*p}`` in order."""

    parts: tuple[str | Hole | Segments, ...]

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        return "".join(map(str, self.parts))

    @cached_property
    def holes(self) -> tuple[Expr, ...]:
        """The index expressions, from left to right."""
        return tuple(part.expr for part in self.parts if isinstance(part, Hole))

    @cached_property
    def rests(self) -> tuple[str, ...]:
        """The names of the ``{*p}`` parts, from left to right."""
        return tuple(part.name for part in self.parts if isinstance(part, Segments))


class Term(Struct, frozen=True, cache_hash=True, dict=True):
    """One tensor of a side: its key (``None`` where only dims were written) and one expression per dim."""

    key: Key | None
    dims: tuple[Expr, ...]
    start: int
    """Where the term begins in the equation's text."""

    @cached_property
    def ends_open(self) -> bool:
        """Whether the last dim is ``...``."""
        return bool(self.dims) and self.dims[-1] == Axis(REST)

    @cached_property
    def holes(self) -> tuple[Expr, ...]:
        """The index expressions of its key."""
        return self.key.holes if self.key is not None else ()

    def __str__(self) -> str:
        dims = " ".join(map(str, self.dims))
        return f"{self.key} : {dims}" if self.key is not None else dims


class ConfigPath(Struct, frozen=True):
    """``config.a.b | config.c``: the first field that the model's config has."""

    paths: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return " | ".join("config." + ".".join(path) for path in self.paths)


class ShapeOf(Struct, frozen=True):
    """``shape(KEY, dim)``: a size of a tensor of the target."""

    key: Key
    dim: int

    def __str__(self) -> str:
        return f"shape({self.key}, {self.dim})"


Value = int | Axis | ConfigPath | ShapeOf


class Where(Struct, frozen=True, dict=True):
    """``axis = value * value / value``, several of them added or subtracted."""

    axis: str
    values: tuple[tuple[str, Value], ...]
    """Pairs of ``*``, ``/``, ``+`` or ``-`` and a value; the first is always ``*``."""
    start: int
    one: bool = False
    """``index is value``: the index of a key that has only this value."""
    or_last: bool = False
    """Whether that is the last index that there is where the values are not known."""

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes among the values."""
        return tuple(value.name for _, value in self.values if isinstance(value, Axis))

    def __str__(self) -> str:
        text = "".join(f" {op} {value}" for op, value in self.values)[3:]
        last = ("last" if not text else " | last") if self.or_last else ""
        return f"{self.axis} {'is' if self.one else '='} {text}{last}"


class Bound(Struct, frozen=True):
    """``loop < value``: an index that the base model does not have is an error."""

    axis: str
    values: tuple[tuple[str, Value], ...]
    start: int

    def __str__(self) -> str:
        return f"{self.axis} < " + "".join(f" {op} {value}" for op, value in self.values)[3:]


class Begin(Struct, frozen=True):
    """``loop from value``: the rule speaks of no index below."""

    axis: str
    values: tuple[tuple[str, Value], ...]
    start: int

    def __str__(self) -> str:
        return f"{self.axis} from " + "".join(f" {op} {value}" for op, value in self.values)[3:]


class Copies(Struct, frozen=True):
    """``copies t``: along an axis that only one side has, the elements are the same each time."""

    axis: str


class Fill(Struct, frozen=True):
    """``fill p = 0``: along an axis that only one side has there is padding, all of one value."""

    axis: str
    value: float
    start: int
    any: bool = False
    """``fill p = any``: it is written as zeros, and whatever is read there has no meaning."""

    def __str__(self) -> str:
        return f"fill {self.axis} = {'any' if self.any else format(self.value, 'g')}"


class Equation(Struct, frozen=True, cache_hash=True, dict=True):
    """Two sides that hold the same elements. Its inverse is itself, read right to left."""

    text: str
    left: tuple[Term, ...]
    right: tuple[Term, ...]
    where: tuple[Where, ...]
    bounds: tuple[Bound, ...] = ()
    copies: tuple[str, ...] = ()
    """Axes along which one side has the same elements several times."""
    fills: tuple[Fill, ...] = ()
    begins: tuple[Begin, ...] = ()

    def sides(self, *, reverse: bool = False) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
        """The side that is read and the side that is written."""
        return (self.right, self.left) if reverse else (self.left, self.right)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes that stand in dims or in keys, in order of appearance."""
        exprs = (e for term in (*self.left, *self.right) for e in (*term.dims, *term.holes))
        return tuple(dict.fromkeys(name for expr in exprs for name in axes_of(expr)))

    @cached_property
    def indices(self) -> tuple[str, ...]:
        """What stands in holes only, alone or in a number computed from it: it has no size."""
        bare: dict[str, None] = {}
        sized = set(self.copies)
        for term in (*self.left, *self.right):
            for hole in term.holes:
                names = axes_of(hole)
                if isinstance(hole, (Axis, Affine)):
                    bare.update(dict.fromkeys(names))
                else:
                    sized.update(names)
            for dim in term.dims:
                sized.update(axes_of(dim))
        return tuple(name for name in bare if name not in sized)

    @cached_property
    def givens(self) -> dict[str, Where]:
        """Indices that have one value (``l is config.num_layers - 1``): such a hole is one number."""
        return {clause.axis: clause for clause in self.where if clause.one}

    @cached_property
    def loops(self) -> tuple[str, ...]:
        """Indices that take any values, gaps allowed."""
        return tuple(name for name in self.indices if name not in self.givens)

    @cached_property
    def asked(self) -> tuple[ConfigPath | ShapeOf, ...]:
        """What its clauses ask for beyond the tensors' shapes."""
        clauses: tuple[Where | Bound | Begin, ...] = (*self.where, *self.bounds, *self.begins)
        values = (value for clause in clauses for _, value in clause.values)
        return tuple(dict.fromkeys(v for v in values if isinstance(v, ConfigPath | ShapeOf)))

    def __str__(self) -> str:
        sides = " == ".join(", ".join(map(str, side)) for side in (self.left, self.right))
        copied = [f"copies {axis}" for axis in self.copies]
        clauses = ", ".join(
            [
                *map(str, (*self.where, *self.bounds, *self.begins)),
                *copied,
                *map(str, self.fills),
            ]
        )
        return sides + (f" where {clauses}" if clauses else "")


_LONGEST_EQUATION, _MOST_PIECES = 20_000, 4096


def count_pieces(expr: Expr) -> int:
    """Into how many pieces the sums of an expression cut what it stands for.

    >>> count_pieces(parse_equation("((a + b) (c + d + e)) == x").left[0].dims[0])
    6
    """
    if isinstance(expr, Axis):
        return 1
    if isinstance(expr, Sum):
        return sum(map(count_pieces, expr.terms))
    return prod(map(count_pieces, expr.factors)) if isinstance(expr, Product) else 1


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
    elif isinstance(expr, Affine):
        yield from (name for _, name in expr.terms)
    else:
        for part in expr.factors if isinstance(expr, Product) else expr.terms:
            yield from axes_of(part)


@lru_cache(maxsize=4096)
def parse_equation(text: str) -> Equation:
    """Parse an equation; the result is cached and immutable.

    >>> str(parse_equation("(h d two) i == (h two d) i where two = 2"))
    '(h d two) i == (h two d) i where two = 2'

    Raises ``BadInputError`` with the equation and a mark under the part that is wrong.
    """
    if len(text) > _LONGEST_EQUATION:
        message = (
            f"an equation has at most {_LONGEST_EQUATION} characters, and this one {len(text)}"
        )
        raise notation_error(text[:100], 0, message)
    scanner = _Scanner(text)
    left = scanner.side(("==",))
    scanner.expect("==", "an equation has two sides with == between them")
    right = scanner.side(("where", ""))
    clauses: list[Where | Bound | Begin | Fill | Copies] = []
    if scanner.take_word("where"):
        clauses.append(scanner.clause())
        while scanner.take(","):
            clauses.append(scanner.clause())
    scanner.skip()
    if scanner.at < len(text):
        raise scanner.error("this was not expected here")
    for term in (*left, *right) if "+" in text else ():
        pieces = prod(count_pieces(expr) for expr in (*term.holes, *term.dims))
        if pieces > _MOST_PIECES:
            message = (
                f"its sums cut {term} into {pieces} pieces, and at most {_MOST_PIECES} are moved"
            )
            raise notation_error(text[:1000], 0, message)
    if not clauses:
        return Equation(text, left, right, ())
    where = tuple(c for c in clauses if isinstance(c, Where))
    bounds = tuple(c for c in clauses if isinstance(c, Bound))
    copies = tuple(c.axis for c in clauses if isinstance(c, Copies))
    fills = tuple(c for c in clauses if isinstance(c, Fill))
    begins = tuple(c for c in clauses if isinstance(c, Begin))
    return Equation(text, left, right, where, bounds, copies, fills, begins)


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
_MOST_RESTS = 3
"""How many ``{*...}`` one name may have."""
_LONGEST = 18
"""How many digits a number may have: sizes are 64-bit integers."""


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


@cache
def _marks_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """What tells whether a term begins with a key: a letter that only keys have, or one that ends a term."""
    return re.compile("[:{},\n" + re.escape("".join(word[0] for word in words)) + "]")


_PLAIN_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_PLAIN_FIELD = rf"config(?:\.{_PLAIN_NAME})+"
_PLAIN_CLAUSE = re.compile(
    rf"({_PLAIN_NAME})[ ]*([=<])[ ]*({_PLAIN_FIELD}(?:[ ]\|[ ]{_PLAIN_FIELD})*)(?=[ ]*(?:,|\Z))"
)
"""Most clauses, in one piece: an axis or an index, and the config's fields that say how large it is."""


@cache
def _plain_term(stop: str) -> re.Pattern[str]:
    """Most terms, in one piece: a key whose holes are names, and dims that are names; ``stop`` may follow it.

    Where this does not match, the scanner reads a term letter by letter, and can say what is wrong with it.
    """
    end = rf"[ ]+{stop}\s" if stop.isalpha() else rf"[ ]*{re.escape(stop)}"
    return re.compile(
        rf"(?!where\b)((?:\{{\*{_PLAIN_NAME}\}}(?=\.))?(?:[A-Za-z0-9_.-]|\{{{_PLAIN_NAME}\}})+)[ ]*:"
        rf"((?:[ ]+(?!where\b){_PLAIN_NAME})*(?:[ ]+\.\.\.)?)"
        rf"(?=[ ]*(?:[,\n]|\Z)|{end})"
    )


@lru_cache(maxsize=4096)
def _plain_key(text: str) -> Key:
    """A key whose holes are names; it may begin with any number of whole segments."""
    if text.startswith("{*"):
        name, _, rest = text.removeprefix("{*").partition("}")
        return Key((Segments(name), *_plain_key(rest).parts))
    parts = re.split(r"\{(\w+)\}", text)
    each = (Hole(_axis(part)) if at % 2 else part for at, part in enumerate(parts))
    return Key(tuple(part for part in each if part))


@cache
def _axis(name: str) -> Axis:
    return Axis(name)


@lru_cache(maxsize=1024)
def _fields(text: str) -> ConfigPath:
    return ConfigPath(tuple(tuple(field.split(".")[1:]) for field in text.split(" | ")))


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def error(self, message: str, at: int | None = None) -> BadInputError:
        return notation_error(self.text, self.at if at is None else at, message)

    def skip(self, *, newlines: bool = True) -> None:
        if self.text[self.at : self.at + 1].isspace():
            blanks = (_BLANKS if newlines else _BLANKS_OF_A_LINE).match(self.text, self.at)
            assert blanks is not None
            self.at = blanks.end()

    def take(self, token: str) -> bool:
        self.skip()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def take_word(self, word: str) -> bool:
        self.skip()
        if self._whole(word, self.at):
            self.at += len(word)
            return True
        return False

    def expect(self, token: str, message: str) -> None:
        if not self.take(token):
            raise self.error(message)

    def ends(self, stops: tuple[str, ...], at: int | None = None) -> bool:
        """Whether one of the stops stands here; a stop that is a word must be a whole one."""
        at = self.at if at is None else at
        return any(self._whole(stop, at) if stop else at >= len(self.text) for stop in stops)

    def _whole(self, stop: str, at: int) -> bool:
        """Whether a stop stands at a place, and not inside a word."""
        if not self.text.startswith(stop, at):
            return False
        if not stop.isalpha():
            return True
        before, after = self.text[:at][-1:], self.text[at + len(stop) :][:1]
        return (not before or before.isspace() or before == ",") and (not after or after.isspace())

    def side(self, stops: tuple[str, ...]) -> tuple[Term, ...]:
        terms: list[Term] = []
        plain_term = _plain_term(stops[0])
        while True:
            separators = _SEPARATORS.match(self.text, self.at)
            assert separators is not None
            self.at = separators.end()
            plain = plain_term.match(self.text, self.at)
            if plain is not None:
                dims = tuple(map(_axis, plain[2].split()))
                terms.append(Term(_plain_key(plain[1]), dims, self.at))
                self.at = plain.end()
            elif self.ends(stops) or self.at >= len(self.text):
                break
            else:
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
        words = tuple(filter(None, stops))
        for found in _marks_of(words).finditer(self.text, self.at):
            if found[0] in ":{}":
                return True
            if found[0] in ",\n" or self.ends(words, found.start()):
                return False
        return False

    def key(self) -> Key:
        parts: list[str | Hole | Segments] = []
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in _KEY_ENDS:
            if self.text[self.at] == "{":
                parts.append(self._hole())
            else:
                letters = _KEY_LETTERS.match(self.text, self.at)
                self.at = self.at if letters is None else letters.end()
                if self.text.startswith("}", self.at):
                    raise self.error("this } closes no {")
                assert letters is not None
                parts.append(letters[0])
        if not parts:
            raise self.error("a key was expected", start)
        segments = [i for i, part in enumerate(parts) if isinstance(part, Segments)]
        if len(segments) > _MOST_RESTS:
            message = (
                f"a name has {_MOST_RESTS} {{*...}} at most: each multiplies the ways to read a key"
            )
            raise self.error(message, start)
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
            computed = self.text[self.at : self.at + 1] not in ("(", "}", ".")
            part = Hole(self.affine() if computed else self.atom())
        self.skip()
        if not self.text.startswith("}", self.at):
            raise self.error(
                "this { is not closed (a sum or product in a hole needs brackets)", opened
            )
        self.at += 1
        return part

    def affine(self) -> Expr:
        """An index, or a number computed from indices: ``3 b + r + 1``."""
        start = self.at
        terms: list[tuple[int, str]] = []
        constant = 0
        sign = -1 if self.take("-") else 1
        while True:
            self.skip()
            digits = self.at
            while self.text[self.at : self.at + 1].isdigit():
                self.at += 1
            number = self.text[digits : self.at]
            if len(number) > _LONGEST:
                raise self.error(f"a number has at most {_LONGEST} digits", digits)
            self.skip()
            letter = self.text[self.at : self.at + 1]
            if letter.isalpha() or letter == "_" or not number:
                terms.append((sign * int(number or 1), self.name()))
            else:
                constant += sign * int(number)
            if not self.take("+") and not self.text.startswith("-", self.at):
                break
            sign = -1 if self.take("-") else 1
        if not terms:
            raise self.error("a number in a key needs no {}", start)
        if len({name for _, name in terms}) < len(terms) or not all(f for f, _ in terms):
            raise self.error("each index stands once in a computed number, and not times 0", start)
        if terms == [(1, terms[0][1])] and not constant:
            return Axis(terms[0][1])
        return Affine(tuple(terms), constant)

    def name(self, message: str = "the name of an axis was expected") -> str:
        start = self.at
        word = _WORD.match(self.text, start)
        assert word is not None
        self.at, name = word.end(), word[0]
        if not name or name[0].isdigit():
            raise self.error(message, start)
        return name

    def atom(self) -> Expr:
        self.skip(newlines=False)
        if self.text.startswith(REST, self.at):
            self.at += len(REST)
            return Axis(REST)
        if self.text.startswith("1", self.at) and not _is_word(
            self.text[self.at + 1 : self.at + 2]
        ):
            self.at += 1
            return UNIT
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

    def clause(self) -> Where | Bound | Begin | Fill | Copies:
        self.skip()
        start = self.at
        plain = _PLAIN_CLAUSE.match(self.text, start)
        if plain is not None:
            self.at = plain.end()
            made = Where if plain[2] == "=" else Bound
            return made(plain[1], (("*", _fields(plain[3])),), start)
        axis = self.name()
        if axis == "copies" and self._name_follows():
            self.skip()
            return Copies(self.name())
        if axis == "fill" and self._name_follows():
            self.skip()
            axis = self.name()
            self.expect("=", "padding reads: fill axis = number")
            if self.take_word("any"):
                return Fill(axis, 0.0, start, any=True)
            return Fill(axis, self.number(), start)
        bound = self.take("<")
        begin = not bound and self.take_word("from")
        one = not bound and not begin and self.take_word("is")
        if one and self._last():
            return Where(axis, (), start, one, or_last=True)
        if not bound and not begin and not one:
            self.expect("=", "a where clause reads: axis = value, index is value, or: loop < value")
        values: list[tuple[str, Value]] = [("*", self.value())]
        while True:
            if isinstance(values[-1][1], int) and self._name_follows():
                values.append(("*", self.value()))
                continue
            op = next((op for op in "*/+-" if self.take(op)), None)
            if op is not None:
                values.append((op, self.value()))
            elif bound or begin:
                return (Bound if bound else Begin)(axis, tuple(values), start)
            else:
                last = one and self.take("|") and self._last()
                return Where(axis, tuple(values), start, one, or_last=last)

    def _name_follows(self) -> bool:
        """Whether a name stands behind blanks, on this line."""
        at = self.at
        while self.text[at : at + 1] in (" ", "\t"):
            at += 1
        letter = self.text[at : at + 1]
        return at > self.at and (letter.isalpha() or letter == "_")

    def _last(self) -> bool:
        self.skip()
        if self.text.startswith("last", self.at) and not _is_word(
            self.text[self.at + 4 : self.at + 5]
        ):
            self.at += 4
            return True
        return False

    def number(self) -> float:
        """A number with a sign and a fraction."""
        self.skip()
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise self.error("a number was expected here")
        self.at = found.end()
        return float(found[0])

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
            while True:
                before = self.at
                if not self.take("|"):
                    break
                self.skip()
                if not self.text.startswith("config.", self.at):
                    # `| last` belongs to the whole clause.
                    self.at, after = before, self.at
                    if not self.text.startswith("last", after):
                        raise self.error("another config field was expected after |", after)
                    break
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
