"""Canonical names: the same for every wrapping, and live keys that are those of the state dict."""

import warnings

import peft
import pytest
import torch
import transformers
from holders import (
    HOLDERS,
    Holder,
    Pipeline,
    ValueHead,
    compiled,
    data_parallel,
    fsdp2,
    lora,
    mixtral,
    vit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regraft.errors import BadInputError
from regraft.names.live import skeleton_of, walk
from regraft.names.modules import facts_of

MODELS = {"vit": vit, "mixtral": mixtral}


def shapes(model):
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def live_keys(live):
    """All keys that a walk tells of, as one list."""
    keys = [key for model in live.models for keys in model.keys.values() for key in keys]
    return keys + list(live.own) + list(live.adapters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder(family, holder):
    model = MODELS[family]()
    plain = shapes(model)
    expected = skeleton_of(model)
    held = HOLDERS[holder](model)
    live = walk(held)
    [found] = live.models
    assert dict(found.skeleton.tensors) == plain
    assert list(found.skeleton.tensors) == list(plain)
    assert found.skeleton.kinds == expected.kinds
    assert found.skeleton.parameters == expected.parameters
    told = [(s.path, s.classes, s.native, s.model_type) for s in found.skeleton.submodels]
    assert told == [(s.path, s.classes, s.native, s.model_type) for s in expected.submodels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = held.state_dict()
    assert sorted(live_keys(live)) == sorted(state)
    for key, shape in plain.items():
        [name] = found.keys[key]
        assert tuple(state[name].shape) == shape
    assert ("lora_A" in str(live.adapters)) == ("peft" in holder)
    path = {"holder": "model", "sequential": "0", "module dict": "net"}.get(holder)
    path = path or ("pretrained_model" if "value" in holder else "")
    assert found.path == ("inner.actor" if holder == "holder of ddp of peft" else path)


def test_submodels_and_kinds():
    skeleton = skeleton_of(vit())
    assert [(s.path, s.classes[0], s.base_model_prefix) for s in skeleton.submodels] == [
        ("", "ViTForImageClassification", "vit"),
        ("vit", "ViTModel", "vit"),
    ]
    skeleton = skeleton_of(mixtral())
    experts = "model.layers.0.mlp.experts"
    assert skeleton.parameters[experts] == ("gate_up_proj", "down_proj")
    assert skeleton.kinds[f"{experts}.down_proj"] == "experts"
    assert skeleton.kinds["model.layers.0.mlp.gate.weight"] == "parameter"
    assert skeleton.kinds["model.embed_tokens.weight"] == "embedding"
    assert skeleton.kinds["lm_head.weight"] == "linear"
    assert "model.norm.weight" not in skeleton.kinds


def test_more_kinds():
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=8)
    gpt2 = transformers.GPT2LMHeadModel(config)
    assert skeleton_of(gpt2).kinds["transformer.h.0.attn.c_attn.weight"] == "conv1d"
    model = mixtral()
    model.model.layers[0].mlp.experts.is_transposed = True
    kinds = skeleton_of(model).kinds
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == "experts-transposed"
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == "experts"


def test_meta_device_and_buffers():
    with torch.device("meta"):
        model = vit()
    model.register_buffer("kept", torch.zeros(3))
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    assert dict(skeleton_of(model).tensors) == shapes(model)


def test_classes():
    class MyViT(transformers.ViTModel):
        pass

    class Foreign(transformers.ViTPreTrainedModel):
        pass

    [mine] = skeleton_of(MyViT(vit().config)).submodels
    assert mine.classes == ("MyViT", "ViTModel", "ViTPreTrainedModel")
    assert mine.native == "ViTModel"
    [foreign] = skeleton_of(Foreign(vit().config)).submodels
    assert foreign.classes == ("Foreign", "ViTPreTrainedModel")
    assert foreign.native is None
    sharded = fsdp2(vit())
    assert type(sharded).__name__ == "FSDPViTForImageClassification"
    assert skeleton_of(sharded).submodels[0].classes[0] == "ViTForImageClassification"


def test_peft_everything():
    """Nested adapters around parameters, saved modules, trained tokens: base's and adapters' apart."""
    model = mixtral()
    plain = shapes(model)
    held = lora(
        model,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 2],
    )
    live = walk(held)
    [found] = live.models
    assert dict(found.skeleton.tensors) == plain
    assert found.skeleton.parameters == skeleton_of(mixtral()).parameters
    assert sorted(live_keys(live)) == sorted(held.state_dict())
    assert not live.own
    assert found.keys["lm_head.weight"] == ("base_model.model.lm_head.original_module.weight",)
    copy = "base_model.model.lm_head.modules_to_save.default.weight"
    assert live.adapters[copy] == "lm_head.modules_to_save.default.weight"
    assert found.keys["model.layers.0.mlp.experts.down_proj"] == (
        "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.down_proj",
    )


def test_prompts_share_the_embedding():
    """PEFT holds the embedding of the base once more; it is the base's, under two keys."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    held = peft.get_peft_model(mixtral(), config)
    live = walk(held)
    [found] = live.models
    assert sorted(live_keys(live)) == sorted(held.state_dict())
    assert found.keys["model.embed_tokens.weight"] == (
        "base_model.model.embed_tokens.weight",
        "word_embeddings.weight",
    )
    assert list(live.adapters) == ["prompt_encoder.default.embedding.weight"]


def test_adapters_that_transformers_put_in():
    model = vit()
    plain = shapes(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="weight")
    live = walk(model)
    assert dict(live.models[0].skeleton.tensors) == plain
    assert sorted(live_keys(live)) == sorted(model.state_dict())
    assert len(live.adapters) == 4


def test_two_models_and_a_shared_one():
    policy = mixtral()
    score = nn.Linear(2, 2)
    live = walk(Holder(policy=data_parallel(policy), reference=mixtral(), score=score))
    assert [model.path for model in live.models] == ["policy", "reference"]
    assert live.models[0].live_path == "policy.module"
    assert sorted(live.own) == ["score.bias", "score.weight"]
    shared = Holder(policy=policy, reference=policy)
    [found] = walk(shared).models
    assert found.paths == ("policy", "reference")
    assert found.keys["lm_head.weight"] == ("policy.lm_head.weight", "reference.lm_head.weight")
    assert sorted(live_keys(walk(shared))) == sorted(shared.state_dict())


def test_a_head_that_shares_with_the_model():
    model = mixtral()
    held = Holder(embed=model.get_input_embeddings(), net=model)
    live = walk(held)
    assert not live.own
    keys = live.models[0].keys["model.embed_tokens.weight"]
    assert keys == ("net.model.embed_tokens.weight", "embed.weight")


def test_pipeline():
    one, two = vit(), mixtral()
    live = walk(Pipeline(vision=compiled(one), parts={"text": two}, listed=[vit(False)]))
    assert [(m.path, m.live_path) for m in live.models] == [
        ("vision", "vision._orig_mod"),
        ("parts.text", "parts.text"),
        ("listed.0", "listed.0"),
    ]
    assert live.models[0].keys["classifier.weight"] == ("vision._orig_mod.classifier.weight",)


def test_what_is_no_model():
    with pytest.raises(BadInputError, match="Linear is no transformers model"):
        skeleton_of(nn.Linear(2, 2))
    with pytest.raises(BadInputError, match="holds some: policy, reference"):
        skeleton_of(Holder(policy=vit(), reference=vit()))
    assert walk(3).models == ()


class Genuine(Holder):
    """A block whose children are called like wrappers."""


NAMES = ("module", "_orig_mod", "base_layer", "model", "original_module", "base_model", "net")
WRAPS = {
    "data": data_parallel,
    "compiled": compiled,
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=False),
}


@st.composite
def blocks(draw, depth=3):
    """A tree of genuine children with awkward names, as nested dicts."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    if depth == 0:
        return dict.fromkeys(names)
    inner = st.one_of(st.none(), blocks(depth=depth - 1))
    return {name: draw(inner) for name in names}


def build(tree, wraps, path=""):
    """The tree as modules, with the wrappers that are wanted at each path."""
    children = {
        name: nn.Linear(2, 2) if inner is None else build(inner, wraps, f"{path}{name}.")
        for name, inner in tree.items()
    }
    module = Genuine(**children)
    for wrap in wraps.get(path, ()):
        module = WRAPS[wrap](module)
    return module


def paths(tree, path=""):
    yield path
    for name, inner in tree.items():
        if inner is not None:
            yield from paths(inner, f"{path}{name}.")


def keys_of(tree, path=""):
    for name, inner in tree.items():
        if inner is None:
            yield from (f"{path}{name}.weight", f"{path}{name}.bias")
        else:
            yield from keys_of(inner, f"{path}{name}.")


@given(blocks(), st.data())
@settings(max_examples=40)
def test_random_wrappers(tree, data):
    """Wrappers anywhere, in any order, around and between children that are called like them."""
    some = st.lists(st.sampled_from(sorted(WRAPS)), max_size=2).filter(
        lambda names: names != ["compiled", "compiled"]  # torch makes no module of that
    )
    wraps = {path: data.draw(some) for path in paths(tree)}
    outside = data.draw(some)
    model = vit(head=False)
    model.block = build(tree, wraps)
    held = model
    for wrap in outside:
        held = WRAPS[wrap](held)
    held = Holder(module=held)
    live = walk(held)
    [found] = live.models
    assert found.path == "module"
    expected = [key for key in found.skeleton.tensors if key.startswith("block.")]
    assert expected == [f"block.{key}" for key in keys_of(tree)]
    assert sorted(live_keys(live)) == sorted(held.state_dict())
    assert all(key.endswith("n_averaged") for key in live.own)


def test_value_head_is_the_holders():
    live = walk(ValueHead(mixtral()))
    assert sorted(live.own) == ["v_head.summary.bias", "v_head.summary.weight"]


def test_a_linear_layer_that_returns_more_than_its_product_has_a_parameter():
    """What is added to its output cannot be added to a router's, which is several tensors."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert facts_of(PhimoeTopKRouter).kind is None
    assert facts_of(Doubled).kind == facts_of(torch.nn.Linear).kind == "linear"
