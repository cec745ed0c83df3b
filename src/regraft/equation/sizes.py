"""Solving the sizes of an equation's axes from the shapes of the side that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import lcm, prod

from regraft.equation.notation import (
    REST,
    Affine,
    Axis,
    Begin,
    Bound,
    ConfigPath,
    Equation,
    Expr,
    Product,
    ShapeOf,
    Term,
    Value,
    Where,
    axes_of,
)


class SizeError(ValueError):
    """Sizes that contradict each other or do not divide; ``at`` is an offset in the equation's text."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


class UnknownSizeError(SizeError):
    """Sizes that nothing determines; ``axes`` names them."""

    def __init__(self, axes: Sequence[str], at: int | None = None) -> None:
        super().__init__(f"nothing says how large {', '.join(axes)} is", at)
        self.axes = tuple(axes)


Lookup = Callable[[ConfigPath | ShapeOf], int | None]


def extent(expr: Expr, sizes: Mapping[str, int]) -> int:
    """The number of positions an expression spans.

    >>> from regraft.equation.notation import parse_equation
    >>> extent(parse_equation("(a + b) == a, b").left[0].dims[0], {"a": 3, "b": 5})
    8
    """
    if isinstance(expr, Axis):
        return sizes[expr.name]
    if isinstance(expr, Product):
        return prod(extent(factor, sizes) for factor in expr.factors)
    if isinstance(expr, Affine):
        # Of the indices in a number only one counts in a shape (`check_equation`).
        return next(sizes[name] for _, name in expr.terms if name in sizes)
    return sum(extent(term, sizes) for term in expr.terms)


def shape_of(term: Term, sizes: Mapping[str, int], rest: Sequence[int]) -> tuple[int, ...]:
    """The shape of a term's tensor; ``rest`` is what ``...`` stands for."""
    dims = term.dims[:-1] if term.ends_open else term.dims
    shape = tuple(extent(dim, sizes) for dim in dims)
    return (*shape, *rest) if term.ends_open else shape


def solve_sizes(
    equation: Equation,
    shapes: Iterable[tuple[Term, Sequence[int]]],
    holes: Iterable[tuple[Expr, int]] = (),
    lookup: Lookup | None = None,
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Sizes of all axes, and the dims that ``...`` stands for.

    ``shapes`` gives the shape of each known tensor (terms of either side), ``holes`` how many values an index
    has. Every clause and every given shape must hold exactly.

    >>> from regraft.equation.notation import parse_equation
    >>> equation = parse_equation("(a + b) i == a i, b i where a = b")
    >>> solve_sizes(equation, [(equation.left[0], (6, 4))])[0] == {"a": 3, "b": 3, "i": 4}
    True

    Raises ``UnknownSizeError`` for a size that nothing determines, ``SizeError`` for a contradiction.
    """
    solver = _Solver(equation, lookup)
    rest: tuple[int, ...] | None = None
    known: list[tuple[Expr, int, int]] = [(hole, size, 0) for hole, size in holes]
    for term, shape in shapes:
        fixed = len(term.dims) - term.ends_open
        if len(shape) != fixed if not term.ends_open else len(shape) < fixed:
            raise SizeError(
                f"{term} has {fixed}{' or more' if term.ends_open else ''} dims, "
                f"but the tensor's shape is {list(shape)}",
                term.start,
            )
        if term.ends_open:
            if rest is not None and rest != tuple(shape[fixed:]):
                raise SizeError(
                    f"... is {list(rest)} in one tensor and {list(shape[fixed:])} in another",
                    term.start,
                )
            rest = tuple(shape[fixed:])
            solver.put(REST, prod(rest), term.start)
        known.extend(
            (dim, size, term.start) for dim, size in zip(term.dims[:fixed], shape, strict=False)
        )
    solver.run(known)
    for dim, size, at in known:
        got = extent(dim, solver.sizes)
        if got != size:
            detail = "; ".join(dict.fromkeys(solver.why(name) for name in axes_of(dim)))
            raise SizeError(f"{dim} is {got} ({detail}), but the tensor has {size}", at)
    return dict(solver.sizes), rest if rest is not None else ()


def known_shape(equation: Equation, term: Term, lookup: Lookup) -> tuple[int, ...] | None:
    """A term's shape as far as the ``where`` clauses alone say it; ``None`` where they do not."""
    solver = _Solver(equation, lookup)
    try:
        solver.run([])
    except UnknownSizeError:
        pass
    except SizeError:
        return None
    if any(name not in solver.sizes for dim in term.dims for name in axes_of(dim)):
        return None
    return shape_of(term, solver.sizes, ())


def known_dims(equation: Equation, term: Term, lookup: Lookup) -> list[int | None]:
    """Those dims of a term's shape that the ``where`` clauses say; ``...`` is left out."""
    solver = _Solver(equation, lookup)
    try:
        solver.run([])
    except UnknownSizeError:
        pass
    except SizeError:
        return []
    dims = term.dims[:-1] if term.ends_open else term.dims
    return [
        extent(dim, solver.sizes) if all(n in solver.sizes for n in axes_of(dim)) else None
        for dim in dims
    ]


def undetermined(equation: Equation, *, reverse: bool = False) -> tuple[str, ...]:
    """Axes whose size the side that is read and the ``where`` clauses leave open (for lint).

    >>> from regraft.equation.notation import parse_equation
    >>> undetermined(parse_equation("a i, b i == (a + b) i"), reverse=True)
    ('a', 'b')
    """
    source, _ = equation.sides(reverse=reverse)
    solver = _Solver(equation, lambda value: 1)
    for name in _indices(equation):
        solver.sizes[name] = 1
    for term in source:
        for hole in term.holes:
            if isinstance(hole, (Axis, Affine)):
                solver.sizes.update(dict.fromkeys(axes_of(hole), 1))
    if any(term.ends_open for term in source):
        solver.sizes[REST] = 1
    dims = [dim for term in source for dim in (*term.dims, *term.holes)]
    return solver.settle_symbolically(dims)


def evaluate(clause: Where | Bound | Begin, lookup: Lookup | None) -> int | None:
    """The number that a clause without axes gives; ``None`` where nothing says it.

    A size, what a loop's index must stay below, or where a rule begins.
    """
    return _evaluate(clause.values, {}, lookup)


def _evaluate(
    values: tuple[tuple[str, Value], ...], sizes: Mapping[str, int], lookup: Lookup | None
) -> int | None:
    """The sum of the products; ``None`` where a value is not known."""
    if not values:
        return None
    total = 0
    for part in _parts(values):
        ratio = _ratio(part, sizes, lookup)
        if ratio is None:
            return None
        above, below = ratio
        if above % below:
            result = Fraction(above, below)
            raise SizeError(f"{result.numerator} is not divisible by {result.denominator}")
        total += above // below
    return total


def _parts(values: tuple[tuple[str, Value], ...]) -> Iterator[list[tuple[str, Value]]]:
    """The products of a sum; one that is subtracted is multiplied by -1."""
    part: list[tuple[str, Value]] = []
    for op, value in values:
        if op in "+-" and part:
            yield part
            part = [("*", -1)] if op == "-" else []
            op = "*"
        part.append((op, value))
    yield part


def _ratio(
    part: Iterable[tuple[str, Value]], sizes: Mapping[str, int], lookup: Lookup | None
) -> tuple[int, int] | None:
    """A product as a numerator and a denominator; ``None`` where a value is not known."""
    above, below = 1, 1
    for op, value in part:
        if isinstance(value, int):
            number: int | None = value
        elif isinstance(value, Axis):
            number = sizes.get(value.name)
        else:
            number = lookup(value) if lookup else None
        if number is None:
            return None
        if op == "*":
            above *= number
        elif number == 0:
            raise SizeError(f"{Fraction(above, below)} is not divisible by 0")
        else:
            below *= number
    return above, below


def _indices(equation: Equation) -> tuple[str, ...]:
    """What stands in keys only and has no size: loops, and indices with one value."""
    return (*equation.loops, *equation.givens)


_ONCE = Fraction(1)


class _Solver:
    def __init__(self, equation: Equation, lookup: Lookup | None) -> None:
        self.equation = equation
        self.lookup = lookup
        self.sizes: dict[str, int] = {}
        self.told: dict[str, Where] = {}
        self.axes = equation.axes
        self.same: dict[str, tuple[str, Fraction]] = {}
        for clause in equation.where:
            if not clause.one:
                self.relate(clause)
        self.alike: dict[str, list[tuple[str, Fraction]]] = {}
        """The axes that are measured by one, and how many times it each of them is."""
        for name in self.axes if self.same else ():
            root, times = self.root(name)
            self.alike.setdefault(root, []).append((name, times))

    def relate(self, clause: Where) -> None:
        """Note that an axis is so many times another: ``m = 4 q``."""
        if len(clause.axes) != 1:
            return
        parts = list(_parts(clause.values))
        if len(parts) != 1:
            return
        (other,) = clause.axes
        if ("/", Axis(other)) in parts[0]:
            return
        ratio = _ratio([p for p in parts[0] if p[1] != Axis(other)], {}, self.lookup)
        if ratio is None or Fraction(*ratio) <= 0:
            return
        (a, of_a), (b, of_b) = self.root(clause.axis), self.root(other)
        if a != b:
            self.same[a] = b, Fraction(*ratio) * of_b / of_a

    def root(self, axis: str) -> tuple[str, Fraction]:
        """The axis that another is measured by, and how many times it that is."""
        times = _ONCE
        while axis in self.same:
            axis, ratio = self.same[axis]
            times *= ratio
        return axis, times

    def why(self, axis: str) -> str:
        """An axis' size and the clause that says it."""
        clause = self.told.get(self.root(axis)[0])
        return f"{axis} = {self.sizes[axis]}" + (f" by {clause}" if clause else "")

    def put(self, axis: str, size: int, at: int | None, told: Where | None = None) -> None:
        """Note a size, which a clause may tell, and with it those of the axes that are so many times this one."""
        if size < 0:
            raise SizeError(f"{axis} would be {size}", at)
        root, times = self.root(axis)
        own = ((axis, times),) if axis in self.axes else ()
        for name, factor in self.alike.get(root, own):
            wanted = size if factor is times else size / times * factor
            if wanted.denominator != 1:
                here = f" ({told})" if told else ""
                raise SizeError(f"{axis} = {size}{here} leaves no whole number for {name}", at)
            if self.sizes.setdefault(name, int(wanted)) != wanted:
                here = f" ({told})" if told else ""
                message = f"{self.why(name)} in one place and {int(wanted)} in another{here}"
                raise SizeError(message, at)
        if told is not None:
            self.told.setdefault(root, told)
        if axis not in self.axes:
            self.sizes.setdefault(axis, size)

    def run(self, known: list[tuple[Expr, int, int]]) -> None:
        loops = _indices(self.equation)
        while True:
            before = len(self.sizes)
            for clause in self.equation.where:
                value = _evaluate(clause.values, self.sizes, self.lookup)
                if value is not None:
                    self.put(clause.axis, value, clause.start, clause)
            for dim, size, at in known:
                self.solve(dim, size, at)
            if len(self.sizes) == before:
                break
        read = {name for dim, _, _ in known for name in axes_of(dim)}
        for fill in self.equation.fills:
            if fill.any and fill.axis not in read:  # padding that nobody asks for is none
                self.sizes.setdefault(fill.axis, 0)
        open_axes = [name for name in self.axes if name not in self.sizes and name not in loops]
        if open_axes:
            raise UnknownSizeError(open_axes)

    def unknowns(self, expr: Expr) -> set[str]:
        return {self.root(name)[0] for name in axes_of(expr) if name not in self.sizes}

    def solve(self, dim: Expr, size: int, at: int) -> None:
        if isinstance(dim, Axis):
            if dim.name not in self.sizes:
                self.put(dim.name, size, at)
            return
        unknown = self.unknowns(dim)
        if len(unknown) != 1:
            return
        names = [n for n in axes_of(dim) if n not in self.sizes]
        name = min(names, key=lambda n: self.root(n)[1])
        times = {n: self.root(n)[1] / self.root(name)[1] for n in names}
        step = lcm(*(factor.denominator for factor in times.values()))

        def at_value(value: int) -> int:
            """The extent where the axis has so many times the least size that gives whole numbers."""
            trial = {
                n: int(value * step * times[n]) if n in times else self.sizes[n]
                for n in axes_of(dim)
            }
            return extent(dim, trial)

        zero, one = at_value(0), at_value(1)
        slope = one - zero
        if slope and at_value(2) == zero + 2 * slope:
            found, left = divmod(size - zero, slope)
            if left or found < 0:
                raise SizeError(f"a size of {size} does not divide into {dim}", at)
        elif slope == 0 and zero == size:
            return
        else:
            found = next((v for v in range(size + 1) if at_value(v) >= size), -1)
            if found < 0 or at_value(found) != size:
                raise SizeError(f"a size of {size} does not divide into {dim}", at)
        self.put(name, found * step, at)

    def settle_symbolically(self, dims: list[Expr]) -> tuple[str, ...]:
        read = {name for dim in dims for name in axes_of(dim)}
        for fill in self.equation.fills:
            if fill.any and fill.axis not in read:
                self._mark(fill.axis)
        while True:
            before = len(self.sizes)
            for clause in self.equation.where:
                if all(name in self.sizes for name in clause.axes):
                    self._mark(clause.axis)
            for dim in dims:
                if len(self.unknowns(dim)) == 1:
                    for name in axes_of(dim):
                        self._mark(name)
            for name in list(self.sizes):
                self._mark(name)
            if len(self.sizes) == before:
                return tuple(name for name in self.axes if name not in self.sizes)

    def _mark(self, axis: str) -> None:
        root = self.root(axis)[0]
        for name in (axis, *(n for n in self.axes if self.root(n)[0] == root)):
            self.sizes.setdefault(name, 1)
