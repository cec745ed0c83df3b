"""Rule books, headers and plans made of text and arrays, for tests."""

import numpy as np
import pytest

from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers
from regraft.rules.book import load_book

HEAD = """name = "test"
title = "a book for tests"
left = "old"
right = "new"
model_types = ["test"]
"""


def slow_but(fast, values):
    """Parameters of a test, all slow but these: one example of a matrix is enough for a quick look."""
    values = list(values)
    missing = set(fast) - set(values)
    assert not missing, f"there are no {missing}"
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


def quick_cases(names):
    """Golden cases, or bases, all slow but one of each kind."""
    ends = ("__gud_attn", "__params_attn", "__mts_head", "__dora", "mixtral", "jamba")
    names = list(names)
    return slow_but([name for name in names if str(name).endswith(ends)], names)


class Text:
    """A file that is only its text."""

    def __init__(self, text):
        self.text = text

    def read_text(self, encoding):
        assert encoding == "utf-8"
        return self.text


def book_of(body, shown="test.toml", head=HEAD):
    return load_book(Text(head + body), shown)


def equation_of(text, name="rule", left_kind="any", right_kind="any"):
    """One equation as a table of a rule book; kinds are a name or a list of them."""
    kinds = [
        f"{side}_kind = {kind!r}" for side, kind in (("left", left_kind), ("right", right_kind))
    ]
    return "\n".join(
        ["", "[[equation]]", f"name = {name!r}", f"text = '''\n{text}\n'''", *kinds, ""]
    )


def rule_book(*texts, **kinds):
    return book_of("".join(equation_of(text, f"rule {i}", **kinds) for i, text in enumerate(texts)))


def headers_of(tensors):
    """Headers of a dict of arrays (numpy's or torch's), or of shapes."""
    shapes = [tuple(getattr(t, "shape", t)) for t in tensors.values()]
    dtypes = [str(getattr(t, "dtype", "float32")).removeprefix("torch.") for t in tensors.values()]
    return Headers(group_names(list(tensors)), shapes, dtypes)


def plan_of(book, tensors, to="new", config=None, shapes=None, **options):
    scopes = {book.name: Scope(config, shapes or {})}
    return build_plan(headers_of(tensors), edges_to([book], to), scopes=scopes, **options)


def same_bits(one, other):
    """Whether two arrays agree in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
