"""Keys as training runs leave them: wrappers' segments and adapters' names are taken out, and that is said once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.dialects.peft.stripped import strip_names
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
PREFIX = "base_model.model."
LAYER = "model.layers."


def spoilt(folder, case, rename):
    """A golden adapter with other names."""
    folder.mkdir()
    shutil.copy(GOLDEN / "cases" / case / "adapter_config.json", folder)
    tensors = open_tensors(GOLDEN / "cases" / case / "adapter_model.safetensors")
    made = {rename(name): np.array(tensor) for name, tensor in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", made, {"format": "pt"})
    return folder


def base_of(case):
    return GOLDEN / "bases" / json.loads((GOLDEN / "index.json").read_text())[case]["base"]


def converted(src, dst, base):
    report = regraft.convert(src, dst, to="transformers-v5", model=base)
    return report, (dst / "adapter_model.safetensors").read_bytes()


FORMS = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "DDP around compiled": lambda n: f"module._orig_mod.{n}",
    "DDP inside": lambda n: n.replace(PREFIX, PREFIX + "module."),
    "FSDP": lambda n: n.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "FSDP and checkpointed": lambda n: (
        "_fsdp_wrapped_module."
        + n.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.")
    ),
    "named": lambda n: n.replace(".weight", ".default.weight"),
    "named weight": lambda n: n.replace(".lora_", ".weight.lora_"),
    "all": lambda n: (
        "_orig_mod."
        + n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.").replace(
            ".weight", ".lora.weight"
        )
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_converts_as_if_saved_by_peft(tmp_path, form):
    base = GOLDEN / "bases/mixtral"
    clean = spoilt(tmp_path / "clean", "mixtral__gud_attn", lambda n: n)
    src = spoilt(tmp_path / "src", "mixtral__gud_attn", FORMS[form])
    _, wanted = converted(clean, tmp_path / "wanted", base)
    report, got = converted(src, tmp_path / "got", base)
    assert got == wanted
    assert sum("taken out of" in note for note in report.notes) == 1


def test_what_is_in_the_layout_already_is_written_clean(tmp_path):
    base = GOLDEN / "bases/mixtral"
    clean = spoilt(tmp_path / "clean", "mixtral__gud_attn", lambda n: n)
    src = spoilt(tmp_path / "src", "mixtral__gud_attn", FORMS["all"])
    for each in (clean, src):
        regraft.convert(each, tmp_path / f"{each.name}-4", to="transformers-v4", model=base)
    one, other = (
        open_tensors(tmp_path / f"{n}-4" / "adapter_model.safetensors") for n in ("clean", "src")
    )
    assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("family", "name", "wanted"),
    [
        ("ia3_", "base_model.model.l.0.q.ia3_l.default", "base_model.model.l.0.q.ia3_l"),
        ("hada_", "base_model.model.l.0.q.hada_w1_a.mine", "base_model.model.l.0.q.hada_w1_a"),
        (
            "lora_",
            "base_model.model.l.0.q.lora_magnitude_vector.default.weight",
            "base_model.model.l.0.q.lora_magnitude_vector.weight",
        ),
        (
            "lora_",
            "base_model.model.e.lora_embedding_A.default",
            "base_model.model.e.lora_embedding_A",
        ),
        (
            "lora_",
            "base_model.model.score.modules_to_save.default.weight",
            "base_model.model.score.weight",
        ),
        ("lora_", "base_model.model.l.0.module.q.lora_A.weight", None),
        ("lora_", "base_model.model.l.0.default.q.lora_A.weight", None),
        ("poly_", "base_model.model.l.0.q.poly_lora_A", None),
    ],
)
def test_single_keys(family, name, wanted):
    assert strip_names([name], family).names == [wanted or name]


def test_two_keys_that_become_one(tmp_path):
    src = spoilt(tmp_path / "src", "mixtral__gud_attn", lambda n: n)
    tensors = {k: np.array(v) for k, v in open_tensors(src / "adapter_model.safetensors").items()}
    first = next(iter(tensors))
    tensors[f"_orig_mod.{first}"] = tensors[first]
    write_tensors(src / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(BadInputError, match="the same key"):
        converted(src, tmp_path / "new", GOLDEN / "bases/mixtral")


def test_what_stands_behind_some_factors_is_no_adapter_s_name():
    """A training run has it in every key, so this is a damaged key, and stays what it is."""
    keys = ["base_model.model.l.0.k.ia3_l.x", "base_model.model.l.0.v.ia3_l"]
    assert strip_names(keys, "ia3_").names == keys
    named = [f"{key.removesuffix('.x')}.x" for key in keys]
    assert strip_names(named, "ia3_").adapter == "x"
