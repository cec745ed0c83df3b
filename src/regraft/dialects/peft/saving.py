"""Writing an adapter's files."""

from __future__ import annotations

import json
from pathlib import Path

from regraft.adapters.convert import Converted
from regraft.dialects.peft.source import ASIDE, CONFIG, WEIGHTS, Source
from regraft.storage.folder import copy_file
from regraft.storage.safetensors import write_tensors


def save_adapter(folder: Path, source: Source | None, result: Converted) -> None:
    """Write what a conversion of ``source`` gave; what needed none is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    if result.report.copied and source is not None and source.weights is not None:
        copy_file(source.weights, folder / source.weights.name)
        copy_file(Path(source.where) / CONFIG, folder / CONFIG)
        if source.aside:
            copy_file(Path(source.where) / ASIDE, folder / ASIDE)
        return
    write_tensors(folder / WEIGHTS, result.tensors, result.metadata)
    if result.aside:
        write_tensors(folder / ASIDE, result.aside, {"format": "pt"})
    # Fields are sorted as PEFT sorts them, but not what is in them: the first pattern that fits is the one that counts.
    text = json.dumps(dict(sorted(result.config.items())), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
