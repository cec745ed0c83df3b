"""Stock transformers reads quantised checkpoints as it did before they were converted, and as they are meant."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file  # noqa: E402

import regraft  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "deepseek_v3": LATENT,
}
KEPT = ("lm_head", "embed", "norm", "gate.weight")


def saved(kind, folder):
    """A model with random weights, as ``save_pretrained`` writes it: with the names of transformers 4."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def blocks_of_fp8(weight, size=16):
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // size) * size, -(-columns // size) * size)
    padded[:rows, :columns] = weight
    cells = padded.view(-1, size, padded.shape[1] // size, size)
    scale = cells.abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    narrow = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": narrow, "weight_scale_inv": scale}, narrow.float() * spread


def fp4_among_fp8(weight):
    """Two numbers a byte, a power of two for every 16 of a row."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    cells = weight.reshape(weight.shape[0], -1, 16)
    scale = torch.exp2(torch.ceil(torch.log2(cells.abs().amax(2) / 6)))
    part = cells / scale[..., None]
    code = (part.abs()[..., None] - table).abs().argmin(-1)
    wide = (table[code] * part.sign() * scale[..., None]).reshape(weight.shape)
    code = (code + 8 * (part < 0)).reshape(weight.shape).to(torch.uint8)
    narrow = (code[:, ::2] + 16 * code[:, 1::2]).view(torch.int8)
    return {"weight": narrow, "weight_scale_inv": scale.to(torch.float8_e8m0fnu)}, wide


def per_channel(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    narrow = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": narrow, "weight_scale": scale}, narrow.float() * scale


def channel_config():
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*gate$"],
    }


METHODS = {
    "fp8": (blocks_of_fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "fp8 with fp4": (fp4_among_fp8, {"quant_method": "fp8", "expert_dtype": "fp4"}),
    "compressed-tensors": (per_channel, channel_config()),
}


def write(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def outputs(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantised_model_computes_the_same_after_a_conversion(tmp_path, kind, method):
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    make, quantization = METHODS[method]
    tensors, config = saved(kind, tmp_path / "plain")
    narrow, wide = {}, {}
    for name, weight in tensors.items():
        wide[name] = weight
        if weight.ndim == 2 and not any(part in name for part in KEPT):
            parts, wide[name] = make(weight)
            narrow |= {name.removesuffix("weight") + leaf: part for leaf, part in parts.items()}
        else:
            narrow[name] = weight
    quantised = write(tmp_path / "v4", narrow, {**config, "quantization_config": quantization})
    meant = outputs(write(tmp_path / "wide", wide, config))
    before = outputs(quantised)
    assert (before - meant).abs().max() < 0.05 * meant.abs().max()
    regraft.convert(quantised, tmp_path / "v5", to="transformers-v5")
    assert torch.equal(outputs(tmp_path / "v5"), before)
    regraft.convert(tmp_path / "v5", tmp_path / "back", to="transformers-v4")
    assert torch.equal(outputs(tmp_path / "back"), before)
