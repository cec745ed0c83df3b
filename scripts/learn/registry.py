"""How well rule books are learned from what transformers itself converts, class by class.

    python scripts/learn/registry.py [--only GLOB ...] [--out FILE] [--sample N]

Every class of the installed registry is built at three sizes with labelled weights and written in the old layout by
transformers. A book is learned from the first two and carried out, in both directions, on the third. Whether a class
is only renamed is told from its weights, never from the book. What does not come out equal is told apart: refused,
or *wrong*, where the book makes something else and says nothing.

The output is one line of JSON for each class; classes that it has already are skipped, so that a run goes on where
one ended. ``--table`` prints the figures of a file.
"""

import argparse
import fnmatch
import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from math import prod
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests/parity"))

import numpy as np
import tiny
import torch
import transformers
from compare import classes, old_file, registered, why_not
from explained import explain

from regraft.errors import RegraftError
from regraft.learning.learn import dropped_names, learn_pairs
from regraft.learning.pairs import Pair
from regraft.learning.probe import MOST, labels
from regraft.learning.propose import compare, plan_names

NAMES = ("SIZE", "INNER", "HEADS", "LAYERS", "WORDS", "EXPERTS")
FIRST = (
    (48, 40, 4, 2, 99, 5),
    (32, 40, 4, 2, 99, 5),
    (32, 40, 4, 2, 99, 4),
    (32, 40, 4, 3, 99, 4),
    (32, 40, 4, 2, 113, 4),
)
MORE = (
    (64, 104, 8, 3, 101, 6),
    (120, 136, 6, 2, 103, 7),
    (80, 88, 8, 4, 107, 3),
    (96, 104, 8, 3, 99, 6),
    (128, 136, 8, 2, 99, 7),
    (48, 56, 6, 3, 101, 6),
    (64, 72, 8, 2, 103, 5),
    (64, 72, 4, 3, 101, 6),
    (32, 56, 4, 3, 101, 6),
    (32, 72, 4, 4, 103, 5),
    (48, 56, 6, 3, 99, 6),
    (32, 56, 4, 2, 99, 6),
    (32, 72, 4, 2, 99, 5),
)
"""Sizes to try, in order: not every class can be built with all of them."""
LARGEST = 30_000_000
"""Elements that are looked at; larger classes are listed."""
_MADE_FOR = {getattr(tiny, name): name for name in NAMES}
_PATTERNS, _FACTS = tiny._NAMES, tiny._FACTS
_HEAD = 8
"""The size of a head at the first sizes."""


def resize(sizes):
    """Let `tiny.shrink` use other sizes."""
    changed = dict(zip(NAMES, sizes, strict=True))
    head, tiny_heads = changed["SIZE"] // changed["HEADS"], 4

    def of(value, name):
        if "key_value_heads" in name and value == 2:
            return changed["HEADS"] // 2
        if "experts_per" in name:
            return value
        if value == tiny_heads:
            return changed["EXPERTS" if "expert" in name else "HEADS"]
        return (
            head if value == _HEAD else changed[_MADE_FOR[value]] if value in _MADE_FOR else value
        )

    tiny._NAMES = tuple((pattern, of(value, pattern.pattern)) for pattern, value in _PATTERNS)
    tiny._FACTS = {
        model: {
            name: of(value, name) if name.endswith(("heads", "head_dim")) else value
            for name, value in facts.items()
        }
        for model, facts in _FACTS.items()
    }
    for name, value in changed.items():
        setattr(tiny, name, value)


def config_of(cls, sizes):
    """A small config; the facts about families are those of the first sizes."""
    resize(sizes)
    return tiny.shrink(cls.config_class())


def buildable(cls):
    """Sizes at which a class can be built, those first that differ most; the first error where there are none."""
    found, error = [], None
    for candidates, wanted in ((FIRST, 1), (MORE, 3)):
        for sizes in candidates:
            try:
                with torch.device("meta"):
                    model = cls(config_of(cls, sizes))
            except Exception as caught:
                error = error or caught
                continue
            shapes = {k: tuple(t.shape) for k, t in model.state_dict().items()}
            if shapes not in [known for _, known in found]:
                found.append((sizes, shapes))
            if len(found) >= wanted + (wanted > 1) * 2:
                break
        if not found:
            raise error
    return [sizes for sizes, _ in found]


def numbered(shapes, seed):
    """Labels; of float64 where float32 cannot tell so many elements apart."""
    count = sum(map(prod, shapes.values()))
    if count <= MOST:
        return labels(shapes, seed)
    values = np.random.default_rng(seed).permutation(count).astype(np.float64) + seed * 2.0**30 + 1
    cuts = np.cumsum([prod(shape) for shape in shapes.values()])[:-1]
    return {
        k: part.reshape(shape)
        for (k, shape), part in zip(shapes.items(), np.split(values, cuts), strict=True)
    }


def pair(cls, sizes, seed):
    """A model's file in the old layout, and the model, both labelled."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(config_of(cls, sizes)).eval()
    state = model.state_dict()
    owners = {}
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            owners.setdefault(tensor.data_ptr(), key)
    shapes = {key: tuple(state[key].shape) for key in owners.values()}
    made = numbered(shapes, seed)
    model = model.double() if any(a.dtype == np.float64 for a in made.values()) else model.float()
    state = model.state_dict()
    with torch.no_grad():
        for key, array in made.items():
            state[key].copy_(torch.from_numpy(array))
    after = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return Pair.of(old_file(model), after, model.config.to_dict())


def kind_of(one):
    """What the conversion does, told from the weights: nothing, renames, or more."""
    if one.before.keys() == one.after.keys() and all(
        t.look == one.after[n].look for n, t in one.before.items()
    ):
        return "same"
    looks = [Counter(t.look for t in side.values()) for side in (one.before, one.after)]
    return "rename" if looks[0] == looks[1] else "operation"


def elsewhere(book, three):
    """How a book does on a pair: ("verified" | "refused" | "wrong", why)."""
    names = set(three.before) - dropped_names(book, three), set(three.after)
    sides = (
        (three.before, three.after, *names, book.right),
        (three.after, three.before, *names[::-1], book.left),
    )
    for one, other, read, expected, layout in sides:
        plan = plan_names(book, one, read, layout, three.config)
        if plan is None:
            return "refused", f"to {layout}: the book does not fit"
        made = set()
        try:
            for rule, _, targets, wrong in compare(plan, one, other):
                if wrong:
                    return "wrong", f"to {layout}: {rule}: {wrong[0]}"
                made.update(targets)
        except RegraftError as error:
            return "refused", f"to {layout}: {error.findings[0]}"
        if made != expected:
            odd = sorted(made ^ expected)
            return "wrong", f"to {layout}: {len(odd)} made or missing: {odd[0]}"
    return "verified", ""


def judge(cls):
    """What a learned book is worth, as a line of the output; ``None`` where nothing is registered."""
    sizes = buildable(cls)
    with torch.device("meta"):
        model = cls(config_of(cls, sizes[0]))
    if not registered(model):
        return None
    count = sum(p.numel() for p in model.parameters())
    row = {"elements": count}
    if count > LARGEST:
        return {**row, "verdict": "not built", "why": f"{count} elements at its smallest"}
    pairs, error = [], None
    for seed, each in enumerate(sizes, 1):
        try:
            pairs.append(pair(cls, each, seed))
        except RuntimeError as caught:
            error = error or caught  # on the meta device it looked as if it could be built
        if len(pairs) == 3:
            break
    if not pairs and error is not None:
        raise error
    learned, unseen = pairs[:2], pairs[2:] or pairs[1:] or [pair(cls, sizes[0], 9)]
    if len(pairs) == 2:
        learned = pairs[:1]
    row |= {"sizes": len(pairs), "kind": kind_of(pairs[0])}
    began = time.perf_counter()
    found = learn_pairs(learned, layouts=("old", "new"))
    row["seconds"] = round(time.perf_counter() - began, 2)
    row["rules"] = len(found.book.rules) + len(found.book.module_rules)
    row["asked"] = [[c.source for c in each.choices] for each in found.questions]
    if found.odd:
        name, why = next(iter(found.odd.items()))
        return {**row, "verdict": "not explained", "why": f"{len(found.odd)}: {name}: {why}"}
    if not all(each.equal for each in found.verified):
        return {**row, "verdict": "not verified", "why": "; ".join(found.notes)[:300]}
    verdict, why = elsewhere(found.book, unseen[0])
    return {**row, "verdict": "verified", "elsewhere": verdict, "why": why}


class TooLongError(Exception):
    """A class took too long."""


def run(given):
    """Judge the classes that the file has not yet."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    out = Path(given.out)
    done = {row["class"] for row in read(out)} if out.exists() else set()
    chosen = [
        cls
        for cls in classes()
        if not given.only or any(fnmatch.fnmatch(cls.__name__, glob) for glob in given.only)
    ]
    if given.sample:
        random.Random(given.seed).shuffle(chosen)
        chosen = chosen[: given.sample]

    def late(*_):
        raise TooLongError(f"longer than {given.limit} s")

    signal.signal(signal.SIGALRM, late)
    with out.open("a") as file:
        for cls in chosen:
            if cls.__name__ in done:
                continue
            signal.alarm(given.limit)
            try:
                row = judge(cls)
            except RegraftError as error:
                row = {"verdict": "refused", "why": str(error.findings[0])[:300]}
            except Exception as error:
                text = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                row = {"verdict": "not built", "why": text} if why_not(cls) else None
            finally:
                signal.alarm(0)
            row = row or {"verdict": "not registered"}
            row["class"] = cls.__name__
            row["differs"] = explain(cls.__name__, transformers.__version__)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if given.loud and row["verdict"] != "not registered":
                print(row, flush=True)


def read(path):
    """The lines of an output; the last of each class counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in {row["class"]: row for row in rows}.values() if "verdict" in row]


def table(path):
    """Print the figures, and every miss with its reason."""
    rows = [row for row in read(path) if row["verdict"] not in ("not registered", "not built")]
    for kind in ("rename", "operation", "same", None):
        mine = [row for row in rows if row.get("kind") == kind and not row["differs"]]
        if not mine:
            continue
        good = [row for row in mine if row["verdict"] == "verified"]
        else_ = Counter(row["elsewhere"] for row in good)
        print(
            f"{kind or '?'}: {len(mine)} classes, {len(good)} verified ({len(good) / len(mine):.1%}), "
            f"{else_['verified']} at another size ({else_['verified'] / len(mine):.1%}), "
            f"{else_['wrong']} wrong there, {else_['refused']} refused there, "
            f"{sum(bool(row.get('asked')) for row in good)} of the verified with a question"
        )
    for row in rows:
        if row["verdict"] != "verified" or row["elsewhere"] != "verified":
            word = row["verdict"] if row["verdict"] != "verified" else row["elsewhere"]
            mark = " (parity: differs)" if row["differs"] else ""
            print(f"  {row['class']} {row.get('kind', '?')}: {word}: {row['why']}{mark}")
    for row in read(path):
        if row["verdict"] == "not built":
            print(f"  {row['class']}: not built: {row['why']}")


def main():
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--limit", type=int, default=120, help="seconds for each class")
    parser.add_argument("--out", default="registry.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--loud", action="store_true")
    given = parser.parse_args()
    if not given.table:
        run(given)
    table(Path(given.out))


if __name__ == "__main__":
    main()
