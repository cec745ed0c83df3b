"""Names in few words, and never more or fewer than there are."""

import re
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from regraft.names.patterns import patterns, ranges


def expand(pattern: str) -> list[str]:
    texts = re.split(r"\{(.*?)\}", pattern)
    choices = [
        [text] if not i % 2 else [str(n) for part in text.split(",") for n in expand_range(part)]
        for i, text in enumerate(texts)
    ]
    return ["".join(words) for words in product(*choices)]


def expand_range(part: str) -> range:
    first, *rest = (int(n) for n in part.split(".."))
    return range(first, (rest[0] if rest else first) + 1, *rest[1:])


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["w1", "w2"]))))
def test_stand_for_exactly_these_names(rows: set[tuple[int, int, str]]) -> None:
    names = [f"model.layers.{i}.experts.{e}.{w}" for i, e, w in rows]
    found = patterns(names)
    expanded = [name for pattern, _ in found for name in expand(pattern)]
    assert sorted(expanded) == sorted(names)
    assert [count for _, count in found] == [len(expand(pattern)) for pattern, _ in found]


def test_digits_inside_segments_and_padded_numbers_are_names() -> None:
    assert patterns(["a.w1", "a.w2", "a.01", "a.02", "0.0", "1.0"]) == [
        ("a.w1", 1),
        ("a.w2", 1),
        ("a.01", 1),
        ("a.02", 1),
        ("{0,1}.0", 2),
    ]


def test_irregular_numbers_are_cut_short() -> None:
    assert ranges([0, 2, 3, 9, 11, 15, 20, 22, 25, 31, 44, 48]).count(",") <= 8
