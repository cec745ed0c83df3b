"""The examples in docstrings."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import regraft

TESTS = Path(__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [
    each.name
    for each in pkgutil.walk_packages(regraft.__path__, "regraft.")
    if not each.name.endswith("__main__")
]


def examples_of(name):
    """Those of a module, if it can be imported here."""
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module, name) if test.examples]


@pytest.mark.slow
def test_examples(tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(TESTS)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    wrong, ran = [], 0
    for name in MODULES:
        for test in examples_of(name):
            said = []
            ran += runner.run(test, out=said.append).attempted
            wrong += said
    assert not wrong, "".join(wrong)
    assert ran > 200
