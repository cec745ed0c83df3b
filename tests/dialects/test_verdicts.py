"""`check --for TOOL`, answer by answer: every reason that a judge can give is reached by a file that is made for it."""

import ast
import re
import sys
from pathlib import Path

import pytest

import regraft
from regraft.dialects import judges

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/consumers"))
from shared.verdicts import CASES, write  # noqa: E402

TOOLS = sorted({case.tool for case in CASES})


def answer(case, folder):
    """The verdict, and all that is said."""
    src, base = write(case, folder)
    found = regraft.check(src, tool=case.tool, model=base if case.based else None)
    told = [*found.failures, *found.notes, *(target.reason for target in found.targets)]
    return found.verdict, [reason for reason in told if reason]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return {
        (case.tool, case.name): answer(case, tmp_path_factory.mktemp("case") / "it")
        for case in CASES
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_each_file_has_its_answer(tool, answers):
    wrong = []
    for case in CASES:
        if case.tool != tool:
            continue
        verdict, told = answers[case.tool, case.name]
        if verdict != case.verdict or not any(case.reason in reason for reason in [*told, ""]):
            wrong.append((case.name, verdict, told))
    assert not wrong


def test_no_reason_is_without_a_file(answers):
    """The sentences that stand in the judges' code, against all that was said."""
    told = [reason for _, reasons in answers.values() for reason in reasons]
    left = [
        f"{file.name}:{line} {pattern}"
        for file in sorted(Path(judges.__file__).parent.glob("*.py"))
        for line, pattern in sentences(file)
        if not any(re.search(pattern, reason) for reason in told)
    ]
    assert not left


def sentences(file):
    """The texts of a judge with words in them, as patterns; holes of f-strings match anything."""
    tree = ast.parse(file.read_text("utf-8"))
    outside = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and {getattr(t, "id", "") for t in node.targets} & {
            "basis"
        }:
            outside.add(node.value)
        if isinstance(node, ast.JoinedStr):
            outside |= {inner for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if node in outside:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [
                re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values
            ]
            if " " in "".join(parts):
                yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.escape(node.value)
