"""For the documentation's site: the page that inspects files in the browser stands in it, below inspect/."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SITE = Path(__file__).parents[1] / "site"


def on_post_build(config: Any) -> None:
    """Copy the page beside what mkdocs made."""
    shutil.copytree(SITE, Path(config["site_dir"]) / "inspect", dirs_exist_ok=True)
