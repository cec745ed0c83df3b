"""Writes tests/storage/dcp: what runs of four ranks leave of a tiny model, as torch's distributed checkpoints and as
one file of DTensors for each rank.

    .venv/bin/python scripts/make_dcp.py tests/storage/dcp

Ranks are processes with gloo. Tensors are cut along rows, columns, both, unevenly and not at all; beside the model
there are an optimizer's state and a number.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from checkpoints.models import MIXTRAL, mixtral  # noqa: E402

CONFIG = {**MIXTRAL, "num_hidden_layers": 1, "intermediate_size": 5}
WAYS = (
    (Shard(0), Shard(1)),
    (Shard(0), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Replicate(), Replicate()),
)


def tensors() -> dict[str, torch.Tensor]:
    """A tiny Mixtral; sizes of 5 and 3 are cut unevenly, or leave a rank without any."""
    made = mixtral(inner=5, layers=1)
    return {name: torch.from_numpy(array).to(kind_of(name)) for name, array in made.items()}


def kind_of(name: str) -> torch.dtype:
    """Three types, and one for all experts."""
    if "norm" in name:
        return torch.float32
    return torch.float16 if "lm_head" in name else torch.bfloat16


def save(rank: int, out: str) -> None:
    """What one rank saves."""
    dist.init_process_group("gloo", init_method=f"file://{out}/.ranks", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    model = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        way = WAYS[number % len(WAYS)]
        way = tuple(Shard(0) if tensor.ndim == 1 and p == Shard(1) else p for p in way)
        model[name] = distribute_tensor(tensor, mesh, way)
    state = {
        "model": model,
        "optim": {
            "state": {
                n: {"exp_avg": t, "step": torch.tensor(3.0)} for n, t in list(model.items())[:2]
            }
        },
        "step": 7,
    }
    dcp.save(state, checkpoint_id=f"{out}/nested")
    dcp.save(dict(model), checkpoint_id=f"{out}/flat")
    writer = HuggingFaceStorageWriter(f"{out}/shards", save_distributed=True)
    dcp.save(dict(model), storage_writer=writer)
    (Path(out) / "ranks").mkdir(exist_ok=True)
    for kind, value in (("model", flat_ranks(model)), ("optim", state["optim"])):
        torch.save(value, f"{out}/ranks/{kind}_world_size_4_rank_{rank}.pt")
    dist.destroy_process_group()


def flat_ranks(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What verl saves of a rank: DTensors of one mesh of ranks, or of two; and what is no DTensor."""
    one = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    made: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        made[name] = distribute_tensor(tensor, one, (Shard(0),)) if number % 5 else model[name]
    made["model.norm.weight"] = tensors()["model.norm.weight"]
    return made


def main() -> None:
    """Write the folder anew."""
    out = Path(sys.argv[1]).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mp.spawn(save, (str(out),), nprocs=4)
    (out / ".ranks").unlink(missing_ok=True)
    (out / "ranks" / "huggingface").mkdir()
    for name in ("nested", "flat", "shards", "ranks/huggingface"):
        (out / name / "config.json").write_text(json.dumps(CONFIG))


if __name__ == "__main__":
    main()
