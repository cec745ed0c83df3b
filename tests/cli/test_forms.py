"""What a command finds is one value; one function each puts it into words and on a page, and none decides anew."""

import ast
import importlib
import pkgutil
from pathlib import Path

import regraft.cli
from regraft.checkpoints.slices import SlicesReport
from regraft.cli.forms import FORMS, forms_of
from regraft.errors.codes import Status
from regraft.shown import Shown
from regraft.views.documents import RankSlices
from regraft.views.outcome import SourceOutcome
from regraft.views.schema import DOCUMENTS, Failure

CLI = Path(regraft.cli.__file__).parent
SENDERS = {"forms", "output", "run", "schema", "many", "inspect"}
"""Modules that write JSON: of results, of failures, of schemas, and line by line of many sources."""


def _named(name: str, separator: str):
    module, _, attribute = name.rpartition(separator)
    return getattr(importlib.import_module(module), attribute)


def _all_below(kind: type) -> set[type]:
    return {kind}.union(*map(_all_below, kind.__subclasses__()))


def test_every_result_has_its_forms_in_one_table():
    for name in FORMS:
        assert issubclass(_named(name, "."), Shown), name
    for module in pkgutil.iter_modules([str(CLI)], "regraft.cli."):
        importlib.import_module(module.name)
    own = {kind for kind in _all_below(Shown) if kind.__module__.startswith("regraft.")} - {Shown}
    assert {kind.__name__ for kind in own if forms_of(kind) is None} == set()


def test_every_form_has_one_function():
    functions = [name for forms in FORMS.values() for name in (forms.words, forms.page) if name]
    assert len(functions) == len(set(functions))
    for name in functions:
        assert callable(_named(name, ":")), name


def test_what_is_printed_as_json_is_what_is_shown():
    """A schema describes the type whose words and pages the table has."""
    of_their_own = {SourceOutcome, Failure}
    written = {RankSlices: SlicesReport}
    documents = {kind for kinds in DOCUMENTS.values() for kind in kinds} - of_their_own
    shown = {_named(name, ".") for name in FORMS}
    lines = {kind for kind in shown if kind.__name__ == "ImageFolder"}  # one document a file
    assert documents == {written.get(kind, kind) for kind in shown} - lines


def test_commands_leave_telling_to_the_table():
    """No command writes JSON by itself, and none decides on its exit status by what it found."""
    for file in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                sends = node.func.attr in ("data", "line") and ast.unparse(node.func.value) == "out"
                assert not sends or file.stem in SENDERS, f"{file.name}:{node.lineno}"
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.IfExp):
                numbers = {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
                told = {int(status) for status in Status} - {0, 130}
                assert not (numbers & told and bool not in map(type, numbers)), (
                    f"{file.name}:{node.lineno}"
                )
