"""The notation in one page: what an equation says, by example."""

import numpy as np
import pytest

from regraft.arrays.anonymous import rearrange
from regraft.equation import SizeError, UnknownSizeError, parse_equation, undetermined
from regraft.errors import BadInputError

X = np.arange(24)


def test_a_term_names_the_dims_and_their_order_may_change():
    (turned,) = rearrange("o i == i o", X.reshape(4, 6))
    assert (turned == X.reshape(4, 6).T).all()


def test_brackets_are_a_product_the_last_axis_runs_fastest():
    (flat,) = rearrange("a b == (a b)", X.reshape(4, 6))
    assert (flat == X).all()


def test_a_plus_lays_pieces_one_after_the_other():
    (joined,) = rearrange("a i, b i == (a + b) i", X[:6].reshape(1, 6), X[6:].reshape(3, 6))
    assert (joined == X.reshape(4, 6)).all()


def test_the_inverse_is_the_same_equation_read_right_to_left():
    one, other = rearrange("a i, b i == (a + b) i", X.reshape(4, 6), reverse=True, a=1)
    assert (one == X[:6].reshape(1, 6)).all()
    assert (other == X[6:].reshape(3, 6)).all()


def test_where_says_what_the_shapes_leave_open():
    half, _ = rearrange("(a + b) i == a i, b i where a = b", X.reshape(4, 6))
    assert half.shape == (2, 6)
    assert undetermined(parse_equation("(a + b) i == a i, b i")) == ("a", "b")
    with pytest.raises(UnknownSizeError, match="a, b"):
        rearrange("(a + b) i == a i, b i", X.reshape(4, 6))


def test_a_unit_axis_is_a_tag_that_tells_summands_apart():
    q, k = rearrange("(g (n + k) d) == (g n d), (g k d) where g = 2, k = 1, d = 3", X)
    groups = X.reshape(2, 4, 3)
    assert (q == groups[:, :3].reshape(-1)).all()
    assert (k == groups[:, 3:].reshape(-1)).all()


def test_three_dots_are_the_last_dims_whatever_they_are():
    for shape in ((24,), (4, 6), (4, 2, 3)):
        (there,) = rearrange("a ... == a ...", X.reshape(shape))
        assert (there == X.reshape(shape)).all()


def test_sizes_are_exact():
    with pytest.raises(SizeError, match="does not divide"):
        rearrange("(h d) == h d where h = 5", X)


def test_every_element_goes_to_exactly_one_place():
    with pytest.raises(BadInputError, match="no partner"):
        rearrange("a b == a c", X.reshape(4, 6))
