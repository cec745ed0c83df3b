"""llama.cpp, MLX, torchtune and LitGPT: what is written is what the tools read, and comes back with the same deltas."""

import json
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regraft
from regraft.adapters.detect import Known
from regraft.adapters.form import Lora
from regraft.adapters.scale import Scale
from regraft.dialects.everywhere import Sizes, as_images
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.storage.torch_file import open_torch
from regraft.storage.torch_write import write_torch

HIDDEN, HEADS, GROUPS, INNER, LAYERS, EXPERTS, WORDS = 16, 4, 2, 12, 2, 3, 20
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": 4,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
}
MORE = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "q_lora_rank": 8},
}
ATTENTION = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
}
MLP = {"mlp.gate_proj": (12, 16), "mlp.up_proj": (12, 16), "mlp.down_proj": (16, 12)}
PREFIX = "base_model.model.model.layers"
TOOLS = ("gguf", "mlx", "torchtune", "litgpt")
WEIGHTS = "adapter_model.safetensors"


def modules_of(model_type):
    """The modules of a layer in transformers 4, with their shapes."""
    if model_type == "mixtral":
        shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
        inside, router = "block_sparse_moe", {"block_sparse_moe.gate": (EXPERTS, HIDDEN)}
    elif model_type == "qwen3_moe":
        shapes = {f"{k.removeprefix('mlp.')}": v for k, v in MLP.items()}
        inside, router = "mlp", {"mlp.gate": (EXPERTS, HIDDEN)}
    else:
        return ATTENTION | MLP
    experts = {f"{inside}.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in shapes.items()}
    return ATTENTION | experts | router


def make_base(folder, model_type, **fields):
    folder.mkdir(exist_ok=True)
    data = {"model_type": model_type} | SIZES | MORE.get(model_type, {}) | fields
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def make_adapter(
    folder, shapes, ranks=4, alpha=8, dtype=np.float32, layers=range(LAYERS), **config
):
    """A PEFT adapter; ``ranks`` is one for all, or by module."""
    random, tensors, patterns = np.random.default_rng(0), {}, {}
    for layer in layers:
        for name, (out, into) in shapes.items():
            rank = ranks if isinstance(ranks, int) else ranks[name]
            path = f"{PREFIX}.{layer}.{name}" if "." in name else f"base_model.model.{name}"
            path = path.replace("EMBED", "model.embed_tokens")
            tensors[f"{path}.lora_A.weight"] = random.integers(-9, 9, (rank, into)) / 16
            tensors[f"{path}.lora_B.weight"] = random.integers(-9, 9, (out, rank)) / 16
            patterns[path.removeprefix("base_model.model.")] = rank
    folder.mkdir(exist_ok=True)
    made = {k: x.astype(dtype) for k, x in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", made, {"format": "pt"})
    first = next(iter(patterns.values()))
    about = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": alpha,
        "target_modules": sorted(patterns),
        "rank_pattern": {k: r for k, r in patterns.items() if r != first},
        "peft_version": "0.18.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about | config))
    return folder


def through(tmp, adapter, base, *tools, **options):
    """Convert along some names, each step verified; the last folder."""
    at = adapter
    for number, tool in enumerate(tools):
        made = tmp / f"{number}-{tool}"
        regraft.convert(at, made, to=tool, model=base, verify=True, overwrite=True, **options)
        at = made
    return at


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tool", TOOLS)
def test_there_and_back(tmp_path, tool, model_type):
    base = make_base(tmp_path / "base", model_type)
    shapes = modules_of(model_type)
    if (tool == "torchtune" and "mo" in model_type) or (tool, model_type) == (
        "torchtune",
        "mixtral",
    ):
        with pytest.raises(regraft.RefusedError, match="no rule book says"):
            through(tmp_path, make_adapter(tmp_path / "lora", shapes), base, tool)
        return
    ranks = {name: 2 + number % 3 for number, name in enumerate(shapes)}
    if tool == "gguf":
        ranks = {name: 2 if "expert" in name else rank for name, rank in ranks.items()}
    adapter = make_adapter(tmp_path / "lora", shapes, ranks)
    for target in ("transformers-v4", "transformers-v5"):
        through(tmp_path, adapter, base, tool, target)


@pytest.mark.parametrize("tool", ["gguf", "mlx"])
def test_the_language_model_of_a_vlm(tmp_path, tool):
    """Norms of its layers match any name below them; what is said of a projection counts first."""
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    inner = {"model_type": "qwen2_5_vl_text", **sizes}
    base = make_base(tmp_path / "base", "qwen2_5_vl", text_config=inner)
    adapter = make_adapter(tmp_path / "lora", ATTENTION | MLP)
    regraft.convert(adapter, tmp_path / "vlm", to="transformers-v5", model=base, verify=True)
    assert all(".language_model." in n for n in open_tensors(tmp_path / "vlm" / WEIGHTS))
    through(tmp_path, tmp_path / "vlm", base, tool, "transformers-v5")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (np.float16, {}),
        (np.float32, {"use_rslora": True}),
        (np.float32, {"alpha_pattern": {"model.layers.1.self_attn.v_proj": 3}}),
        (np.float64, {"lora_alpha": 0.5}),
    ],
)
def test_scales_and_dtypes(tmp_path, tool, dtype, config):
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "lora", ATTENTION | MLP, dtype=dtype, **config)
    through(tmp_path, adapter, base, tool, "transformers-v5")


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_chains_keep_deltas(tmp_path_factory, data):
    """Random modules, ranks and scales, over three dialects of any kind and back."""
    tmp = tmp_path_factory.mktemp("chain")
    model_type = data.draw(st.sampled_from(["llama", "mixtral"]))
    tools = TOOLS if model_type == "llama" else ("gguf", "mlx", "litgpt")
    tools += ("vllm", "sglang", "unsloth", "nemo")
    # Servers take no router.
    shapes = {k: v for k, v in modules_of(model_type).items() if not k.endswith(".gate")}
    names = data.draw(st.lists(st.sampled_from(list(shapes)), min_size=1, unique=True))
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    layers = data.draw(st.sampled_from([[0], [1], [0, 1]]))
    adapter = make_adapter(
        tmp / "lora",
        {name: shapes[name] for name in names},
        ranks,
        data.draw(st.sampled_from([1, 3, 8, 0.25])),
        layers=layers,
        use_rslora=data.draw(st.booleans()),
    )
    chain = data.draw(st.permutations(tools).map(lambda each: each[:3]))
    through(tmp, adapter, make_base(tmp / "base", model_type), *chain, "transformers-v5")


# What the files say, in plain numpy


def delta(a, b, scale):
    return scale * b.astype(np.float64) @ a.astype(np.float64)


def the_adapter(tmp_path, **config):
    adapter = make_adapter(tmp_path / "lora", ATTENTION | MLP, **config)
    tensors = open_tensors(adapter / "adapter_model.safetensors")
    return adapter, lambda layer, name: delta(
        tensors[f"{PREFIX}.{layer}.{name}.lora_A.weight"],
        tensors[f"{PREFIX}.{layer}.{name}.lora_B.weight"],
        2.0,
    )


def turned(rows, heads):
    """Rows (heads, two halves, d/2) as (heads, d/2, two)."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def test_gguf_says_what_llama_cpp_reads(tmp_path):
    import gguf

    adapter, wanted = the_adapter(tmp_path)
    base = make_base(tmp_path / "base", "llama")
    out = tmp_path / "lora.gguf"
    regraft.convert(adapter, out, to="gguf", model=base)
    reader = gguf.GGUFReader(str(out))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 8.0
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    for name, ours in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{x}"] for x in "ab")
        heads = HEADS if name == "attn_q" else GROUPS
        assert np.allclose(delta(a, b, 8 / b.shape[-1]), turned(wanted(1, ours), heads))
    a, b = (tensors[f"blk.0.ffn_down.weight.lora_{x}"] for x in "ab")
    assert np.allclose(delta(a, b, 8 / b.shape[-1]), wanted(0, "mlp.down_proj"))


def test_mlx_says_what_mlx_lm_reads(tmp_path):
    adapter, wanted = the_adapter(tmp_path, layers=[1])
    out = through(tmp_path, adapter, make_base(tmp_path / "base", "llama"), "mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_layers"] == 1 and config["fine_tune_type"] == "lora"
    assert config["lora_parameters"] == {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": sorted(ATTENTION | MLP),
    }
    tensors = open_tensors(out / "adapters.safetensors")
    a, b = (tensors[f"model.layers.1.mlp.up_proj.lora_{x}"] for x in "ab")
    assert np.allclose(2.0 * (a @ b).T, wanted(1, "mlp.up_proj"))


def test_torchtune_says_what_torchtune_reads(tmp_path):
    shapes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 12)}
    adapter = make_adapter(tmp_path / "lora", shapes, layers=[0])
    out = through(tmp_path, adapter, make_base(tmp_path / "base", "llama"), "torchtune")
    tensors = open_torch(out / "adapter_model.pt")
    assert {name.split(".", 2)[2].rsplit(".", 2)[0] for name in tensors} == {
        "attn.q_proj",
        "mlp.w1",
        "mlp.w2",
        "mlp.w3",
    }
    assert len(tensors) == LAYERS * 4 * 2
    assert not tensors["layers.1.attn.q_proj.lora_b.weight"].any()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_litgpt_says_what_litgpt_reads(tmp_path):
    adapter, wanted = the_adapter(tmp_path)
    out = through(tmp_path, adapter, make_base(tmp_path / "base", "llama"), "litgpt")
    said = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert said["lora_query"] and said["lora_key"] and said["lora_value"] and said["lora_mlp"]
    assert said["lora_projection"] and not said["lora_head"]
    assert (said["lora_r"], said["lora_alpha"]) == (4, 8)
    tensors = open_torch(out / "lit_model.pth.lora", "model")
    a, b = (tensors[f"transformer.h.0.attn.qkv.lora_{x}"] for x in "AB")
    assert a.shape == (12, 16) and b.shape == (32, 4)
    rows = {"q": slice(0, 16), "k": slice(16, 24), "v": slice(24, 32)}
    for number, part in enumerate("qkv"):
        got = delta(a[4 * number : 4 * number + 4], b[rows[part]], 2.0)
        assert np.allclose(got, wanted(0, f"self_attn.{part}_proj"))


@pytest.mark.parametrize("through_litgpt", [False, True])
def test_torchtune_turns_the_rows_of_llama_and_not_of_qwen2(tmp_path, through_litgpt):
    # models/convert_weights.py permutes q and k, models/qwen2/_convert_weights.py renames only.
    for model_type, order in (("llama", [0, 2, 1, 3]), ("qwen2", [0, 1, 2, 3])):
        base = make_base(tmp_path / f"base-{model_type}", model_type)
        folder = tmp_path / model_type
        folder.mkdir()
        adapter = make_adapter(folder / "lora", ATTENTION | MLP)
        steps = ["litgpt"] * through_litgpt + ["torchtune"]
        out = through(folder, adapter, base, *steps)
        given = open_tensors(adapter / WEIGHTS)
        got = open_torch(out / "adapter_model.pt")
        for part, heads in (("q", HEADS), ("k", GROUPS)):
            b = given[f"{PREFIX}.1.self_attn.{part}_proj.lora_B.weight"]
            rows = np.array([head * 4 + row for head in range(heads) for row in order])
            assert np.array_equal(got[f"layers.1.attn.{part}_proj.lora_b.weight"], b[rows])


# What the tools have besides


@pytest.mark.parametrize("tool", ["mlx", "torchtune"])
def test_dora_goes_over_and_back(tmp_path, tool):
    base = make_base(tmp_path / "base", "llama")
    random = np.random.default_rng(1)
    weights = {
        f"model.layers.{layer}.{name}.weight": random.normal(size=shape).astype(np.float32)
        for layer in range(LAYERS)
        for name, shape in (ATTENTION | MLP).items()
    }
    write_tensors(base / "model.safetensors", weights, {"format": "pt"})
    shapes = {"self_attn.q_proj": (16, 16), "mlp.up_proj": (12, 16)}
    adapter = make_adapter(tmp_path / "lora", shapes, use_dora=True)
    file = adapter / "adapter_model.safetensors"
    tensors = dict(open_tensors(file))
    for layer in range(LAYERS):
        for name, (out, _) in shapes.items():
            path = f"{PREFIX}.{layer}.{name}.lora_magnitude_vector"
            tensors[path] = np.arange(1, out + 1, dtype=np.float32)
    write_tensors(file, tensors, {"format": "pt"})
    back = through(tmp_path, adapter, base, tool, "transformers-v5")
    got = open_tensors(back / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(got[name], tensor), name
    assert json.loads((back / "adapter_config.json").read_text())["use_dora"] is True
    for other in ("gguf", "litgpt"):
        with pytest.raises(regraft.RefusedError, match="DoRA"):
            regraft.convert(adapter, tmp_path / "no", to=other, model=base)
    if tool == "torchtune":
        (base / "model.safetensors").unlink()
        with pytest.raises(regraft.RefusedError, match="lengths of its rows"):
            regraft.convert(adapter, tmp_path / "no", to=tool, model=base)


def test_a_magnitude_for_each_token_stays_in_mlx(tmp_path):
    base = make_base(tmp_path / "base", "llama", num_hidden_layers=1)
    random = np.random.default_rng(2)
    modules = {"model.embed_tokens": WORDS, "model.layers.0.self_attn.q_proj": HIDDEN}
    weights, tensors = {}, {}
    for module, rows in modules.items():
        weights[f"{module}.weight"] = random.normal(size=(rows, HIDDEN)).astype(np.float32)
        tensors[f"{module}.lora_a"] = random.normal(size=(rows, 4)).astype(np.float32)
        tensors[f"{module}.lora_b"] = random.normal(size=(4, HIDDEN)).astype(np.float32)
        tensors[f"{module}.m"] = random.uniform(1, 2, rows).astype(np.float32)
    write_tensors(base / "model.safetensors", weights, {"format": "pt"})
    adapter = tmp_path / "mlx"
    adapter.mkdir()
    write_tensors(adapter / "adapters.safetensors", tensors, {})
    about = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": [*modules, "self_attn.q_proj"]}
    said = {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": about}
    (adapter / "adapter_config.json").write_text(json.dumps(said))

    regraft.convert(adapter, tmp_path / "same", to="mlx", model=base)
    same = open_tensors(tmp_path / "same/adapters.safetensors")
    assert all(np.array_equal(same[name], tensor) for name, tensor in tensors.items())
    older = said | {"lora_layers": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(older))
    regraft.convert(adapter, tmp_path / "newer", to="mlx", model=base)
    newer = open_tensors(tmp_path / "newer/adapters.safetensors")
    assert all(np.array_equal(newer[name], tensor) for name, tensor in tensors.items())
    for other in ("transformers-v5", "torchtune"):
        with pytest.raises(regraft.RefusedError, match="magnitude for each token"):
            regraft.convert(adapter, tmp_path / "no", to=other, model=base)

    dense = tmp_path / "dense"
    regraft.convert(adapter, dense, to="transformers-v5", model=base, via="dense")
    found = open_tensors(dense / "adapter_model.safetensors")
    for module in modules:
        a, b = (tensors[f"{module}.lora_{x}"].astype(np.float64) for x in "ab")
        if module.endswith("embed_tokens"):
            got = (
                found[f"base_model.model.{module}.lora_embedding_B"]
                @ found[f"base_model.model.{module}.lora_embedding_A"]
            ).T
            added = a @ b
        else:
            got = (
                found[f"base_model.model.{module}.lora_B.weight"]
                @ found[f"base_model.model.{module}.lora_A.weight"]
            )
            added = (a @ b).T
        weight = weights[f"{module}.weight"].astype(np.float64)
        whole = weight + 2.0 * added
        lengths = tensors[f"{module}.m"] / np.linalg.norm(whole, axis=1)
        assert np.abs(got - (whole * lengths[:, None] - weight)).max() < 1e-5


@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_that_sees_is_held_as_its_language_model(tmp_path, tool):
    inner = {"model_type": "llama"} | SIZES
    classes = ["LlavaForConditionalGeneration"]
    base = make_base(tmp_path / "base", "llava", text_config=inner, architectures=classes)
    adapter = make_adapter(tmp_path / "lora", {"self_attn.q_proj": (16, 16)})
    file = adapter / WEIGHTS
    tensors = {
        name.replace(".model.layers", ".model.language_model.layers"): tensor
        for name, tensor in open_tensors(file).items()
    }
    write_tensors(file, tensors, {"format": "pt"})
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"target_modules": ["q_proj"]}))
    with pytest.raises(regraft.RefusedError, match="its language model alone, llama, has a place"):
        regraft.convert(adapter, tmp_path / "no", to=tool, model=base)
    # What the message says to do.
    text = make_base(tmp_path / "text", "llama")
    regraft.convert(adapter, tmp_path / "out", to=tool, model=text, verify=True)
    # A part beside the language model has no place there, so the same would lead to another refusal.
    pair = {f"{tensor}.weight": np.ones((4, 4), "f4") for tensor in ("lora_A", "lora_B")}
    beside = "base_model.model.model.multi_modal_projector.linear_1"
    tensors |= {f"{beside}.{name}": x for name, x in pair.items()}
    write_tensors(file, tensors, {"format": "pt"})
    modules = {"target_modules": ["q_proj", "linear_1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(about | modules))
    with pytest.raises(regraft.RefusedError, match="this is no part of it") as caught:
        regraft.convert(adapter, tmp_path / "no", to=tool, model=base)
    (finding,) = caught.value.findings
    assert finding.key == beside.removeprefix("base_model.model.")
    assert "text_config" not in finding.fix


@pytest.mark.parametrize("tool", ["comfyui", "kohya", "diffusers", "ai-toolkit", "peft-image"])
def test_an_adapter_of_a_language_model_is_none_for_image_tools(tmp_path, tool):
    """Merging would not help, nor would a rule book: the tool has other models only."""
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "lora", ATTENTION)
    with pytest.raises(regraft.RefusedError, match="this is one of llama") as caught:
        regraft.convert(adapter, tmp_path / "no", to=tool, model=base)
    assert "vllm, mlx or gguf" in caught.value.findings[0].fix


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_cannot_hold_is_refused_by_name(tmp_path, tool):
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "lora", ATTENTION, modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": np.ones((WORDS, HIDDEN), np.float32)}
    write_tensors(file, {**open_tensors(file), **head}, {"format": "pt"})
    with pytest.raises(regraft.RefusedError, match="whole weights of the base"):
        regraft.convert(adapter, tmp_path / "no", to=tool, model=base)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("tool", ["gguf", "mlx"])
def test_a_key_without_a_place_is_refused_with_the_reason(tmp_path, tool):
    base = make_base(tmp_path / "base", "deepseek_v3", kv_lora_rank=6)
    adapter = make_adapter(tmp_path / "lora", {"self_attn.kv_b_proj": (40, 6)})
    with pytest.raises(regraft.RefusedError, match=r"has no place for it.*two"):
        regraft.convert(adapter, tmp_path / "no", to=tool, model=base)


@pytest.mark.parametrize("tool", ["gguf", "mlx", "torchtune"])
def test_a_tied_head_is_refused(tmp_path, tool):
    adapter = make_adapter(tmp_path / "lora", {"lm_head": (WORDS, HIDDEN)}, layers=[0])
    tied = make_base(tmp_path / "tied", "llama", tie_word_embeddings=True)
    with pytest.raises(regraft.RefusedError, match="tie_word_embeddings"):
        regraft.convert(adapter, tmp_path / "no", to=tool, model=tied)
    through(tmp_path, adapter, make_base(tmp_path / "base", "llama"), tool, "transformers-v5")


@pytest.mark.parametrize("tool", ["gguf", "mlx"])
def test_an_embedding_that_is_adapted_as_a_parameter(tmp_path, tool):
    base = make_base(tmp_path / "base", "llama")
    random = np.random.default_rng(0)
    path = "base_model.model.model.embed_tokens.lora_"
    a, b = random.normal(size=(2, HIDDEN)), random.normal(size=(WORDS, 2))
    adapter = tmp_path / "lora"
    adapter.mkdir()
    made = {f"{path}A.weight": a.astype("f"), f"{path}B.weight": b.astype("f")}
    write_tensors(adapter / "adapter_model.safetensors", made, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": []}
    config["target_parameters"] = ["model.embed_tokens.weight"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    out = through(tmp_path, adapter, base, tool)
    opened = regraft.dialects.base.dialects()[tool]
    found = opened.find(out)
    (lora,) = opened.open(found.folders[0], found.root, found.weights).loras.values()
    assert np.allclose((lora.scale.value * lora.b @ lora.a).T, b @ a, atol=1e-5)


def test_litgpt_asks_whether_it_is_k_or_v(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    shapes = {name: ATTENTION[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}
    out = through(tmp_path, make_adapter(tmp_path / "lora", shapes), base, "litgpt")
    file = out / "hyperparameters.yaml"
    said = yaml.safe_load(file.read_text())
    kept = {k: v for k, v in said.items() if k not in ("lora_query", "lora_key", "lora_value")}
    file.write_text(yaml.safe_dump(kept))
    with pytest.raises(regraft.AmbiguousError) as caught:
        regraft.convert(out, tmp_path / "no", to="transformers-v5", model=base)
    (finding,) = caught.value.findings
    assert {choice.source for choice in finding.choices} == {"litgpt/qk", "litgpt/qv"}
    report = regraft.convert(
        out, tmp_path / "v", to="transformers-v5", model=base, source="litgpt/qv"
    )
    assert any("v_proj" in target.key for target in report.adapters[0].targets)
    with pytest.raises(regraft.BadInputError, match="are not theirs"):
        regraft.convert(out, tmp_path / "no", to="transformers-v5", model=base, source="litgpt/k")


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16", "Q4_0"])
def test_factors_of_every_type_are_what_the_package_makes_of_them(tmp_path, kind):
    """As `--outtype` of llama.cpp's converter, and `llama-export-lora`, write them."""
    import gguf

    base = make_base(tmp_path / "base", "qwen2", hidden_size=32, head_dim=8)
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(tmp_path / "lora.gguf"), "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 48.0)
    random, wanted = np.random.default_rng(0), {}
    for name in "ab":
        data = random.normal(size=(32, 32)).astype(np.float32)
        packed = gguf.quants.quantize(data, kind)
        wanted[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", packed, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = regraft.convert(
        tmp_path / "lora.gguf", tmp_path / "out", to="transformers-v5", model=base
    )
    told = " ".join([*report.notes, *report.adapters[0].notes, *report.adapters[0].evidence])
    assert ("2 factors were quantised" in told) == (kind.name in ("Q8_0", "Q4_0"))
    assert "1 weights of norms are left out" in told
    tensors = open_tensors(tmp_path / "out" / WEIGHTS)
    path = f"{PREFIX}.0.self_attn.q_proj.lora_"
    for name, letter in zip("ab", "AB", strict=True):
        got = np.array(tensors[f"{path}{letter}.weight"]).astype(np.float32)
        np.testing.assert_array_equal(got, wanted[name].reshape(32, 32))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1.5


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma2"])
def test_litgpt_s_model_config_is_written_where_it_is_known(tmp_path, model_type):
    more = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "num_experts_per_tok": 2}
    base = make_base(tmp_path / "base", model_type, **more)
    adapter = make_adapter(tmp_path / "lora", ATTENTION)
    report = regraft.convert(adapter, tmp_path / "out", to="litgpt", model=base)
    file = tmp_path / "out/model_config.yaml"
    assert file.is_file() == (model_type != "gemma2")
    assert ("merge_lora wants" in " ".join(report.adapters[0].notes)) == (model_type == "gemma2")
    if file.is_file():
        said = yaml.safe_load(file.read_text())
        assert (said["n_layer"], said["n_head"], said["n_query_groups"]) == (LAYERS, HEADS, GROUPS)
        assert said.get("n_expert") == (EXPERTS if model_type == "qwen3_moe" else None)


def test_damaged_files_are_findings(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "lora", ATTENTION)
    cut = tmp_path / "cut.gguf"
    regraft.convert(adapter, tmp_path / "whole.gguf", to="gguf", model=base)
    cut.write_bytes((tmp_path / "whole.gguf").read_bytes()[:-200])
    with pytest.raises(regraft.BadInputError, match="gguf"):
        regraft.convert(cut, tmp_path / "no", to="mlx", model=base)
    made = through(tmp_path, adapter, base, "mlx")
    config = json.loads((made / "adapter_config.json").read_text())
    config["lora_parameters"] |= {"rank": 8, "keys": ["self_attn.q_proj"]}
    (made / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(made, tmp_path / "no", to="transformers-v5", model=base)
    assert {finding.code for finding in caught.value.findings} == {"rank", "not-targeted"}
    made = through(tmp_path, adapter, base, "torchtune")
    tensors = dict(open_torch(made / "adapter_model.pt"))
    tensors.pop("layers.0.attn.q_proj.lora_b.weight")
    write_torch(made / "adapter_model.pt", tensors)
    with pytest.raises(regraft.BadInputError, match="not there"):
        regraft.convert(made, tmp_path / "no", to="transformers-v5", model=base)


def test_a_scale_that_becomes_infinite_is_a_finding(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    made = through(tmp_path, make_adapter(tmp_path / "lora", ATTENTION), base, "mlx")
    file = made / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] = 1e308
    file.write_text(json.dumps(config))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(made, tmp_path / "no", to="peft", model=base)
    assert {finding.code for finding in caught.value.findings} == {"config"}
    assert not (tmp_path / "no").exists()


def test_old_mlx_files(tmp_path):
    """Experts one below the other, and a scale that alpha / rank multiplies."""
    base = make_base(tmp_path / "base", "qwen3_moe")
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    random = np.random.default_rng(0)
    a, b = random.normal(size=(EXPERTS * 2, 16)), random.normal(size=(EXPERTS, 12, 2))
    old = tmp_path / "old"
    old.mkdir()
    made = {f"{path}.lora_a": a.astype("f"), f"{path}.lora_b": b.astype("f")}
    write_tensors(old / "adapters.safetensors", made, {})
    parameters = {"rank": 2, "alpha": 4, "scale": 3.0, "dropout": 0.0}
    config = {"lora_layers": 2, "lora_parameters": parameters}
    (old / "adapter_config.json").write_text(json.dumps(config))
    new = through(tmp_path, old, base, "transformers-v4")
    got = open_tensors(new / "adapter_model.safetensors")
    about = json.loads((new / "adapter_config.json").read_text())
    name = f"{PREFIX}.0.mlp.experts.1.up_proj.lora_"
    found = delta(got[f"{name}A.weight"], got[f"{name}B.weight"], about["lora_alpha"] / 2)
    assert np.allclose(found, 6.0 * b[1] @ a[2:4], rtol=1e-5)


def test_mlx_s_older_flat_experts_become_today_s_form(tmp_path):
    """Releases before 0.28 had (E * rank, in); today's do not read that."""
    base = make_base(tmp_path / "base", "qwen3_moe")
    made = through(tmp_path, make_adapter(tmp_path / "lora", modules_of("qwen3_moe")), base, "mlx")
    old = tmp_path / "old"
    shutil.copytree(made, old)
    tensors = {
        name: x.reshape(-1, x.shape[-1]) if "switch" in name and name.endswith("lora_a") else x
        for name, x in open_tensors(made / "adapters.safetensors").items()
    }
    write_tensors(old / "adapters.safetensors", tensors, {})
    regraft.convert(old, tmp_path / "new", to="mlx", model=base)
    again = open_tensors(tmp_path / "new" / "adapters.safetensors")
    for name, x in open_tensors(made / "adapters.safetensors").items():
        np.testing.assert_array_equal(again[name], x)


def test_sizes_of_zeros_are_those_of_weights_of_the_same_name():
    """Names that differ in a digit of their own are two; layers and experts make no difference."""
    rows = {"fc_1": 3, "fc_2": 5}
    loras = {
        f"h.{layer}.{name}.weight": Lora(np.zeros((2, 4)), np.zeros((out, 2)), Scale(2, 2))
        for layer in range(2)
        for name, out in rows.items()
    }
    known = Known((), {}, None, None, "")
    sizes = Sizes(known, "litgpt", as_images(loras), "LitGPT", "here")
    assert sizes.of("h.7.fc_1.weight") == (3, 4)
    assert sizes.of("h.7.fc_2.weight") == (5, 4)


@pytest.mark.parametrize("to", TOOLS)
def test_repeated_layers_are_refused(tmp_path, to):
    """Layer 1 of the model that was adapted is layer 0 of its base, and no file of these tools says so."""
    base = make_base(tmp_path / "base", "llama")
    source = make_adapter(tmp_path / "src", modules_of("llama"))
    file = source / "adapter_config.json"
    config = {**json.loads(file.read_text()), "layer_replication": [[0, 1], [0, 1]]}
    file.write_text(json.dumps(config))
    with pytest.raises(regraft.RefusedError, match="repeated layers"):
        regraft.convert(source, tmp_path / "out", to=to, model=base)


@pytest.mark.parametrize("to", TOOLS)
def test_float64_is_rounded_and_that_is_said(tmp_path, to):
    base = make_base(tmp_path / "base", "llama")
    source = make_adapter(tmp_path / "src", modules_of("llama"), dtype=np.float64)
    report = regraft.convert(source, tmp_path / "out", to=to, model=base).adapters[0]
    assert any("float64 and became float32" in note for note in report.notes)
    assert all(target.exact for target in report.targets)
    file = source / WEIGHTS
    tensors = {name: tensor * (1 + 1e-12) for name, tensor in open_tensors(file).items()}
    file.unlink()
    write_tensors(file, tensors, {})
    report = regraft.convert(source, tmp_path / "again", to=to, model=base).adapters[0]
    assert not any(target.exact for target in report.targets)


@pytest.mark.parametrize("alpha", [1e300, 1e-300])
def test_an_alpha_that_gguf_cannot_hold(tmp_path, alpha):
    """It is a float32 there, and 0 would stand for a scale of 1."""
    base = make_base(tmp_path / "base", "llama")
    source = make_adapter(tmp_path / "src", ATTENTION, alpha=alpha)
    with pytest.raises(regraft.RefusedError, match="out of its range"):
        regraft.convert(source, tmp_path / "out", to="gguf", model=base)


@pytest.mark.slow
def test_the_language_model_of_another_vlm_by_its_own_config(tmp_path):
    """What the refusal says to do is what works."""
    inner = {"model_type": "llama", **SIZES}
    classes = ["LlavaForConditionalGeneration"]
    base = make_base(tmp_path / "base", "llava", text_config=inner, architectures=classes)
    text = make_base(tmp_path / "text", "llama")
    plain = make_adapter(tmp_path / "lora", ATTENTION | MLP)
    tensors = {
        name.replace("model.model.", "model.model.language_model.", 1): x.copy()
        for name, x in open_tensors(plain / WEIGHTS).items()
    }
    write_tensors(plain / WEIGHTS, tensors, {"format": "pt"})
    config = json.loads((plain / "adapter_config.json").read_text())
    config["target_modules"] = sorted({x.rpartition(".")[2] for x in config["target_modules"]})
    (plain / "adapter_config.json").write_text(json.dumps(config))
    for tool in TOOLS:
        with pytest.raises(regraft.RefusedError, match="save text_config"):
            regraft.convert(plain, tmp_path / f"refused-{tool}", to=tool, model=base)
        made = through(tmp_path, plain, text, tool)
        assert regraft.verify(plain, made, model=text).equal
