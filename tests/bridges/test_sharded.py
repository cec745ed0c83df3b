"""Adapters in models that are spread over processes, here over one."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")

from golden_models import base_model, case_folder, is_adapted, outputs, two_adapters  # noqa: E402
from holders import process_group  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import regraft  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]

CASE = "mixtral__gud_attn"


@pytest.fixture
def processes():
    return process_group()


def data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def sharded_1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=device)


def sharded_2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("spread", "name"),
    [
        (data_parallel, CASE),
        (sharded_1, "mixtral__ia3_attn"),
        (sharded_2, CASE),
    ],
)
def test_a_spread_model_is_adapted(spread, name, processes):
    holder = spread(base_model(name))
    loaded = regraft.load_adapter(holder, case_folder(name))
    assert spread is sharded_2 or loaded is holder
    assert is_adapted(loaded, name)


def test_a_lora_in_a_model_that_is_flattened(processes, tmp_path):
    for file in case_folder(CASE).glob("adapter_*"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: x for key, x in tensors.items() if "self_attn" in key}
    save_file(kept, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    want = outputs(regraft.load_adapter(base_model(CASE), tmp_path), CASE)
    holder = regraft.load_adapter(sharded_1(base_model(CASE)), tmp_path)
    assert torch.allclose(outputs(holder, CASE), want, atol=1e-5)
    assert not torch.allclose(outputs(base_model(CASE), CASE), want, atol=1e-3)


def test_flattened_experts_are_refused(processes):
    with pytest.raises(regraft.RefusedError, match="before the model is wrapped"):
        regraft.load_adapter(sharded_1(base_model(CASE)), case_folder(CASE))


@two_adapters
@pytest.mark.parametrize("spread", [data_parallel, sharded_2])
def test_an_adapter_is_added_to_a_spread_peft_model(spread, processes):
    inner = regraft.load_adapter(
        base_model(CASE), case_folder("mixtral__rslora"), is_trainable=True
    )
    holder = data_parallel(inner) if spread is data_parallel else inner
    if spread is sharded_2:
        sharded_2(inner.get_base_model())
    assert regraft.load_adapter(holder, case_folder(CASE), adapter_name="new") is holder
    inner.set_adapter("new")
    assert is_adapted(holder, CASE)
