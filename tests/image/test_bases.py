"""The rule books of image and video models do what diffusers' own converters do.

`bases/` has, for each family at two sizes, the names and shapes of diffusers' model and a hash of the single file that
its converter undoes; `scripts/consumers/diffusers_bases.py` compares the two and writes them.
"""

import gzip
import hashlib
import json
from math import prod
from pathlib import Path

import numpy as np
import pytest

from regraft.arrays.apply import apply_plan
from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers
from regraft.rules.book import books_for, built_in

FILES = sorted((Path(__file__).parent / "bases").glob("*.json.gz"))


def labelled(shapes):
    """Tensors in which every element is another number."""
    state, first = {}, 0
    for name, shape in shapes.items():
        count = prod(shape)
        state[name] = np.arange(first, first + count, dtype=np.int32).reshape(shape)
        first += count
    return state


def through(book, state, layout):
    tensors = list(state.values())
    headers = Headers(group_names(list(state)), [t.shape for t in tensors], ["int32"] * len(state))
    return apply_plan(build_plan(headers, edges_to([book], layout)), tensors)


def digest(state):
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {list(state[name].shape)} ".encode())
        found.update(np.ascontiguousarray(state[name]).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.partition(".")[0])
def test_a_book_does_what_diffusers_does(file):
    (book,) = books_for([file.name.partition(".")[0]], built_in())
    for case in json.loads(gzip.decompress(file.read_bytes())):
        state = labelled(case["diffusers"])
        native = through(book, state, book.left)
        assert digest(native) == case["native"], case["size"]
        back = through(book, native, book.right)
        assert sorted(back) == sorted(state)
        assert all(np.array_equal(back[name], state[name]) for name in state)


def test_every_book_of_diffusers_was_compared():
    families = {t for b in built_in() if "diffusers" in b.layouts for t in b.model_types}
    assert families == {file.name.partition(".")[0] for file in FILES}
