"""Scales: rsLoRA, ranks of their own, DoRA's norms, alphas that are not numbers of float32.

Sources: invoke-ai/InvokeAI#9517, sgl-project/sglang#40835, huggingface/diffusers#14409. Keys and shapes are rebuilt.
"""

import numpy as np
import pytest
from rebuilt import V5, codes, config_of, lora, numbered, read, write_adapter, write_base

import regraft

MIXED = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.down_proj": (16, 6)}


def dense(folder):
    return write_base(folder, "llama", num_hidden_layers=1)


def test_rslora_keeps_its_scale_where_ranks_add(tmp_path):
    """r 16 and alpha 16 are a scale of 4; twice the rank must not make it 2.83."""
    model = write_base(tmp_path / "base", "mixtral", num_hidden_layers=1, num_local_experts=2)
    modules = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}": (16, 6) if w == "w2" else (6, 16)
        for e in range(2)
        for w in ("w1", "w2", "w3")
    }
    src = write_adapter(
        tmp_path / "src",
        lora(modules, 16),
        r=16,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["w1", "w2", "w3"],
    )
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert regraft.verify(src, tmp_path / "new", model=model)


def test_a_tool_without_rslora_gets_the_alpha_of_the_scale(tmp_path):
    src = write_adapter(
        tmp_path / "src",
        lora({"model.layers.0.self_attn.q_proj": (16, 16)}, 16),
        r=16,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj"],
    )
    regraft.convert(src, tmp_path / "new", to="mlx", model=dense(tmp_path / "base"))
    config = config_of(tmp_path / "new")
    assert config["lora_parameters"]["scale"] == 4.0


def test_ranks_of_their_own_keep_each_scale(tmp_path):
    """Ranks 2 and 8 with alphas 2 and 8: every module's scale is 1."""
    shapes = lora({"model.layers.0.mlp.down_proj": (16, 6)}, 2)
    shapes |= lora({"model.layers.0.self_attn.q_proj": (16, 16)}, 8)
    src = write_adapter(
        tmp_path / "src",
        shapes,
        r=8,
        lora_alpha=8,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 2},
        target_modules=["q_proj", "down_proj"],
    )
    model = dense(tmp_path / "base")
    regraft.convert(src, tmp_path / "new", to="mlx", model=model)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V5, model=model)
    old, new = read(src), read(tmp_path / "back")
    config = config_of(tmp_path / "back")
    for name, (_, rank) in {"down_proj": (0, 2), "q_proj": (1, 8)}.items():
        a, b = (
            next(v for k, v in new.items() if name in k and f"lora_{letter}" in k)
            for letter in "AB"
        )
        r = config["rank_pattern"].get(name, config["r"])
        r = next((v for k, v in config["rank_pattern"].items() if k.endswith(name)), r)
        alpha = next(
            (v for k, v in config["alpha_pattern"].items() if k.endswith(name)),
            config["lora_alpha"],
        )
        a0, b0 = (
            next(v for k, v in old.items() if name in k and f"lora_{letter}" in k)
            for letter in "AB"
        )
        assert np.allclose(alpha / r * b @ a, b0 @ a0), (name, rank)


@pytest.mark.parametrize("alpha", [1e300, 1e308, float("inf")])
def test_scales_beyond_float32_are_an_error(alpha, tmp_path):
    """What gate and up are joined by is the ratio of their scales."""
    model = write_base(tmp_path / "base", "mixtral", num_hidden_layers=1)
    at = "model.layers.0.block_sparse_moe.experts."
    shapes = lora({f"{at}{e}.{w}": (6, 16) for e in range(4) for w in ("w1", "w3")})
    src = write_adapter(
        tmp_path / "src", shapes, alpha_pattern={"w1": alpha}, target_modules=["w1", "w3"]
    )
    with pytest.raises(regraft.RegraftError):
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert not (tmp_path / "new").exists()


def test_numbers_that_are_none_are_never_equal(tmp_path):
    model = write_base(tmp_path / "base", "mixtral", num_hidden_layers=1)
    shapes = lora({"model.layers.0.block_sparse_moe.experts.0.w1": (6, 16)})
    tensors = {k: np.full_like(v, np.nan) for k, v in numbered(shapes).items()}
    src = write_adapter(tmp_path / "src", tensors, target_modules=["w1"])
    try:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    except regraft.RegraftError:
        return
    assert not regraft.verify(src, tmp_path / "new", model=model)


def test_doras_norms_of_another_axis_are_refused(tmp_path):
    """PEFT has a norm for each output, `dora_scale` may have one for each input: a square layer hides it."""
    at = "base_model.model.model.layers.0.self_attn.q_proj."
    shapes = lora({"model.layers.0.self_attn.q_proj": (16, 16)})
    shapes |= {f"{at}dora_scale": (1, 16)}
    src = write_adapter(tmp_path / "src", shapes, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=dense(tmp_path / "base"))
    assert codes(caught)


def test_a_vocabulary_of_another_size_is_an_error(tmp_path):
    model = dense(tmp_path / "base")
    shapes = lora({"model.layers.0.self_attn.q_proj": (16, 16)})
    shapes |= {
        "base_model.model.model.embed_tokens.lora_embedding_A": (2, 16),
        "base_model.model.model.embed_tokens.lora_embedding_B": (16, 2),
    }
    src = write_adapter(tmp_path / "src", shapes, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) == {"vocabulary"}
