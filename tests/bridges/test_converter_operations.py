"""Every operation of the registry as an equation does to numbered elements what transformers' own code does."""

import re
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import core_model_loading as loading  # noqa: E402

from regraft.arrays.apply import apply_plan  # noqa: E402
from regraft.bridges.transformers.operations import (  # noqa: E402
    UnknownOperationError,
    run,
    write_dim,
)
from regraft.equation.lower import check_equation  # noqa: E402
from regraft.equation.notation import parse_equation  # noqa: E402
from regraft.layouts.graph import edges_to  # noqa: E402
from regraft.names.keys import group_names  # noqa: E402
from regraft.planning.build import build_plan  # noqa: E402
from regraft.planning.model import Scope  # noqa: E402
from regraft.planning.plan import Headers  # noqa: E402
from regraft.rules.book import Book, Rule  # noqa: E402

SIZES = st.integers(1, 4)
CONFIG = SimpleNamespace(num_attention_heads=2, part=SimpleNamespace(num_attention_heads=3))


def ids(*shape, start=0):
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count).reshape(shape)


def book_of(chain, sources, targets):
    """The rule that the bridge would write for a chain."""
    index = write_dim(chain.index) if chain.index is not None else "e"
    left = [
        f"{name.replace('*', '{' + index + '}')} : {chain.write(axes)}"
        for name, axes in zip(sources, chain.sources, strict=True)
    ]
    right = [
        f"{name} : {chain.write(dims)}" for name, dims in zip(targets, chain.targets, strict=True)
    ]
    text = "\n".join(left) + "\n== " + "\n".join(right)
    if chain.clauses():
        text += "\nwhere " + ", ".join(chain.clauses())
    equation = parse_equation(text)
    check_equation(equation)
    kinds = ("any",) * len(sources), ("any",) * len(targets)
    rule = Rule("one", equation, *kinds, "one", "")
    return Book("one", "one", "old", "new", (), (rule,), (), (), (), (), (), "one", "")


def moved(book, state, to):
    names, tensors = list(state), [t.numpy() for t in state.values()]
    headers = Headers(group_names(names), [t.shape for t in tensors], ["I64"] * len(names))
    plan = build_plan(headers, edges_to([book], to), scopes={"one": Scope()})
    return {key: torch.tensor(array) for key, array in apply_plan(plan, tensors).items()}


def agrees(operations, old, targets, config=CONFIG, turned=False):
    """Whether the equation makes of old tensors what the operations make, and the old ones of it."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in old))
    stacked = {p: [t for n, t in old.items() if n == p or fits(n, p)] for p in patterns}
    state = {p: each if "*" in p else each[:1] for p, each in stacked.items()}
    for operation in operations:
        state = operation.convert(
            state,
            source_patterns=patterns,
            target_patterns=list(targets),
            config=config,
            full_layer_name="",
        )
    theirs = {k: v[0] if isinstance(v, list) else v for k, v in state.items()}
    if len(targets) == 1:
        theirs = dict(zip(targets, theirs.values(), strict=True))
    shapes = [tuple(theirs[name].shape) for name in targets]
    chain = run(operations, patterns, list(targets), shapes, config, turned=turned)
    book = book_of(chain, patterns, targets)
    mine = moved(book, old, "new")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    back = moved(book, mine, "old")
    assert back.keys() == old.keys()
    assert all(torch.equal(back[k], old[k]) for k in old)


def fits(name, pattern):
    head, star, tail = pattern.partition("*")
    return bool(star) and name.startswith(head) and name.endswith(tail)


@given(SIZES, SIZES)
def test_stacks(rows, columns):
    old = {f"e.{n}.w": ids(rows, columns, start=100 * n) for n in range(3)}
    agrees([loading.MergeModulelist(dim=0)], old, ["all"])


@given(SIZES, SIZES)
def test_stacks_that_are_joined(rows, columns):
    old = {
        f"e.{n}.{p}": ids(rows, columns, start=100 * n + 1000 * (p == "u"))
        for p in "gu"
        for n in range(3)
    }
    agrees([loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)], old, ["all"])


@given(SIZES, SIZES, st.integers(0, 1))
def test_joins(rows, columns, dim):
    old = {"q": ids(rows, columns), "k": ids(rows, columns, start=100)}
    agrees([loading.Concatenate(dim=dim)], old, ["qk"])


@given(SIZES, SIZES, st.integers(2, 4))
def test_equal_parts(rows, columns, count):
    old = {"all": ids(count * rows, columns)}
    agrees([loading.Chunk(dim=0)], old, [f"part_{c}" for c in "abcd"[:count]])


@given(SIZES, SIZES, st.booleans())
def test_dims_that_change_places(rows, columns, checked):
    operation = loading.Transpose(dim0=0, dim1=1)
    agrees([operation], {"a": ids(rows, columns)}, ["b"], turned=checked)


@given(SIZES, SIZES, st.booleans())
def test_pairs(half, columns, inverse):
    agrees([loading.Interleave(dim=0, inverse=inverse)], {"a": ids(2 * half, columns)}, ["b"])


@given(SIZES, st.integers(0, 3), st.booleans())
def test_rotary_halves(half, columns, inverse):
    shape = (2 * 2 * half, columns) if columns else (2 * 2 * half,)
    operation = loading.PermuteForRope()
    operation.inverse = inverse
    agrees([operation], {"a": ids(*shape)}, ["b"])


@given(SIZES, SIZES, st.integers(1, 3), st.integers(1, 3))
def test_flat_filters(outer, channels, height, width):
    operation = loading.Conv3dToLinear(channels, (2, height, width))
    agrees([operation], {"a": ids(outer, channels, 2, height, width)}, ["b"])


def test_a_transpose_that_looks_leaves_what_is_right():
    operation = loading.Transpose(dim0=0, dim1=1, check_dims=True)
    chain = run([operation], ["a"], ["b"], [(2, 3)], CONFIG, turned=False)
    assert chain.write(chain.sources[0]) == chain.write(chain.targets[0])
    chain = run([operation], ["a"], ["b"], [(2, 3)], CONFIG, turned=True)
    assert chain.write(chain.sources[0]) == " ".join(chain.write(chain.targets[0]).split()[::-1])


def test_parts_of_different_sizes_are_told_from_their_shapes():
    chain = run([loading.Split(dim=0)], ["a"], ["b", "c"], [(2, 3), (5, 3)], CONFIG, turned=False)
    book = book_of(chain, ["a"], ["b", "c"])
    whole = ids(7, 3)
    parts = moved(book, {"a": whole}, "new")
    assert torch.equal(parts["b"], whole[:2]) and torch.equal(parts["c"], whole[2:])
    assert torch.equal(moved(book, parts, "old")["a"], whole)


def test_experts_of_different_sizes_are_refused():
    operation = loading.ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)
    shapes = [(2, 6, 4), (2, 8, 4)]
    with pytest.raises(UnknownOperationError, match="different sizes"):
        run([operation], ["e.*.g", "e.*.u"], ["text", "vision"], shapes, CONFIG, turned=False)
