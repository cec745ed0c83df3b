"""The part of a tensor that this process holds: torch's DTensor placements as ranges of indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.planning.slices import Region, shape_of_region

Ranges = tuple[tuple[int, int], ...]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_region(tensor: Any, name: str) -> Region:
    """The ranges of a DTensor that this rank holds, for shards of one mesh dim after another.

    ``Shard`` cuts what is left of a dim as ``torch.chunk`` does; ``_StridedShard`` takes a part of each of several
    groups, which is how a dim is cut that other ranks had cut before. Source: ``placement_types.py`` of torch 2.13.

    Raises ``BadInputError`` for a placement that is none of these.
    """
    mesh = tensor.device_mesh
    region: list[Ranges] = [((0, size),) for size in tensor.shape]
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        along = getattr(placement, "dim", None)
        if along is None:
            raise _unknown(tensor, name)
        groups = int(getattr(placement, "split_factor", 1))
        rank, world = mesh.get_local_rank(dim), mesh.size(dim)
        along %= len(region)
        region[along] = cut_ranges(region[along], rank, world, groups)
    found = tuple(region)
    local = tuple(tensor.to_local().shape)
    if shape_of_region(found) != local and 0 not in local:
        raise _unknown(tensor, name)
    return found


def cut_ranges(ranges: Ranges, rank: int, world: int, groups: int = 1) -> Ranges:
    """One rank's part of some ranges: of each group that they are split into, one of ``world`` parts.

    >>> cut_ranges(((0, 7),), 1, 2), cut_ranges(((0, 8),), 1, 2, groups=2)
    (((4, 7),), ((2, 4), (6, 8)))
    """
    total = sum(high - low for low, high in ranges)
    group = -(-total // groups)
    part = -(-group // world)
    found: list[tuple[int, int]] = []
    for first in range(0, max(total, 1), max(group, 1)):
        last = min(first + group, total)
        low = min(first + rank * part, last)
        found += _within(ranges, low, min(low + part, last))
    return tuple(found) or ((0, 0),)


def _within(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The positions ``start`` to ``stop`` of some ranges that stand side by side."""
    found, at = [], 0
    for low, high in ranges:
        first, last = max(start - at, 0), min(stop - at, high - low)
        if first < last:
            found.append((low + first, low + last))
        at += high - low
    return found


def _unknown(tensor: Any, name: str) -> BadInputError:
    message = (
        f"it is spread in a way that is not known: {tensor.placements} over {tensor.device_mesh}"
    )
    fix = "spread it with Shard and Replicate, in parts that divide where two mesh dims cut one dim"
    return BadInputError(Finding("placement", message, key=name, fix=fix))
