"""Classes that are not transformers' own: what they add stays as it is, and what they hold is found by its names."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.storage.safetensors import open_tensors, write_tensors

pytest.importorskip("torch")
pytest.importorskip("transformers")

REMOTE = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAVA = {
    "model_type": "llava",
    "architectures": ["ColThing"],
    "text_config": {"model_type": "llama", **SIZES, "num_key_value_heads": 1, "vocab_size": 20},
    "vision_config": {
        "model_type": "clip_vision_model",
        **SIZES,
        "image_size": 8,
        "patch_size": 4,
    },
}
QUERY = "layers.0.self_attn.q_proj"
PROJECTION = "custom_text_proj"


def numbers(*shape):
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def made(src, tmp_path, **options):
    """Names and tensors that a conversion to transformers 5 makes, and its report."""
    out = tmp_path / "out"
    report = regraft.convert(src, out, to="transformers-v5", **options)
    (file,) = out.glob("*.safetensors")
    return {name: np.array(tensor) for name, tensor in open_tensors(file).items()}, report


def lora(path, modules):
    path.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{x}.weight": numbers(*shape)
        for name, (rows, columns) in modules.items()
        for x, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config["target_modules"] = sorted({name.split(".")[-1] for name in modules})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_a_head_of_a_subclass_stays_as_it_is(tmp_path):
    config = {**MIXTRAL, **REMOTE, "architectures": ["MixtralForReward"]}
    head = numbers(1, 8)
    src = write_folder(tmp_path / "src", {**mixtral(), "v_head.weight": head}, config)
    found, report = made(src, tmp_path)
    assert np.array_equal(found["v_head.weight"], head)
    assert "model.layers.0.mlp.experts.gate_up_proj" in found
    (note,) = [n for n in report.notes if "not a class of transformers" in n]
    assert "MixtralForReward" in note and "v_head.weight" in note


def test_a_class_of_transformers_adds_nothing(tmp_path):
    config = {**MIXTRAL, **REMOTE, "architectures": ["MixtralForCausalLM"]}
    src = write_folder(tmp_path / "src", {**mixtral(), "v_head.weight": numbers(1, 8)}, config)
    with pytest.raises(regraft.UnmatchedKeysError, match=r"v_head\.weight"):
        made(src, tmp_path)


def test_a_layer_beyond_the_config_is_not_the_classs_own(tmp_path):
    config = {**MIXTRAL, "architectures": ["MixtralForReward"]}
    key = "model.layers.77.block_sparse_moe.experts.0.w1.weight"
    tensors = {**mixtral(), "v_head.weight": numbers(1, 8), key: numbers(6, 8)}
    with pytest.raises(regraft.RegraftError, match=r"layers\.77"):
        made(write_folder(tmp_path / "src", tensors, config), tmp_path)


def test_parts_of_a_model_of_an_unknown_type(tmp_path):
    """A chat model of remote code around a known language model; its own tower stays as it is."""
    config = {
        "model_type": "somebodys_chat",
        "architectures": ["SomebodysChat"],
        **REMOTE,
        "llm_config": {**MIXTRAL, "architectures": ["MixtralForCausalLM"]},
    }
    tower = {"vision_model.layers.0.qkv.weight": numbers(24, 8), "mlp1.0.weight": numbers(8)}
    inside = {f"language_model.{name}": tensor for name, tensor in mixtral().items()}
    src = write_folder(tmp_path / "src", {**inside, **tower}, config)
    found, _ = made(src, tmp_path)
    assert all(np.array_equal(found[name], tensor) for name, tensor in tower.items())
    assert "language_model.model.layers.0.mlp.experts.gate_up_proj" in found

    query = f"language_model.model.{QUERY}"
    size = inside[f"{query}.weight"].shape
    (tmp_path / "lora").mkdir()
    modules = {query: size, "vision_model.layers.0.qkv": (24, 8)}
    adapter = lora(tmp_path / "lora" / "there", modules)
    found, report = made(adapter, tmp_path / "lora", model=src)
    assert set(found) == set(open_tensors(adapter / "adapter_model.safetensors"))
    assert any("vision_model.layers.0.qkv" in note for note in report.notes)

    (tmp_path / "other").mkdir()
    adapter = lora(tmp_path / "other" / "there", {query: size, "vision_model.head": (8, 8)})
    with pytest.raises(regraft.UnmatchedKeysError, match=r"vision_model\.head"):
        made(adapter, tmp_path / "other", model=src)


def held_llava():
    """A LLaVA as transformers 4 wrote it, at ``model`` in a class of somebody's own, with a projection beside it."""
    import transformers

    from regraft.bridges.transformers.building import build, make_config

    model = build(transformers.LlavaForConditionalGeneration, make_config("llava", LLAVA))
    moved = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    old = {}
    for key, tensor in model.state_dict().items():
        new = next(start for start in moved if key.startswith(start))
        old[f"model.{moved[new]}{key.removeprefix(new)}"] = (f"model.{key}", numbers(*tensor.shape))
    return old


def test_a_known_model_in_a_class_of_somebodys_own(tmp_path):
    old = held_llava()
    tensors = {name: tensor for name, (_, tensor) in old.items()}
    tensors[f"{PROJECTION}.weight"] = numbers(4, 8)
    src = write_folder(tmp_path / "src", tensors, LLAVA)
    found, report = made(src, tmp_path)
    expected = dict(old.values())
    expected[f"{PROJECTION}.weight"] = tensors[f"{PROJECTION}.weight"]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())
    assert any("has a LlavaForConditionalGeneration at model" in note for note in report.notes)
    regraft.convert(tmp_path / "out", tmp_path / "back", to="transformers-v4")
    back = open_tensors(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())

    (tmp_path / "lora").mkdir()
    modules = {f"model.language_model.model.{QUERY}": (8, 8), PROJECTION: (4, 8)}
    adapter = lora(tmp_path / "lora" / "there", modules)
    found, _ = made(adapter, tmp_path / "lora", model=src)
    assert {name.split(".lora_")[0] for name in found} == {
        f"base_model.model.model.model.language_model.{QUERY}",
        f"base_model.model.{PROJECTION}",
    }


def test_a_model_of_which_nothing_is_known_but_its_weights(tmp_path):
    config = {"model_type": "somebodys", "architectures": ["Somebodys"], **REMOTE}
    base = write_folder(tmp_path / "base", mixtral(), config)
    query = f"model.{QUERY}"
    size = mixtral()[f"{query}.weight"].shape
    adapter = lora(tmp_path / "there", {query: size})
    found, report = made(adapter, tmp_path, model=base)
    before = open_tensors(adapter / "adapter_model.safetensors")
    assert found.keys() == before.keys()
    assert any("nothing moves" in note for note in report.notes)
    other = lora(tmp_path / "other", {"model.layers.0.strange": size})
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(other, tmp_path / "new", to="transformers-v5", model=base)
    assert caught.value.findings[0].code == "unknown-model"


def test_packed_experts_are_no_modules_of_somebody_s_own(tmp_path, monkeypatch):
    """Nothing has to be asked of transformers for them, which takes seconds."""
    golden = Path(__file__).parents[1] / "golden"
    adapter = golden / "cases/mixtral__gud_attn"

    def asked(self, names):
        raise AssertionError(f"{names} were asked for")

    monkeypatch.setattr(InstalledTransformers, "has_class", asked)
    base = golden / "bases/mixtral"
    regraft.convert(adapter, tmp_path / "v5", to="transformers-v5", model=base)
    regraft.convert(tmp_path / "v5", tmp_path / "v4", to="transformers-v4", model=base)
