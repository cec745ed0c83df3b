"""Makes the generated part of docs/: drawings, pages of JSON and errors, a terminal session, pictures of the report.

python scripts/make_docs.py [--no-pictures]
"""

from __future__ import annotations

import sys
from pathlib import Path

from drawings import DRAWINGS
from errors_page import PAGE, errors_page
from json_page import json_page
from make_site import TABLES, tables
from notebook import NOTEBOOKS, made_anew

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    (DOCS / "json.md").write_text(json_page(), encoding="utf-8")
    PAGE.write_text(errors_page(), encoding="utf-8")
    TABLES.write_text(tables(), encoding="utf-8")
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        notebook.write_text(made_anew(notebook), encoding="utf-8")
    for name, draw in DRAWINGS.items():
        (images / name).write_text(draw(), encoding="utf-8")
    if "--no-pictures" not in sys.argv:
        from pictures import photograph, record_terminal, work_folder

        with work_folder() as folder:
            (images / "terminal.svg").write_text(record_terminal(folder), encoding="utf-8")
            photograph(folder, images)


if __name__ == "__main__":
    main()
