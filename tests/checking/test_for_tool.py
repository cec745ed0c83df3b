"""`regraft check --for TOOL`: what servers do with an adapter as it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dialects.test_tools import ATTENTION, MLP, make_adapter, make_base

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.schema import schema_of

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(case):
    return GOLDEN / "cases" / case, GOLDEN / "bases" / case.partition("__")[0]


def rewrite(src, dst, change=lambda tensors: tensors, **fields):
    tensors = {n: np.array(x) for n, x in open_tensors(src / "adapter_model.safetensors").items()}
    dst.mkdir()
    write_tensors(dst / "adapter_model.safetensors", change(tensors), {"format": "pt"})
    config = json.loads((src / "adapter_config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (dst / "adapter_config.json").write_text(json.dumps(config))
    return dst


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    src, base = golden("qwen3_moe__gud")
    made = tmp_path_factory.mktemp("packed") / "made"
    regraft.convert(src, made, to="transformers-v5", model=base)
    return made


def outcomes(check):
    return {target.outcome for target in check.targets}


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["vllm", "sglang", "unsloth", "nemo"])
def test_what_is_converted_for_a_tool_is_healthy_without_the_base(tmp_path, tool):
    told = {}
    for case in sorted((GOLDEN / "cases").iterdir()):
        made = tmp_path / case.name
        try:
            regraft.convert(case, made, to=tool)
        except regraft.RegraftError:
            continue
        found = regraft.check(made, tool=tool)
        told[case.name] = (found.verdict, found.why)
    assert len(told) > 10
    assert {name: said for name, said in told.items() if said[0] != "full"} == {}


@pytest.mark.parametrize(
    "case", ["mixtral__gud_attn", "gpt_oss__params_attn", "qwen3_vl_moe__params"]
)
def test_the_adapter_tells_the_family_of_its_base(case):
    src, base = golden(case)
    alone, over = regraft.check(src, tool="vllm"), regraft.check(src, tool="vllm", model=base)
    assert (
        (alone.verdict, outcomes(alone)) == (over.verdict, outcomes(over)) == ("full", {"loaded"})
    )


def test_what_hangs_on_a_base_that_nothing_tells_is_not_known(tmp_path, capsys):
    src = rewrite(golden("gpt_oss__params_attn")[0], tmp_path / "src", auto_mapping=None)
    found = regraft.check(src, tool="vllm")
    assert (found.verdict, found.healthy, found.is_unproven) == ("unknown", False, True)
    assert outcomes(found) == {"loaded", "unknown"} and found.fix is None
    assert any("give it with --model" in note for note in found.notes)
    assert main(["check", str(src), "--for", "vllm"]) == 4
    assert "Not known" in capsys.readouterr().out
    assert main(["check", str(src), "--for", "vllm", "--accept-unproven"]) == 0
    page = tmp_path / "page.html"
    assert main(["check", str(src), "--for", "vllm", "--html", str(page)]) == 4
    assert regraft.check(src, tool="vllm", model=golden("gpt_oss__x")[1]).healthy


def test_adapters_of_another_family_are_judged_without_the_base(tmp_path, capsys):
    for case in ("mixtral__gud_attn", "qwen3_moe__gud", "mixtral__dora"):
        shutil.copytree(golden(case)[0], tmp_path / "all" / case)
    base = golden("qwen3_moe__gud")[1]
    words = ["check", str(tmp_path / "all"), "--for", "vllm", "--model", str(base), "--json"]
    assert main(words) == 4
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    said = {line["name"]: (line["verdict"], line["why"]) for line in lines if "name" in line}
    assert said["qwen3_moe__gud"] == ("healthy", "")
    assert said["mixtral__gud_attn"][0] == "healthy"
    assert said["mixtral__dora"][0] == "not healthy"
    for case in ("mixtral__gud_attn", "mixtral__dora"):
        assert "without --model: its base is mixtral" in said[case][1]
    alone = regraft.check(golden("mixtral__gud_attn")[0], tool="vllm", model=base)
    assert not alone.healthy and not alone.is_unproven
    assert any("its base is mixtral" in note for note in alone.notes)


def test_a_fix_that_is_refused_is_not_offered(capsys):
    src = golden("mixtral__dora")[0]
    assert main(["check", str(src), "--for", "vllm"]) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "Fix:" not in said and "No fix is known" in said
    assert "--via dense" in said and said.endswith("exact, a whole model")


@pytest.mark.parametrize(
    ("case", "tool", "verdict", "reason"),
    [
        ("qwen3_moe__gud", "vllm", "full", ""),
        ("qwen3_moe__gud", "sglang", "full", ""),
        ("mixtral__gud_attn", "vllm", "full", ""),
        ("mixtral__only_up", "vllm", "fails", "every expert and all three projections"),
        ("mixtral__rslora", "vllm", "full", ""),
        ("mixtral__rslora", "sglang", "fails", "no buffers (NotImplementedError)"),
        ("mixtral__dora", "vllm", "fails", "DoRA"),
        ("mixtral__dora", "sglang", "fails", "DoRA"),
        ("mixtral__router", "sglang", "fails", "no buffers"),
        ("gpt_oss__params_attn", "vllm", "full", ""),
        ("qwen3_vl_moe__params", "vllm", "full", ""),
        ("mixtral__mts_head", "vllm", "fails", "modules_to_save"),
    ],
)
def test_a_verdict_for_each(case, tool, verdict, reason, tmp_path):
    src, base = golden(case)
    check = regraft.check(src, tool=tool, model=base)
    assert check.verdict == verdict, check
    told = " ".join([*check.failures, *(t.reason for t in check.targets)])
    assert reason in told
    assert check.healthy == (verdict == "full")
    if verdict == "full":
        assert check.fix is None
    else:
        assert (check.fix is None) != (check.no_fix is None)


@pytest.mark.parametrize(
    ("case", "verdict", "reason"),
    [
        ("rslora", "wrong-scale", "does not read use_rslora"),
        ("patterns_projection", "fails", "its buffers have the config's"),
        ("embedding", "partial", "LoRA factors only"),
    ],
)
def test_sglang_where_target_modules_has_its_names(case, verdict, reason, tmp_path):
    src, base = golden(f"mixtral__{case}")
    named = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    check = regraft.check(
        rewrite(src, tmp_path / "src", target_modules=named), tool="sglang", model=base
    )
    assert check.verdict == verdict
    assert reason in " ".join(target.reason for target in check.targets)


@pytest.mark.parametrize(
    ("tool", "verdict", "reason"),
    [
        ("vllm", "fails", "--enable-mixed-moe-lora-format"),
        ("sglang", "fails", "match no target"),
        ("unsloth", "full", ""),
    ],
)
def test_packed_experts(tool, verdict, reason, packed):
    check = regraft.check(packed, tool=tool, model=golden("qwen3_moe__gud")[1])
    assert check.verdict == verdict
    assert reason in " ".join(t.reason for t in check.targets)


def test_vllm_takes_the_scale_from_the_config(tmp_path):
    src, base = golden("mixtral__gud_attn")
    mine = rewrite(src, tmp_path / "src", r=2)
    assert regraft.check(mine, tool="vllm", model=base).verdict == "wrong-scale"


def test_vllm_passes_mixtral_s_new_names_over(tmp_path):
    src, base = golden("mixtral__gud_attn")

    def rename(tensors):
        return {n.replace("block_sparse_moe", "mlp"): x for n, x in tensors.items()}

    check = regraft.check(rewrite(src, tmp_path / "src", rename), tool="vllm", model=base)
    assert check.verdict == "partial" and "ignored" in outcomes(check)


def test_vllm_reads_grouped_columns_as_peft_s(tmp_path):
    src, base = golden("gpt_oss__params_attn")
    mine = rewrite(src, tmp_path / "src", lora_B_layout="grouped_by_expert")
    check = regraft.check(mine, tool="vllm", model=base)
    assert check.verdict == "wrong-scale" and "wrong-values" in outcomes(check)
    assert check.fix is not None and "--to vllm" in check.fix


def test_a_q_without_v_fails_in_sglang(tmp_path):
    src, base = golden("mixtral__gud_attn")

    def drop(tensors):
        return {n: x for n, x in tensors.items() if "v_proj" not in n}

    check = regraft.check(rewrite(src, tmp_path / "src", drop), tool="sglang", model=base)
    assert check.verdict == "fails" and "KeyError" in " ".join(t.reason for t in check.targets)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "case", ["mixtral__only_gate", "mixtral__rslora", "mixtral__patterns_expert"]
)
def test_what_is_written_for_a_tool_loads_there(case, to, tmp_path):
    src, base = golden(case)
    regraft.convert(src, tmp_path / "made", to=to, model=base)
    assert regraft.check(tmp_path / "made", tool=to, model=base).verdict == "full"


def test_the_command(packed, capsys):
    base = golden("qwen3_moe__gud")[1]
    assert main(["check", str(packed), "--for", "vllm@0.33.0", "--model", str(base), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["tool"] == "vllm" and told["version"] == "0.33.0" and told["verdict"] == "fails"
    assert set(told["targets"][0]) == {"key", "outcome", "reason"}
    assert set(told) - {"schema_version"} <= set(
        schema_of("check")["$defs"]["ToolCheck"]["properties"]
    )
    assert told["fix"].startswith("regraft convert")
    assert main(["check", str(packed), "--for", "unsloth", "--model", str(base)]) == 0
    assert "Full effect" in capsys.readouterr().out
    assert main(["check", str(packed), "--for", "sglang@9.9"]) == 4
    assert "was not looked at" in capsys.readouterr().out
    assert main(["check", str(packed), "--for", "nothing"]) == 2
    assert main(["check", str(packed / "gone"), "--for", "vllm"]) == 1


# NeMo Automodel


@pytest.mark.parametrize("case", ["qwen3_moe__gud", "mixtral__patterns_expert", "mixtral__rslora"])
def test_nemo_loads_what_is_written_for_it(case, tmp_path):
    src, base = golden(case)
    regraft.convert(src, tmp_path / "made", to="nemo", model=base)
    check = regraft.check(tmp_path / "made", tool="nemo", model=base)
    assert check.verdict == "full", check


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"paramwrapper_layout": "peft-7"}, "fails", "does not know"),
        ({"paramwrapper_layout": ["peft-0.18"]}, "fails", "does not know"),
        ({"paramwrapper_layout": "peft-0.18"}, "fails", "the shapes say otherwise"),
        (None, "fails", "there is no automodel_peft_config.json"),
    ],
)
def test_nemo_s_stamp_counts(change, verdict, reason, tmp_path):
    src, base = golden("qwen3_moe__gud")
    regraft.convert(src, tmp_path / "made", to="nemo", model=base)
    file = tmp_path / "made/automodel_peft_config.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    check = regraft.check(tmp_path / "made", tool="nemo", model=base)
    assert check.verdict == verdict
    assert reason in " ".join([*check.failures, *(t.reason for t in check.targets)])


@pytest.mark.parametrize(
    ("case", "verdict", "reason"),
    [
        ("qwen3_moe__gud", "wrong-scale", "gate's lora_A for up"),
        ("mixtral__rslora", "wrong-scale", "does not read use_rslora"),
        ("mixtral__patterns_projection", "fails", "its layers have the config's"),
        ("mixtral__only_up", "none", "not every expert"),
    ],
)
def test_nemo_reads_one_rank_one_scale_and_gate_s_factor_for_up(case, verdict, reason, tmp_path):
    src, base = golden(case)

    def rename(tensors):
        plain = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        made = {}
        for name, tensor in tensors.items():
            for old, new in plain.items():
                name = name.replace(f".{old}.", f".{new}.")
            made[name.replace("block_sparse_moe", "mlp")] = tensor
        return made

    mine = rewrite(src, tmp_path / "src", rename)
    (mine / "automodel_peft_config.json").write_text("{}")
    check = regraft.check(mine, tool="nemo", model=base)
    assert check.verdict == verdict, check
    assert reason in " ".join(t.reason for t in check.targets)


def test_nemo_s_alpha_is_whole_where_it_is_zero(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    regraft.convert(
        make_adapter(tmp_path / "lora", ATTENTION, alpha=0.0),
        tmp_path / "made",
        to="nemo",
        model=base,
    )
    alpha = json.loads((tmp_path / "made/adapter_config.json").read_text())["lora_alpha"]
    assert alpha == 0 and isinstance(alpha, int)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


def without(*parts):
    return lambda tensors: {n: x for n, x in tensors.items() if not any(p in n for p in parts)}


def as_they_are(tensors):
    return tensors


NAMED = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize(
    ("tool", "change", "fields", "verdict", "reason"),
    [
        ("vllm", as_they_are, {"bias": "all"}, "fails", "bias is not none"),
        ("vllm", as_they_are, {"init_lora_weights": "pissa"}, "fails", "init_lora_weights"),
        ("vllm", without("q_proj.lora_B"), {}, "fails", "no other half"),
        ("vllm", renamed("layers.0.self_attn.o_proj", "unembed_tokens"), {}, "fails", "lm_head"),
        ("vllm", renamed("layers.0.", "layers.9."), {}, "partial", "no module of the model"),
        ("vllm", renamed("model.layers", "model.language_model.layers"), {}, "none", "no LoRA is"),
        ("sglang", as_they_are, {"lora_alpha": ...}, "fails", "has no lora_alpha"),
        ("sglang", as_they_are, {"target_modules": ".*proj"}, "fails", "an expression"),
        ("sglang", as_they_are, {"peft_type": "LOHA"}, "fails", "it has LoRA only"),
        ("sglang", without("o_proj.lora_A"), {}, "fails", "no other half"),
        ("sglang", without("q_proj"), {}, "fails", "q_proj is missing"),
        ("sglang", without("gate_proj"), {}, "fails", "gate_proj is missing"),
        ("sglang", renamed("layers.1.", "layers.9."), {}, "fails", "no such layer"),
    ],
)
def test_faults_of_a_dense_adapter(tool, change, fields, verdict, reason, tmp_path):
    base = make_base(tmp_path / "base", "llama")
    src = make_adapter(tmp_path / "lora", ATTENTION | MLP)
    mine = rewrite(src, tmp_path / "src", change, **({"target_modules": NAMED} | fields))
    check = regraft.check(mine, tool=tool, model=base)
    assert check.verdict == verdict, check
    assert reason in " ".join([*check.failures, *(t.reason for t in check.targets)])


@pytest.mark.parametrize(
    ("extra", "verdict"),
    [
        (("score.weight",), "full"),
        (("classifier.weight", "classifier.bias"), "full"),
        (("underscore.weight",), "fails"),
        (("a.weight", "score.weight"), "fails"),
        (("classifier.weight", "lm_head.weight"), "fails"),
    ],
)
def test_vllm_takes_weights_and_biases_of_classifiers_heads_only(tmp_path, extra, verdict):
    base = make_base(tmp_path / "base", "llama")
    src = make_adapter(tmp_path / "lora", ATTENTION | MLP)
    whole = {f"base_model.model.{name}": np.ones((2, 2), np.float32) for name in extra}
    mine = rewrite(src, tmp_path / "src", lambda t: t | whole, target_modules=NAMED)
    check = regraft.check(mine, tool="vllm", model=base)
    assert check.verdict == verdict, check
    told = [f for f in check.failures if "no key that it knows" in f]
    assert len(told) == (verdict == "fails")


def test_what_is_converted_for_vllm_with_a_head_and_its_bias_is_healthy(tmp_path):
    """`convert --to vllm` and `check --for vllm` agree about a classifier's bias."""
    base = make_base(tmp_path / "base", "llama")
    src = make_adapter(tmp_path / "lora", ATTENTION)
    head = {"classifier.weight": np.ones((2, 16)), "classifier.bias": np.ones(2)}
    whole = {f"base_model.model.{name}": x.astype(np.float32) for name, x in head.items()}
    fields = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    mine = rewrite(src, tmp_path / "src", lambda t: t | whole, **fields)
    regraft.convert(mine, tmp_path / "made", to="vllm", model=base)
    assert regraft.check(tmp_path / "made", tool="vllm", model=base).verdict == "full"
