"""What a rank runs through: a family that declares its roles follows whatever is done to its weights."""

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.adapters.families.base import IN, OUT, RANK, NoImageError, Part
from regraft.adapters.families.low_rank import LowRank, laid_out, mirrored
from regraft.adapters.families.table import all_families, families_in, family_of


class Made(LowRank):
    """A made-up family: ``B C A`` with a C between, and factors that a few skills have each."""

    types = ("MADE",)
    title = "made up"
    one_rank = True
    roles: ClassVar = {"down": (None, IN, RANK), "mid": (RANK, RANK), "up": (None, RANK, OUT)}

    def delta(self, part, weight):
        return (part["down"] @ part["mid"] @ part["up"]).sum(axis=0).T


class Scaled(LowRank):
    """A made-up family with an alpha for every module."""

    roles: ClassVar = {"A": (RANK, IN), "B": (OUT, RANK)}
    fields: ClassVar = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    alpha = "alpha"
    scaled = ("B",)

    def delta(self, part, weight):
        return part["B"] @ part["A"] * self.scale(part).value


MADE, SCALED = Made({"r": 3}, {}), Scaled({}, {})


def made_part(random, out, into, rank):
    shapes = {"down": (2, into, rank), "mid": (rank, rank), "up": (2, rank, out)}
    return Part({role: random.standard_normal(shape) for role, shape in shapes.items()}, out, into)


def scaled_part(random, out, into, rank):
    tensors = {"A": random.standard_normal((rank, into)), "B": random.standard_normal((out, rank))}
    return Part(tensors, out, into, {"r": rank, "alpha": int(random.integers(1, 5))})


KINDS = [(MADE, made_part), (SCALED, scaled_part)]
SIZE = st.integers(1, 5)
FAMILY = st.sampled_from(KINDS)


def same(family, part, want):
    assert (part.out, part.into) == want.shape
    np.testing.assert_allclose(family.delta(part, None), want, atol=1e-9)


@given(FAMILY, SIZE, SIZE, SIZE, st.integers(0, 99))
def test_rows_columns_and_the_transpose(kind, out, into, rank, seed):
    family, make = kind
    random = np.random.default_rng(seed)
    part = make(random, out, into, rank)
    delta = family.delta(part, None)
    rows = random.permutation(out)[: random.integers(1, out + 1)]
    columns = random.permutation(into)[: random.integers(1, into + 1)]
    same(family, family.take(part, rows, columns), delta[rows][:, columns])
    turned = family.turn(part)
    same(family, turned, delta.T)
    for role, tensor in family.turn(turned).tensors.items():
        assert (tensor == part[role]).all()


@given(FAMILY, st.lists(st.tuples(SIZE, SIZE, st.booleans()), min_size=1, max_size=4), SIZE)
def test_weights_that_are_joined(kind, told, other):
    family, make = kind
    told = [(size, rank, there or n == 0) for n, (size, rank, there) in enumerate(told)]
    random = np.random.default_rng(len(told))
    sizes = [size for size, _, _ in told]
    for along, join, stack in (
        (OUT, family.join_out, np.concatenate),
        (IN, family.join_in, partial(np.concatenate, axis=1)),
    ):
        shapes = [(size, other) if along == OUT else (other, size) for size in sizes]
        parts = [
            make(random, *shape, rank) if there else None
            for shape, (_, rank, there) in zip(shapes, told, strict=True)
        ]
        deltas = [
            np.zeros(shape) if part is None else family.delta(part, None)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        joint = join(parts, sizes)
        same(family, joint, stack(deltas))
        assert family.rank_of(joint) == sum(rank for _, rank, there in told if there)


@given(SIZE, SIZE, st.lists(SIZE, min_size=1, max_size=3))
def test_modules_come_to_one_rank(out, into, ranks):
    random = np.random.default_rng(0)
    parts = {str(n): made_part(random, out, into, rank) for n, rank in enumerate(ranks)}
    settled, changes = MADE.settle(parts)
    assert changes == {"r": max(ranks)}
    for key, part in settled.items():
        assert MADE.rank_of(part) == max(ranks)
        same(MADE, part, MADE.delta(parts[key], None))
    assert SCALED.settle({}) == ({}, {})


def test_a_role_that_has_no_partner_is_named():
    class Lone(LowRank):
        roles: ClassVar = {"A": (RANK, IN), "B": (OUT, RANK), "norm": (IN,)}

    tensors = {"A": np.ones((2, 3)), "B": np.ones((4, 2)), "norm": np.ones(3)}
    part = Part(tensors, 4, 3)
    with pytest.raises(NoImageError, match="stands on in would have to stand on out"):
        Lone({}, {}).turn(part)
    with pytest.raises(NoImageError, match="share one norm"):
        Lone({}, {}).join_out([part, part], [4, 4])
    with pytest.raises(NoImageError, match="what more stands on"):
        Lone({}, {}).take(Part({**tensors, "more": np.ones(3)}, 4, 3), np.array([0]), None)


def test_what_is_not_adapted_holds_what_changes_nothing():
    laid = laid_out([None, np.float32([2, 3])], (OUT,), OUT, [1, 2], fill=1.0)
    assert laid.tolist() == [1, 2, 3]
    assert laid.dtype == np.float32
    assert mirrored(Made.roles) == {"down": "up", "up": "down", "mid": "mid"}


# -- finding families


def test_a_family_is_found_by_its_file():
    assert family_of({"peft_type": "VERA"}).__module__.endswith("families.vera")
    assert family_of({"peft_type": "LORA", "use_dora": True}).__module__.endswith("lora.dora")
    assert family_of({"peft_type": "LORA"}) is None
    assert [f.title for f in all_families() if f.types == ("POLY",)] == ["Poly", "Poly of one task"]


@pytest.mark.parametrize(
    "name", ["base", "table", "low_rank", "no such", "lora.dora", "../vera", ""]
)
def test_what_is_no_family_is_none(name):
    assert family_of({"peft_type": name.upper()}) is None
    assert family_of({"peft_type": None}) is None
    assert not families_in(name)


def test_several_variants_at_once_follow_names_only():
    mixed = family_of({"peft_type": "LORA", "use_dora": True, "lora_bias": True})
    assert mixed.title == "several variants of LoRA at once"
    assert {mixed.cell(op).rung for op in ("join out", "stack", "transpose")} == {"none"}
    assert mixed not in all_families()
