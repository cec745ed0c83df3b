"""PEFT as a dialect: the files of ``save_pretrained``, as PEFT 0.18 and since 0.19 packs experts."""

from __future__ import annotations

from pathlib import Path

from regraft.adapters.convert import Converted
from regraft.adapters.detect import Known
from regraft.adapters.protocol import Opened
from regraft.dialects.base import Capabilities, Evidence, Found
from regraft.dialects.peft.family_config import fresh_config
from regraft.dialects.peft.packing import PACKINGS
from regraft.dialects.peft.saving import save_adapter
from regraft.dialects.peft.source import CONFIG, Source, find_adapters, open_adapter
from regraft.dialects.peft.writer import PeftWriter
from regraft.layouts.names import Layout


def writer_for(kind: type[PeftWriter], opened: Opened, known: Known, to: Layout) -> PeftWriter:
    """A writer of PEFT's files, or of something like them; an adapter of another dialect gets a new config."""
    if isinstance(opened, Source):
        return kind(opened, known, to)
    hints = opened.hints()
    config = fresh_config(hints.base, hints.task, opened.kind, opened.config)
    return kind(Source(opened.name, opened.where, config, {}), known, to, fresh=True)


class PeftFiles:
    """What all dialects have in common whose adapters are PEFT's two files."""

    def find(self, src: Path) -> Found:
        """A folder, one weights file, or a folder with adapters in subfolders."""
        return find_adapters(src)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write config and weights; what needed no conversion is copied."""
        save_adapter(folder, opened if isinstance(opened, Source) else None, result)


class Peft(PeftFiles):
    """Hugging Face PEFT."""

    name = "peft"
    title = (
        "PEFT: adapter_config.json and adapter_model.safetensors, as save_pretrained writes them"
    )
    versions = PACKINGS
    capabilities = Capabilities()

    def sniff(self, src: Path) -> Evidence | None:
        """A folder or a weights file with an ``adapter_config.json``."""
        folder = src if src.is_dir() else src.parent
        if (folder / CONFIG).is_file():
            return Evidence(certain=False, why=f"there is a {CONFIG}")
        return None

    def open(self, folder: Path, root: Path, weights: Path | None) -> Source:
        """One adapter."""
        return open_adapter(folder, root, weights)

    def open_by_tensor(self, folder: Path, root: Path, weights: Path | None) -> Source:
        """The same, with each tensor read when it is asked for, and not kept."""
        return open_adapter(folder, root, weights, by_tensor=True)

    def writer(self, opened: Opened, known: Known, to: Layout) -> PeftWriter:
        """What writes a PEFT adapter; one of another dialect gets a new config."""
        return writer_for(PeftWriter, opened, known, to)

    def in_memory(self, result: Converted) -> Source:
        """A result as it would be opened."""
        return Source(
            "", "the result", result.config, result.tensors, result.metadata, aside=result.aside
        )


PEFT = Peft()
