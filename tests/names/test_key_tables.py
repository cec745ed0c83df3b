import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import BadInputError
from regraft.names.keys import MARK, group_names
from regraft.planning.rows import distinct_rows


def names_back(names):
    """Every name again, by its id."""
    back = {}
    for group in group_names(names):
        assert len(group) == len(group.ids) == len(group.numbers) == len(group.names())
        for row, number in enumerate(group.ids.tolist()):
            assert group.names()[row] == group.name(row)
            back[number] = group.name(row)
    return [back[i] for i in range(len(names))]


def templates(*names):
    return [group.template.replace(MARK, "#") for group in group_names(names)]


def test_names_that_differ_in_numbers_only_are_one_group():
    (group,) = group_names(["a.0.w1", "a.12.w3", "a.7.w2"])
    assert group.template.replace(MARK, "#") == "a.#.w#"
    assert group.numbers.tolist() == [[0, 1], [12, 3], [7, 2]]
    assert group.ids.tolist() == [0, 1, 2]


def test_groups_come_in_order_of_first_appearance_and_keep_the_order_of_their_names():
    groups = group_names(["b.1", "a", "b.0", "c", "b.2"])
    assert [g.names() for g in groups] == [["b.1", "b.0", "b.2"], ["a"], ["c"]]
    assert [g.ids.tolist() for g in groups] == [[0, 2, 4], [1], [3]]


def test_a_number_with_leading_zeros_is_text():
    assert templates("a.007.b", "a.7.b") == ["a.007.b", "a.#.b"]
    assert templates("w00", "w0") == ["w00", "w#"]


def test_a_huge_number_is_text():
    huge = "a." + "9" * 30
    assert names_back([huge, "a.1"]) == [huge, "a.1"]
    large = "a." + "9" * 17
    assert names_back([large, "a.1"]) == [large, "a.1"]
    assert templates(huge, "a.1") == [huge, "a.#"]


@pytest.mark.parametrize(
    "odd", ["a\n.0.b", "\n", "a.0\n1", "", "%s.0", "%%d{}", "ü.0.ß", "a.0.\u0663", "\r\n0"]
)
def test_odd_characters_in_names_are_kept(odd):
    assert names_back([odd, "a.0.b", "c"]) == [odd, "a.0.b", "c"]


def test_no_names_are_no_groups():
    assert group_names([]) == []


def test_a_name_with_the_character_that_marks_numbers_is_refused():
    with pytest.raises(BadInputError, match="NUL"):
        group_names(["a\0b", "a1b", "a2b"])


def test_rows_can_be_taken():
    (group,) = group_names([f"a.{i}" for i in range(5)])
    assert group.take(np.array([3, 1])).names() == ["a.3", "a.1"]
    assert group.take(group.numbers[:, 0] > 2).ids.tolist() == [3, 4]


TEXT = st.text("ab.0123\n%{}é", max_size=12)


@given(st.lists(TEXT, max_size=12))
def test_every_name_comes_back(names):
    assert names_back(names) == names


@given(
    st.lists(st.lists(st.integers(0, 10**17 - 1), min_size=2, max_size=2), min_size=1, max_size=9)
)
def test_numbers_stand_in_columns(rows):
    (group,) = group_names([f"l.{a}.e.{b}.w" for a, b in rows])
    assert group.numbers.tolist() == rows


@given(st.integers(1, 3), st.lists(st.sampled_from([-1, 0, 1, 7, 2**61]), max_size=18))
def test_distinct_rows_are_those_of_numpy(width, values):
    rows = np.array(values[: len(values) // width * width], dtype=np.int64).reshape(-1, width)
    first, which = distinct_rows(rows)
    _, wanted, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    assert first.tolist() == wanted.tolist()
    assert which.tolist() == inverse.reshape(-1).tolist()


def test_rows_without_numbers_are_one():
    first, which = distinct_rows(np.zeros((3, 0), dtype=np.int64))
    assert (first.tolist(), which.tolist()) == ([0], [0, 0, 0])
