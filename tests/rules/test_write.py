"""A book that was written is the book that is read."""

import dataclasses

import pytest
from generated import equations
from hypothesis import given
from hypothesis import strategies as st
from making import Text, book_of, equation_of

from regraft.rules.book import library, load_book
from regraft.rules.write import write_book
from regraft.values import replace


def named(rule):
    return rule.name


def without_places(book):
    return dataclasses.replace(
        book,
        path="",
        rules=tuple(sorted((replace(rule, where="") for rule in book.rules), key=named)),
        absents=tuple(replace(absent, where="") for absent in book.absents),
        carries=tuple(replace(carry, where="") for carry in book.carries),
        parameters=tuple(replace(table, where="") for table in book.parameters),
        specials=tuple(replace(table, where="") for table in book.specials),
        drops=tuple(replace(table, where="") for table in book.drops),
        module_rules=tuple(replace(rule, where="") for rule in book.module_rules),
    )


def written(book, comment=""):
    return load_book(Text(write_book(book, comment)), "written.toml")


@pytest.mark.parametrize("book", library(), ids=lambda book: book.name)
def test_library(book):
    again = written(book, "two lines\nof comment")
    assert without_places(again) == without_places(book)
    assert write_book(again) == write_book(book)


@pytest.mark.slow
@given(equations())
def test_random_equations(made):
    book = book_of(equation_of(made.text))
    assert without_places(written(book)) == without_places(book)


awkward = st.text(st.sampled_from("ab '\"\\#=\n\t\r\u00e9[]"), min_size=1, max_size=12)


@pytest.mark.slow
@given(awkward, awkward, st.lists(awkward, max_size=3), st.booleans())
def test_awkward_text(title, why, types, called):
    body = (
        "\n[[carry]]\nkeys = ['{*p}.a', '{*p}.b : o i', '{*p}.c : o i']\nwhy = 'w'\nwhere = 'o = 3'\n"
        "[[special]]\nside = 'left'\nmodule = '{*p}.m'\ntensors = ['w']\n"
    )
    book = book_of(body.replace("'{*p}.a', ", ""))
    book = dataclasses.replace(
        book,
        title=title,
        model_types=tuple(types),
        carries=tuple(replace(carry, why=why) for carry in book.carries),
        specials=tuple(replace(module, called=called, why=why) for module in book.specials),
    )
    assert without_places(written(book)) == without_places(book)


def test_lines_are_those_of_the_tables():
    text = write_book(next(book for book in library() if book.name == "flux"))
    lines = text.splitlines()
    for rule in load_book(Text(text), "b.toml").rules:
        table = "[[module]]" if rule.module else "[[equation]]"
        assert lines[int(rule.where.rpartition(":")[2]) - 1] == table
