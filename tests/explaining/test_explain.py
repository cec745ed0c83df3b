"""What explain says of a key is what becomes of it."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.equation.notation import parse_key
from regraft.explaining.explain import explain
from regraft.explaining.near import closest, part_ways
from regraft.rules.book import load_book, only_books
from regraft.storage.safetensors import open_tensors, write_tensors

with contextlib.suppress(ImportError):
    import transformers  # noqa: F401 - asked in this process then, and not in one for every call

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = sorted(path.name for path in (GOLDEN / "bases").iterdir())
CASES = sorted(path.name for path in (GOLDEN / "cases").iterdir())


def cut(array, place):
    """The block that a place names, as many dims as the array has."""
    slices = []
    for part in place:
        numbers = [int(n) if n else None for n in part.split(":")]
        slices.append(slice(*numbers) if ":" in part else slice(numbers[0], numbers[0] + 1))
    return array[tuple(slices)].reshape([n for n in array[tuple(slices)].shape if n != 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_pieces_are_where_they_are_said_to_be(name, tmp_path):
    base = GOLDEN / "bases" / name
    regraft.convert(base, tmp_path / "out", to="transformers-v5")
    before = open_tensors(base / "model.safetensors")
    after = open_tensors(tmp_path / "out/model.safetensors")
    seen = set()
    for key in before:
        look = re.sub(r"\d+", "#", key)
        if look in seen:
            continue
        seen.add(look)
        found = explain(base, key, to="transformers-v5")
        if found.fate in ("carried", "there"):
            assert found.arrives
            assert np.array_equal(before[key], after[key])
            continue
        assert found.fate == "moved"
        size = 0
        for piece in found.pieces:
            assert piece.source == key
            one, other = (
                cut(before[key], piece.source_place),
                cut(after[piece.target], piece.target_place),
            )
            size += one.size
            turned = other.swapaxes(-1, -2) if other.ndim > 1 else other
            assert np.array_equal(one, other) or np.array_equal(one, turned)
        assert size == before[key].size
        for end in found.targets:
            assert end.shape == after[found.pieces[0].target].shape


def test_a_key_of_the_result():
    found = explain(
        GOLDEN / "bases/mixtral", "model.layers.1.mlp.experts.down_proj", to="transformers-v5"
    )
    assert found.fate == "moved"
    assert [piece.source for piece in found.pieces] == [
        f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)
    ]
    assert [piece.target_place for piece in found.pieces] == [(str(e), ":", ":") for e in range(4)]


@pytest.mark.parametrize(
    "name", [c for c in CASES if (GOLDEN / "cases" / c / "adapter_config.json").exists()]
)
def test_every_adapter_can_be_asked(name):
    """No key of a genuine adapter makes it stumble, whatever becomes of it."""
    case = GOLDEN / "cases" / name
    names = list(open_tensors(case / "adapter_model.safetensors"))
    found = explain(case, names[len(names) // 2], to="transformers-v5")
    assert found.fate != "unknown"
    assert found.arrives or found.problems or found.near


def test_nested_parameters_are_told_apart():
    """PEFT nests the adapters of two parameters of one module; the inner is the one registered first."""
    case = next(
        GOLDEN / "cases" / c for c in CASES if c.startswith("qwen3_vl_moe") and "params" in c
    )
    names = list(open_tensors(case / "adapter_model.safetensors"))
    inner = next(n for n in names if ".experts.base_layer.lora_A" in n)
    outer = inner.replace(".base_layer", "")
    bases = [explain(case, n, to="transformers-v5").base for n in (inner, outer)]
    assert [base.rpartition(".")[2] for base in bases] == ["gate_up_proj", "down_proj"]


def test_no_such_key_names_what_is_alike(capsys):
    base = GOLDEN / "bases/mixtral"
    key = "model.layers.0.block_sparse_moe.experts.1.w4.weight"
    assert main(["explain", str(base), key, "--to", "transformers-v5"]) == 4
    words = capsys.readouterr().out
    assert "it has 'w1' where the key has 'w4'" in words
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in words


def test_a_module_stands_for_its_weight():
    case = GOLDEN / "cases/mixtral__gud_attn"
    module = "model.layers.0.block_sparse_moe.experts.1.w3"
    found = explain(case, module, to="transformers-v5")
    assert found.base == f"{module}.weight"
    assert explain(case, f"base_model.model.{module}", to="transformers-v5").pieces == found.pieces


def test_words_and_json_say_the_same(capsys):
    base = str(GOLDEN / "bases/mixtral")
    key = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    command = ["explain", base, key, "--to", "transformers-v5"]
    assert main(command) == 0
    words = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["where"] in words
    assert f"gate_up_proj[{', '.join(data['pieces'][0]['target_place'])}]" in words
    assert words.isascii()
    assert main([*command, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_own_rule_book(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        "name = 'mine'\ntitle = 'mine'\nleft = 'here'\nright = 'there'\nmodel_types = []\n"
        "[[equation]]\nname = 'all'\ntext = '{*p} : ... == x.{*p} : ...'\n"
        "left_kind = 'any'\nright_kind = 'any'\n"
    )
    base = GOLDEN / "bases/mixtral"
    with only_books([load_book(file)]):
        found = explain(base, "model.norm.weight", to="there", source="here")
    assert found.targets[0].keys == ("x.model.norm.weight",)
    assert found.where == f"{file}:6"


def test_parting():
    template = parse_key("{*p}.layers.{l}.mlp.{*q}.w1")
    assert part_ways("m.layers.0.mlp.a.b.w1", template).cost == 0
    assert part_ways("layers.0.mlp.w1", template).cost == 0
    wrong = part_ways("m.layers.x.mlp.w1", template)
    assert (wrong.at, wrong.expected, wrong.found) == (2, "{l}", "x")
    more = part_ways("layers.0.w1", template)
    assert (more.at, more.expected, more.found) == (2, "mlp", None)


def test_closest_is_quick_and_right():
    names = [f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(40) for e in range(100)]
    assert closest("model.layers.7.mlp.expert.13.w1", names) == (
        "model.layers.7.mlp.experts.13.w1",
    )
    assert closest("nothing.like.it", names) == ()


@pytest.mark.parametrize(
    ("case", "end", "fate", "role"),
    [
        ("mixtral__ia3_attn", "k_proj.ia3_l", "carried", "ia3_l of IA³"),
        ("mixtral__dora", "w1.lora_magnitude_vector", "moved", "lora_magnitude_vector of DoRA"),
        ("mixtral__dora", "k_proj.lora_B.weight", "carried", "lora_B.weight of DoRA"),
    ],
)
def test_tensors_of_other_families_are_about_their_weights(case, end, fate, role):
    folder = GOLDEN / "cases" / case
    key = next(k for k in open_tensors(folder / "adapter_model.safetensors") if k.endswith(end))
    found = explain(folder, key, to="transformers-v5")
    assert (found.fate, found.role) == (fate, role)
    module = key.removeprefix("base_model.model.").removesuffix("." + end.partition(".")[2])
    assert found.base == f"{module}.weight"
    assert any(f"it is {role}" in step for step in found.steps)
    # A family that cannot follow is refused, and the way that the weight goes is told all the same.
    assert bool(found.problems) == (fate == "moved")


@pytest.mark.parametrize("kind", ["VERA", "PROMPT_TUNING"])
def test_tensors_of_no_module_stay(kind, tmp_path):
    ones = np.ones((4, 16), np.float32)
    module = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {"prompt_embeddings": ones}
    if kind == "VERA":
        tensors = {
            "base_model.vera_A": ones,
            "base_model.vera_B": np.ones((16, 4), np.float32),
            module + "vera_lambda_b": ones[0],
            module + "vera_lambda_d": ones[:, 0],
        }
    config = {"peft_type": kind, "r": 4, "target_modules": ["q_proj"], "save_projection": True}
    config["projection_prng_key"] = 0
    if kind != "VERA":
        config = {"peft_type": kind, "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = GOLDEN / "bases/mixtral"
    for key in tensors:
        found = explain(tmp_path, key, to="transformers-v5", model=model)
        assert found.fate == "carried" and found.arrives
        if not key.startswith(module):
            assert "the result has it as it is" in found.why
