"""What is known of a conversion before a byte is moved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field, structs

import regraft
from regraft.checkpoints.moves import Moves, Runs, Strided
from regraft.checkpoints.sharding import Layout
from regraft.checkpoints.source import Source
from regraft.checkpoints.units import UNIT
from regraft.planning.identify import Detected
from regraft.planning.plan import Plan
from regraft.report import CheckpointReport
from regraft.storage.job import LocalJob
from regraft.storage.stand_ins import named

if TYPE_CHECKING:
    import hashlib


class Prepared(Struct, frozen=True, eq=False):
    """A conversion that is ready to be carried out."""

    source: Source
    known: Detected
    plan: Plan | None
    """``None`` where the checkpoint is in the layout already."""
    moves: Moves
    dtypes: list[str]
    """Those to write, target by target."""
    layout: Layout
    config: bytes | None
    report: CheckpointReport
    note: str | None = None
    """For the metadata of the result."""
    written: Mapping[str, bytes] = field(default_factory=dict)
    """Files beside the weights that are made: where they go in the result's folder, and what is in them."""
    copied: Mapping[str, Path] = field(default_factory=dict)
    """Files beside the weights that are copied from elsewhere."""
    demanding: bool = False
    """Whether something is demanded of tensors that are read, so that they are looked at before anything is written."""

    def result(self) -> str:
        """A digest of everything that decides what the result is, beside the source's bytes: the same anywhere."""
        import hashlib  # loads OpenSSL, which a dry run has no need of

        beside = {key: hashlib.sha256(text).hexdigest() for key, text in self.written.items()}
        beside |= {key: path.name for key, path in self.copied.items()}
        others = sorted(path.as_posix() for path in self.source.others)
        files = [(file.name, file.size) for file in self.layout.files]
        rest = [regraft.__version__, sorted(beside.items()), others, files]
        digest = self._digest()
        for text in (json.dumps(rest).encode(), self.config, self.layout.index):
            digest.update(hashlib.sha256(text or b"").digest())
        return digest.hexdigest()

    def _digest(self) -> hashlib._Hash:
        """Of what moves where, and of the headers."""
        import hashlib

        digest = hashlib.sha256()
        parts: list[Runs | Strided] = [*self.moves.runs, *self.moves.strided]
        for part in parts:
            for column in structs.astuple(part):
                digest.update(
                    column.tobytes() if hasattr(column, "tobytes") else repr(column).encode()
                )
        for file in self.layout.files:
            digest.update(file.head)
        return digest

    def job(self, options: Mapping[str, str]) -> LocalJob:
        """The work on this machine; ``options`` are words for what was asked for."""
        digest = self._digest()
        digest.update(json.dumps([UNIT, [(f.name, f.size) for f in self.layout.files]]).encode())
        files = {
            named(str(f.path.resolve())): (f.stamp.size, f.stamp.modified or f.stamp.version)
            for f in self.source.files
        }
        return LocalJob(regraft.__version__, files, dict(options), digest.hexdigest())
