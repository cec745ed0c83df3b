"""Plans that are carried out in slices give what they give as a whole."""

import numpy as np
import pytest
from generated import equations
from hypothesis import given, settings
from hypothesis import strategies as st
from making import plan_of, rule_book

from regraft.arrays.apply import apply_plan
from regraft.arrays.pieces import VECTORS, carry_pieces, cut, same_pieces, take_part, vectors


def put_together(pieces):
    """Whole tensors from their slices; every entry must come once."""
    made, seen = {}, {}
    for piece in pieces:
        assert not piece.sampled
        takes = [
            np.arange(n) if take is None else take
            for n, take in zip(
                piece.shape, [*piece.takes, *[None] * len(piece.shape)], strict=False
            )
        ]
        where = np.ix_(*takes)
        made.setdefault(piece.key, np.zeros(piece.shape))[where] = piece.values
        seen.setdefault(piece.key, np.zeros(piece.shape, int))[where] += 1
    assert all((count == 1).all() for count in seen.values())
    return made


def sliced(plan, arrays, **options):
    def make(number, takes):
        return take_part(arrays[number], takes)

    return carry_pieces(
        plan, make, lambda number: arrays[number].shape, lambda number: "any", **options
    )


@settings(max_examples=40)
@given(equations(), st.sampled_from([1, 2, 5, 20]), st.booleans())
def test_random_equations_in_slices_are_the_same(made, held, reverse):
    shapes = {
        key: term.shape(made.sizes)
        for term in made.sides(reverse)[0]
        for key in term.keys(made.sizes)
    }
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape) for shape in shapes.values()]
    plan = plan_of(
        rule_book(made.text), dict(zip(shapes, arrays, strict=True)), "old" if reverse else "new"
    )
    want = apply_plan(plan, arrays)
    got = put_together(sliced(plan, arrays, held=held))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[key], want[key]) for key in want)


EXPERTS = "m.{e}.g.weight : a i\nm.{e}.u.weight : b i\n== m.x : e (a + b) i where a = 3, b = 3"


@pytest.mark.parametrize("reverse", [False, True])
def test_no_slice_holds_more_than_it_may_and_experts_come_one_after_the_other(reverse):
    random = np.random.default_rng(0)
    tensors = {f"m.{e}.{x}.weight": random.standard_normal((3, 40)) for e in range(4) for x in "gu"}
    plan = plan_of(rule_book(EXPERTS), tensors)
    if reverse:
        tensors = apply_plan(plan, list(tensors.values()))
        plan = plan_of(rule_book(EXPERTS), tensors, "old")
    pieces = list(sliced(plan, list(tensors.values()), held=6 * 40))
    assert {piece.values.size for piece in pieces} == ({120} if reverse else {240})
    assert len(pieces) == (8 if reverse else 4)


@pytest.mark.parametrize("reverse", [False, True])
def test_random_vectors_stand_for_an_axis(reverse):
    random = np.random.default_rng(0)
    tensors = {f"m.{e}.{x}.weight": random.standard_normal((3, 40)) for e in range(4) for x in "gu"}
    plan = plan_of(rule_book(EXPERTS), tensors)
    if reverse:
        tensors = apply_plan(plan, list(tensors.values()))
        plan = plan_of(rule_book(EXPERTS), tensors, "old")
    want = apply_plan(plan, list(tensors.values()))
    pieces = list(sliced(plan, list(tensors.values()), ask=lambda keys: "vectors"))
    assert {piece.key for piece in pieces} == want.keys()
    for piece in pieces:
        assert piece.sampled
        assert piece.values.shape[-1] == VECTORS
        assert np.allclose(piece.values, want[piece.key] @ vectors(40).T)


def test_what_stays_is_cut_along_its_first_dim():
    array = np.arange(60.0).reshape(5, 12)
    pieces = list(
        same_pieces(
            {"x": 0},
            lambda _, takes: take_part(array, takes),
            lambda _: (5, 12),
            lambda _: "any",
            held=24,
        )
    )
    assert [len(piece.values) for piece in pieces] == [2, 2, 1]
    assert np.array_equal(put_together(pieces)["x"], array)


def test_random_vectors_need_a_dim_that_is_longer():
    (take,) = cut((4, VECTORS), sampled=True)
    assert take[1] is None
    assert next(iter(cut((4, 99), sampled=True)))[1].shape == (VECTORS, 99)
