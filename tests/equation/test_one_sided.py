"""Copies, padding, numbers in keys and ratios: against loops over explicit indices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import book_of, equation_of, plan_of, rule_book

from regraft import BadInputError
from regraft.arrays.anonymous import rearrange
from regraft.arrays.apply import apply_plan
from regraft.equation import check_equation, parse_equation, solve_sizes

sizes = st.integers(1, 4)


def numbers(*shape):
    return np.random.default_rng(sum(shape)).integers(1, 1000, shape)


def apply(book, tensors, to="new", **options):
    plan = plan_of(book, tensors, to, **options)
    return apply_plan(plan, list(tensors.values()))


def there_and_back(book, old, new, **options):
    made = apply(book, old, **options)
    assert made.keys() == new.keys()
    assert all(np.array_equal(made[k], new[k]) for k in new)
    back = apply(book, new, "old", **options)
    assert back.keys() == old.keys()
    assert all(np.array_equal(back[k], old[k]) for k in old)


@given(sizes, sizes, sizes, st.sampled_from(["(t a) i", "(a t) i", "a (t i)", "a (i t)", "t a i"]))
def test_copies_in_a_shape(t, a, i, dims):
    one = numbers(a, i)
    (many,) = rearrange(f"a i == {dims} where copies t", one, t=t)
    at = [dims.index(x) for x in "ta"], dims
    for n in range(t):
        for x in range(a):
            for y in range(i):
                place = {
                    "(t a) i": (n * a + x, y),
                    "(a t) i": (x * t + n, y),
                    "a (t i)": (x, n * i + y),
                    "a (i t)": (x, y * t + n),
                    "t a i": (n, x, y),
                }[dims]
                assert many[place] == one[x, y], at
    (back,) = rearrange(f"a i == {dims} where copies t", many, reverse=True, t=t)
    assert np.array_equal(back, one)
    if t > 1:
        many.reshape(-1)[-1] += 1
        with pytest.raises(BadInputError, match="not the same each time"):
            rearrange(f"a i == {dims} where copies t", many, reverse=True, t=t)


@given(sizes, sizes, sizes, st.booleans())
def test_copies_in_keys(t, a, layers, reverse):
    text = "norm.{l} : a == rank{t}.norm.{l} : a where t = config.ranks, copies t"
    old = {f"norm.{n}": numbers(a) + n for n in range(layers)}
    new = {f"rank{r}.norm.{n}": old[f"norm.{n}"] for n in range(layers) for r in range(t)}
    there_and_back(rule_book(text), old, new, config={"ranks": t})
    if t > 1:
        new[f"rank{t - 1}.norm.0"] = new["rank0.norm.0"] + 1
        with pytest.raises(BadInputError) as caught:
            apply(rule_book(text), new, "old", config={"ranks": t})
        (finding,) = caught.value.findings
        assert (finding.code, finding.key) == ("copies-differ", f"rank{t - 1}.norm.0")


def test_one_tensor_under_two_names():
    book = rule_book("wte : v i == embed : v i, head : (c v) i where c = 1, copies c")
    x = numbers(3, 2)
    there_and_back(book, {"wte": x}, {"embed": x, "head": x})
    with pytest.raises(BadInputError, match="not equal to the others"):
        apply(book, {"embed": x, "head": x + 1}, "old")


@given(sizes, sizes, st.integers(0, 3), st.sampled_from([0, 1, -2]))
def test_padding(v, i, p, value):
    text = "emb : v i == padded : (v + p) i where v = config.words, p = config.all - v, "
    book = rule_book(text + f"fill p = {value}")
    x = numbers(v, i)
    padded = np.concatenate([x, np.full((p, i), value)])
    config = {"words": v, "all": v + p}
    there_and_back(book, {"emb": x}, {"padded": padded}, config=config)
    if p:
        padded[-1, -1] += 1
        with pytest.raises(BadInputError) as caught:
            apply(book, {"padded": padded}, "old", config=config)
        assert caught.value.findings[0].code == "padding"


@given(sizes, st.integers(1, 3), st.integers(0, 5), st.sets(st.integers(0, 8), min_size=1))
def test_numbers_in_keys(a, step, first, layers):
    book = rule_book(f"a.{{l}}.w : a == b.{{{step} l + {first}}}.w : a")
    old = {f"a.{n}.w": numbers(a) + n for n in layers}
    there_and_back(book, old, {f"b.{step * n + first}.w": old[f"a.{n}.w"] for n in layers})


@given(st.integers(2, 4), st.integers(0, 3), st.integers(1, 4))
def test_two_indices_in_one_number(base, first, blocks):
    book = rule_book(f"a.{{b}}.{{r}}.w : a == b.{{{base} b + r + {first}}}.w : a")
    old = {f"a.{b}.{r}.w": numbers(3) + 10 * b + r for b in range(blocks) for r in range(base)}
    new = {
        f"b.{base * b + r + first}.w": old[f"a.{b}.{r}.w"]
        for b in range(blocks)
        for r in range(base)
    }
    there_and_back(book, old, new)
    with pytest.raises(BadInputError, match="no place in"):
        apply(book, {f"a.0.{base}.w": numbers(3)})


@given(st.integers(1, 5), st.integers(0, 3))
def test_a_stack_may_begin_late_and_have_gaps(count, first):
    book = rule_book(f"a.{{2 e + {first}}}.w : o == b.w : e o")
    old = {f"a.{2 * e + first}.w": numbers(3) + e for e in range(count)}
    there_and_back(book, old, {"b.w": np.stack(list(old.values()))})


def test_reversed_numbers():
    book = rule_book("up.{l}.w : a == down.{3 - l}.w : a")
    old = {f"up.{n}.w": numbers(2) + n for n in range(4)}
    there_and_back(book, old, {f"down.{3 - n}.w": old[f"up.{n}.w"] for n in range(4)})


@pytest.mark.parametrize("config", [None, {"layers": 3}])
def test_the_last_layer_differs(config):
    last = "a.{l}.w : (s + t) == b.{l}.w : (t + s) where s = t, l is config.layers - 1 | last"
    book = rule_book("a.{l}.w : a == b.{l}.w : a", last)
    old = {f"a.{n}.w": numbers(6) + n for n in range(3)}
    x = old["a.2.w"]
    new = {f"b.{n}.w": old[f"a.{n}.w"] for n in range(2)} | {
        "b.2.w": np.concatenate([x[3:], x[:3]])
    }
    there_and_back(book, old, new, config=config)


def test_a_last_layer_that_nothing_says():
    book = rule_book("a.{l}.w : a == b.{l}.w : a where l is config.layers - 1")
    with pytest.raises(BadInputError) as caught:
        apply(book, {"a.0.w": numbers(3)})
    assert {f.code for f in caught.value.findings} >= {"unknown-size"}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_sizes_by_ratio(q, three, two):
    equation = parse_equation(
        f"(q + k + v + m) i == q i, k i, v i, m i where q = k, k = v, m = {three} q / {two}"
    )
    m = three * q * two // two
    found, _ = solve_sizes(equation, [(equation.left[0], (3 * q * two + three * q, 5))])
    assert found == {"q": q * two, "k": q * two, "v": q * two, "m": m, "i": 5}


def test_a_ratio_that_leaves_no_whole_number():
    equation = parse_equation("(q + m) == q, m where m = 3 q / 2")
    with pytest.raises(ValueError, match="does not divide"):
        solve_sizes(equation, [(equation.left[0], (7,))])


@given(sizes, sizes)
def test_dims_of_one_position(o, i):
    x = numbers(o, i)
    (made,) = rearrange("o i == o i 1 1", x)
    assert made.shape == (o, i, 1, 1)
    assert np.array_equal(rearrange("o i == o i 1 1", made, reverse=True)[0], x)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.{l} : i == b.{l} : i where copies t", "exactly one side has the axis t"),
        ("a : i == b : i t where t = 2", "has no partner"),
        ("a : t i == b : t i where copies t", "exactly one side"),
        ("a : i == b : (i + p) where p = 2", "has no partner"),
        ("a.{2 e + f} : i == b.{f} : e i", "counts in a shape"),
        ("a.{l}.{2 e + l} : i == b.{l} : e i", "counts in a shape"),
        ("a.{2 b + 3 c} : i == b.{b}.{c} : i", "does not tell its indices"),
        ("a.{b - c} : i == b.{b}.{c} : i", "does not tell its indices"),
        ("a.{3} : i == b : i", "needs no {}"),
        ("a.{l + l} : i == b.{l} : i", "stands once"),
        ("a : e i == b.{e} : i where e is last", "stands in keys only"),
    ],
)
def test_what_is_wrong_is_marked(text, message):
    with pytest.raises(BadInputError, match=message.replace("{}", r"\{\}")):
        check_equation(parse_equation(text))


MODULES = """
[[module]]
left = "a.{l}.fc"
right = "b.{l}.ff.{2 l + 1}"

[[module]]
name = "qkv"
text = '''
a.{l}.qkv : (q + k + v) i
    == b.{l}.q : q i, b.{l}.k : k i, b.{l}.v : v i
where q = k, k = v
'''

[[module]]
left = "norm"
right = "final.norm"
kind = "vector"

[[module]]
text = "mid.q : o i 1 1 == mid.to_q : o i"
left_kind = "conv"
right_kind = "linear"
"""


def test_module_rules_move_weights_and_biases():
    book = book_of(MODULES)
    assert [rule.name for rule in book.rules][:4] == [
        "b ff weight",
        "b ff bias",
        "qkv weight",
        "qkv bias",
    ]
    w, b = numbers(6, 4), numbers(6)
    old = {
        "a.0.fc.weight": w,
        "a.0.fc.bias": b,
        "a.1.qkv.weight": w,
        "a.1.qkv.bias": b,
        "norm.weight": b,
        "mid.q.weight": w[..., None, None],
        "mid.q.bias": b,
    }
    new = {"b.0.ff.1.weight": w, "b.0.ff.1.bias": b, "final.norm.weight": b}
    new |= {"mid.to_q.weight": w, "mid.to_q.bias": b}
    for n, x in enumerate("qkv"):
        new |= {f"b.1.{x}.weight": w[2 * n : 2 * n + 2], f"b.1.{x}.bias": b[2 * n : 2 * n + 2]}
    there_and_back(book, old, new)


def test_a_bias_that_has_no_one_place_has_no_rule():
    book = book_of("\n[[module]]\ntext = 'a.o : d (x + y) == b.o : d x, c.o : d y where x = y'\n")
    assert [rule.name for rule in book.rules] == ["c o weight"] or len(book.rules) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("left = 'a'", "either left and right, or text"),
        ("left = 'a'\nright = 'b'\nkind = 'round'", "no kind 'round'"),
        ("text = 'a : o i == b : o i'\nkind = 'conv'", "conv"),
    ],
)
def test_a_module_rule_that_is_wrong(body, message):
    with pytest.raises(BadInputError, match=message):
        book_of(f"\n[[module]]\n{body}\n")


def test_order_of_indices_in_keys():
    """A stack of tensors in one order of its indices, in another on the other side."""
    book = rule_book("x.{(r e)} : o == y.{e}.{r} : o where r = 2")
    old = {f"x.{r * 3 + e}": numbers(2) + 3 * r + e for r in range(2) for e in range(3)}
    new = {f"y.{e}.{r}": old[f"x.{r * 3 + e}"] for r in range(2) for e in range(3)}
    made = apply(book, old)
    assert made.keys() == new.keys()
    assert all(np.array_equal(made[k], new[k]) for k in new)


def test_open_rest():
    from regraft.equation.lower import lower, open_rest

    equation = open_rest(parse_equation("(a + b) ... == a ..., b ... where a = 2"), 2)
    copies = lower(equation, {"a": 2, "b": 3, "_0": 4, "_1": 5})
    assert [len(copy.axes) for copy in copies] == [3, 3]


def test_a_rule_for_the_last_index_is_closer():
    assert (
        equation_of
    )  # the general rule and the special one speak of one key, and no lint complains
    from regraft.rules.lint.book import lint_book

    book = rule_book(
        "a.{l}.w : ... == b.{l}.w : ...",
        "a.{l}.w : (s + t) == b.{l}.w : (t + s) where s = t, l is last",
    )
    assert not [fault for fault in lint_book(book) if fault.severity == "error"]
