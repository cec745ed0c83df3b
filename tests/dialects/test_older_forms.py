"""Forms of LoRA that PEFT has no more, or that only one tool's modules make: read, and rewritten in today's."""

import json
import re

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


# torch's MultiheadAttention, in OpenCLIP's text encoder

SIZE = 8


def encoder():
    """A module with OpenCLIP's names for what is adapted here."""
    torch = pytest.importorskip("torch")
    made = torch.nn.Module()
    blocks = [torch.nn.Module() for _ in range(2)]
    for block in blocks:
        block.attn = torch.nn.MultiheadAttention(SIZE, 2)
        block.attn.in_proj_bias.data.zero_()
    made.transformer = torch.nn.Module()
    made.transformer.resblocks = torch.nn.ModuleList(blocks)
    return made


def deltas_by_peft(folder):
    """What PEFT adds to the weights of such a module when it merges an adapter."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = encoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {k: (v - before[k]).numpy() for k, v in merged.state_dict().items()}


def trained(folder, **options):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn"], **options)
    model = peft.get_peft_model(encoder(), config)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = torch.from_numpy(whole(*x.shape))
    model.save_pretrained(folder)
    return folder


def deltas_of(folder):
    got, config = written(folder)
    made = {}
    for key in got:
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            hits = [a for p, a in (config.get("alpha_pattern") or {}).items() if re.search(p, path)]
            scale = (hits or [config["lora_alpha"]])[0] / config["r"]
            made[path] = scale * got[f"{path}.lora_B.weight"] @ got[key]
    return made


def test_an_attention_of_torch_is_split_and_joined_as_peft_adds_it(tmp_path):
    lora = trained(tmp_path / "lora")
    want = deltas_by_peft(lora)
    regraft.convert(lora, tmp_path / "split", to="diffusers:peft", source="ldm", verify=True)
    got = deltas_of(tmp_path / "split")
    for layer in range(2):
        there, here = (
            f"text_model.encoder.layers.{layer}.self_attn",
            f"transformer.resblocks.{layer}.attn",
        )
        parts = np.split(want[f"{here}.in_proj_weight"], 3)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            np.testing.assert_allclose(got[f"{there}.{name}"], part, atol=1e-5)
        # PEFT adds the delta of out_proj twice.
        whole_delta = want[f"{here}.out_proj.weight"]
        np.testing.assert_allclose(got[f"{there}.out_proj"], whole_delta, atol=1e-5)
    regraft.convert(tmp_path / "split", tmp_path / "back", to="ldm:peft", verify=True)
    back, config = written(tmp_path / "back")
    was, _ = written(lora)
    assert config["target_modules"] == ["attn"]
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in was.items()}


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("out_proj",), ("k_proj", "out_proj")])
def test_zeros_stand_for_the_projections_that_are_not_adapted(names, tmp_path):
    (tmp_path / "lora").mkdir()
    tensors, want = {}, {}
    for name in names:
        path = f"text_model.encoder.layers.1.self_attn.{name}"
        a, b = whole(2, SIZE), whole(SIZE, 2)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        want[name] = 1.5 * b @ a
    write_tensors(tmp_path / "lora/adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(names)}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    regraft.convert(tmp_path / "lora", tmp_path / "out", to="ldm:peft", verify=True)
    got = deltas_by_peft(tmp_path / "out")
    here = "transformer.resblocks.1.attn"
    parts = dict(
        zip(("q_proj", "k_proj", "v_proj"), np.split(got[f"{here}.in_proj_weight"], 3), strict=True)
    )
    parts["out_proj"] = got[f"{here}.out_proj.weight"]
    for name, part in parts.items():
        np.testing.assert_allclose(part, want.get(name, np.zeros_like(part)), atol=1e-5)
