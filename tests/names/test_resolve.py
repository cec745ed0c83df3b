"""A file's keys find their tensors, whatever they were saved from under, or are refused."""

import re
from functools import cache

import pytest
import torch
from holders import (
    HOLDERS,
    Holder,
    Pipeline,
    ValueHead,
    compiled,
    data_parallel,
    lora,
    mixtral,
    vit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from making import slow_but
from torch import nn

from regraft.bridges.transformers.imported import import_model
from regraft.errors import AmbiguousError, BadInputError, UnmatchedKeysError
from regraft.names.live import walk
from regraft.names.resolve import resolve

OLD = (
    (r"\blayers\.(\d+)\.attention\.([qkv])_proj", r"encoder.layer.\1.attention.attention.\2"),
    (r"\blayers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense"),
    (r"\blayers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"\blayers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"attention\.q\b", "attention.query"),
    (r"attention\.k\b", "attention.key"),
    (r"attention\.v\b", "attention.value"),
)


def old_vit(keys):
    """The names that transformers 4 has for a ViT's tensors."""
    result = []
    for key in keys:
        for pattern, new in OLD:
            key = re.sub(pattern, new, key)
        result.append(key)
    return result


def old_mixtral(keys):
    result = []
    for key in keys:
        key = key.replace(".mlp.", ".block_sparse_moe.")
        for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            if key.endswith(f"experts.{name}"):
                stem = key.removesuffix(name)
                result += [f"{stem}{e}.{part}.weight" for e in range(4) for part in parts]
                break
        else:
            result.append(key)
    return result


def solve(live, keys):
    return resolve(live, keys, [import_model(model.skeleton).lands for model in live.models])


VIT = list(vit().state_dict())
FAMILIES = {
    "vit": (vit, VIT, old_vit(VIT)),
    "mixtral": (mixtral, list(mixtral().state_dict()), old_mixtral(mixtral().state_dict())),
}
SAVERS = (
    "{}",
    "module.{}",
    "_orig_mod.{}",
    "base_model.model.{}",
    "_orig_mod.module.base_model.model.{}",
    "policy.{}",
    "module.actor.model.{}",
    "model.{}",
    "pretrained_model.base_model.model.{}",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "holder", slow_but(["itself", "holder", "peft", "holder of ddp of peft"], HOLDERS)
)
def test_into_every_holder(family, holder):
    """Old and new names, bare and under the holder's own keys, in and out of wrappers."""
    make, new, old = FAMILIES[family]
    held = HOLDERS[holder](make())
    live = walk(held)
    [model] = live.models
    told = solve(live, [*(model.keys[key][0] for key in new), *live.own])
    assert told.carried == {key: key for key in live.own}
    assert dict(told.parts[0].keys) == {key: model.keys[key][0] for key in new}
    for keys in (new, old, [f"{model.path}.{key}" for key in old] if model.path else old):
        told = solve(live, keys)
        [part] = told.parts
        assert not told.unmatched and not told.carried and not part.doubles
        assert len(part.keys) == len(keys)
        prefix = f"{model.path}." if model.path and keys is not new and keys is not old else ""
        assert dict(part.keys) == {key.removeprefix(prefix): key for key in keys}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saver", slow_but(SAVERS[:3], SAVERS))
def test_from_every_saver(family, saver):
    make, new, old = FAMILIES[family]
    for held in (make(), Holder(net=make())):
        for keys in (new, old):
            told = solve(walk(held), [saver.format(key) for key in keys])
            [part] = told.parts
            assert dict(part.keys) == {key: saver.format(key) for key in keys}
            assert not told.unmatched


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15)
def test_wrappers_inside(data):
    """Segments that wrappers left anywhere inside, other ones in each layer."""
    words = st.sampled_from(
        ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")
    )
    outside = data.draw(st.lists(words, max_size=2))
    inside = {layer: data.draw(st.lists(words, max_size=2)) for layer in ("0", "1")}
    leaf = data.draw(st.lists(words, max_size=1))

    def wrapped(key):
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part in ("0", "1")), None)
        if at is not None:
            parts[-1:-1] = leaf
            parts[at + 1 : at + 1] = inside[parts[at]]
        return ".".join([*outside, *parts])

    for make, new, old in FAMILIES.values():
        for keys in (new, old):
            told = solve(_walked(make), [wrapped(key) for key in keys])
            [part] = told.parts
            assert dict(part.keys) == {key: wrapped(key) for key in keys}


@cache
def _walked(make):
    return walk(make())


def test_genuine_children():
    """A child that is called like a wrapper stays, with and without a wrapper around."""
    model = vit(head=False)
    model.module = Holder(module=nn.Linear(2, 2), base_layer=nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.zeros(2, 2))
    keys = list(model.state_dict())
    for held in (model, data_parallel(model), Holder(module=model)):
        live = walk(held)
        for saved in (keys, [f"module.{k}" for k in keys], [f"module.module.{k}" for k in keys]):
            told = resolve(live, saved, [lambda asked: [key in set(keys) for key in asked]])
            [part] = told.parts
            assert dict(part.keys) == dict(zip(keys, saved, strict=True))


def test_two_models():
    held = Holder(policy=vit(), reference=compiled(vit()))
    live = walk(held)
    with pytest.raises(AmbiguousError, match="models 'policy' and 'reference'") as caught:
        solve(live, old_vit(VIT))
    assert caught.value.findings[0].code == "two-models"
    with pytest.raises(AmbiguousError, match="'policy' and 'reference'"):
        solve(live, [f"actor.{key}" for key in VIT])
    told = solve(live, [f"reference.{key}" for key in old_vit(VIT)])
    assert [(part.model, part.prefix) for part in told.parts] == [(1, "reference.")]
    told = solve(live, [f"module.{name}.{k}" for name in ("policy", "reference") for k in VIT])
    assert [(p.model, p.prefix, len(p.keys)) for p in told.parts] == [
        (0, "module.policy.", len(VIT)),
        (1, "module.reference.", len(VIT)),
    ]


def test_two_models_of_which_one_is_called_like_its_base():
    """`model.layers` may be the holder's `model`, or what each of two models has inside."""
    live = walk(Holder(model=mixtral(), reference=mixtral()))
    _, new, _ = FAMILIES["mixtral"]
    with pytest.raises(AmbiguousError, match="'model' and 'reference'"):
        solve(live, [key for key in new if key.startswith("model.")])
    told = solve(live, [f"model.{key}" for key in new])
    assert [(part.model, part.prefix) for part in told.parts] == [(0, "model.")]


def test_different_models_take_their_own():
    live = walk(Pipeline(vision=vit(), text=mixtral()))
    told = solve(live, VIT)
    assert [(part.model, part.prefix) for part in told.parts] == [(0, "")]


def test_two_files_in_one():
    keys = [f"{name}.{key}" for name in ("policy", "reference") for key in VIT]
    with pytest.raises(AmbiguousError, match=re.escape("under 'policy.' and 'reference.'")):
        solve(walk(vit()), keys)
    told = solve(walk(Holder(policy=vit())), keys)
    assert [part.prefix for part in told.parts] == ["policy."]
    assert told.unmatched == tuple(keys[len(VIT) :])


def test_base_and_head():
    _, new, _ = FAMILIES["vit"]
    base = [key.removeprefix("vit.") for key in VIT if key.startswith("vit.")]
    told = solve(walk(vit()), old_vit(base))
    assert len(told.parts[0].keys) == len(base) and not told.unmatched
    told = solve(walk(vit(head=False)), new)
    assert told.unmatched == ("classifier.weight", "classifier.bias")
    told = solve(walk(Holder(net=vit(head=False))), [f"net.{key}" for key in new])
    assert told.unmatched == ("net.classifier.weight", "net.classifier.bias")


def test_what_is_the_holders_or_the_adapters():
    held = data_parallel(ValueHead(lora(mixtral(), target_parameters=["experts.down_proj"])))
    live = walk(held)
    state = list(held.state_dict())
    told = solve(live, state)
    assert not told.unmatched
    assert set(told.carried) == set(live.own) | set(live.adapters)
    assert all(key == there for key, there in told.carried.items())
    bare = [key.removeprefix("module.pretrained_model.").removeprefix("module.") for key in state]
    told = solve(live, bare)
    assert not told.unmatched
    assert told.carried["v_head.summary.weight"] == "module.v_head.summary.weight"
    assert sorted(told.carried.values()) == sorted([*live.own, *live.adapters])


def test_nested_adapters_keep_apart():
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    held = lora(mixtral(), target_parameters=targets)
    state = [f"module.{key}" for key in held.state_dict()]
    told = solve(walk(held), state)
    assert told.carried and not told.unmatched
    assert all(f"module.{there}" == key for key, there in told.carried.items())


def test_adapters_that_are_not_there():
    held = lora(vit())
    told = solve(walk(vit()), list(held.state_dict()))
    assert len(told.unmatched) == 4
    assert all("lora_" in key for key in told.unmatched)


def test_copies_of_saved_modules_are_not_the_base():
    held = lora(vit(), modules_to_save=["classifier"])
    told = solve(walk(vit()), list(held.state_dict()))
    prefix = "base_model.model.classifier"
    assert told.parts[0].keys["classifier.weight"] == f"{prefix}.original_module.weight"
    assert f"{prefix}.modules_to_save.default.weight" in told.unmatched


def test_doubles():
    told = solve(walk(vit()), [*VIT, "classifier.base_layer.weight"])
    assert told.parts[0].doubles == {"classifier.base_layer.weight": "classifier.weight"}


def test_two_homes():
    held = Holder(net=vit(), classifier=nn.Linear(2, 2))
    with pytest.raises(AmbiguousError, match="one of the holder itself") as caught:
        solve(walk(held), VIT)
    assert [f.key for f in caught.value.findings] == ["classifier.weight", "classifier.bias"]
    told = solve(walk(held), [*(f"net.{key}" for key in VIT), "classifier.weight"])
    assert told.carried == {"classifier.weight": "classifier.weight"}


def test_nothing_lands():
    with pytest.raises(UnmatchedKeysError, match="none of the 2 keys") as caught:
        solve(walk(vit()), ["a.b", "c"])
    assert caught.value.findings[0].code == "no-home"
    with pytest.raises(UnmatchedKeysError, match="there are no keys"):
        solve(walk(vit()), [])
    with pytest.raises(BadInputError, match="holds no transformers model"):
        solve(walk(nn.Linear(2, 2)), ["weight"])
    told = solve(walk(Holder(net=vit(), head=nn.Linear(2, 2))), ["head.weight"])
    assert told.carried == {"head.weight": "head.weight"} and not told.parts


def test_a_model_saved_twice_in_one_file_is_read_once_under_each_wrapper():
    """Two names of one tensor do not make the bare reading the one that most keys support."""
    first = [f"module.{key}" for key in VIT]
    second = [f"_orig_mod.{key}" for key in VIT[:5]]
    told = solve(walk(vit()), [*first, *second])
    parts = [(part.prefix, len(part.keys), len(part.doubles)) for part in told.parts]
    assert parts == [("module.", len(VIT), 0), ("_orig_mod.", 5, 0)]
    assert not told.unmatched and not told.carried
