"""The rule books of image and video models do what diffusers' own converters do.

`bases/` has, for each family at two sizes, the names and shapes of diffusers' model and a hash of the single file that
its converter undoes; `scripts/consumers/diffusers_bases.py` compares the two and writes them.
"""

import hashlib

import numpy as np
import pytest
from image_models import FOLDER, cases, labelled, through

from regraft.errors import BadInputError
from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers
from regraft.rules.book import books_for, built_in

FILES = sorted(FOLDER.glob("*.json.gz"))


def digest(state):
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {list(state[name].shape)} ".encode())
        found.update(np.ascontiguousarray(state[name]).tobytes())
    return found.hexdigest()


def each():
    """Every family at two sizes; the smaller one is quick."""
    for file in FILES:
        family = file.name.partition(".")[0]
        sizes = sorted(cases(family), key=lambda case: len(case["diffusers"]))
        for number, case in enumerate(sizes):
            slow = (pytest.mark.slow,) if number else ()
            yield pytest.param(family, case, id=f"{family} {case['size']}", marks=slow)


@pytest.mark.parametrize(("family", "case"), list(each()))
def test_a_book_does_what_diffusers_does(family, case):
    (book,) = books_for([family], built_in())
    state = labelled(case["diffusers"])
    native = through(book, state, book.left)
    assert digest(native) == case["native"]
    back = through(book, native, book.right)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("rows", "last"),
    [({0: 6, 1: 6}, None), ({1: 2}, 1), ({0: 6, 5: 2}, 5)],
    ids=["no last layer", "alone", "beside others"],
)
def test_in_an_adapter_the_last_layer_is_known_by_its_shape(rows, last):
    """The last block of SD3 has two parts of modulation, the others have six."""
    (book,) = books_for(["sd3"], built_in())
    names = [f"joint_blocks.{n}.context_block.adaLN_modulation.1.weight" for n in rows]
    shapes = [(parts * 8, 8) for parts in rows.values()]
    headers = Headers(group_names(names), shapes, ["float32"] * len(names))
    plan = build_plan(headers, edges_to([book], "diffusers"), partial=True)
    swapped = {e.rule.name: e for e in plan.entries}.get("last text modulation weight")
    assert (swapped is None) == (last is None)
    if swapped is not None:
        assert list(swapped.keys(swapped.written[0]).names()) == [
            f"transformer_blocks.{last}.norm1_context.linear.weight"
        ]


def test_layers_that_all_look_like_the_last_are_not_taken_for_it():
    (book,) = books_for(["sd3"], built_in())
    names = [f"joint_blocks.{n}.context_block.adaLN_modulation.1.weight" for n in range(2)]
    headers = Headers(group_names(names), [(16, 8)] * 2, ["float32"] * 2)
    with pytest.raises(BadInputError, match="which index l is"):
        build_plan(headers, edges_to([book], "diffusers"), partial=True)


def test_every_book_of_diffusers_was_compared():
    families = {t for b in built_in() if "diffusers" in b.layouts for t in b.model_types}
    assert families == {file.name.partition(".")[0] for file in FILES}
