"""Full state dicts with LoRA inside, as sharded runs save them (FSDP and LoRA): the factors follow the base."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft", minversion="0.19")

from golden_models import base_model, case_folder, is_adapted  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import regraft  # noqa: E402

CASE = "mixtral__gud_attn"
PREFIX = "base_model.model."


def full(name="default"):
    """A Mixtral of transformers 4 with its LoRA around q, k, v, o and every expert's projection."""
    base = base_model(CASE)
    old = regraft.convert_state_dict(base.state_dict(), to="transformers-v4", model=base)
    factors = load_file(case_folder(CASE) / "adapter_model.safetensors")
    adapted = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in factors}
    state = {}
    for key, tensor in old.items():
        module, _, leaf = key.rpartition(".")
        middle = ".base_layer" if module in adapted else ""
        state[f"{PREFIX}{module}{middle}.{leaf}"] = tensor
    for key, tensor in factors.items():
        state[key.removesuffix("weight") + f"{name}.weight"] = tensor
    return state


def test_the_model_computes_what_it_did():
    model = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    source = full()
    assert any(".experts.0.w1.lora_A.default" in key for key in source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(regraft.convert_state_dict(source, to=model))
    assert is_adapted(model, CASE)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_orig_mod."])
def test_wrappers_of_the_run_do_not_matter(wrapper):
    model = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    source = {
        key.replace("layers.1.", f"layers.1.{wrapper}"): tensor for key, tensor in full().items()
    }
    plain, wrapped = (regraft.convert_state_dict(s, to=model) for s in (full(), source))
    assert plain.report.kept == []
    assert all(torch.equal(plain[key], wrapped[key]) for key in model.state_dict())


def test_by_name_with_the_bare_model():
    base = base_model(CASE)
    made = regraft.convert_state_dict(full("mine"), to="transformers-v5", model=base)
    own = regraft.load_adapter(base, case_folder(CASE)).state_dict()
    there = {
        key.removeprefix(PREFIX).replace(".default.", ".mine."): tensor
        for key, tensor in own.items()
        if ".lora_" in key
    }
    found = {key: tensor for key, tensor in made.items() if ".lora_" in key}
    assert found.keys() == there.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in there.items())
    assert "model.layers.0.mlp.experts.gate_up_proj" in made


def test_layers_of_another_rank_are_an_error():
    model = regraft.load_adapter(base_model(CASE), case_folder("mixtral__rslora"))
    source = full()
    source = {
        key: torch.cat([tensor, tensor], 0 if "lora_A" in key else 1)
        if ".w2.lora_" in key
        else tensor
        for key, tensor in source.items()
    }
    with pytest.raises(regraft.BadInputError, match="ranks of fused projections add up") as caught:
        regraft.convert_state_dict(source, to=model)
    assert {finding.code for finding in caught.value.findings} == {"shape"}


def test_a_file_of_such_a_run_is_named(tmp_path):
    base_model(CASE).config.save_pretrained(tmp_path / "src")
    save_file(full(), tmp_path / "src" / "model.safetensors", {"format": "pt"})
    with pytest.raises(regraft.BadInputError, match="convert_state_dict") as caught:
        regraft.convert(tmp_path / "src", tmp_path / "out", to="transformers-v5")
    (finding,) = caught.value.findings
    assert finding.code == "adapter-inside"


def deltas(state):
    """What each module's factors add, but for the scale, by the module's name."""
    found = {}
    for key, a in state.items():
        module, _, rest = key.removeprefix(PREFIX).partition(".lora_A.")
        if rest:
            b = state[key.replace(".lora_A.", ".lora_B.")]
            found[module] = b.double() @ a.double()
    return found


@pytest.mark.parametrize("around", ["the model with the adapter", "the bare model"])
def test_the_way_back_has_each_experts_own(around):
    """A full state dict of a model of transformers 5 with LoRA on stacked experts, in the layout of before."""
    model = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    asked = model if around == "the model with the adapter" else base_model(CASE)
    made = regraft.convert_state_dict(dict(model.state_dict()), to="transformers-v4", model=asked)
    old = full()
    plain = {key.removeprefix(PREFIX).replace(".base_layer.", "."): t for key, t in old.items()}
    assert {key.replace(".base_layer.", ".") for key in made} == plain.keys()
    assert all(
        torch.equal(t, plain[key])
        for key, t in made.items()
        if ".lora_" not in key and key in plain
    )
    found, wanted = deltas(made), deltas(old)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


def test_the_way_back_of_one_stack_alone():
    """Which parameter of a module the factors are around is told by their sizes."""
    model = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    state = {
        key.replace("experts.base_layer.base_layer.", "experts.base_layer."): tensor
        for key, tensor in model.state_dict().items()
        if ".experts.base_layer.lora_" not in key
    }
    made = regraft.convert_state_dict(state, to="transformers-v4", model=base_model(CASE))
    experts = {key.split(".lora_")[0] for key in made if ".experts." in key and ".lora_" in key}
    assert experts and {name.rpartition(".")[2] for name in experts} == {"w2"}
    wanted = deltas(full())
    assert all(torch.allclose(d, wanted[n]) for n, d in deltas(made).items())
