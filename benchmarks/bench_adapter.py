"""Converting a Qwen3-MoE LoRA in memory: regraft, PEFT, and copying every tensor once.

48 layers, 128 experts, every expert projection and attention: 37248 tensors with a small hidden
size, so what is timed is the work per tensor and not the moving of large ones.
"""

from __future__ import annotations

from measure import Contender, Goal, alternate, parse_arguments, report, use_one_thread

use_one_thread()

from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils.transformers_weight_conversion import (  # noqa: E402
    convert_peft_adapter_state_dict_for_transformers,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from regraft.adapters.convert import convert_adapter  # noqa: E402
from regraft.dialects.names import layout_named  # noqa: E402
from regraft.dialects.peft.source import Source  # noqa: E402
from regraft.planning.model import ModelConfig  # noqa: E402

LAYERS, EXPERTS = 48, 128
HIDDEN, INTERMEDIATE, RANK = 64, 32, 8
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16

ATTENTION = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
EXPERT = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.18.1",
    "r": RANK,
    "lora_alpha": 16,
    "target_modules": [*ATTENTION, *EXPERT],
}

Arrays = dict[str, npt.NDArray[Any]]
Tensors = dict[str, torch.Tensor]


def make_adapter() -> Arrays:
    """The adapter's tensors, in the order in which a safetensors file has them."""
    modules = {}
    for layer in range(LAYERS):
        for name, shape in ATTENTION.items():
            modules[f"model.layers.{layer}.self_attn.{name}"] = shape
        for expert in range(EXPERTS):
            for name, shape in EXPERT.items():
                modules[f"model.layers.{layer}.mlp.experts.{expert}.{name}"] = shape
    shapes = {}
    for module, (out_size, in_size) in modules.items():
        shapes[f"base_model.model.{module}.lora_A.weight"] = (RANK, in_size)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (out_size, RANK)
    numbers = np.random.default_rng(0)
    return {key: numbers.standard_normal(shapes[key], dtype=np.float32) for key in sorted(shapes)}


def make_model_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
    )


def convert_with_regraft(arrays: Arrays, model: ModelConfig) -> Arrays:
    """The whole conversion: names, plan, deltas, config."""
    source = Source("", "memory", dict(ADAPTER_CONFIG), arrays)
    return convert_adapter(source, layout_named("transformers-v5"), model).tensors


def convert_torch_with_regraft(tensors: Tensors, model: ModelConfig) -> Tensors:
    """The same for a caller who has torch tensors and wants torch tensors."""
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    converted = convert_with_regraft(arrays, model)
    return {key: torch.from_numpy(array) for key, array in converted.items()}


def check_same(ours: Arrays, theirs: Tensors) -> None:
    """Keys, shapes, dtypes and bits of the two results are the same; otherwise the times mean little."""
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise SystemExit(f"regraft and PEFT differ in {len(odd)} keys: {odd[:4]}")
    for key, array in ours.items():
        other = theirs[key].numpy()
        same = array.shape == other.shape and array.dtype == other.dtype
        if not same or array.tobytes() != other.tobytes():
            raise SystemExit(f"regraft and PEFT differ in {key}")


def main() -> None:
    arguments = parse_arguments(str(__doc__).splitlines()[0], rounds=11)
    torch.set_num_threads(1)
    arrays = make_adapter()
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    config = make_model_config()
    with torch.device("meta"):
        peft_model = Qwen3MoeForCausalLM(config)
    peft_config = LoraConfig(r=RANK, lora_alpha=16, target_modules=ADAPTER_CONFIG["target_modules"])
    model = ModelConfig(config.to_dict(), "memory")

    def convert_with_peft() -> Tensors:
        return convert_peft_adapter_state_dict_for_transformers(
            peft_model, peft_config, dict(tensors)
        )

    ours = convert_with_regraft(arrays, model)
    check_same(ours, convert_with_peft())
    facts = {
        "tensors in": len(arrays),
        "tensors out": len(ours),
        "MB": f"{sum(array.nbytes for array in arrays.values()) / 1e6:.1f}",
        "results": "the same, bit for bit",
    }
    del ours
    seconds = alternate(
        [
            Contender("regraft", lambda: convert_with_regraft(arrays, model)),
            Contender("regraft (torch)", lambda: convert_torch_with_regraft(tensors, model)),
            Contender("PEFT", convert_with_peft),
            Contender("numpy copy", lambda: {k: a.copy() for k, a in arrays.items()}),
            Contender("torch clone", lambda: {k: t.clone() for k, t in tensors.items()}),
        ],
        arguments.rounds,
    )
    goals = [
        Goal("PEFT", "regraft", at_least=15),
        Goal("PEFT", "regraft (torch)", at_least=15),
        Goal("regraft", "numpy copy", at_most=3),
        Goal("regraft", "torch clone", at_most=3),
        Goal("regraft (torch)", "torch clone", at_most=3),
    ]
    report("Qwen3-MoE LoRA, transformers 4 to 5, in memory", seconds, goals, facts, arguments.json)


if __name__ == "__main__":
    main()
