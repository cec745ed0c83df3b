"""Opening an adapter: its config, its tensors, and the files beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapters.form import Array
from regraft.dialects.peft.config_check import check_fields
from regraft.dialects.peft.provenance import Remembered, read_remembered
from regraft.dialects.unread import find_dialect
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.storage.beside import check_files
from regraft.storage.expressions import start_file
from regraft.storage.folder import load_json
from regraft.storage.safetensors import open_tensors, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHTS_BIN = "adapter_model.bin"
ASIDE = "regraft_kept.safetensors"
"""A file beside the weights: factors that their layout cannot hold, for the way back."""


@dataclass(slots=True)
class Source:
    """An adapter as it is on disk. The tensors are views; nothing has been read yet."""

    name: str
    """The sub-folder it came from, or an empty string."""
    where: str
    config: dict[str, Any]
    tensors: dict[str, Array]
    metadata: dict[str, str] = field(default_factory=dict)
    weights: Path | None = None
    aside: dict[str, Array] = field(default_factory=dict)
    """Factors that regraft kept in a file beside the weights."""

    @property
    def peft_type(self) -> str:
        """``LORA``, ``IA3``, ..."""
        return str(self.config["peft_type"])

    def remembered(self) -> Remembered:
        """What regraft wrote into the metadata when it made this file; empty where it did not."""
        return read_remembered(self.metadata)


@dataclass(frozen=True, slots=True)
class Found:
    """The adapters of a source, by folder, and the files to carry over (relative to ``root``)."""

    root: Path
    folders: tuple[Path, ...]
    weights: Path | None
    """The weights file itself, where that is what was given."""
    others: tuple[Path, ...]


def find_adapters(src: Path) -> Found:
    """What a source path holds: a folder, one weights file, or a folder with adapters in sub-folders.

    Raises ``BadInputError``.
    """
    if src.is_file():
        if src.suffix not in (".safetensors", ".bin"):
            raise BadInputError(
                Finding(
                    "not-an-adapter",
                    "an adapter is a folder, a .safetensors file or an adapter_model.bin",
                    where=str(src),
                    fix="give the folder that PEFT's save_pretrained wrote",
                )
            )
        if not (src.parent / CONFIG).is_file():
            raise BadInputError(
                Finding(
                    "no-config",
                    f"there is no {CONFIG} beside it, and rank and alpha stand there",
                    where=str(src),
                    fix=f"put the {CONFIG} that belongs to it beside it",
                )
            )
        if strange := list(check_files(src.parent, (src, src.parent / CONFIG, src.parent / ASIDE))):
            raise BadInputError(strange)
        return Found(src.parent, (src.parent,), src, ())
    if not src.is_dir():
        raise BadInputError(
            Finding(
                "not-found", "there is no such file or folder", where=str(src), fix="check the path"
            )
        )
    folders = sorted({path.parent for path in src.rglob(CONFIG)})
    if not folders:
        has = any((src / name).exists() for name in (WEIGHTS, WEIGHTS_BIN))
        raise BadInputError(
            Finding(
                "no-config",
                f"there is no {CONFIG} here" + (", and rank and alpha stand there" if has else ""),
                where=str(src),
                fix="give the folder that PEFT's save_pretrained wrote",
            )
        )
    own = {folder / name for folder in folders for name in (CONFIG, WEIGHTS, WEIGHTS_BIN, ASIDE)}
    entries = [
        path
        for path in sorted(src.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and not _is_bookkeeping(path.relative_to(src))
    ]
    if strange := list(check_files(src, entries)):
        raise BadInputError(strange)
    others = tuple(path.relative_to(src) for path in entries if path.is_file() and path not in own)
    return Found(src, tuple(folders), None, others)


def _is_bookkeeping(path: Path) -> bool:
    """Whether a file belongs to git or to a download cache (which keeps the weights themselves in ``blobs``)."""
    return any(part in (".git", ".cache", "blobs", "refs", ".no_exist") for part in path.parts[:-1])


_MOST_DIGITS = 15
"""A number in a key with more digits is no layer's or expert's, and would not fit into 64 bits as a table's entry."""
_NUMBER = re.compile(rf"(?:^|\.)[0-9]{{{_MOST_DIGITS + 1},}}(?=\.|$)", re.MULTILINE)


def _check_names(tensors: Mapping[str, Array], where: str) -> list[Finding]:
    """Names that are not text, or that hold a number which nothing can have."""
    if not tensors:
        return []
    joined = "\n".join(tensors)
    odd = []
    if _NUMBER.search(joined) or not _is_text(joined):
        odd = [name for name in tensors if _NUMBER.search(name) or not _is_text(name)]
    return [
        Finding(
            "odd-key",
            f"this is no name of a tensor: it holds a number of more than {_MOST_DIGITS} digits"
            if _is_text(name)
            else "this is no name of a tensor: it holds half of a surrogate pair, which is not text",
            where=where,
            key=name.encode("utf-8", "backslashreplace").decode()[:300],
            fix="save the adapter again",
        )
        for name in odd
    ]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_adapter(
    folder: Path, root: Path, weights: Path | None = None, *, foreign: bool = False
) -> Source:
    """Open one adapter; everything that is wrong with its two files is reported together.

    ``foreign`` allows another tool's form, which a caller then has to look for itself.

    Raises ``BadInputError``; ``RefusedError`` where it is sound, but in another tool's form.
    """
    start_file(str(folder / CONFIG))
    findings: list[Finding] = []
    config: dict[str, Any] = {}
    try:
        config = load_json(folder / CONFIG)
        findings += check_fields(config, str(folder / CONFIG))
    except RegraftError as error:
        findings += error.findings
    tensors: dict[str, Array] = {}
    aside: dict[str, Array] = {}
    metadata: dict[str, str] = {}
    file = weights
    if file is None:
        file = next((p for p in (folder / WEIGHTS, folder / WEIGHTS_BIN) if p.is_file()), None)
    try:
        if file is None:
            findings.append(
                Finding(
                    "no-weights",
                    f"the weights are missing: there is neither {WEIGHTS} nor {WEIGHTS_BIN}",
                    where=str(folder),
                    fix="copy the weights file here, or save the adapter again",
                )
            )
        elif file.suffix == ".bin":
            from regraft.storage.torch_file import open_torch

            tensors = open_torch(file)
        else:
            header = read_header(file)
            metadata = dict(header.metadata)
            tensors = open_tensors(file, header)
        if file is not None and not tensors:
            findings.append(
                Finding(
                    "empty",
                    "the adapter is empty: its weights file has no tensors",
                    where=str(file),
                    fix="save the adapter again; a sharded (ZeRO, FSDP) state must be gathered first",
                )
            )
        if (folder / ASIDE).is_file():
            aside = open_tensors(folder / ASIDE)
    except RegraftError as error:
        findings += error.findings
    findings += _check_names(tensors, str(file))
    if findings:
        raise BadInputError(findings)
    dialect = None if foreign else find_dialect(config, tensors, folder)
    if dialect is not None:
        raise RefusedError(dialect)
    name = str(folder.relative_to(root))
    return Source("" if name == "." else name, str(folder), config, tensors, metadata, file, aside)
