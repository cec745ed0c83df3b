"""The experts of one layer over many shards give what one file gives.

Source: unslothai/unsloth-zoo#647. Keys and shapes are rebuilt.
"""

import numpy as np
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.storage.safetensors import open_tensors


def test_eight_shards_and_one_file(tmp_path):
    config = {**MIXTRAL, "num_local_experts": 16}
    made = {}
    for shards in (1, 8):
        src = write_folder(tmp_path / f"src{shards}", mixtral(experts=16), config, shards=shards)
        regraft.convert(src, tmp_path / f"new{shards}", to="transformers-v5")
        files = sorted((tmp_path / f"new{shards}").glob("*.safetensors"))
        made[shards] = {k: np.array(v) for file in files for k, v in open_tensors(file).items()}
    assert made[1].keys() == made[8].keys()
    assert all(np.array_equal(made[1][name], tensor) for name, tensor in made[8].items())
    stacked = made[1]["model.layers.0.mlp.experts.down_proj"]
    last = mixtral(experts=16)["model.layers.0.block_sparse_moe.experts.15.w2.weight"]
    assert np.array_equal(stacked[15], last)  # 10 comes after 9
