"""The documentation is true: what it shows is run, what it lists is complete."""

import ast
import doctest
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from regraft.cli import main
from regraft.errors.codes import CODES
from regraft.rules.book import library
from regraft.rules.kinds import KINDS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from errors_page import errors_page  # noqa: E402

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page, language):
    """The fenced blocks of some languages, each with the line that it begins on."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```({language})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start(2)), found[1], found[2]


def named(page):
    return str(page.relative_to(ROOT))


def rows(text):
    """The rows of a page's tables, as lists of cells."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder in which paths of the repository lead to it."""
    for name in ("tests", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # A slow machine adds no lines of progress to what the pages show.
    monkeypatch.setattr("regraft.cli.progress._EVERY", {"plain": 3600.0, "json": 3600.0})
    return tmp_path


def commands(block):
    """The commands of a console block and what it shows of their output."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_examples(page, folder, capsys):
    """Python blocks and commands, in the order of the page, say what it shows; `...` stands for what is left out."""
    if ">>> import torch" in page.read_text(encoding="utf-8"):
        pytest.importorskip("transformers", minversion="5.0")
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    checker = doctest.OutputChecker()
    names = {}
    for line, language, block in blocks(page, "python|console"):
        if language == "console":
            for command, shown in commands(block):
                program, *args = shlex.split(command)
                assert program == "regraft", command
                capsys.readouterr()
                main(args)
                written = capsys.readouterr()
                got = written.out + written.err
                assert checker.check_output(shown, got, FLAGS), f"$ {command}\n{got}"
        elif ">>>" not in block:
            compile(block, named(page), "exec")
        else:
            test = doctest.DocTestParser().get_doctest(block, names, named(page), str(page), line)
            runner.run(test, clear_globs=False)
            assert not runner.failures, capsys.readouterr().out
            names = test.globs


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_shell_blocks(page):
    """What is to be typed into a shell exists: targets of make, extras of the package."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for _, _, block in blocks(page, "sh"):
        for command in filter(
            None, (line.partition("  #")[0].strip() for line in block.splitlines())
        ):
            program, *args = shlex.split(command)
            if program == "eval":
                program, *args = shlex.split(args[0].removeprefix("$(").removesuffix(")"))
            if program == "make":
                assert re.search(rf"^{args[0]}:.*## ", makefile, re.MULTILINE), command
            elif program == "pip":
                extras = re.search(r"\[(.+)\]", args[-1])
                assert not extras or set(extras[1].split(",")) <= set(
                    project["optional-dependencies"]
                )
            elif program == "regraft":
                assert args[0] == "completion", command
            else:
                assert program in {"python", ".venv/bin/pre-commit", ".venv/bin/pytest"}, command


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = {}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            if file not in headings:
                headings[file] = {
                    re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in file.read_text(encoding="utf-8").splitlines()
                    if line.startswith("#")
                }
            assert anchor in headings[file], target


def test_index_has_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert path == "index.md" or f"({path})" in index, path
        assert f": {path}\n" in nav, path


def test_design_has_every_module():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    for folder in ("src/regraft", "src/regraft/adapters"):
        for path in (ROOT / folder).iterdir():
            if path.suffix == ".py" or (path / "__init__.py").exists():
                name = path.stem
                assert name.startswith("__") or re.search(rf"\b{name}\b", text), path


def test_every_model_type_is_listed():
    books = {book.name: set(book.model_types) for book in library()}
    pages = [
        (ROOT / page).read_text(encoding="utf-8") for page in ("docs/models.md", "docs/tools.md")
    ]
    lines = [cells for page in pages for cells in rows(page) if cells[0] in books]
    told = {cells[0]: set(cells[1].split(", ")) for cells in lines}
    assert told == books


def test_every_field_and_kind_is_described():
    text = (ROOT / "docs/rule-books.md").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "src/regraft/rules/book.py").read_text(encoding="utf-8"))
    tables = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    fields = {
        node.target.id
        for name, table in tables.items()
        if name.endswith("Table")
        for node in table.body
        if isinstance(node, ast.AnnAssign)
    }
    assert "reclaimed" in fields
    for name in fields:
        assert f"`{name}`" in text or f"[[{name}]]" in text, name
    notation = (ROOT / "docs/notation.md").read_text(encoding="utf-8")
    assert {cells[0].strip("`") for cells in rows(notation)} >= set(KINDS)


def codes_in_source():
    """Every code that a finding can have: literals that reach a parameter called `code`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    makers = {"Finding": 0}
    codes = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            names = [arg.arg for arg in node.args.args if arg.arg != "self"]
            if "code" in names:
                makers[node.name] = names.index("code")
            for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if arg.arg == "code":
                    codes.add(ast.literal_eval(default))
        elif isinstance(node, ast.Assign) and last_name(node.targets[0]) == "code":
            codes |= literals(node.value)
    for node in nodes:
        if isinstance(node, ast.Call):
            place = makers.get(last_name(node.func))
            if place is not None and len(node.args) > place:
                codes |= literals(node.args[place])
            for keyword in node.keywords:
                if keyword.arg == "code":
                    codes |= literals(keyword.value)
    return codes


def last_name(node):
    """`c` of `c` and of `a.b.c`."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


def literals(node):
    """The strings that an expression can be; a name that is only passed on has none."""
    if isinstance(node, ast.IfExp):
        return literals(node.body) | literals(node.orelse)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    return set()


@pytest.mark.slow
def test_codes_are_those_of_the_enum():
    codes = codes_in_source()
    assert {"unmatched", "unknown-size", "notation", "partial-weights", "internal"} <= codes
    assert sorted(codes) == sorted(CODES)


def test_errors_page_is_up_to_date():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert page == errors_page(), "run: python scripts/errors_page.py"
