"""Merging an adapter into its base: the new base alone gives what base and adapter gave."""

import json

import ml_dtypes
import numpy as np
import pytest
from test_golden import GOLDEN, INDEX, adapter_of, base_of, outputs

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
V5 = "transformers-v5"


@pytest.mark.parametrize(
    "name",
    [
        "mixtral__gud_attn",
        "mixtral__dora",
        "mixtral__ia3_attn",
        "mixtral__bias_all",
        "mixtral__mts_head",
        "mixtral__trainable_tokens",
        "gpt_oss__params_attn",
        "jamba__all_linear_bias",
        "qwen2_moe__shared_only",
        "deepseek_v3__patterns_projection",
    ],
)
def test_the_merged_base_gives_the_outputs(name, tmp_path):
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    report = regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True)
    assert {target.rung for target in report.adapters[0].targets} <= {"merged"}
    tensors = open_tensors(GOLDEN / "cases" / name / "reference.safetensors")
    inputs = {k[6:]: torch.tensor(v) for k, v in tensors.items() if k.startswith("input.")}
    cls = getattr(transformers, INDEX[name]["model_class"])
    model = cls.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32)
    want, without = torch.tensor(tensors["ref"]), torch.tensor(tensors["ref_base"])
    got = outputs(model, inputs)
    effect = (want - without).abs().max()
    assert (got - want).abs().max() < max(1e-4, 1e-3 * effect)
    assert effect > 1e-2


def test_merging_takes_a_base_with_weights(tmp_path, capsys):
    adapter = adapter_of("mixtral__gud_attn", tmp_path)
    arguments = ["convert", str(adapter), str(tmp_path / "out"), "--to", V5, "--merge", "--json"]
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["error"]["findings"][0]["code"] == "option"
    assert not (tmp_path / "out").exists()


def test_without_a_base_the_one_that_the_adapter_names_is_told(tmp_path):
    adapter = adapter_of("mixtral__gud_attn", tmp_path)
    base, file = GOLDEN / "bases/mixtral", adapter / "adapter_config.json"
    named = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(named))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, merge=True)
    assert f"--model (the adapter names {base})" in caught.value.findings[0].fix


def test_where_it_may_not_be_written_is_told_before_anything_is_opened(tmp_path, monkeypatch):
    base, adapter = GOLDEN / "bases/mixtral", adapter_of("mixtral__gud_attn", tmp_path)
    monkeypatch.setattr("regraft.merging.merge.open_base", lambda *_: pytest.fail("opened"))
    with pytest.raises(regraft.BadInputError, match="the one that is read"):
        regraft.merge(base, [adapter], base)
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.merge(base, [(adapter, float("nan")), adapter], tmp_path / "out")
    (finding,) = caught.value.findings
    assert (finding.where, finding.code) == (str(adapter), "option")


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path):
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    config |= {"token_dim": 16, "num_transformer_submodules": 1}
    (prompt / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"prompt_embeddings": np.ones((2, 16), np.float32)}
    write_tensors(prompt / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(prompt, tmp_path / "out", to=V5, model=base_of("mixtral__dora"), merge=True)
    assert caught.value.findings
    assert not (tmp_path / "out").exists()


def test_tied_weights_that_would_come_apart_are_refused(tmp_path):
    """An adapter of the input embeddings alone does not change the output, whose tensor would be the same one."""
    adapter, base = adapter_of("mixtral__embedding", tmp_path), tmp_path / "base"
    tensors = dict(open_tensors(base_of("mixtral__embedding") / "model.safetensors"))
    del tensors["lm_head.weight"]
    base.mkdir()
    write_tensors(base / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((base_of("mixtral__embedding") / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(regraft.RefusedError, match="is tied to") as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True)
    assert caught.value.findings[0].key == "model.embed_tokens.weight"
    assert not (tmp_path / "out").exists()
    regraft.merge(base, [adapter], tmp_path / "merged")
    regraft.convert(tmp_path / "merged", tmp_path / "out", to=V5)
    assert "lm_head.weight" in open_tensors(tmp_path / "out" / "model.safetensors")


def test_a_dry_run_merges_into_the_layout_as_well(tmp_path):
    adapter, base = adapter_of("mixtral__gud_attn", tmp_path), base_of("mixtral__gud_attn")
    found = [
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True, dry_run=dry)
        for dry in (True, False)
    ]
    targets = [[target.key for target in report.adapters[0].targets] for report in found]
    assert targets[0] == targets[1] and any("gate_up_proj" in key for key in targets[0])
    assert [report.checkpoint.target_layout for report in found] == [V5, V5]


def test_a_bias_for_modules_that_have_none_is_refused(tmp_path):
    """The model would not read it, and PEFT refuses it, too."""
    adapter, base = adapter_of("mixtral__lora_bias", tmp_path), base_of("mixtral__lora_bias")
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True)
    assert {finding.code for finding in caught.value.findings} == {"no-image"}
    assert any("experts.0.w1.bias" in finding.key for finding in caught.value.findings)
    assert not (tmp_path / "out").exists()


def test_the_command_says_that_it_merged_and_how_much_changed(tmp_path, capsys):
    adapter, base = adapter_of("mixtral__gud_attn", tmp_path), base_of("mixtral__gud_attn")
    out = tmp_path / "out"
    arguments = ["convert", str(adapter), str(out), "--to", V5, "--merge", "--model", str(base)]
    assert main(arguments) == 0
    words = capsys.readouterr().out
    plain = tmp_path / "plain"
    regraft.convert(base, plain, to=V5)
    before, after = (dict(open_tensors(f / "model.safetensors")) for f in (plain, out))
    changed = sum(before[name].tobytes() != after[name].tobytes() for name in before)
    assert f"adapter: added to {changed} tensors, times 1" in words
    assert f"{len(after)} out, " in words
    assert f"; {changed} tensors merged, each rounded once" in words
    assert "bit for bit" not in words


def quantised_base(folder, suffixes):
    """The Mixtral that the adapters are for, with its matrices in float8."""
    tensors = dict(open_tensors(base_of("mixtral__dora") / "model.safetensors"))
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and any(part in name for part in suffixes):
            tensors[name] = tensor.astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = np.full((1, 1), 2, np.float32)
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((base_of("mixtral__dora") / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**config, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("suffixes", [("self_attn",), ("experts",)])
def test_nothing_is_merged_into_a_quantised_base(tmp_path, suffixes):
    adapter = adapter_of("mixtral__gud_attn", tmp_path)
    base = quantised_base(tmp_path / "base", suffixes)
    with pytest.raises(regraft.RefusedError, match="quantised with FP8") as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True)
    assert {finding.code for finding in caught.value.findings} == {"no-image"}
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_tells_no_numbers(tmp_path):
    adapter = adapter_of("mixtral__dora", tmp_path)
    base = quantised_base(tmp_path / "base", ("self_attn",))
    with pytest.raises(regraft.RegraftError, match="quantised") as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base, merge=True)
    assert not (tmp_path / "out").exists()
    assert caught.value.findings
