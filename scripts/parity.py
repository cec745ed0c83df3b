"""Compare regraft with transformers, class by class, for every class that some release has a conversion for.

    python scripts/parity.py [--releases 5.4.0,5.23.0] [--out docs/parity.md] [--json parity.json] [--only GLOB]

A tiny random model of each class is saved in the old layout by transformers itself. regraft must make of that file
what transformers loads from it, tensor for tensor; the way back must be the file again; and what regraft writes by
itself must be loaded by transformers. Without --releases the installed one is measured. For a release an environment
is made under --venvs (with pip) and kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("numpy", "ml-dtypes", "msgspec", "rich", "click")
TORCH = "torch==2.13.0"


def measure(only: str) -> dict:
    """Every class of the installed release that something is registered for."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "parity")]
    import torch
    import transformers
    from compare import classes, judge, registered, why_not
    from explained import explain
    from tiny import MOST, shrink

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows, skipped = [], {}
    for cls in classes():
        if not fnmatch.fnmatch(cls.__name__, only):
            continue
        try:
            with torch.device("meta"):
                model = cls(shrink(cls.config_class()))
            if not registered(model):
                continue
            if sum(p.numel() for p in model.parameters()) > MOST:
                raise ValueError("its smallest size is too large here")
            verdict = judge(cls, shrink(cls.config_class()))
        except Exception as error:
            if why_not(cls):
                skipped[cls.__name__] = f"{type(error).__name__}: {error}".split("\n")[0][:160]
            continue
        rows.append(
            {
                "class": verdict.name,
                "keys": verdict.keys,
                "renamed": verdict.renamed,
                "converted": verdict.converted,
                "equal": verdict.equal,
                "differences": verdict.differences,
                "reason": explain(verdict.name, transformers.__version__),
            }
        )
        print("." if verdict.equal else "x", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return {"release": transformers.__version__, "classes": rows, "not built": skipped}


def python_of(release: str, folder: Path) -> str:
    """The Python of an environment with a release; it is made where there is none."""
    place = folder / f"transformers-{release}"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        for packages in ([TORCH], [f"transformers=={release}", *NEEDS]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
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
        "| transformers | classes | equal | differ | not built |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        count = Counter(row["equal"] for row in result["classes"])
        lines.append(
            f"| {result['release']} | {len(result['classes'])} | {count[True]} | {count[False]} | "
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument(
        "--venvs", type=Path, default=Path(tempfile.gettempdir()) / "regraft-parity"
    )
    options = parser.parse_args()
    results = []
    if not options.releases:
        results.append(measure(options.only))
    for release in filter(None, options.releases.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "result.json"
            command = [python_of(release, options.venvs), __file__, "--only", options.only]
            subprocess.run([*command, "--json", told], check=True)
            results += json.loads(told.read_text())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.out:
        options.out.write_text(show(results))
    rows = [row for result in results for row in result["classes"]]
    odd = [row for row in rows if not row["equal"]]
    for row in odd:
        print(f"{row['class']}: {row['reason'] or 'NOT EXPLAINED'}: {row['differences']}")
    print(f"{len(rows)} classes, {len(rows) - len(odd)} equal")
    return int(any(not row["reason"] for row in odd))


if __name__ == "__main__":
    sys.exit(main())
