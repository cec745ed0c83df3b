"""Forms of LoRA that PEFT has no more, or that only one tool's modules make: read, and rewritten in today's."""

import json

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

PREFIX = "base_model.model."
V5 = "transformers-v5"
random = np.random.default_rng(5)


def whole(*shape):
    return (random.integers(-9, 9, shape) / 16).astype(np.float32)


def save(folder, tensors, config, base):
    (folder / "lora").mkdir(parents=True)
    write_tensors(
        folder / "lora/adapter_model.safetensors",
        {PREFIX + k: v for k, v in tensors.items()},
        {"format": "pt"},
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(base))
    return folder / "lora", folder / "base"


def written(folder):
    tensors = open_tensors(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k.removeprefix(PREFIX): np.array(v) for k, v in tensors.items()}, config


# PEFT 0.1 and 0.2: MergedLinear

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11}
MERGED = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["c_attn"],
    "enable_lora": [True, False, True],
    "merge_weights": False,
    "fan_in_fan_out": True,
    "bias": "none",
}


def merged(layers=2):
    made = {}
    for layer in range(layers):
        path = f"transformer.h.{layer}.attn.c_attn"
        made[f"{path}.lora_A.weight"] = whole(4, 8)
        made[f"{path}.lora_B.weight"] = whole(16, 2, 1)
    return made


def test_the_parts_of_a_fused_layer_are_what_a_grouped_convolution_makes_of_them(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = merged()
    lora, base = save(tmp_path, tensors, MERGED, GPT2)
    report = regraft.convert(lora, tmp_path / "out", to=V5, model=base, verify=True)
    assert any("enable_lora was taken apart" in note for note in report.notes)
    got, config = written(tmp_path / "out")
    assert "enable_lora" not in config and "merge_weights" not in config
    for layer in range(2):
        path = f"transformer.h.{layer}.attn.c_attn"
        a, b = (torch.from_numpy(tensors[f"{path}.lora_{x}.weight"]) for x in "AB")
        # As MergedLinear's forward did, for every unit vector, in two groups.
        out = torch.nn.functional.conv1d(a[None], b, groups=2)[0] * 3.0
        want = np.zeros((24, 8), np.float32)
        want[np.repeat(MERGED["enable_lora"], 8)] = out.numpy()
        product = got[f"{path}.lora_B.weight"] @ got[f"{path}.lora_A.weight"]
        np.testing.assert_array_equal(config["lora_alpha"] / config["r"] * product, want)


@pytest.mark.parametrize("enabled", [[True, True, True, True, True], [1, 0, 1], [False] * 3])
def test_parts_that_the_sizes_do_not_have_are_told(enabled, tmp_path):
    lora, base = save(tmp_path, merged(1), MERGED | {"enable_lora": enabled}, GPT2)
    with pytest.raises(regraft.BadInputError, match="enable_lora"):
        regraft.convert(lora, tmp_path / "out", to=V5, model=base)


# GPT-OSS with a Linear for each expert

OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_local_experts": 3,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


@pytest.mark.parametrize("experts", [(0, 1, 2), (0, 2)], ids=["all", "some"])
@pytest.mark.parametrize("to", [V5, "vllm", "unsloth"])
def test_experts_one_by_one_become_a_stack(to, experts, tmp_path):
    tensors, wanted = {}, {}
    for name, out, into in (("gate_up_projs", 12, 8), ("down_projs", 8, 6)):
        stack = wanted[name] = np.zeros((2, 3, out, into))
        for layer in range(2):
            for expert in experts:
                path = f"model.layers.{layer}.mlp.experts.{name}.{expert}"
                a, b = whole(2, into), whole(out, 2)
                tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
                stack[layer, expert] = 2.0 * b @ a
    named = [f"{n}.{e}" for n in ("gate_up_projs", "down_projs") for e in experts]
    config = {"r": 2, "lora_alpha": 4, "target_modules": named, "peft_version": "0.18.1"}
    lora, base = save(tmp_path, tensors, config, OSS)
    regraft.convert(lora, tmp_path / "out", to=to, model=base, verify=True)
    got, config = written(tmp_path / "out")
    for layer in range(2):
        for name, inner in (("gate_up_projs", ".base_layer"), ("down_projs", "")):
            path = f"model.layers.{layer}.mlp.experts{inner}"
            a, b = (got[f"{path}.lora_{x}.weight"] for x in "AB")
            a, b = a.reshape(3, -1, a.shape[1]), b.reshape(len(b), -1, 3).transpose(2, 0, 1)
            scale = config["lora_alpha"] / a.shape[1]
            np.testing.assert_array_equal(scale * b @ a, wanted[name][layer])
    regraft.convert(tmp_path / "out", tmp_path / "back", to="unsloth-linear", model=base)
    back, _ = written(tmp_path / "back")
    for key, tensor in tensors.items():
        if key.endswith("lora_B.weight"):
            product = back[key] @ back[key.replace("lora_B", "lora_A")]
            np.testing.assert_array_equal(
                product, tensor @ tensors[key.replace("lora_B", "lora_A")]
            )
