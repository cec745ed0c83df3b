"""Models that are made otherwise: factors of fused image layers, experts without a gate, a model in a model's memory.

Sources: filipstrand/mflux#458, kohya-ss/sd-scripts#1467, huggingface/diffusers#14409, NVIDIA-NeMo/Automodel#3284,
huggingface/transformers#45216, ggml-org/llama.cpp#21354 and #21864. Keys and shapes are rebuilt.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from dialects.image.samples import H, pair, product, read_diffusers
from rebuilt import (
    PREFIX,
    V4,
    V5,
    config_of,
    lora,
    read,
    same,
    write_adapter,
    write_base,
    write_checkpoint,
)

import regraft
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

LINEAR1 = "lora_unet_single_blocks_0_linear1"
PARTS = {"attn.to_q": H, "attn.to_k": H, "attn.to_v": H, "proj_mlp": 4 * H}
BLOCK = "transformer.single_transformer_blocks.0."
LLAVA = Path(__file__).parent.parent / "golden/bases/llava_mixtral"


def converted(folder, tensors, to, **options):
    src, made = folder / "src.safetensors", folder / "made.safetensors"
    write_tensors(src, tensors, {})
    regraft.convert(src, made, to=to, overwrite=True, **options)
    return open_tensors(made), dict(read_header(made).metadata)


def test_one_fused_layer_becomes_four_that_share_its_a(tmp_path):
    down, up = pair(7 * H, H, rank=4)
    tensors = {f"{LINEAR1}.lora_down.weight": down, f"{LINEAR1}.lora_up.weight": up}
    made, metadata = converted(
        tmp_path, {**tensors, f"{LINEAR1}.alpha": np.float32(2)}, "diffusers", source="flux"
    )
    rows = np.split(up, np.cumsum(list(PARTS.values()))[:-1])
    for name, want in zip(PARTS, rows, strict=True):
        assert np.array_equal(made[f"{BLOCK}{name}.lora_A.weight"], down)
        assert np.array_equal(made[f"{BLOCK}{name}.lora_B.weight"], want)
    added = read_diffusers(made, metadata)
    whole = np.concatenate([added[f"single_transformer_blocks.0.{name}"] for name in PARTS])
    assert np.array_equal(whole, product(down, up, 2 / 4))


def test_four_layers_become_one_whose_ranks_add(tmp_path):
    tensors, wanted = {}, []
    for name, out in PARTS.items():
        down, up = pair(out, H)
        tensors |= {f"{BLOCK}{name}.lora_A.weight": down, f"{BLOCK}{name}.lora_B.weight": up}
        wanted.append(product(down, up))
    made, _ = converted(tmp_path, tensors, "kohya", source="flux")
    down, up = made[f"{LINEAR1}.lora_down.weight"], made[f"{LINEAR1}.lora_up.weight"]
    assert len(down) == 4 * 2
    alpha = float(made[f"{LINEAR1}.alpha"])
    assert np.array_equal(product(down, up, alpha / len(down)), np.concatenate(wanted))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_ranks_differ_and_no_alpha_is_said(to, tmp_path):
    """The first module's rank is not everybody's alpha: each adds with the scale 1."""
    ranks = {"norm.linear": (3 * H, 1), "attn.to_q": (H, 4), "attn.to_k": (H, 4)}
    tensors, wanted = {}, {}
    for name, (out, rank) in ranks.items():
        down, up = pair(out, H, rank=rank)
        tensors |= {f"{BLOCK}{name}.lora_A.weight": down, f"{BLOCK}{name}.lora_B.weight": up}
        wanted[f"single_transformer_blocks.0.{name}"] = product(down, up)
    made, metadata = converted(tmp_path, tensors, to, source="flux")
    if to == "kohya":
        write_tensors(tmp_path / "kohya.safetensors", made, metadata)
        regraft.convert(
            tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", to="diffusers"
        )
        made = open_tensors(tmp_path / "again.safetensors")
        metadata = dict(read_header(tmp_path / "again.safetensors").metadata)
    added = read_diffusers(made, metadata)
    for name, delta in wanted.items():
        np.testing.assert_allclose(added[name], delta, rtol=1e-6)


NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 6,
    "layers_block_type": ["linear_attention", "moe"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_groups": 1,
    "n_routed_experts": 4,
    "moe_intermediate_size": 6,
    "moe_shared_expert_intermediate_size": 6,
    "num_experts_per_tok": 2,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
}


@pytest.mark.slow
def test_experts_without_a_gate(tmp_path):
    """There is an ``up_proj`` and no ``gate_up_proj``, so no rank grows; the config has a float that JSON has not."""
    pytest.importorskip("transformers", minversion="5.0")
    model = write_base(tmp_path / "base", "nemotron_h", **NEMOTRON)
    at = "backbone.layers.1.mixer.experts."
    shapes = lora({f"{at}{e}.up_proj": (6, 16) for e in range(4)})
    shapes |= lora({f"{at}{e}.down_proj": (16, 6) for e in range(4)})
    src = write_adapter(tmp_path / "src", shapes, target_modules=["up_proj", "down_proj"])
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    said = config_of(tmp_path / "new")
    assert {entry.rpartition(".")[2] for entry in said["target_parameters"]} == {
        "up_proj",
        "down_proj",
    }
    assert said["r"] == 2 and not said["rank_pattern"]
    assert regraft.verify(src, tmp_path / "new", model=model)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=model)
    assert same(read(tmp_path / "back"), read(src))


def in_memory(name):
    """What transformers 4.52 to 4.57 called a tensor of LLaVA in memory, as runs with FSDP or DeepSpeed save it."""
    name = name.replace("language_model.lm_head", "lm_head")
    name = name.replace("language_model.model.", "model.language_model.")
    towers = ("vision_tower.", "multi_modal_projector.")
    return f"model.{name}" if name.startswith(towers) else name


def test_a_model_with_towers_as_it_was_in_memory(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    config = json.loads((LLAVA / "config.json").read_text())
    kind = config.pop("model_type")
    saved = read(LLAVA)
    there = {in_memory(name): tensor for name, tensor in saved.items()}
    assert len(there.keys() - saved.keys()) == len(saved)
    src = write_checkpoint(tmp_path / "src", there, kind, **config)
    regraft.convert(
        write_checkpoint(tmp_path / "saved", saved, kind, **config), tmp_path / "r", to=V5
    )
    regraft.convert(src, tmp_path / "new", to=V5)
    assert same(read(tmp_path / "new"), read(tmp_path / "r"))
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4)
    back = read(tmp_path / "back")
    assert same(back, there) or same(back, saved)


@pytest.mark.parametrize("root", ["", "model.", "wrapper.inner.model."])
def test_a_scope_is_the_same_below_every_root(root, tmp_path):
    """A tower's rule applies below the tower alone, wherever the model stands."""
    rules = tmp_path / "mine.toml"
    rules.write_text(
        'name = "mine"\ntitle = "mine"\nleft = "transformers-v4"\nright = "transformers-v5"\nmodel_types = ["mine"]\n'
        "[[module]]\n"
        'left = "{*p}.vision_tower.layers.{l}.q"\nright = "{*p}.vision_tower.encoder.layers.{l}.q"\n'
        '[[carry]]\nkeys = ["{*p}.language_model.layers.{l}.q.weight : o i"]\nkind = "linear"\nwhy = "the same"\n'
    )
    at = "vision_tower.layers.0.q", "language_model.layers.0.q"
    src = write_adapter(
        tmp_path / "src", lora({root + name: (4, 4) for name in at}), target_modules=["q"]
    )
    regraft.convert(
        src,
        tmp_path / "new",
        to=V5,
        source=V4,
        rules=[rules],
        model=write_base(tmp_path / "b", "mine"),
    )
    made = {k.removeprefix(PREFIX).rpartition(".lora_")[0] for k in read(tmp_path / "new")}
    assert made == {root + "vision_tower.encoder.layers.0.q", root + "language_model.layers.0.q"}


def test_rows_in_another_order_are_rows_of_b_alone(tmp_path):
    """llama.cpp pairs the rotary halves of a head; a converter that reshaped factors failed or mixed them."""
    gguf = pytest.importorskip("gguf")
    base = write_base(tmp_path / "base", "llama")
    heads, width = 2, 8
    rows = heads * width
    src = write_adapter(
        tmp_path / "src",
        lora({"model.layers.0.self_attn.q_proj": (rows, 16)}),
        target_modules=["q_proj"],
    )
    regraft.convert(src, tmp_path / "made.gguf", to="gguf", model=base)
    made = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "made.gguf").tensors}
    a, b = (read(src)[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    order = np.arange(rows).reshape(heads, 2, width // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(made["blk.0.attn_q.weight.lora_a"], a)
    assert np.array_equal(made["blk.0.attn_q.weight.lora_b"], b[order])


def test_heads_in_an_order_that_no_book_knows_are_refused(tmp_path):
    base = write_base(tmp_path / "base", "qwen3_next", hidden_size=16, num_hidden_layers=2)
    shapes = lora({"model.layers.0.linear_attn.out_proj": (16, 16)})
    src = write_adapter(tmp_path / "src", shapes, target_modules=["out_proj"])
    with pytest.raises(regraft.RefusedError, match="qwen3_next"):
        regraft.convert(src, tmp_path / "made.gguf", to="gguf", model=base)
