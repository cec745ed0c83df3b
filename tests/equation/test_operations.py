"""Every operation of the public zoo against plain numpy, there and back."""

import ml_dtypes
import numpy as np
import pytest
from generated import equations
from hypothesis import given, settings
from making import plan_of, rule_book, same_bits

from regraft.arrays.anonymous import rearrange
from regraft.arrays.apply import apply_plan

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape) * 7 + 3


def dense(x):
    return np.array(x, order="C")


def both_ways(text, before, after, **sizes):
    """The equation takes ``before`` to ``after``, and back."""
    there = rearrange(text, *before, **sizes)
    back = rearrange(text, *after, reverse=True, **sizes)
    for got, want in ((there, after), (back, before)):
        assert len(got) == len(want)
        for x, y in zip(got, want, strict=True):
            assert same_bits(x, dense(y))


def planned_both_ways(text, before, after, config=None):
    """The same for tensors with keys, by a plan, with numpy and with torch."""
    book = rule_book(text)
    for to, source, want in (("new", before, after), ("old", after, before)):
        plan = plan_of(book, source, to, config)
        got = apply_plan(plan, list(source.values()))
        assert got.keys() == want.keys()
        for key, array in want.items():
            assert same_bits(got[key], dense(array)), key
        if torch is not None:
            tensors = [torch.from_numpy(dense(x)) for x in source.values()]
            for key, tensor in apply_plan(plan, tensors).items():
                assert torch.equal(tensor, torch.from_numpy(dense(want[key]))), key
        shapes = {
            name: entry.shape(term)
            for entry in plan.entries
            for term in entry.written
            for name in entry.keys(term).names()
        }
        assert shapes == {key: array.shape for key, array in want.items()}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("parts", [(3, 3), (1, 4), (2, 1, 3), (0, 3)], ids=str)
def test_concatenate_and_chunk_along_any_axis(axis, parts):
    letters = "abc"[: len(parts)]
    x = np.moveaxis(numbered(sum(parts), 4, 5), 0, axis)
    pieces = np.split(x, np.cumsum(parts)[:-1], axis)
    dims = ["i", "j"]

    def term(middle):
        return " ".join([*dims[:axis], middle, *dims[axis:]])

    text = f"{', '.join(map(term, letters))} == {term('(' + ' + '.join(letters) + ')')}"
    both_ways(text, pieces, [x], **dict(zip(letters, parts, strict=True)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equal_chunks_need_no_sizes(axis):
    x = np.moveaxis(numbered(6, 4, 5), 0, axis)
    dims = ["i", "j"]
    one, whole = (" ".join([*dims[:axis], m, *dims[axis:]]) for m in ("{}", "(a + b + c)"))
    text = f"{whole} == {', '.join(one.format(n) for n in 'abc')} where a = b, b = c"
    for got, want in zip(rearrange(text, x), np.split(x, 3, axis), strict=True):
        assert same_bits(got, dense(want))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stack_and_unstack_over_key_indices(axis):
    parts = [numbered(3, 4) + 1000 * e for e in range(12)]
    dims = ["o", "i"]
    dims.insert(axis, "e")
    planned_both_ways(
        f"x.{{l}}.{{e}}.w : o i == y.{{l}}.w : {' '.join(dims)}",
        {f"x.{5 * (n // 6)}.{n % 6}.w": part for n, part in enumerate(parts)},
        {f"y.{5 * k}.w": np.stack(parts[6 * k : 6 * k + 6], axis) for k in range(2)},
    )


def test_keys_may_come_in_any_order():
    parts = {f"x.{e}": numbered(2) + 10 * e for e in (10, 3, 0, 11, 2, 1, 9, 8, 7, 6, 5, 4)}
    (stacked,) = apply_plan(
        plan_of(rule_book("x.{e} : o == y : e o"), parts), list(parts.values())
    ).values()
    assert (stacked == np.stack([parts[f"x.{e}"] for e in range(12)])).all()


def test_transpose_of_matrices_and_of_stacks():
    x = numbered(3, 4)
    both_ways("o i == i o", [x], [x.T])
    x = numbered(5, 3, 4)
    both_ways("e o i == e i o", [x], [x.transpose(0, 2, 1)])
    both_ways("e o i == i o e", [x], [x.T])


def test_rope_permute_and_back():
    heads, half, width = 3, 4, 5
    x = numbered(heads * 2 * half, width)
    permuted = x.reshape(heads, half, 2, width).transpose(0, 2, 1, 3).reshape(-1, width)
    both_ways("(h d two) i == (h two d) i where two = 2", [x], [permuted], h=heads)


def test_interleave_and_back():
    gate, up = numbered(6, 4), numbered(6, 4) + 1000
    mixed = np.empty((12, 4), np.int64)
    mixed[0::2], mixed[1::2] = gate, up
    both_ways("(two f) i == (f two) i where two = 2", [np.concatenate([gate, up])], [mixed])
    both_ways("(f u) i, (f v) i == (f (u + v)) i where u = 1, v = 1", [gate, up], [mixed])


def test_conv3d_flatten_and_back():
    x = numbered(6, 3, 2, 4, 5)
    both_ways("o c t h w == o (c t h w)", [x], [x.reshape(6, -1)], c=3, t=2, h=4, w=5)


def test_megatrons_fused_qkv_with_grouped_heads():
    groups, queries, dim, width = 2, 3, 4, 5
    q = numbered(groups * queries * dim, width)
    k, v = numbered(groups * dim, width) + 1000, numbered(groups * dim, width) + 2000
    fused = np.concatenate(
        [
            np.concatenate(
                [
                    q.reshape(groups, queries * dim, width)[g],
                    k.reshape(groups, dim, width)[g],
                    v.reshape(groups, dim, width)[g],
                ]
            )
            for g in range(groups)
        ]
    )
    text = "(g (n + k + v) d) i == (g n d) i, (g k d) i, (g v d) i where k = 1, v = 1"
    both_ways(text, [fused], [q, k, v], g=groups, d=dim)


def test_gate_and_up_stacked_and_fused():
    gate = [numbered(3, 4) + 100 * e for e in range(4)]
    up = [numbered(3, 4) + 100 * e + 50 for e in range(4)]
    planned_both_ways(
        "m.{l}.e.{e}.w1 : a i, m.{l}.e.{e}.w3 : b i == m.{l}.e.gate_up : e (a + b) i where a = b",
        {f"m.7.e.{e}.{n}": x[e] for e in range(4) for n, x in (("w1", gate), ("w3", up))},
        {"m.7.e.gate_up": np.stack([np.concatenate(pair) for pair in zip(gate, up, strict=True)])},
    )


def test_ernies_split_of_one_expert_list_over_two_targets():
    parts = [numbered(2, 3) + 10 * e for e in range(5)]
    planned_both_ways(
        "m.experts.{(t + v)}.w : o i == m.text : t o i, m.vision : v o i "
        "where t = config.text, v = config.vision",
        {f"m.experts.{e}.w": part for e, part in enumerate(parts)},
        {"m.text": np.stack(parts[:2]), "m.vision": np.stack(parts[2:])},
        {"text": 2, "vision": 3},
    )


def test_conv1d_to_linear():
    x = numbered(4, 12)
    planned_both_ways(
        "h.{l}.c_attn.weight : i (q + k + v) == h.{l}.q : q i, h.{l}.k : k i, h.{l}.v : v i "
        "where q = k, k = v",
        {"h.0.c_attn.weight": x},
        {f"h.0.{n}": x[:, 4 * j : 4 * j + 4].T for j, n in enumerate("qkv")},
    )


def test_two_stacked_indices_and_a_grid_in_one_index():
    x = numbered(2, 3, 4)
    planned_both_ways(
        "x.{a}.{b} : i == y : (a b) i where a = config.a",
        {f"x.{a}.{b}": x[a, b] for a in range(2) for b in range(3)},
        {"y": x.reshape(6, 4)},
        {"a": 2},
    )
    planned_both_ways(
        "x.{(a b)} : i == y : b i a where a = config.a, b = config.b",
        {f"x.{a * 3 + b}": x[a, b] for a in range(2) for b in range(3)},
        {"y": x.transpose(1, 2, 0)},
        {"a": 2, "b": 3},
    )


def test_the_last_dims_move_as_a_whole():
    for shape in ((), (4,), (2, 3, 4)):
        parts = [np.array(numbered(*shape) + 100 * e) for e in range(3)]
        planned_both_ways(
            "x.{e} : ... == y : e ...",
            {f"x.{e}": part for e, part in enumerate(parts)},
            {"y": np.stack(parts)},
        )


NUMPY_DTYPES = [
    *(
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu),
]


def all_bits(dtype, shape):
    """Random bits of a dtype: NaNs with payloads, infinities, denormals and negative zeros among them."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, count, np.uint8)
    values = raw.view(dtype).reshape(shape)
    if dtype.kind == "f":
        words = values.view(f"u{dtype.itemsize}").reshape(-1)
        words[0] = np.array(np.nan, dtype).view(words.dtype) | words.dtype.type(5)
        words[1] = np.array(-0.0, dtype).view(words.dtype)
    return values


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=lambda d: np.dtype(d).name)
def test_bits_are_moved_untouched_whatever_the_dtype(dtype):
    x = all_bits(dtype, (6, 8))
    raw = x.view(np.uint8).reshape(6, 8, -1)
    top, bottom = rearrange("(a + b) i == i a, i b where a = 2", x)
    assert top.dtype == bottom.dtype == x.dtype
    assert top.tobytes() == raw[:2].transpose(1, 0, 2).tobytes()
    assert bottom.tobytes() == raw[2:].transpose(1, 0, 2).tobytes()
    plan = plan_of(
        rule_book("x : (a + b) i == y : i a, z : i b where a = config.a"), {"x": x}, config={"a": 2}
    )
    moved = apply_plan(plan, [x])
    assert same_bits(moved["y"], top)
    assert same_bits(moved["z"], bottom)


@needs_torch
@pytest.mark.parametrize(
    "name",
    [
        "bfloat16",
        "float16",
        "float32",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "bool",
        "complex64",
        "float64",
    ],
)
def test_torch_tensors_move_with_all_their_bits(name):
    dtype = getattr(torch, name)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(1).integers(
        0, 2 if name == "bool" else 256, (4, 3, 5, size), np.uint8
    )
    tensors = {f"x.{e}": torch.from_numpy(raw[e]).view(dtype)[..., 0] for e in range(4)}
    plan = plan_of(rule_book("x.{e} : o i == y : e i o"), tensors)
    (stacked,) = apply_plan(plan, list(tensors.values())).values()
    assert stacked.dtype == dtype
    assert stacked.shape == (4, 5, 3)
    bits = stacked.contiguous().view(torch.uint8).numpy().reshape(4, 5, 3, size)
    assert (bits == raw.transpose(0, 2, 1, 3)).all()
    back = apply_plan(
        plan_of(rule_book("x.{e} : o i == y : e i o"), {"y": stacked}, "old"), [stacked]
    )
    for key, tensor in tensors.items():
        assert torch.equal(back[key].view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_arrays_need_not_be_contiguous():
    wide = numbered(8, 6)
    views = {"x.0": wide[::2].T, "x.1": wide[1::2].T}
    plan = plan_of(rule_book("x.{e} : o i == y : e i o"), views)
    want = np.stack([wide[::2], wide[1::2]])
    assert same_bits(apply_plan(plan, list(views.values()))["y"], want)
    if torch is not None:
        tensors = [torch.from_numpy(wide)[::2].T, torch.from_numpy(wide)[1::2].T]
        assert torch.equal(apply_plan(plan, tensors)["y"], torch.from_numpy(want))


def test_what_only_changes_its_name_is_not_copied():
    x = numbered(3, 4)
    plan = plan_of(rule_book("a.{l}.x : o i == b.{l}.y : o i"), {"a.4.x": x})
    assert apply_plan(plan, [x])["b.4.y"] is x


def test_the_sources_are_left_as_they_are():
    parts = {f"x.{e}": numbered(2, 3) + e for e in range(3)}
    copies = [part.copy() for part in parts.values()]
    apply_plan(plan_of(rule_book("x.{e} : o i == y : e i o"), parts), list(parts.values()))
    assert all(same_bits(x, y) for x, y in zip(parts.values(), copies, strict=True))


@pytest.mark.slow
@settings(max_examples=200)
@given(equations(keyed=False))
def test_a_random_equation_moves_every_element_where_the_explicit_loops_put_it(made):
    left, right = made.filled(made.left), made.filled(made.right)
    both_ways(made.bare_text, list(left.values()), list(right.values()), **made.sizes)


@pytest.mark.slow
@settings(max_examples=150)
@given(equations())
def test_a_random_rule_with_stacked_indices_does_too_and_the_way_back_is_the_identity(made):
    left, right = made.filled(made.left), made.filled(made.right)
    moved = made.moved(left)
    assert all(same_bits(moved[key], right[key]) for key in right)
    planned_both_ways(made.text, left, right)


@pytest.mark.parametrize("lead", [" where ", "\nwhere ", "\n    where\n    ", "\twhere\t"])
def test_sizes_join_a_where_on_a_line_of_its_own(lead):
    x = np.arange(12)
    (got,) = rearrange(f"(a b c) == a b c{lead}a = 2", x, b=3)
    assert got.shape == (2, 3, 2)
