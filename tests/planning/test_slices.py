"""Slices of targets: what a plan says of a part is that part of what it says of the whole."""

from itertools import product

import numpy as np
import pytest
from generated import equations
from hypothesis import given
from hypothesis import strategies as st
from making import plan_of, rule_book, same_bits
from slicing import boxes, cut, gathered, meshes

from regraft.arrays.apply import apply_plan
from regraft.planning.slices import Slicer, cut_range, region_of, shape_of_region
from regraft.planning.windows import window

QKV = "q.{l} : (g n d) i, k.{l} : (g k d) i, v.{l} : (g v d) i"
EQUATIONS = {
    "flatten": ("a.{l} : o c h w == b.{l} : o (c h w) where c = 3, h = 2, w = 4", {"a.0": (5, 3, 2, 4)}),
    "unflatten": ("a.{l} : o (c h w) == b.{l} : o c h w where c = 3, h = 2, w = 4", {"a.0": (5, 24)}),
    "transpose": ("a.{l} : e i o == b.{l} : e o i", {"a.0": (3, 4, 5)}),
    "half swap": ("a.{l} : (h d two) i == b.{l} : (h two d) i where two = 2, h = 3", {"a.0": (24, 5)}),
    "grouped out": (
        f"a.{{l}} : (g (n + k + v) d) i == {QKV} where g = 2, k = 1, v = 1, d = 4",
        {"a.0": (32, 5)},
    ),
    "grouped in": (
        f"{QKV} == a.{{l}} : (g (n + k + v) d) i where g = 2, k = 1, v = 1, d = 4",
        {"q.0": (16, 5), "k.0": (8, 5), "v.0": (8, 5)},
    ),
    "stacked, transposed": (
        "a.{l}.{e}.w1 : a i, a.{l}.{e}.w3 : b i == b.{l} : e i (a + b) where a = b",
        {f"a.0.{e}.w{k}": (6, 5) for e in range(4) for k in (1, 3)},
    ),
    "stacked, interleaved": (
        "a.{l}.{e} : two a i == b.{l} : e (a two) i where two = 2",
        {f"a.0.{e}": (2, 3, 5) for e in range(3)},
    ),
    "unstacked": ("a.{l} : e (a + b) i == b.{l}.{e}.w1 : a i, b.{l}.{e}.w3 : b i where a = b", {"a.0": (3, 8, 5)}),
    "split below an open shape": (
        "a.{l} : (q + k + v) ... == q.{l} : q ..., k.{l} : k ..., v.{l} : v ... where q = k, k = v",
        {"a.0": (12, 2, 3)},
    ),
    "joined below an open shape": (
        "q.{l} : q ..., k.{l} : k ... == a.{l} : (q + k) ... where q = 3, k = 2",
        {"q.0": (3, 4, 2, 3), "k.0": (2, 4, 2, 3)},
    ),
    "written to all": ("a.{l} : v i == b.{l}.{t} : v i where t = 3, copies t", {"a.0": (4, 5)}),
    "written to all, in one": ("a.{l} : (h d) i == b.{l} : (h t d) i where h = 2, t = 3, copies t", {"a.0": (8, 5)}),
    "read from the first": (
        "b.{l}.{t} : v i == a.{l} : v i where t = 3, copies t",
        {f"b.0.{t}": (4, 5) for t in range(3)}),
    "padded": ("a.{l} : v i == b.{l} : (v + p) i where v = 5, p = 3, fill p = 0", {"a.0": (5, 4)}),
    "padding cut off": ("b.{l} : (v + p) i == a.{l} : v i where v = 5, p = 3, fill p = 0", {"b.0": (8, 4)}),
    "an open shape that is none": (
        "q.{l} : q ..., k.{l} : k ... == a.{l} : (q + k) ... where q = 3, k = 2",
        {"q.0": (3,), "k.0": (2,)},
    ),
}  # fmt: skip


def filled(shapes, dtype=np.uint16):
    """Arrays of shapes whose elements all differ, in the dtype's range; copies are equal, and padding is zero."""
    if "b.0.0" in shapes and "b.0.2" in shapes and len({*shapes.values()}) == 1:
        one = filled({"b.0.0": shapes["b.0.0"]}, dtype)["b.0.0"]
        return dict.fromkeys(shapes, one)
    if "b.0" in shapes:
        array = np.zeros(shapes["b.0"], dtype)
        array[:5] = filled({"a": (5, *shapes["b.0"][1:])}, dtype)["a"]
        return {"b.0": array}
    at = 0
    arrays = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(at, at + size).reshape(shape).astype(dtype)
        at += size
    return arrays


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_slice_is_that_of_the_whole(name):
    text, shapes = EQUATIONS[name]
    tensors = filled(shapes)
    plan = plan_of(rule_book(text), tensors)
    arrays, slicer = list(tensors.values()), Slicer.of(plan)
    whole = apply_plan(plan, arrays)
    assert slicer.made.keys() == whole.keys()
    for key, target in whole.items():
        assert slicer.shape(key) == target.shape
        for box in boxes(target.shape, name):
            want = cut(target, box)
            assert same_bits(
                gathered(
                    slicer.strips(key, region_of(box)),
                    arrays,
                    want.shape,
                    target.dtype,
                    name == "padded",
                ),
                want,
            )


@given(equations(), st.booleans(), st.integers(0, 1 << 30))
def test_slices_and_windows_of_random_equations(made, reverse, seed):
    read, _ = made.sides(reverse)
    tensors = made.filled(read)
    plan = plan_of(rule_book(made.text), tensors, to="old" if reverse else "new")
    arrays, slicer = list(tensors.values()), Slicer.of(plan)
    rng = np.random.default_rng(seed)
    for key, target in made.moved(tensors, reverse).items():
        for _ in range(3):
            box = tuple(tuple(sorted(rng.integers(0, n + 1, 2).tolist())) for n in target.shape)
            want = cut(target, box)
            assert np.array_equal(
                gathered(slicer.strips(key, region_of(box)), arrays, want.shape, want.dtype), want
            )
            start, stop = sorted(rng.integers(0, target.size + 1, 2).tolist())
            found = gathered(window(slicer, key, start, stop), arrays, stop - start, target.dtype)
            assert np.array_equal(found, target.reshape(-1)[start:stop])


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_region_is_its_ranges_side_by_side(name):
    text, shapes = EQUATIONS[name]
    tensors = filled(shapes)
    plan = plan_of(rule_book(text), tensors)
    arrays, slicer = list(tensors.values()), Slicer.of(plan)
    for key, target in apply_plan(plan, arrays).items():
        region = tuple(((0, n // 3), (n // 2, n), (1, 1)) for n in target.shape)
        indices = [[i for low, high in ranges for i in range(low, high)] for ranges in region]
        want = target[np.ix_(*indices)]
        assert want.shape == shape_of_region(region)
        assert same_bits(
            gathered(slicer.strips(key, region), arrays, want.shape, want.dtype, name == "padded"),
            want,
        )


@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 5), (1, 8)])
def test_each_element_is_in_one_ranks_slice(shape):
    for ranks in meshes(shape):
        times = np.zeros(shape, int)
        for box in ranks:
            cut(times, box)[...] += 1
        assert (times == 1).all()


def test_a_rank_with_nothing_reads_nothing():
    text, shapes = EQUATIONS["transpose"]
    slicer = Slicer.of(plan_of(rule_book(text), filled(shapes)))
    assert slicer.strips("b.0", region_of(((3, 3), (0, 5), (0, 4)))) == []


def test_layers_share_what_was_worked_out():
    shapes = {f"a.{layer}.{e}": (2, 3, 5) for layer in range(4) for e in range(3)}
    text, _ = EQUATIONS["stacked, interleaved"]
    slicer = Slicer.of(plan_of(rule_book(text), filled(shapes)))
    box = region_of(((1, 3), (2, 5), (0, 5)))
    first, other = (slicer.strips(f"b.{layer}", box) for layer in (0, 3))
    assert first[0].source_at is other[0].source_at
    assert first[0].sources.tolist() != other[0].sources.tolist()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=4),
    st.integers(0, 50),
    st.integers(-5, 400),
    st.integers(0, 300),
)
def test_a_range_of_digits_is_their_numbers(shape, base, low, length):
    digits, step = [], 1
    for size, wider in reversed(shape):
        digits.insert(0, (size, step))
        step *= max(size, 1) * wider
    found = []
    for ranges in cut_range(digits, base, low, low + length):
        for point in product(*(range(*span) for span in ranges)):
            found.append(base + sum(v * step for v, (_, step) in zip(point, digits, strict=True)))
    numbers = [base]
    for size, step in digits:
        numbers = [n + v * step for n in numbers for v in range(size)]
    assert sorted(found) == [n for n in sorted(numbers) if low <= n < low + length]
