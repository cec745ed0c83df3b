"""Pictures for the documentation: the page in a browser, and a session in a terminal."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import find_browser, launch_arguments

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests/golden/cases"
WIDTH = 96

SESSION = (
    ("inspect", "my-lora"),
    ("convert", "my-lora", "out", "--to", "transformers-v5", "--html", "report.html"),
    ("convert", "dora", "no", "--to", "transformers-v5"),
)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder with two adapters and a checkpoint under short names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for short, case in (("my-lora", "mixtral__patterns_projection"), ("dora", "mixtral__dora")):
            shutil.copytree(CASES / case, folder / short)
            (folder / short / "reference.safetensors").unlink(missing_ok=True)
        shutil.copytree(ROOT / "tests/golden/bases/mixtral", folder / "mixtral")
        yield folder


def run(folder: Path, *args: str, width: int | None = None) -> str:
    """What a command prints; on a terminal of some width, with colours."""
    wide = "" if width is None else f"import regraft.cli.output as o; o._UNBOUNDED = {width};"
    colors = {} if width is None else {"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", f"{wide}from regraft.cli import main; exit(main({list(args)!r}))"],
        cwd=folder,
        env={**os.environ, **colors},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    return done.stdout + done.stderr


def record_terminal(folder: Path) -> str:
    """A session as SVG."""
    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for command in SESSION:
        console.print(Text.assemble(("$ ", "bold green"), ("regraft " + " ".join(command), "bold")))
        console.print(Text.from_ansi(run(folder, *command, width=WIDTH)))
    svg = console.export_svg(title="regraft", theme=DIMMED_MONOKAI, unique_id="session")
    # The fonts would come from the network.
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def photograph(folder: Path, images: Path) -> None:
    """The page, light, dark and narrow."""
    from playwright.sync_api import sync_playwright

    convert = ("--to", "transformers-v5", "--dry-run", "--html")
    run(folder, "convert", "mixtral", "out2", *convert, "checkpoint.html")
    run(folder, "convert", "my-lora", "out2", *convert, "adapter.html")
    run(folder, "convert", "dora", "out2", *convert, "refused.html")
    shots = (
        ("report-light.png", "checkpoint", 1100, 840, "light", "gate_up_proj"),
        ("report-dark.png", "adapter", 1100, 880, "dark", "gate_up_proj"),
        ("report-refused.png", "refused", 1100, 760, "light", None),
        ("report-narrow.png", "adapter", 390, 780, "light", None),
    )
    program = find_browser()
    if program is None:
        raise SystemExit("there is no browser to make pictures with")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=launch_arguments())
        for name, page, width, height, scheme, chosen in shots:
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto((folder / f"{page}.html").as_uri())
            if chosen is not None:
                tab.locator("#right-tree .path", has_text=chosen).first.click()
            tab.screenshot(path=images / name)
            tab.close()
        browser.close()
