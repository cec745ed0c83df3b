"""Scales beyond a dtype, NaN and infinity, mixed dtypes, configs of wrong types, and other tools' forms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.adapters.form import cast_down, rescale
from regraft.cli.output import Output
from regraft.cli.run import run
from regraft.cli.words import show_findings
from regraft.dialects.peft.config_check import check_fields
from regraft.errors import Finding
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = GOLDEN / "bases/mixtral"
V4, V5 = "transformers-v4", "transformers-v5"
EXPERT = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.{}.lora_{}.weight"


def adapter(folder, change=None, case="mixtral__gud_attn", **fields):
    """A golden adapter with other fields in its config, and its tensors as ``change`` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN / "cases" / case / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict(open_tensors(GOLDEN / "cases" / case / "adapter_model.safetensors"))
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    if change:
        change(tensors)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def read(folder):
    return dict(open_tensors(folder / "adapter_model.safetensors"))


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].tobytes() == other[n].tobytes() for n in one
    )


def there_and_back(src, tmp_path):
    regraft.convert(src, tmp_path / "new", to=V5, model=BASE, verify=True)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=BASE)
    assert same(read(tmp_path / "back"), read(src))
    before, after = (
        json.loads((f / "adapter_config.json").read_text()) for f in (src, tmp_path / "back")
    )
    assert before == after


# Scales


def test_a_common_scale_between_is_found_where_none_of_the_parts_will_do(tmp_path):
    src = adapter(tmp_path / "src", alpha_pattern={"w1": 1e-40})
    there_and_back(src, tmp_path)
    made = read(tmp_path / "new")
    b = made["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"]
    assert np.isfinite(b).all()
    assert (np.abs(b[b != 0]) > np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("alpha", [1e300, 1e308, 1e-300])
def test_scales_too_far_apart_are_refused(alpha, tmp_path):
    src = adapter(tmp_path / "src", alpha_pattern={"w1": alpha})
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=BASE)
    finding = caught.value.findings[0]
    assert finding.code == "not-representable"
    assert finding.key.endswith("gate_up_proj") and finding.where == str(src)
    assert not (tmp_path / "new").exists()


def test_an_alpha_that_cannot_be_doubled_is_folded_in(tmp_path):
    src = adapter(tmp_path / "src", lora_alpha=1e308)
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=BASE)
    assert caught.value.findings[0].code == "not-representable"


@pytest.mark.parametrize("ratio", [3e38, 1e-44, 2.0**-140])
def test_rescaling_refuses_what_float32_cannot_hold(ratio):
    with pytest.raises(regraft.RefusedError):
        rescale(np.float32([1.5, 1e3, 1e-3, 0]), ratio)


def test_half_precision_is_widened_where_a_power_of_two_overflows_it():
    made, exact = rescale(np.float16([60000.0]), 2.0)
    assert made.dtype == np.float32 and made[0] == 120000 and not exact


def test_narrowing_refuses_to_make_infinities():
    assert np.isnan(cast_down(np.array([np.nan]), np.dtype(np.float16))).all()
    with pytest.raises(regraft.RefusedError):
        cast_down(np.array([1e6]), np.dtype(np.float16))


# NaN and infinity


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_one_projection_is_not_given_to_its_sibling(value, tmp_path):
    def spoil(tensors):
        tensors[EXPERT.format(0, "w1", "A")][0, 0] = value

    src = adapter(tmp_path / "src", spoil)
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=BASE)
    assert [f.code for f in caught.value.findings] == ["not-finite"]


@pytest.mark.parametrize("name", [("w2", "A"), ("w2", "B"), ("w1", "B")])
def test_nan_that_stays_where_it_is_is_kept(name, tmp_path):
    def spoil(tensors):
        tensors[EXPERT.format(0, *name)][0, 0] = np.nan

    src = adapter(tmp_path / "src", spoil)
    regraft.convert(src, tmp_path / "new", to=V5, model=BASE)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=BASE)
    assert same(read(tmp_path / "back"), read(src))


def test_singular_values_of_nan_are_refused(tmp_path):
    def spoil(tensors):
        tensors[EXPERT.format(0, "w2", "A")][0, 0] = np.nan

    src = adapter(tmp_path / "src", spoil)
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=BASE, via="svd:2")
    assert caught.value.findings[0].code == "not-finite"


# Mixed dtypes


def test_dtypes_mixed_among_experts_come_back_bit_for_bit(tmp_path):
    def mix(tensors):
        for name in (EXPERT.format(0, "w1", "A"), EXPERT.format(1, "w3", "B")):
            tensors[name] = tensors[name].astype(np.float16)

    there_and_back(adapter(tmp_path / "src", mix), tmp_path)


def test_a_ratio_that_rounds_comes_back_bit_for_bit(tmp_path):
    def narrowed(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(np.float16)

    there_and_back(adapter(tmp_path / "src", narrowed, alpha_pattern={"w1": 7}), tmp_path)


def edited(folder):
    """Another alpha in a result, as a user may give it one."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))


@pytest.mark.parametrize(
    ("options", "edit"),
    [
        ({"via": "svd:1e-7"}, None),
        ({"via": "svd:1"}, None),
        ({"compact": True}, None),
        ({}, edited),
    ],
    ids=["svd", "svd of a lower rank", "compact", "another alpha"],
)
def test_factors_kept_aside_return_only_where_they_mean_the_same(options, edit, tmp_path):
    alphas = {r"experts\.3\.w1": 7}
    src = adapter(tmp_path / "src", case="mixtral__only_gate", alpha_pattern=alphas)
    regraft.convert(src, tmp_path / "new", to=V5, model=BASE, **options)
    if edit:
        edit(tmp_path / "new")
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=BASE, verify=True)


def test_patterns_count_in_the_order_of_the_file_there_and_back(tmp_path):
    by_hand = {"o_proj": 16, ".*_proj": 4}
    src = adapter(tmp_path / "src", alpha_pattern=by_hand)
    report = regraft.convert(src, tmp_path / "new", to=V5, model=BASE, verify=True)
    alphas = {t.key.split(".")[-2]: t.alpha for t in report.targets if "self_attn" in t.key}
    assert alphas == {"o_proj": 16, "q_proj": 4, "k_proj": 4, "v_proj": 4}
    there_and_back(src, tmp_path / "again")
    back = json.loads((tmp_path / "again/back/adapter_config.json").read_text())
    assert list(back["alpha_pattern"]) == list(by_hand)


# Configs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", 2**31),
        ("lora_alpha", 10**400),
        ("lora_alpha", "8"),
        ("peft_type", ["LORA"]),
        ("peft_type", {}),
        ("rank_pattern", {"w1": 0}),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"w1": float("inf")}),
        ("target_modules", [1]),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", [-1]),
        ("layer_replication", [[1]]),
        ("trainable_token_indices", {"x": "y"}),
        ("auto_mapping", "x"),
        ("use_rslora", "yes"),
        ("bias", "some"),
        ("bias", ["all"]),
        ("fan_in_fan_out", "yes"),
        ("kasa_config", True),
    ],
)
def test_a_field_of_a_wrong_type_is_a_finding_in_every_command(field, value, tmp_path, capsys):
    src = adapter(tmp_path / "src", **{field: value})
    for command in (
        ["inspect", str(src)],
        ["convert", str(src), str(tmp_path / "new"), "--to", V5],
        ["verify", str(src), str(src)],
        ["diff", str(src), str(src)],
        ["explain", str(src), "x", "--to", V5],
    ):
        assert run(command) == 1, command
        assert field in capsys.readouterr().err


def test_all_fields_are_reported_together():
    config = {"peft_type": "HRA", "r": None, "apply_GS": 1, "target_modules": 5}
    assert [f.key for f in check_fields(config, "a.json")] == ["r", "target_modules", "apply_GS"]


@pytest.mark.parametrize(
    ("peft_type", "field", "fields"),
    [
        ("LORA", "layers_to_transform", {"target_modules": "q", "layers_to_transform": []}),
        ("DELORA", "layers_to_transform", {"target_modules": "q", "layers_to_transform": [0]}),
        ("MISS", "layers_pattern", {"target_modules": "q", "layers_pattern": []}),
        ("LOHA", "layers_to_transform", {"target_modules": ["q"], "layers_pattern": "h"}),
        ("LORA", "fan_in_fan_out", {"target_parameters": ["q"], "fan_in_fan_out": True}),
    ],
)
def test_fields_that_peft_takes_not_beside_others(peft_type, field, fields):
    sound = {"r": 1, "alpha": 1, "lora_alpha": 1, "delora_lambda": 1}
    config = {"peft_type": peft_type, **sound, **fields}
    assert [f.key for f in check_fields(config, "a.json")] == [field]


def test_fields_that_only_some_types_keep_apart():
    config = {"peft_type": "IA3", "target_modules": "q", "layers_pattern": "h"}
    assert check_fields(config, "a.json") == []


def test_needed_fields_are_those_of_the_family():
    assert [f.key for f in check_fields({"peft_type": "LOHA"}, "a.json")] == ["r", "alpha"]
    assert check_fields({"peft_type": "OFT", "r": 0}, "a.json") == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"peft_type": ' + "[" * 200 + "]" * 200 + "}", "nested"),
        ('{"peft_type": "\\ud800"}', "surrogate"),
        ('{"r": ' + "9" * 5000 + "}", "thousands of digits"),
    ],
)
def test_json_that_cannot_be_handled_is_a_finding(text, told, tmp_path, capsys):
    src = adapter(tmp_path / "src")
    (src / "adapter_config.json").write_text(text)
    assert run(["inspect", str(src)]) == 1
    assert told in capsys.readouterr().err


# Tensors


def test_a_number_that_no_layer_has_is_a_finding(tmp_path):
    def rename(tensors):
        name = EXPERT.format(0, "w1", "A")
        tensors[name.replace("layers.0", "layers." + "9" * 20)] = tensors.pop(name)

    with pytest.raises(regraft.BadInputError, match="digits"):
        regraft.convert(adapter(tmp_path / "src", rename), tmp_path / "new", to=V5, model=BASE)


@pytest.mark.parametrize(
    "module", ["layers.0.self_attn.o_proj", "layers.0.block_sparse_moe.experts.0.w1"]
)
@pytest.mark.parametrize("letters", ["A", "B", "AB"])
def test_a_factor_of_three_dims_is_a_finding(module, letters, tmp_path):
    def spoil(tensors):
        for letter in letters:
            name = f"base_model.model.model.{module}.lora_{letter}.weight"
            tensors[name] = tensors[name][..., None]

    with pytest.raises(regraft.BadInputError, match="dims"):
        regraft.convert(adapter(tmp_path / "src", spoil), tmp_path / "new", to=V5, model=BASE)


def test_a_family_whose_parts_make_no_delta_is_a_finding(tmp_path, capsys):
    src = adapter(tmp_path / "src", case="mixtral__subset_regex", use_dora=True)
    arguments = ["convert", src, tmp_path / "out", "--to", V4, "--verify", "--model", BASE]
    assert run([*map(str, arguments)]) == 1
    assert "lora_magnitude_vector is missing" in capsys.readouterr().err


def test_a_missing_bias_is_a_finding(tmp_path):
    def drop(tensors):
        del tensors[next(name for name in tensors if name.endswith("lora_B.bias"))]

    src = adapter(tmp_path / "src", drop, case="mixtral__lora_bias")
    with pytest.raises(regraft.BadInputError, match=r"lora_B\.bias is missing"):
        regraft.convert(src, tmp_path / "new", to=V5, model=BASE)


# Other tools' forms


@pytest.mark.parametrize(
    ("name", "shape", "tool"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", (8, 2), "MLX"),
        ("layers.0.attn.q_proj.lora_a.weight", (2, 8), "torchtune"),
        ("layers.0.attention.wq.lora_a.weight", (2, 8), "torchtitan"),
        ("transformer.h.0.attn.qkv.lora_A", (6, 8), "LitGPT"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", (2, 8), "Megatron"),
    ],
)
def test_keys_of_other_tools_are_refused_by_name(name, shape, tool, tmp_path):
    def only(tensors):
        tensors.clear()
        tensors[name] = np.ones(shape, np.float32)

    with pytest.raises(regraft.RefusedError, match=tool):
        regraft.convert(adapter(tmp_path / "src", only), tmp_path / "new", to=V5, model=BASE)


# Files beside


def test_weights_and_the_state_of_a_training_stay_behind(tmp_path):
    src = adapter(tmp_path / "src")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"):
        (src / name).write_bytes(b"x")
    write_tensors(src / "model.safetensors", {"a": np.zeros(1, np.float32)}, {"format": "pt"})
    shutil.copy(src / "model.safetensors", src / "vit.weights")
    (src / "README.md").write_text("x")
    (src / "training_args.bin").write_bytes(b"x")
    report = regraft.convert(src, tmp_path / "new", to=V5, model=BASE)
    assert report.files == ["README.md", "training_args.bin"]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "README.md",
        "training_args.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    notes = " ".join(report.notes)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"):
        assert name in notes
    assert "model.safetensors" in notes and "vit.weights" in notes and "regraft convert" in notes


def test_a_copy_in_the_same_layout_keeps_everything(tmp_path):
    src = adapter(tmp_path / "src")
    (src / "optimizer.pt").write_bytes(b"x")
    regraft.convert(src, tmp_path / "new", to=V4, model=BASE)
    assert (tmp_path / "new" / "optimizer.pt").exists()


# What is told


def test_findings_are_counted_as_they_are_listed(capsys):
    findings = [Finding("shape", "too long", key=key, fix="x") for key in "ab"]
    findings += [Finding("shape", "too short", key="c", fix="x")]
    show_findings(Output(), "bad input", findings)
    told = capsys.readouterr().err
    assert "3 problems of 2 kinds" in told and "2. c" in told and "3." not in told


def test_keys_that_many_families_have_name_more_than_one(tmp_path):
    report = regraft.convert(
        GOLDEN / "cases/qwen3_moe__gud", tmp_path / "new", to=V5, model=GOLDEN / "bases/qwen3_moe"
    )
    assert "DeepSeek" not in " ".join(report.adapters[0].evidence)
    src = adapter(tmp_path / "src", case="qwen3_moe__gud", auto_mapping=None)
    told = " ".join(regraft.inspect(src).adapters[0].evidence)
    assert "DeepSeek" not in told and "several families" in told and "qwen2_moe" in told


def test_an_inspected_page_does_not_call_an_adapter_sound(tmp_path):
    page = tmp_path / "page.html"
    assert run(["inspect", str(adapter(tmp_path / "src")), "--html", str(page)]) == 0
    assert ">Sound" not in page.read_text()
