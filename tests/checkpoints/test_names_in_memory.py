"""State dicts of models in memory: wrappers' segments, and names that are old in one part and new in another."""

import numpy as np
import pytest
import torch
from checkpoints.models import mixtral, write_folder
from making import book_of

import regraft
from regraft.errors import BadInputError
from regraft.live.state_dict import convert_state_dict
from regraft.rules.book import only_books
from regraft.storage.safetensors import open_tensors

V4, V5 = "transformers-v4", "transformers-v5"


def tensors_of(folder):
    return {k: np.array(v) for k, v in open_tensors(folder / "model.safetensors").items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in other)


WRAPPED = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "DDP": lambda n: f"module.{n}",
    "FSDP": lambda n: f"_fsdp_wrapped_module.{n}".replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "DDP around compiled": lambda n: f"module._orig_mod.{n}",
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrappers_are_taken_out_and_told_once(tmp_path, form):
    src = write_folder(tmp_path / "src", {WRAPPED[form](k): v for k, v in mixtral().items()})
    clean = write_folder(tmp_path / "clean", mixtral())
    report = regraft.convert(src, tmp_path / "new", to=V5)
    regraft.convert(clean, tmp_path / "wanted", to=V5)
    assert same(tensors_of(tmp_path / "new"), tensors_of(tmp_path / "wanted"))
    assert sum("segments of wrappers" in note for note in report.notes) == 1
    # In its own layout, too.
    regraft.convert(src, tmp_path / "old", to=V4)
    assert same(tensors_of(tmp_path / "old"), mixtral())


def test_two_names_that_become_one(tmp_path):
    tensors = mixtral()
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"]
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(BadInputError, match="the same tensor"):
        regraft.convert(src, tmp_path / "new", to=V5)


def test_a_part_of_the_model_that_is_called_so_stays(tmp_path):
    """Where a rule book of the user's has the segment in its keys."""
    book = book_of(
        """
[[equation]]
name = "inner"
text = "module._orig_mod.a.weight : i j == module._orig_mod.b.weight : j i"
left_kind = "any"
right_kind = "any"
"""
    )
    key = "module._orig_mod.a.weight"
    src = write_folder(tmp_path / "src", {key: np.ones((2, 3), np.float32)}, {"model_type": "test"})
    with only_books([book]):
        regraft.convert(src, tmp_path / "new", to="new")
    assert list(tensors_of(tmp_path / "new")) == ["module._orig_mod.b.weight"]


@pytest.fixture(scope="module")
def llava():
    """A model, and its names on disk by transformers 4."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=16),
        image_token_index=15,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    old = convert_state_dict(model.state_dict(), to=V4, model=model)
    data = {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]}
    return model, {k: v.numpy() for k, v in old.items()}, data


def in_memory(name):
    """What transformers 4.52 to 4.57 called a tensor in memory that it called otherwise on disk."""
    for before, after in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def test_parts_in_different_layouts(llava, tmp_path):
    """The language model's names are new ones, the vision tower's old ones."""
    model, old, data = llava
    state = {in_memory(name): tensor for name, tensor in old.items()}
    assert any(n.startswith("model.vision_tower.vision_model.") for n in state)
    src = write_folder(tmp_path / "src", state, data)
    regraft.convert(src, tmp_path / "new", to=V5)
    made = tensors_of(tmp_path / "new")
    assert same(made, {k: v.numpy() for k, v in model.state_dict().items()})
    regraft.convert(tmp_path / "new", tmp_path / "old", to=V4)
    assert same(tensors_of(tmp_path / "old"), state)
    regraft.convert(src, tmp_path / "usual", to=V4)
    assert same(tensors_of(tmp_path / "usual"), old)
    live = convert_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, to=model)
    assert same({k: v.numpy() for k, v in live.items()}, made)


def test_both_names_of_one_tensor_are_an_error(llava, tmp_path):
    _, old, data = llava
    state = old | {in_memory(name): tensor for name, tensor in old.items()}
    src = write_folder(tmp_path / "src", state, data)
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "new", to=V5)
