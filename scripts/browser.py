"""Finds a Chromium for the tests of the HTML page and for the screenshots; installs one if there is none.

    python scripts/browser.py       says where it is; without one, tries to get it

It is looked for among what Playwright installed and on the PATH, or named by REGRAFT_BROWSER. To get one, Playwright
downloads its own; where that cannot be reached, apt-get installs Debian's, which takes root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")


def find_browser() -> str | None:
    """The program to start, ``None`` where there is none."""
    told = os.environ.get("REGRAFT_BROWSER")
    if told:
        return told
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    shells = own.parents[2].glob("chromium_headless_shell-*/*/*headless*shell*")
    for path in (own, *shells):
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return next(filter(None, map(shutil.which, NAMES)), None)


def launch_arguments() -> list[str]:
    """Chromium's sandbox does not work for root."""
    return ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []


def get_browser() -> str | None:
    """Find a browser, or install one; ``None`` where that fails."""
    commands = [[sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]]
    if shutil.which("apt-get") and hasattr(os, "getuid") and os.getuid() == 0:
        commands.append(["apt-get", "update", "-qq"])
        commands.append(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
    for command in commands:
        found = find_browser()
        if found is not None:
            return found
        print("==>", *command, flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=False, env=environment, stdout=quiet, stderr=quiet)
    return find_browser()


if __name__ == "__main__":
    browser = get_browser()
    print(f"browser: {browser or 'none; the tests that need one are skipped'}")
    sys.exit(browser is None)
