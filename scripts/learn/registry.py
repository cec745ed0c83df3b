"""How well rule books are learned from what transformers itself converts, class by class.

    python scripts/learn/registry.py [--only NAME ...] [--sample N] [--seed S] [--out FILE]

Every class of the installed registry is built at two sizes with labelled weights and written in the old layout by
transformers. A book is learned from both, and carried out on a third pair of files at the second size with other
weights. Classes whose files transformers itself does not read back are those that ``make parity`` lists.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests/parity"))

import tiny
import torch
from compare import classes, old_file, registered

from regraft.errors import RegraftError
from regraft.learning.learn import Pair, dropped_names, learn_pairs
from regraft.learning.probe import labels
from regraft.learning.propose import check

SMALL = (32, 40, 4, 2, 99, 4)
LARGE = (48, 56, 6, 3, 101, 6)
MOST = 3_000_000


def resize(sizes):
    """Let `tiny.shrink` use other sizes."""
    names = ("SIZE", "INNER", "HEADS", "LAYERS", "WORDS", "EXPERTS")
    old = {getattr(tiny, name): name for name in names}
    changed = dict(zip(names, sizes, strict=True))
    tiny._NAMES = tuple((p, changed[old[v]] if v in old else v) for p, v in tiny._NAMES)
    for name, value in changed.items():
        setattr(tiny, name, value)


def pair(cls, seed):
    """A model's file in the old layout, and the model, both labelled."""
    torch.manual_seed(0)
    model = cls(tiny.shrink(cls.config_class())).eval().float()
    state = model.state_dict()
    owners = {}
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            owners.setdefault(tensor.data_ptr(), key)
    shapes = {key: tuple(state[key].shape) for key in owners.values()}
    with torch.no_grad():
        for key, array in labels(shapes, seed).items():
            state[key].copy_(torch.from_numpy(array))
    after = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return Pair.of(old_file(model), after, model.config.to_dict())


def judge(cls):
    """What a learned book is worth: (what kind of change, verdict, seconds, why)."""
    with torch.device("meta"):
        model = cls(tiny.shrink(cls.config_class()))
    if not registered(model) or sum(p.numel() for p in model.parameters()) > MOST:
        return None
    one = pair(cls, 1)
    resize(LARGE)
    two, three = pair(cls, 2), pair(cls, 3)
    began = time.perf_counter()
    found = learn_pairs([one, two], layouts=("old", "new"))
    seconds = time.perf_counter() - began
    operations = any(
        len(r.equation.left) > 1
        or len(r.equation.right) > 1
        or r.equation.left[0].dims != r.equation.right[0].dims
        for r in found.book.rules
    )
    kind = "operation" if operations else "rename" if found.book.rules else "same"
    if found.odd:
        name, why = next(iter(found.odd.items()))
        return kind, "not explained", seconds, f"{len(found.odd)}: {name}: {why}"
    if not found.verified[0].equal:
        return kind, "not verified", seconds, "at the size it was learned from"
    names = set(three.before) - dropped_names(found.book, three), set(three.after)
    if not check(found.book, three.before, three.after, *names, three.config):
        return kind, "not at another size", seconds, "; ".join(found.notes)[:200]
    return kind, "verified", seconds, ""


def main():
    """Judge the classes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--books")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    chosen = [cls for cls in classes() if not given.only or cls.__name__ in given.only]
    if given.sample:
        random.Random(given.seed).shuffle(chosen)
    table, rows = Counter(), []
    for cls in chosen:
        resize(SMALL)
        try:
            verdict = judge(cls)
        except RegraftError as error:
            verdict = ("?", "refused", 0.0, str(error.findings[0])[:200])
        except Exception as error:
            # A class that cannot be built this small is no question to a learned book.
            verdict = ("?", "not built", 0.0, f"{type(error).__name__}: {str(error)[:120]}")
        if verdict is None:
            continue
        kind, word, seconds, why = verdict
        table[kind, word] += 1
        rows.append({"class": cls.__name__, "kind": kind, "verdict": word, "why": why})
        print(f"{cls.__name__:55} {kind:10} {word:20} {seconds:5.1f} {why}", flush=True)
        if (
            given.sample
            and sum(n for (_, w), n in table.items() if w != "not built") >= given.sample
        ):
            break
    for (kind, word), count in sorted(table.items()):
        print(f"{count:4} {kind} {word}")
    if given.out:
        Path(given.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
