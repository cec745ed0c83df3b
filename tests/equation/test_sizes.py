import pytest
from generated import equations
from hypothesis import given, settings

from regraft.equation import SizeError, UnknownSizeError, parse_equation, solve_sizes, undetermined
from regraft.equation.notation import ConfigPath


def solve(text, *shapes, reverse=False, config=None):
    equation = parse_equation(text)
    read, _ = equation.sides(reverse=reverse)

    def look_up(value):
        assert isinstance(value, ConfigPath)
        for path in value.paths:
            if ".".join(path) in (config or {}):
                return config[".".join(path)]
        return None

    return solve_sizes(equation, zip(read, shapes, strict=True), lookup=look_up)[0]


@pytest.mark.parametrize(
    ("text", "shapes", "sizes"),
    [
        ("a i, b i == (a + b) i", [(2, 4), (3, 4)], {"a": 2, "b": 3, "i": 4}),
        ("(a + b) i == a i, b i where a = 2", [(5, 4)], {"a": 2, "b": 3, "i": 4}),
        ("(a + b) i == a i, b i where a = b", [(6, 4)], {"a": 3, "b": 3, "i": 4}),
        ("(h d) == h d where d = 3", [(12,)], {"h": 4, "d": 3}),
        ("(h d) i == h (d i) where h = i", [(12, 4)], {"h": 4, "d": 3, "i": 4}),
        ("(a b) == a b where a = b", [(9,)], {"a": 3, "b": 3}),
        ("(a + b) == a, b where a = b, a = 0", [(0,)], {"a": 0, "b": 0}),
        (
            "(a (n + k) d) == (a n d), (a k d) where a = 2, k = 1, d = 3",
            [(24,)],
            {"a": 2, "n": 3, "k": 1, "d": 3},
        ),
    ],
)
def test_sizes_come_from_the_shapes_that_are_read_and_the_where_clauses(text, shapes, sizes):
    assert solve(text, *shapes) == sizes


def test_products_and_quotients_in_where():
    text = "(a + b) i == a i, b i where a = config.h * config.d, b = config.n / 2 * 3"
    assert solve(text, (18, 1), config={"h": 3, "d": 4, "n": 4}) == {"a": 12, "b": 6, "i": 1}
    with pytest.raises(SizeError, match="not divisible"):
        solve(text, (18, 1), config={"h": 3, "d": 4, "n": 3})


def test_a_quotient_by_an_axis():
    text = "(h d) i == h d i where h = 2, i = config.n / d"
    assert solve(text, (6, 4), config={"n": 12}) == {"h": 2, "d": 3, "i": 4}


def test_the_first_config_field_that_is_there_counts():
    text = "(e o) == e o where e = config.experts | config.moe.count"
    assert solve(text, (12,), config={"moe.count": 3})["e"] == 3
    assert solve(text, (12,), config={"moe.count": 3, "experts": 4})["e"] == 4
    with pytest.raises(UnknownSizeError):
        solve(text, (12,), config={})


@pytest.mark.parametrize(
    ("text", "shapes", "message"),
    [
        ("(h d) == h d where h = 5", [(12,)], "12 does not divide into"),
        ("(a + b) == a, b where a = b", [(7,)], "7 does not divide into"),
        ("(a + b) == a, b where a = 9", [(7,)], "7 does not divide into"),
        ("(a b) == a b where a = b", [(8,)], "8 does not divide into"),
        ("a i == i a where i = 5", [(2, 4)], "5 .* 4|4 .* 5"),
        ("a i, b i == (a + b) i", [(2, 4), (3, 5)], "4 .* 5|5 .* 4"),
        ("a i, b i == (a + b) i where a = b", [(2, 4), (3, 4)], "2 .* 3|3 .* 2"),
        ("a i == i a", [(2, 4, 3)], "has 2 dims, but the tensor's shape is"),
        ("a i ... == i a ...", [(2,)], "2 or more dims"),
        ("a ..., b ... == (a + b) ...", [(2, 3), (2, 4)], r"\[3\] .* \[4\]"),
        ("(a + b) == a, b where a = 2, b = 3", [(6,)], "is 5 .*but the tensor has 6"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(text, shapes, message):
    with pytest.raises(SizeError, match=message) as caught:
        solve(text, *shapes)
    assert not isinstance(caught.value, UnknownSizeError)


@pytest.mark.parametrize(
    ("text", "there", "back"),
    [
        ("a i, b i == (a + b) i", (), ("a", "b")),
        ("a i, b i == (a + b) i where a = b", (), ()),
        ("a i, b i == (a + b) i where a = config.x", (), ()),
        ("(h d) i == h d i", ("h", "d"), ()),
        ("(h d) i == (d h) i", ("h", "d"), ("h", "d")),
        ("(g (n + k) d) == (g n d), (g k d) where k = 1, d = config.d", ("g", "n"), ()),
        ("x.{e} : o i == y : e o i", (), ()),
        ("x.{(t + v)} : o == y : t o, z : v o", ("t", "v"), ()),
        ("x.{l} : o == y.{l} : o", (), ()),
        ("a ... == a ...", (), ()),
    ],
)
def test_lint_knows_for_each_direction_what_is_left_open(text, there, back):
    assert undetermined(parse_equation(text)) == there
    assert undetermined(parse_equation(text), reverse=True) == back


@settings(max_examples=150)
@given(equations(keyed=False))
def test_what_lint_calls_determined_is_solved_and_to_the_right_sizes(made):
    for reverse in (False, True):
        open_axes = undetermined(parse_equation(made.bare_text), reverse=reverse)
        clauses = ", ".join(f"{axis} = {made.sizes[axis]}" for axis in open_axes)
        text = made.bare_text + (f" where {clauses}" if clauses else "")
        assert undetermined(parse_equation(text), reverse=reverse) == ()
        shapes = [term.shape(made.sizes) for term in made.sides(reverse)[0]]
        assert solve(text, *shapes, reverse=reverse) == made.sizes
