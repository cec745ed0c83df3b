"""Loads into one live model wait for each other."""

import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import regraft  # noqa: E402
from regraft.planning.model import load_model  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "bases" / "mixtral"
ADAPTER = next(p.parent for p in sorted(GOLDEN.rglob("mixtral__gate_up/**/adapter_config.json")))


def build():
    torch.manual_seed(0)
    fields = dict(load_model(BASE).data)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    return transformers.MixtralForCausalLM(config).eval()


def test_eight_loads_into_one_model():
    tokens = torch.arange(8)[None]
    alone = regraft.load_adapter(build(), ADAPTER, adapter_name="a0")
    with torch.no_grad():
        want = alone(tokens).logits
    model = regraft.load_adapter(build(), ADAPTER, adapter_name="first")
    start, errors = threading.Barrier(8), []

    def load(number):
        start.wait()
        try:
            regraft.load_adapter(model, ADAPTER, adapter_name=f"a{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(8):
        model.set_adapter(f"a{number}")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, want, rtol=0, atol=0)
