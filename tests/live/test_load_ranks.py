"""Each process loads its own part: FSDP2, tensor and expert parallelism over gloo, compared with the whole."""

import os
import weakref
from itertools import product

import pytest
import torch
import transformers
from processes import run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import regraft
from regraft.errors import BadInputError
from regraft.live.ranks import cut_ranges

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Mixtral, as transformers 4 wrote it."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    old = regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)
    folder = tmp_path_factory.mktemp("saved")
    config.save_pretrained(folder)
    save_file(
        {k: t.contiguous() for k, t in old.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def begin(rank, world, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )


def empty(folder, device="meta"):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def compare(model, folder, done):
    """The spread model against the whole one; each rank has read its part, which is returned as one of the whole."""
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    local = 0
    for key, tensor in model.state_dict().items():
        mine = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(full, whole[key]), key
        local += mine.numel() * mine.element_size()
    # Runs of fewer than 512 bytes are read together with what lies between them, and none here is longer.
    assert done.bytes == local <= done.copied <= 4 * local
    return local / sum(t.numel() * t.element_size() for t in whole.values())


def two_ranks(rank, store, folder):
    """Everything that two processes can show, so that torch is imported once in each."""
    begin(rank, 2, store)
    for device in ("meta", "cpu"):
        fsdp(folder, device)
    gathered(folder)
    faults(rank, folder)
    by_transformers(rank, folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(saved, tmp_path):
    run(two_ranks, str(tmp_path / "store"), str(saved), count=2)


def fsdp(folder, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = empty(folder, device)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    done = regraft.load_checkpoint(model, folder)
    assert 0.49 < compare(model, folder, done) < 0.51
    assert done.copied == done.bytes
    ids = torch.arange(6)[None]
    want = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(model(ids).logits, want, atol=1e-5)


def hsdp(folder):
    """Two copies of the model, each spread over two processes, and a step of training on top."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for device in ("meta", "cpu"):
        model = empty(folder, device)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        done = regraft.load_checkpoint(model, folder)
        assert 0.49 < compare(model, folder, done) < 0.51
        assert done.copied == done.bytes
    whole = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(6)[None]
    for one in (model, whole):
        loss = one(ids, labels=ids).loss
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    wanted = whole.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.allclose(tensor.full_tensor(), wanted[key], atol=1e-4), key


def spread(model, mesh, placements):
    """Each parameter as a DTensor, by the placements of the first pattern that is in its name."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    for name, parameter in list(model.named_parameters()):
        found = next((p for part, p in placements.items() if part in name), None)
        made = distribute_tensor(parameter.data, mesh, found or [Replicate()] * mesh.ndim)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made))


def meshes(rank, store, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    begin(rank, 4, store)
    whole = [Replicate(), Replicate()]
    cases = {
        "tensor and data parallel": {
            "q_proj": [Shard(0), Shard(0)],
            "o_proj": [Shard(0), Shard(1)],
            "lm_head": [_StridedShard(0, split_factor=2), Shard(0)],
            "experts.gate_up_proj": [Shard(0), _StridedShard(1, split_factor=2)],
            "experts.down_proj": [Shard(0), Shard(2)],
            "norm": whole,
        },
        "expert and tensor parallel": {
            "experts": [Shard(0), Shard(1)],
            "k_proj": [Replicate(), Shard(0)],
            "embed": [Shard(1), Replicate()],
        },
        "HSDP": {"": [Replicate(), Shard(0)]},
        "uneven": {"k_proj": [Shard(1), Shard(1)], "gate.weight": [Replicate(), Shard(0)]},
    }
    mesh = init_device_mesh("cpu", (2, 2))
    for name, placements in cases.items():
        for device in ("cpu", "meta"):
            model = empty(folder, device)
            spread(model, mesh, placements)
            before = {key: p.placements for key, p in model.named_parameters()}
            done = regraft.load_checkpoint(model, folder)
            for key, p in model.named_parameters():
                assert p.placements == before[key], (name, key)
            compare(model, folder, done)
    hsdp(folder)
    partial(folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_meshes_of_two_dims(saved, tmp_path):
    run(meshes, str(tmp_path / "store"), str(saved), count=4)


def gathered(folder):
    """A spread state dict is converted one target after another: never are more tensors whole than that takes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from regraft.live import spread as module

    mesh = init_device_mesh("cpu", (2,))
    old = {
        name: distribute_tensor(tensor, mesh, [Shard(0)])
        for name, tensor in load_file(f"{folder}/model.safetensors").items()
    }
    model = empty(folder, "cpu")
    spread(model, mesh, {"": [Shard(0)]})
    whole, alive, most = module.whole, [], 0

    def counting(tensor):
        nonlocal most
        made = whole(tensor)
        alive.append(weakref.ref(made))
        most = max(most, sum(t.nbytes for t in (ref() for ref in alive) if t is not None))
        return made

    module.whole = counting
    made = regraft.convert_state_dict(old, to=model)
    module.whole = whole
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert {type(t).__name__ for t in made.values()} == {"DTensor"}
    for name, tensor in made.items():
        assert torch.equal(tensor.full_tensor(), stock[name]), name
    assert most <= max(t.nbytes for t in stock.values())
    model.load_state_dict(made)
    back = regraft.convert_state_dict(made, to="transformers-v4", model=model)
    assert all(torch.equal(back[name], t.full_tensor()) for name, t in old.items())


def faults(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from regraft.live import memory

    model = fully_shard(empty(folder, "cpu"), mesh=init_device_mesh("cpu", (2,)))
    before = {key: t.to_local().clone() for key, t in model.state_dict().items()}
    real = memory.fill_slices

    def dying(fills, *args):
        result = real(fills[:3], *args)
        if rank == 1:
            raise BadInputError(regraft.Finding("file-changed", "the disk died"))
        return result + real(fills[3:], *args)

    memory.fill_slices = dying
    if rank == 1:
        with pytest.raises(BadInputError) as caught:
            regraft.load_checkpoint(model, folder)
        codes = [f.code for f in caught.value.findings]
        assert codes == ["file-changed", "half-loaded"]
        assert "model.embed_tokens.weight" in str(caught.value)
        assert not hasattr(model, "regraft_load")
    else:
        # No rank waits for another, so that one that dies leaves none hanging.
        done = regraft.load_checkpoint(model, folder)
        assert done.copied == done.bytes
        assert any(
            not torch.equal(t.to_local(), before[key]) for key, t in model.state_dict().items()
        )
    memory.fill_slices = real


def partial(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    model = empty(folder, "cpu")
    mesh = init_device_mesh("cpu", (4,))
    head = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(
        DTensor.from_local(head.data, mesh, [Partial()], run_check=False)
    )
    with pytest.raises(BadInputError) as caught:
        regraft.load_checkpoint(model, folder)
    assert [(f.code, f.key) for f in caught.value.findings] == [("placement", "lm_head.weight")]


def by_transformers(rank, folder):
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    config = DistributedConfig(tp_size=2)
    stock = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    model = regraft.from_pretrained(AutoModelForCausalLM, folder, distributed_config=config)
    assert model.regraft_load.way != "off", model.regraft_load
    sharded = 0
    mine = model.state_dict()
    for key, tensor in stock.state_dict().items():
        one, other = (t.to_local() if hasattr(t, "to_local") else t for t in (tensor, mine[key]))
        assert torch.equal(one, other), key
        sharded += one.shape != tensor.shape
    assert sharded


@pytest.mark.parametrize(
    ("size", "world", "groups"), [*product((0, 1, 7, 8, 12), (1, 2, 3, 4), (1, 2))]
)
def test_ranks_share_a_dim_without_gaps(size, world, groups):
    found = sorted(
        i
        for rank in range(world)
        for low, high in cut_ranges(((0, size),), rank, world, groups)
        for i in range(low, high)
    )
    assert found == list(range(size))
