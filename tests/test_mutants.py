"""Mutants change what is in the code: a text that has gone changes nothing."""

import sys
from pathlib import Path

import pytest

import regraft

ROOT = Path(__file__).parents[1]
PACKAGE = Path(regraft.__file__).parent  # where it is installed from a wheel, there is no source


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield __import__("mutants").MUTANTS
    sys.modules.pop("mutants", None)


def test_every_text_of_a_mutant_is_in_the_code_once(mutants):
    texts = [(m.file, m.old) for m in mutants]
    texts += [m.unguarded[:2] for m in mutants if m.unguarded]
    counts = {text: (PACKAGE / file).read_text("utf-8").count(text) for file, text in texts}
    assert set(counts.values()) == {1}, [text for text, count in counts.items() if count != 1]
