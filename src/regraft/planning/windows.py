"""Which elements of which sources a window of a target is made of: the elements [start, stop), row major.

A window is a pure function of the plan: nothing between its elements is read back, so it may be made twice, by two
machines at once or after the result is complete, and is the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from regraft.planning.slices import Slicer, Strips, cut_range, merge_loops


def window(slicer: Slicer, name: str, start: int, stop: int) -> list[Strips]:
    """What fills the elements from ``start`` up to ``stop`` of a target; offsets count from ``start``."""
    return cut_strips(slicer.strips(name), start, stop)


def cut_strips(strips: Sequence[Strips], start: int, stop: int) -> list[Strips]:
    """The part of some strips that falls into a window of what they fill; offsets count from ``start`` there.

    >>> whole = Strips((3, 4), (1, 3), (4, 1), *(np.zeros(1, np.int64) for _ in range(3)))
    >>> [(part.sizes, part.target_at.tolist()) for part in cut_strips([whole], 4, 10)]
    [((4,), [0]), ((2,), [4])]
    """
    return [part for one in strips for part in _cut(one, start, stop)]


def _cut(strips: Strips, start: int, stop: int) -> Iterator[Strips]:
    sizes, sources, targets = strips.sizes, strips.source_strides, strips.target_strides
    reach = sum((size - 1) * step for size, step in zip(sizes, targets, strict=True))
    first, last = strips.target_at, strips.target_at + reach
    inside = (first >= start) & (last < stop)
    if inside.any():
        yield strips.take(np.flatnonzero(inside)).moved(-start)
    digits = list(zip(sizes, targets, strict=True))
    for row in np.flatnonzero(~inside & (last >= start) & (first < stop)).tolist():
        one = strips.take(np.array([row], dtype=np.int64))
        for ranges in cut_range(digits, int(first[row]), start, stop):
            loops = [
                (high - low, source, target)
                for (low, high), source, target in zip(ranges, sources, targets, strict=True)
            ]
            there, here = (
                sum(low * step for (low, _), step in zip(ranges, strides, strict=True))
                for strides in (sources, targets)
            )
            yield Strips(
                *merge_loops(loops),
                one.sources,
                one.source_at + there,
                one.target_at + here - start,
                one.bits,
            )
