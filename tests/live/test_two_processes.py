"""A model that is really spread: FSDP2 over two processes, each with half of every tensor."""

import pytest
import torch
from holders import Holder, mixtral, vit
from processes import run

import regraft

FAMILIES = {"vit": vit, "mixtral": mixtral}


def check(rank, store, saved):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    for family, (new, old) in saved.items():
        model = FAMILIES[family]()
        for layer in (m for m in model.modules() if type(m).__name__.endswith("Layer")):
            fully_shard(layer, mesh=mesh)
        holder = Holder(net=fully_shard(model, mesh=mesh))
        source = {f"module.net.{key}": tensor for key, tensor in old.items()}
        made = regraft.convert_state_dict(source, to=holder)
        assert {type(tensor).__name__ for tensor in made.values()} == {"DTensor"}
        holder.load_state_dict(made, strict=True)
        state = holder.state_dict()
        assert any(tensor.to_local().shape != tensor.shape for tensor in state.values())
        for key, tensor in new.items():
            assert torch.equal(state[f"net.{key}"].full_tensor(), tensor), key
        back = regraft.convert_state_dict(state, to="transformers-v4", model=holder)
        assert back.keys() == {f"net.{key}" for key in old}
        assert all(torch.equal(back[f"net.{key}"], tensor) for key, tensor in old.items())
    torch.distributed.barrier()  # a process that leaves early takes the other's connections with it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_model_over_two_processes(tmp_path):
    saved = {}
    for family, make in FAMILIES.items():
        model = make()
        old = regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)
        saved[family] = {k: t.clone() for k, t in model.state_dict().items()}, dict(old)
    run(check, str(tmp_path / "store"), saved, count=2)
