"""`regraft inspect` of LoRAs of image models, one by one and by the folder; broken and odd files."""

import json
import shutil
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from dialects.image.samples import H, kohya_flux, numbers, pair
from dialects.image.test_image import convert, same_bits, sdxl

import regraft
from regraft.cli import main
from regraft.cli.output import Output
from regraft.dialects.image.inspect import summarize
from regraft.storage.safetensors import write_tensors
from regraft.views.schema import schema_of

__all__ = ["convert"]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "many"
    made.mkdir()
    write_tensors(
        made / "a.safetensors", kohya_flux(3)[0], {"ss_network_module": "networks.lora_flux"}
    )
    write_tensors(
        made / "b.safetensors", sdxl()[0], {"ot_revision": "1", "ss_base_model_version": "sdxl_"}
    )
    down, up = pair(H, H)
    name = "transformer.transformer_blocks.0.img_mlp.net.2"
    said = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})}
    write_tensors(
        made / "c.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, said
    )
    write_tensors(made / "d.safetensors", {"lora_unet_nowhere.lora_up.weight": up}, {})
    return made


def test_a_folder_line_by_line(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 1
    a, b, c, d = map(json.loads, capsys.readouterr().out.splitlines())
    for line in (a, b, c, d):
        jsonschema.validate(line, schema_of("inspect"))
    assert (a["family"], a["dialect"], a["trainer"], a["alphas"]) == (
        "flux",
        "kohya",
        "sd-scripts",
        {"3": 9},
    )
    assert (b["family"], b["trainer"], b["base"]) == ("sdxl", "OneTrainer", "sdxl_")
    assert b["text_encoders"] == ["lora_te1", "lora_te2"]
    assert (c["family"], c["alphas"], c["ranks"]) == ("qwen-image", {"8 (header)": 1}, {"2": 1})
    assert "no family has a module" in d["problem"]
    assert main(["inspect", str(folder)]) == 1
    assert "4 files, 1 with a problem" in capsys.readouterr().out
    assert main(["inspect", str(folder / "b.safetensors")]) == 0
    assert "lora_te1, lora_te2" in capsys.readouterr().out


def test_what_else_lies_in_a_folder_is_told_for_what_it_is(folder, capsys):
    """A model's own weights are no problem, and PEFT's weights lack their config, not a family."""
    (folder / "base").mkdir()
    write_tensors(folder / "base/model.safetensors", {"lm_head.weight": numbers(4, 4)}, {})
    (folder / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "bare").mkdir()
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    pair = {name.format("A"): numbers(2, 8), name.format("B"): numbers(8, 2)}
    write_tensors(folder / "bare/adapter_model.safetensors", pair, {})
    assert main(["inspect", str(folder), "--json"]) == 1
    found = {x["file"]: x for x in map(json.loads, capsys.readouterr().out.splitlines())}
    base, bare = found["base/model.safetensors"], found["bare/adapter_model.safetensors"]
    assert (base["family"], base["dialect"], base["problem"]) == ("llama", "", "")
    assert bare["problem"].startswith("there is no adapter_config.json beside it")
    assert main(["inspect", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "6 files, 2 with a problem"
    assert lines[-3].startswith("Problem: bare/adapter_model.safetensors: there is no adapter_c")
    assert "no family has a module" not in " ".join(lines[:7])  # or the column would be as wide


def test_a_narrow_terminal_has_a_paragraph_for_each_file(folder, capsys, monkeypatch):
    monkeypatch.setattr(Output, "width", property(lambda _: 60))
    assert main(["inspect", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.safetensors"
    assert lines[1].startswith("  flux, dialect kohya, trainer sd-scripts, algorithm LoRA, rank ")


def test_a_file_with_other_names_of_each_kind(tmp_path):
    """Most leaves are told once for all names that are alike; some tell by a number what they are."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_{}_attn1_to_q"
    tensors = {}
    for n in range(3):
        shapes = {
            "hada_w1_a": (8, 2),
            "hada_w1_b": (2, 8),
            "hada_w2_a": (8, 2),
            "hada_w2_b": (2, 8),
        }
        tensors |= {f"{stem.format(n)}.{role}": numbers(*s) for role, s in shapes.items()}
        tensors[f"{stem.format(n)}.alpha"] = np.float32(n)
    write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    found = summarize(tmp_path / "a.safetensors")
    assert (found.family, found.algorithms, found.ranks) == ("sdxl", {"LoHa": 3}, {"2": 3})
    assert found.alphas == {"0": 1, "1": 1, "2": 1}


def test_it_is_quick(folder):
    """Two hundred files a second on a quiet core; a fifth of it is asked for, because cores are shared."""
    summarize(folder / "b.safetensors")
    start = time.process_time()
    for _ in range(5):
        summarize(folder / "b.safetensors")
    assert time.process_time() - start < 5 / 40


@pytest.mark.parametrize(
    "broken",
    [
        {"lora_down.weight": (2,), "lora_up.weight": (8, 2)},
        {"lora_down.weight": (2, 8), "lora_up.weight": (8, 3)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1)},
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8)},
        {"oft_blocks": (4, 2)},
        {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (3, 1)},
        {"a1.weight": (2,), "a2.weight": (2, 8), "b1.weight": (8, 2), "b2.weight": (2, 8)},
    ],
)
def test_broken_modules_are_errors(convert, broken):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(regraft.BadInputError) as error:
        convert({f"{stem}.{role}": numbers(*shape) for role, shape in broken.items()}, "diffusers")
    assert error.value.findings[0].code == "shape" and error.value.findings[0].key == stem


def test_wans_image_projections_come_in_pairs(convert):
    """diffusers overwrites one that is alone with zeros."""
    tensors = {}
    for name in ("k_img", "k"):
        down, up = pair(H, H)
        stem = f"lora_unet_blocks_0_cross_attn_{name}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": np.float32(2),
        }
    made, header = convert(tensors, "diffusers")
    assert not made["transformer.blocks.0.attn2.add_v_proj.lora_B.weight"].any()
    same_bits(convert(made, "kohya", header)[0], tensors)


def test_a_weight_that_is_adapted_under_two_names_is_an_error(convert):
    """One of them would be lost: the fused weight, and a part of it by diffusers' name."""
    tensors, _ = kohya_flux()
    down, up = pair(H, H)
    stem = "lora_transformer_transformer_blocks_0_attn_to_k"
    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    for to in ("diffusers", "kohya"):
        with pytest.raises(regraft.BadInputError, match="twice"):
            convert(tensors, to)


def test_python_tells_of_a_file_and_of_a_folder_what_the_command_does(folder, capsys):
    found = regraft.inspect(folder)
    assert isinstance(found, regraft.ImageFolder)
    main(["inspect", str(folder), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line | each.to_dict() for line, each in zip(lines, found.files, strict=True)] == lines
    main(["inspect", str(folder)])
    assert capsys.readouterr().out.split() == str(found).split()
    one = regraft.inspect(folder / "a.safetensors")
    assert one == found.files[0] and one.family == "flux"
    assert str(one).startswith("a.safetensors: LoRA for flux")


def test_adapters_of_other_models_beside_image_loras_are_told_as_what_they_are(
    folder, tmp_path, capsys
):
    """One LoRA of an image model in a folder makes the others no LoRAs of image models."""
    cases = Path(__file__).parents[2] / "golden" / "cases"
    for case in ("mixtral__rslora", "mixtral__dora"):
        shutil.copytree(cases / case, folder / case)
        (folder / case / "reference.safetensors").unlink(missing_ok=True)
    unknown = folder / "whose"
    unknown.mkdir()
    down, up = pair(H, H)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    write_tensors(unknown / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": len(down), "lora_alpha": 4, "target_modules": ["q_proj"]}
    (unknown / "adapter_config.json").write_text(json.dumps(config))
    found = {each.file.partition("/")[0]: each for each in regraft.inspect(folder).files}
    assert found["a.safetensors"].family == "flux"
    mixtral = found["mixtral__rslora"]
    assert (mixtral.family, mixtral.dialect, mixtral.problem) == ("mixtral", "transformers-v4", "")
    assert list(found["mixtral__dora"].algorithms) == ["DoRA"]
    assert (found["whose"].family, found["whose"].problem) == ("", "")
    assert found["whose"].ranks == {str(len(down)): 1}
    main(["inspect", str(folder)])
    assert "?: the base model is not known; give it with --model" in capsys.readouterr().out


def test_a_matrix_beside_a_kernel_is_an_error(convert):
    tensors, _ = kohya_flux()
    name = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[name] = tensors[name][..., None]
    with pytest.raises(regraft.BadInputError, match="not of one kind"):
        convert(tensors, "diffusers")
