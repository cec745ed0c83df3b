"""`check --for llama.cpp` and `--for mlx`: what these tools do with files as they are."""

import json

import numpy as np
import pytest
from dialects.test_tools import ATTENTION, MLP, make_adapter, make_base, through

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", "llama")


@pytest.fixture
def lora(tmp_path):
    return make_adapter(tmp_path / "lora", ATTENTION)


def outcomes(check):
    return {target.outcome for target in check.targets}


@pytest.mark.parametrize(("tool", "to"), [("llama.cpp", "gguf"), ("mlx", "mlx")])
def test_a_peft_adapter_fails_and_what_is_written_loads(tmp_path, lora, base, tool, to):
    found = regraft.check(lora, tool=tool, model=base)
    assert found.verdict == "fails" and f"--to {to}" in found.fix
    made = through(tmp_path, lora, base, to)
    found = regraft.check(made, tool=tool, model=base)
    assert (found.verdict, outcomes(found), found.failures) == ("full", {"loaded"}, [])


def test_llama_cpp_takes_its_base_only(tmp_path, lora, base):
    made = through(tmp_path, lora, base, "gguf")
    other = make_base(tmp_path / "other", "qwen2")
    found = regraft.check(made, tool="llama.cpp", model=other)
    assert found.verdict == "fails" and "architecture" in found.failures[0]
    small = make_base(tmp_path / "small", "llama", num_hidden_layers=1)
    found = regraft.check(made, tool="llama.cpp", model=small)
    assert found.verdict == "fails"
    assert {t.key for t in found.targets if t.outcome == "fails"} == {
        f"blk.1.attn_{x}.weight" for x in ("q", "k", "v", "output")
    }
    wide = make_base(tmp_path / "wide", "llama", hidden_size=32)
    reasons = {t.reason for t in regraft.check(made, tool="llama.cpp", model=wide).targets}
    assert any("16 where the base has 32" in reason for reason in reasons)


OTHERS = {
    "num_attention_heads": (8, {"q", "o"}),
    "num_key_value_heads": (4, {"k", "v"}),
    "head_dim": (8, {"q", "k", "v", "o"}),
    "intermediate_size": (24, {"gate", "up", "down"}),
    "hidden_size": (32, {"q", "k", "v", "o", "gate", "up", "down"}),
}
GGUF_NAMES = {"attn_output": "o", "attn_q": "q", "attn_k": "k", "attn_v": "v"}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("tool", ["vllm", "sglang", "unsloth", "nemo", "llama.cpp", "mlx"])
def test_every_size_is_compared_with_the_base(tmp_path, base, tool, field):
    lora = make_adapter(tmp_path / "all", ATTENTION | MLP)
    made = through(tmp_path, lora, base, "gguf" if tool == "llama.cpp" else tool)
    size, wanted = OTHERS[field]
    other = make_base(tmp_path / "other", "llama", **{field: size})
    found = regraft.check(made, tool=tool, model=other)
    assert found.verdict == ("wrong-scale" if tool == "vllm" else "fails")
    leaves = {
        t.key.split(".")[-2 if tool == "llama.cpp" else -1] for t in found.targets if t.reason
    }
    names = {GGUF_NAMES.get(leaf, leaf.removeprefix("ffn_")) for leaf in leaves}
    assert {name.removesuffix("_proj") for name in names} == wanted


@pytest.mark.parametrize(
    ("change", "new", "old"),
    [
        ({"keys": ["self_attn.q_proj"]}, "fails", "partial"),
        ({"rank": 8}, "fails", "wrong-scale"),
        ({"scale": ...}, "fails", "fails"),
    ],
)
def test_mlx_makes_layers_by_its_config(tmp_path, lora, base, change, new, old):
    made = through(tmp_path, lora, base, "mlx")
    file = made / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"] |= change
    config["lora_parameters"] = {k: v for k, v in config["lora_parameters"].items() if v is not ...}
    file.write_text(json.dumps(config))
    assert regraft.check(made, tool="mlx", model=base).verdict == new
    assert regraft.check(made, tool="mlx@0.31.3", model=base).verdict == old


def test_mlx_looks_at_the_last_blocks_only(tmp_path, lora, base):
    made = through(tmp_path, lora, base, "mlx")
    file = made / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 1}))
    found = regraft.check(made, tool="mlx@0.31.3", model=base)
    assert found.verdict == "partial"
    assert {t.key.split(".")[2] for t in found.targets if t.outcome == "ignored"} == {"0"}


def test_mlx_has_no_parameter_of_another_name(tmp_path, lora, base):
    made = through(tmp_path, lora, base, "mlx")
    file = made / "adapters.safetensors"
    more = {"model.layers.0.self_attn.q_proj.m": np.ones(16, np.float32)}
    write_tensors(file, {**open_tensors(file), **more}, {})
    assert regraft.check(made, tool="mlx", model=base).verdict == "fails"


def test_the_base_that_a_file_names_is_read(tmp_path, lora, base):
    made = through(tmp_path, lora, base, "mlx")
    file = made / "adapter_config.json"
    config = json.loads(file.read_text()) | {"model": str(base), "num_layers": 1}
    file.write_text(json.dumps(config))
    found = regraft.check(made, tool="mlx")
    assert not any("base is not known" in note for note in found.notes)
    assert found.verdict == "fails"
    assert any("only the last 1 blocks" in target.reason for target in found.targets)
    (lora / "config.json").write_text((base / "config.json").read_text())
    assert not regraft.check(lora, tool="vllm").notes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
    ],
)
@pytest.mark.parametrize("tool", ["vllm", "sglang", "unsloth", "nemo"])
def test_what_is_no_number_is_said(lora, base, tool, field, value):
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    found = regraft.check(lora, tool=tool, model=base)
    assert found.verdict == "fails" and f"{field} is {value!r}" in found.failures[0]


@pytest.mark.parametrize("tool", ["vllm", "sglang", "nemo"])
def test_a_base_that_nothing_tells_is_no_bug(lora, tool):
    """Each way in which a tool treats some model types is looked at then."""
    file = lora / "adapter_config.json"
    config = {**json.loads(file.read_text()), "task_type": "other", "use_rslora": "yes"}
    file.write_text(json.dumps(config))
    assert regraft.check(lora, tool=tool).verdict
