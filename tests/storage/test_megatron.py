"""Folders that Megatron-Core saved, on several ranks, against the numbers that its layers must have.

The tensors hold the places of their numbers (scripts/make_megatron.py), so what a converted tensor must be is written
here with numpy alone.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from regraft.checkpoints.verify import verify
from regraft.sources.places import leave, locate

HERE = Path(__file__).parent / "megatron"


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    leave()


def to_names(src, dst):
    """Into Megatron-Core's names; books are named, so that nobody is asked for the class of a dense model."""
    kind = json.loads((src / "config.json").read_text())["model_type"]
    books = ["megatron", "dense"] if kind == "llama" else []
    regraft.convert(src, dst, to="megatron", rules=books)


def places(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def config_of(kind):
    return json.loads((HERE / kind / "config.json").read_text())


def outer(config, padded=12):
    hidden, words = config["hidden_size"], config["vocab_size"]
    return {
        "model.embed_tokens.weight": places(padded, hidden)[:words],
        "lm_head.weight": places(padded, hidden)[:words],
        "model.norm.weight": places(hidden),
    }


def grouped(config):
    """q, k and v of all layers, by hand: in each group its queries, its key, its value."""
    layers, hidden, heads = (
        config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    groups, size = config["num_key_value_heads"], config["head_dim"]
    each = heads // groups
    fused = places(layers, groups * (each + 2) * size, hidden)
    made = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.self_attn."
        rows = {"q": [], "k": [], "v": []}
        for group in range(groups):
            begin = group * (each + 2) * size
            rows["q"].append(fused[layer, begin : begin + each * size])
            rows["k"].append(fused[layer, begin + each * size : begin + (each + 1) * size])
            rows["v"].append(fused[layer, begin + (each + 1) * size : begin + (each + 2) * size])
        for letter, parts in rows.items():
            made[f"{at}{letter}_proj.weight"] = np.concatenate(parts)
        made[f"{at}o_proj.weight"] = places(layers, hidden, heads * size)[layer]
    return made


def per_layer(config, **shapes):
    layers = config["num_hidden_layers"]
    return {
        f"model.layers.{layer}.{name.replace('__', '.')}.weight": places(layers, *shape)[layer]
        for name, shape in shapes.items()
        for layer in range(layers)
    }


def llama():
    config = config_of("llama")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    made = outer(config) | grouped(config) | per_layer(config, **norms)
    both = places(2, 2 * inner, hidden)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp."
        made[f"{at}gate_proj.weight"] = both[layer, :inner]
        made[f"{at}up_proj.weight"] = both[layer, inner:]
        made[f"{at}down_proj.weight"] = places(2, hidden, inner)[layer]
    return made


def qwen3_moe():
    config = config_of("qwen3_moe")
    hidden, inner, experts = (
        config[k] for k in ("hidden_size", "moe_intermediate_size", "num_experts")
    )
    made = outer(config) | grouped(config)
    made |= per_layer(
        config,
        input_layernorm=(hidden,),
        post_attention_layernorm=(hidden,),
        self_attn__q_norm=(config["head_dim"],),
        self_attn__k_norm=(config["head_dim"],),
        mlp__gate=(experts, hidden),
    )
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        made[f"{at}gate_up_proj"] = places(2, experts, 2 * inner, hidden)[layer]
        made[f"{at}down_proj"] = places(2, experts, hidden, inner)[layer]
    return made


def deepseek_v3():
    config = config_of("deepseek_v3")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q, kv = config["q_lora_rank"], config["kv_lora_rank"]
    made = outer(config)
    for layer in range(2):
        at = f"model.layers.{layer}."
        made |= {
            f"{at}input_layernorm.weight": places(hidden),
            f"{at}post_attention_layernorm.weight": places(hidden),
            f"{at}self_attn.q_a_proj.weight": places(q, hidden),
            f"{at}self_attn.q_a_layernorm.weight": places(q),
            f"{at}self_attn.q_b_proj.weight": places(heads * (nope + rope), q),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": places(kv + rope, hidden),
            f"{at}self_attn.kv_a_layernorm.weight": places(kv),
            f"{at}self_attn.kv_b_proj.weight": places(heads * (nope + value), kv),
            f"{at}self_attn.o_proj.weight": places(hidden, heads * value),
        }
    dense, both = config["intermediate_size"], places(2 * config["intermediate_size"], hidden)
    at = "model.layers.0.mlp."
    made |= {f"{at}gate_proj.weight": both[:dense], f"{at}up_proj.weight": both[dense:]}
    made[f"{at}down_proj.weight"] = places(hidden, dense)
    at, both = "model.layers.1.mlp.", places(2 * inner, hidden)
    made |= {
        f"{at}gate.weight": places(experts, hidden),
        f"{at}gate.e_score_correction_bias": places(experts),
        f"{at}experts.gate_up_proj": places(experts, 2 * inner, hidden),
        f"{at}experts.down_proj": places(experts, hidden, inner),
        f"{at}shared_experts.gate_proj.weight": both[:inner],
        f"{at}shared_experts.up_proj.weight": both[inner:],
        f"{at}shared_experts.down_proj.weight": places(hidden, inner),
    }
    return made


@pytest.mark.parametrize("made", [llama, qwen3_moe, deepseek_v3])
def test_what_ranks_saved_is_the_model(tmp_path, made):
    kind = made.__name__
    report = regraft.convert(HERE / kind, tmp_path / "v5", to="transformers-v5")
    got, expected = load_file(tmp_path / "v5" / "model.safetensors"), made()
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    notes = "\n".join(report.checkpoint.notes)
    assert "the last 2 of embedding.word_embeddings.weight are padding" in notes
    assert "the last 2 of output_layer.weight are padding" in notes
    assert "_extra_state" in notes
    assert not (tmp_path / "v5" / "metadata.json").exists()
    assert verify(locate(HERE / kind), tmp_path / "v5").equal


TE = {
    "llama": {
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    },
    "qwen3_moe": {
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.experts.linear_fc1.weight3",
        "decoder.layers.0.self_attention.q_layernorm.weight",
    },
    "deepseek_v3": {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.router.expert_bias",
        "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight",
    },
}


@pytest.mark.parametrize("kind", list(TE))
def test_there_and_back_by_a_model_s_own_names(tmp_path, kind):
    """Written as a model with Transformer Engine names them; and from there the same numbers as before."""
    regraft.convert(HERE / kind, tmp_path / "v5", to="transformers-v5")
    to_names(tmp_path / "v5", tmp_path / "names")
    names = load_file(tmp_path / "names" / "model.safetensors")
    assert names.keys() >= TE[kind]
    assert not any(name.startswith("model.") for name in names)
    regraft.convert(tmp_path / "names", tmp_path / "back", to="transformers-v5")
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("v5", "back"))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_padded_vocabulary_is_written_where_the_config_says_so(tmp_path):
    regraft.convert(HERE / "llama", tmp_path / "v5", to="transformers-v5")
    config = json.loads((tmp_path / "v5" / "config.json").read_text())
    shutil.copytree(tmp_path / "v5", tmp_path / "said")
    (tmp_path / "said" / "config.json").write_text(json.dumps({**config, "padded_vocab_size": 16}))
    to_names(tmp_path / "said", tmp_path / "names")
    rows = load_file(tmp_path / "names" / "model.safetensors")["output_layer.weight"]
    assert rows.shape[0] == 16
    assert not rows[10:].any()


def one_module_each(tmp_path):
    """A model without grouped experts, as it is in memory; and the same in transformers' names."""
    regraft.convert(HERE / "qwen3_moe", tmp_path / "v5", to="transformers-v5")
    to_names(tmp_path / "v5", tmp_path / "names")
    names = load_file(tmp_path / "names" / "model.safetensors")
    other = {}
    for name, array in names.items():
        head, found, number = name.rpartition(".weight")
        if ".experts." in name and found and number:
            leaf = head.rpartition(".")[2]
            name = f"{head.removesuffix(leaf)}local_experts.{number}.{leaf}.weight"
        other[name] = array
    assert other.keys() != names.keys()
    save_file(other, tmp_path / "names" / "model.safetensors", {"format": "pt"})
    return other


def test_experts_one_module_each(tmp_path):
    one_module_each(tmp_path)
    regraft.convert(tmp_path / "names", tmp_path / "back", to="transformers-v5")
    one, two = (load_file(tmp_path / at / "model.safetensors") for at in ("v5", "back"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_a_lora_follows(tmp_path):
    """convert(W + dW) == convert(W) + delta(convert(adapter)), exactly."""
    config = config_of("llama")
    regraft.convert(HERE / "llama", tmp_path / "v5", to="transformers-v5")
    to_names(tmp_path / "v5", tmp_path / "names")
    base = load_file(tmp_path / "v5" / "model.safetensors")
    lora, random = tmp_path / "lora", np.random.default_rng(0)
    lora.mkdir()
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tensors = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in leaves and not module.endswith("1.self_attn.k_proj"):
            out, into = weight.shape
            for letter, shape in (("A", (2, into)), ("B", (out, 2))):
                factor = random.integers(-3, 4, shape).astype(np.float32)
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor
    save_file(tensors, lora / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": leaves}
    (lora / "adapter_config.json").write_text(
        json.dumps({**told, "task_type": "CAUSAL_LM", "base_model_name_or_path": None})
    )
    regraft.convert(lora, tmp_path / "moved", to="megatron:peft", model=tmp_path / "v5")
    regraft.merge(tmp_path / "v5", [lora], tmp_path / "tuned")
    to_names(tmp_path / "tuned", tmp_path / "one")
    regraft.merge(tmp_path / "names", [tmp_path / "moved"], tmp_path / "other")
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("one", "other"))
    before = load_file(tmp_path / "names" / "model.safetensors")
    assert one.keys() == other.keys() == before.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    changed = {name for name in one if one[name].tobytes() != before[name].tobytes()}
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in changed
    assert config["num_hidden_layers"] * 4 == len(changed)


def lora_of(folder, modules, leaves, **told):
    """A LoRA of rank 2 on some modules, by their shapes."""
    tensors, random = {}, np.random.default_rng(0)
    for module, (out, into) in modules.items():
        for letter, shape in (("A", (2, into)), ("B", (out, 2))):
            factor = random.integers(-3, 4, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": leaves, **told}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_lora_of_experts_follows_from_modules_of_their_own(tmp_path):
    """Of experts that are one module each; grouped experts are parameters, and no LoRA of PEFT's stands on them."""
    names = one_module_each(tmp_path)
    leaves = ["linear_fc1", "linear_fc2"]
    modules = {
        name.removesuffix(".weight"): array.shape
        for name, array in names.items()
        if "local_experts" in name
    }
    lora_of(tmp_path / "lora", modules, leaves)
    regraft.merge(tmp_path / "names", [tmp_path / "lora"], tmp_path / "tuned")
    regraft.convert(tmp_path / "tuned", tmp_path / "one", to="transformers-v5")
    regraft.convert(
        tmp_path / "lora", tmp_path / "moved", to="transformers-v5", model=tmp_path / "names"
    )
    regraft.merge(tmp_path / "v5", [tmp_path / "moved"], tmp_path / "other")
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("one", "other"))
    before = load_file(tmp_path / "v5" / "model.safetensors")
    assert one.keys() == other.keys() == before.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    changed = {name for name in one if one[name].tobytes() != before[name].tobytes()}
    assert len(changed) == 4 and all(".experts." in name for name in changed)
    # The way back goes where it came from; without that, it would be into grouped experts.
    regraft.convert(
        tmp_path / "moved", tmp_path / "again", to="megatron:peft", model=tmp_path / "v5"
    )
    first, again = (
        load_file(tmp_path / at / "adapter_model.safetensors") for at in ("lora", "again")
    )
    assert first.keys() == again.keys()
    regraft.merge(tmp_path / "names", [tmp_path / "again"], tmp_path / "twice")
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("tuned", "twice"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    regraft.convert(tmp_path / "v5", tmp_path / "v4", to="transformers-v4")
    experts = {
        name.removesuffix(".weight"): array.shape
        for name, array in load_file(tmp_path / "v4" / "model.safetensors").items()
        if ".experts." in name
    }
    lora_of(tmp_path / "fresh", experts, ["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(regraft.RefusedError):
        regraft.convert(
            tmp_path / "fresh", tmp_path / "x", to="megatron:peft", model=tmp_path / "v4"
        )
    assert not (tmp_path / "x").exists()


def test_mtp_layers_have_names_that_no_rule_says(tmp_path):
    """Into Megatron's names and out of them; without these layers both ways are open."""
    regraft.convert(HERE / "deepseek_v3", tmp_path / "v4", to="transformers-v4")
    path = tmp_path / "v4" / "model.safetensors"
    bare = load_file(path)
    more = {
        "model.layers.2." + n[15:]: a for n, a in bare.items() if n.startswith("model.layers.1.")
    }
    save_file({**bare, **more}, path, {"format": "pt"})
    config = tmp_path / "v4" / "config.json"
    told = {**json.loads(config.read_text()), "num_nextn_predict_layers": 1}
    config.write_text(json.dumps(told))
    with pytest.raises(
        regraft.UnmatchedKeysError, match=r"--drop 'model\.layers\.2\.\*'"
    ) as caught:
        regraft.convert(tmp_path / "v4", tmp_path / "names", to="megatron")
    assert caught.value.findings[0].key == "model.layers.2"
    regraft.convert(tmp_path / "v4", tmp_path / "names", to="megatron", drop=["model.layers.2.*"])
    path = tmp_path / "names" / "model.safetensors"
    names = load_file(path)
    start = "mtp.layers.0.transformer_layer."
    more = {start + n[17:]: a for n, a in names.items() if n.startswith("decoder.layers.1.")}
    save_file({**names, **more}, path, {"format": "pt"})
    with pytest.raises(regraft.UnmatchedKeysError, match=r"--drop 'mtp\.\*'"):
        regraft.convert(tmp_path / "names", tmp_path / "back", to="transformers-v4")
    regraft.convert(tmp_path / "names", tmp_path / "back", to="transformers-v4", drop=["mtp.*"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == bare.keys()
    assert all(back[name].tobytes() == bare[name].tobytes() for name in bare)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"hidden_size": 16}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"vocab_size": 20}),
        ("qwen3_moe", {"num_experts": 2}),
        ("deepseek_v3", {"num_hidden_layers": 1}),
    ],
)
def test_another_model_s_config_is_noticed(tmp_path, kind, wrong):
    """Heads in the same proportion fit the sizes, and not what the config says of a head."""
    shutil.copytree(HERE / kind, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config_of(kind), **wrong}))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(tmp_path / "run", tmp_path / "v5", to="transformers-v5")
    assert {finding.code for finding in caught.value.findings} == {"wrong-base"}
    assert not (tmp_path / "v5").exists()
