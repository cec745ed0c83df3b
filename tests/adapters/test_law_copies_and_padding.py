"""The law for convolutions, copies and padding: convert(W + dW) == convert(W) + delta(convert(adapter))."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import book_of, equation_of, headers_of, plan_of

from regraft import RefusedError
from regraft.adapters.components import Record
from regraft.adapters.form import Factors
from regraft.adapters.move import images
from regraft.adapters.scale import Scale
from regraft.arrays.apply import apply_plan
from regraft.planning.blocks import landings_of

ONE = Scale(1, 1, False)


def small(seed, *shape):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)


def low(seed, shape, rank):
    """Factors as PEFT stores them on a weight of a shape: of a convolution with its kernel in A."""
    a = small(seed, rank, *shape[1:])
    return a, small(seed + 1, shape[0], rank, *(1 for _ in shape[2:]))


def dense(a, b, shape):
    return (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(shape)


def converted(book, weights, factors, to="new", config=None):
    """The adapter in the other layout."""
    own = {k: weights[k] for k in factors}
    part = plan_of(book, own, to, config=config, partial=True)
    given_ = Factors(
        headers_of(own),
        [a for a, _ in factors.values()],
        [b for _, b in factors.values()],
        [ONE] * len(own),
    )
    return {
        key: lora
        for landed in landings_of(part)
        for image in images(landed, given_, given_.headers.names(), Record())
        for key, lora in zip(image.keys.names(), image.loras, strict=True)
        if lora is not None
    }


def check(book, weights, factors, to="new", config=None):
    """Both ways around the square are equal."""
    plan = plan_of(book, weights, to, config=config)
    merged = [
        weights[k] + (dense(*factors[k], weights[k].shape) if k in factors else 0) for k in weights
    ]
    want, base = apply_plan(plan, merged), apply_plan(plan, list(weights.values()))
    made = converted(book, weights, factors, to, config)
    for key, array in want.items():
        change = dense(made[key].a, made[key].b, array.shape) if key in made else 0
        assert np.array_equal(array, base[key] + change), key
    return made


def conv_book(text, left="conv", right="conv"):
    return book_of(equation_of(text, left_kind=left, right_kind=right))


@given(st.integers(1, 3), st.sampled_from([(3, 2, 2), (4, 3, 1, 2), (2, 2, 2, 1, 3)]))
def test_a_renamed_or_split_convolution(rank, shape):
    weights = {"a.weight": small(1, 2 * shape[0], *shape[1:])}
    factors = {"a.weight": low(2, (2 * shape[0], *shape[1:]), rank)}
    made = check(conv_book("a.weight : o i ... == b.weight : o i ..."), weights, factors)
    assert made["b.weight"].a.shape == (rank, *shape[1:])
    assert made["b.weight"].b.shape == (2 * shape[0], rank, *(1 for _ in shape[2:]))
    split = "a.weight : (p + q) i ... == b.weight : p i ..., c.weight : q i ... where p = q"
    check(conv_book(split), weights, factors)


@given(st.integers(1, 3), st.booleans())
def test_a_convolution_of_one_position_is_a_linear(rank, back):
    book = conv_book("a.weight : o i 1 1 == b.weight : o i", right="linear")
    shape, key, to = ((3, 4), "b.weight", "old") if back else ((3, 4, 1, 1), "a.weight", "new")
    made = check(book, {key: small(1, *shape)}, {key: low(2, shape, rank)}, to)
    (lora,) = made.values()
    assert lora.a.ndim == (4 if back else 2)


def test_a_flattened_convolution():
    book = conv_book(
        "a.weight : o c h w == b.weight : o (c h w) where h = 2, w = 3", right="linear"
    )
    check(book, {"a.weight": small(1, 3, 2, 2, 3)}, {"a.weight": low(2, (3, 2, 2, 3), 2)})
    check(book, {"b.weight": small(1, 3, 12)}, {"b.weight": low(2, (3, 12), 2)}, "old")


@pytest.mark.parametrize("dims", ["(t o) i", "(o t) i", "o (t i)", "o (i t)"])
def test_copies_in_a_matrix(dims):
    text = f"a.weight : o i == b.weight : {dims} where t = 3, copies t"
    book = conv_book(text, "linear", "linear")
    base = small(1, 2, 4)
    check(book, {"a.weight": base}, {"a.weight": low(2, (2, 4), 2)})
    many = apply_plan(plan_of(book, {"a.weight": base}), [base])["b.weight"]
    a, b = low(2, (2, 4), 2)
    where = dims.split()[0].strip("(")
    if dims.startswith("("):
        b = np.tile(b, (3, 1)) if where == "t" else np.repeat(b, 3, axis=0)
    else:
        a = np.tile(a, (1, 3)) if dims == "o (t i)" else np.repeat(a, 3, axis=1)
    check(book, {"b.weight": many}, {"b.weight": (a, b)}, "old")
    b = b.copy()
    b[-1] += 1
    a = a.copy()
    a[:, -1] += 1
    with pytest.raises(RefusedError, match="does not add the same to each"):
        converted(book, {"b.weight": many}, {"b.weight": (a, b)}, "old")


def test_copies_in_keys():
    book = conv_book(
        "a.weight : o i == r{t}.weight : o i where t = 2, copies t", "linear", "linear"
    )
    base, factors = small(1, 2, 4), low(2, (2, 4), 2)
    assert set(check(book, {"a.weight": base}, {"a.weight": factors})) == {"r0.weight", "r1.weight"}
    both = {"r0.weight": base, "r1.weight": base}
    check(book, both, dict.fromkeys(both, factors), "old")
    with pytest.raises(RefusedError, match="does not add the same to each"):
        converted(book, both, {"r0.weight": factors}, "old")


def test_padding():
    text = "a.weight : v i == b.weight : (v + p) i where v = 3, p = 2, fill p = 0"
    book = conv_book(text, "linear", "linear")
    base, (a, b) = small(1, 3, 4), low(2, (3, 4), 2)
    check(book, {"a.weight": base}, {"a.weight": (a, b)})
    padded = np.concatenate([base, np.zeros((2, 4))])
    wide = np.concatenate([b, np.zeros((2, 2))])
    (lora,) = converted(book, {"b.weight": padded}, {"b.weight": (a, wide)}, "old").values()
    assert np.array_equal(lora.b @ lora.a, b @ a)
    wide[-1] = 1
    with pytest.raises(RefusedError, match="adds to padding"):
        converted(book, {"b.weight": padded}, {"b.weight": (a, wide)}, "old")
