"""Finding an adapter's files where PEFT would: in a folder, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from regraft.bridges.peft.known import open_one
from regraft.dialects.peft.source import ASIDE, CONFIG, WEIGHTS, WEIGHTS_BIN, Source, open_adapter

_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


def find_source(model_id: str | os.PathLike[str], options: dict[str, Any]) -> Source:
    """The adapter of a local path or a name on the Hub; ``options`` are those that PEFT takes.

    Raises ``BadInputError``, and what ``huggingface_hub`` raises.
    """
    subfolder = options.get("subfolder") or ""
    local = Path(model_id) / subfolder
    if local.exists():
        return open_one(local)
    folder = _download(str(model_id), subfolder, options)
    return open_adapter(folder, folder)


def _download(name: str, subfolder: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    given = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    if options.get("use_auth_token") and "token" not in given:
        given["token"] = options["use_auth_token"]

    def get(file: str) -> Path:
        return Path(hf_hub_download(name, file, subfolder=subfolder or None, **given))

    folder = get(CONFIG).parent
    try:
        get(WEIGHTS)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        get(WEIGHTS_BIN)
    try:
        get(ASIDE)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return folder  # only adapters that regraft wrote may have it
    return folder
