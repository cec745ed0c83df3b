"""PEFT nests several parameters of a module in the order of their registration: a book says it, or it is asked for."""

import json

import numpy as np
import pytest
import torch
import transformers
from making import HEAD, book_of, equation_of

import regraft
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.learning.making import order_questions, with_tables
from regraft.rules.book import library, load_book
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
    told = with_tables(turned, lambda: orders)
    assert order_questions(turned) and not order_questions(told)
    assert [each.names for each in told.parameters] == [("up", "gate", "down")]


class Experts(torch.nn.Module):
    """Stacked experts of a class of one's own, which registers gate, then up."""

    def __init__(self, names=("gate", "up")):
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.rand(EXPERTS, SIZE, SIZE)))


class Model(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"x": Experts(names)}) for _ in "ab")


def split(state):
    """Each expert by itself."""
    return {
        f"{module}.{expert}.{name}.weight": each
        for key, stack in state.items()
        for module, _, name in [key.rpartition(".")]
        for expert, each in enumerate(stack)
    }


def join(state):
    """The way back."""
    stacks = {}
    for key in state:
        module, _, name, _ = key.rsplit(".", 3)
        stacks.setdefault(f"{module}.{name}", []).append(state[key])
    return {key: torch.stack(each) for key, each in stacks.items()}


@pytest.mark.parametrize("names", [("gate", "up"), ("up", "gate")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_live_class_of_any_kind_is_asked_for_the_order(names, side):
    with torch.device("meta"):
        model = Model(names)
    shapes = model.state_dict()
    if side == "left":
        book = regraft.learn_from(split, shapes, model=model)
    else:
        apart = {
            key: np.empty(x.shape[-2:])
            for key, x in split({k: torch.empty(v.shape) for k, v in shapes.items()}).items()
        }
        book = regraft.learn_from(join, apart, model=model)
    assert [(table.sides, table.names) for table in book.parameters] == [((side,), names)]
    assert {kind for rule in book.rules for _, kind in rule.side(side)} == {"experts"}
    with pytest.raises(BadInputError) as caught:
        regraft.learn({"a": np.zeros(2)}, {"b": np.zeros(2)}, model=model)
    assert "neither side has a tensor of the model" in str(caught.value)


def test_a_class_that_a_config_names_is_asked_for_the_order(tmp_path, capsys):
    cls = transformers.Qwen3MoeForCausalLM
    fields = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_experts": 3,
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
        "vocab_size": 33,
    }
    config = cls.config_class(**fields, architectures=[cls.__name__])
    model = cls(config)
    before = {key: x.detach().numpy() for key, x in model.state_dict().items()}
    after = {f"mine.{key}": np.swapaxes(x, 1, 2) if x.ndim == 3 else x for key, x in before.items()}
    for name, state in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        write_tensors(
            tmp_path / name / "model.safetensors",
            {k: np.ascontiguousarray(x) for k, x in state.items()},
            {},
        )
    (tmp_path / "before/config.json").write_text(json.dumps(config.to_dict()))
    book = tmp_path / "book.toml"
    assert main(["learn", str(tmp_path / "before"), str(tmp_path / "after"), "-o", str(book)]) == 0
    (table,) = load_book(book).parameters
    assert table.names == ("gate_up_proj", "down_proj") and table.sides == ("left",)
