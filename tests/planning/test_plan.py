"""What a plan holds, and that it accounts for every key on both sides."""

import json

import numpy as np
import pytest
from generated import equations
from hypothesis import given, settings
from making import HEAD, book_of, equation_of, headers_of, plan_of, rule_book

from regraft.errors import BadInputError, UnmatchedKeysError
from regraft.layouts.graph import edges_to
from regraft.planning.build import build_plan
from regraft.planning.model import Scope

STACK = "{*p}.{l}.experts.{e}.w : o i == {*p}.{l}.experts.w : e o i"
CARRY = '\n[[carry]]\nkeys = ["{*p}.norm.{*q}"]\nwhy = "norms stay"\n'


def fails(book, tensors, kind=BadInputError, **options):
    with pytest.raises(kind) as caught:
        plan_of(book, tensors, where="some/file", **options)
    assert type(caught.value) is kind
    assert all(f.where == "some/file" for f in caught.value.findings)
    return list(caught.value.findings)


def place(book, number=0):
    return str(book.rules[number])


def experts(count, layers=(0,), shape=(2, 3)):
    return {f"m.{layer}.experts.{e}.w": shape for layer in layers for e in range(count)}


def test_a_plan_says_where_everything_goes_from_headers_alone():
    book = book_of(equation_of(STACK, "stack") + CARRY)
    plan = plan_of(book, {**experts(3, (0, 2)), "m.norm.weight": (7,)})
    data = plan.to_dict()
    assert (data["source_layout"], data["target_layout"]) == ("old", "new")
    assert data["books"] == ["test"]
    assert data["rules"] == {place(book): 2}
    (entry,) = data["entries"]
    assert entry["times"] == 2
    assert entry["sizes"] == {"e": 3, "o": 2, "i": 3}
    assert entry["sources"][0]["keys"] == list(experts(3, (0, 2)))
    assert entry["sources"][0]["absent"] == 0
    assert [t["keys"] for t in entry["targets"]] == [["m.0.experts.w", "m.2.experts.w"]]
    assert [tuple(t["shape"]) for t in entry["targets"]] == [(3, 2, 3)]
    (carried,) = data["carried"]
    assert carried["keys"] == ["m.norm.weight"]
    assert carried["why"] == "norms stay"
    assert carried["where"].startswith("test.toml:")
    assert sorted(n for g in plan.targets() for n in g.names()) == [
        "m.0.experts.w",
        "m.2.experts.w",
        "m.norm.weight",
    ]


def test_json_is_the_plan_as_plain_data():
    plan = plan_of(book_of(equation_of(STACK) + CARRY), {**experts(2), "m.norm.weight": (7,)})
    data = json.loads(plan.to_json())
    assert data == json.loads(json.dumps(plan.to_dict()))
    assert data["entries"][0]["targets"] == [{"keys": ["m.0.experts.w"], "shape": [2, 2, 3]}]


def test_printed_it_names_rules_keys_shapes_and_what_is_carried_over():
    book = book_of(equation_of(STACK, "stack") + CARRY)
    text = str(plan_of(book, {**experts(3, (0, 2)), "m.norm.weight": (7,)}))
    for part in (
        "old -> new",
        "stack, 2 times",
        book.rules[0].where,
        "experts.{e}.w",
        "[2, 3]",
        "[3, 2, 3]",
    ):
        assert part in text
    assert "m.norm.weight (1): norms stay" in text


def test_rules_that_did_not_fire_are_counted_too():
    book = rule_book(STACK, "{*p}.{l}.q : o i == {*p}.{l}.r : o i")
    assert plan_of(book, experts(2, range(5))).fired() == {place(book, 0): 5, place(book, 1): 0}


def test_loops_may_have_gaps_and_sizes_of_their_own():
    plan = plan_of(rule_book(STACK), {**experts(2, (3,)), **experts(4, (11,), (5, 6))})
    shapes = {n: e.shape(e.written[0]) for e in plan.entries for n in e.keys(e.written[0]).names()}
    assert shapes == {"m.3.experts.w": (2, 2, 3), "m.11.experts.w": (4, 5, 6)}


def test_what_segments_hold_keeps_families_apart():
    plan = plan_of(
        rule_book(STACK),
        {f"{p}0.experts.{e}.w": (2, 3) for p in ("", "a.1.b.", "a.2.b.") for e in range(2)},
    )
    names = sorted(n for g in plan.targets() for n in g.names())
    assert names == ["0.experts.w", "a.1.b.0.experts.w", "a.2.b.0.experts.w"]


def test_a_gap_in_a_stack_is_an_error_that_names_the_missing_keys():
    book = rule_book(STACK)
    tensors = experts(4)
    del tensors["m.0.experts.1.w"]
    (finding,) = fails(book, tensors)
    assert finding.code == "missing"
    assert "m.0.experts.1.w" in str(finding)
    assert "1 of 4" in finding.message
    assert finding.rule == place(book)
    assert finding.fix


def test_a_stack_that_is_smaller_than_the_config_says_is_an_error():
    book = rule_book(STACK + " where e = config.experts")
    (finding,) = fails(book, experts(3), config={"experts": 5})
    assert finding.code == "missing"
    assert "m.0.experts.3.w, m.0.experts.4.w" in finding.message


def test_an_index_beyond_the_stack_is_an_error():
    book = rule_book(STACK + " where e = config.experts")
    (finding,) = fails(book, experts(4), config={"experts": 3})
    assert finding.code == "extra"
    assert finding.key == "m.0.experts.3.w"
    assert finding.rule == place(book)


def test_a_part_without_its_sibling_is_an_error():
    book = rule_book("{*p}.{l}.a : a i, {*p}.{l}.b : b i == {*p}.{l}.c : (a + b) i where a = b")
    (finding,) = fails(book, {"m.0.a": (2, 3), "m.0.b": (2, 3), "m.1.a": (2, 3)})
    assert finding.code == "missing"
    assert "m.1.b" in str(finding)


def test_a_shape_unlike_its_siblings_is_an_error():
    book = rule_book(STACK)
    found = fails(book, {**experts(3), "m.0.experts.1.w": (2, 4)})
    assert {f.code for f in found} == {"shape"}
    assert found[0].key == "m.0.experts.1.w"
    assert "[2, 4]" in found[0].message
    assert "[2, 3]" in found[0].message


def test_shapes_that_contradict_the_config_are_the_wrong_base():
    book = rule_book(STACK + " where o = config.size")
    (finding,) = fails(book, experts(2), config={"size": 9})
    assert finding.code == "wrong-base"
    assert finding.key == "m.0.experts.0.w"
    assert finding.rule == place(book)
    assert finding.fix


def test_a_bound_is_a_limit_for_rules_and_carry_overs():
    book = book_of(
        equation_of(STACK + " where l < config.layers")
        + '\n[[carry]]\nkeys = ["{*p}.{l}.norm"]\nwhere = "l < config.layers"\nwhy = "norms stay"\n'
    )
    tensors = {**experts(2, range(4)), **{f"m.{layer}.norm": (3,) for layer in range(4)}}
    assert plan_of(book, tensors, config={"layers": 4}).fired() == {place(book): 4}
    assert plan_of(book, tensors, config={}).fired() == {place(book): 4}
    found = fails(book, tensors, config={"layers": 3})
    assert {(f.code, f.key) for f in found} == {
        ("wrong-base", "m.3.experts.0.w"),
        ("wrong-base", "m.3.norm"),
    }
    assert all("3" in f.message and "test.toml:" in f.rule for f in found)


def test_a_carry_over_whose_shape_the_config_contradicts_is_the_wrong_base():
    body = '\n[[carry]]\nkeys = ["{*p}.q : o i"]\nwhere = "i = config.size"\nwhy = "same"\n'
    (finding,) = fails(book_of(body), {"m.q": (2, 3)}, config={"size": 4})
    assert (finding.code, finding.key) == ("wrong-base", "m.q")


def test_a_carry_over_speaks_of_its_books_part_of_the_model_only():
    """The norms of the vision tower are no business of the language model's book."""
    scope = Scope(below="language_model")
    names = {"m.language_model.norm.weight": (3,), "m.vision_tower.norm.weight": (3,)}
    with pytest.raises(UnmatchedKeysError) as caught:
        build_plan(headers_of(names), edges_to([book_of(CARRY)], "new"), scopes={"test": scope})
    assert [f.key for f in caught.value.findings] == ["m.vision_tower.norm.weight"]
    for to in ("new", "old"):
        plan = build_plan(
            headers_of(dict(list(names.items())[:1])),
            edges_to([book_of(CARRY)], to),
            scopes={"test": scope},
        )
        assert [g.names() for g in plan.targets()] == [["m.language_model.norm.weight"]]


def test_unexplained_keys_are_errors_of_their_own_kind():
    book = book_of(equation_of(STACK) + CARRY)
    found = fails(book, {**experts(2), "m.odd.weight": (3,), "z": (1,)}, UnmatchedKeysError)
    assert [(f.code, f.key) for f in found] == [("unmatched", "m.odd.weight"), ("unmatched", "z")]
    assert "test" in found[0].message


def test_old_and_new_keys_together_are_an_error():
    book = rule_book(STACK)
    (finding,) = fails(book, {**experts(2), "m.1.experts.w": (2, 2, 3)})
    assert finding.code == "mixed-layouts"
    assert finding.key == "m.1.experts.w"
    assert finding.rule == place(book)


def test_a_doubled_target_is_an_error():
    book = rule_book("a.{l} : o == c.{l} : o", "b.{l} : o == c.{l} : o")
    (finding,) = fails(book, {"a.0": (2,), "b.0": (2,), "b.1": (2,)})
    assert finding.code == "doubled-target"
    assert finding.key == "c.0"
    assert {place(book, 0), place(book, 1)} == {
        finding.rule,
        finding.message.split("other one is ")[1],
    }


def test_a_target_that_is_a_carried_key_too_is_an_error():
    book = book_of(equation_of("a.{l} : o == b.norm.{l} : o") + CARRY)
    (finding,) = fails(book, {"a.0": (2,), "b.norm.0": (2,)})
    assert finding.key == "b.norm.0"
    assert finding.code in ("doubled-target", "mixed-layouts")


def test_two_rules_that_claim_one_key_with_equal_right_are_an_error():
    book = rule_book("{*p}.x.{l} : o == {*p}.y.{l} : o", "a.{*p}.{l} : o == b.{*p}.{l} : o")
    found = fails(book, {"a.x.0": (2,)})
    assert (found[0].code, found[0].key) == ("two-rules", "a.x.0")
    assert place(book, 0) in str(found[0])
    assert place(book, 1) in str(found[0])


@pytest.mark.parametrize("order", [1, -1])
def test_the_closer_rule_wins(order):
    texts = ["{*p}.x.{l} : o == {*p}.far.{l} : o", "{*p}.b.x.{l} : o == {*p}.near.{l} : o"]
    plan = plan_of(rule_book(*texts[::order]), {"a.b.x.0": (2,), "a.c.x.1": (2,)})
    assert sorted(n for g in plan.targets() for n in g.names()) == ["a.c.far.1", "a.near.0"]


@pytest.mark.parametrize("order", [1, -1])
def test_literal_digits_beat_holes(order):
    texts = ["x.w1 : o == first : o", "x.w{n} : o == other.{n} : o"][::order]
    plan = plan_of(rule_book(*texts), {f"x.w{n}": (2,) for n in range(3)})
    assert sorted(n for g in plan.targets() for n in g.names()) == ["first", "other.0", "other.2"]


def test_a_target_tensors_shape_may_say_a_size():
    book = rule_book("x.{l} : (a + b) == y.{l} : a, z.{l} : b where a = shape(y.{l}, 0)")
    plan = plan_of(book, {"x.0": (5,), "x.1": (5,)}, shapes={"y.0": (2,), "y.1": (4,)})
    shapes = {n: e.shape(t) for e in plan.entries for t in e.written for n in e.keys(t).names()}
    assert shapes == {"y.0": (2,), "z.0": (3,), "y.1": (4,), "z.1": (1,)}


def test_a_size_that_nothing_says_is_an_error_that_asks_for_the_model():
    book = rule_book("x : (a + b) == y : a, z : b where a = config.size")
    (finding,) = fails(book, {"x": (5,)})
    assert finding.code == "unknown-size"
    assert "--model" in finding.fix


def test_all_problems_come_together():
    book = book_of(
        equation_of(STACK, "stack")
        + equation_of("a : (x + y) == b : x, c : y where x = y", "halve")
        + CARRY
    )
    tensors = {**experts(3), "a": (5,), "odd.weight": (1,), "m.1.experts.w": (2, 2, 3)}
    del tensors["m.0.experts.1.w"]
    found = fails(book, tensors)
    assert {f.code for f in found} == {"missing", "wrong-base", "unmatched", "mixed-layouts"}


def test_an_adapters_plan_may_have_holes_and_counts_them():
    book = rule_book(STACK + " where e = config.experts")
    plan = plan_of(
        book,
        {"m.0.experts.2.w": (2, 3), "m.3.experts.0.w": (2, 3)},
        config={"experts": 4},
        partial=True,
    )
    held = {
        tuple(loop): (ids >= 0).tolist()
        for entry in plan.entries
        for loop, ids in zip(entry.loops.tolist(), entry.sources[0], strict=True)
    }
    assert held == {(0,): [False, False, True, False], (3,): [True, False, False, False]}
    assert sum(e["sources"][0]["absent"] for e in plan.to_dict()["entries"]) == 6


def test_the_last_one_seen_tells_a_size_only_where_it_is_the_last_there_is():
    book = rule_book(STACK)
    plan = plan_of(book, {"m.0.experts.2.w": (2, 3)}, partial=True, all_seen=True)
    assert plan.entries[0].sizes["e"] == 3
    (finding,) = fails(book, {"m.0.experts.2.w": (2, 3)}, partial=True)
    assert finding.code == "unknown-size"


def test_several_books_work_side_by_side():
    one = book_of(equation_of("x.{l} : o == y.{l} : o"))
    other = book_of(
        equation_of("v.{l} : o == w.{l} : o where o = config.n"),
        head=HEAD.replace('"test"', '"second"'),
    )
    plan = build_plan(
        headers_of({"x.0": (2,), "v.0": (3,)}),
        edges_to([one, other], "new"),
        scopes={"test": Scope({"n": 9}), "second": Scope({"n": 3})},
    )
    assert sorted(n for g in plan.targets() for n in g.names()) == ["w.0", "y.0"]


def test_no_tensors_are_an_empty_plan():
    plan = plan_of(rule_book(STACK), {})
    assert plan.entries == plan.carried == ()
    assert json.loads(plan.to_json())["entries"] == []


def test_a_config_inside_a_config_and_truth_values():
    scope = Scope({"moe": {"n": 4}, "flag": True, "text": "5"})
    from regraft.equation.notation import ConfigPath

    assert scope.look_up(ConfigPath((("n",), ("moe", "n")))) == 4
    assert scope.look_up(ConfigPath((("flag",),))) is None
    assert scope.look_up(ConfigPath((("text",),))) is None


@pytest.mark.slow
@settings(max_examples=100)
@given(equations())
def test_a_random_plan_names_every_source_and_every_target_once(made):
    for reverse in (False, True):
        read, write = made.sides(reverse)
        shapes = {k: t.shape(made.sizes) for t in read for k in t.keys(made.sizes)}
        plan = plan_of(rule_book(made.text), shapes, "old" if reverse else "new")
        ids = np.concatenate([i.reshape(-1) for e in plan.entries for i in e.sources])
        assert sorted(ids.tolist()) == list(range(len(shapes)))
        data = plan.to_dict()
        got = {
            k: tuple(t["shape"]) for e in data["entries"] for t in e["targets"] for k in t["keys"]
        }
        assert got == {k: t.shape(made.sizes) for t in write for k in t.keys(made.sizes)}
        assert sum(len(t["keys"]) for e in data["entries"] for t in e["targets"]) == len(got)


@pytest.mark.parametrize("to", ["transformers-v5", "mine"])
def test_a_book_that_leads_elsewhere_is_refused_by_name(to):
    book = book_of(equation_of(STACK, "stack") + CARRY)
    with pytest.raises(BadInputError) as caught:
        build_plan(headers_of(experts(3)), edges_to([book], to))
    (finding,) = caught.value.findings
    assert finding.code == "other-layouts"
    assert finding.where == book.path
    assert f"test leads between old and new, and {to} is neither" in finding.message
    assert "--to old" in finding.fix and "--to new" in finding.fix
