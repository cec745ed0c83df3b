"""Runs the notebooks of docs/notebooks, cell by cell, and keeps what they show.

    python scripts/notebook.py          run them, and write their outputs into them
    python scripts/notebook.py --check  fail where they show something else

Each runs in an empty folder, without Jupyter: what a cell prints, and the value of its last expression in plain words
and as HTML, is all that these notebooks show.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "docs/notebooks"


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with the outputs of its cells; the current folder is where it works."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, number = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            outputs = list(shown_by("".join(cell["source"]), names, f"{name}[{number}]", number))
            cell = {**cell, "execution_count": number, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def shown_by(
    source: str, names: dict[str, Any], where: str, number: int
) -> Iterator[dict[str, Any]]:
    """What a cell shows."""
    body = ast.parse(source, where).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())}
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = lines(value._repr_html_())
        yield {
            "output_type": "execute_result",
            "execution_count": number,
            "data": data,
            "metadata": {},
        }


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def written(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def made_anew(path: Path) -> str:
    """A notebook's text after it has run in an empty folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return written(run(json.loads(path.read_text(encoding="utf-8")), path.name))
        finally:
            os.chdir(before)


def plain(text: str) -> dict[str, Any]:
    """A notebook without its HTML, of which widths and colours are no promise."""
    notebook: dict[str, Any] = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("text/html", None)
    return notebook


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        made = made_anew(path)
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif plain(made) != plain(path.read_text(encoding="utf-8")):
            sys.exit(f"{path} shows something else now; run scripts/notebook.py")
