"""What commands find that no function of the library returns, as one value each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.names.patterns import patterns
from regraft.rules.write import write_book
from regraft.shown import Shown

if TYPE_CHECKING:
    from regraft.checkpoints.ranks import Whole
    from regraft.checkpoints.slices import Slices
    from regraft.errors.codes import Code
    from regraft.learning.learn import Learned
    from regraft.rules.book import Book


@dataclass(frozen=True, slots=True)
class BookSummary:
    """A rule book in a line."""

    name: str
    title: str
    left: str
    """The layout of the left sides of its equations."""
    right: str
    model_types: list[str]
    rules: int
    """How many equations it has."""
    carries: int
    """How many lines that say what stays."""
    path: str

    @classmethod
    def of(cls, book: Book) -> BookSummary:
        """The line of a book."""
        return BookSummary(
            book.name,
            book.title,
            book.left,
            book.right,
            list(book.model_types),
            len(book.rules),
            len(book.carries),
            book.path,
        )


@dataclass(frozen=True, slots=True, repr=False)
class BookList(Shown):
    """The rule books that come with regraft."""

    books: list[BookSummary]


@dataclass(frozen=True, slots=True)
class ShownEquation:
    """A rule of a book."""

    name: str
    where: str
    """File and line."""
    text: str
    left_kinds: list[str]
    right_kinds: list[str]


@dataclass(frozen=True, slots=True)
class ShownCarry:
    """Keys that stay what they are."""

    key: str
    why: str
    where: str


@dataclass(frozen=True, slots=True, repr=False)
class ShownBook(BookSummary, Shown):
    """A rule book as a whole."""

    equations: list[ShownEquation]
    carried: list[ShownCarry]
    toml: str
    """All of it as one TOML file."""

    @classmethod
    def of(cls, book: Book) -> ShownBook:
        """A book with everything that it includes."""
        summary = BookSummary.of(book)
        return ShownBook(
            **asdict(summary),
            equations=[
                ShownEquation(
                    rule.name,
                    rule.where,
                    rule.equation.text,
                    list(rule.left_kinds),
                    list(rule.right_kinds),
                )
                for rule in book.rules
            ],
            carried=[ShownCarry(str(carry.term), carry.why, carry.where) for carry in book.carries],
            toml=write_book(book),
        )


@dataclass(frozen=True, slots=True)
class ConfirmedPair:
    """A pair of checkpoints that a learned book was carried out on."""

    where: str
    learned_from: bool
    """Whether the book was learned from it; otherwise its sizes are ones that the book never saw."""
    equal: bool
    """Whether the book gives it bit for bit, both ways."""


@dataclass(frozen=True, slots=True, repr=False)
class LearnedBook(Shown):
    """A rule book that was read off what a converter makes."""

    book: str
    """The file."""
    explained: int
    """How many tensors after the converter the book makes."""
    total: int
    not_explained: dict[str, str]
    """Tensors that it does not make, each with the reason."""
    unused: list[str]
    """Tensors before from which nothing is taken."""
    verified: list[ConfirmedPair]
    notes: list[str]
    rules: int
    """How many rules it has."""
    layouts: tuple[str, str]
    """From which to which it leads."""

    @classmethod
    def of(cls, found: Learned, file: Path) -> LearnedBook:
        """What was learned and written to a file."""
        book = found.book
        return LearnedBook(
            str(file),
            found.explained,
            found.total,
            dict(found.odd),
            list(found.unused),
            [ConfirmedPair(v.where, v.learned_from, v.equal) for v in found.verified],
            list(found.notes),
            len(book.module_rules) + sum(not rule.module for rule in book.rules),
            (book.left, book.right),
        )


@dataclass(frozen=True, slots=True)
class ShownProbe:
    """A small checkpoint whose elements are all different."""

    folder: str
    tensors: int


@dataclass(frozen=True, slots=True, repr=False)
class Probes(Shown):
    """Probes of one model, at several sizes."""

    probes: list[ShownProbe]


@dataclass(frozen=True, slots=True)
class ExplainedCode:
    """What the code of a finding means."""

    code: str
    title: str
    details: str
    fix: str
    status: int
    """The exit status that it leads to."""
    meaning: str
    """What that status means."""
    part: str
    """The section of docs/errors.md."""

    @classmethod
    def of(cls, code: Code) -> ExplainedCode:
        """What is known of a code."""
        status = code.status
        return ExplainedCode(
            code.value,
            code.title,
            code.details,
            code.fix,
            int(status),
            status.meaning,
            code.part.title,
        )


@dataclass(frozen=True, slots=True, repr=False)
class CodeList(Shown):
    """What `regraft errors` prints."""

    codes: list[ExplainedCode]
    """One, or all."""


@dataclass(frozen=True, slots=True)
class RankShare:
    """How much a rank reads."""

    rank: int
    bytes: int


@dataclass(frozen=True, slots=True)
class FileShare:
    """What is read of a file."""

    runs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class HeldWhole:
    """Tensors that every rank holds whole, for one reason."""

    why: str
    bytes: int
    patterns: list[tuple[str, int]]
    """Their names, the largest first, and how many are of each."""


@dataclass(frozen=True, slots=True, repr=False)
class RankSlices(Shown):
    """Which bytes of a checkpoint each rank reads; as JSON the slices of the one rank that is asked for."""

    shares: list[RankShare]
    size: int
    """Of all tensors together, in bytes."""
    files: dict[str, FileShare]
    """By file, of a rank that is asked for alone."""
    whole: list[HeldWhole]
    """The largest first."""
    asked: bool
    """Whether the plans are those of the installed transformers."""
    first: Slices
    """Of the first rank."""

    @classmethod
    def of(
        cls,
        ranks: Sequence[int],
        parts: Sequence[Slices],
        sizes: Mapping[str, int],
        whole: Iterable[Whole],
        *,
        asked: bool,
    ) -> RankSlices:
        """What each of the ``ranks`` reads; ``sizes`` are the tensors', in bytes."""
        files: dict[str, FileShare] = {}
        for run in parts[0].runs if len(parts) == 1 else ():
            known = files.get(run.file, FileShare(0, 0))
            files[run.file] = FileShare(known.runs + 1, known.bytes + run.size)
        shares = [RankShare(rank, part.bytes) for rank, part in zip(ranks, parts, strict=True)]
        held = [
            HeldWhole(
                each.why,
                sum(sizes[name] for name in each.names),
                patterns(sorted(each.names, key=lambda name: -sizes[name])),
            )
            for each in whole
        ]
        held.sort(key=lambda each: -each.bytes)
        return RankSlices(shares, sum(sizes.values()), files, held, asked, parts[0])

    def to_dict(self) -> dict[str, Any]:
        """The slices of the first rank as plain data."""
        return self.first.to_dict()
