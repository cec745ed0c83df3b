"""What the README says, from one end to the other: a genuine adapter is converted, loaded, and converted back."""

import json
from pathlib import Path

import numpy as np
import pytest
from making import same_bits

import regraft
from regraft.storage.safetensors import open_tensors

GOLDEN = Path(__file__).parent / "golden"
ADAPTER = GOLDEN / "cases/mixtral__gud_attn"
BASE = GOLDEN / "bases/mixtral"


def tensors_of(folder):
    return open_tensors(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def test_there_and_back(tmp_path):
    there, back = tmp_path / "v5", tmp_path / "v4"
    report = regraft.convert(ADAPTER, there, to="transformers-v5")
    assert all(target.exact for target in report.targets)
    assert config_of(there) != config_of(ADAPTER)

    regraft.convert(there, back, to="transformers-v4")
    before, after = tensors_of(ADAPTER), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert config_of(back) == config_of(ADAPTER)


def test_stock_peft_loads_the_result(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    peft = pytest.importorskip("peft", minversion="0.19")
    regraft.convert(ADAPTER, tmp_path / "v5", to="transformers-v5")

    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "v5")).eval()

    reference = open_tensors(ADAPTER / "reference.safetensors")
    inputs = {
        name.removeprefix("input."): torch.from_numpy(np.array(value))
        for name, value in reference.items()
        if name.startswith("input.")
    }
    with torch.no_grad():
        output = model(**inputs).logits.numpy()
        with model.disable_adapter():
            without = model(**inputs).logits.numpy()
    np.testing.assert_allclose(output, reference["ref"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(without, reference["ref_base"], rtol=1e-4, atol=1e-5)
    assert np.abs(output - without).max() > 1e-2
