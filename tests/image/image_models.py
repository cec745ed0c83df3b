"""Tensors of tiny image models, in either layout, by what diffusers says of them (`bases/`)."""

import gzip
import json
from math import prod
from pathlib import Path

import numpy as np

from regraft.arrays.apply import apply_plan
from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers
from regraft.rules.book import books_for, built_in

FOLDER = Path(__file__).parent / "bases"


def cases(family):
    """What is known of a family: diffusers' names and shapes, and a hash of the single file, at two sizes."""
    return json.loads(gzip.decompress((FOLDER / f"{family}.json.gz").read_bytes()))


def labelled(shapes, dtype=np.int32):
    """Tensors in which every element is another number."""
    state, first = {}, 0
    for name, shape in shapes.items():
        count = prod(shape)
        state[name] = np.arange(first, first + count, dtype=dtype).reshape(shape)
        first += count
    return state


def through(book, state, layout):
    """A state dict by a rule book."""
    tensors = list(state.values())
    headers = Headers(group_names(list(state)), [t.shape for t in tensors], ["int32"] * len(state))
    return apply_plan(build_plan(headers, edges_to([book], layout)), tensors)


def both(family, number=0):
    """A tiny model by the names of its single file, and by diffusers'."""
    (book,) = books_for([family], built_in())
    state = labelled(cases(family)[number]["diffusers"])
    return through(book, state, book.left), state
