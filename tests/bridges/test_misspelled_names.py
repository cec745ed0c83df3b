"""Names with segments too many, as a release saved them: the model's own names decide, and it is said.

Source: what transformers 5.4 saves of Qwen3.5; its renames of the model inside act on the whole model.
"""

import json

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.4")

CLASS = "Qwen3_5ForConditionalGeneration"
TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
VISION = {
    "model_type": "qwen3_5",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 16,
}
CONFIG = {
    "model_type": "qwen3_5",
    "architectures": [CLASS],
    "text_config": TEXT,
    "vision_config": VISION,
}
TWICE = "model.language_model.language_model.language_model."


@pytest.fixture(scope="module")
def own():
    from regraft.bridges.transformers.building import build, make_config

    model = build(getattr(transformers, CLASS), make_config("qwen3_5", CONFIG))
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
        for name, tensor in model.state_dict().items()
    }


def spell(name):
    name = name.replace("model.language_model.", TWICE)
    return name.replace("model.visual.", "model.language_model.visual.")


def save(path, tensors):
    path.mkdir()
    write_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_they_are_read_as_the_model_has_them(own, tmp_path):
    src = save(tmp_path / "src", {spell(name): tensor for name, tensor in own.items()})
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5")
    made = open_tensors(tmp_path / "new" / "model.safetensors")
    assert made.keys() == own.keys()
    assert all(np.array_equal(made[name], tensor) for name, tensor in own.items())
    (note,) = [note for note in report.notes if "segments" in note]
    assert "language_model" in note and f"{TWICE}embed_tokens.weight as model.lang" in note


@pytest.mark.parametrize(
    "extra", ["model.language_model.nothing.weight", "model.visual.pos_embed.weight"]
)
def test_only_where_all_of_them_can_be(own, tmp_path, extra):
    """Nothing is repaired beside a name that nothing explains, or over one that is there."""
    tensors = {spell(name): tensor for name, tensor in own.items()}
    shape = own["model.visual.pos_embed.weight"].shape
    src = save(tmp_path / "src", {**tensors, extra: np.ones(shape, np.float32)})
    with pytest.raises(regraft.UnmatchedKeysError, match="language_model"):
        regraft.convert(src, tmp_path / "new", to="transformers-v5")
