"""The certificate: every conversion has one, and what is wrong has none."""

import json
import shutil

import numpy as np
import pytest
from making import quick_cases
from test_golden import CONVERTED, adapter_of, base_of, read

import regraft
import regraft.converting.adapters
from regraft.checking.certificate import verify_adapters
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"


def converted(name, tmp_path):
    adapter = adapter_of(name, tmp_path)
    regraft.convert(adapter, tmp_path / "out", to=V5, model=base_of(name))
    return adapter, tmp_path / "out"


@pytest.mark.parametrize("name", quick_cases(CONVERTED))
def test_every_conversion_is_certified(name, tmp_path):
    adapter, out = converted(name, tmp_path)
    done = verify_adapters(adapter, out, base_of(name))
    assert done.equal, done.differences
    assert len(done.targets) + done.others > 0
    assert done.error < 1e-6
    back = tmp_path / "back"
    regraft.convert(out, back, to=V4, model=base_of(name))
    assert verify_adapters(out, back, base_of(name)).equal


def spoilt(out, change):
    """A result in which something is changed."""
    tensors, config = read(out)
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    change(tensors, config)
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config))


def swap_experts(tensors, config):
    """Two experts change places: every norm, sum and shape stays."""
    for name, tensor in tensors.items():
        if "experts" not in name:
            continue
        rank = config["r"]
        for key, value in (config.get("rank_pattern") or {}).items():
            rank = value if key.replace("\\", "") in ("mlp.experts.down_proj",) else rank
        if name.endswith("lora_A.weight"):
            count = 4
            shaped = tensor.reshape(count, len(tensor) // count, -1)
            tensors[name] = np.concatenate([shaped[1:2], shaped[:1], shaped[2:]]).reshape(
                tensor.shape
            )
        else:
            shaped = tensor.reshape(len(tensor), -1, 4)
            tensors[name] = shaped[:, :, [1, 0, 2, 3]].reshape(tensor.shape)


def turn_gate_and_up(tensors, config):
    name = next(n for n in tensors if n.endswith("experts.base_layer.lora_B.weight"))
    half = len(tensors[name]) // 2
    tensors[name] = np.concatenate([tensors[name][half:], tensors[name][:half]])


def double_alpha(tensors, config):
    config["lora_alpha"] *= 2


def lose_one(tensors, config):
    for name in [n for n in tensors if "layers.0.self_attn.q_proj" in n]:
        del tensors[name]


def a_bit(tensors, config):
    name = next(n for n in tensors if "q_proj.lora_B" in n)
    tensors[name][0, 0] += 1e-3 * np.abs(tensors[name]).max()


@pytest.mark.parametrize(
    "change",
    [swap_experts, turn_gate_and_up, double_alpha, lose_one, a_bit],
    ids=lambda c: c.__name__,
)
def test_what_is_wrong_is_found(change, tmp_path, capsys):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    before = read(out)[0]
    norms = {n: float(np.linalg.norm(t)) for n, t in before.items()}
    spoilt(out, change)
    after = read(out)[0]
    if change is swap_experts:
        assert {n: float(np.linalg.norm(t)) for n, t in after.items()} == pytest.approx(norms)
    arguments = ["verify", str(adapter), str(out), "--model", str(base_of(name))]
    assert main([*arguments, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert not told["equal"]
    assert told["differences"]
    assert main(arguments) == 4
    assert "Not equal" in capsys.readouterr().out


def test_equal_adapters_exit_with_zero(tmp_path, capsys):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    assert main(["verify", str(adapter), str(out), "--model", str(base_of(name)), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"]
    assert told["error"] < 1e-6
    assert {t["matrices"] for t in told["targets"]} == {1, 4}


def test_convert_can_verify_before_it_writes(tmp_path, monkeypatch):
    name = "mixtral__gud_attn"
    adapter = adapter_of(name, tmp_path)
    report = regraft.convert(adapter, tmp_path / "out", to=V5, model=base_of(name), verify=True)
    assert report.adapters[0].verified
    shutil.rmtree(tmp_path / "out")
    real = regraft.converting.adapters.convert_adapter

    def wrong(*given, **more):
        result = real(*given, **more)
        result.config["lora_alpha"] *= 2
        return result

    monkeypatch.setattr(regraft.converting.adapters, "convert_adapter", wrong)
    with pytest.raises(regraft.NotEqualError) as caught:
        regraft.convert(adapter, tmp_path / "out", to=V5, model=base_of(name), verify=True)
    assert {finding.code for finding in caught.value.findings} == {"differs"}
    assert not (tmp_path / "out").exists()


def biased(name, tmp_path):
    """An adapter with lora_bias on the attention, whose modules have no bias."""
    adapter = adapter_of(name, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_bias"] = True
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = open_tensors(adapter / "adapter_model.safetensors")
    made = {key: tensor for key, tensor in tensors.items() if "self_attn" in key}
    random = np.random.default_rng(3)
    for key, tensor in list(made.items()):
        if key.endswith("lora_B.weight"):
            bias = random.standard_normal(len(tensor)).astype(np.float32)
            made[f"{key.removesuffix('weight')}bias"] = bias
    write_tensors(adapter / "adapter_model.safetensors", made, {"format": "pt"})
    return adapter


@pytest.mark.parametrize("with_base", [True, False])
def test_biases_that_are_added_are_compared_without_the_base_and_where_it_has_none(
    with_base, tmp_path, capsys
):
    adapter, out = biased("mixtral__gud_attn", tmp_path), tmp_path / "out"
    regraft.convert(adapter, out, to="transformers-v5")
    model = ["--model", str(base_of("mixtral__gud_attn"))] if with_base else []
    arguments = ["verify", str(adapter), str(out), *model, "--json"]
    assert main(arguments) == 0
    capsys.readouterr()
    tensors = {k: np.array(t) for k, t in open_tensors(out / "adapter_model.safetensors").items()}
    key = next(key for key in tensors if key.endswith("k_proj.lora_B.bias"))
    tensors[key] = tensors[key][::-1].copy()
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    assert main(arguments) == 4
    (found,) = json.loads(capsys.readouterr().out)["differences"]
    assert found["key"].endswith("k_proj.weight")
    assert "bias" in found["message"]
