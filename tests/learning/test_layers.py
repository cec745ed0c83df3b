"""Layers that a converter treats otherwise than the rest: which ones, at sizes that were not learned from."""

import numpy as np
import pytest
from making import plan_of

from regraft import AmbiguousError, BadInputError, learn_from
from regraft.arrays.apply import apply_plan
from regraft.learning.learn import learn_pairs, learn_telling
from regraft.learning.pairs import Pair
from regraft.learning.probe import labels


def config(hidden, inner, layers, dense):
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "first_k_dense": dense,
    }


SIZES = [config(6, 10, 4, 1), config(9, 14, 6, 2)]
UNSEEN = config(12, 22, 9, 4)


def shapes(of):
    layers = range(of["num_hidden_layers"])
    pair = {"w": (of["hidden_size"],) * 2, "v": (of["intermediate_size"], of["hidden_size"])}
    return {f"layers.{n}.{k}.weight": shape for n in layers for k, shape in pair.items()}


def last(n, of):
    return n == of["num_hidden_layers"] - 1


def first(n, of):
    return n == 0


def dense(n, of):
    return n < of["first_k_dense"]


def at_the_end(n, of):
    return n >= of["num_hidden_layers"] - of["first_k_dense"]


def odd(n, of):
    return n % 2 == 1


def turned(n, w, v, special):
    return {f"b.{n}.w.weight": w.T if special else w, f"b.{n}.v.weight": v}


def turned_in_place(n, w, v, special):
    return {f"layers.{n}.w.weight": w.T if special else w, f"layers.{n}.v.weight": v}


def called_otherwise(n, w, v, special):
    return {f"{'dense' if special else 'b'}.{n}.w.weight": w, f"b.{n}.v.weight": v}


def joined(n, w, v, special):
    if special:
        return {f"b.{n}.wv.weight": np.concatenate([w, v])}
    return {f"b.{n}.w.weight": w, f"b.{n}.v.weight": v}


def dropped(n, w, v, special):
    return {f"b.{n}.v.weight": v} | ({} if special else {f"b.{n}.w.weight": w})


class Converter:
    """Treats some layers in another way."""

    def __init__(self, how, special, sizes):
        self.how, self.special, self.sizes = how, special, sizes

    def __call__(self, state):
        of = next(c for c in self.sizes if shapes(c) == {k: x.shape for k, x in state.items()})
        made = {}
        for n in range(of["num_hidden_layers"]):
            w, v = (state[f"layers.{n}.{k}.weight"] for k in "wv")
            made |= self.how(n, w, v, self.special(n, of))
        return made

    def learned(self, choose=()):
        return learn_from(
            self, [shapes(c) for c in self.sizes], configs=self.sizes, choose=choose, torch=False
        )


def holds_elsewhere(book, how, special):
    draw = np.random.default_rng(1)
    state = {k: draw.standard_normal(s).astype(np.float32) for k, s in shapes(UNSEEN).items()}
    wanted = Converter(how, special, [UNSEEN])(state)
    made = apply_plan(plan_of(book, state, "after", config=UNSEEN), list(state.values()))
    back = apply_plan(plan_of(book, wanted, "before", config=UNSEEN), list(wanted.values()))
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[k], wanted[k]) for k in wanted)
    assert all(np.array_equal(back[k], state[k]) for k in back)
    return len(state) - len(back)


@pytest.mark.parametrize("special", [last, first, dense, at_the_end])
@pytest.mark.parametrize("how", [turned, turned_in_place, called_otherwise, joined])
def test_layers_that_differ_are_found_at_every_size(how, special):
    book = Converter(how, special, SIZES).learned()
    assert holds_elsewhere(book, how, special) == 0


def test_layers_of_which_something_is_dropped():
    book = Converter(dropped, dense, SIZES).learned()
    assert holds_elsewhere(book, dropped, dense) == UNSEEN["first_k_dense"]


def test_clauses_are_the_configs():
    book = Converter(turned, last, SIZES).learned()
    clauses = [" ".join(str(rule.equation).partition("where ")[2].split()) for rule in book.rules]
    assert "layer is config.num_hidden_layers - 1 | last" in clauses
    book = Converter(called_otherwise, dense, SIZES).learned()
    clauses = [" ".join(str(rule.equation).partition("where ")[2].split()) for rule in book.rules]
    assert "layer from config.first_k_dense" in clauses


@pytest.mark.parametrize(
    ("special", "sizes", "choices", "answer"),
    [
        (last, [config(6, 10, 4, 2), config(9, 14, 4, 3)], {"3"}, "config.num_hidden_layers - 1"),
        (dense, [config(6, 10, 4, 1), config(9, 14, 6, 1)], {"1"}, "config.first_k_dense"),
        (dense, [config(6, 10, 4, 2), config(9, 14, 6, 2)], {"2"}, "config.first_k_dense"),
        (
            at_the_end,
            [config(6, 10, 4, 1), config(9, 14, 6, 1)],
            {"config.num_hidden_layers - 1"},
            "config.num_hidden_layers - config.first_k_dense",
        ),
    ],
)
def test_layers_that_two_readings_say_are_asked(special, sizes, choices, answer):
    converter = Converter(turned, special, sizes)
    with pytest.raises(AmbiguousError) as error:
        converter.learned()
    (finding,) = error.value.findings
    assert choices | {answer} <= {choice.source for choice in finding.choices}
    assert "which layers" in finding.message
    book = converter.learned(choose=[answer])
    assert holds_elsewhere(book, turned, special) == 0


def test_numbers_that_no_field_says_are_asked():
    """Every second layer of four is 1 and 3 at both sizes: nothing shows what it is of six."""
    converter = Converter(turned, odd, [config(6, 10, 4, 1), config(9, 14, 4, 2)])
    with pytest.raises(AmbiguousError, match="which layers are meant"):
        converter.learned()


def every(turns, *rest):
    return lambda n, of: n % turns in (rest or (turns - 1,))


def halved(n, w, v, special):
    return {
        f"{'slow' if special else 'fast'}.{n // 2}.{k}.weight": x for k, x in (("w", w), ("v", v))
    }


def of_layers(*counts):
    return [config(6 + 3 * n, 10 + 4 * n, count, 7) for n, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("how", "special", "counts"),
    [
        (turned, odd, (4, 6)),
        (turned, every(3), (4, 6)),
        (turned_in_place, odd, (2, 5)),
        (called_otherwise, odd, (4, 7)),
        (called_otherwise, every(3), (2, 9)),
        (called_otherwise, every(4, 1, 2), (8, 12)),
        (joined, every(4), (4, 8)),
        (halved, odd, (4, 6)),
    ],
)
def test_layers_that_come_again_are_told_by_their_turn(how, special, counts):
    book = Converter(how, special, of_layers(*counts)).learned()
    assert holds_elsewhere(book, how, special) == 0


@pytest.mark.parametrize("how", [turned, called_otherwise])
@pytest.mark.parametrize(
    ("special", "counts"),
    [
        (every(4), (4, 6)),  # the fourth of six: or every fourth
        (every(4), (2, 3, 4)),
        (lambda n, of: n >= 2 and n % 2 == 0, (2, 3, 4)),
        (lambda n, of: (n * n + of["num_hidden_layers"]) % 5 == 1, (5, 9)),
    ],
)
def test_layers_of_which_nothing_says_which_they_are_make_no_book(how, special, counts):
    with pytest.raises((AmbiguousError, BadInputError)):
        Converter(how, special, of_layers(*counts)).learned()


@pytest.mark.parametrize("fields", [{"types": "fsfsfsfsf"}, {"full_interval": 2}])
def test_what_the_config_says_of_layers_is_not_taken_for_their_turn(fields):
    sizes = of_layers(4, 6)
    for size in sizes:
        size |= {
            k: list(v)[: size["num_hidden_layers"]] if k == "types" else v
            for k, v in fields.items()
        }
    with pytest.raises(AmbiguousError, match="which layers are meant"):
        Converter(turned, odd, sizes).learned()


@pytest.mark.parametrize("start", [1, 2, 3])
def test_layers_that_a_small_size_has_none_of(start):
    book = Converter(turned, lambda n, of: n >= start, of_layers(start, 9)).learned()
    assert holds_elsewhere(book, turned, lambda n, of: n >= start) == 0


def test_a_probe_with_many_layers_tells_what_comes_again():
    sizes = of_layers(2, 3, 4)

    def learned():
        pairs = [
            Pair.of(state, Converter(turned, every(4), [of])(state), of)
            for of, state in drawn(sizes)
        ]
        return learn_pairs(pairs, layouts=("before", "after"))

    def probe(changed):
        sizes.insert(1, {**sizes[0], **changed})
        return True

    found = learn_telling(learned, sizes[0], probe)
    assert len(sizes) == 4 and not found.questions
    assert holds_elsewhere(found.book, turned, every(4)) == 0


def drawn(sizes):
    return [(of, labels(shapes(of), number)) for number, of in enumerate(sizes)]


def test_numbers_that_count_nothing_are_asked_nothing():
    """`w1`, `w2` and `w3` are three weights, whatever is made of them."""

    def convert(state):
        return {f"b.{k}": x.T if k.endswith("w3") else x for k, x in state.items()}

    def of(layers, size):
        return {f"{n}.w{m}": (size, size) for n in range(layers) for m in (1, 2, 3)}

    book = learn_from(convert, [of(2, 3), of(3, 5)], configs=[{"n": 4}, {"n": 4}], torch=False)
    texts = {" ".join(str(rule.equation).split()) for rule in book.rules}
    assert "{l}.w3 : a b == b.{l}.w3 : b a" in texts
    assert not any("layer" in text for text in texts)
