"""vLLM and SGLang, by model type: names that each of them has for a model, and models that it takes no adapters for."""

import json

import numpy as np
import pytest
from dialects.test_tools import (
    ATTENTION,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    WORDS,
    make_adapter,
    make_base,
    modules_of,
    through,
)

import regraft
from regraft.dialects.served import demands_table
from regraft.storage.safetensors import open_tensors, write_tensors

V5 = "transformers-v5"


def tensors_of(folder):
    return open_tensors(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def packed(folder, module, rank=2):
    """A LoRA of stacked experts as PEFT 0.19 packs it, (E, out, in)."""
    random, tensors, parameters = np.random.default_rng(0), {}, []
    for layer in range(LAYERS):
        at = f"base_model.model.model.layers.{layer}.{module}"
        sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        for leaf, (out, into) in sizes.items():
            place = at + ".base_layer" * (leaf == "gate_up_proj")
            for letter, shape in (("A", (EXPERTS * rank, into)), ("B", (out, rank * EXPERTS))):
                numbers = random.integers(1, 9, shape) / 16
                tensors[f"{place}.lora_{letter}.weight"] = numbers.astype(np.float32)
            parameters.append(f"model.layers.{layer}.{module}.{leaf}")
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": []}
    about |= {"target_parameters": parameters, "peft_version": "0.19.0"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_experts_that_no_checkpoint_has_apart_are_split_where_transformers_5_has_them(tmp_path, to):
    """Granite's checkpoints have ``input_linear``; its servers call an expert's parts ``experts.0.gate_proj``."""
    base = make_base(tmp_path / "base", "granitemoe", num_local_experts=EXPERTS)
    lora = packed(tmp_path / "lora", "block_sparse_moe.experts")
    made = through(tmp_path, lora, base, to)
    leaves = {name.split("experts.")[1].split(".lora")[0] for name in tensors_of(made)}
    wanted = {f"{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")}
    assert leaves == wanted
    back = through(tmp_path, lora, base, to, V5)
    assert regraft.verify(lora, back, model=base).equal


def test_sglang_is_told_the_names_that_it_gives_to_experts(tmp_path):
    """It renames w1 in the file and not in ``target_modules``, and has no buffers for w1."""
    base = make_base(tmp_path / "base", "mixtral")
    shapes = {k: v for k, v in modules_of("mixtral").items() if not k.endswith(".gate")}
    lora = make_adapter(tmp_path / "lora", shapes)
    made = through(tmp_path, lora, base, "sglang")
    named = {entry.rpartition(".")[2] for entry in config_of(made)["target_modules"]}
    assert named == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert regraft.check(made, tool="sglang", model=base).verdict == "full"
    assert regraft.verify(lora, through(tmp_path, lora, base, "sglang", V5), model=base).equal
    config = config_of(made) | {"target_modules": config_of(lora)["target_modules"]}
    (made / "adapter_config.json").write_text(json.dumps(config))
    found = regraft.check(made, tool="sglang", model=base)
    assert found.verdict == "fails" and "no buffers" in found.failures[0]


def test_sglang_has_no_buffers_for_other_modules(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    lora = make_adapter(tmp_path / "lora", ATTENTION | {"mixer.in_proj": (8, 16)})
    found = regraft.check(lora, tool="sglang", model=base)
    assert {t.key for t in found.targets if t.outcome == "fails"} == {
        f"model.layers.{layer}.mixer.in_proj" for layer in range(LAYERS)
    }


def test_a_head_is_for_models_that_say_so(tmp_path):
    shapes = ATTENTION | {"lm_head": (WORDS, HIDDEN)}
    for model_type, takes in (("llama", True), ("qwen2", False)):
        base = make_base(tmp_path / model_type, model_type)
        lora = make_adapter(tmp_path / f"{model_type}-lora", shapes)
        verdict = regraft.check(lora, tool="vllm", model=base).verdict
        assert verdict == ("full" if takes else "fails")
        if takes:
            through(tmp_path, lora, base, "vllm")
        else:
            with pytest.raises(regraft.RefusedError, match="no LoRA on lm_head"):
                through(tmp_path, lora, base, "vllm")


def test_models_that_take_no_adapters_are_refused_and_unknown_ones_said(tmp_path):
    lora = make_adapter(tmp_path / "lora", ATTENTION)
    refused = make_base(tmp_path / "refused", "dbrx")
    names = {"model.layers": "transformer.blocks", "self_attn": "norm_attn_norm.attn"}
    other = make_adapter(tmp_path / "other-lora", {"self_attn.out_proj": (16, 16)})
    for old, new in names.items():
        tensors = {name.replace(old, new): x.copy() for name, x in tensors_of(other).items()}
        write_tensors(other / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = config_of(other) | {"target_modules": ["out_proj"]}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(regraft.RefusedError, match="takes no LoRA for dbrx"):
        regraft.convert(other, tmp_path / "out", to="vllm", model=refused)
    assert "takes no LoRA" in regraft.check(other, tool="vllm", model=refused).failures[0]
    unknown = make_base(tmp_path / "unknown", "smollm3")
    notes = " ".join(regraft.convert(lora, tmp_path / "made", to="vllm", model=unknown).notes)
    assert "has no model of its own for smollm3" in notes
    known = make_base(tmp_path / "known", "llama")
    notes = regraft.convert(lora, tmp_path / "other", to="vllm", model=known).notes
    assert not any("not known" in note for note in notes)


def test_the_tables_do_not_contradict_themselves():
    table = demands_table("vllm")
    row = table.rows["default"]
    assert not set(row["adapts"]) & set(row["refuses"])
    for tool in ("vllm", "sglang", "nemo"):
        for each in demands_table(tool).rows.get("models", ()):
            for name in each["model_types"]:
                assert demands_table(tool).for_model([name]).packed in (True, False)
