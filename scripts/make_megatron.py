"""Writes tests/storage/megatron: what Megatron-Core saves as torch_dist, by several ranks, of tiny models.

    pip install --no-deps --target WHERE megatron-core==0.16.1
    .venv/bin/python scripts/make_megatron.py tests/storage/megatron WHERE

The models are Megatron-Core's own, on CPUs with gloo, and so is what saves them. Every number is that of its place in
the whole tensor, so that a test knows what it must be wherever the ranks cut.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COMMON = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 6,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 6,
        "moe_intermediate_size": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "intermediate_size": 6,
        "moe_intermediate_size": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
    },
}
RANKS = {"llama": (2, 2, 1), "qwen3_moe": (1, 2, 2), "deepseek_v3": (1, 2, 1)}
"""Tensor, pipeline and expert parallel; twice as many ranks for the experts."""
PADDED = 12
"""Rows of the vocabulary, as Megatron-Core has it."""


def model_of(kind: str, config: dict[str, Any], ranks: tuple[int, int, int]) -> Any:
    """One rank's part of the model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    tensor, pipeline, expert = ranks
    common = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.bfloat16,
    }
    if kind != "llama":
        common |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_router_topk": 2,
            "qk_layernorm": True,
        }
    if kind == "deepseek_v3":
        # Layers without Transformer Engine have no heads of two sizes, which no weight depends on.
        first = DotProductAttention.__init__

        def without(self: Any, *rest: Any, **options: Any) -> None:
            heads = ("k_channels", "v_channels")
            first(self, *rest, **{k: v for k, v in options.items() if k not in heads})

        DotProductAttention.__init__ = without
        multi_latent_attention.TELinear = type("TELinear", (), {})
        made = MLATransformerConfig(
            **common,
            multi_latent_attention=True,
            q_lora_rank=config["q_lora_rank"],
            kv_lora_rank=config["kv_lora_rank"],
            qk_head_dim=config["qk_nope_head_dim"],
            qk_pos_emb_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            moe_layer_freq=[0, 1],
            moe_shared_expert_intermediate_size=config["moe_intermediate_size"],
            moe_router_enable_expert_bias=True,
            moe_router_score_function="sigmoid",
        )
        spec = specs.get_gpt_decoder_block_spec(
            made, use_transformer_engine=False, normalization="RMSNorm"
        )
    else:
        made = TransformerConfig(**common, kv_channels=config["head_dim"])
        spec = specs.get_gpt_layer_local_spec(
            num_experts=made.num_moe_experts,
            moe_grouped_gemm=False,
            qk_layernorm=kind != "llama",
            normalization="RMSNorm",
        )
    return GPTModel(
        config=made,
        transformer_layer_spec=spec,
        vocab_size=PADDED,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def label(shards: Any) -> None:
    """Put in place of every number the place that it has in the whole tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    each = list(shards.values()) if isinstance(shards, dict) else shards
    for shard in each:
        if isinstance(shard, dict | list):
            label(shard)
        elif isinstance(shard, ShardedTensor):
            places = np.arange(np.prod(shard.global_shape)).reshape(shard.global_shape)
            lead = [slice(at, at + 1) for at in shard.global_offset[: shard.prepend_axis_num]]
            own = zip(shard.global_offset[shard.prepend_axis_num :], shard.local_shape, strict=True)
            part = places[(*lead, *(slice(at, at + size) for at, size in own))]
            shard.data = torch.from_numpy(part.reshape(shard.local_shape).copy()).to(torch.float32)
            shard.dtype = torch.float32


def save(rank: int, count: int, kind: str, out: str, where: str) -> None:
    """What one rank saves."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, where)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/.{kind}", rank=rank, world_size=count
    )
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import apply_factories

    tensor, pipeline, expert = RANKS[kind]
    parallel_state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
    )
    model = model_of(kind, {**COMMON, **CONFIGS[kind]}, RANKS[kind])
    shards = model.sharded_state_dict()
    apply_factories(shards)
    label(shards)
    folder = Path(out) / kind
    folder.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(shards, str(folder))
    dist.destroy_process_group()


def main() -> None:
    """Write the folders anew."""
    out, where = (str(Path(text).resolve()) for text in sys.argv[1:3])
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir(parents=True)
    for kind, config in CONFIGS.items():
        count = RANKS[kind][0] * RANKS[kind][1] * RANKS[kind][2]
        mp.spawn(save, (count, kind, out, where), nprocs=count)
        (Path(out) / f".{kind}").unlink(missing_ok=True)
        (Path(out) / kind / "config.json").write_text(json.dumps({**COMMON, **config}))


if __name__ == "__main__":
    main()
