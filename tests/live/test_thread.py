"""The reproducer of huggingface/peft#3230: rules are scoped by the model, so what is around it never hides them.

There a ViT stood in a plain module, and an adapter and weights that were saved before its layers were renamed went by
the rules' scope: nothing was renamed, and nothing said so.
"""

import json

import peft
import pytest
import torch
from holders import Holder, Pipeline, ValueHead, compiled, distributed, fsdp2, lora, mixtral, vit
from making import slow_but
from safetensors.torch import save_file
from torch import nn

import regraft

pytestmark = pytest.mark.filterwarnings("ignore")

RENAMED = {
    "encoder.layer.{}.attention.attention.query": "layers.{}.attention.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.attention.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.attention.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.attention.o_proj",
    "encoder.layer.{}.intermediate.dense": "layers.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "layers.{}.mlp.fc2",
    "encoder.layer.{}.layernorm_before": "layers.{}.layernorm_before",
    "encoder.layer.{}.layernorm_after": "layers.{}.layernorm_after",
}
"""Every rule of ViT, written down by hand."""


def old_names():
    """Old name of every tensor of a ViTForImageClassification that has a new one."""
    return {
        f"vit.{old.format(layer)}.{leaf}": f"vit.{new.format(layer)}.{leaf}"
        for old, new in RENAMED.items()
        for layer in range(2)
        for leaf in ("weight", "bias")
    }


def old_state(model):
    """The state dict of a ViT as it was saved before the renaming."""
    back = {new: old for old, new in old_names().items()}
    return {back.get(key, key): tensor.clone() for key, tensor in model.state_dict().items()}


def saved_adapter(folder):
    """A LoRA as it was trained on query and value before the renaming; and what it adds."""
    torch.manual_seed(3)
    start = "base_model.model.vit.encoder.layer"
    tensors = {
        f"{start}.{layer}.attention.attention.{part}.lora_{side}.weight": torch.randn(shape)
        for layer in range(2)
        for part in ("query", "value")
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    config = {
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    added = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
            added[old_names()[name]] = 2 * tensors[key.replace("lora_A", "lora_B")] @ a
    return added


PLACES = {
    "a plain module": (lambda m: Holder(model=m), "model."),
    "deeper": (lambda m: Holder(net=Holder(inner=m)), "net.inner."),
    "a list": (lambda m: nn.Sequential(nn.Identity(), m), "1."),
    "beside another": (lambda m: Holder(text=mixtral(), model=m), "model."),
    "ddp": (lambda m: distributed(Holder(model=m)), "module.model."),
    "fsdp2": (lambda m: fsdp2(Holder(model=m)), "model."),
    "compiled": (lambda m: compiled(Holder(model=m)), "_orig_mod.model."),
    "compiled inside": (lambda m: Holder(model=compiled(m)), "model._orig_mod."),
    "peft": (lambda m: Holder(model=lora(m)), "model.base_model.model."),
    "value head": (ValueHead, "pretrained_model."),
    "a pipeline": (lambda m: Pipeline(unet=nn.Linear(2, 2), model=m), "model."),
}
"""What a model may be put into, and the path of its keys there."""


def inside(live_key):
    """A live key without what PEFT puts before a weight."""
    return live_key.replace(".base_layer.", ".")


@pytest.mark.parametrize("place", slow_but(list(PLACES)[:3], PLACES))
def test_every_rename_is_applied_wherever_the_model_is(place):
    make, path = PLACES[place]
    mapping = regraft.mapping(make(vit()))
    for old, new in old_names().items():
        for key in (old, path + old):
            assert inside(mapping.rename(key)) == path + new
    assert str(mapping).count(" -> ") >= len(RENAMED)


@pytest.mark.parametrize("place", PLACES)
def test_an_old_state_dict_fits_whatever_the_model_is_in(place):
    make, path = PLACES[place]
    trained = vit()
    holder = make(vit())
    new = regraft.convert_state_dict(old_state(trained), to=holder)
    for key, tensor in trained.state_dict().items():
        [live] = [k for k in new if inside(k) == path + key]
        got = new[live]
        assert torch.equal(got.full_tensor() if hasattr(got, "full_tensor") else got, tensor)
    assert sum(new.report.rules.values()) == len(old_names())
    if isinstance(holder, nn.Module):
        holder.load_state_dict(new, strict=True)


ADAPTABLE = [name for name in PLACES if name not in ("peft", "fsdp2", "ddp", "beside another")]


@pytest.mark.parametrize("place", ADAPTABLE)
@pytest.mark.parametrize("stock", [False, True])
def test_an_old_adapter_adds_what_it_did(place, stock, tmp_path):
    added = saved_adapter(tmp_path)
    model = vit()
    holder = PLACES[place][0](model)
    if stock:
        if not isinstance(holder, nn.Module) or isinstance(holder, ValueHead):
            pytest.skip("PEFT itself does not take this")
        with regraft.installed():
            peft.PeftModel.from_pretrained(holder, str(tmp_path))
    else:
        regraft.load_adapter(holder, tmp_path)
    layers = {
        f"{inside(name.replace('_orig_mod.', ''))}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    assert layers.keys() == added.keys()
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default")
        assert torch.allclose(delta, added[name], atol=1e-6), name


def test_siblings_each_have_their_own():
    one, other = vit(), vit()
    holder = Holder(policy=Holder(net=one), reference=other)
    source = {f"policy.net.{k}": t for k, t in old_state(one).items()}
    source |= {f"reference.{k}": t for k, t in old_state(other).items()}
    new = regraft.convert_state_dict(source, to=holder)
    want = holder.state_dict()
    assert all(torch.equal(new[key], want[key]) for key in want)
    back = regraft.convert_state_dict(want, to="transformers-v4", model=holder)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


def test_bare_keys_for_siblings_name_both():
    holder = Holder(policy=vit(), reference=vit())
    for ask in (
        lambda: regraft.convert_state_dict(old_state(vit()), to=holder),
        lambda: regraft.mapping(holder).rename(next(iter(old_names()))),
    ):
        with pytest.raises(regraft.AmbiguousError, match="'policy' and 'reference'"):
            ask()
