"""How many converters with a known rule are learned, and whether any that has none is taken for one.

    python scripts/learn/planted.py [--count N] [--seed N]

Every planted converter is composed of one to three equations drawn from the notation by Hypothesis, of renames with
computed numbers, of tensors that are dropped, and now and then of a cast. It is learned from two sizes and is *found*
where the book does to random weights of a third size what the converter does, in both directions. What is not
explained is *missed*; a book that says it is sound and does something else is *wrong*.

The others change values: whatever is learned of them as sound is *wrong*.
"""

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import numpy as np
from generated import equations
from hypothesis import HealthCheck, Phase, given, seed, settings
from making import plan_of

from regraft.arrays.apply import apply_plan
from regraft.errors import RegraftError
from regraft.learning.learn import learn_telling
from regraft.learning.watch import watch

LARGEST = 40_000
"""Elements of an equation."""
STEPS = (3, 4, 2, 5, 6)
TABLE = [
    (STEPS[n % 5], STEPS[(n + 1 + n // 5) % 5], STEPS[(2 * n + n // 5) % 5]) for n in range(20)
] + [each for n in STEPS for each in ((7, n, 3), (n, 7, 4))]
"""Sizes of axes, in turn, each at three models: no two axes are alike at the first two."""

SHAPES = [{"a.weight": s, "b.weight": s, "v": s[:1]} for s in ((12, 14), (18, 22))]
"""What the converters read that are no layout changes."""


def drawn(count, number):
    """So many random equations."""
    found = []

    @seed(number)
    @settings(
        max_examples=3 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(equations())
    def draw(made):
        found.append(made)

    draw()
    return found


class Planted:
    """A converter made of equations, each about names of its own."""

    def __init__(self, parts, dice):
        self.parts = parts
        self.step, self.first = dice.choice([1, 2, 3]), dice.choice([0, 1, 4])
        self.drops = dice.random() < 0.3
        self.cast = np.float16 if dice.random() < 0.2 else np.float32

    def resize(self, size, but=None):
        """Give all axes other sizes, some as they are in ``but``; returns the config that says them."""
        config = {"model_type": "planted"}
        table = cycle(TABLE)
        for number, made in enumerate(self.parts):
            sizes = {n: next(table)[size] for n in made.sizes}
            made.sizes = {n: (but or {}).get(f"part{number}_{n}", v) for n, v in sizes.items()}
            config |= {f"part{number}_{n}": v for n, v in made.sizes.items()}
        self.layers = 2 + size
        return config

    def shapes(self):
        """Names and shapes of what it reads."""
        shapes = {f"keep.{n}.norm": (5 + self.layers,) for n in range(self.layers)}
        if self.drops:
            shapes["extra.buffer"] = (3, self.layers)
        for number, made in enumerate(self.parts):
            for term in made.left:
                for key in term.keys(made.sizes):
                    shapes[f"part{number}.{key}"] = term.shape(made.sizes)
        return shapes

    def elements(self):
        """How many elements it reads at the sizes that it has."""
        return sum(int(np.prod(shape)) for shape in self.shapes().values())

    def __call__(self, state):
        made = {
            f"k.{self.step * n + self.first}.ln": state[f"keep.{n}.norm"]
            for n in range(self.layers)
        }
        for number, part in enumerate(self.parts):
            prefix = f"part{number}."
            mine = {k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)}
            made |= {f"new{number}.{k}": x for k, x in part.moved(mine).items()}
        return {k: x.astype(self.cast) for k, x in made.items()}


def random_state(shapes):
    """Weights that are no probe."""
    draw = np.random.default_rng(5)
    return {
        k: draw.standard_normal(s).astype(np.float16).astype(np.float32) for k, s in shapes.items()
    }


def applied(book, state, to, config):
    """What a book makes of a state dict."""
    return apply_plan(plan_of(book, state, to, config=config), list(state.values()))


def same(one, other):
    """Whether two state dicts are equal, whatever the type of their elements."""
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def watched(planted, probes):
    """What is learned of a converter at some sizes."""
    configs = [resize() for resize in probes]
    headers = [resize() and planted.shapes() for resize in probes]

    def convert(state):
        for resize, shapes in zip(probes, headers, strict=True):
            if state.keys() == shapes.keys() and _fits(state, shapes):
                resize()
                return planted(state)
        raise AssertionError("no probe")

    return watch(convert, headers, configs=configs, torch=False)


def judge(planted):
    """Whether a converter's rule is found: (``found`` | ``missed`` | ``wrong``, why)."""
    probes = [partial(planted.resize, size) for size in range(2)]

    def more(changed):
        # As the command does: one more probe, in which readings that fit alike differ.
        probes.append(partial(planted.resize, 0, changed))
        return True

    try:
        found = learn_telling(lambda: watched(planted, probes), planted.resize(0), more)
    except RegraftError as error:
        return "missed", str(error.findings[0])
    if found.odd or not all(each.equal for each in found.verified):
        return "missed", next(iter(found.odd.values()), "not verified")
    if found.questions:
        choices = [c.source for c in found.questions[0].choices]
        return "asked", f"{found.questions[0].message} {choices}"
    config = planted.resize(2)
    state = random_state(planted.shapes())
    wanted = planted(state)
    kept = {k: x for k, x in state.items() if k not in found.unused}
    try:
        made = applied(found.book, kept, "after", config)
        back = applied(
            found.book, {k: x.astype(np.float32) for k, x in wanted.items()}, "before", config
        )
    except RegraftError as error:
        return "missed", f"elsewhere: {error.findings[0]}"
    if same(made, wanted) and same(back, kept):
        return "found", ""
    return "wrong", "it makes something else at a third size"


def _fits(state, shapes):
    return all(x.shape == shapes[k] for k, x in state.items())


def _others():
    """Converters that are no layout changes, by name."""
    noise = np.random.default_rng(3)

    def of(change):
        return lambda state: {**state, "a.weight": change(state["a.weight"])}

    def both(change):
        return lambda state: {
            "ab.weight": change(state["a.weight"], state["b.weight"]),
            "v": state["v"],
        }

    fixed = noise.standard_normal((12, 22)).astype(np.float32)
    return {
        "noise": of(
            lambda x: x + np.random.default_rng(7).normal(0, 1e-3, x.shape).astype(x.dtype)
        ),
        "noise that differs": of(lambda x: x + noise.normal(0, 1e-3, x.shape).astype(x.dtype)),
        "rows sorted by their norm": of(lambda x: x[np.argsort(np.linalg.norm(x, axis=1))]),
        "values sorted": of(lambda x: np.sort(x, axis=1)),
        "rows shuffled": of(lambda x: x[np.random.default_rng(7).permutation(len(x))]),
        "quantised and back": of(
            lambda x: np.round(x * 127 / abs(x).max()).astype(np.float32) * abs(x).max() / 127
        ),
        "to int8": of(lambda x: np.round(x * 127 / abs(x).max()).astype(np.int8)),
        "a scale folded in": of(lambda x: x * np.float32(1.25)),
        "scaled by another tensor": lambda s: {**s, "a.weight": s["a.weight"] * s["v"][:, None]},
        "one added (a norm of Gemma)": of(lambda x: x + 1),
        "rows normalised": of(lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)),
        "centred": of(lambda x: x - x.mean(0)),
        "averaged": both(lambda a, b: (a + b) / 2),
        "summed": both(lambda a, b: a + b),
        "the product of two": both(lambda a, b: a @ b.T),
        "the larger of two": both(np.maximum),
        "random rows added": of(
            lambda x: np.concatenate([x, noise.random((2, x.shape[1]), np.float32)])
        ),
        "fixed random rows added": of(lambda x: np.concatenate([x, fixed[:2, : x.shape[1]]])),
        "a missing tensor made up": lambda s: {**s, "new": fixed},
        "rows repeated by their mean": of(lambda x: np.concatenate([x, x.mean(0, keepdims=True)])),
        "clipped": of(lambda x: np.clip(x, 1.2, 1.8)),
        "small ones set to zero": of(lambda x: np.where(x < 1.3, 0, x).astype(x.dtype)),
        "cast and scaled": of(lambda x: (x * 2).astype(np.float16)),
        "cast and rounded": of(lambda x: np.round(x).astype(np.float16)),
        "negated halves": of(lambda x: np.concatenate([-x[6:], x[:6]])),
        "the real part of a spectrum": of(lambda x: np.fft.fft(x).real.astype(np.float32)),
        "the best of a decomposition": of(lambda x: np.linalg.svd(x)[2].astype(np.float32)),
    }


def main():
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loud", action="store_true")
    given_ = parser.parse_args()
    warnings.simplefilter("ignore")
    dice, pool = random.Random(given_.seed), drawn(given_.count, given_.seed)
    counts, began = Counter(), time.perf_counter()
    misses = Counter()
    while pool and counts.total() < given_.count:
        parts = [pool.pop() for _ in range(min(len(pool), dice.choice([1, 1, 2, 3])))]
        planted = Planted(parts, dice)
        if max(planted.resize(size) and planted.elements() for size in range(3)) > LARGEST:
            continue
        verdict, why = judge(planted)
        counts[verdict] += 1
        if verdict != "found":
            misses[why.split(": ")[-1][:90]] += 1
        if given_.loud and verdict != "found":
            print(verdict, why, *(part.text for part in parts), sep="\n")
    print(
        f"planted: {counts['found']} of {counts.total()} found, {counts['missed']} said to be missed, "
        f"{counts['asked']} asked, "
        f"{counts['wrong']} wrong"
    )
    for why, count in misses.most_common():
        print(f"  {count} x {why}")
    wrong = []
    others = _others()
    for name, convert in others.items():
        try:
            found = watch(convert, SHAPES, torch=False)
        except RegraftError:
            continue
        if found.sound:
            wrong.append(name)
    print(f"no layout changes: {len(others)} tried, {len(wrong)} taken for one {wrong or ''}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
