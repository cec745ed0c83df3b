"""Small changes to the code that the tests must notice, and the certificate as well where written numbers change.

python scripts/mutants.py                 every mutant, one after another
python scripts/mutants.py follow --jobs 2 those whose names hold a word

Each change is made in a copy of ``src``, and the tests that are for it run there, until the first that fails. A mutant
of what lays out an adapter is also shown to ``convert --verify`` alone: the certificate must not be equal.
Ends with 1 where a mutant survives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regraft.storage.safetensors import write_tensors

ROOT = Path(__file__).parents[1]
SECONDS = 300


@dataclass(frozen=True)
class Mutant:
    """One change."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    verify: str = ""
    """The golden case, or ``WOVEN``, whose conversion with ``--verify`` notices it."""
    unguarded: tuple[str, str, str] | None = None
    """A check of the converter's own, as file, old and new, that is off while the certificate is asked: it alone is
    to notice."""


PLAN = ("tests/planning/test_plan.py",)
NOTATION = ("tests/equation/test_notation.py", "tests/equation/test_operations.py")
LAW = ("tests/adapters/test_law.py", "tests/adapters/test_regressions.py")
FAMILIES = ("tests/adapters/test_families.py", "tests/adapters/test_family_biases.py")
RESOLVE = ("tests/names/test_resolve.py", "-k", "not every_holder and not every_saver")
FILES = ("tests/checkpoints/test_checkpoint_convert.py",)
WRITING = ("tests/adapters/test_regressions.py", "tests/adapters/test_golden.py")
LOWER, BUILD = "equation/lower.py", "planning/build.py"
MOVE, FOLLOW = "adapters/move.py", "adapters/follow.py"
WRITE = "dialects/peft/writing.py"
GUD, WOVEN = "mixtral__gud_attn", "woven"

MUTANTS = [
    Mutant(
        "lower: a bound on what is no loop",
        LOWER,
        "if bound.axis not in loops:",
        "if False:",
        NOTATION,
    ),
    Mutant(
        "lower: summands begin at the same place",
        LOWER,
        "yield axes, base + offset",
        "yield axes, offset",
        NOTATION,
    ),
    Mutant(
        "lower: loops with other strides are joined",
        LOWER,
        "if outer_source == source * size and outer_target == target * size:",
        "if outer_source == source * size:",
        NOTATION,
    ),
    Mutant(
        "build: a carry-over ignores its scope",
        BUILD,
        "if left is not None and part.scope.admits(left.template):",
        "if left is not None:",
        PLAN,
    ),
    Mutant(
        "families: a bound lets one more in",
        "planning/families.py",
        "if index.max(initial=-1) < limit:",
        "if index.max(initial=-1) <= limit:",
        PLAN,
    ),
    Mutant(
        "build: one name made twice is nothing",
        BUILD,
        "if len(groups) < 2:",
        "if len(groups) < 3:",
        PLAN,
    ),
    Mutant(
        "resolve: two templates take one home",
        "names/resolve.py",
        "if homes.setdefault((id(candidate), option), code) != code:",
        "if False:",
        RESOLVE,
    ),
    Mutant(
        "resolve: a model's own path counts for nothing",
        "names/resolve.py",
        "return (-len(self.landed), not self.own, self.spots",
        "return (-len(self.landed), False, self.spots",
        RESOLVE,
    ),
    Mutant(
        "resolve: rivals are not looked at",
        "names/resolve.py",
        "_check_rivals(live, best, pool, keys)\n",
        "pass\n",
        RESOLVE,
    ),
    Mutant(
        "moves: elements below a byte are cut",
        "checkpoints/moves.py",
        "if DTYPES[tensors.dtypes[i]].bits % 8",
        "if False",
        FILES,
    ),
    Mutant(
        "moves: rows that are none at all",
        "checkpoints/moves.py",
        "if 0 in nest.sizes:",
        "if False:",
        FILES,
    ),
    Mutant(
        "moves: two dtypes become one tensor",
        "checkpoints/moves.py",
        "if len(mixed):",
        "if False:",
        FILES,
    ),
    Mutant(
        "move: rows in reverse",
        MOVE,
        "packed[rows, at : at + r, some] = stacked[some].transpose(1, 2, 0)",
        "packed[rows, at : at + r, some] = stacked[some].transpose(1, 2, 0)[::-1]",
        LAW,
        GUD,
    ),
    Mutant(
        "move: experts one further",
        MOVE,
        "a_out = np.concatenate(in_order).reshape(batch, rank, in_size)",
        "a_out = np.roll(np.concatenate(in_order).reshape(batch, rank, in_size), 1, 0)",
        LAW,
        GUD,
    ),
    Mutant(
        "move: the scale of another rank",
        MOVE,
        "return Lora(a_out, packed.transpose(2, 0, 1), scale.at_rank(rank))",
        "return Lora(a_out, packed.transpose(2, 0, 1), scale)",
        LAW,
        GUD,
    ),
    Mutant(
        "move: rows of a part in reverse",
        MOVE,
        "a, b = a[:, columns], b[rows]",
        "a, b = a[:, columns], b[rows][::-1]",
        LAW,
        "mixtral__patterns_expert",
    ),
    Mutant(
        "follow: nothing is put in its order",
        FOLLOW,
        "rows = None if rows is None else _some(np.argsort(rows), part.out)",
        "rows = None",
        FAMILIES,
        WOVEN,
    ),
    Mutant(
        "follow: rows are taken in reverse",
        FOLLOW,
        "return part if rows is None and columns is None else family.take(part, rows, columns)\n\n\ndef _ordered",
        "return family.take(part, np.arange(part.out)[::-1] if rows is None else rows[::-1], columns)\n\n\n"
        "def _ordered",
        FAMILIES,
        WOVEN,
    ),
    Mutant(
        "writing: the factors of experts in another order",
        WRITE,
        "a, b = pack(a, b, swapped=swaps(packing, kind_name, a.shape[0]))",
        "a, b = pack(a[::-1], b, swapped=swaps(packing, kind_name, a.shape[0]))",
        WRITING,
        GUD,
    ),
    Mutant(
        "writing: the alpha of all for every one",
        WRITE,
        "if pair[1] != common[1]:",
        "if False:",
        WRITING,
        "mixtral__patterns_layer",
        ("dialects/peft/writer.py", "        if wrong:\n", "        if False:\n"),
    ),
    Mutant(
        "writing: a bottom factor doubled",
        WRITE,
        'result.tensors[f"{place}.lora_B.weight"] = b',
        'result.tensors[f"{place}.lora_B.weight"] = b * 2',
        WRITING,
        GUD,
    ),
]


def try_mutant(mutant: Mutant) -> tuple[Mutant, str, str, float]:
    """What the tests and the certificate say of a mutant, and after how many seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        missed = change(source, mutant.file, mutant.old, mutant.new)
        if missed:
            return mutant, missed, "", 0.0
        path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        tests = run_tests(mutant.tests, env)
        told = ""
        if mutant.verify:
            missed = change(source, *mutant.unguarded) if mutant.unguarded else ""
            told = missed or certificate(mutant.verify, Path(folder), env)
    return mutant, tests, told, time.monotonic() - begin


def change(source: Path, name: str, old: str, new: str) -> str:
    """Change a file of the copy; what is wrong where the old text is not there exactly once."""
    file = source / "regraft" / name
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        return f"occurs {text.count(old)} times"
    file.write_text(text.replace(old, new), encoding="utf-8")
    return ""


def run_tests(tests: Sequence[str], env: Mapping[str, str]) -> str:
    """What becomes of a mutant under some tests, which stop at the first that fails."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return "no end"
    return {0: "SURVIVED", 1: "killed"}.get(done.returncode, "no tests ran")


BOOK = """name = "woven"
title = "two weights whose rows alternate in one"
left = "transformers-v4"
right = "transformers-v5"
model_types = ["woven"]

[[equation]]
name = "weave"
text = '''
{*p}.{l}.q.weight : (d t) i, {*p}.{l}.k.weight : (d u) i
    == {*p}.{l}.z.weight : (d (t + u)) i
where t = 1, u = 1
'''
left_kind = "linear"
right_kind = "linear"
"""


def woven(folder: Path) -> list[str]:
    """What to convert for those who carry another family than LoRA along: a LoHa, its base and a rule book."""
    (folder / "book.toml").write_text(BOOK, encoding="utf-8")
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text('{"model_type": "woven"}', encoding="utf-8")
    (folder / "loha").mkdir()
    config = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q", "k"]}
    (folder / "loha/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    noise = np.random.default_rng(1)
    shapes = {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 6)}
    tensors = {
        f"base_model.model.m.0.{module}.hada_{name}": noise.random(shape, np.float32)
        for module in "qk"
        for name, shape in shapes.items()
    }
    write_tensors(folder / "loha/adapter_model.safetensors", tensors, {"format": "pt"})
    return [
        str(folder / "loha"),
        "--model",
        str(folder / "base"),
        "--rules",
        str(folder / "book.toml"),
    ]


def certificate(case: str, folder: Path, env: dict[str, str]) -> str:
    """What ``convert --verify`` says of a golden case, or of the woven one."""
    if case == WOVEN:
        given = woven(folder)
    else:
        golden = ROOT / "tests/golden"
        base = golden / "bases" / case.partition("__")[0]
        given = [str(golden / "cases" / case), "--model", str(base)]
    command = [sys.executable, "-m", "regraft", "convert", given[0], str(folder / "out")]
    command += ["--to", "transformers-v5", "--verify", *given[1:]]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, check=False, timeout=SECONDS
    )
    return {0: "SURVIVED", 4: "not equal"}.get(done.returncode, f"exit {done.returncode}")


def main() -> int:
    """Try the mutants and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of them")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in m.name for w in options.words)]
    for tests in dict.fromkeys(mutant.tests for mutant in chosen):
        if run_tests(tests, os.environ) != "SURVIVED":
            print(f"these fail without any change: {' '.join(tests)}", file=sys.stderr)
            return 1
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, tests, told, seconds in pool.map(try_mutant, chosen):
            sound = tests.startswith("killed") and told in ("", "not equal")
            survived += not sound
            shown = told or "-"
            print(
                f"{mutant.name:<52} {tests:<16} --verify: {shown:<10} {seconds:4.0f} s", flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} were noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
