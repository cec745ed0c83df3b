"""Repositories of Hugging Face's hub that are on this machine already: its local cache, and nothing else.

models--ORG--NAME/refs/REVISION        the commit that a branch or tag was at
models--ORG--NAME/snapshots/COMMIT/    links to the files, as far as they were downloaded

Source: ``file_download.py`` and ``constants.py`` of huggingface_hub 2.4. Nothing is asked over the network here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"(?:hf:/{1,2})?([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def parse_id(text: str) -> tuple[str, str] | None:
    """The repository and the revision that a text names; ``None`` where it is no id.

    >>> parse_id("mistralai/Mixtral-8x7B-v0.1"), parse_id("hf://org/name@v1"), parse_id("a/b/c")
    (('mistralai/Mixtral-8x7B-v0.1', 'main'), ('org/name', 'v1'), None)
    """
    match = _ID.fullmatch(text)
    if match is None or any(part.strip(".") == "" for part in match[1].split("/")):
        return None
    return match[1], match[2] or "main"


def how_to_find(path: str) -> str:
    """What to do about a path that leads nowhere: it may be the id of a model of the hub that is not here.

    >>> how_to_find("a/b/c"), how_to_find("org/name")
    ('check the path', "check the path; of a model of the hub: 'hf download org/name' first")
    """
    named = parse_id(path)
    return "check the path" + (
        f"; of a model of the hub: 'hf download {named[0]}' first" if named else ""
    )


def cache_folder() -> Path:
    """Where the hub's files are kept, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def find_cached(text: str) -> Path | None:
    """The folder of a repository's files in the local cache; ``None`` where it is not there."""
    named = parse_id(text)
    if named is None:
        return None
    repository, revision = named
    folder = cache_folder() / ("models--" + repository.replace("/", "--"))
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            reference = folder / "refs" / revision
            if not reference.resolve().is_relative_to((folder / "refs").resolve()):
                return None
            commit = reference.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def is_offline() -> bool:
    """Whether the user said that the network is not to be used."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)
