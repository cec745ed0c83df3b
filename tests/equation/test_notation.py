import re

import pytest

from regraft.equation import check_equation, notation, parse_equation, parse_key
from regraft.equation.lower import lower
from regraft.errors import BadInputError
from regraft.rules.book import library
from regraft.values import replace

BAD = [
    # equation, message, the text at which the mark stands
    ("a b", "two sides", None),
    ("== a", "at least one term", "=="),
    ("a ==", "at least one term", None),
    ("a == a == a", "not expected|axis", "== a"),
    ("(a == a", "name of an axis", "== a"),
    ("a == (a b", "not closed", "(a b"),
    ("a == (a + ) b", "an axis was expected", ") b"),
    ("a == () a", "an axis was expected", ") a"),
    ("a == a)", "name of an axis", ")"),
    ("a 3 == a 3", "name of an axis", "3 =="),
    ("a (b ...) == a (b ...)", "inside brackets", "...) =="),
    ("... a == ... a", "must come last", "... a =="),
    ("k.{e : a == a", "not closed", "{e"),
    ("k.e} : a == k.e : a", "closes no", "} : a =="),
    ("k.{a b} : i == k : a b i", "needs brackets", "{a b}"),
    ("k.{} : i == k : i", "axis", "} : i =="),
    ("x{*p}.k : i == {*p}.k : i", "whole segments", "x{*p}"),
    ("{*}.k : i == {*}.k : i", "name was expected", "}.k : i =="),
    ("a i == a i where", "name of an axis", None),
    ("a i == a i where a", "a where clause reads", None),
    ("a i == a i where a =", "a number, an axis", None),
    ("a i == a i where a = config.", "config field", None),
    ("a i == a i where a = config.n | 3", "after |", "3"),
    ("a i == a i where a = shape(k)", "number of the dim", None),
    ("a i == a i where z = 3", "no key and no dim has an axis z", "z = 3"),
    ("a i == a i where a = z", "no key and no dim has an axis z", "a = z"),
    ("a a == a a", "stands twice", "a a =="),
    ("(a + a) == a, a", "two boxes", "(a + a)"),
    ("a i, a i == (a + b) i", "two boxes", "a i =="),
    ("a i == b i", "no partner", "a i"),
    ("a i, b i == (a + c) i", "no partner", "b i"),
    ("x : a i, b i == (a + b) i", "this term has no key", None),
    ("{*p}.x : a == x : a", r"same {\*", None),
    ("x.{l} : a, y : b == z.{l} : (a + b)", "holds the loop", "y : b"),
    ("x.{l} : a == y.{l} : a where a < 3", "a is no loop, so it has a size", "a < 3"),
    (
        "x.{e} : a == y : e a where e < config.experts",
        "e is no loop, so it has a size",
        "e < config",
    ),
]


@pytest.mark.parametrize(("text", "message", "at"), BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_equation_is_shown_with_a_mark_under_the_part_that_is_wrong(text, message, at):
    with pytest.raises(BadInputError, match=message) as caught:
        check_equation(parse_equation(text))
    (finding,) = caught.value.findings
    assert finding.code == "notation"
    _, line, mark = finding.message.split("\n")
    assert line == "    " + text
    assert mark.strip() == "^"
    column = mark.index("^") - 4
    if at is not None:
        assert text[column:].startswith(at)
    assert 0 <= column <= len(text)


def test_the_mark_stands_in_the_line_that_is_wrong_of_many():
    text = "k.{e}.w : a i\n    == k.w : e (a + ) i\n  where a = 3"
    with pytest.raises(BadInputError) as caught:
        parse_equation(text)
    _, line, mark = caught.value.findings[0].message.split("\n")
    assert line == "        == k.w : e (a + ) i"
    assert line[mark.index("^") :] == ") i"


@pytest.mark.parametrize(
    "text",
    [
        "a i, b i == (a + b) i where a = b",
        "(g (n + k + v) d) i == (g n d) i, (g k d) i, (g v d) i where k = 1, v = 1",
        "x.{l}.{(t + v)}.w : a ... == y.{l}.t : t a ..., y.{l}.v : v a ... "
        "where t = config.a.b | config.c, v = shape(y.{l}.v, 0), l < config.n",
        "{*p}.x.{(a b)} : i == {*p}.y : (b a) i where a = config.n * 2 / b",
    ],
)
def test_what_is_printed_reads_as_the_same_equation(text):
    equation = parse_equation(text)
    again = parse_equation(str(equation))
    assert str(again) == str(equation)
    assert again.where == tuple(
        replace(w, start=a.start) for w, a in zip(equation.where, again.where, strict=True)
    )
    assert [t.dims for t in again.left] == [t.dims for t in equation.left]
    assert [t.key for t in again.right] == [t.key for t in equation.right]


def test_commas_and_line_ends_both_part_terms():
    one = parse_equation("a i, b i == (a + b) i where a = 2, b = 3")
    other = parse_equation("""
        a i
        b i
            == (a + b) i
        where
            a = 2,
            b = 3
    """)
    assert str(one) == str(other)


def test_an_equation_is_parsed_once_and_cannot_be_changed():
    equation = parse_equation("o i == i o")
    assert parse_equation("o i == i o") is equation
    with pytest.raises(AttributeError):
        equation.left = ()
    assert hash(equation) == hash(parse_equation("o i == i o"))


def test_the_word_where_inside_an_axis_or_a_key_is_no_clause():
    equation = parse_equation("nowhere : wherever i == elsewhere : i wherever")
    assert str(equation.left[0]) == "nowhere : wherever i"
    assert equation.where == ()


@pytest.mark.parametrize("text", ["a b c", "a:b", "a,b", "", "a}", "a{b", "a{", "a{b c}"])
def test_a_key_is_one_word(text):
    with pytest.raises(BadInputError):
        parse_key(text)


def test_lowering_says_where_each_block_begins_and_how_its_axes_step():
    equation = parse_equation("(g (n + k) d) i == (g n d) i, (g k d) i where k = 1")
    q, k = lower(equation, {"g": 2, "n": 3, "k": 1, "d": 5, "i": 7})
    assert (q.source, q.target, q.source_start, q.target_start) == (0, 0, (0, 0), (0, 0))
    assert (k.source, k.target, k.source_start, k.target_start) == (0, 1, (15, 0), (0, 0))
    steps = {a.name: (a.size, a.source.step, a.target.step) for a in q.axes}
    assert steps == {"g": (2, 20, 15), "n": (3, 5, 5), "d": (5, 1, 1), "i": (7, 1, 1)}


def test_copies_come_in_the_order_of_the_side_that_is_written():
    equation = parse_equation("b i, a i == (a + b) i")
    assert [c.source for c in lower(equation, {"a": 1, "b": 2, "i": 1})] == [1, 0]
    assert [c.target for c in lower(equation, {"a": 1, "b": 2, "i": 1}, reverse=True)] == [0, 1]


SHIPPED_EQUATIONS = [
    equation.text
    for book in library()
    for equation in (*(r.equation for r in book.rules), *(c.equation for c in book.carries))
]
ODD = [
    "a.{l} : i j == b.{l} : i j where i = j",
    "a :\n== b :",
    "a : i,b : j == c : i ... where",
    "a : where == b : where",
    "a : i==b : i",
    "{0} : i == b : i",
    "a : i == b : i wherever",
    "a{b : i == c : i",
    "a : 1 == b : 1",
    "{*p}.a.{*q} : i == {*p}.b : i, {*a}x : j",
    "{*p} : i == {*p}.{l}.b : i where l<config.n , i= config.a.b | config.c",
    "a : i == b : i where i = config.a | last",
    "a : i == b : i where i = config.a * 2, i < config.a | 7",
    "a.{l} : i == b.{l} : i where l is config.a | last, fill = config.b",
    "a : i == b : i where i = config.1",
    "a : (i + j) == b : i j",
]


def outcome(text):
    try:
        return parse_equation.__wrapped__(text)
    except BadInputError as error:
        return str(error)


def test_a_term_that_is_read_in_one_piece_is_the_same_letter_by_letter(monkeypatch):
    texts = [*SHIPPED_EQUATIONS[::7], *ODD]
    quick = [outcome(text) for text in texts]
    monkeypatch.setattr(notation, "_plain_term", lambda stop: re.compile("(?!)"))
    monkeypatch.setattr(notation, "_PLAIN_CLAUSE", re.compile("(?!)"))
    assert quick == [outcome(text) for text in texts]
