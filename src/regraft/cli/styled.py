"""Words in styles, and tables of them: put down as plain lines, or painted by Rich where there is a terminal.

Rich takes longer to import than most commands take to run, and what goes into a file or a pipe needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import rich.padding
    import rich.table
    import rich.text


class Text:
    """Text of which every piece has a style, as Rich names them; ``""`` for none.

    >>> text = Text.assemble(("Equal", "green"), ": 3 tensors")
    >>> text.append(", 24 bytes").plain
    'Equal: 3 tensors, 24 bytes'
    """

    __slots__ = ("_pieces", "_style")

    def __init__(self, text: str = "", style: str = "") -> None:
        self._style = style
        self._pieces: list[tuple[str, str]] = [(text, "")] if text else []

    @classmethod
    def assemble(cls, *parts: str | tuple[str, str] | Text) -> Text:
        """Text of pieces, each with its style or in none."""
        text = cls()
        for part in parts:
            text.append(*part) if isinstance(part, tuple) else text.append(part)
        return text

    def append(self, part: str | Text, style: str = "") -> Text:
        """Add a piece, and return this text."""
        if isinstance(part, Text):
            self._pieces += [(piece, own or part._style) for piece, own in part._pieces]
        else:
            self._pieces.append((part, style))
        return self

    @property
    def plain(self) -> str:
        """The text alone."""
        return "".join(piece for piece, _ in self._pieces)

    def lines(self) -> list[str]:
        """Its lines, without styles."""
        return self.plain.split("\n")

    def __rich__(self) -> rich.text.Text:
        from rich.text import Text as Painted

        return Painted.assemble(*self._pieces, style=self._style)


class Indented:
    """Text with so many columns before each of its lines."""

    __slots__ = ("columns", "text")

    def __init__(self, text: Text, columns: int = 2) -> None:
        self.text = text
        self.columns = columns

    def lines(self) -> list[str]:
        """Its lines, without styles."""
        return [" " * self.columns + line for line in self.text.lines()]

    def __rich__(self) -> rich.padding.Padding:
        from rich.padding import Padding

        return Padding(self.text, (0, 0, 0, self.columns), expand=False)


class Column:
    """A column of a table."""

    __slots__ = ("justify", "name", "style", "width", "wrapped")

    def __init__(
        self,
        name: str,
        justify: Literal["left", "right"] = "left",
        *,
        wrapped: bool = False,
        style: str = "bold",
    ) -> None:
        self.name = name
        self.justify: Literal["left", "right"] = justify
        self.wrapped = wrapped
        """Whether it may be folded where the terminal is narrow."""
        self.style = style
        """That of its name."""
        self.width: int | None = None
        """That of its cells; what they need if ``None``."""


class Table:
    r"""Rows of cells without rules between them.

    >>> table = Table(Column("rule"), Column("times", "right"))
    >>> table.add_row("mixtral/router", "2")
    >>> print(*table.lines(), sep="\n")
    rule            times
    mixtral/router      2
    """

    def __init__(self, *columns: Column, header: bool = True, gap: int = 2) -> None:
        self.columns = list(columns)
        self.header = header
        """Whether the names of the columns stand above them."""
        self.gap = gap
        """Blanks between columns."""
        self.rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a row, a cell for each column."""
        self.rows.append(cells)

    def lines(self) -> list[str]:
        """Its lines, without styles and without what would be blank at their ends."""
        names = [[_lines_of(column.name) for column in self.columns]] if self.header else []
        rows = [*names, *([_lines_of(cell) for cell in row] for row in self.rows)]
        widths = [
            column.width or max((width_of(line) for row in rows for line in row[at]), default=0)
            for at, column in enumerate(self.columns)
        ]
        return [
            (" " * self.gap).join(self._cells(row, at, widths)).rstrip()
            for row in rows
            for at in range(max(map(len, row), default=0))
        ]

    def _cells(self, row: list[list[str]], at: int, widths: list[int]) -> Iterator[str]:
        """One line of a row, filled up to the columns' widths."""
        for column, cell, width in zip(self.columns, row, widths, strict=True):
            text = cell[at].rstrip() if at < len(cell) else ""
            blanks = " " * (width - width_of(text))
            yield blanks + text if column.justify == "right" else text + blanks

    def __rich__(self) -> rich.table.Table:
        from rich.table import Table as Painted

        table = Painted(
            box=None, pad_edge=False, padding=(0, self.gap, 0, 0), show_header=self.header
        )
        for column in self.columns:
            table.add_column(
                column.name,
                justify=column.justify,
                no_wrap=not column.wrapped,
                overflow="fold" if column.wrapped else "ellipsis",
                header_style=column.style,
                width=column.width,
            )
        for row in self.rows:
            table.add_row(*row)
        return table


def plain_lines(parts: Iterable[object], width: int) -> list[str] | None:
    r"""Parts as plain lines; ``None`` where only Rich knows how: for its own, too long lines, and odd characters.

    >>> plain_lines([Text("Note:", "yellow"), "a line"], 80), plain_lines(["\t"], 80)
    (['Note:', 'a line'], None)
    """
    lines: list[str] = []
    for part in parts:
        if not isinstance(part, str | Text | Indented | Table):
            return None
        lines += part.split("\n") if isinstance(part, str) else part.lines()
    if all(line.isprintable() and len(line) * 2 <= width for line in lines):
        return [line.rstrip() for line in lines]
    return None


def width_of(line: str) -> int:
    r"""How many columns of a terminal a line takes; some letters take two.

    >>> width_of("abc"), width_of("\u6a21\u578b")
    (3, 4)
    """
    if line.isascii():
        return len(line)
    from rich.cells import cell_len

    return cell_len(line)


def _lines_of(cell: str | Text) -> list[str]:
    return cell.split("\n") if isinstance(cell, str) else cell.lines()
