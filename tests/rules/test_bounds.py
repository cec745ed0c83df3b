"""Books of unknown origin: bounded in size, depth and what their sums multiply out to."""

import os
import time

import pytest

import regraft
from regraft.equation.notation import parse_equation
from regraft.errors import BadInputError
from regraft.rules.book import load_book
from regraft.rules.lint.book import lint_file

HEAD = 'name="x"\ntitle="t"\nleft="transformers-v4"\nright="transformers-v5"\nmodel_types=["mixtral"]\n'


def test_sums_that_multiply_out():
    names = [f"(a{n} + b{n})" for n in range(24)]
    swapped = [f"(b{n} + a{n})" for n in range(24)]
    begin = time.process_time()
    with pytest.raises(BadInputError, match="16777216 pieces"):
        parse_equation(f"{{*p}}.w : {' '.join(names)} == {{*p}}.x : {' '.join(swapped)}")
    assert time.process_time() - begin < 2
    parse_equation(" ".join(names[:10]) + " == " + " ".join(swapped[:10]))


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 2000 + "]" * 2000,
        "x = " + "9" * 5000,
        "x = " + "{a=" * 2000 + "1" + "}" * 2000,
        HEAD
        + f'[[equation]]\nname="e"\ntext="{{*p}}.w : {"(" * 2000}a{")" * 2000} == {{*p}}.x : a"\n',
        HEAD + f'[[equation]]\nname="e"\ntext="{{*p}}.w : {"a " * 50_000} == {{*p}}.x : a"\n',
    ],
)
def test_deep_and_long(tmp_path, text):
    (tmp_path / "book.toml").write_text(text)
    with pytest.raises(BadInputError):
        load_book(tmp_path / "book.toml")
    assert not lint_file(tmp_path / "book.toml").sound


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "book.toml")
    for read in (load_book, lint_file):
        with pytest.raises(BadInputError, match="not a regular file"):
            read(tmp_path / "book.toml")


def test_a_book_that_is_too_large(tmp_path):
    with (tmp_path / "book.toml").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadInputError) as caught:
        load_book(tmp_path / "book.toml")
    assert caught.value.findings[0].code == "file-too-large"


def test_workers(tmp_path):
    from pathlib import Path

    base = Path(__file__).parents[1] / "golden" / "bases" / "mixtral"
    for jobs in (0, 100_000):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(base, tmp_path / "out", to="transformers-v5", jobs=jobs)
        assert caught.value.findings[0].code == "bad-jobs"
