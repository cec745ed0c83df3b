"""What regraft writes into a result's metadata, so that the way back gives the same bits and the same config.

It is a hint, and read as one: an entry that cannot be what regraft wrote counts as no entry, and whatever it says is
checked against the tensors and the config that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from regraft.adapters.components import Noted, Record, read_record
from regraft.adapters.form import Array
from regraft.adapters.scale import Number

KEY = "regraft"
"""The metadata key."""
FORMAT = 1


class Origin(msgspec.Struct):
    """Where a file came from: its layout, and how experts were packed there."""

    layout: str = ""
    packing: str | None = None


class KeptModule(msgspec.Struct):
    """A LoRA that is kept aside: its scale, and digests of the tensors that stand in its place."""

    rank: int
    alpha: Number
    rslora: bool
    saved: dict[str, str]


class Asked(msgspec.Struct, omit_defaults=True):
    """What was asked for when an adapter was made of another: the packing of experts, and options."""

    packing: str | None = None
    via: str | None = None
    compact: bool = False
    uniform: bool = False


class KeptTable(msgspec.Struct, omit_defaults=True):
    """What is kept aside by module, and digests of tensors that were filled in from the base.

    ``whole`` is a digest of all tensors of the result, where all of the source's are kept aside, and ``asked`` tells
    how the one was made of the other, so that it can be made again and compared; ``changed`` is the same digest, where
    only those are kept that the result alone does not give back bit for bit.
    """

    modules: dict[str, KeptModule] = {}
    filled: dict[str, str] = {}
    whole: str = ""
    asked: Asked = msgspec.field(default_factory=Asked)
    changed: str = ""


class Remembered(msgspec.Struct, kw_only=True):
    """One entry."""

    format: int = 0
    layout: str = ""
    """The layout the file was written in."""
    source: Origin = msgspec.field(default_factory=Origin)
    config: dict[str, tuple[Any, Any]] = {}
    """Config fields that changed: what they were and what they became."""
    had: list[str] = []
    """Those of them that were there before."""
    parts: dict[str, list[Noted]] = {}
    """By target: source key (``{}`` where a whole stack is meant), batch (or stack size), rank, alpha, places."""
    kept: KeptTable = msgspec.field(default_factory=KeptTable)
    names: list[str] = []
    """Names of base tensors as they were spelled, one of each kind."""
    dropped: list[str] = []
    """Names of tensors of the source that were left out, as the user asked."""
    set_aside: list[str] = []
    """Names of tensors that stayed as they were, as the user asked."""

    def record(self, *, rslora: bool) -> Record:
        """The parts by the key that they came from."""
        return read_record(self.parts, rslora=rslora)

    def config_before(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The config as it was before; ``None`` where a field was changed since."""
        if any(config.get(name) != became for name, (_, became) in self.config.items()):
            return None
        before = dict(config)
        for name, (was, _) in self.config.items():
            if name in self.had:
                before[name] = was
            else:
                before.pop(name, None)
        return before


def read_remembered(metadata: Mapping[str, str]) -> Remembered:
    """The entry of a file's metadata; an empty one where there is none."""
    try:
        found = msgspec.json.decode(metadata.get(KEY, "{}"), type=Remembered)
    except (msgspec.DecodeError, RecursionError):
        return Remembered()
    return found if found.format == FORMAT else Remembered()


def write_remembered(
    layout: str,
    origin: Origin,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    record: Record,
    kept: KeptTable,
    names: Sequence[str] = (),
    dropped: Sequence[str] = (),
    set_aside: Sequence[str] = (),
) -> str:
    """The entry for a file that was written from another."""
    changed = {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) or (name in before) != (name in after)
    }
    entry = Remembered(
        format=FORMAT,
        layout=layout,
        source=origin,
        config=changed,
        had=[name for name in changed if name in before],
        parts=record.to_json(),
        kept=kept,
        names=list(names),
        dropped=list(dropped),
        set_aside=list(set_aside),
    )
    return msgspec.json.encode(entry).decode()


def digest(array: Array) -> str:
    """A digest of an array's bytes."""
    import hashlib  # loads OpenSSL

    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def digest_all(tensors: Mapping[str, Array]) -> str:
    """A digest of all tensors with their names, dtypes and shapes."""
    import hashlib

    whole = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        whole.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:32]
