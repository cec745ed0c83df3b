"""Layers for predicting further tokens: converted with the rest in files and in memory, and no illness to `check`."""

import json
import warnings

import pytest
import torch
from checkpoints.models import write_folder

import regraft
from regraft.checking.check import check
from regraft.errors import BadInputError, UnmatchedKeysError
from regraft.live.state_dict import convert_state_dict
from regraft.rules.mtp import WHY
from regraft.storage.safetensors import open_tensors

V4, V5 = "transformers-v4", "transformers-v5"
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
}
KINDS = {
    "glm4_moe": (
        {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
            "num_nextn_predict_layers": 1,
        },
        "model.layers.2.",
        ("eh_proj.weight", "enorm.weight", "shared_head.norm.weight"),
    ),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "num_nextn_predict_layers": 1, "moe_k": 2},
        "model.mtp_block.0.",
        ("../../mtp_emb_norm.0.weight", "../../mtp_linear_proj.0.weight"),
    ),
    "qwen3_next": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 4,
            "layer_types": ["full_attention"] * 2,
        },
        "mtp.layers.0.",
        ("../../fc.weight", "../../pre_fc_norm_hidden.weight"),
    ),
    # No book of regraft's own: the registry of transformers.
    "exaone_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "mtp.layers.0.",
        ("../../fc.weight",),
    ),
}


def beside(path, name):
    """A name beside the layers: one segment up for each ``..``."""
    segments = path.rstrip(".").split(".")
    while name.startswith("../"):
        segments, name = segments[:-1], name[3:]
    return ".".join([*segments, name])


@pytest.fixture(scope="module", params=list(KINDS))
def made(request, tmp_path_factory):
    """A model, its weights as transformers 4 names them with MTP layers beside, and the folder with them."""
    import transformers

    fields, path, more = KINDS[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    old = dict(convert_state_dict(model.state_dict(), to=V4, model=model))
    layer = {k: v for k, v in old.items() if k.startswith("model.layers.1.")}
    for key, tensor in layer.items():
        old[path + key.removeprefix("model.layers.1.")] = torch.rand_like(tensor)
    old |= {beside(path, name): torch.rand(8, 16) for name in more}
    data = {**config.to_dict(), "architectures": [type(model).__name__]}
    numpy = {k: v.numpy() for k, v in old.items()}
    folder = write_folder(tmp_path_factory.mktemp("mtp") / request.param, numpy, data)
    return model, old, folder, path


def tensors_of(folder):
    return {
        k: torch.from_numpy(v.copy()) for k, v in open_tensors(folder / "model.safetensors").items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in other)


def test_files_there_and_back(made, tmp_path):
    _, old, folder, path = made
    report = regraft.convert(folder, tmp_path / "new", to=V5)
    new = tensors_of(tmp_path / "new")
    stacked = torch.stack([old[f"{path}mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(new[f"{path}mlp.experts.down_proj"], stacked)
    assert any(WHY in note for note in report.notes)
    regraft.convert(tmp_path / "new", tmp_path / "old", to=V4)
    assert same(tensors_of(tmp_path / "old"), old)


def test_stock_loads_the_result(made, tmp_path):
    import transformers

    model, _, folder, _ = made
    regraft.convert(folder, tmp_path / "new", to=V5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    words = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(words).logits, loaded(words).logits)


def test_in_memory(made, tmp_path):
    model, old, folder, path = made
    new = convert_state_dict(old, to=V5, model=model)
    regraft.convert(folder, tmp_path / "new", to=V5)
    assert same(dict(new), tensors_of(tmp_path / "new"))
    assert same(dict(convert_state_dict(new, to=V4, model=model)), old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = convert_state_dict(old, to=model)
    assert same(dict(fitted), model.state_dict())
    left = fitted.report.left_out
    assert f"{path}mlp.experts.0.down_proj.weight" in left and set(left.values()) == {WHY}


def test_check_finds_no_fault(made, tmp_path):
    _, _, folder, _ = made
    (verdict,) = check(folder, model=folder).verdicts
    assert verdict.healthy, verdict


def test_names_alone_tell(made, tmp_path):
    """Without a config, by what only MTP layers have."""
    _, _, folder, path = made
    if "exaone" in str(folder):
        pytest.skip("the library has no book for it")
    file = folder / "model.safetensors"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    regraft.convert(alone, tmp_path / "new.safetensors", to=V5)
    assert f"{path}mlp.experts.down_proj" in open_tensors(tmp_path / "new.safetensors")


def test_beyond_the_number_of_the_config(made, tmp_path):
    _, old, folder, path = made
    config = json.loads((folder / "config.json").read_text())
    if "mtp_block" not in path and "layers.2" not in path:
        pytest.skip("its config has no number")
    further = path.replace(".2.", ".3.").replace(".0.", ".1.")
    key = further + "input_layernorm.weight"
    src = write_folder(
        tmp_path / "src",
        {k: v.numpy() for k, v in old.items()} | {key: old["model.norm.weight"].numpy()},
        config,
    )
    with pytest.raises(BadInputError, match=key.replace(".", r"\.")):
        regraft.convert(src, tmp_path / "new", to=V5)
    assert not (tmp_path / "new").exists()


def test_mtp_layers_in_the_other_form_stay(made, tmp_path):
    """Some files have the model's experts stacked and the MTP layer's one by one: nothing loads them together."""
    model, old, folder, path = made
    new = dict(
        convert_state_dict(
            {k: v for k, v in old.items() if not k.startswith(path)}, to=V5, model=model
        )
    )
    new |= {k: v for k, v in old.items() if k.startswith(path)}
    config = json.loads((folder / "config.json").read_text())
    src = write_folder(tmp_path / "src", {k: v.numpy() for k, v in new.items()}, config)
    regraft.convert(src, tmp_path / "old", to=V4)
    assert same(tensors_of(tmp_path / "old"), old)


def test_adapters_know_no_mtp_layers(tmp_path):
    """No model has such a layer in memory, so an adapter for one is of another base."""
    import numpy as np

    config = {
        **SIZES,
        **KINDS["glm4_moe"][0],
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
    }
    base = write_folder(tmp_path / "base", {"x": np.zeros(1, np.float32)}, config)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from regraft.storage.safetensors import write_tensors

    at = "base_model.model.model.layers.2.self_attn.o_proj"
    write_tensors(
        adapter / "adapter_model.safetensors",
        {
            f"{at}.lora_A.weight": np.ones((2, 8), np.float32),
            f"{at}.lora_B.weight": np.ones((8, 2), np.float32),
        },
        {"format": "pt"},
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]})
    )
    with pytest.raises((BadInputError, UnmatchedKeysError), match=r"layers\.2"):
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base)
