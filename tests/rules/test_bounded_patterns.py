"""Patterns that somebody gives take no time that they like."""

import time

import pytest

from regraft.equation.notation import parse_key
from regraft.errors import BadInputError
from regraft.names.keys import group_names
from regraft.rules.lint.renames import Rename
from regraft.rules.templates import match_group

SLOW = r"^(a|a)*$"
LONG = "a" * 60 + "!"


def test_a_template_with_many_rests_is_no_key():
    with pytest.raises(BadInputError, match=r"3 \{\*\.\.\.\} at most"):
        parse_key("{*a}.x.{*b}.x.{*c}.x.{*d}.x")


@pytest.mark.parametrize("segments", [40, 3000])
def test_a_name_of_many_segments_is_matched_in_no_time(segments):
    (group,) = group_names([".".join(["x"] * segments)])
    begin = time.process_time()
    match_group(parse_key("{*a}.x.{*b}.y.{*c}.z"), group)
    assert time.process_time() - begin < 5


def test_the_templates_of_genuine_books_match_as_before():
    (group,) = group_names(["model.layers.0.a.b.weight"])
    match = match_group(parse_key("{*p}.layers.{l}.{*r}.weight"), group)
    assert match is not None
    assert match.rests == ("model", "a.b")


def test_a_rename_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr("regraft.storage.expressions.SECONDS", 0.2)
    with pytest.raises(BadInputError) as caught:
        Rename("1", SLOW, "x", "here").apply(LONG)
    assert caught.value.findings[0].code == "slow-pattern"
