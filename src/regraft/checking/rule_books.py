"""Lint and export of rule books, as the commands do them: with files for keys, and models for books."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from regraft.checkpoints.source import is_checkpoint
from regraft.errors import BadInputError, Finding, UnmatchedKeysError
from regraft.errors.extras import install_line
from regraft.explaining.subject import open_subject
from regraft.names.keys import group_names
from regraft.planning.model import load_model
from regraft.rules.book import Book, books_for, covers, find_book, library, only_books
from regraft.rules.lint.book import Linted, in_order, lint_book, lint_file
from regraft.rules.lint.keys import Keys, lint_keys
from regraft.rules.write import write_book


def lint(book: str, keys: Path | None = None, model: Path | None = None) -> Linted:
    """What is wrong with a rule book: a file, or one of the library's by name.

    ``keys`` is a checkpoint or an adapter whose names it must fit. A book that does not load is a finding.
    ``transformers`` is the registry of the transformers that is installed, ``transformers:mixtral`` one entry of it.

    Raises ``BadInputError`` where the book or the keys cannot be read.
    """
    path = Path(book)
    name, _, entry = book.partition(":")
    if name == "transformers" and not path.exists():
        return _lint_transformers(entry or None)
    found: Linted | Book = find_book(book) if not path.is_file() else lint_file(path)
    if isinstance(found, Linted):
        return found
    faults = list(lint_book(found))
    fired: dict[str, int] = {}
    count = 0
    if keys is not None:
        names = keys_of(keys, model, found)
        fired, more = lint_keys(found, names)
        faults += more
        count = len(names)
    return Linted(found.name, found.path, len(found.rules), count, fired, in_order(faults))


def _lint_transformers(entry: str | None) -> Linted:
    if find_spec("transformers") is None:
        raise BadInputError(
            Finding(
                "rule-book",
                "transformers is not installed, so there is no registry of it",
                fix=install_line("transformers"),
            )
        )
    from regraft.bridges.transformers.linted import lint_registry

    return lint_registry(entry)


def keys_of(src: Path, model: Path | None, book: Book) -> Keys:
    """The base's names that a checkpoint or an adapter speaks of."""
    with only_books([book]):
        subject = open_subject(src, None, model)
    if subject.kind == "checkpoint":
        dims = {
            number: len(subject.headers.shapes[number])
            for group in subject.headers.groups
            for number in group.ids.tolist()
        }
        return Keys(tuple(subject.headers.groups), dims, subject.where, whole=True)
    bases = list(dict.fromkeys(name.base for name in subject.names.values()))
    return Keys(tuple(group_names(bases)), {}, subject.where, whole=False)


def export(model: str) -> str:
    """The rule books that apply to a model, as TOML.

    ``model`` is a model type, the name of a book, or a model's folder or ``config.json``. Where the library does not
    know it, the installed transformers is asked, which takes the names of its weights.

    Of a model it is the book that speaks of transformers' own names; books for other tools go by their names.

    Raises ``UnmatchedKeysError`` where no book knows it, ``BadInputError`` where several do.
    """
    path = Path(model)
    books: Sequence[Book]
    if path.exists() and is_checkpoint(path):
        subject = open_subject(path)
        if subject.problems:
            raise BadInputError(subject.problems)
        books = subject.books
    elif path.exists():
        config = load_model(path)
        books = books_for(config.model_types()) if covers(library(), config.model_types()) else []
    else:
        books = books_for([model]) or [book for book in library() if book.name == model]
    if not books:
        raise UnmatchedKeysError(
            Finding(
                "unknown-model",
                f"no built-in rule book covers all of {model}",
                fix="give the model's folder with its weights, so that the installed transformers can be asked; "
                "or write a rule book for it; `regraft rules list` shows what is built in",
            )
        )
    books = [book for book in books if book.tells == "both"] or books
    if len(books) > 1:
        names = ", ".join(book.name for book in books)
        message = f"several rule books work together for it: {names}"
        raise BadInputError(Finding("option", message, fix="export them one by one, by name"))
    return write_book(books[0])
