"""Make golden adapters: genuine transformers 4 / peft 0.18 LoRA files and the outputs they give.

    python scripts/make_golden.py OUT [--set small|wide] [--only GLOB]

Needs transformers 4 (4.57.6) and peft 0.18 (0.18.1): the point is to record what they wrote and
computed. The base models are tiny and random, and so are the adapters' factors; nothing is trained
or downloaded. Written:

    OUT/index.json          case -> {"model_class", "base", "peft_type"}
    OUT/bases/BASE/         a base model, as `save_pretrained` wrote it, shared by its cases
    OUT/cases/CASE/         adapter_config.json and adapter_model.safetensors, as `save_pretrained`
                            wrote them, and reference.safetensors: the inputs (`input.*`), the
                            output with the adapter (`ref`) and without it (`ref_base`), in float32

A case is named BASE__SCENARIO. `small` is what tests/golden holds, `wide` is for a scratch folder.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dataclasses import replace

import peft
import torch
import transformers
from safetensors.torch import save_file

Settings = dict[str, Any]
Inputs = dict[str, torch.Tensor]

SEQUENCES, TOKENS = 2, 16
FIRST_TOKEN = 3  # 0, 1 and 2 are padding, begin and end


# --------------------------------------------------------------------------------- base models


@dataclass(frozen=True)
class Size:
    """How large the base models of a set are."""

    hidden: int
    intermediate: int
    expert: int  # the intermediate size of one expert, where a config has both
    heads: int
    key_heads: int
    vocab: int
    layers: int
    head: int = 8
    experts: int = 4


SIZES = {
    "small": Size(hidden=16, intermediate=24, expert=12, heads=2, key_heads=1, vocab=32, layers=2),
    "wide": Size(hidden=32, intermediate=48, expert=24, heads=4, key_heads=2, vocab=64, layers=3),
}


def decoder(size: Size) -> Settings:
    """What nearly every decoder's config calls by the same names."""
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def mixtral(size: Size) -> Settings:
    return {**decoder(size), "num_local_experts": size.experts, "num_experts_per_tok": 2}


def minimax(size: Size) -> Settings:
    kinds = ["full_attention", "linear_attention", "full_attention"]
    return {
        **mixtral(size),
        "head_dim": size.head,
        "block_size": 8,
        "layer_types": kinds[: size.layers],
    }


def qwen3_moe(size: Size) -> Settings:
    return {
        **decoder(size),
        "head_dim": size.head,
        "num_experts": size.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.expert,
        "norm_topk_prob": True,
    }


def qwen2_moe(size: Size) -> Settings:
    settings = {**qwen3_moe(size), "shared_expert_intermediate_size": size.expert + 8}
    del settings["head_dim"]
    return settings


def qwen3_next(size: Size) -> Settings:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    return {
        **qwen3_moe(size),
        "shared_expert_intermediate_size": size.expert + 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": kinds[: size.layers],
    }


def olmoe(size: Size) -> Settings:
    return {**decoder(size), "num_experts": size.experts, "num_experts_per_tok": 2}


def glm4_moe(size: Size) -> Settings:
    return {
        **decoder(size),
        "head_dim": size.head,
        "n_routed_experts": size.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.expert,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }


def latent_attention(size: Size) -> Settings:
    return {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }


def deepseek(size: Size) -> Settings:
    settings = {**glm4_moe(size), **latent_attention(size), "num_key_value_heads": size.heads}
    del settings["head_dim"]
    return settings


def ernie(size: Size) -> Settings:
    return {
        **decoder(size),
        "moe_num_experts": size.experts,
        "moe_k": 2,
        "moe_intermediate_size": size.expert,
        "moe_num_shared_experts": 1,
    }


def hunyuan(size: Size) -> Settings:
    return {
        **decoder(size),
        "num_experts": size.experts,
        "moe_topk": 2,
        "head_dim": size.head,
    }


def jamba(size: Size) -> Settings:
    return {
        **decoder(size),
        "num_hidden_layers": 2 if size.layers == 2 else 4,
        "num_experts": size.experts,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }


def granite_shared(size: Size) -> Settings:
    return {**mixtral(size), "shared_intermediate_size": size.expert + 8}


def granite_hybrid(size: Size) -> Settings:
    kinds = ["mamba", "attention", "mamba"]
    return {
        **granite_shared(size),
        "layer_types": kinds[: size.layers],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "position_embedding_type": "rope",
    }


def dbrx(size: Size) -> Settings:
    return {
        "d_model": size.hidden,
        "n_heads": size.heads,
        "n_layers": size.layers,
        "max_seq_len": 64,
        "vocab_size": size.vocab,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_config": {"kv_n_heads": size.key_heads, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": size.intermediate,
            "moe_num_experts": size.experts,
            "moe_top_k": 2,
        },
    }


def jetmoe(size: Size) -> Settings:
    settings = {**mixtral(size), "kv_channels": size.head}
    del settings["num_attention_heads"]  # it is key heads times experts per token
    return settings


def gpt_oss(size: Size) -> Settings:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {**mixtral(size), "head_dim": size.head, "layer_types": kinds[: size.layers]}


def qwen3_vl_moe(size: Size) -> Settings:
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [1, 1, 2]}
    return {
        "text_config": {**qwen3_moe(size), "rope_scaling": rope},
        "vision_config": {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": size.hidden,
            "spatial_merge_size": 1,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 4,
        },
        "image_token_id": size.vocab - 2,
        "video_token_id": size.vocab - 1,
        "vision_start_token_id": size.vocab - 3,
        "vision_end_token_id": size.vocab - 4,
    }


def glm4v_moe(size: Size) -> Settings:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return {
        "text_config": {**glm4_moe(size), "rope_scaling": rope, "partial_rotary_factor": 1.0},
        "vision_config": {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_heads": 2,
            "patch_size": 4,
            "image_size": 8,
            "out_hidden_size": size.hidden,
        },
        "image_token_id": size.vocab - 2,
        "video_token_id": size.vocab - 1,
        "image_start_token_id": size.vocab - 3,
        "image_end_token_id": size.vocab - 4,
        "video_start_token_id": size.vocab - 5,
        "video_end_token_id": size.vocab - 6,
    }


def longcat(size: Size) -> Settings:
    return {
        **latent_attention(size),
        "hidden_size": size.hidden,
        "ffn_hidden_size": size.intermediate,
        "num_layers": size.layers,
        "num_hidden_layers": 2 * size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "head_dim": 8,
        "n_routed_experts": size.experts,
        "zero_expert_num": 0,  # transformers 5.23 cannot load any other number
        "expert_ffn_hidden_size": size.expert,
        "moe_topk": 2,
    }


def llava(text_type: str, text: Callable[[Size], Settings]) -> Callable[[Size], Settings]:
    """The settings of a LLaVA around that text model; four image tokens per image."""

    def settings(size: Size) -> Settings:
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 8,
        }
        return {
            "text_config": {"model_type": text_type, **text(size)},
            "vision_config": vision,
            "vision_feature_layer": -1,
            "image_seq_length": 4,
            "image_token_index": size.vocab - 1,
            "pad_token_id": 0,
        }

    return settings


@dataclass(frozen=True)
class Base:
    """A kind of base model, and what its parts are called in transformers 4."""

    model_class: str
    model_type: str
    settings: Callable[[Size], Settings]
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    router_is_linear: bool = True
    shared: str = ""  # the module of the shared expert
    norm: str = "norm"
    prefix: str = "model."  # of `layers.N`
    parameters: tuple[str, ...] = ()  # expert parameters with one slice per expert
    changes: Settings = field(default_factory=dict)
    few: bool = False  # a variation of another base: only the scenarios of FEW
    without: tuple[str, ...] = ()  # globs of scenarios that do not apply

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.gate, self.up, self.down)


MIXTRAL = Base("MixtralForCausalLM", "mixtral", mixtral, gate="w1", up="w3", down="w2")
QWEN2 = Base("Qwen2MoeForCausalLM", "qwen2_moe", qwen2_moe, shared="shared_expert")
QWEN3 = Base("Qwen3MoeForCausalLM", "qwen3_moe", qwen3_moe)
GLM4 = Base(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    glm4_moe,
    router_is_linear=False,
    shared="shared_experts",
)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DEEPSEEK = replace(
    GLM4,
    model_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    settings=deepseek,
    attention=LATENT,
)
GRANITE = Base(
    "GraniteMoeForCausalLM",
    "granitemoe",
    mixtral,
    router="router.layer",
    parameters=("input_linear.weight", "output_linear.weight"),
)
LLAVA = replace(
    MIXTRAL,
    model_class="LlavaForConditionalGeneration",
    model_type="llava",
    settings=llava("mixtral", mixtral),
    prefix="model.language_model.",
)
FUSED = ("experts.gate_up_proj", "experts.down_proj")

BASES: dict[str, Base] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": replace(QWEN2, changes={"mlp_only_layers": [0]}),
    "qwen3_moe": QWEN3,
    "phimoe": replace(MIXTRAL, model_class="PhimoeForCausalLM", model_type="phimoe"),
    "granitemoe": GRANITE,
    "jamba": Base("JambaForCausalLM", "jamba", jamba, router="router", norm="final_layernorm"),
    "deepseek_v2": replace(DEEPSEEK, model_class="DeepseekV2ForCausalLM", model_type="deepseek_v2"),
    "ernie4_5_moe": Base("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", ernie, shared="shared_experts"),
    "hunyuan_v1_moe": Base(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", hunyuan, router="wg", shared="shared_mlp"
    ),
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": Base(
        "GptOssForCausalLM",
        "gpt_oss",
        gpt_oss,
        router="router",
        router_is_linear=False,
        parameters=FUSED,
    ),
    "qwen3_vl_moe": Base(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        qwen3_vl_moe,
        prefix="model.language_model.",
        parameters=FUSED,
    ),
    "llava_mixtral": LLAVA,
    "llava_qwen3_moe": replace(
        LLAVA,
        settings=llava("qwen3_moe", qwen3_moe),
        gate=QWEN3.gate,
        up=QWEN3.up,
        down=QWEN3.down,
    ),
    "qwen3_moe_seqcls": replace(QWEN3, model_class="Qwen3MoeForSequenceClassification", few=True),
    "qwen3_next": Base(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        qwen3_next,
        attention=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj"),
        shared="shared_expert",
    ),
    "glm4_moe": GLM4,
    "dots1": replace(GLM4, model_class="Dots1ForCausalLM", model_type="dots1"),
    "olmoe": Base("OlmoeForCausalLM", "olmoe", olmoe),
    "flex_olmo": Base("FlexOlmoForCausalLM", "flex_olmo", olmoe),
    "minimax": replace(
        MIXTRAL,
        model_class="MiniMaxForCausalLM",
        model_type="minimax",
        settings=minimax,
        attention=("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
    ),
    "granitemoeshared": replace(
        GRANITE,
        model_class="GraniteMoeSharedForCausalLM",
        model_type="granitemoeshared",
        settings=granite_shared,
        shared="shared_mlp",
    ),
    "granitemoehybrid": replace(
        GRANITE,
        model_class="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        settings=granite_hybrid,
        attention=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj"),
        shared="shared_mlp",
    ),
    "dbrx": Base(
        "DbrxForCausalLM",
        "dbrx",
        dbrx,
        attention=("Wqkv", "out_proj"),
        router="router.layer",
        norm="norm_f",
        prefix="transformer.blocks.",
        gate="",  # peft 0.18 can adapt neither its experts' modules nor their parameters
    ),
    "jetmoe": replace(
        GRANITE,
        model_class="JetMoeForCausalLM",
        model_type="jetmoe",
        settings=jetmoe,
        attention=("kv_proj",),
    ),
    "glm4v_moe": replace(
        GLM4,
        model_class="Glm4vMoeForConditionalGeneration",
        model_type="glm4v_moe",
        settings=glm4v_moe,
        prefix="model.language_model.",
    ),
    "longcat_flash": Base(
        "LongcatFlashForCausalLM",
        "longcat_flash",
        longcat,
        attention=LATENT,
        router="classifier",
        norm="model.norm",
        without=("router", "param_router"),  # no effect: transformers 4 does not call the router
    ),
    "mixtral_model": replace(MIXTRAL, model_class="MixtralModel", prefix="", few=True),
    "qwen3_moe_model": replace(QWEN3, model_class="Qwen3MoeModel", prefix="", few=True),
    "qwen2_moe_model": replace(QWEN2, model_class="Qwen2MoeModel", prefix="", few=True),
    "deepseek_v3_model": replace(DEEPSEEK, model_class="DeepseekV3Model", prefix="", few=True),
    "mixtral_seqcls": replace(MIXTRAL, model_class="MixtralForSequenceClassification", few=True),
    "mixtral_square": replace(MIXTRAL, changes={"intermediate_size": 32}, few=True),
    "qwen3_moe_square": replace(QWEN3, changes={"moe_intermediate_size": 32}, few=True),
    "mixtral_1expert": replace(
        MIXTRAL,
        changes={"num_local_experts": 1, "num_experts_per_tok": 1},
        few=True,
        without=("*router",),  # no effect
    ),
    "mixtral_12experts": replace(
        MIXTRAL, changes={"num_local_experts": 12, "num_experts_per_tok": 4}, few=True
    ),
    "qwen3_moe_12experts": replace(
        QWEN3, changes={"num_experts": 12, "num_experts_per_tok": 4}, few=True
    ),
    "qwen3_moe_mlponly": replace(QWEN3, changes={"mlp_only_layers": [0]}, few=True),
    "qwen2_moe_sparse": replace(QWEN2, few=True),
    "deepseek_v3_nodense": replace(DEEPSEEK, changes={"first_k_dense_replace": 0}, few=True),
    "granitemoe_square": replace(GRANITE, changes={"intermediate_size": 16}, few=True),
    "gpt_oss_12experts": Base(
        "GptOssForCausalLM",
        "gpt_oss",
        gpt_oss,
        router="router",
        router_is_linear=False,
        parameters=FUSED,
        changes={"num_local_experts": 12, "num_experts_per_tok": 4},
        few=True,
    ),
}


def build(base: Base, size: Size, seed: int) -> transformers.PreTrainedModel:
    """A tiny model whose random weights are large enough for every part to show in the output."""
    config = transformers.AutoConfig.for_model(base.model_type, **base.settings(size))
    for name, value in base.changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model_class = getattr(transformers, base.model_class)
    model: transformers.PreTrainedModel = model_class._from_config(
        config, attn_implementation="eager"
    )
    model.float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=noise)
            if name.endswith("e_score_correction_bias"):  # small, or it alone chooses the experts
                weight.copy_(0.05 * drawn)
            elif weight.ndim == 1 or name.endswith("A_log"):  # norms and biases: near what they are
                weight.add_(0.2 * drawn)
            else:
                weight.copy_(drawn * min(max(weight.shape[-1] ** -0.5, 0.1), 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.05 * torch.randn(buffer.shape, generator=noise))
    return model


def draw_inputs(model: transformers.PreTrainedModel, size: Size, seed: int) -> Inputs:
    """Random inputs: token ids, and for LLaVA one image per sequence as well."""
    noise = torch.Generator().manual_seed(seed)
    last = size.vocab - 6  # above it are the tokens of the multimodal models
    ids = torch.randint(FIRST_TOKEN, last, (SEQUENCES, TOKENS), generator=noise)
    inputs = {"input_ids": ids}
    if model.config.model_type == "llava":
        ids[:, 1:5] = model.config.image_token_index
        inputs["pixel_values"] = torch.randn(SEQUENCES, 3, 8, 8, generator=noise)
    return inputs


def unreached_experts(model: transformers.PreTrainedModel, inputs: Inputs) -> list[str]:
    """The expert weights (and slices of them) that these inputs' output does not depend on."""
    model.zero_grad()
    output_of(model, inputs).square().sum().backward()
    experts = model_experts(model)
    found = []
    for name, weight in model.named_parameters():
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        slices = gradient.flatten(1) if weight.ndim == 3 else gradient.flatten()[None]
        if name in experts and (slices.abs().amax(dim=1) == 0).any():
            found.append(name)
    model.zero_grad(set_to_none=True)
    return found


def model_experts(model: transformers.PreTrainedModel) -> set[str]:
    """The names of the expert weights: under `experts`, or with one slice per expert."""
    return {
        name
        for name, weight in model.named_parameters()
        if re.search(r"\bexperts\.\d+\.", name)
        or (weight.ndim == 3 and re.search(r"\bexperts\b|\w+put_linear", name))
    }


def choose_inputs(model: transformers.PreTrainedModel, size: Size, seed: int) -> Inputs:
    """The first random inputs that reach every expert."""
    missing: list[str] = []
    for attempt in range(50):
        inputs = draw_inputs(model, size, seed + attempt)
        missing = unreached_experts(model, inputs)
        if not missing:
            return inputs
    raise ValueError(f"no input reaches every expert: {missing[0]} and {len(missing) - 1} more")


def output_of(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """The output that is recorded: the logits, or the last hidden state of a bare model."""
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    found: torch.Tensor = output.last_hidden_state if logits is None else logits
    return found.float()


# ----------------------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenario:
    """How one adapter is set up."""

    lora: Settings  # of peft.LoraConfig, or of the config of that `peft_type`
    dtype: torch.dtype = torch.float32  # of the file
    untrained: str = ""  # a regex: the modules whose B stays zero
    peft_type: str = "LORA"

    def config(self) -> peft.PeftConfig:
        """The config that PEFT makes an adapter of."""
        if self.peft_type == "LORA":
            return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **self.lora})
        return peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](**self.lora)


def common_scenarios(base: Base) -> Iterator[tuple[str, Scenario]]:
    """What applies to any model."""
    attention, layer = list(base.attention), rf"{re.escape(base.prefix)}.*\b1\."
    yield "attn", Scenario({"target_modules": attention})
    yield "all_linear", Scenario({"target_modules": "all-linear"})
    yield "mts_router", Scenario({"target_modules": attention, "modules_to_save": [base.router]})
    yield "mts_head", Scenario({"target_modules": attention, "modules_to_save": ["lm_head"]})
    yield "mts_norm", Scenario({"target_modules": attention, "modules_to_save": [base.norm]})
    yield "attn_layer", Scenario({"target_modules": rf"{layer}.*({'|'.join(attention)})"})
    yield "attn_rslora", Scenario({"target_modules": attention, "use_rslora": True, "r": 3})
    yield "param_router", Scenario({"target_parameters": [f"{base.router}.weight"]})
    yield (
        "attn_param_router",
        Scenario({"target_modules": attention, "target_parameters": [f"{base.router}.weight"]}),
    )
    if base.router_is_linear:
        yield "router", Scenario({"target_modules": [base.router]})
    if base.shared:
        yield "shared_only", Scenario({"target_modules": rf".*\.{base.shared}\.\w+_(proj|linear)"})


def expert_scenarios(base: Base, last: int) -> Iterator[tuple[str, Scenario]]:
    """For models with a module per expert."""
    gate, up, down = base.projections
    attention, everything = list(base.attention), [*base.projections, *base.attention]
    each, names = rf"{re.escape(base.prefix)}layers\.\d+\..*experts\.\d+\.", f"({gate}|{up}|{down})"
    layer = rf"layers\.{last}\."

    yield "gud", Scenario({"target_modules": list(base.projections)})
    yield "gud_attn", Scenario({"target_modules": everything})
    yield "experts_regex", Scenario({"target_modules": each + names})
    yield "only_gate", Scenario({"target_modules": [gate]})
    yield "only_up", Scenario({"target_modules": [up]})
    yield "only_down", Scenario({"target_modules": [down]})
    yield "gate_up", Scenario({"target_modules": [gate, up]})
    yield "gate_down", Scenario({"target_modules": [gate, down]})
    yield "up_down", Scenario({"target_modules": [up, down]})
    yield "layer_regex", Scenario({"target_modules": rf".*{layer}.*experts\.\d+\.{names}"})
    yield "subset_regex", Scenario({"target_modules": rf".*experts\.(0|2)\.{names}"})
    yield (
        "one_projection_regex",
        Scenario({"target_modules": rf".*{layer}.*experts\.1\.{up}|.*{attention[-1]}"}),
    )
    yield (
        "attn_and_experts_regex",
        Scenario({"target_modules": rf".*({'|'.join(attention)})|.*experts\.\d+\.({gate}|{up})"}),
    )
    yield (
        "patterns_projection",
        Scenario(
            {
                "target_modules": everything,
                "rank_pattern": {gate: 2, up: 3, down: 5},
                "alpha_pattern": {gate: 6, up: 3, down: 8},
            }
        ),
    )
    yield (
        "patterns_layer",
        Scenario(
            {
                "target_modules": everything,
                "rank_pattern": {rf"{layer}.*": 2},
                "alpha_pattern": {rf"{layer}.*experts\.\d+\.{down}": 3},
            }
        ),
    )
    yield (
        "patterns_expert",
        Scenario(
            {
                "target_modules": everything,
                "rank_pattern": {rf"{layer}.*experts\.1\.{up}": 6, rf"experts\.2\.{down}": 2},
                "alpha_pattern": {rf"{layer}.*experts\.0\.{gate}": 3},
            }
        ),
    )
    yield (
        "alpha_up",
        Scenario({"target_modules": list(base.projections), "alpha_pattern": {up: 3}}),
    )
    yield (
        "alpha_gate_up",
        Scenario({"target_modules": list(base.projections), "alpha_pattern": {gate: 3, up: 3}}),
    )
    yield (
        "rank_gate_up",
        Scenario({"target_modules": list(base.projections), "rank_pattern": {gate: 2, up: 2}}),
    )
    yield "rslora", Scenario({"target_modules": everything, "use_rslora": True, "r": 3})
    yield (
        "rslora_patterns",
        Scenario(
            {
                "target_modules": everything,
                "use_rslora": True,
                "rank_pattern": {gate: 2, rf"experts\.1\.{down}": 3},
                "alpha_pattern": {up: 3},
            }
        ),
    )
    # Without layers_pattern, peft takes an expert's number for its layer's.
    yield "layers", Scenario({"target_modules": everything, "layers_to_transform": [last]})
    yield (
        "layers_pattern",
        Scenario(
            {
                "target_modules": everything,
                "layers_to_transform": [last],
                "layers_pattern": "layers",
            }
        ),
    )
    yield "exclude", Scenario({"target_modules": everything, "exclude_modules": rf".*{layer}.*"})
    yield (
        "exclude_expert",
        Scenario({"target_modules": everything, "exclude_modules": rf".*experts\.3\.{up}"}),
    )
    yield (
        "gud_mts_router",
        Scenario({"target_modules": list(base.projections), "modules_to_save": [base.router]}),
    )
    yield (
        "gud_param_router",
        Scenario(
            {
                "target_modules": list(base.projections),
                "target_parameters": [f"{base.router}.weight"],
            }
        ),
    )
    yield "bias_lora_only", Scenario({"target_modules": everything, "bias": "lora_only"})
    yield "bias_all", Scenario({"target_modules": everything, "bias": "all"})
    yield "bf16", Scenario({"target_modules": everything}, dtype=torch.bfloat16)
    yield "fp16", Scenario({"target_modules": everything}, dtype=torch.float16)
    yield "untrained_layer", Scenario({"target_modules": everything}, untrained=rf".*{layer}.*")
    yield "dropout", Scenario({"target_modules": everything, "lora_dropout": 0.1})
    yield "r1", Scenario({"target_modules": everything, "r": 1, "lora_alpha": 2})
    if base.router_is_linear:
        yield "gud_router", Scenario({"target_modules": [*base.projections, base.router]})
    if base.shared:
        yield (
            "experts_and_shared_regex",
            Scenario(
                {"target_modules": rf".*experts\.\d+\.({gate}|{down})|.*\.{base.shared}\.{up}"}
            ),
        )
    if base.model_type in ("qwen2_moe", "qwen3_next"):
        yield "shared_gate", Scenario({"target_modules": ["shared_expert_gate", gate]})
    if base.model_type == "mixtral":
        yield "dora", Scenario({"target_modules": everything, "use_dora": True})
        yield "lora_bias", Scenario({"target_modules": everything, "lora_bias": True})
        yield "embedding", Scenario({"target_modules": ["embed_tokens", *base.projections]})
        yield (
            "trainable_tokens",
            Scenario({"target_modules": everything, "trainable_token_indices": [3, 7, 11]}),
        )
        yield (
            "params_embedding",
            Scenario({"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]}),
        )
        yield "mts_layer", Scenario({"target_modules": attention, "modules_to_save": ["layers.1"]})
        yield (
            "layer_replication",
            Scenario({"target_modules": everything, "layer_replication": [[0, 2], [1, 2]]}),
        )
        ia3 = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
        yield "ia3_attn", Scenario(ia3, peft_type="IA3")
    if base.model_type in ("jamba", "ernie4_5_moe"):
        yield "all_linear_bias", Scenario({"target_modules": "all-linear", "bias": "all"})


def parameter_scenarios(base: Base, last: int) -> Iterator[tuple[str, Scenario]]:
    """For models with one parameter for all experts."""
    attention, parameters = list(base.attention), list(base.parameters)
    both = {"target_modules": attention, "target_parameters": parameters}
    qualified = [f"block_sparse_moe.{name}" for name in parameters] if base.shared else parameters
    yield "params", Scenario({"target_parameters": parameters})
    yield "params_attn", Scenario(both)
    for name in parameters:
        short = re.sub(r"\W+|weight|experts|mlp", "", name)
        yield f"param_{short}", Scenario({"target_parameters": [name]})
    yield (
        "params_router",
        Scenario({"target_parameters": [*parameters, f"{base.router}.weight"]}),
    )
    yield "params_rslora", Scenario({**both, "use_rslora": True, "r": 3})
    yield "params_r1", Scenario({**both, "r": 1, "lora_alpha": 2})
    yield "params_bf16", Scenario(both, dtype=torch.bfloat16)
    yield "params_fp16", Scenario(both, dtype=torch.float16)
    yield "params_untrained_layer", Scenario(both, untrained=rf".*\.{last}\..*")
    yield "params_mts_router", Scenario({**both, "modules_to_save": [base.router]})
    yield "params_mts_head", Scenario({**both, "modules_to_save": ["lm_head"]})
    yield (
        "params_all_linear",
        Scenario({"target_modules": "all-linear", "target_parameters": qualified}),
    )
    yield (
        "params_rank",
        Scenario({**both, "rank_pattern": {parameters[0]: 2}, "alpha_pattern": {attention[0]: 3}}),
    )
    yield "params_alpha", Scenario({**both, "alpha_pattern": {parameters[-1]: 3}})
    yield "params_bias_all", Scenario({**both, "bias": "all"})
    yield "bias_lora_only", Scenario({"target_modules": attention, "bias": "lora_only"})
    yield "layers", Scenario({**both, "layers_to_transform": [last]})
    yield "exclude", Scenario({**both, "exclude_modules": rf".*\.{last}\..*"})
    block = (
        "mlp" if base.model_type in ("gpt_oss", "qwen3_vl_moe", "jetmoe") else "block_sparse_moe"
    )
    inside = f"{base.prefix}layers.{last}.{block}"
    yield (
        "params_layer",
        Scenario({"target_parameters": [f"{inside}.{name}" for name in parameters]}),
    )
    yield (
        "param_layer_one",
        Scenario(
            {"target_modules": attention, "target_parameters": [f"{inside}.{parameters[-1]}"]}
        ),
    )
    if base.model_type == "gpt_oss":
        biases = [f"{name}_bias" for name in parameters]
        yield "params_and_biases", Scenario({"target_parameters": [*parameters, *biases]})
        yield "param_biases", Scenario({"target_parameters": biases})
    if base.model_type == "jetmoe":
        yield (
            "params_mlp_only",
            Scenario({"target_parameters": [f"mlp.{name}" for name in parameters]}),
        )
        yield (
            "params_attention_only",
            Scenario({"target_parameters": [f"experts.{name}" for name in parameters]}),
        )
    if base.shared:
        yield "params_not_shared", Scenario({"target_parameters": qualified})
        yield (
            "params_and_shared",
            Scenario(
                {
                    "target_modules": rf".*\.{base.shared}\.\w+_(proj|linear)",
                    "target_parameters": qualified,
                }
            ),
        )


FEW = (
    "attn",
    "all_linear",
    "gud",
    "gud_attn",
    "only_gate",
    "gate_up",
    "subset_regex",
    "router",
    "rslora",
    "patterns_*",
    "layers",
    "mts_router",
    "params",
    "params_attn",
    "params_router",
    "param_input_linear",
    "param_gate_up_proj",
    "params_layer",
)

SMALL: dict[str, tuple[str, ...]] = {
    "mixtral": (
        "gud_attn",
        "only_gate",
        "only_up",
        "gate_down",
        "gate_up",
        "rslora",
        "patterns_*",
        "subset_regex",
        "all_linear",
        "router",
        "mts_head",
        "bias_all",
        "trainable_tokens",
        "embedding",
        "dropout",
        "dora",
        "lora_bias",
        "params_embedding",
        "mts_layer",
        "layer_replication",
        "ia3_attn",
    ),
    "qwen2_moe": ("gud_attn", "shared_only", "shared_gate", "bias_all", "patterns_projection"),
    "qwen3_moe": ("gud", "mts_router"),
    "deepseek_v3": ("gud", "all_linear", "patterns_projection"),
    "phimoe": ("gud_attn", "router"),
    "jamba": ("gud_attn", "all_linear_bias"),
    "ernie4_5_moe": ("all_linear_bias", "mts_router"),
    "granitemoe": ("params_attn",),
    "gpt_oss": ("params_attn",),
    "dbrx": ("all_linear",),
    "jetmoe": ("params_attn",),
    "qwen3_vl_moe": ("params",),
    "llava_mixtral": ("language_regex",),
    "qwen3_moe_seqcls": ("gud_attn",),
}


def scenarios(name: str, last: int) -> dict[str, Scenario]:
    """Every scenario that applies to the base of that name; `last` is its last layer."""
    base = BASES[name]
    found = dict(common_scenarios(base))
    if base.parameters:
        found |= parameter_scenarios(base, last)
    elif base.gate:
        found |= expert_scenarios(base, last)
    if base.model_type == "llava":
        leaves = "|".join([*base.projections, *base.attention])
        found["language_regex"] = Scenario({"target_modules": rf".*language_model.*\.({leaves})"})
    if base.model_class.endswith("Model"):
        del found["mts_head"]
    if base.model_class.endswith("ForSequenceClassification"):
        del found["mts_head"]
        for scenario in found.values():
            scenario.lora["task_type"] = "SEQ_CLS"
    for glob in base.without:
        found = {key: item for key, item in found.items() if not fnmatch.fnmatch(key, glob)}
    return found


# ------------------------------------------------------------------------------------ adapters


def randomize(model: peft.PeftModel, scenario: Scenario, seed: int) -> None:
    """Give every trained parameter a random value that its dtype in the file holds exactly."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            drawn = torch.randn(weight.shape, generator=noise)
            if "lora_embedding_A" in name:
                weight.copy_(0.5 * drawn)
            elif ".lora_A." in name:
                weight.copy_(drawn * weight.shape[1] ** -0.5)
            elif ".lora_B." in name or "lora_embedding_B" in name:
                weight.copy_(0.1 * drawn)
                if scenario.untrained and re.fullmatch(scenario.untrained, name):
                    weight.zero_()
            else:  # a bias, a magnitude, a factor of IA3, a token, a whole module: near what it was
                weight.add_(0.1 * drawn)
            weight.copy_(weight.to(scenario.dtype).float())


def write_case(
    folder: Path, base_model: transformers.PreTrainedModel, inputs: Inputs, item: Scenario
) -> str:
    """Save the adapter and its outputs; return how large its effect is, in words."""
    model = peft.get_peft_model(copy.deepcopy(base_model), item.config()).eval()
    randomize(model, item, zlib.crc32(folder.name.encode()))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(item.dtype)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # the model card's template
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base_model), str(folder)).eval()
    with torch.no_grad():  # of what the file holds: bias="lora_only", for one, saves no bias
        output, plain = output_of(loaded, inputs), output_of(base_model, inputs)
    if not output.isfinite().all():
        raise ValueError("the output is not finite")
    effect = (output - plain).abs().max().item()
    if effect < 1e-2:
        raise ValueError(f"the adapter's effect is only {effect:.1e}")
    recorded = {f"input.{name}": value for name, value in inputs.items()}
    recorded |= {"ref": output.contiguous(), "ref_base": plain.contiguous()}
    save_file(recorded, folder / "reference.safetensors")
    return f"effect {effect:.2g} of {plain.abs().max():.2g}"


# ---------------------------------------------------------------------------------------- main


def wanted(name: str, chosen: str) -> tuple[str, ...]:
    """The globs of the scenarios that the set has for that base."""
    if chosen == "small":
        return SMALL.get(name, ())
    return FEW if BASES[name].few else ("*",)


def make(out: Path, chosen: str, only: str) -> list[str]:
    """Write the set, and the index after every case; return what could not be made."""
    index_file, size, failures = out / "index.json", SIZES[chosen], []
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    for name, base in BASES.items():
        globs, seed = wanted(name, chosen), zlib.crc32(name.encode())
        layers = base.settings(size).get("num_hidden_layers", size.layers)
        last = size.layers - 1 if base.model_type == "longcat_flash" else layers - 1
        cases = {
            f"{name}__{scenario}": item
            for scenario, item in scenarios(name, last).items()
            if any(fnmatch.fnmatch(scenario, glob) for glob in globs)
            and fnmatch.fnmatch(f"{name}__{scenario}", only)
        }
        if not cases:
            continue
        try:
            model = build(base, size, seed)
            inputs = choose_inputs(model, size, seed)
            model.save_pretrained(out / "bases" / name)
        except Exception as error:  # a model that this transformers cannot build: go on
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print("FAILED", failures[-1], flush=True)
            continue
        for case, item in cases.items():
            try:
                effect = write_case(out / "cases" / case, model, inputs, item)
            except Exception as error:  # nor what peft cannot set up
                shutil.rmtree(out / "cases" / case, ignore_errors=True)
                failures.append(f"{case}: {type(error).__name__}: {error}")
                print("FAILED", failures[-1], flush=True)
                continue
            about = {"model_class": base.model_class, "base": name, "peft_type": item.peft_type}
            index[case] = about
            index_file.write_text(json.dumps(index, indent=1) + "\n")
            print(f"{case}: {effect}", flush=True)
    return failures


def main() -> None:
    """Read the arguments, check the versions, make the set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write; new, or with --only extended")
    parser.add_argument("--set", choices=list(SIZES), default="small", dest="chosen")
    parser.add_argument("--only", default="*", help="a glob over case names (BASE__SCENARIO)")
    args = parser.parse_args()
    if transformers.__version__.split(".")[0] != "4" or not peft.__version__.startswith("0.18."):
        sys.exit(
            "make_golden.py needs transformers 4 and peft 0.18 (it records what they do), not "
            f"transformers {transformers.__version__} and peft {peft.__version__}"
        )
    if args.only == "*" and args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty: remove it first, or choose cases with --only")
    if "PYTHONHASHSEED" not in os.environ:  # peft writes sets as lists: keep their order the same
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of what peft would rather not do
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    failures = make(args.out, args.chosen, args.only)
    if failures:
        print(f"\n{len(failures)} could not be made:", *failures, sep="\n  ")


if __name__ == "__main__":
    main()
