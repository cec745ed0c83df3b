"""Importing regraft is light: the heavy libraries come in only where they are asked for."""

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

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


DRY_RUN = """
import sys
from regraft.cli import main
status = main(["convert", sys.argv[1], sys.argv[2], "--to", "transformers-v5", "--dry-run", "--quiet"])
print(status, *sorted(sys.modules))
"""
WRITING = {
    "hashlib",
    "ml_dtypes",
    "regraft.checkpoints.engine",
    "regraft.checkpoints.result",
    "regraft.storage.folder",
    "regraft.storage.safetensors",
    "regraft.storage.work",
    "shutil",
    "tempfile",
}
"""What reads numbers or writes files."""
SELDOM = {"difflib", "regraft.bridges.helper", "subprocess", "zipfile"}
"""What is for odd names and files, and for models that no rule book knows."""


def test_a_dry_run_imports_nothing_that_writes(tmp_path: Path) -> None:
    """It plans on headers and configs; each of these modules would be felt in how long it takes."""
    base = Path(__file__).parent / "golden/bases/mixtral"
    command = [sys.executable, "-c", DRY_RUN, str(base), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, *modules = done.stdout.split()
    assert status == "0"
    assert (WRITING | SELDOM) & set(modules) == set()


@pytest.mark.slow
def test_no_module_takes_the_place_of_a_public_function() -> None:
    """Importing ``regraft.x`` sets the attribute ``x`` of the package, whatever function had that name."""
    for module in pkgutil.walk_packages(regraft.__path__, "regraft."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert [name for name in regraft.__all__ if not callable(getattr(regraft, name))] == []


INTERRUPTED = """
import sys
from regraft.cli import main

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

print(*sorted(name for name in sys.modules if name.startswith("regraft")), flush=True)
sys.meta_path.insert(0, Interrupting())
sys.exit(main(["inspect", "nothing"]))
"""


@pytest.mark.parametrize("module", ["regraft.cli.run", "regraft.errors.codes", "regraft.cli.words"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "regraft: interrupted")
    # What is imported before `main` catches anything is next to nothing.
    assert done.stdout.split() == ["regraft", "regraft.cli"]


def _spelled(path: Path) -> set[str]:
    """The strings of a module's code; docstrings and the comments below fields are prose."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose)
    return {node.value for node in texts if isinstance(node.value, str)}


def test_only_its_dialect_spells_pefts_names() -> None:
    """Elsewhere PEFT is one dialect of several; messages may name it, and the proof of the demo, which stands alone."""
    root = Path(regraft.__file__).parent
    free = ("dialects/", "bridges/", "adapters/families/", "errors/codes", "demo/proof")
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not path.relative_to(root).as_posix().startswith(free)
        and any("lora_A" in text or "base_model.model" in text for text in _spelled(path))
    }
    assert not found, found
