"""Every code of a finding is raised by something, with the exit status that the list of codes promises."""

from importlib import import_module

import pytest
from errors.lab import TRIGGERS, Lab

from regraft.errors import RegraftError
from regraft.errors.codes import Code

for part in ("adapters", "files", "models", "rules"):
    import_module(f"errors.triggers_of_{part}")


def provoke(trigger, lab):
    """The exit status that a trigger leads to, and the codes of the findings."""
    try:
        status, findings = trigger(lab)
    except RegraftError as error:
        return error.status, {finding.code for finding in error.findings}
    return status, {finding["code"] for finding in findings}


@pytest.mark.parametrize("code", Code, ids=lambda code: code.value)
def test_every_code_is_raised_with_its_status(code, tmp_path, monkeypatch, capsys):
    assert code in TRIGGERS, "a new code: add the shortest way to it to triggers_of_*.py"
    monkeypatch.delenv("REGRAFT_DEBUG", raising=False)
    status, codes = provoke(TRIGGERS[code], Lab(tmp_path, monkeypatch, capsys))
    assert code.value in codes
    assert status == code.status
