"""The graph of layouts: a rule book joins two of them, and a route leads from one to another.

    Edge     a rule book, read in one direction
    Route    the steps from a layout to another; in each the edges of the books of all parts of a model

No layout is known in code: what there is, books say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regraft.equation.notation import Term
from regraft.errors import BadInputError, Finding
from regraft.rules.book import Book, Rule
from regraft.rules.direction import Direction, Side


@dataclass(frozen=True, slots=True)
class Edge:
    """A rule book, read in one direction: from the layout ``source`` to the layout ``target``."""

    book: Book
    direction: Direction

    @staticmethod
    def to(book: Book, layout: str) -> Edge:
        """The edge of a book that leads to a layout.

        Raises ``BadInputError`` where the layout is neither of the book's.
        """
        return Edge(book, _direction(book, layout, target=True))

    @staticmethod
    def out_of(book: Book, layout: str) -> Edge:
        """The edge of a book that leads away from a layout.

        Raises ``BadInputError`` where the layout is neither of the book's.
        """
        return Edge(book, _direction(book, layout, target=False))

    @property
    def source(self) -> str:
        """The layout that is read."""
        return self.book.layout(self.direction.read)

    @property
    def target(self) -> str:
        """The layout that is written."""
        return self.book.layout(self.direction.written)

    @property
    def reads(self) -> Side:
        """The side of the book that is read."""
        return self.direction.read

    @property
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


def _direction(book: Book, layout: str, *, target: bool) -> Direction:
    for direction in Direction:
        if book.layout(direction.written if target else direction.read) == layout:
            return direction
    raise BadInputError(
        Finding(
            "other-layouts",
            f"rule book {book.name} leads between {book.left} and {book.right}, and {layout} is neither",
            where=book.path,
            fix=f"say --to {book.left} or --to {book.right}, or give a rule book that knows {layout}",
        )
    )
