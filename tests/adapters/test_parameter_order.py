"""PEFT nests several parameters of a module in the order of their registration: a book says it, or it is asked for."""

import json

import numpy as np
import pytest
from making import HEAD, book_of, equation_of

import regraft
from regraft.errors import BadInputError
from regraft.learning.making import order_questions, with_tables
from regraft.rules.book import library
from regraft.rules.lint.book import lint_book
from regraft.storage.safetensors import open_tensors, write_tensors

EXPERTS, RANK, SIZE = 2, 3, 8
RULES = "".join(
    equation_of(
        f"m.{{l}}.e.{{e}}.{name}.weight : o i == m.{{l}}.x.{name} : e o i where e = {EXPERTS}, o = {SIZE}, i = {SIZE}",
        name,
        "linear",
        "experts",
    )
    for name in ("down", "gate", "up")
) + equation_of("m.{l}.o.weight : o i == m.{l}.q.weight : o i", "other", "linear", "linear")


def table(*names):
    return f"\n[[parameters]]\nside = 'right'\nmodule = 'm.{{l}}.x'\nnames = {list(names)}\n"


def write_book(folder, body):
    path = folder / "book.toml"
    path.write_text(HEAD + body)
    return path


def write_adapter(folder, tensors, **fields):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "peft_version": "0.19.0", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def unstacked(folder, *names):
    """A LoRA on a projection and on experts of the old layout, each with numbers of its own."""
    rng, tensors = np.random.default_rng(0), {}
    modules = [f"e.{expert}.{name}" for name in names for expert in range(EXPERTS)]
    for module in (*modules, "o"):
        place = f"base_model.model.m.0.{module}"
        tensors[f"{place}.lora_A.weight"] = rng.random((RANK, SIZE), np.float32)
        tensors[f"{place}.lora_B.weight"] = rng.random((SIZE, RANK), np.float32)
    return write_adapter(folder, tensors, target_modules=[*names, "o"])


def converted(tmp_path, body, *names):
    src = unstacked(tmp_path / "src", *names)
    return src, regraft.convert(
        src, tmp_path / "dst", to="new", rules=[write_book(tmp_path, body)], overwrite=True
    )


@pytest.mark.parametrize("body", [RULES, RULES + table("up", "down")], ids=["none", "not all"])
def test_an_order_that_nothing_says_is_an_error_with_the_table_to_add(tmp_path, body):
    with pytest.raises(BadInputError) as caught:
        converted(tmp_path, body, "gate", "up")
    (finding,) = caught.value.findings
    assert finding.code == "parameter-order"
    assert finding.key == "m.{l}.x" and "gate, up" in finding.message
    assert "book.toml" in finding.message and "test/gate" in finding.rule
    assert 'side = "right"; module = "m.{l}.x"' in finding.fix and '"up"' in finding.fix
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("order", [("up", "gate", "down"), ("gate", "down", "up")])
def test_factors_nest_in_the_order_of_the_table(tmp_path, order):
    src, _ = converted(tmp_path, RULES + table(*order), "gate", "up")
    had = open_tensors(src / "adapter_model.safetensors")
    made = open_tensors(tmp_path / "dst" / "adapter_model.safetensors")
    inner, outer = (name for name in order if name != "down")
    for place, name in ((".base_layer", inner), ("", outer)):
        rows = [had[f"base_model.model.m.0.e.{e}.{name}.lora_A.weight"] for e in range(EXPERTS)]
        assert np.array_equal(
            made[f"base_model.model.m.0.x{place}.lora_A.weight"], np.concatenate(rows)
        )


def test_one_parameter_alone_needs_no_table_and_comes_back(tmp_path):
    src, _ = converted(tmp_path, RULES, "gate")
    back = tmp_path / "back"
    regraft.convert(tmp_path / "dst", back, to="old", source="new", rules=[tmp_path / "book.toml"])
    had, made = (open_tensors(p / "adapter_model.safetensors") for p in (src, back))
    assert set(had) == set(made) and all(np.array_equal(had[n], made[n]) for n in had)


def test_reading_several_without_a_table_is_the_same_error(tmp_path):
    converted(tmp_path, RULES + table("up", "gate"), "gate", "up")
    with pytest.raises(BadInputError) as caught:
        regraft.convert(
            tmp_path / "dst",
            tmp_path / "back",
            to="old",
            source="new",
            rules=[write_book(tmp_path, RULES)],
        )
    assert [finding.code for finding in caught.value.findings] == ["parameter-order"]


def test_lint_warns_of_a_book_without_the_table_and_no_book_of_the_library_lacks_one():
    codes = [(f.severity, f.finding.code) for f in lint_book(book_of(RULES))]
    assert ("warning", "parameter-order") in codes
    assert not book_of(RULES + table("up", "gate", "down")).unordered("right")
    assert not [b.name for b in library() for side in ("left", "right") if b.unordered(side)]


def test_a_learned_book_asks_for_the_order_or_has_it_from_the_live_class():
    book = book_of(RULES)
    (question,) = order_questions(book)
    assert 'module = "m.{l}.x"' in question and 'names = ["down", "gate", "up"]' in question
    turned = book_of(
        "".join(
            equation_of(
                f"m.{{l}}.x.{name} : e o i == n.{{l}}.e.{{e}}.{name}.weight : o i where e = 2",
                name,
                "experts",
                "linear",
            )
            for name in ("down", "gate", "up")
        )
    )
    orders = {f"m.{n}.x": ("up", "bias", "gate", "down") for n in range(2)}
    told = with_tables(turned, orders)
    assert order_questions(turned) and not order_questions(told)
    assert [each.names for each in told.parameters] == [("up", "gate", "down")]
