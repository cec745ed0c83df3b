"""Keys with another prefix than the base's: wrappers, adapter names, a language model inside another model.

Sources: volcengine/verl#7070, huggingface/trl#5766, huggingface/peft#2699, vllm-project/vllm#39369, #48019, #38844,
#45716, illuin-tech/colpali#424, huggingface/transformers#45313, NVIDIA-NeMo/Automodel#3595, huggingface/peft#3230,
NVIDIA/Model-Optimizer#2076, huggingface/transformers#45996, #46067. Keys and shapes are rebuilt.
"""

import pytest
from checkpoints.models import mixtral, write_folder
from rebuilt import (
    PREFIX,
    V4,
    V5,
    codes,
    config_of,
    lora,
    numbered,
    read,
    same,
    write_adapter,
    write_base,
)
from test_cases import SIZES

import regraft

VLM = {
    "vision_config": {"model_type": "qwen3_vl_moe_vision", "depth": 1, "hidden_size": 8},
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        **SIZES,
        "num_experts": 4,
        "moe_intermediate_size": 6,
    },
}


def vlm(folder):
    return write_base(folder, "qwen3_vl_moe", **VLM)


def q_projections(prefix="model.layers.", layers=2):
    return lora({f"{prefix}{n}.self_attn.q_proj": (16, 16) for n in range(layers)})


@pytest.mark.parametrize("name", ["default", "weight_2", "lora", "lora_A"])
def test_the_name_of_an_adapter_in_keys_is_taken_out(name, tmp_path):
    """Also one that is itself part of what PEFT's names are made of."""
    model = write_base(tmp_path / "base", "llama")
    right = numbered(q_projections())
    spoilt = {k.replace(".weight", f".{name}.weight"): v for k, v in right.items()}
    src = write_adapter(tmp_path / "src", spoilt, target_modules=["q_proj"])
    report = regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), right)
    assert any("taken out" in note for note in report.notes)


def test_saved_modules_under_the_name_of_an_adapter(tmp_path):
    model = write_base(tmp_path / "base", "llama")
    right = numbered(q_projections() | {f"{PREFIX}lm_head.weight": (12, 16)})
    spoilt = {
        k.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"): v
        for k, v in right.items()
    }
    src = write_adapter(
        tmp_path / "src", spoilt, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), right)


def test_a_lora_of_a_text_model_for_the_model_that_has_it_inside(tmp_path):
    src = write_adapter(tmp_path / "src", q_projections(), target_modules=["q_proj"])
    regraft.convert(src, tmp_path / "new", to=V5, model=vlm(tmp_path / "base"))
    wanted = numbered(q_projections("model.language_model.layers."))
    assert same(read(tmp_path / "new"), wanted)


@pytest.mark.parametrize("lead", ["model.language_model.", "language_model."])
def test_a_part_that_stands_before_the_prefix(lead, tmp_path):
    """A trainer put the name of the part that it trained before PEFT's prefix."""
    shapes = q_projections("layers." if lead.startswith("model.") else "model.layers.")
    src = write_adapter(
        tmp_path / "src", {lead + k: v for k, v in shapes.items()}, target_modules=["q_proj"]
    )
    report = regraft.convert(src, tmp_path / "new", to=V5, model=vlm(tmp_path / "base"))
    assert same(read(tmp_path / "new"), numbered(q_projections("model.language_model.layers.")))
    assert any("before PEFT's prefix" in note for note in report.notes)


@pytest.mark.parametrize("lead", ["thinker.", "policy.", "model.", "actor.module."])
def test_what_held_the_model_stands_before_the_prefix(lead, tmp_path):
    """Of a part that a text model comes from nothing is left, either."""
    model = write_base(tmp_path / "base", "llama", architectures=["LlamaForCausalLM"])
    shapes = {lead + k: v for k, v in q_projections().items()}
    src = write_adapter(tmp_path / "src", shapes, target_modules=["q_proj"])
    report = regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), numbered(q_projections()))
    assert any(repr(lead) in note for note in report.notes)
    assert regraft.verify(src, tmp_path / "new", model=model)
    assert codes_without_base(src) == {"prefix"}


def codes_without_base(src):
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, src.parent / "unknown", to=V5)
    return codes(caught)


def test_a_prefix_that_stands_twice(tmp_path):
    model = write_base(tmp_path / "base", "llama")
    shapes = q_projections("model.model.layers.")
    src = write_adapter(tmp_path / "src", shapes, target_modules=["q_proj"])
    report = regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), numbered(q_projections()))
    assert any("twice" in note for note in report.notes)


@pytest.mark.parametrize("place", ["foo.model.", "model.decoder."])
def test_layers_where_the_class_has_none(place, tmp_path):
    """PEFT would load nothing of it, and a rule's open beginning took it for a model inside another."""
    shapes = q_projections(f"{place}layers.")
    src = write_adapter(tmp_path / "src", shapes, target_modules=["q_proj"])
    model = write_base(tmp_path / "base", "llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert f"{place}layers.0" in str(caught.value)
    report = regraft.convert(
        src, tmp_path / "new", to=V5, model=write_base(tmp_path / "other", "llama")
    )
    assert any("could not be checked" in note for note in report.notes)


@pytest.mark.parametrize(("task", "said"), [("SEQ_CLS", False), ("CAUSAL_LM", True)])
def test_a_head_of_another_class(task, said, tmp_path):
    shapes = q_projections() | {f"{PREFIX}score.weight": (3, 16)}
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": task}
    src = write_adapter(tmp_path / "src", shapes, **settings)
    model = write_base(tmp_path / "base", "llama", architectures=["LlamaForCausalLM"])
    report = regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert any("no score.weight" in note for note in report.notes) == said


def test_nothing_moves_on_a_text_model(tmp_path):
    model = write_base(tmp_path / "base", "qwen3")
    src = write_adapter(tmp_path / "src", q_projections(), target_modules=["q_proj"])
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), read(src))


@pytest.mark.parametrize("root", ["wrapper.inner.model.layers.", "language_model.layers."])
def test_no_match_shows_the_keys(root, tmp_path):
    """Names of some other holder are not guessed at; a sample of them is in the message."""
    model = vlm(tmp_path / "base")
    src = write_adapter(tmp_path / "src", q_projections(root + "foo."), target_modules=["q_proj"])
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert root in str(caught.value) and codes(caught) == {"unmatched"}


def test_towers_beside_the_language_model_stay(tmp_path):
    """A rule for the language model's layers has nothing to say of the vision tower's blocks."""
    model = vlm(tmp_path / "base")
    shapes = lora(
        {
            "model.language_model.layers.0.self_attn.q_proj": (16, 16),
            "model.visual.blocks.0.attn.qkv": (24, 8),
            "model.visual.merger.linear_fc1": (8, 8),
        }
    )
    src = write_adapter(tmp_path / "src", shapes, target_modules=["q_proj", "qkv", "linear_fc1"])
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert same(read(tmp_path / "new"), read(src))


@pytest.mark.parametrize("family", ["IA3", "LOHA", "DORA"])
def test_other_families_inside_a_bigger_model(family, tmp_path):
    """The base's names are told by whatever a family calls its tensors, not by LoRA's pairs."""
    at = f"{PREFIX}model.language_model.layers.0.self_attn.q_proj."
    settings = {"peft_type": family, "target_modules": ["q_proj"]}
    if family == "IA3":
        shapes = {f"{at}ia3_l": (16, 1)}
        settings |= {"feedforward_modules": []}
    elif family == "LOHA":
        shapes = {f"{at}hada_w{n}_a": (16, 2) for n in (1, 2)}
        shapes |= {f"{at}hada_w{n}_b": (2, 16) for n in (1, 2)}
        settings |= {"alpha": 2}
    else:
        shapes = lora({at.removeprefix(PREFIX).removesuffix("."): (16, 16)})
        shapes |= {f"{at}lora_magnitude_vector": (16,)}
        settings |= {"peft_type": "LORA", "use_dora": True}
    src = write_adapter(tmp_path / "src", shapes, **settings)
    regraft.convert(src, tmp_path / "new", to=V5, model=vlm(tmp_path / "base"))
    assert same(read(tmp_path / "new"), read(src))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda n: (
            f"_fsdp_wrapped_module.{n.replace('.block_sparse_moe.', '._fsdp_wrapped_module.block_sparse_moe.')}"
        ),
    ],
)
def test_wrappers_in_checkpoints(wrap, tmp_path):
    tensors = mixtral()
    src = write_folder(tmp_path / "src", {wrap(k): v for k, v in tensors.items()})
    regraft.convert(write_folder(tmp_path / "plain", tensors), tmp_path / "right", to=V5)
    report = regraft.convert(src, tmp_path / "new", to=V5)
    assert same(read(tmp_path / "new"), read(tmp_path / "right"))
    assert any("taken out" in note for note in report.notes)


def test_the_base_of_another_family_is_named(tmp_path):
    """`auto_mapping` says what it was trained on; nothing has to be built to see it."""
    model = write_base(tmp_path / "base", "llama")
    src = write_adapter(
        tmp_path / "src",
        q_projections(),
        target_modules=["q_proj"],
        auto_mapping={
            "base_model_class": "MixtralForCausalLM",
            "parent_library": "transformers.models.mixtral.modeling_mixtral",
        },
    )
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) == {"wrong-base"} and "mixtral" in str(caught.value)


def test_a_base_with_fewer_layers_is_named(tmp_path):
    model = write_base(tmp_path / "base", "llama")
    src = write_adapter(tmp_path / "src", q_projections(layers=3), target_modules=["q_proj"])
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) == {"wrong-base"}


def test_targets_by_a_pattern_follow_their_modules(tmp_path):
    model = write_base(tmp_path / "base", "mixtral", num_hidden_layers=1)
    shapes = lora({"model.layers.0.block_sparse_moe.gate": (4, 16)})
    pattern = r".*block_sparse_moe\.gate"
    src = write_adapter(tmp_path / "src", shapes, target_modules=pattern)
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    config = config_of(tmp_path / "new")
    assert "block_sparse_moe" not in str(config) and "gate" in str(config["target_parameters"])
    assert regraft.verify(src, tmp_path / "new", model=model)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=model)
    assert (
        same(read(tmp_path / "back"), read(src))
        and config_of(tmp_path / "back")["target_modules"] == pattern
    )


def test_check_tries_a_bigger_models_adapter_with_the_text_model(tmp_path):
    """PEFT notes the class that an adapter was made with, and a text model's config makes none of that class."""
    pytest.importorskip("peft")
    base = write_base(tmp_path / "base", "qwen2", architectures=["Qwen2ForCausalLM"], **SIZES)
    src = write_adapter(
        tmp_path / "src",
        q_projections("model.language_model.layers."),
        target_modules=["q_proj"],
        auto_mapping={"base_model_class": "Qwen2_5_VLForConditionalGeneration"},
    )
    (verdict,) = regraft.check(src, model=base).verdicts
    assert not verdict.healthy and not verdict.findings
    assert verdict.remedy and verdict.remedy_tried
