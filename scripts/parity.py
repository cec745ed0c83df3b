"""Compare regraft with transformers, class by class, for every class that some release has a conversion for.

    python scripts/parity.py [--releases 5.4.0,5.23.0] [--out docs/parity.md] [--only GLOB]

A tiny random model of each class is saved in the old layout by transformers itself. regraft must make of that file
what transformers loads from it, tensor for tensor; the way back must be the file again; and what regraft writes by
itself must be loaded by transformers. Without --releases the installed one is measured. For a release an environment
is made under --venvs (with pip) and kept; torch is installed once for all of them.

Each class is written down as soon as it is measured, so that a run that was stopped goes on where it was; a change of
regraft or of the comparison begins anew. The page is of what is written down: classes of a run that is not over are
counted as not measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("numpy", "ml-dtypes", "msgspec", "rich", "click", "scipy", "pillow")
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Ledger:
    """What is known of each class of one release, a line of JSON each.

    A line is ``{"class": NAME, ...verdict}`` or ``{"class": NAME, "not built": WHY}``; one without either is a class
    that nothing is registered for.
    """

    path: Path

    def read(self) -> dict[str, dict]:
        """The rows by class; a last line that was cut off does not count."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["class"]] = row
        return rows

    def add(self, row: dict) -> None:
        """Write down one class."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(only: str, ledger: Ledger) -> None:
    """Every class of the installed release that is not written down yet."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "parity")]
    import torch
    import transformers
    from compare import classes

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    known = ledger.read()
    for cls in classes():
        if cls.__name__ not in known and fnmatch.fnmatch(cls.__name__, only):
            row = _row(cls)
            ledger.add(row)
            if "equal" in row:
                print("." if row["equal"] else "x", end="", flush=True, file=sys.stderr)
    ledger.add({"class": "", "over": only})
    print(file=sys.stderr)


def _row(cls: type) -> dict:
    """What is written down of one class."""
    import torch
    from compare import judge, registered, why_not
    from tiny import MOST, shrink

    name = cls.__name__
    try:
        with torch.device("meta"):
            model = cls(shrink(cls.config_class()))
        if not registered(model):
            return {"class": name}
        if sum(p.numel() for p in model.parameters()) > MOST:
            raise ValueError("its smallest size is too large here")
        verdict = judge(cls, shrink(cls.config_class()))
    except Exception as error:
        if not why_not(cls):
            return {"class": name}
        lines = [line.strip() for line in str(error).split("\n")]
        told = " ".join(line for line in lines if line)[:160]
        return {"class": name, "not built": f"{type(error).__name__}: {told}"}
    return {
        "class": name,
        "keys": verdict.keys,
        "renamed": verdict.renamed,
        "converted": verdict.converted,
        "equal": verdict.equal,
        "differences": verdict.differences,
    }


def result_of(release: str, rows: dict[str, dict]) -> dict:
    """One release's rows as the page shows them, with the reasons for differences that are known now."""
    sys.path[:0] = [str(ROOT / "tests" / "parity")]
    from explained import explain

    measured = [row for row in rows.values() if "equal" in row]
    return {
        "release": release,
        "whole": rows.get("", {}).get("over") == "*",
        "classes": [{**row, "reason": explain(row["class"], release)} for row in measured],
        "not built": {n: row["not built"] for n, row in rows.items() if "not built" in row},
    }


def digest() -> str:
    """Of everything that a result depends on."""
    found = hashlib.sha256()
    for folder in (ROOT / "src" / "regraft", ROOT / "tests" / "parity"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".toml") and path.name != "explained.py":
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def python_of(release: str, folder: Path) -> str:
    """The Python of an environment with a release; it is made where there is none.

    torch and what regraft needs are in one environment beside it, which a ``.pth`` file adds to each.
    """
    shared = _environment(folder / TORCH.replace("==", "-"), [TORCH, *NEEDS])
    home = subprocess.run(
        [shared, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    place = folder / f"transformers-{release}"
    return _environment(place, [f"transformers=={release}"], home)


def _environment(place: Path, packages: Sequence[str], home: str = "") -> str:
    """An environment with packages; one that was not finished is made anew."""
    python, done = place / "bin" / "python", place / ".done"
    if not done.exists():
        venv.create(place, with_pip=True, clear=True)
        for site in place.glob("lib/*/site-packages"):
            (site / "shared.pth").write_text(home)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        done.touch()
    return str(python)


def show(results: list[dict]) -> str:
    """The table as Markdown."""
    lines = [
        "# Parity with transformers",
        "",
        "Made by `make parity`. For every class with a conversion in the registry, a tiny random model:",
        "its file in the old layout through regraft equals what transformers loads from it, tensor for tensor;",
        "the way back is that file; and a file with the names that regraft writes by itself is loaded by",
        "transformers.",
        "",
        "A class that cannot be built is listed, and counts as neither.",
        "",
        "| transformers | classes | equal | differ | not built |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        count = Counter(row["equal"] for row in result["classes"])
        release = result["release"] + ("" if result["whole"] else " (not all measured)")
        lines.append(
            f"| {release} | {len(result['classes'])} | {count[True]} | {count[False]} | "
            f"{len(result['not built'])} |"
        )
    for result in results:
        lines += ["", f"## transformers {result['release']}", ""]
        odd = [row for row in result["classes"] if not row["equal"]]
        if odd:
            lines += ["| differs | why | what |", "|---|---|---|"]
            for row in odd:
                what = "; ".join(row["differences"]).replace("|", "/").replace("\n", " ")[:300]
                lines.append(f"| {row['class']} | {row['reason'] or 'not explained'} | {what} |")
            lines.append("")
        if result["not built"]:
            lines += ["Not built:", ""]
            lines += [f"- {name}: {why}" for name, why in result["not built"].items()]
            lines.append("")
        lines += ["| class | keys | renamed | converted | equal |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['class']} | {r['keys']} | {r['renamed']} | {r['converted']} | {'yes' if r['equal'] else 'no'} |"
            for r in result["classes"]
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """1 where a difference is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--releases", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument("--ledger", type=Path, help="measure the installed release into this file")
    parser.add_argument("--show", action="store_true", help="make the page of what is written down")
    parser.add_argument(
        "--venvs", type=Path, default=Path(tempfile.gettempdir()) / "regraft-parity"
    )
    options = parser.parse_args()
    if options.ledger:
        measure(options.only, Ledger(options.ledger))
        return 0
    folder = options.venvs / f"results-{digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for release in filter(None, (options.releases or _installed()).split(",")):
        ledger = Ledger(folder / f"{release}.jsonl")
        if not options.show and ledger.read().get("", {}).get("over") != options.only:
            python = python_of(release, options.venvs) if options.releases else sys.executable
            command = [python, __file__, "--only", options.only, "--ledger", ledger.path]
            subprocess.run(command, check=True)
        results.append(result_of(release, ledger.read()))
    if options.out:
        options.out.write_text(show(results))
    rows = [row for result in results for row in result["classes"]]
    odd = [row for row in rows if not row["equal"]]
    for row in odd:
        print(f"{row['class']}: {row['reason'] or 'NOT EXPLAINED'}: {row['differences']}")
    print(f"{len(rows)} classes, {len(rows) - len(odd)} equal")
    return int(any(not row["reason"] for row in odd))


def _installed() -> str:
    return importlib.metadata.version("transformers")


if __name__ == "__main__":
    sys.exit(main())
