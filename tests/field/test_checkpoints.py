"""Whole checkpoints: further layers, unused keys, ties, quantised weights, indexes, and what lies beside them.

Sources: huggingface/transformers#46265, #48805, #48519, NVIDIA-NeMo/Automodel#2553, thinking-machines-lab/tinker#593,
NVIDIA-NeMo/Megatron-Bridge#5364, kvcache-ai/ktransformers#2148, unslothai/unsloth-zoo#647. Keys and shapes are rebuilt.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder
from rebuilt import V4, V5, codes, numbered, read, same, write_checkpoint

import regraft
from regraft.storage.safetensors import write_tensors

MTP = {
    "deepseek_v3": {
        "n_routed_experts": 2,
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
    },
    "glm4_moe": {
        "n_routed_experts": 2,
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 1,
        "moe_intermediate_size": 6,
        "hidden_size": 16,
    },
    "qwen3_next": {
        "num_experts": 2,
        "num_hidden_layers": 1,
        "moe_intermediate_size": 6,
        "hidden_size": 16,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 2,
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 1,
        "moe_intermediate_size": 6,
        "hidden_size": 16,
    },
}
ROOTS = {
    "deepseek_v3": "model.layers.1",
    "glm4_moe": "model.layers.1",
    "qwen3_next": "mtp.layers.0",
    "ernie4_5_moe": "model.mtp_block.0",
}


def experts(root, count=2, hidden=16, inner=6):
    return {
        f"{root}.mlp.experts.{e}.{name}_proj.weight": (hidden, inner)
        if name == "down"
        else (inner, hidden)
        for e in range(count)
        for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize("kind", MTP)
def test_layers_for_further_tokens_are_converted_with_the_rest(kind, tmp_path):
    root = ROOTS[kind]
    shapes = experts("model.layers.0") | experts(root) | {f"{root}.input_layernorm.weight": (16,)}
    shapes |= {"model.norm.weight": (16,)}
    src = write_checkpoint(tmp_path / "src", shapes, kind, **MTP[kind])
    report = regraft.convert(src, tmp_path / "new", to=V5)
    assert any("MTP" in note for note in report.notes)
    made = read(tmp_path / "new")
    stacked = {name for name in made if ".experts." in name}
    wanted = {f"{at}.mlp.experts.{n}" for at in ("model.layers.0", root) for n in STACKS}
    assert stacked == wanted
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4)
    assert same(read(tmp_path / "back"), read(src))


STACKS = ("gate_up_proj", "down_proj")


def test_layers_beyond_those_for_further_tokens_are_an_error(tmp_path):
    shapes = experts("model.layers.0") | experts("model.layers.2")
    src = write_checkpoint(tmp_path / "src", shapes, "deepseek_v3", **MTP["deepseek_v3"])
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5)
    assert codes(caught) == {"wrong-base"}


def test_what_the_class_does_not_use_is_left_to_the_user(tmp_path):
    """A pooler and a second head: kept or left out, by name."""
    tensors = mixtral() | {"model.pooler.dense.weight": np.ones((8, 8), np.float32)}
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5)
    assert "--drop" in str(caught.value)
    kept = regraft.convert(src, tmp_path / "kept", to=V5, keep=["model.pooler.*"])
    assert "model.pooler.dense.weight" in read(tmp_path / "kept")
    dropped = regraft.convert(src, tmp_path / "dropped", to=V5, drop=["model.pooler.*"])
    assert "model.pooler.dense.weight" not in read(tmp_path / "dropped")
    assert all(any("pooler" in note for note in r.notes) for r in (kept, dropped))
    for options in ({"drop": ["nothing.*"]}, {"drop": ["*pooler*"], "keep": ["model.pooler.*"]}):
        with pytest.raises(regraft.BadInputError):
            regraft.convert(src, tmp_path / "none", to=V5, **options)
    assert not (tmp_path / "none").exists()


def test_there_and_back_is_the_file(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    regraft.convert(src, tmp_path / "new", to=V5)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4)
    assert same(read(tmp_path / "back"), read(src))
    regraft.convert(tmp_path / "new", tmp_path / "again", to=V5)
    assert same(read(tmp_path / "again"), read(tmp_path / "new"))


@pytest.mark.parametrize("head", ["absent", "equal", "other"])
def test_a_tied_head(head, tmp_path):
    tensors = mixtral()
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    src = write_folder(tmp_path / "src", tensors, {**MIXTRAL, "tie_word_embeddings": True})
    if head == "other":
        with pytest.raises(regraft.RegraftError) as caught:
            regraft.convert(src, tmp_path / "new", to=V5)
        assert codes(caught) == {"two-values"}
        return
    regraft.convert(src, tmp_path / "new", to=V5)
    assert ("lm_head.weight" in read(tmp_path / "new")) == (head == "equal")


def test_types_stay_tensor_by_tensor(tmp_path):
    """A router's float32 bias in a model of bfloat16."""
    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in mixtral().items()}
    tensors[name] = np.arange(3, dtype=np.float32)
    src = write_folder(tmp_path / "src", tensors, {**MIXTRAL, "model_type": "minimax_m2"})
    regraft.convert(src, tmp_path / "new", to=V5)
    made = read(tmp_path / "new")
    assert made["model.layers.0.mlp.e_score_correction_bias"].dtype == np.float32
    assert made["model.layers.0.mlp.experts.down_proj"].dtype == ml_dtypes.bfloat16


def fp8(block=4):
    """Experts of FP8 with the scales of their blocks."""
    tensors = numbered(experts("model.layers.0", 2, 8, 4) | {"model.norm.weight": (8,)})
    for name in [n for n in tensors if ".experts." in n]:
        out, inside = tensors[name].shape
        tensors[f"{name}_scale_inv"] = np.full(
            (out // block, inside // block), len(tensors), np.float32
        )
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    config = {
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }
    return tensors, config


def test_scales_of_blocks_go_with_their_experts(tmp_path):
    tensors, quantised = fp8()
    sizes = {**MTP["deepseek_v3"], "hidden_size": 8, "moe_intermediate_size": 4}
    src = write_checkpoint(
        tmp_path / "src", tensors, "deepseek_v3", **sizes, quantization_config=quantised
    )
    regraft.convert(src, tmp_path / "new", to=V5)
    made = read(tmp_path / "new")
    assert sum(v.size for v in made.values()) == sum(v.size for v in tensors.values())
    scales = sorted({float(x) for k, v in made.items() if "scale" in k for x in v.ravel()})
    assert scales == sorted({float(v.ravel()[0]) for k, v in tensors.items() if "scale" in k})
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4)
    assert same(read(tmp_path / "back"), read(src))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_experts_are_named(method, tmp_path):
    """Packed numbers cannot be joined: they stay one by one or are refused, and the method is named."""
    tensors = numbered({"model.norm.weight": (8,)})
    for name in experts("model.layers.0", 2, 8, 8):
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = np.ones((1, 8), np.int32)
        tensors[f"{module}.qzeros"] = np.ones((1, 1), np.int32)
        tensors[f"{module}.scales"] = np.ones((1, 8), np.float16)
    sizes = {**MTP["deepseek_v3"], "hidden_size": 8, "moe_intermediate_size": 8}
    quantised = {"quant_method": method, "bits": 4, "group_size": 8}
    src = write_checkpoint(
        tmp_path / "src", tensors, "deepseek_v3", **sizes, quantization_config=quantised
    )
    try:
        report = regraft.convert(src, tmp_path / "new", to=V5)
    except regraft.RefusedError as error:
        assert method.upper() in str(error)
        return
    assert same(read(tmp_path / "new"), tensors) and method in str(report).lower()


def test_an_old_index_beside_a_whole_file(tmp_path):
    """What the loader takes is taken, the rest is said, and a sound index is written."""
    src = write_folder(tmp_path / "src", mixtral())
    stale = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    (src / "model.safetensors.index.json").write_text(json.dumps(stale))
    report = regraft.convert(src, tmp_path / "new", to=V5)
    assert any("index" in note for note in report.notes)
    assert not (tmp_path / "new" / "model.safetensors.index.json").exists()


def test_a_download_that_did_not_end_is_named(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=3)
    lost = "model-00002-of-00003.safetensors"
    (src / lost).unlink()
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5)
    assert lost in str(caught.value) and "index" in str(caught.value)


def test_a_file_of_old_shards_beside_the_index_is_left(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    write_tensors(
        src / "model-00003-of-00003.safetensors", numbered({"model.norm.weight": (8,)}), {}
    )
    report = regraft.convert(src, tmp_path / "new", to=V5)
    assert any("model-00003-of-00003" in note for note in report.notes)
    assert (
        read(tmp_path / "new").keys()
        and not (tmp_path / "new" / "model-00003-of-00003.safetensors").exists()
    )


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_what_a_run_left_is_not_taken_along(name, tmp_path):
    """An optimizer's groups are those of the old layout."""
    src = write_folder(tmp_path / "src", mixtral())
    (src / name).write_bytes(b"x" * 64)
    report = regraft.convert(src, tmp_path / "new", to=V5)
    assert not (tmp_path / "new" / name).exists()
    assert any(name in note for note in report.notes)


def test_a_part_of_a_target_is_made_of_parts_of_its_sources(tmp_path):
    """What one rank wants of a stack is what it would have cut of the whole, which no rank has to put together."""
    src = write_folder(tmp_path / "src", mixtral())
    regraft.convert(src, tmp_path / "new", to=V5)
    name = "model.layers.0.mlp.experts.down_proj"
    found = regraft.slices(src, to=V5, names=[name], box=((1, 2), None, None))
    expert = mixtral()["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert found.bytes == expert.nbytes
