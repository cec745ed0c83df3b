import shutil
import tomllib
from pathlib import Path

import pytest
from making import HEAD, book_of, equation_of

from regraft.equation import check_equation, undetermined
from regraft.equation.notation import Segments
from regraft.errors import BadInputError
from regraft.rules import book as book_module
from regraft.rules.book import books_for, library, load_book
from regraft.rules.direction import Direction
from regraft.rules.kinds import KINDS

SHIPPED = Path(book_module.__file__).parent / "library"


def findings(body, head=HEAD):
    with pytest.raises(BadInputError) as caught:
        book_of(body, head=head)
    return {(f.where, f.code): f.message for f in caught.value.findings}


def line_of(text, marker, number=0):
    lines = [i for i, line in enumerate(text.split("\n"), 1) if marker in line]
    return lines[number]


def test_a_book_holds_rules_with_their_lines_and_kinds():
    body = equation_of(
        "x.{l} : a i, y.{l} : b i == z.{l} : (a + b) i where a = b", "fuse", "linear", "linear"
    )
    book = book_of(body)
    (rule,) = book.rules
    assert str(rule) == f"test/fuse (test.toml:{line_of(HEAD + body, '[[equation]]')})"
    assert rule.kinds(Direction.FORWARD) == (("linear", "linear"), ("linear",))
    assert rule.kinds(Direction.BACKWARD) == (("linear",), ("linear", "linear"))


def test_all_that_is_wrong_comes_together_with_file_and_line():
    body = "".join(
        [
            equation_of("x : a == y : (a", "open bracket"),
            equation_of("x : (a + b) == y : a, z : b", "loose"),
            equation_of("x : a i == y : a i", "kind", left_kind="lineal"),
            equation_of("x : a i == y : a i", "dims", right_kind="experts"),
            equation_of("x : a i == y : a i", "count", left_kind=["linear", "linear"]),
            equation_of("a i == i a", "no keys"),
            '\n[[carry]]\nkeys = ["{*p}.x", "{*p.y"]\nwhy = "same"\n',
            '\n[[carry]]\nkeys = ["x"]\nwhy = "same"\nkind = "nothing"\n',
            '\n[[carry]]\nkeys = ["x : a"]\nwhy = "same"\nwhere = "b = 3"\n',
            '\n[[parameters]]\nside = "up"\nmodule = "m"\nnames = ["w"]\n',
            '\n[[parameters]]\nside = "left"\nmodule = "m.{"\nnames = ["w"]\n',
            '\n[[equation]]\nname = "odd"\ntext = "x : a == y : a"\nkind = "linear"\n',
        ]
    )
    found = findings(body)
    text = HEAD + body
    tables = [line_of(text, "[[equation]]", i) for i in range(7)]
    carries = [line_of(text, "[[carry]]", i) for i in range(3)]
    parameters = [line_of(text, "[[parameters]]", i) for i in range(2)]
    expected = {
        (tables[0], "notation"): "x : a == y : (a",
        (tables[1], "undetermined"): "read left to right, nothing says how large a, b is",
        (tables[2], "kind"): "no kind 'lineal'; known: linear",
        (tables[3], "kind"): "has not the dims of kind 'experts'",
        (tables[4], "kind"): "2 kinds for a side of 1 terms",
        (tables[5], "rule-book"): "need keys",
        (carries[0], "notation"): "{*p.y",
        (carries[1], "kind"): "no kind 'nothing'",
        (carries[2], "notation"): "no axis b|has an axis b",
        (parameters[0], "rule-book"): "up",
        (parameters[1], "notation"): "m.{",
        (tables[6], "rule-book"): "kind",
    }
    for (line, code), message in expected.items():
        got = found.pop((f"test.toml:{line}", code))
        assert any(part in got for part in message.split("|")), (line, got)
    assert not found


def test_two_rules_of_one_name_are_an_error():
    body = equation_of("x : a == y : a", "one") + equation_of("v : a == w : a", "one")
    ((place, message),) = findings(body).items()
    assert place[0] == f"test.toml:{line_of(HEAD + body, '[[equation]]', 1)}"
    assert "'one'" in message
    assert f"test.toml:{line_of(HEAD + body, '[[equation]]', 0)}" in message


def test_a_book_between_one_layout_and_itself_is_an_error():
    ((_, message),) = findings("", HEAD.replace('"new"', '"old"')).items()
    assert "one layout" in message


@pytest.mark.parametrize(
    ("head", "line", "message"),
    [
        (HEAD.replace('title = "a book for tests"\n', ""), 1, "title"),
        (HEAD.replace('["test"]', '"test"'), 5, "model_types"),
        (HEAD + 'colour = "red"\n', 6, "colour"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(head, line, message):
    ((place, text),) = findings("", head).items()
    assert place == (f"test.toml:{line}", "rule-book")
    assert message in text


def test_a_version_that_no_adapter_is_written_in_is_an_error():
    with pytest.raises(BadInputError, match="adapters are written as"):
        book_of('[adapters]\nright = "peft-0.3"\n')


def test_what_is_no_toml_says_so():
    ((place, message),) = findings("", "name = 3 3\n").items()
    assert place == ("test.toml", "toml")
    assert "not TOML" in message
    assert "line 1" in message


def test_included_files_become_part_of_the_book_under_their_own_lines(tmp_path):
    (tmp_path / "book.toml").write_text(
        HEAD + 'include = ["part.toml", "gone.toml"]\n' + equation_of("x : a == y : (a", "bad")
    )
    (tmp_path / "part.toml").write_text("# a part\n" + equation_of("x : a == y : b", "worse"))
    with pytest.raises(BadInputError) as caught:
        load_book(tmp_path / "book.toml")
    places = {f.where.removeprefix(f"{tmp_path}/") for f in caught.value.findings}
    assert places == {"book.toml:6", "book.toml:8", "part.toml:3"}
    (tmp_path / "part.toml").write_text("# a part\n" + equation_of("x : a == y : a", "better"))
    (tmp_path / "book.toml").write_text(
        HEAD + 'include = ["part.toml"]\n' + equation_of("v : a == w : a", "own")
    )
    book = load_book(tmp_path / "book.toml")
    assert sorted(rule.name for rule in book.rules) == ["better", "own"]
    assert {rule.book for rule in book.rules} == {"test"}


def library_files():
    import regraft.rules

    return sorted((Path(regraft.rules.__file__).parent / "library").glob("*.toml"))


def test_the_library_is_whole():
    files = [f for f in library_files() if not f.name.startswith("_")]
    assert len(files) >= 11
    assert {book.path for book in library()} == {f.name for f in files}
    assert len({book.name for book in library()}) == len(files)


@pytest.mark.parametrize("book", library(), ids=lambda book: book.name)
def test_a_book_of_the_library_is_sound(book):
    assert book.title
    assert book.source
    assert book.model_types
    assert book.left != book.right
    assert bool(book.reclaimed) >= bool(book.reclaimed_model_types)
    for rule in book.rules:
        check_equation(rule.equation)
        assert undetermined(rule.equation) == ()
        assert undetermined(rule.equation, reverse=True) == ()
        for side, kinds in (
            (rule.equation.left, rule.left_kinds),
            (rule.equation.right, rule.right_kinds),
        ):
            assert all(KINDS[kind].fits(term) for term, kind in zip(side, kinds, strict=True))
    for carry in book.carries:
        assert carry.why


def test_every_part_of_the_library_is_used():
    parts = {f.name for f in library_files() if f.name.startswith("_")}
    used = {n for f in library_files() for n in tomllib.loads(f.read_text()).get("include", [])}
    assert used == parts


def test_a_model_type_belongs_to_one_book():
    types = [(t, book.left, book.right) for book in library() for t in book.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    "model_type",
    [
        *(
            "mixtral",
            "minimax",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "olmoe",
            "flex_olmo",
            "deepseek_v2",
        ),
        *(
            "deepseek_v3",
            "dots1",
            "glm4_moe",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "jamba",
            "granitemoe",
            "dbrx",
            "jetmoe",
        ),
        *("gpt_oss", "qwen3_vl_moe"),
    ],
)
def test_the_families_that_were_asked_for_have_a_book(model_type):
    (book,) = (b for b in books_for([model_type]) if b.right == "transformers-v5")
    assert model_type in book.model_types
    assert book.rules


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("x = " + "[" * 5000 + "]" * 5000, "toml", "nested too deep"),
        ("x = " + "9" * 5000, "toml", "digits"),
        (f"x = {'{a = ' * 3000}1{'}' * 3000}", "toml", "nested too deep"),
        (equation_of(f"x : {'(' * 3000}a{')' * 3000} == y : a"), "notation", "more than 40 deep"),
        (equation_of(f"x.{{{'(' * 3000}a{')' * 3000}}} : b == y : a b"), "notation", "40 deep"),
        (equation_of(f"x : a == y : a where a = {'9' * 5000}"), "notation", "18 digits"),
    ],
)
def test_what_is_too_deep_or_too_large_is_a_finding(body, code, words):
    (found,) = findings(body).items()
    assert found[0][1] == code
    assert words in found[1]


def test_an_included_file_whose_name_no_file_can_have_is_not_there(tmp_path):
    path = tmp_path / "book.toml"
    path.write_text(HEAD + f'include = ["{"9" * 5000}.toml"]\n')
    with pytest.raises(BadInputError, match="there is no file 9999"):
        load_book(path)


def test_only_the_heads_of_shipped_books_are_read_until_a_rule_is_asked_for(monkeypatch):
    whole = {book.path: load_book(SHIPPED / book.path, book.path) for book in library()}
    read = []
    monkeypatch.setattr(
        book_module, "load_book", lambda path, shown, sound: read.append(shown) or whole[shown]
    )
    book_module._shipped.cache_clear()
    try:
        for book in book_module._shipped():
            other = whole[book.path]
            for name in ("name", "title", "layouts", "model_types", "reclaimed", "left_adapters"):
                assert getattr(book, name) == getattr(other, name)
            assert not read
            assert (book.rules, book) == (other.rules, other)
            assert read == [book.path]
            read.clear()
    finally:
        book_module._shipped.cache_clear()


def test_a_book_that_was_edited_since_its_head_was_kept_is_read_itself(monkeypatch, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "library")
    edited = tmp_path / "library" / "mixtral.toml"
    edited.write_text(edited.read_text().replace('"minimax_m2"]', '"minimax_m2", "mine"]', 1))
    (tmp_path / "library" / "flux.toml").unlink()
    shutil.copy(edited, tmp_path / "library" / "added.toml")
    monkeypatch.setattr(book_module, "_LIBRARY", tmp_path / "library")
    monkeypatch.setattr(book_module, "HEADS", tmp_path / "library" / "heads.json")
    book_module._shipped.cache_clear()
    try:
        books = {book.path: book for book in book_module._shipped()}
    finally:
        book_module._shipped.cache_clear()
    assert "mine" in books["mixtral.toml"].model_types
    assert "mine" in books["added.toml"].model_types
    assert "flux.toml" not in books


def test_no_rule_of_the_library_takes_modules_that_it_does_not_name():
    """A key with an open end would move whatever stands there; what is left out as a whole may have one."""
    for book in library():
        terms = [t for rule in book.rules for t in (*rule.equation.left, *rule.equation.right)]
        for term in (*terms, *(carry.term for carry in book.carries)):
            assert term.key is None or not isinstance(term.key.parts[-1], Segments), (
                f"{book.name}: {term}"
            )
