"""``regraft.convert_state_dict`` on what is unusual or wrong."""

import numpy as np
import peft
import pytest
import torch
import transformers
from holders import Holder, ValueHead, lora, mixtral, vit
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import regraft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def old(model):
    return dict(regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model))


def codes(error):
    return {finding.code for finding in error.value.findings}


def test_a_heads_file_fits_the_base_model_and_says_what_is_left_out():
    head, base = vit(), vit(head=False)
    with pytest.warns(UserWarning) as told:
        new = regraft.convert_state_dict(old(head), to=base)
    assert "2 tensors of the state dict are left out" in str(told[1].message)
    assert "classifier.weight, classifier.bias" in str(told[1].message)
    assert set(new.report.left_out) == {"classifier.weight", "classifier.bias"}
    assert "ViTModel has no head" in str(new.report)
    assert torch.equal(new["layers.0.mlp.fc1.weight"], head.vit.layers[0].mlp.fc1.weight)
    base.load_state_dict(new, strict=True)


def test_a_base_models_file_fits_the_head_model():
    head, base = vit(), vit(head=False)
    with pytest.warns(UserWarning) as told:
        new = regraft.convert_state_dict(old(base), to=head)
    assert "classifier" in str(told[0].message) and "pooler" in str(told[1].message)
    assert set(new.report.missing) == {"classifier.weight", "classifier.bias"}
    assert set(new.report.left_out) == {"pooler.dense.weight", "pooler.dense.bias"}
    head.load_state_dict(new, strict=True)
    assert torch.equal(head.vit.layers[0].mlp.fc1.weight, base.layers[0].mlp.fc1.weight)


def test_a_head_beside_a_base_model_that_has_one_is_unknown():
    source = {**old(vit()), "bbox_embed.weight": torch.ones(2)}
    with pytest.raises(regraft.UnmatchedKeysError) as error:
        regraft.convert_state_dict(source, to=vit())
    assert [f.key for f in error.value.findings] == ["bbox_embed.weight"]


def test_buffers_that_models_compute_now_are_told_and_left_out():
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
    )
    model = transformers.LlamaForCausalLM(config)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    new = regraft.convert_state_dict({**model.state_dict(), key: torch.ones(2)}, to=model)
    assert key not in new
    assert list(new.report.left_out) == [key]


def test_an_expert_too_few_names_the_tensors():
    source = {k: t for k, t in old(mixtral()).items() if ".1.block_sparse_moe.experts.3." not in k}
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(source, to=mixtral())
    assert codes(error) == {"missing"}
    for part in ("w1", "w2", "w3"):
        assert f"layers.1.block_sparse_moe.experts.3.{part}.weight" in str(error.value)


def test_all_problems_come_together():
    source = old(mixtral())
    source["model.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 3)
    del source["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(source, to=mixtral())
    assert codes(error) == {"shape", "missing"}


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (vit, "no state dict"),
        (lambda: [1], "no state dict"),
        (lambda: "model.safetensors", "no state dict"),
        (lambda: {1: torch.ones(1)}, "no text"),
        (lambda: {**vit().state_dict(), "classifier.weight": 3}, "a int, where a tensor"),
    ],
)
def test_what_is_no_state_dict(source, match):
    for more in ({"to": vit()}, {"to": "transformers-v4", "model": vit()}):
        with pytest.raises(regraft.BadInputError, match=match) as error:
            regraft.convert_state_dict(source(), **more)
        assert codes(error) == {"not-tensors"}


def test_adapters_around_one_module_stay_apart():
    """PEFT nests adapters of two parameters of a module; neither may take the other's place."""
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    holder = Holder(net=peft.get_peft_model(mixtral(), config))
    want = {key: tensor.clone() for key, tensor in holder.state_dict().items()}
    there = regraft.convert_state_dict(want, to="transformers-v4", model=holder)
    assert not any(".experts.lora_" in key for key in there)
    assert sum(".w2.lora_" in key for key in there) > 2
    for parameter in holder.parameters():
        parameter.data.zero_()
    back = regraft.convert_state_dict(there, to=holder)
    assert back.report.kept == []
    assert back.keys() == want.keys()
    assert all(torch.equal(back[key], want[key]) for key in want)


def test_saved_modules_and_several_adapters_come_back():
    model = lora(vit(), modules_to_save=["classifier"])
    names = [name for name, m in model.named_modules() if name.endswith("q_proj")]
    names = [name.removeprefix("base_model.model.") for name in names]
    model.add_adapter("weight", peft.LoraConfig(r=3, target_modules=names))
    holder = ValueHead(model)
    want = {key: torch.randn_like(tensor) for key, tensor in holder.state_dict().items()}
    there = regraft.convert_state_dict(want, to="transformers-v4", model=holder)
    back = regraft.convert_state_dict(there, to=holder)
    assert all(torch.equal(back[key], want[key]) for key in want)


def test_a_value_head_is_carried_if_there_and_kept_if_not():
    holder = ValueHead(mixtral())
    bare = old(mixtral())
    assert regraft.convert_state_dict(bare, to=holder).report.kept == [
        "v_head.summary.weight",
        "v_head.summary.bias",
    ]
    weight = torch.ones(1, 16)
    for path in ("", "pretrained_model."):
        source = {path + key: tensor for key, tensor in bare.items()}
        new = regraft.convert_state_dict({**source, "v_head.summary.weight": weight}, to=holder)
        assert new["v_head.summary.weight"] is weight
        assert new.report.kept == ["v_head.summary.bias"]


def tied():
    config = transformers.LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=8,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_tied_weights_speaks_for_both(kept):
    pair = {"lm_head.weight", "model.embed_tokens.weight"}
    model = tied()
    source = {key: torch.randn_like(t) for key, t in model.state_dict().items()}
    source = {key: t for key, t in source.items() if key == kept or key not in pair}
    new = regraft.convert_state_dict(source, to=model)
    assert all(torch.equal(new[key], source[kept]) for key in pair)
    assert new.report.kept == []


def test_tied_weights_that_differ_are_an_error():
    model = tied()
    source = {key: torch.randn_like(t) for key, t in model.state_dict().items()}
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(source, to=model)
    assert codes(error) == {"two-values"}


def test_a_model_in_two_places_is_written_once():
    model = vit()
    holder = Holder(a=model, b=model)
    want = {key: tensor.clone() for key, tensor in holder.state_dict().items()}
    there = regraft.convert_state_dict(want, to="transformers-v4", model=holder)
    assert {key.partition(".")[0] for key in there} == {"a"}
    assert len(there) == len(want) // 2
    back = regraft.convert_state_dict(there, to=holder)
    assert all(torch.equal(back[key], want[key]) for key in want)
    want["b.classifier.bias"] = want["b.classifier.bias"] + 1
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(want, to="transformers-v4", model=holder)
    assert codes(error) == {"two-values"}


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_extra_state_is_carried():
    model = vit()
    model.vit.layers[0].mlp.fc1.__class__ = Counting
    there = regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)
    model.load_state_dict(regraft.convert_state_dict(there, to=model), strict=True)
    assert model.vit.layers[0].mlp.fc1.seen == 3


def test_meta_models_and_other_types():
    with torch.device("meta"):
        model = mixtral()
    source = {key: tensor.bfloat16() for key, tensor in old(mixtral()).items()}
    new = regraft.convert_state_dict(source, to=model)
    assert {t.device.type for t in new.values()} == {"cpu"}
    assert {t.dtype for t in new.values()} == {torch.bfloat16}
    model.load_state_dict(new, strict=True, assign=True)
    names = regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)
    assert names.keys() == source.keys()


def unusable():
    """Values of a state dict that are no plain tensors, and what is said of them."""
    tensor = torch.ones(8, 8)
    yield "numpy", np.ones((8, 8), np.float32), "numpy ndarray"
    yield "quantised", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantised by torch"
    yield "complex", tensor.to(torch.complex64), "complex"
    yield "sparse", tensor.to_sparse(), "sparse"
    yield "meta", tensor.to("meta"), "meta device"
    yield "fp4", torch.zeros(8, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "packed"
    yield "lazy", nn.parameter.UninitializedParameter(), "no shape yet"
    yield "wrapped", TwoTensor(tensor, tensor), "other tensors"


@pytest.mark.parametrize("key", ["model.norm.weight", "experts.1.w3.weight"])
@pytest.mark.parametrize(("value", "said"), [pytest.param(v, s, id=n) for n, v, s in unusable()])
@pytest.mark.parametrize("way", ["to a model", "of a model", "by name"])
def test_what_is_no_plain_tensor_is_a_finding(key, value, said, way):
    model = mixtral()
    source = old(model)
    key = next(name for name in source if name.endswith(key))
    source[key] = value
    options = {"to": model} if way == "to a model" else {"to": "transformers-v5"}
    if way == "of a model":
        options["model"] = model
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(source, **options)
    assert [finding.key for finding in error.value.findings] == [key]
    assert codes(error) == {"not-tensors"}
    assert said in error.value.findings[0].message


def test_a_state_dict_without_numbers_converts_as_a_whole():
    source = {key: tensor.to("meta") for key, tensor in old(mixtral()).items()}
    made = regraft.convert_state_dict(source, to="transformers-v5", model=mixtral())
    assert {tensor.device.type for tensor in made.values()} == {"meta"}


def test_key_mapping_comes_first():
    source = {key.replace("model.", "backbone.", 1): t for key, t in old(mixtral()).items()}
    to = Holder(net=mixtral())
    with pytest.raises(regraft.UnmatchedKeysError):
        regraft.convert_state_dict(source, to=to)
    own = {r"^backbone\.": "model."}
    new = regraft.convert_state_dict(source, to=to, key_mapping=own)
    to.load_state_dict(new, strict=True)
    renamed = regraft.mapping(to, key_mapping=own).rename("backbone.norm.weight")
    assert renamed == "net.model.norm.weight"
    named = {r"(?P<front>backbone)\.": r"\g<front>."}
    for wrong in ({"(": "x"}, {"a": r"\4"}, {"a": str.upper}, {1: "a"}, named, [("a", "b")]):
        with pytest.raises(regraft.BadInputError) as error:
            regraft.mapping(to, key_mapping=wrong)
        assert codes(error) == {"option"}
    grouped = {r"^backbone\.(layers|norm|embed_tokens)": r"model.\1"}
    assert regraft.convert_state_dict(source, to=to, key_mapping=grouped).keys() == new.keys()
    with pytest.raises(regraft.BadInputError, match="for a live model"):
        regraft.convert_state_dict(source, to="transformers-v5", key_mapping=own)


def test_a_key_mapping_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr("regraft.storage.expressions.SECONDS", 0.2)
    source = {key + "a" * 60 + "!": tensor for key, tensor in old(mixtral()).items()}
    with pytest.raises(regraft.BadInputError) as error:
        regraft.convert_state_dict(source, to=mixtral(), key_mapping={r"\.weight(a|a)*$": "x"})
    assert codes(error) == {"slow-pattern"}


def test_without_a_model_names_must_tell():
    source = old(vit())
    with pytest.raises(regraft.RegraftError, match="model=") as error:
        regraft.convert_state_dict(source, to="transformers-v5")
    assert "--model" not in str(error.value)


def test_a_mapping_reads_well():
    mapping = regraft.mapping(ValueHead(mixtral()))
    text = str(mapping)
    assert "pretrained_model: MixtralForCausalLM" in text
    assert "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight" in text
    assert "the holder's own: v_head.summary.weight" in text
    assert repr(mapping) == "<regraft mapping of pretrained_model: MixtralForCausalLM>"
    assert all(len(rule) < 110 for rule in new_rules())


def new_rules():
    return regraft.convert_state_dict(old(mixtral()), to=mixtral()).report.rules


def test_shapes_are_not_read_before_they_are_needed(monkeypatch):
    from regraft.names import live

    read = []
    made = live._skeleton
    monkeypatch.setattr(live, "_skeleton", lambda *args: read.append(1) or made(*args))
    mapping = regraft.mapping(vit())
    assert not read
    mapping.rename("vit.encoder.layer.0.output.dense.weight")
    assert read == [1]
