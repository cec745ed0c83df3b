"""Asking about image models and their LoRAs: where a tensor goes, and whether tools take a file as it is."""

import sys
from pathlib import Path

import pytest

import regraft
from regraft.explaining.explain import explain

sys.path.insert(0, str(Path(__file__).parent.parent / "merging"))
from merge_samples import flux_file, kohya_flux

QKV = "double_blocks.0.img_attn.qkv.weight"
TO_Q = "transformer_blocks.0.attn.to_q.weight"
CLIP = "text_model.final_layer_norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """FLUX.1 with a text encoder as one file, and as a folder of diffusers."""
    folder = tmp_path_factory.mktemp("models")
    single = flux_file(folder / "flux.safetensors")
    regraft.convert(single, folder / "pipe", to="diffusers")
    return single, folder / "pipe"


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_tensor_of_a_single_file_goes_where_its_parts_book_says(models, prefix):
    found = explain(models[0], prefix + QKV, to="diffusers")
    assert found.fate == "moved" and found.arrives
    assert found.base == QKV and len(found.pieces) == 3
    assert any("transformer/" in each for each in found.evidence)
    if prefix:
        assert any("in the transformer" in each for each in found.steps)


def test_a_tensor_of_a_folder_goes_into_a_fused_one(models):
    found = explain(models[1], f"transformer/{TO_Q}", to="bfl")
    (piece,) = found.pieces
    assert found.fate == "moved" and piece.target == QKV
    assert any("model.diffusion_model." in each for each in found.evidence)


def test_what_has_the_same_names_everywhere_stays(models):
    name = next(n for n in _names(models[1] / "text_encoder") if n.endswith("weight"))
    found = explain(models[1], f"text_encoder/{name}", to="bfl")
    assert found.fate == "carried" and "the same in all layouts" in found.why


def test_a_name_of_no_part_is_said_to_be_nowhere(models):
    assert explain(models[0], "nonsense", to="diffusers").fate == "unknown"


@pytest.mark.parametrize("tool", [None, "diffusers", "comfyui"])
def test_a_model_is_taken_by_tools_that_have_its_layout(models, tool):
    for path, layout in zip(models, ("bfl", "diffusers"), strict=True):
        (verdict,) = regraft.check(path, to=tool or "transformers-v5").verdicts
        assert verdict.layout == layout
        assert verdict.healthy == ((layout == "diffusers") == (tool != "comfyui"))
        assert verdict.healthy or "regraft convert" in verdict.remedy[0]


def test_a_lora_is_checked_as_diffusers_takes_it(tmp_path):
    src = tmp_path / "lora.safetensors"
    kohya_flux(src)
    (verdict,) = regraft.check(src).verdicts
    assert verdict.layout == "kohya" and not verdict.healthy
    assert verdict.counts == {"dropped": 1, "lands": 5}
    assert verdict.remedy == [
        f"regraft convert {src} {tmp_path / 'lora-diffusers.safetensors'} --to diffusers"
    ]
    made = tmp_path / "made.safetensors"
    regraft.convert(src, made, to="diffusers")
    assert regraft.check(made).verdicts[0].healthy
    with pytest.raises(regraft.RefusedError, match="--for comfyui, diffusers, kohya"):
        regraft.check(src, to="transformers-v4")


def test_tools_of_which_nothing_is_known_are_refused(models):
    with pytest.raises(regraft.RefusedError, match="nothing is known of how vllm"):
        regraft.check(models[0], tool="vllm")


def test_parts_keep_nothing_that_no_rule_moves(models, tmp_path):
    with pytest.raises(regraft.BadInputError, match="--drop PATTERN"):
        regraft.convert(models[0], tmp_path / "out", to="diffusers", keep=["extra.*"])


def _names(folder):
    from regraft.storage.safetensors import read_header

    (path,) = folder.glob("*.safetensors")
    return list(read_header(path).tensors)
