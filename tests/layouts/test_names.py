"""Names of layouts and dialects: the grammar, the list, and a user's own books."""

import ast
import json
from pathlib import Path
from typing import NamedTuple

import pytest

import regraft
from regraft.cli import main
from regraft.dialects.names import layout_named, source_named
from regraft.errors import BadInputError
from regraft.layouts.names import Layout, parse_name
from regraft.rules.book import library, load_book, only_books

BOOK = """
name = "mine"
title = "Mine"
left = "published"
right = "transformers-v5"
model_types = ["mixtral"]

[[module]]
left = "root.{q}"
right = "model.root.{q}"
kind = "linear"

[[carry]]
keys = ["{*p}.{*q}"]
why = "it is the same"

[adapters]
left = "peft-0.18"
"""


class Named(NamedTuple):
    name: str
    versions: tuple[str, ...] = ()
    layout: str | None = None
    title: str = ""


KOHYA = {
    "kohya": Named("kohya", layout="ldm"),
    "peft": Named("peft", versions=("peft-0.18", "peft-0.19")),
    "twice": Named("twice", layout="published"),
}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(BOOK)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("transformers-v5", Layout("transformers-v5")),
        ("transformers-v4/peft-0.18", Layout("transformers-v4", "peft-0.18")),
        ("transformers-v4/0.19", Layout("transformers-v4", "peft-0.19")),
        ("transformers-v4:peft", Layout("transformers-v4", None, "peft")),
        ("peft", Layout("transformers-v5", None, "peft")),
        ("peft/0.18", Layout("transformers-v4", "peft-0.18", "peft")),
        ("transformers-v4:kohya", Layout("transformers-v4", None, "kohya")),
        ("kohya", Layout("ldm", None, "kohya")),
    ],
)
def test_a_name_is_a_layout_a_dialect_or_both(text, found):
    assert parse_name(text, KOHYA) == found


def test_a_bare_name_is_the_dialect_of_an_adapter_and_the_layout_of_a_checkpoint(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(BOOK.replace('"published"', '"twice"'))
    with only_books([path]):
        assert parse_name("twice", KOHYA) == Layout("published", None, "twice")
        assert parse_name("twice", KOHYA, adapter=False) == Layout("twice")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("transfomers-v5", "transformers-v5"),
        ("transformers-v5/peft-0.20", "peft-0.19"),
        ("transformers-v5:pefft", "peft"),
        ("transformer-v5:peft", "transformers-v5"),
        ("v5", "transformers-v5"),
        ("4", "transformers-v4"),
    ],
)
def test_an_unknown_name_gets_the_nearest_spelling(text, near):
    with pytest.raises(BadInputError) as caught:
        layout_named(text)
    (finding,) = caught.value.findings
    assert finding.code == "unknown-layout" and near in finding.fix


def test_a_source_may_be_a_family():
    assert source_named("mixtral").family == "mixtral"
    assert source_named("transformers-v4").name == "transformers-v4"
    with pytest.raises(BadInputError):
        source_named("no such family")


def test_a_family_that_has_a_layout_of_its_name_is_a_checkpoints_family():
    assert source_named("wan", adapter=False).family == "wan"
    assert source_named("wan", adapter=False).layout is None


def test_books_stand_in_for_the_library_or_beside_it(book):
    with only_books([book]):
        assert [b.name for b in library()] == ["mine"]
    with only_books([book, "built-in"]):
        assert library()[0].name == "mine" and len(library()) > 10
    with only_books([]):
        assert "mine" not in {b.name for b in library()}


def test_a_book_beside_the_library_takes_the_place_of_one_between_the_same_layouts(tmp_path):
    from regraft.rules.book import books_for

    path = tmp_path / "mine.toml"
    path.write_text(BOOK.replace("published", "transformers-v4"))
    with only_books([path, "built-in"]):
        found = [b.name for b in books_for(["mixtral"]) if "transformers-v5" in b.layouts]
        assert found == ["mine"]
        assert [b.name for b in books_for(["dbrx"])] == ["dbrx"]


def test_a_book_says_how_adapters_of_its_layouts_are_written(book):
    with only_books([load_book(book)]):
        assert Layout("published").usual_packing == "peft-0.18"
        assert Layout("transformers-v5").usual_packing == "peft-0.19"
    of_transformers = [b for b in library() if b.layouts == ("transformers-v4", "transformers-v5")]
    assert {b.left_adapters for b in of_transformers} == {"peft-0.18"}


def test_the_command_lists_every_name(capsys, book):
    assert main(["layouts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {line["name"] for line in found["layouts"]}
    assert names >= {"transformers-v4", "transformers-v5", "diffusers", "bfl", "ldm"}
    assert "peft" in {line["name"] for line in found["dialects"]}
    assert "mixtral" in {line["name"] for line in found["families"]}
    assert main(["layouts", "--rules", str(book)]) == 0
    assert "published" in capsys.readouterr().out


def test_rules_in_python(book):
    with pytest.raises(BadInputError):
        regraft.explain("tests/golden/bases/mixtral", "lm_head.weight", to="published")
    found = regraft.explain(
        "tests/golden/bases/mixtral",
        "model.norm.weight",
        to="published",
        source="transformers-v5",
        rules=[book],
    )
    assert found.fate == "carried"


def test_no_code_says_which_layout_a_release_of_transformers_has():
    """Rule books, and the table of releases beside them, do; what a tool's adapters are in, its dialect does."""
    package = Path(regraft.__file__).parent
    of_tools = {"dialects", "demo"}
    defaults = {"api.py", "options.py", "checking/check.py", "cli/rules.py", "layouts/spelled.py"}
    known = {*defaults, "testing.py", "merging/output_image.py"}
    found = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text())
        literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        if {"transformers-v4", "transformers-v5"} & {x for x in literals if isinstance(x, str)}:
            found.add(name if name.partition("/")[0] not in of_tools else "")
    assert found - {""} <= known
