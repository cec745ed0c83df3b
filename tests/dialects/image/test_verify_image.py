"""Files of LoRAs for image models compared: what each adds, whatever tool wrote it."""

import json

import numpy as np
import pytest
from dialects.image.samples import RANK, H, kohya_flux, numbers
from dialects.image.test_algebras import CONV, STEM, N, loha, lokr, named

import regraft
from regraft.checking.verify import verify
from regraft.cli import main
from regraft.dialects.image import moving
from regraft.storage.safetensors import open_tensors, read_header, write_tensors


@pytest.fixture
def file(tmp_path):
    """Write tensors, and give the path."""

    def write(name, tensors, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, tensors, metadata or {})
        return path

    return write


def dora(axis="out"):
    """A LoRA with a magnitude on an axis."""
    t = {"lora_down__weight": numbers(RANK, N), "lora_up__weight": numbers(N, RANK)}
    shape = (N, 1) if axis == "out" else (1, N)
    return {**t, "alpha": np.float32(1), "dora_scale": 1 + numbers(*shape) ** 2}


def oft(blocks=2):
    t = {"oft_blocks": 0.25 * numbers(blocks, N // blocks, N // blocks)}
    return {**t, "rescale": 1 + numbers(N, 1) ** 2, "alpha": np.float32(10)}


def boft():
    return {"oft_blocks": 0.25 * numbers(3, 4, 4, 4), "alpha": np.float32(0)}


def glora():
    shapes = {"a1": (N, RANK), "a2": (RANK, N), "b1": (N, RANK), "b2": (RANK, N)}
    return {f"{x}__weight": numbers(*s) for x, s in shapes.items()} | {"alpha": np.float32(3)}


def ia3(on_input):
    return {"weight": 1 + numbers(1, N) ** 2, "on_input": np.array(on_input)}


def tucker():
    t = {"lora_down__weight": numbers(RANK, N, 1, 1), "lora_up__weight": numbers(N, RANK, 1, 1)}
    return {**t, "lora_mid__weight": numbers(RANK, RANK, 3, 3), "alpha": np.float32(3)}


ALGEBRAS = {
    "LoHa": (STEM, loha()[0]),
    "LoKr": (STEM, lokr()[0]),
    "DoRA": (STEM, dora()),
    "DoRA-in": (STEM, dora("in")),
    "OFT": (STEM, oft()),
    "BOFT": (STEM, boft()),
    "GLoRA": (STEM, glora()),
    "IA3-in": (STEM, ia3(True)),
    "IA3-out": (STEM, ia3(False)),
    "Tucker": (CONV, tucker()),
    "full": (CONV, {"diff": numbers(N, N, 3, 3), "diff_b": numbers(N)}),
}


def test_conversions_are_certified(file, tmp_path):
    """Fused and split, alpha as a key, in the header and in the factors."""
    src = file("kohya", kohya_flux(alpha=3)[0])
    made = {}
    for to in ("diffusers", "comfyui", "ai-toolkit"):
        made[to] = tmp_path / f"{to}.safetensors"
        report = regraft.convert(src, made[to], to=to, verify=True)
        assert report.adapters[0].verified >= 9 and report.adapters[0].error < 1e-6
    found = verify(made["ai-toolkit"], made["comfyui"])
    assert found.equal and (found.source_layout, found.target_layout) == ("diffusers", "comfyui")
    assert main(["verify", str(src), str(made["diffusers"]), "--quiet"]) == 0


@pytest.mark.parametrize("name", ALGEBRAS)
def test_every_algebra_is_compared_without_the_base(file, tmp_path, name):
    """A change of any tensor is another delta, also where deltas depend on weights that are not at hand."""
    stem, tensors = ALGEBRAS[name]
    src, made = file("source", named(stem, **tensors)), tmp_path / "made.safetensors"
    regraft.convert(src, made, to="kohya", verify=True)
    there = open_tensors(made)
    for key, tensor in there.items():
        if key.endswith("alpha") and name in ("OFT", "BOFT"):
            continue  # a constraint, and nothing here is as long
        x = np.asarray(tensor)
        spoilt = ~x if x.dtype == bool else x * np.float32(1.5)
        assert not verify(src, file("spoilt", {**there, key: spoilt})).equal, key


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "DoRA", "DoRA-in", "OFT", "GLoRA", "Tucker"])
def test_deltas_of_full_rank_are_certified(file, tmp_path, name):
    stem, tensors = ALGEBRAS[name]
    src, made = file("source", named(stem, **tensors)), tmp_path / "made.safetensors"
    keys = (STEM, CONV), ((N, N), (N, N, 3, 3))
    paths = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")
    assert stem in keys[0]
    base = file(
        "base",
        {f"{p}.weight": numbers(*s) + 0.5 for p, s in zip(paths, keys[1], strict=True)},
    )
    regraft.convert(src, made, to="diffusers", via="dense", model=base, verify=True)
    assert verify(src, made, model=base).equal
    if name in ("DoRA-in", "OFT", "GLoRA"):
        with pytest.raises(regraft.BadInputError, match="--model"):
            verify(src, made)


def test_a_fault_of_the_converter_is_found(file, tmp_path, monkeypatch):
    """The certificate does not share how rows are taken."""
    real = moving.take_rows
    monkeypatch.setattr(moving, "take_rows", lambda delta, rows: real(delta, rows[::-1]))
    src = file("kohya", kohya_flux()[0])
    with pytest.raises(regraft.NotEqualError, match="its delta differs"):
        regraft.convert(src, tmp_path / "made.safetensors", to="diffusers", verify=True)
    assert not (tmp_path / "made.safetensors").exists()


def test_alpha_in_the_header_counts(file, tmp_path, capsys):
    src, made = file("kohya", kohya_flux(alpha=1)[0]), tmp_path / "made.safetensors"
    regraft.convert(src, made, to="diffusers")
    header = dict(read_header(made).metadata)
    said = json.loads(header["lora_adapter_metadata"])
    del said["transformer.lora_alpha"]
    header["lora_adapter_metadata"] = json.dumps(said)
    spoilt = file("spoilt", open_tensors(made), header)
    assert main(["verify", str(src), str(spoilt)]) == 4
    # diffusers gives the header to PEFT, whose own alpha is 8.
    assert "relative error 7)" in " ".join(capsys.readouterr().out.split())


def test_what_is_missing_and_what_is_too_much(file, tmp_path):
    tensors = kohya_flux()[0]
    few = {k: v for k, v in tensors.items() if "img_mlp" not in k}
    one, other = file("one", tensors), file("other", few)
    (lost,) = verify(one, other).differences
    assert (lost.code, lost.key) == ("missing", "double_blocks.0.img_mlp.0.weight")
    (more,) = verify(other, one).differences
    assert more.code == "extra"


def test_files_of_two_families_are_no_pair(file):
    qwen = "lora_unet_transformer_blocks_0_img_mlp_net_2"
    t = {f"{qwen}.lora_down.weight": numbers(2, H), f"{qwen}.lora_up.weight": numbers(H, 2)}
    with pytest.raises(regraft.BadInputError, match="Qwen-Image"):
        verify(file("one", kohya_flux()[0]), file("other", t))


def test_names_in_two_layouts_are_one_adapter(file):
    """A file that names blocks as LDM and as diffusers does, and one that has diffusers' names only."""
    t = named(STEM, **lokr()[0])
    ldm = STEM.replace("mid_block_attentions_0", "middle_block_1").replace("attn1", "attn2")
    both = t | named(ldm, **lokr()[0])
    other = t | {
        k.replace(ldm, STEM.replace("attn1", "attn2")): v for k, v in both.items() if ldm in k
    }
    assert verify(file("both", both), file("plain", other), source="sd15").equal


def test_half_a_tucker_loha_is_bad_input(file):
    t = {f"hada_w{n}_{x}": numbers(RANK, N) for n in "12" for x in "ab"}
    t |= {"hada_t1": numbers(RANK, RANK, 3, 3), "hada_t2": numbers(RANK, RANK, 3, 3)}
    del t["hada_w2_a"]
    src = file("half", named(CONV, **t))
    with pytest.raises(regraft.BadInputError, match="LoHa"):
        verify(src, src)
