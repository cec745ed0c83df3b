"""Strided blocks between files, against numpy, with buffers far too small."""

import os
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.arrays.transpose import copy_strided
from regraft.checkpoints.tiles import Block, Mover, has_gaps, measure_side, tile_of
from regraft.checkpoints.units import split_block

MARGIN = 7


@st.composite
def nests(draw):
    """Sizes, strides and lengths of a nest whose two sides may have gaps between their loops."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    sides = []
    for _ in range(2):
        order = draw(st.permutations(range(len(sizes))))
        strides, step = [0] * len(sizes), draw(st.sampled_from([1, 1, 1, 2, 3]))
        for loop in order:
            strides[loop] = step
            step *= sizes[loop] * draw(st.sampled_from([1, 1, 1, 2]))
        sides.append((tuple(strides), step + 1))
    return tuple(sizes), *sides


def expected(sizes, source, source_strides, target, target_strides):
    for at in product(*map(range, sizes)):
        to = sum(i * s for i, s in zip(at, target_strides, strict=True))
        target[to] = source[sum(i * s for i, s in zip(at, source_strides, strict=True))]
    return target


@given(nests(), st.sampled_from([1, 2, 4]), st.integers(24, 400), st.booleans())
def test_blocks_move_as_numpy_says(nest, item, budget, cut):
    sizes, (source_strides, source_length), (target_strides, target_length) = nest
    dtype = np.dtype(f"u{item}")
    source = np.random.default_rng(0).integers(0, 200, source_length).astype(dtype)
    target = np.full(target_length, 255, dtype)
    files = [os.memfd_create(name) for name in ("source", "target")]
    try:
        os.pwrite(files[0], source.tobytes(), MARGIN)
        os.pwrite(files[1], target.tobytes(), MARGIN)
        block = Block(sizes, source_strides, target_strides, MARGIN, MARGIN, dtype, dtype)
        mover = Mover(budget * item)
        for part in split_block(block, 64) if cut and not block.has_gaps else [block]:
            mover.move(part, *files)
        found = np.frombuffer(os.pread(files[1], target.nbytes + 1, MARGIN), dtype)
    finally:
        for file in files:
            os.close(file)
    assert len(found) == len(target)
    assert np.array_equal(found, expected(sizes, source, source_strides, target, target_strides))


def test_a_tile_stays_in_its_budget_and_is_long_both_ways():
    tile = tile_of((4096, 4096), (4096, 1), (1, 4096), 1 << 20)
    assert tile == (1024, 1024)
    assert tile_of(
        (32, 2, 64, 4096), (2 << 18, 4096, 8192, 1), (2 << 18, 1 << 18, 4096, 1), 1 << 20
    )
    assert tile_of((3,), (1,), (1,), 1) == (1,)


def test_sides():
    assert measure_side((4, 8), (8, 1)).segments == (0,)
    assert measure_side((4, 8), (100, 1)).span == 8
    assert measure_side((4, 8), (16, 2), gaps=True).gaps
    assert has_gaps((1000, 1000), (2000, 2), 4)
    assert not has_gaps((1000, 1000), (1, 1000), 4)


def test_a_source_that_ends_early(tmp_path):
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("a", "b")]
    os.pwrite(files[0], bytes(100), 0)
    word = np.dtype(np.uint8)
    with pytest.raises(EOFError):
        Mover(1000).move(Block((10, 20), (20, 1), (1, 10), 0, 0, word, word), *files)
    for file in files:
        os.close(file)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float64])
@pytest.mark.parametrize("shape", [(70, 90, 110), (2, 700, 1100)])
def test_copy_strided(order, dtype, shape):
    source = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    target = np.zeros([source.shape[i] for i in order], dtype)
    copy_strided(target, source.transpose(order))
    assert np.array_equal(target, source.transpose(order))
