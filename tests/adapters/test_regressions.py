"""What was once wrong, one test each: adapters made here of random numbers, for the bases of the golden ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import same_bits

import regraft
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

BASES = Path(__file__).parent.parent / "golden/bases"
PREFIX = "base_model.model."
HIDDEN, KEYS, INNER = 16, 8, 24
V4, V5 = "transformers-v4", "transformers-v5"


def lora(module, out, into, rank=4):
    """The two factors of one LoRA."""
    noise = np.random.default_rng(len(module))
    return {
        f"{PREFIX}{module}.lora_A.weight": noise.standard_normal((rank, into), np.float32),
        f"{PREFIX}{module}.lora_B.weight": noise.standard_normal((out, rank), np.float32),
    }


def attention(projection="q_proj", out=HIDDEN, layers=2, inside="model."):
    """The LoRAs of one attention projection in every layer."""
    return {
        key: factor
        for layer in range(layers)
        for key, factor in lora(
            f"{inside}layers.{layer}.self_attn.{projection}", out, HIDDEN
        ).items()
    }


def experts(layer, count):
    """The LoRAs of all projections of a Mixtral layer's experts, as transformers 4 has them."""
    sizes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    return {
        key: factor
        for expert in range(count)
        for name, size in sizes.items()
        for key, factor in lora(
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}", *size
        ).items()
    }


def zeros(*shape):
    return np.zeros(shape, np.float32)


def write(folder, tensors, model_type, version="0.18.1", **fields):
    """An adapter whose base is named by nothing but its type."""
    folder.mkdir(parents=True, exist_ok=True)
    library = {"parent_library": f"transformers.models.{model_type}.modeling_{model_type}"}
    config = {
        "peft_type": "LORA",
        "peft_version": version,
        "auto_mapping": {"base_model_class": "AnyModel", **library} if model_type else None,
        "base_model_name_or_path": "organisation/model",
    }
    if "peft_type" not in fields:
        config |= {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    config |= fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def read(folder):
    file = folder / "adapter_model.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    return open_tensors(file, read_header(file)), config


def base_with(folder, name, **fields):
    """A golden base's config with other values; without weights."""
    folder.mkdir()
    config = {**json.loads((BASES / name / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved_path(key, entries):
    """The modules around a tensor that an entry of ``modules_to_save`` names, as PEFT looks for them."""
    parts = key.removeprefix(PREFIX).split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]
    return [path for path in paths if path.endswith(tuple(entries))]


# What was converted, and loaded nowhere or into the wrong thing


def test_layers_with_different_numbers_of_experts_miss_some(tmp_path):
    tensors = {**experts(0, 5), **experts(1, 4), **experts(2, 4)}
    adapter = write(tmp_path / "in", tensors, "mixtral", target_modules=["w1", "w2", "w3"])
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5)
    missing = [f for f in caught.value.findings if f.code == "missing"]
    assert missing
    assert any("experts.4." in str(finding) for finding in missing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", [8, None], ids=["head_dim", "no_head_dim"])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_a_base_with_another_number_of_key_value_heads(tmp_path, projection, head):
    adapter = write(
        tmp_path / "in", attention(projection, KEYS), "mixtral", target_modules=[projection]
    )
    regraft.convert(adapter, tmp_path / "right", to=V5, model=BASES / "mixtral")
    other = base_with(tmp_path / "base", "mixtral", num_key_value_heads=2, head_dim=head)
    with pytest.raises(regraft.BadInputError, match="num_key_value_heads") as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=other)
    assert "base" in str(caught.value)
    assert projection in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_model", [True, False])
def test_an_entry_that_saved_nothing_does_not_save_the_experts_of_the_new_layout(
    tmp_path, with_model
):
    source = attention()
    adapter = write(tmp_path / "in", source, "granitemoe", modules_to_save=["experts"])
    model = BASES / "granitemoe" if with_model else None
    regraft.convert(adapter, tmp_path / "out", to=V5, model=model)
    tensors, config = read(tmp_path / "out")
    assert not config["modules_to_save"]
    assert tensors.keys() == source.keys()


def test_two_saved_modules_of_which_one_is_inside_the_other_now_are_one_entry(tmp_path):
    source = attention() | {
        f"{PREFIX}model.layers.1.mlp.gate.weight": np.ones((4, HIDDEN), np.float32),
        f"{PREFIX}model.layers.1.mlp.moe_statics.e_score_correction_bias": zeros(1, 4),
    }
    adapter = write(
        tmp_path / "in", source, "ernie4_5_moe", modules_to_save=["gate", "moe_statics"]
    )
    regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "ernie4_5_moe")
    tensors, config = read(tmp_path / "out")
    assert config["modules_to_save"] == ["gate"]
    inside = {key.partition("mlp.")[2] for key in tensors if ".mlp." in key}
    assert inside == {"gate.weight", "gate.moe_statics.e_score_correction_bias"}
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4, model=BASES / "ernie4_5_moe")
    tensors, config = read(tmp_path / "back")
    assert config["modules_to_save"] == ["gate", "moe_statics"]
    assert tensors.keys() == source.keys()


def with_copies(module, bias):
    """A saved module as PEFT writes it with ``bias = "all"``: its bias, and that of both of its copies."""
    return {
        f"{PREFIX}{module}.weight": np.ones((4, HIDDEN), np.float32),
        f"{PREFIX}{module}.bias": bias,
        f"{PREFIX}{module}.modules_to_save.bias": bias,
        f"{PREFIX}{module}.original_module.bias": bias + 1,
    }


@pytest.mark.parametrize(("there", "back"), [(V4, V5), (V5, V4)])
def test_copies_of_a_saved_bias_go_with_it(tmp_path, there, back):
    source = attention()
    for layer in range(2):
        source |= with_copies(f"model.layers.{layer}.mlp.router", np.arange(4, dtype=np.float32))
    adapter = write(tmp_path / "in", source, "gpt_oss", modules_to_save=["router"], bias="all")
    base = BASES / "gpt_oss"
    regraft.convert(adapter, tmp_path / "out", to=there, source=back, model=base, verify=True)
    tensors, config = read(tmp_path / "out")
    assert config["modules_to_save"] == ["router"]
    assert all(np.array_equal(tensors[key], source[key]) for key in source)
    assert tensors.keys() == source.keys()


def test_nothing_is_left_of_a_lora_on_a_module_that_is_not_called(tmp_path):
    source = lora("model.layers.0.mamba.dt_proj", 2 * HIDDEN, 2)
    adapter = write(tmp_path / "in", source, "jamba", target_modules=["dt_proj"])
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "jamba")
    assert [finding.code for finding in caught.value.findings] == ["nothing-left"]
    assert "dt_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


def saved_experts(model_type):
    """The experts of the last layer as `modules_to_save` of transformers 5 has them."""
    inner = 12
    path = f"{PREFIX}model.layers.1.mlp.experts."
    tensors = attention() | {
        path + "gate_up_proj": np.ones((4, 2 * inner, HIDDEN), np.float32),
        path + "down_proj": np.ones((4, HIDDEN, inner), np.float32),
    }
    return tensors, {
        "model_type": model_type,
        "version": "0.21.2",
        "modules_to_save": ["mlp.experts"],
    }


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_saved_experts_are_named_one_by_one_beside_dense_layers_and_shared_experts(
    tmp_path, model_type
):
    source, settings = saved_experts(model_type)
    if model_type == "deepseek_v3":
        source = {k: x for k, x in source.items() if "q_proj" not in k} | attention(
            "o_proj", layers=2
        )
        settings["target_modules"] = ["o_proj"]
    adapter = write(tmp_path / "in", source, **settings)
    regraft.convert(adapter, tmp_path / "out", to=V4, model=BASES / model_type)
    tensors, config = read(tmp_path / "out")
    entries = config["modules_to_save"]
    saved = [key for key in tensors if ".experts." in key]
    assert len(saved) == 12
    assert all(len(saved_path(key, entries)) == 1 for key in saved)
    for expert in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert any(entry.endswith(f"experts.{expert}.{name}") for entry in entries)
    others = (
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.shared_expert.up_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
        "model.layers.1.mlp.gate",
    )
    assert not [path for path in others if path.endswith(tuple(entries))]
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V5, model=BASES / model_type)
    again, config = read(tmp_path / "back")
    assert config["modules_to_save"] == ["mlp.experts"]
    assert again.keys() == source.keys()
    assert all(same_bits(again[key], source[key]) for key in source)


# What must be asked for, and what need not


def llava_saved():
    path = PREFIX + "model.language_model.layers.0.mlp.experts."
    saved = {path + "gate_up_proj": zeros(4, 48, HIDDEN), path + "down_proj": zeros(4, HIDDEN, 24)}
    return attention(inside="model.language_model."), saved, {"modules_to_save": ["experts"]}


def llava_router():
    router = lora("model.language_model.layers.0.mlp.gate", 4, HIDDEN)
    return attention(inside="model.language_model."), router, {"target_modules": ["q_proj", "gate"]}


def llava_stacked():
    path = PREFIX + "model.language_model.layers.0.mlp.experts."
    stacked = {
        path + "lora_A.weight": zeros(16, HIDDEN),
        path + "lora_B.weight": zeros(48, 16),
    }
    fields = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    return attention(inside="model.language_model."), stacked, fields


@pytest.mark.parametrize("made", [llava_saved, llava_router, llava_stacked])
def test_the_language_model_inside_another_is_asked_for(tmp_path, made):
    plain, inner, fields = made()
    adapter = write(tmp_path / "in", plain | inner, "llava", version="0.21.2", **fields)
    with pytest.raises(regraft.UnmatchedKeysError, match="--model") as caught:
        regraft.convert(adapter, tmp_path / "out", to=V4)
    assert "llava" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [V4, V5])
@pytest.mark.parametrize("model_type", [None, "mixtral"])
def test_prompt_tuning_needs_no_model(tmp_path, to, model_type):
    source = {"prompt_embeddings": np.ones((3, HIDDEN), np.float32)}
    adapter = write(
        tmp_path / "in", source, model_type, peft_type="PROMPT_TUNING", num_virtual_tokens=3
    )
    assert regraft.convert(adapter, tmp_path / "out", to=to).written
    tensors, config = read(tmp_path / "out")
    assert tensors.keys() == source.keys()
    assert same_bits(tensors["prompt_embeddings"], source["prompt_embeddings"])
    assert config["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize("field", ["target_modules", "feedforward_modules"])
def test_ia3_on_attention_is_carried_over(tmp_path, field):
    shape = (KEYS, 1) if field == "target_modules" else (1, HIDDEN)
    source = {
        f"{PREFIX}model.layers.{layer}.self_attn.k_proj.ia3_l": np.full(shape, 2, np.float32)
        for layer in range(2)
    }
    fields = {"target_modules": ["k_proj"], "feedforward_modules": [], field: ["k_proj"]}
    adapter = write(tmp_path / "in", source, "mixtral", peft_type="IA3", **fields)
    regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "mixtral")
    tensors, config = read(tmp_path / "out")
    assert tensors.keys() == source.keys()
    assert all(same_bits(tensors[key], source[key]) for key in source)
    assert config[field] == ["k_proj"]


def test_the_modules_of_a_family_are_named_where_the_source_leaves_them_to_peft(tmp_path):
    source = {f"{PREFIX}model.layers.0.self_attn.k_proj.ia3_l": np.full((KEYS, 1), 2, np.float32)}
    adapter = write(tmp_path / "in", source, "mixtral", peft_type="IA3", feedforward_modules=[])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config.pop("target_modules", None)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "mixtral")
    tensors, made = read(tmp_path / "out")
    assert tensors.keys() == source.keys()
    assert [name.rpartition(".")[2] for name in made["target_modules"]] == ["k_proj"]


# What was not checked


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_finite_number(tmp_path, field, value):
    entry = {"q_proj": value} if field == "alpha_pattern" else value
    adapter = write(tmp_path / "in", attention(), "mixtral", **{field: entry})
    with pytest.raises(regraft.BadInputError, match=field) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "mixtral")
    assert str(adapter / "adapter_config.json") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_family_than_the_adapter_says(tmp_path):
    tensors = attention() | experts(0, 4) | experts(1, 4)
    fields = {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    adapter = write(tmp_path / "in", tensors, "mixtral", **fields)
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "qwen2_moe")
    (finding,) = caught.value.findings
    assert "mixtral" in str(finding)
    assert "qwen2_moe" in str(finding)
    assert finding.fix
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_inside_another_model_is_not_another_family(tmp_path):
    source = attention(inside="model.language_model.")
    adapter = write(tmp_path / "in", source, "llava")
    assert regraft.convert(adapter, tmp_path / "out", to=V5, model=BASES / "llava_mixtral").written


# What was carried over


def test_a_download_cache_and_a_clone_leave_their_bookkeeping_behind(tmp_path):
    adapter = write(tmp_path / "made", attention(), "mixtral")
    cache = tmp_path / "hub/models--a--b"
    snapshot = cache / "snapshots/abc"
    for folder in (snapshot, cache / "blobs", cache / "refs", cache / ".git/objects"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(adapter.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "README.md").write_text("about it")
    (cache / "refs/main").write_text("abc")
    (cache / ".git/HEAD").write_text("ref: refs/heads/main")
    (cache / ".git/objects/1").write_text("an object")
    report = regraft.convert(cache, tmp_path / "out", to=V5, model=BASES / "mixtral")
    written = sorted(
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )
    inside = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert written == [f"snapshots/abc/{name}" for name in inside]
    assert report.files == ["snapshots/abc/README.md"]


# Layers that PEFT repeats


@pytest.mark.parametrize("with_model", [True, False])
def test_replicated_layers_count_as_the_models_own(tmp_path, with_model):
    tensors = attention(layers=3) | {k: x for n in range(3) for k, x in experts(n, 4).items()}
    fields = {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    replication = [[0, 2], [1, 2]]
    adapter = write(tmp_path / "in", tensors, "mixtral", layer_replication=replication, **fields)
    model = BASES / "mixtral" if with_model else None
    regraft.convert(adapter, tmp_path / "out", to=V5, model=model)
    new, config = read(tmp_path / "out")
    assert config["layer_replication"] == replication
    assert {key.split(".")[4] for key in new if ".mlp.experts." in key} == {"0", "1", "2"}
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4, model=model)
    again, _ = read(tmp_path / "back")
    assert again.keys() == tensors.keys()
    assert all(same_bits(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("version", "layout"), [("0.21.2", "transformers-v5"), ("0.18.1", "transformers-v4")]
)
def test_saved_experts_of_one_name_are_of_the_layout_that_peft_goes_with(tmp_path, version, layout):
    source = saved_square_experts(tmp_path, {"peft_version": version})
    report = regraft.convert(source, tmp_path / "out", to="transformers-v5")
    assert report.adapters[0].source_layout == layout
    assert report.adapters[0].copied == (layout == "transformers-v5")


def test_saved_experts_of_one_name_and_no_version_are_asked_about(tmp_path):
    source = saved_square_experts(tmp_path, {})
    with pytest.raises(regraft.AmbiguousError, match="--from"):
        regraft.convert(source, tmp_path / "out", to="transformers-v5")
    assert not (tmp_path / "out").exists()


def saved_square_experts(folder, fields):
    """A Qwen3-VL-MoE adapter that saves its experts whole; nothing but the version tells the layout."""
    prefix = "base_model.model.model.language_model.layers.0."
    tensors = {
        f"{prefix}mlp.experts.gate_up_proj": np.ones((2, 4, 4), np.float32),
        f"{prefix}mlp.experts.down_proj": np.ones((2, 4, 4), np.float32),
        f"{prefix}self_attn.q_proj.lora_A.weight": np.ones((1, 4), np.float32),
        f"{prefix}self_attn.q_proj.lora_B.weight": np.ones((4, 1), np.float32),
    }
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "modules_to_save": ["experts"],
        "auto_mapping": {
            "parent_library": "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe"
        },
        **fields,
    }
    source = folder / "saved"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(source / "adapter_model.safetensors", tensors, {"format": "pt"})
    return source
