"""Keys of training runs with what wrappers left in them.

Sources: volcengine/verl#7070, huggingface/trl#5766, pytorch/pytorch#185752. Keys and shapes are rebuilt.
"""

import json

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder
from rebuilt import V5, read, same

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

LAYERS, HIDDEN = 4, 8
PREFIX = "base_model.model."
FORMS = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "FSDP and checkpointed": lambda n: n.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "DDP, named": lambda n: "module." + n.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_key_lands(form, tmp_path):
    config = {
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_local_experts": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 8,
    }
    base = write_folder(tmp_path / "base", {"x": np.zeros(1, np.float32)}, config)
    wanted = {
        f"{PREFIX}model.layers.{layer}.self_attn.{name}_proj.lora_{letter}.weight": np.full(
            (2, HIDDEN) if letter == "A" else (HIDDEN, 2), layer + 1, np.float32
        )
        for layer in range(LAYERS)
        for name in "qkvo"
        for letter in "AB"
    }
    src = tmp_path / "src"
    src.mkdir()
    spoilt = {FORMS[form](name): tensor for name, tensor in wanted.items()}
    write_tensors(src / "adapter_model.safetensors", spoilt, {"format": "pt"})
    targets = [f"{name}_proj" for name in "qkvo"]
    (src / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets})
    )
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base)
    made = open_tensors(tmp_path / "new" / "adapter_model.safetensors")
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[name], tensor) for name, tensor in wanted.items())
    assert sum("taken out of" in note for note in report.notes) == 1


@pytest.mark.parametrize("lead", ["policy.", "student.model."])
def test_what_held_a_checkpoints_model_is_taken_off(lead, tmp_path):
    """The base's own names tell that it is no part of the model, where every name begins with it."""
    config = {**MIXTRAL, "architectures": ["MixtralForCausalLM"]}
    tensors = mixtral()
    regraft.convert(write_folder(tmp_path / "p", tensors, config), tmp_path / "right", to=V5)
    held = {lead + name: tensor for name, tensor in tensors.items()}
    report = regraft.convert(write_folder(tmp_path / "src", held, config), tmp_path / "new", to=V5)
    assert same(read(tmp_path / "new"), read(tmp_path / "right"))
    assert any("read without" in note for note in report.notes)


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_a_file_by_another_forms_name_is_called_what_it_is(form, tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    file = src / "pytorch_model.bin"
    if form == "npz":
        (src / "model.safetensors").unlink()
        with file.open("wb") as out:
            np.savez(out, a=np.ones(3))
    else:
        (src / "model.safetensors").rename(file)
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5)
    assert {"npz": "numpy archive", "safetensors": "safetensors file"}[form] in str(caught.value)
