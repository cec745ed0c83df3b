"""Models made from scratch, as transformers 4 reads them: names that were loaded there, with equal outputs."""

import pytest
import torch
import transformers
from holders import compiled, fsdp2, mixtral, vit
from making import slow_but

import regraft

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}
TEXTS = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
TEXTS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llava():
    vision = {**IMAGES, "model_type": "clip_vision_model"}
    text = {**SIZES, "model_type": "llama", "vocab_size": 32, "num_key_value_heads": 2}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config)


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = transformers.DetrConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
    )
    return transformers.DetrForObjectDetection(config)


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        vocab_size=32,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    return transformers.Qwen2MoeForCausalLM(config)


MODELS = {
    "clip vision": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES)),
        39,
        {"vision_model"},
        [
            "vision_model.encoder.layers.1.self_attn.q_proj.weight",
            "vision_model.pre_layrnorm.bias",
        ],
    ),
    "clip text": (
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXTS)),
        36,
        {"text_model"},
        ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"],
    ),
    "siglip vision": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGES)),
        48,
        {"vision_model"},
        [
            "vision_model.head.attention.in_proj_weight",
            "vision_model.encoder.layers.0.mlp.fc1.bias",
        ],
    ),
    "llava": (
        llava,
        64,
        {"language_model", "vision_tower", "multi_modal_projector"},
        [
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "language_model.lm_head.weight",
            "vision_tower.vision_model.encoder.layers.1.layer_norm2.weight",
        ],
    ),
    "vit": (
        vit,
        40,
        {"vit", "classifier"},
        ["vit.encoder.layer.1.attention.attention.query.weight", "classifier.bias"],
    ),
    "vit alone": (
        lambda: vit(head=False),
        40,
        {"embeddings", "encoder", "layernorm", "pooler"},
        ["encoder.layer.0.attention.output.dense.weight"],
    ),
    "detr": (
        detr,
        85,
        {"model", "class_labels_classifier", "bbox_predictor"},
        [
            "model.encoder.layers.0.fc1.weight",
            "model.decoder.layers.0.encoder_attn.out_proj.weight",
            "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight",
        ],
    ),
    "mixtral": (
        mixtral,
        41,
        {"model", "lm_head"},
        [
            "model.layers.1.block_sparse_moe.experts.3.w3.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ],
    ),
    "qwen2_moe": (
        qwen2_moe,
        55,
        {"model", "lm_head"},
        [
            "model.layers.1.mlp.experts.3.gate_proj.weight",
            "model.layers.0.mlp.shared_expert.up_proj.weight",
        ],
    ),
}
"""How many names there are, what they begin with, and some of them."""


@pytest.mark.parametrize("name", slow_but(["vit alone"], MODELS))
def test_from_scratch_as_transformers_4_reads_it(name):
    make, count, starts, some = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = regraft.convert_state_dict(weights, to="transformers-v4", model=model)
    assert len(plain) == count
    assert {key.partition(".")[0] for key in plain} == starts
    assert plain.keys() >= set(some)
    for wrap in (compiled, fsdp2):
        wrapped = wrap(model)
        made = regraft.convert_state_dict(wrapped.state_dict(), to="transformers-v4", model=wrapped)
        assert made.keys() == plain.keys()
        assert all(torch.equal(made[key], plain[key]) for key in plain)
    back = regraft.convert_state_dict(plain, to=make())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
