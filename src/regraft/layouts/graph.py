"""The graph of layouts: a rule book joins two of them, and a route leads from one to another.

    Edge     a rule book, read in one direction
    Route    the steps from a layout to another; in each the edges of the books of all parts of a model

No layout is known in code: what there is, books say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

from msgspec import Struct

from regraft.equation.notation import Term
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding
from regraft.rules.book import Book, Rule
from regraft.rules.direction import Direction, Side
from regraft.rules.said import said


class Edge(Struct, frozen=True, dict=True):
    """A rule book, read in one direction: from the layout ``source`` to the layout ``target``."""

    book: Book
    direction: Direction

    @staticmethod
    def to(book: Book, layout: str) -> Edge:
        """The edge of a book that leads to a layout.

        Raises ``BadInputError`` where the layout is neither of the book's.
        """
        return _edge(book, layout, "target")

    @staticmethod
    def out_of(book: Book, layout: str) -> Edge:
        """The edge of a book that leads away from a layout.

        Raises ``BadInputError`` where the layout is neither of the book's.
        """
        return _edge(book, layout, "source")

    @cached_property
    def source(self) -> str:
        """The layout that is read."""
        return self.book.left if self.reads == "left" else self.book.right

    @cached_property
    def target(self) -> str:
        """The layout that is written."""
        return self.book.left if self.writes == "left" else self.book.right

    @cached_property
    def reads(self) -> Side:
        """The side of the book that is read."""
        return self.direction.read

    @cached_property
    def writes(self) -> Side:
        """The side of the book that is written."""
        return self.direction.written

    def sides(self, rule: Rule) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
        """The terms of a rule that are read, and those that are written."""
        return rule.sides(self.direction)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} ({self.book.name})"


def edges_to(books: Iterable[Book], layout: str) -> tuple[Edge, ...]:
    """The edges of some books that lead to a layout, in order.

    Raises ``BadInputError`` with every book that does not know the layout.
    """
    edges: list[Edge] = []
    findings: list[Finding] = []
    for book in books:
        try:
            edges.append(Edge.to(book, layout))
        except BadInputError as error:
            findings += error.findings
    if findings:
        raise BadInputError(findings)
    return tuple(edges)


def other_end(book: Book, layout: str) -> str:
    """The layout that a book joins a layout to.

    Raises ``BadInputError`` where the layout is neither of the book's.
    """
    return Edge.to(book, layout).source


class Route(Struct, frozen=True):
    """How to get from a layout to another: steps, each along the edges of all books that join its two layouts."""

    steps: tuple[tuple[Edge, ...], ...]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts on the way, the first and the last one among them."""
        return (*(step[0].source for step in self.steps), self.steps[-1][0].target)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges in order."""
        return tuple(edge for step in self.steps for edge in step)

    def __str__(self) -> str:
        return " -> ".join(self.layouts)


def find_routes(books: Iterable[Book], source: str, target: str) -> tuple[Route, ...]:
    """The shortest routes from a layout to another, all of one length; none where nothing leads there.

    Who names two layouts that one book joins, names this book. On a longer way, only books are used that keep every
    tensor and every number: none that drops tensors.
    """
    steps: dict[tuple[str, str], list[Edge]] = {}
    for book in books:
        for direction in Direction:
            edge = Edge(book, direction)
            steps.setdefault((edge.source, edge.target), []).append(edge)
    if (source, target) in steps:
        return (Route((tuple(steps[source, target]),)),)
    usable = {ends: tuple(es) for ends, es in steps.items() if not any(map(_loses, es))}
    ways: list[tuple[str, ...]] = [(source,)]
    seen = {source}
    while ways and source != target:
        ways = [
            (*way, end)
            for way in ways
            for start, end in usable
            if start == way[-1] and end not in seen
        ]
        seen |= {way[-1] for way in ways}
        there = [way for way in ways if way[-1] == target]
        if there:
            return tuple(Route(tuple(usable[ends] for ends in pairwise(way))) for way in there)
    return ()


def route_between(books: Sequence[Book], source: str | None, target: str, where: str) -> Route:
    """The one way from a layout to another; of no steps where they are the same.

    Where the source is not known, because its names are the same in every layout, one step by all books that know the
    target.

    Raises ``BadInputError`` where the books lead nowhere near, ``AmbiguousError`` where several ways are as short.
    """
    if not books:
        return Route(((),))  # nothing is known, so nothing changes
    if source == target:
        edges_to([b for b in books if target in b.layouts] or books, target)
        return Route(())
    if source is None:
        leading = [b for b in books if target in b.layouts]
        # A book for another tool's names leads to these, not from them: there its names would have told.
        own = [b for b in leading if b.tells == "both" or b.layout(b.tells) == target]
        return Route((edges_to(own or leading or books, target),))
    routes = find_routes(books, source, target)
    wanted = said().via
    if wanted:
        routes = tuple(r for r in routes if set(wanted) <= set(r.layouts)) or routes
    if not routes:
        raise BadInputError(_no_way(books, source, target, where))
    if len(routes) > 1:
        raise AmbiguousError(
            Finding(
                "which-layout",
                f"there are several ways to {target}",
                where=where,
                fix="name with --from the layout on the way, or with --rules the books to use",
                choices=tuple(
                    Choice(
                        ",".join(route.layouts[:-1]),
                        f"the way {route}",
                        f"it goes by {', '.join(dict.fromkeys(e.book.name for e in route.edges))}",
                    )
                    for route in routes
                ),
            )
        )
    return routes[0]


def _no_way(books: Sequence[Book], source: str, target: str, where: str) -> list[Finding]:
    known = list(dict.fromkeys(name for book in books for name in book.layouts))
    if target in known and source in known:
        message = f"no rule books lead from {source} to {target} without a loss"
        fix = "name a layout on the way, and convert step by step"
        return [Finding("other-layouts", message, where=where, fix=fix)]
    try:
        edges_to(books, source if source not in known else target)
    except BadInputError as error:
        return list(error.findings)
    message = f"no rule book knows {source if source not in known else target}"
    return [Finding("other-layouts", message, where=where, fix="give one with --rules")]


def _loses(edge: Edge) -> bool:
    """Whether an edge leaves something out. Padding is no loss: what is cut off is checked to be padding."""
    return any(edge.reads in drop.sides for drop in edge.book.drops)


def _edge(book: Book, layout: str, end: Literal["source", "target"]) -> Edge:
    """The edge of a book that has a layout at one of its ends."""
    for direction in Direction:
        edge = Edge(book, direction)
        if layout == (edge.source if end == "source" else edge.target):
            return edge
    raise BadInputError(
        Finding(
            "other-layouts",
            f"rule book {book.name} leads between {book.left} and {book.right}, and {layout} is neither",
            where=book.path,
            fix=f"say --to {book.left} or --to {book.right}, or give a rule book that knows {layout}",
        )
    )
