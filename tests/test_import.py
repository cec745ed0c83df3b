"""Importing regraft is light: the heavy libraries come in only where they are asked for."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import regraft

PROBE = """
import json, sys, time
start = time.perf_counter()
import regraft
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def test_import_leaves_heavy_libraries_out(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\nimport regraft: {report['seconds'] * 1000:.0f} ms")
    heavy = {"torch", "transformers", "peft", "accelerate"}
    assert heavy.isdisjoint(report["modules"])


def test_heads_of_rule_books_need_no_numpy() -> None:
    """What asks for names of layouts alone, as every command line does, is not to wait for numpy."""
    code = "import sys; from regraft.rules.book import library; library(); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stdout + done.stderr


@pytest.mark.slow
def test_no_module_takes_the_place_of_a_public_function() -> None:
    """Importing ``regraft.x`` sets the attribute ``x`` of the package, whatever function had that name."""
    for module in pkgutil.walk_packages(regraft.__path__, "regraft."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert [name for name in regraft.__all__ if not callable(getattr(regraft, name))] == []
