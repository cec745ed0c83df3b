"""Plans over several layouts: one plan that moves every element once, to where one after the other would."""

import numpy as np
import pytest
from making import book_of, equation_of, headers_of, same_bits
from numpy.lib.stride_tricks import as_strided

from regraft import BadInputError
from regraft.arrays.apply import apply_plan
from regraft.layouts.graph import Edge, find_routes
from regraft.planning.build import build_plan
from regraft.planning.compose import compose, middle_of, plan_along
from regraft.planning.plan import Headers
from regraft.planning.slices import Slicer
from regraft.values import replace

HEAD = """name = "{0}{1}"
title = "a book for tests"
left = "{0}"
right = "{1}"
model_types = ["test"]
"""
FIRST = (
    equation_of(
        "q.{l} : (h d) i, k.{l} : h e i == qk.{l} : (h d + h e) i where h = 2, d = 3, e = 2"
    )
    + equation_of("x.{l}.{e}.w : o i == x.{l}.w : e o i", "stack")
    + equation_of("n.{l} : a == m.{l} : a", "name")
)
SECOND = (
    equation_of("qk.{l} : (a + b) i == z.{l} : i b, y.{l} : a i where a = 5", "cut")
    + equation_of("x.{l}.w : e (g p) i == v.{l} : i p (e g) where e = 2, p = 2", "turn")
    + equation_of("m.{l} : a == n.{l}.b : a", "name")
)
CARRY = """
[[carry]]
keys = ["qk.{*q}", "x.{l}.w", "m.{*q}"]
why = "it is the same"
"""


def books(second=SECOND):
    return [
        book_of(FIRST, head=HEAD.format("a", "b")),
        book_of(second, head=HEAD.format("b", "c")),
    ]


def tensors():
    rng = np.random.default_rng(0)
    shapes = {"n.0": (3,)}
    for layer in range(2):
        shapes |= {f"q.{layer}": (6, 4), f"k.{layer}": (2, 2, 4)}
        shapes |= {f"x.{layer}.{e}.w": (6, 4) for e in range(2)}
    return {
        name: rng.permutation(np.prod(s)).reshape(s).astype(np.float32)
        for name, s in shapes.items()
    }


def composed(given, route):
    """The plan over both steps of a route, which makes what the steps make one after the other; and that."""
    plan = build_plan(headers_of(given), route.steps[0])
    middle = middle_of(plan)
    after = build_plan(middle.headers, route.steps[1])
    between = apply_plan(plan, list(given.values()))
    order = [middle.headers.name(i) for i in range(len(middle.origins))]
    wanted = apply_plan(after, [between[name] for name in order])
    whole = compose(plan, middle, after)
    made = apply_plan(whole, list(given.values()))
    assert made.keys() == wanted.keys()
    assert all(same_bits(made[name], wanted[name]) for name in wanted)
    return whole, wanted


@pytest.mark.parametrize("second", [SECOND, CARRY])
def test_a_plan_over_three_layouts_moves_every_element_once(second):
    given = tensors()
    (route,) = find_routes(books(second), "a", "c")
    assert str(route) == "a -> b -> c"
    whole, wanted = composed(given, route)
    assert (whole.source_layout, whole.target_layout) == ("a", "c")
    assert sorted(n for g in whole.targets() for n in g.names()) == sorted(wanted)
    assert sum(whole.fired().values()) >= len(whole.entries)


def test_routes_are_the_shortest_and_lose_nothing():
    one, other = books()
    assert find_routes([one, other], "c", "a")[0].layouts == ("c", "b", "a")
    assert find_routes([one], "a", "c") == ()
    direct = book_of(FIRST, head=HEAD.format("a", "c"))
    assert [str(r) for r in find_routes([one, other, direct], "a", "c")] == ["a -> c"]
    drops = book_of(
        SECOND + '\n[[drop]]\nside = "left"\nkeys = ["odd"]\nwhy = "no use"\n',
        head=HEAD.format("b", "c"),
    )
    assert find_routes([one, drops], "a", "c") == ()
    assert len(find_routes([one, drops], "b", "c")) == 1
    assert Edge.to(one, "b").source == "a"


PADS = equation_of(
    "w.{l} : v i == m.{l} : (v + p) i where v = 3, p = 2, fill p = 1.5", "pads"
) + equation_of("n.{l} : a == {l + 3}.n : a", "name")
CUTS = equation_of("w.{l} : (v + p) i == m.{l} : v i where v = 2, p = 1, fill p = 9", "cuts")
REPEATS = equation_of("m.{l} : a == y.{t}.{l} : a where t = 2, copies t", "repeats")
TURNS = equation_of("m.{l} : (a b) c == y.{l} : b c a where b = 2", "turns")
PADS_TOO = equation_of(
    "m.{l} : o i == y.{e}.{l} : (o + p) i where p = 1, o = 4, e = 2, fill p = 0, copies e",
    "pads too",
)
WIDER = equation_of("m.{l} : o i == y.{l} : (p + i) o where p = 1, fill p = 4", "wider")


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (PADS, equation_of("m.{l} : (a + b) c == y.{l} : c (b + a) where a = 4", "cut"), (3, 4)),
        (PADS, WIDER, (3, 4)),
        (PADS, CARRY.replace('"qk.{*q}", "x.{l}.w", "m.{*q}"', '"m.{l}"'), (3, 4)),
        (CUTS, TURNS, (3, 4)),
        (CUTS, WIDER, (3, 4)),
        (equation_of("w.{l} : a b == m.{l} : (a b) where a = 3", "flat"), REPEATS, (3, 4)),
        (equation_of("w.{l} : a b == m.{l} : b a", "turn"), PADS_TOO, (3, 4)),
    ],
)
def test_padding_and_copies_on_the_way(first, second, shape):
    given = {f"w.{n}": np.arange(12, dtype=np.float32).reshape(shape) + 20 * n for n in range(2)}
    if first is CUTS:
        for tensor in given.values():
            tensor[2:] = 9
    books = [
        book_of(first, head=HEAD.format("a", "b")),
        book_of(second, head=HEAD.format("b", "c")),
    ]
    (route,) = find_routes(books, "a", "c")
    whole, wanted = composed(given, route)
    dtypes = ["F32"] * len(given)
    headers = Headers(whole.headers.groups, whole.headers.shapes, dtypes)
    slicer = Slicer.of(replace(whole, headers=headers))
    for name, array in wanted.items():
        fill = np.zeros(array.size, np.float32)
        for strips in slicer.strips(name):
            where = [4 * step for step in strips.target_strides]
            for row, there, here in zip(
                strips.sources, strips.source_at, strips.target_at, strict=True
            ):
                source = None if strips.bits else list(given.values())[row].reshape(-1)[there:]
                value = (
                    np.frombuffer(strips.bits, np.float32)[0]
                    if source is None
                    else as_strided(source, strips.sizes, [4 * s for s in strips.source_strides])
                )
                as_strided(fill[here:], strips.sizes, where)[...] = value
        assert np.array_equal(fill.reshape(array.shape), array)


def test_padding_that_the_first_step_cuts_off_is_checked():
    given = {"w.0": np.arange(12, dtype=np.float32).reshape(3, 4)}
    books = [book_of(CUTS, head=HEAD.format("a", "b")), book_of(TURNS, head=HEAD.format("b", "c"))]
    (route,) = find_routes(books, "a", "c")
    plan = plan_along(headers_of(given), route.steps)
    with pytest.raises(BadInputError, match="not all of it is 9"):
        apply_plan(plan, list(given.values()))
