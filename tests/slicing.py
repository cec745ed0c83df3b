"""Boxes and windows of targets, and what strips make of them by plain numpy."""

import random

import numpy as np
from numpy.lib.stride_tricks import as_strided


def gathered(strips, arrays, shape, dtype, padded=False):
    """A slice made of its strips, each element of which must be written once, or is padding."""
    out = np.zeros(shape, dtype)
    flat, item = out.reshape(-1), out.itemsize
    times = np.zeros(flat.size, np.uint8)
    for strip in strips:
        rows = zip(strip.sources, strip.source_at, strip.target_at, strict=True)
        for source, there, here in rows:
            read = np.ascontiguousarray(arrays[source]).reshape(-1)[there:]
            to = [stride * item for stride in strip.target_strides]
            of = [stride * item for stride in strip.source_strides]
            as_strided(flat[here:], strip.sizes, to)[...] = as_strided(read, strip.sizes, of)
            as_strided(times[here:], strip.sizes, strip.target_strides)[...] += 1
    assert (times == 1).all() or (padded and (times <= 1).all()), "not every element, once"
    return out


def sharded(shape, coordinates, worlds, dims):
    """The box of a rank, as torch's DTensor cuts: one dim after another, ``ceil(size / world)`` for each."""
    box = [(0, size) for size in shape]
    for rank, world, dim in zip(coordinates, worlds, dims, strict=True):
        low, high = box[dim]
        part = -(-(high - low) // world)
        box[dim] = min(low + rank * part, high), min(low + (rank + 1) * part, high)
    return tuple(box)


def meshes(shape):
    """Every rank's box on meshes of one dim and of two: uneven, with empty shards, one dim cut twice."""
    for dim in range(len(shape)):
        for world in (2, 3, 4, 7):
            yield [sharded(shape, (rank,), (world,), (dim,)) for rank in range(world)]
    for dims in ((0, len(shape) - 1), (0, 0)) if len(shape) > 1 else ():
        yield [sharded(shape, (a, b), (2, 3), dims) for a in range(2) for b in range(3)]


def boxes(shape, seed, count=6):
    """The whole, every rank's part, and boxes at random."""
    yield tuple((0, size) for size in shape)
    for ranks in meshes(shape):
        yield from ranks
    rng = random.Random(seed)
    for _ in range(count):
        yield tuple(tuple(sorted((rng.randint(0, n), rng.randint(0, n)))) for n in shape)


def cut(array, box):
    return array[tuple(slice(low, high) for low, high in box)]
