"""Ranks: no component more than needed, none lost."""

import numpy as np
from making import headers_of, plan_of, rule_book, same_bits

from regraft.adapters.components import Record
from regraft.adapters.form import Factors, delta
from regraft.adapters.move import images
from regraft.adapters.scale import Scale
from regraft.planning.blocks import landings_of

RANDOM = np.random.default_rng(3)


def convert(text, shapes, a, b, scales=None, to="new", **kinds):
    kinds = kinds or {"left_kind": "linear", "right_kind": "linear"}
    keys = list(a)
    plan = plan_of(rule_book(text, **kinds), {k: shapes[k] for k in keys}, to, partial=True)
    scales = scales or {k: Scale(a[k].shape[-2], 2 * a[k].shape[-2]) for k in keys}
    headers = headers_of({k: shapes[k] for k in keys})
    factors = Factors(
        headers, [a[k] for k in keys], [b[k] for k in keys], [scales[k] for k in keys]
    )
    return {
        key: lora
        for landed in landings_of(plan)
        for image in images(landed, factors, factors.headers.names(), Record())
        for key, lora in zip(image.keys.names(), image.loras, strict=True)
        if lora is not None
    }


FUSE = "q : a i, k : b i, v : c i == qkv : (a + b + c) i where a = 3, b = 2, c = 4"
SHAPES = {"q": (3, 5), "k": (2, 5), "v": (4, 5), "qkv": (9, 5)}


def random(*shape):
    return RANDOM.standard_normal(shape)


def test_chunk_then_fuse_returns_to_the_rank_it_had():
    a, b = {"qkv": random(2, 5)}, {"qkv": random(9, 2)}
    parts = convert(FUSE, SHAPES, a, b, to="old")
    assert {k: x.scale.rank for k, x in parts.items()} == {"q": 2, "k": 2, "v": 2}
    whole = convert(
        FUSE, SHAPES, {k: x.a for k, x in parts.items()}, {k: x.b for k, x in parts.items()}
    )
    assert same_bits(whole["qkv"].a, a["qkv"])
    assert same_bits(whole["qkv"].b, b["qkv"])
    assert whole["qkv"].scale == Scale(2, 4)


def test_fuse_then_chunk_returns_to_each_parts_own_rank():
    ranks = {"q": 1, "k": 3, "v": 2}
    a = {k: random(r, 5) for k, r in ranks.items()}
    b = {k: random(SHAPES[k][0], r) for k, r in ranks.items()}
    whole = convert(FUSE, SHAPES, a, b)["qkv"]
    assert whole.scale == Scale(6, 12)
    parts = convert(FUSE, SHAPES, {"qkv": whole.a}, {"qkv": whole.b}, to="old")
    for key, rank in ranks.items():
        assert parts[key].scale == Scale(rank, 2 * rank)
        assert same_bits(parts[key].a, a[key])
        assert same_bits(parts[key].b, b[key])


def test_parts_with_one_a_share_it():
    shared = random(2, 5)
    b = {k: random(SHAPES[k][0], 2) for k in "qkv"}
    whole = convert(FUSE, SHAPES, dict.fromkeys("qkv", shared), b)["qkv"]
    assert same_bits(whole.a, shared)
    assert (whole.b == np.concatenate([b[k] for k in "qkv"])).all()


def test_partly_shared_rows_give_their_union():
    one, other = random(3, 5), random(3, 5)
    other[2] = one[0]
    b = {"q": random(3, 3), "v": random(4, 3)}
    whole = convert(FUSE, SHAPES, {"q": one, "v": other}, b)["qkv"]
    assert whole.scale.rank == 5
    product = np.zeros((9, 5))
    product[:3], product[5:] = b["q"] @ one, b["v"] @ other
    np.testing.assert_allclose(delta(whole), 2 * product)


def test_pieces_of_the_in_axis_with_one_b_share_it():
    text = "x : o a, y : o b == z : o (a + b) where a = 2, b = 3"
    shapes = {"x": (4, 2), "y": (4, 3), "z": (4, 5)}
    shared = random(4, 2)
    a = {"x": random(2, 2), "y": random(2, 3)}
    whole = convert(text, shapes, a, dict.fromkeys("xy", shared))["z"]
    assert whole.scale.rank == 2
    assert same_bits(whole.b, shared)
    assert (whole.a == np.concatenate([a["x"], a["y"]], axis=1)).all()


def test_equal_rows_of_one_tensor_are_not_merged_into_one():
    a = np.ones((2, 5))
    whole = convert(FUSE, SHAPES, {"q": a}, {"q": random(3, 2)})["qkv"]
    assert whole.scale.rank == 2


def test_a_part_that_a_split_leaves_without_effect_is_not_adapted():
    b = np.zeros((9, 2))
    b[:3] = 1
    parts = convert(FUSE, SHAPES, {"qkv": random(2, 5)}, {"qkv": b}, to="old")
    assert list(parts) == ["q"]


def test_components_that_a_split_leaves_without_effect_are_dropped():
    b = np.zeros((9, 3))
    b[:3, 0], b[3:5, 2] = 1, 1
    a = random(3, 5)
    parts = convert(FUSE, SHAPES, {"qkv": a}, {"qkv": b}, to="old")
    assert {k: x.scale.rank for k, x in parts.items()} == {"q": 1, "k": 1}
    assert (parts["k"].a == a[2:]).all()


def test_a_tensor_that_stays_whole_keeps_components_without_effect():
    a, b = random(3, 5), np.zeros((4, 3))
    lora = convert("x : o i == y : o i", {"x": (4, 5)}, {"x": a}, {"x": b})["y"]
    assert same_bits(lora.a, a)
    assert same_bits(lora.b, b)


def test_one_rank_for_all_experts_is_the_largest_with_zeros_for_the_rest():
    text = "x.{e} : o i == y : e o i where e = 3"
    ranks = {"x.0": 1, "x.2": 4}
    a, b = {k: random(r, 5) for k, r in ranks.items()}, {k: random(2, r) for k, r in ranks.items()}
    lora = convert(
        text, dict.fromkeys(ranks, (2, 5)), a, b, left_kind="linear", right_kind="experts"
    )["y"]
    assert lora.a.shape == (3, 4, 5)
    assert lora.b.shape == (3, 2, 4)
    assert lora.scale == Scale(4, 8)
    assert not delta(lora)[1].any()
    for number in (0, 2):
        np.testing.assert_allclose(delta(lora)[number], 2 * b[f"x.{number}"] @ a[f"x.{number}"])


def test_only_the_parts_of_the_rarer_scale_are_rescaled():
    a = {"q": random(1, 5), "v": random(3, 5)}
    b = {"q": random(3, 1), "v": random(4, 3)}
    scales = {"q": Scale(1, 3), "v": Scale(3, 6)}
    whole = convert(FUSE, SHAPES, a, b, scales)["qkv"]
    assert whole.scale == Scale(4, 8)
    assert not whole.exact
    assert same_bits(whole.b[5:, 1:], b["v"])
    np.testing.assert_allclose(whole.b[:3, :1], b["q"] * 1.5)


def test_sixteen_bit_factors_keep_their_dtype_where_the_ratio_is_a_power_of_two():
    a = {"q": random(1, 5).astype(np.float16), "v": random(3, 5).astype(np.float16)}
    b = {"q": random(3, 1).astype(np.float16), "v": random(4, 3).astype(np.float16)}
    for alpha, dtype, exact in ((4, np.float16, True), (3, np.float32, False)):
        whole = convert(FUSE, SHAPES, a, b, {"q": Scale(1, alpha), "v": Scale(3, 6)})["qkv"]
        assert whole.a.dtype == np.float16
        assert whole.b.dtype == dtype
        assert whole.exact is exact
        np.testing.assert_allclose(whole.b[:3, :1], b["q"].astype(float) * (alpha / 2), rtol=1e-6)
