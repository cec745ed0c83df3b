"""vLLM, SGLang, Unsloth, NeMo, Tinker, Megatron-Bridge, SkyRL: files that look like PEFT's and are not."""

import json
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.dialects.base import dialects
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.testing import check_dialect

GOLDEN = Path(__file__).parents[1] / "golden"
V4, V5 = "transformers-v4", "transformers-v5"
PREFIX = "base_model.model."


def golden(case):
    return GOLDEN / "cases" / case, GOLDEN / "bases" / case.partition("__")[0]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return open_tensors(folder / "adapter_model.safetensors")


def rewrite(src, dst, change=None, **fields):
    """A copy of an adapter with other tensors, or other fields of its config."""
    tensors = {name: np.array(x) for name, x in tensors_of(src).items()}
    if change is not None:
        tensors = change(tensors) or tensors
    dst.mkdir()
    write_tensors(dst / "adapter_model.safetensors", tensors, {"format": "pt"})
    (dst / "adapter_config.json").write_text(json.dumps(config_of(src) | fields))
    return dst


def same(one, other, base):
    return main(["verify", str(one), str(other), "--model", str(base)]) == 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A v5 adapter of Qwen3-MoE, and its base."""
    src, base = golden("qwen3_moe__gud")
    made = tmp_path_factory.mktemp("packed") / "made"
    regraft.convert(src, made, to=V5, model=base)
    return made, base


@pytest.mark.parametrize("name", ["vllm", "unsloth", "nemo"])
def test_the_kit_passes(name, tmp_path):
    check_dialect(dialects()[name], tmp_path)


@pytest.mark.parametrize("to", ["vllm", "sglang", "unsloth", "nemo"])
@pytest.mark.parametrize(
    "case",
    ["mixtral__gate_down", "mixtral__patterns_expert", "mixtral__subset_regex", "deepseek_v3__gud"],
)
def test_there_and_back(case, to, tmp_path):
    src, base = golden(case)
    made, back = tmp_path / "made", tmp_path / "back"
    regraft.convert(src, made, to=to, model=base, verify=True)
    assert regraft.inspect(made).adapters[0].dialect == to
    regraft.convert(made, back, to=V5, model=base, verify=True)
    config = config_of(back)
    assert not {"lora_B_layout", "unsloth_fused_expert_lora", "paramwrapper_layout"} & set(config)
    assert not (back / "automodel_peft_config.json").exists()
    regraft.convert(src, tmp_path / "straight", to=V5, model=base)
    assert same(tmp_path / "straight", back, base)


# What servers demand


def test_vllm_has_every_expert_and_projection_of_one_rank(tmp_path):
    src, base = golden("mixtral__subset_regex")
    report = regraft.convert(src, tmp_path / "made", to="vllm", model=base)
    count = json.loads((base / "config.json").read_text())["num_local_experts"]
    names = set(tensors_of(tmp_path / "made"))
    stems = {n.partition(".experts.")[0] for n in names if ".experts." in n}
    for stem in stems:
        for leaf in ("w1", "w2", "w3"):
            keys = [f"{stem}.experts.{e}.{leaf}.lora_A.weight" for e in range(count)]
            assert set(keys) <= names
            assert len({tensors_of(tmp_path / "made")[key].shape for key in keys}) == 1
    notes = " ".join(report.notes)
    assert "blocks of zeros" in notes and "vllm serve" in notes


def test_vllm_keeps_gpt_oss_packed_with_both_parameters(tmp_path):
    src, base = golden("gpt_oss__params_attn")
    regraft.convert(src, tmp_path / "made", to="vllm", model=base)
    names = set(tensors_of(tmp_path / "made"))
    for stem in {n.partition(".experts.")[0] for n in names if ".experts." in n}:
        assert {
            f"{stem}.experts.lora_A.weight",
            f"{stem}.experts.base_layer.lora_B.weight",
        } <= names


def test_sglang_has_one_scale_no_patterns_and_q_with_k_and_v(tmp_path):
    src, base = golden("mixtral__rslora")

    def only_q(tensors):
        return {n: x for n, x in tensors.items() if "k_proj" not in n and "v_proj" not in n}

    mine = rewrite(
        src, tmp_path / "src", only_q, target_modules=["q_proj", "o_proj", "w1", "w2", "w3"]
    )
    regraft.convert(mine, tmp_path / "made", to="sglang", model=base)
    config = config_of(tmp_path / "made")
    assert not {"rank_pattern", "alpha_pattern"} & set(config) and not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    tensors = tensors_of(tmp_path / "made")
    for name, b in tensors.items():
        if name.endswith("v_proj.lora_B.weight"):
            assert not b.any() and name.replace("v_proj", "k_proj") in tensors
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            assert len(a) == config["r"]


@pytest.mark.parametrize(
    ("case", "to", "why"),
    [
        ("mixtral__dora", "vllm", "DoRA"),
        ("qwen2_moe__bias_all", "vllm", "whole weights"),
        ("mixtral__mts_head", "sglang", "whole weights"),
        ("mixtral__router", "sglang", "takes no LoRA on gate"),
        ("mixtral__embedding", "nemo", "embed_tokens"),
        ("mixtral__trainable_tokens", "vllm", "rows of a weight"),
        ("gpt_oss__params_attn", "sglang", "experts of this model"),
        ("mixtral__gate_up", "tinker", "read, and not written"),
        ("mixtral__gate_up", "megatron-bridge", "read, and not written"),
        ("mixtral__gate_up", "skyrl", "read, and not written"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(case, to, why, tmp_path):
    src, base = golden(case)
    with pytest.raises(regraft.RefusedError, match=why):
        regraft.convert(src, tmp_path / "made", to=to, model=base)
    assert not (tmp_path / "made").exists()


def test_nemo_has_whole_numbers_and_its_stamp(tmp_path):
    src, base = golden("mixtral__rslora")
    regraft.convert(src, tmp_path / "made", to="nemo", model=base, verify=True)
    config = config_of(tmp_path / "made")
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int)
    assert not {"use_rslora", "peft_version", "rank_pattern"} & set(config)
    own = json.loads((tmp_path / "made/automodel_peft_config.json").read_text())
    assert own["paramwrapper_layout"] == "peft-0.19.1"


def test_experts_that_are_stacked_everywhere_are_split_and_come_back(tmp_path):
    src, base = golden("qwen3_vl_moe__params")
    regraft.convert(src, tmp_path / "made", to="sglang", model=base, verify=True)
    assert not any(".experts.lora_" in name for name in tensors_of(tmp_path / "made"))
    regraft.convert(tmp_path / "made", tmp_path / "back", to=V5, model=base, verify=True)
    assert same(src, tmp_path / "back", base)


def test_a_classifier_s_head_goes_to_vllm(tmp_path):
    src, base = golden("qwen3_moe_seqcls__gud_attn")
    regraft.convert(src, tmp_path / "made", to="vllm", model=base, verify=True)
    assert config_of(tmp_path / "made")["modules_to_save"] == ["score"]
    assert f"{PREFIX}score.weight" in tensors_of(tmp_path / "made")


def test_repeated_layers_are_refused(tmp_path):
    src, base = golden("mixtral__layer_replication")
    with pytest.raises(regraft.RefusedError, match="repeated layers"):
        regraft.convert(src, tmp_path / "made", to="vllm", model=base)


# Unsloth's order of columns


def group(tensors, experts=4):
    """Columns of packed lora_B one expert after the other."""
    made = dict(tensors)
    for name, b in tensors.items():
        if name.endswith("lora_B.weight") and ".experts." in name:
            made[name] = np.ascontiguousarray(
                b.reshape(len(b), -1, experts).transpose(0, 2, 1)
            ).reshape(b.shape)
    return made


def record(layout):
    return {
        "lora_A_layout": "grouped_by_expert",
        "lora_B_layout": layout,
        "parameters": {
            leaf: {"lora_B_layout": layout, "num_experts": 4}
            for leaf in ("gate_up_proj", "down_proj")
        },
    }


GROUPED = "grouped_by_expert"
FIXED = {
    "unsloth_fixed": True,
    "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
}


@pytest.mark.parametrize(
    ("fields", "grouped"),
    [
        ({"lora_B_layout": GROUPED}, True),
        ({"unsloth_fused_expert_lora": record(GROUPED)}, True),
        ({"auto_mapping": {"unsloth_fused_expert_lora": record(GROUPED)}}, True),
        ({"lora_B_layout": "rank_major", "unsloth_fused_expert_lora": record(GROUPED)}, True),
        ({"auto_mapping": FIXED}, True),
        ({"lora_B_layout": "rank_major"}, False),
        ({"lora_B_layout": "rank_major", "auto_mapping": FIXED}, False),
        ({"unsloth_fused_expert_lora": record("rank_major"), "auto_mapping": FIXED}, False),
        ({"auto_mapping": {**FIXED, "parent_library": "transformers.models.llama4.x"}}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("to", [V5, "unsloth"])
def test_the_record_says_how_columns_stand(fields, grouped, to, packed, tmp_path):
    src, base = packed
    marked = rewrite(src, tmp_path / "src", group if grouped else None, **fields)
    regraft.convert(marked, tmp_path / "made", to=to, model=base)
    assert same(src, tmp_path / "made", base)
    config = config_of(tmp_path / "made")
    if to == "unsloth":
        assert config["lora_B_layout"] == "rank_major"
        assert config["unsloth_fused_expert_lora"] == record("rank_major")
    else:
        assert "lora_B_layout" not in config and "unsloth_fused_expert_lora" not in config
    assert "unsloth" not in json.dumps(config.get("auto_mapping"))
    written = tensors_of(tmp_path / "made")
    for name, tensor in tensors_of(src).items():
        assert np.array_equal(written[name], tensor), name


def test_a_grouped_file_without_a_record_is_read_by_name(packed, tmp_path):
    src, base = packed
    bare = rewrite(src, tmp_path / "src", group)
    regraft.convert(bare, tmp_path / "made", to=V4, model=base, source="unsloth-grouped")
    assert same(src, tmp_path / "made", base)


def test_a_record_that_differs_from_layer_to_layer_is_refused(packed, tmp_path):
    src, base = packed
    mixed = rewrite(src, tmp_path / "src", lora_B_layout="mixed")
    with pytest.raises(regraft.RefusedError, match="not which"):
        regraft.convert(mixed, tmp_path / "made", to=V4, model=base)
    odd = rewrite(src, tmp_path / "odd", lora_B_layout="sideways")
    with pytest.raises(regraft.BadInputError, match="sideways"):
        regraft.convert(odd, tmp_path / "made", to=V4, model=base)


# NeMo's three forms


def native(tensors, experts=4):
    """NeMo's grouped tensors of packed ones."""
    made = {}
    for name, x in tensors.items():
        if ".experts." not in name:
            made[name] = x
            continue
        module = name.partition(".experts.")[0] + ".experts"
        part = "gate_and_up" if "base_layer" in name else "down"
        if "lora_A" in name:
            made[f"{module}.lora_{part}_A"] = x.reshape(experts, -1, x.shape[1]).transpose(0, 2, 1)
        else:
            made[f"{module}.lora_{part}_B"] = x.reshape(len(x), -1, experts).transpose(2, 1, 0)
    return {n: np.ascontiguousarray(x) for n, x in made.items()}


def test_nemo_s_grouped_tensors(packed, tmp_path):
    src, base = packed
    mine = rewrite(src, tmp_path / "src", native, target_parameters=None, peft_version=None)
    regraft.convert(mine, tmp_path / "made", to=V4, model=base)
    assert same(src, tmp_path / "made", base)


@pytest.mark.parametrize("stamp", ["peft-0.18", "peft-0.19.1"])
def test_nemo_s_stamp_says_how_experts_lie(stamp, packed, tmp_path):
    src, base = packed
    regraft.convert(src, tmp_path / "old", to=f"{V5}/{stamp[:9]}", model=base)
    mine = rewrite(tmp_path / "old", tmp_path / "src", peft_version=None)
    (mine / "automodel_peft_config.json").write_text(json.dumps({"paramwrapper_layout": stamp}))
    regraft.convert(mine, tmp_path / "made", to=V5, model=base)
    assert same(src, tmp_path / "made", base)
    other = "peft-0.19.1" if stamp == "peft-0.18" else "peft-0.18"
    (mine / "automodel_peft_config.json").write_text(json.dumps({"paramwrapper_layout": other}))
    with pytest.raises(regraft.BadInputError):
        regraft.convert(mine, tmp_path / "wrong", to=V5, model=base)
    for none in ("new", ["peft-0.18"], 18):
        (mine / "automodel_peft_config.json").write_text(json.dumps({"paramwrapper_layout": none}))
        with pytest.raises(regraft.BadInputError, match="none of"):
            regraft.convert(mine, tmp_path / "wrong", to=V5, model=base)


def test_the_smaller_rank_of_nemo_s_experts(packed, tmp_path):
    """With moe_rank_scaling the config has the rank of other modules, and the experts' scale is by their own."""
    src, base = packed
    mine = rewrite(
        src, tmp_path / "src", native, target_parameters=None, r=config_of(src)["r"] * 2,
        base_model_name_or_path=str(base), peft_version=None,
    )  # fmt: skip
    (mine / "automodel_peft_config.json").write_text('{"moe_rank_scaling": true}')
    regraft.convert(mine, tmp_path / "made", to=V4, model=base)
    assert same(src, tmp_path / "made", base)


def test_nemo_s_smaller_rank_is_told_by_grouped_tensors_or_by_the_base(packed, tmp_path):
    src, base = packed
    scaled = {"target_parameters": None, "r": config_of(src)["r"] * 2, "peft_version": None}
    mine = rewrite(src, tmp_path / "src", native, **scaled, base_model_name_or_path=None)
    (mine / "automodel_peft_config.json").write_text('{"moe_rank_scaling": true}')
    regraft.convert(mine, tmp_path / "made", to="unsloth", model=base)
    assert same(src, tmp_path / "made", base)
    mine = rewrite(
        src, tmp_path / "packed", r=config_of(src)["r"] * 2, base_model_name_or_path=None
    )
    stamped = {"moe_rank_scaling": True, "paramwrapper_layout": "peft-0.19.1"}
    (mine / "automodel_peft_config.json").write_text(json.dumps(stamped))
    with pytest.raises(regraft.BadInputError, match="how many experts"):
        regraft.convert(mine, tmp_path / "other", to=V5, model=base)


@pytest.mark.parametrize(
    ("to", "says"),
    [("vllm", "vllm serve BASE"), ("sglang", "sglang.launch_server"), ("nemo", "NeMo Automodel")],
)
def test_the_last_line_says_what_to_do_with_the_result(to, says, packed, tmp_path, capsys):
    src, base = packed
    assert main(["convert", str(src), str(tmp_path / to), "--to", to, "--model", str(base)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert says in last and str(tmp_path / to) in last


# Experts as w1, w2, w3


def tinker(tensors):
    """One 3-D tensor for each projection, the head as unembed_tokens."""
    stacks, made = {}, {}
    for name, x in tensors.items():
        head, found, tail = name.partition(".experts.")
        if found:
            expert, leaf, rest = tail.split(".", 2)
            leaf = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[leaf]
            stacks.setdefault(f"{head}.experts.{leaf}.{rest}", {})[int(expert)] = x
        else:
            made[name] = x
    return made | {n: np.stack([x[e] for e in sorted(x)]) for n, x in stacks.items()}


@pytest.mark.parametrize("to", [V5, "vllm", "nemo"])
def test_tinker_s_experts(to, tmp_path):
    src, base = golden("qwen3_moe__gud")
    mine = rewrite(src, tmp_path / "src", tinker, target_modules="all-linear")
    assert regraft.inspect(mine, model=base).adapters[0].dialect == "tinker"
    regraft.convert(mine, tmp_path / "made", to=to, model=base)
    assert same(src, tmp_path / "made", base)


def test_tinker_s_shared_factors(tmp_path):
    src, base = golden("qwen3_moe__gud")

    def share(tensors):
        made = tinker(tensors)
        return {
            n: x[:1] if n.endswith(("w1.lora_A.weight", "w2.lora_B.weight")) else x
            for n, x in made.items()
        }

    def repeat(tensors):
        first = {n: tensors[n] for n in tensors}
        for n in tensors:
            if (
                n.endswith(("gate_proj.lora_A.weight", "down_proj.lora_B.weight"))
                and ".experts." in n
            ):
                head, _, tail = n.partition(".experts.")
                first[n] = tensors[f"{head}.experts.0.{tail.partition('.')[2]}"]
        return first

    mine = rewrite(src, tmp_path / "src", share, target_modules="all-linear")
    wanted = rewrite(src, tmp_path / "wanted", repeat)
    regraft.convert(mine, tmp_path / "made", to=V5, model=base)
    assert same(wanted, tmp_path / "made", base)


def test_tinker_s_head_is_the_head(tmp_path):
    src, base = golden("mixtral__gud_attn")
    a, b = np.ones((4, 16), np.float32), np.ones((64, 4), np.float32)
    hidden = json.loads((base / "config.json").read_text())
    a = np.ones((config_of(src)["r"], hidden["hidden_size"]), np.float32)
    b = np.ones((hidden["vocab_size"], len(a)), np.float32)

    def head(tensors):
        names = f"{PREFIX}model.unembed_tokens.lora_"
        return tensors | {f"{names}A.weight": a, f"{names}B.weight": b}

    mine = rewrite(src, tmp_path / "src", head, target_modules="all-linear")
    regraft.convert(mine, tmp_path / "made", to=V5, model=base)
    assert f"{PREFIX}lm_head.lora_A.weight" in tensors_of(tmp_path / "made")


# Megatron-Bridge, SkyRL


def test_megatron_s_export_takes_alpha_from_the_run(tmp_path):
    src, base = golden("qwen3_moe__gud")
    folder = tmp_path / "src"
    folder.mkdir()
    bare = {n.removeprefix(PREFIX): x for n, x in tensors_of(src).items()}
    write_tensors(folder / "adapter_model.safetensors", bare, {})
    with pytest.raises(regraft.BadInputError, match=r"run_config\.json"):
        regraft.convert(folder, tmp_path / "made", to=V5, model=base)
    config = config_of(src)
    run = {"peft": {"dim": config["r"], "alpha": config["lora_alpha"]}}
    (folder / "run_config.json").write_text(json.dumps(run))
    regraft.convert(folder, tmp_path / "made", to=V5, model=base)
    assert same(src, tmp_path / "made", base)


def test_skyrl_s_experts_are_refused(tmp_path):
    src, base = golden("qwen3_moe__gud")

    def cut(tensors):
        return {n.removeprefix(PREFIX).removesuffix(".weight"): x for n, x in tensors.items()}

    mine = rewrite(src, tmp_path / "src", cut)
    with pytest.raises(regraft.RefusedError, match="SkyRL"):
        regraft.convert(mine, tmp_path / "made", to=V5, model=base)
