"""SkyRL-tx: recognised, and refused, because what it writes of experts cannot be what it trained.

Its writer leaves the prefix and ``.weight`` out of the experts' keys and cuts their factors along the in axis instead
of the rank.

Source: skyrl 0.3.0, ``skyrl/tx/utils/models.py`` (``save_safetensors``, ``get_expert_key``, ``get_adapter_slice``).
"""

from __future__ import annotations

import re
from pathlib import Path

from regraft.adapters.protocol import Opened
from regraft.dialects.base import Capabilities, Evidence, Found
from regraft.dialects.tool_files import ReadOnly, find_weights, look_at
from regraft.errors import Finding, RefusedError

_EXPERT = re.compile(r"model\.layers\.\d+\..*\.experts\.\d+\.\w+\.lora_[AB]")
_ARCHIVES = (".tar.gz", ".tgz")


class Skyrl(ReadOnly):
    """SkyRL's JAX trainer."""

    name = "skyrl"
    title = "SkyRL-tx (recognised, and refused)"
    layout = "transformers-v4"
    capabilities = Capabilities()
    unwritten = ("SkyRL-tx", "its own reader cuts them", "convert it to transformers-v5")

    def sniff(self, src: Path) -> Evidence | None:
        """Experts' keys without an end, or its archive."""
        if src.is_file() and src.name.endswith(_ARCHIVES):
            return (
                Evidence(certain=True, why="it is an archive of an adapter")
                if _holds_adapter(src)
                else None
            )
        look = look_at(src)
        if look is None:
            return None
        key = next(filter(_EXPERT.fullmatch, look.shapes), None)
        return None if key is None else Evidence(certain=True, why=f"it has {key}")

    def find(self, src: Path) -> Found:
        """What there is to refuse."""
        if src.is_file() and src.name.endswith(_ARCHIVES):
            return Found(src.parent, (src.parent,), src)
        return find_weights(src)

    def open(self, folder: Path, root: Path, weights: Path | None) -> Opened:
        """Refuse it. Raises ``RefusedError``."""
        if weights is not None and weights.name.endswith(_ARCHIVES):
            raise RefusedError(
                Finding(
                    "dialect",
                    "this is an archive, as SkyRL-tx writes it",
                    where=str(weights),
                    fix="unpack it and convert the folder; an adapter of experts is refused then",
                )
            )
        raise RefusedError(
            Finding(
                "dialect",
                "SkyRL-tx wrote it: the experts' factors are cut along the wrong axis as they are saved, so what was "
                "trained is not in the file",
                where=str(folder),
                fix="save it with SkyRL's torch trainer, which writes PEFT's files",
            )
        )


def _holds_adapter(file: Path) -> bool:
    """Whether one of the first members of an archive is an adapter's weights."""
    import tarfile

    try:
        with tarfile.open(file) as archive:
            for number, member in enumerate(archive):
                if Path(member.name).name == "adapter_model.safetensors":
                    return True
                if number > 20:
                    return False
    except (OSError, tarfile.TarError, EOFError):
        return False
    return False


SKYRL = Skyrl()
