"""A language model's LoRA for the bigger model that has it inside, and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
V4, V5 = "transformers-v4", "transformers-v5"
BIG, TEXT = GOLDEN / "bases/llava_mixtral", GOLDEN / "bases/mixtral"
HOME = "base_model.model.model.language_model."


def text_config():
    """The config of the language model in the big one, as a base of its own."""
    config = json.loads((BIG / "config.json").read_text())["text_config"]
    return config


@pytest.fixture
def text_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(text_config()))
    return tmp_path / "base"


def names_of(folder):
    return set(open_tensors(folder / "adapter_model.safetensors"))


def adapter(folder, prefix="model.", **fields):
    """A LoRA on attention and on the experts of a Mixtral, with a pattern that is tied to its path."""
    config = text_config()
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    random, tensors = np.random.default_rng(0), {}
    sizes = {"self_attn.o_proj": (None, hidden)}
    for e in range(config["num_local_experts"]):
        for name, (out, into) in {
            "w1": (inner, hidden),
            "w3": (inner, hidden),
            "w2": (hidden, inner),
        }.items():
            sizes[f"block_sparse_moe.experts.{e}.{name}"] = into, out
    heads = config["num_attention_heads"] * (
        config.get("head_dim") or hidden // config["num_attention_heads"]
    )
    for layer in range(config["num_hidden_layers"]):
        for module, (into, out) in sizes.items():
            path = f"base_model.model.{prefix}layers.{layer}.{module}"
            rank = 4 if layer == 0 and "o_proj" in module else 2
            shape = (rank, into or heads)
            tensors[f"{path}.lora_A.weight"] = random.standard_normal(shape).astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = random.standard_normal((out, rank)).astype(
                np.float32
            )
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    said = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "peft_version": "0.18.1",
        "target_modules": ["o_proj", "w1", "w2", "w3"],
        "rank_pattern": {rf"^{prefix}layers.0.self_attn.o_proj": 4},
    } | fields  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("to", [V5, V4, "vllm", "unsloth"])
def test_in_and_out_again(to, text_base, tmp_path):
    src = adapter(tmp_path / "src")
    report = regraft.convert(src, tmp_path / "big", to=to, model=BIG, verify=True)
    assert "its paths were moved there" in " ".join(report.notes)
    assert all("language_model." in name for name in names_of(tmp_path / "big"))
    assert main(["verify", str(src), str(tmp_path / "big"), "--model", str(BIG)]) == 0
    report = regraft.convert(
        tmp_path / "big", tmp_path / "out", to=V5, model=text_base, verify=True
    )
    assert "its paths were moved out" in " ".join(report.notes)
    assert main(["verify", str(src), str(tmp_path / "out"), "--model", str(text_base)]) == 0


def test_expressions_follow(text_base, tmp_path):
    src = adapter(tmp_path / "src", target_modules=r"model\.layers\.\d+\..*(o_proj|w[123])")
    regraft.convert(src, tmp_path / "big", to=V4, model=BIG, verify=True)
    config = json.loads((tmp_path / "big/adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)


def test_a_tower_has_no_place_in_a_text_model(text_base, tmp_path):
    src = adapter(tmp_path / "src", "model.language_model.")
    tensors = dict(open_tensors(src / "adapter_model.safetensors"))
    a, b = (
        next(x for n, x in tensors.items() if n.endswith(end)) for end in ("A.weight", "B.weight")
    )
    path = "base_model.model.model.vision_tower.o_proj.lora_"
    write_tensors(
        src / "adapter_model.safetensors",
        tensors | {f"{path}A.weight": a, f"{path}B.weight": b},
        {},
    )
    with pytest.raises(regraft.RefusedError, match="no part of the language model"):
        regraft.convert(src, tmp_path / "out", to=V5, model=text_base)


def test_a_repeated_language_model_is_told(tmp_path):
    src = adapter(tmp_path / "src", "model.language_model.language_model.")
    report = regraft.convert(src, tmp_path / "big", to=V5, model=BIG, verify=True)
    assert "several times" in " ".join(report.notes)
    assert all(name.startswith(HOME + "layers") for name in names_of(tmp_path / "big"))


def test_a_config_in_the_adapter_s_own_folder_is_its_base(tmp_path):
    src = adapter(tmp_path / "src")
    (src / "config.json").write_text(json.dumps(text_config()))
    report = regraft.convert(src, tmp_path / "made", to=V5)
    assert "src/config.json" in " ".join(report.adapters[0].evidence)


def test_a_config_in_the_adapter_s_own_folder_is_no_name_of_the_base(tmp_path):
    src = adapter(tmp_path / "src")
    (src / "config.json").write_text(json.dumps(text_config()))
    said = json.loads((src / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = "somebody/model"
    (src / "adapter_config.json").write_text(json.dumps(said))
    for to in ("vllm", "transformers-v5:nemo"):
        regraft.convert(src, tmp_path / to, to=to)
        made = json.loads((tmp_path / to / "adapter_config.json").read_text())
        assert made["base_model_name_or_path"] == "somebody/model"


def test_inspect_and_explain_follow(text_base, tmp_path, capsys):
    big = adapter(tmp_path / "big", "model.language_model.")
    (told,) = regraft.inspect(big, model=text_base).adapters
    assert any("its paths were moved out" in note for note in told.notes)
    assert ".language_model." not in str(told.targets) and not told.problems
    key = "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_A.weight"
    assert main(["explain", str(big), key, "--model", str(text_base), "--to", V5]) == 0
    assert "model.layers.1.self_attn.o_proj.weight" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["gguf", "mlx", "litgpt", "torchtune", "vllm"])
def test_what_was_moved_out_is_equal_in_any_dialect(to, tmp_path):
    """Of a dense model, whose names are the same in several layouts and not in all."""
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 9}
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"intermediate_size": 6}))
    tensors, random = {}, np.random.default_rng(0)
    for prefix in ("model.", "model.language_model."):
        folder = tmp_path / prefix.strip(".")
        folder.mkdir()
        path = f"base_model.model.{prefix}layers.0.self_attn.q_proj"
        if not tensors:
            tensors = {x: random.normal(size=(2, 8) if x == "A" else (8, 2)) for x in "AB"}
        made = {f"{path}.lora_{x}.weight": t.astype(np.float32) for x, t in tensors.items()}
        write_tensors(folder / "adapter_model.safetensors", made, {"format": "pt"})
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(said))
    base, text, big = (tmp_path / name for name in ("base", "model", "model.language_model"))
    regraft.convert(text, tmp_path / "made", to=to, model=base)
    for one, other in ((big, "made"), ("made", text), ("made", big), (text, big)):
        assert regraft.verify(tmp_path / one, tmp_path / other, model=base).equal, (one, other)


VL = GOLDEN / "cases/qwen3_vl_moe__params"
"""The packed experts of a Qwen3-VL-MoE, whose config names its class."""


@pytest.mark.parametrize("base", ["mixtral", "phimoe", "qwen3_moe"])
def test_what_names_another_family_does_not_move_out(base, tmp_path):
    """Qwen3-MoE is of its family, but its experts changed otherwise than those of the adapter."""
    with pytest.raises(regraft.BadInputError, match="its base is qwen3_vl_moe") as caught:
        regraft.convert(VL, tmp_path / "out", to=V5, model=GOLDEN / "bases" / base)
    (finding,) = caught.value.findings
    assert finding.code == "wrong-base" and base in finding.message and finding.fix
    assert not (tmp_path / "out").exists()


def test_a_check_against_another_family_advises_nothing():
    (verdict,) = regraft.check(VL, model=TEXT, to=V5).verdicts
    assert not verdict.healthy and not verdict.remedy
    assert [finding.code for finding in verdict.findings] == ["wrong-base"]


def test_its_own_language_model_may_have_it(tmp_path):
    (tmp_path / "base").mkdir()
    config = json.loads((GOLDEN / "bases/qwen3_vl_moe/config.json").read_text())["text_config"]
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    report = regraft.convert(VL, tmp_path / "out", to=V5, model=tmp_path / "base", verify=True)
    assert "its paths were moved out" in " ".join(report.notes)


def test_of_many_it_is_converted_without_the_base_of_another(tmp_path, capsys):
    (tmp_path / "all").mkdir()
    shutil.copytree(VL, tmp_path / "all/vl")
    shutil.copytree(GOLDEN / "cases/mixtral__gud_attn", tmp_path / "all/mixtral")
    command = ["convert", str(tmp_path / "all"), str(tmp_path / "made"), "--to", V5]
    assert main([*command, "--model", str(TEXT)]) == 0, capsys.readouterr()
    assert all(".language_model." in name for name in names_of(tmp_path / "made/vl"))


def test_what_names_another_family_does_not_move_in(tmp_path):
    named = {"parent_library": "transformers.models.phimoe.modeling_phimoe"}
    src = adapter(tmp_path / "src", auto_mapping=named)
    with pytest.raises(regraft.BadInputError, match="its base is phimoe"):
        regraft.convert(src, tmp_path / "out", to=V5, model=BIG)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_sizes_are_compared_where_nothing_changes(prefix, text_base, tmp_path):
    src, config = adapter(tmp_path / "src", prefix), text_config()
    regraft.convert(src, tmp_path / "v5", to=V5, model=text_base)
    config["intermediate_size"] *= 2
    (text_base / "config.json").write_text(json.dumps(config))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(tmp_path / "v5", tmp_path / "again", to=V5, model=text_base)
    assert {finding.code for finding in caught.value.findings} == {"wrong-base"}
