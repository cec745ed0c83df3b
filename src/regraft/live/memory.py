"""Making a model's tensors from parts of files, in the memory that they are to live in."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from regraft.checkpoints.gather import Bytes, Files, Fill, fill_slices
from regraft.checkpoints.source import Tensors
from regraft.live.devices import fill_device
from regraft.live.pages import (
    Budget,
    Pieces,
    Stitched,
    can_map,
    pieces_of,
    prefetch,
    read_rest,
    stitch,
)
from regraft.planning.slices import Strips

Way = Literal["map", "copy", "off"]

TORCH: Mapping[str, torch.dtype] = {
    name: getattr(torch, own)
    for name, own in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }.items()
    if hasattr(torch, own)
}
"""torch's types for the format's."""
FORMAT = {own: name for name, own in TORCH.items()}
"""The format's types for torch's."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor to make: what it is made of, its shape in this process, and where it is to live."""

    name: str
    """The key in the model's state dict."""
    strips: Sequence[Strips]
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As in the file."""
    device: torch.device
    into: torch.Tensor | None = None
    """Memory to fill in place of new one; contiguous."""

    @property
    def bytes(self) -> int:
        """In bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(slots=True)
class Amounts:
    """How the bytes came into memory."""

    mapped: int = 0
    """Bytes that are pages of the files."""
    copied: int = 0
    """Bytes that were read into memory of this process."""
    to_devices: int = 0
    """Bytes that were read and sent to GPUs."""
    not_mapped: int = 0
    """Bytes that were copied because the system allows no more mappings."""


def make_parts(
    parts: Sequence[Part], tensors: Tensors, files: Files, way: Way, jobs: int | None = None
) -> tuple[dict[str, torch.Tensor], Amounts]:
    """Make tensors, each as its part says; every one is complete, and made of files that did not change.

    Raises ``BadInputError`` where a file changed or ended early.
    """
    amounts = Amounts()
    jobs = jobs or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else jobs or 1
    made: dict[str, torch.Tensor] = {}
    if way == "map":
        made = _map_parts(parts, tensors, files, amounts, jobs)
    fills: list[Fill] = []
    sent: list[tuple[torch.Tensor, Part]] = []
    for part in parts:
        if part.name in made:
            continue
        made[part.name] = tensor = (
            part.into
            if part.into is not None
            else torch.empty(part.shape, dtype=part.dtype, device=part.device)
        )
        if part.device.type == "cpu":
            fills.append(Fill(bytes_of(tensor), part.strips, part.dtype.itemsize))
        else:
            sent.append((tensor, part))
    amounts.copied += fill_slices(fills, tensors, files, jobs)
    for device in dict.fromkeys(part.device for _, part in sent):
        mine = [(t, part.strips) for t, part in sent if part.device == device]
        amounts.to_devices += fill_device(mine, tensors, files, device, jobs)
    files.check()
    return made, amounts


def _map_parts(
    parts: Sequence[Part], tensors: Tensors, files: Files, amounts: Amounts, jobs: int
) -> dict[str, torch.Tensor]:
    """The parts that can be mapped; those with the longest pieces first, for mappings are few."""
    found: list[tuple[Part, Pieces]] = []
    for part in parts:
        if part.into is not None or part.device.type != "cpu":
            continue
        pieces = pieces_of(part.strips, part.dtype.itemsize, tensors.starts, tensors.files)
        if pieces is not None and pieces.size == part.bytes:
            found.append((part, pieces))
    prefetch(files, [pieces for _, pieces in found])
    budget = Budget.now()
    made: dict[str, torch.Tensor] = {}
    rest: list[Stitched] = []
    for part, pieces in sorted(found, key=lambda pair: -pair[1].size / len(pair[1])):
        stitched = stitch(pieces, part.dtype.itemsize, files, budget)
        if stitched is None:
            continue
        made[part.name] = torch.frombuffer(
            stitched.memory,
            dtype=part.dtype,
            count=pieces.size // part.dtype.itemsize,
            offset=stitched.at,
        ).view(part.shape)
        rest.append(stitched)
        amounts.mapped += stitched.mapped
        amounts.copied += stitched.copied
    read_rest(rest, files, jobs)
    amounts.not_mapped = budget.short
    return made


def possible(way: Way) -> Way:
    """The way that is taken here: where files cannot be mapped, they are copied."""
    return "copy" if way == "map" and not can_map() else way


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without the garbage collector, which would look through everything time and again while many names are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """A tensor's memory as numpy's; it must be contiguous and on the CPU."""
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat
