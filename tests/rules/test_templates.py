import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from regraft.equation.notation import parse_equation, parse_key
from regraft.errors import BadInputError
from regraft.names.keys import MARK, group_names
from regraft.rules.templates import match_group, specificity, write_group


def matches(key, *names):
    """{name: (what the rests hold, indices in the holes)}."""
    result = {}
    for group in group_names(names):
        match = match_group(parse_key(key), group)
        if match is None:
            continue
        written = write_group(parse_key(key), match.rests, match.rest_numbers, match.holes)
        assert written.template == group.template
        for row, at in enumerate(match.rows.tolist()):
            assert written.name(row) == group.name(at)
            numbers = iter(match.rest_numbers[row].tolist())
            rests = [
                "".join(str(next(numbers)) if c == "\0" else c for c in text)
                for text in match.rests
            ]
            result[group.name(at)] = (rests, match.holes[row].tolist())
    return result


def test_a_hole_is_a_number():
    assert matches("a.{l}.w", "a.0.w", "a.17.w", "a.x.w", "a..w", "a.0.w.b", "b.a.0.w") == {
        "a.0.w": ([], [0]),
        "a.17.w": ([], [17]),
    }


def test_some_rows_of_a_match_have_the_numbers_of_these_rows():
    (group,) = group_names(["layers.3.w", "layers.5.w"])
    match = match_group(parse_key("layers.{l}.w"), group)
    assert match.holes.tolist() == [[3], [5]]
    assert match.take(np.array([False, True])).holes.tolist() == [[5]]


def test_a_hole_may_stand_within_a_segment():
    assert matches("shard_{s}.w{n}", "shard_3.w1", "shard_x.w1", "shard_3.w") == {
        "shard_3.w1": ([], [3, 1])
    }


def test_a_literal_number_is_that_number():
    assert matches("a.{l}.w1", "a.5.w1", "a.5.w2", "a.5.w11", "a.5.w01") == {"a.5.w1": ([], [5])}


def test_a_dot_is_a_dot():
    assert matches("a.b", "a.b", "axb") == {"a.b": ([], [])}


@pytest.mark.parametrize(
    ("key", "name", "rest"),
    [
        ("{*p}.w", "w", ""),
        ("{*p}.w", "a.w", "a"),
        ("{*p}.w", "a.b.3.w", "a.b.3"),
        ("a.{*q}", "a", ""),
        ("a.{*q}", "a.b.0", "b.0"),
        ("a.{*p}.b", "a.b", ""),
        ("a.{*p}.b", "a.x.7.b", "x.7"),
        ("{*p}", "a.b.0", "a.b.0"),
    ],
)
def test_segments_are_any_number_of_whole_segments_none_too(key, name, rest):
    assert matches(key, name) == {name: ([rest], [])}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("{*p}.w", "aw"),
        ("a.{*q}", "ab"),
        ("a.{*q}", "a."),
        ("a.{*p}.b", "axb"),
        ("a.{*p}.b", "a.xb"),
        ("{*p}.w", ".w"),
    ],
)
def test_segments_are_whole(key, name):
    assert matches(key, name) == {}


def test_a_literal_number_between_two_segments_is_refused():
    with pytest.raises(BadInputError, match="cannot be told from theirs"):
        parse_key("x.{*p}.4.{*q}")


def test_numbers_spelled_out_make_a_template_closer_then_dims_then_letters():
    terms = ["{*p}.w : ...", "{*p}.long.w : ...", "{*p}.w : o i", "a.w1 : ...", "a.0.w1 : ..."]
    ranks = [specificity(e.left[0], e) for e in (parse_equation(f"{t} == {t}") for t in terms)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


SEGMENT = st.one_of(
    st.sampled_from(["a", "bc", "w1", "0", "12", "x_3"]), st.integers(0, 99).map(str)
)
REST = st.lists(SEGMENT, max_size=3).map(".".join)
PIECE = st.sampled_from(["x", "y2", "{l}", "{e}", "n{k}", "{*p}", "{*q}", "4"])


@pytest.mark.slow
@given(st.lists(PIECE, min_size=1, max_size=5, unique=True), st.data())
def test_a_key_that_a_template_writes_is_matched_and_written_again(pieces, data):
    # the number between two segments has a test of its own
    assume(not {"{*p}", "{*q}"} <= set(pieces) or not {"4", "y2"} & set(pieces))
    segments = [i for i, piece in enumerate(pieces) if piece.startswith("{*")]
    between = pieces[segments[0] : segments[-1]] if segments else []
    assume(not any(piece.isdigit() for piece in between))
    key = parse_key(".".join(pieces))
    rests = [data.draw(REST) for _ in key.rests]
    count = len(key.holes)
    index = st.lists(st.integers(0, 10**6), min_size=count, max_size=count)
    rows = data.draw(st.lists(index, min_size=1, max_size=4))
    holes = np.array(rows, np.int64).reshape(len(rows), count)
    marked, numbers = [], []
    for rest in rests:
        (group,) = group_names([rest])
        marked.append(group.template)
        numbers += group.numbers[0].tolist()
    columns = np.array([numbers] * len(holes), np.int64).reshape(len(holes), -1)
    written = write_group(key, marked, columns, holes)
    assume(written.template)  # nothing but segments that are all none is no key
    match = match_group(key, written)
    assert match is not None
    assert match.rows.tolist() == list(range(len(holes)))
    again = write_group(key, match.rests, match.rest_numbers, match.holes)
    assert again.template == written.template
    assert again.names() == written.names()
    if len(rests) < 2:  # two of them may part the same text otherwise
        assert list(match.rests) == marked
        assert match.rest_numbers.tolist() == columns.tolist()
        assert match.holes.tolist() == holes.tolist()


def test_numbers_decide_where_several_rests_stand():
    (group,) = group_names(["w1.w0", "w1.w5", "w3.w0"])
    match = match_group(parse_key("{*p}.w1.{*q}"), group)
    assert match.rests == ("", f"w{MARK}")
    assert match.rows.tolist() == [0, 1]
    assert match.rest_numbers.ravel().tolist() == [0, 5]
