"""Fields of config.json in the names of either version."""

import pytest
from checkpoints.models import mixtral, snapshot, write_folder

import regraft
from regraft.checkpoints import prepare
from regraft.checkpoints.config import V4, V5, convert_config
from regraft.checkpoints.source import open_checkpoint
from regraft.errors import BadInputError
from regraft.planning.model import check_sizes

PAIRS = [
    (
        {"model_type": "mixtral", "rope_theta": 1e6, "vocab_size": 3},
        {
            "model_type": "mixtral",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 3,
        },
    ),
    (
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    (
        {
            "model_type": "gpt_oss",
            "rope_theta": 1.5e5,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0},
        },
        {
            "model_type": "gpt_oss",
            "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "rope_theta": 1.5e5},
        },
    ),
    (
        {"model_type": "glm4_moe", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {
            "model_type": "glm4_moe",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    (
        {"model_type": "llava", "text_config": {"model_type": "qwen3_moe", "num_experts": 4}},
        {"model_type": "llava", "text_config": {"model_type": "qwen3_moe", "num_local_experts": 4}},
    ),
    (
        {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
        {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]},
    ),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0]["model_type"])
def test_there_and_back(pair):
    old, new = pair
    assert convert_config(old, V5)[0] == new
    assert convert_config(new, V4)[0] == old
    assert convert_config(new, V5) == (new, [])
    assert convert_config(old, V4) == (old, [])


def test_what_a_version_has_not_said_stays_unsaid():
    assert convert_config({"model_type": "mixtral"}, V5) == ({"model_type": "mixtral"}, [])
    strange = {"model_type": "x", "rope_theta": "big", "rope_parameters": {"full_attention": {}}}
    assert convert_config(strange, V5)[0] == convert_config(strange, V4)[0] == strange


def test_old_spelling_of_the_type():
    old = {"model_type": "x", "rope_theta": 1.0, "rope_scaling": {"type": "linear", "factor": 2}}
    rope = convert_config(old, V5)[0]["rope_parameters"]
    assert rope == {"rope_type": "linear", "factor": 2, "rope_theta": 1.0}


def test_ties_are_those_of_the_whole_model():
    new = {
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen3_vl_moe_text", "tie_word_embeddings": True},
    }
    assert convert_config(new, V4)[0]["text_config"]["tie_word_embeddings"] is False
    assert convert_config(new, V5)[0] == new


def test_a_dilation_that_version_5_does_not_take():
    config = {"model_type": "detr", "dilation": None}
    assert convert_config(config, "transformers-v5")[0] == {"model_type": "detr", "dilation": False}
    assert convert_config(config, "transformers-v4")[0] == config


@pytest.mark.parametrize("kind", [["llama"], {"a": 1}, 3])
@pytest.mark.parametrize("within", [True, False])
def test_a_model_type_that_is_no_text_is_an_error(kind, within):
    config = {"model_type": "mixtral", "text_config": {"model_type": kind}}
    with pytest.raises(BadInputError) as caught:
        check_sizes(config if within else {"model_type": kind}, "config.json")
    (finding,) = caught.value.findings
    assert finding.code == "model-config" and finding.key.endswith("model_type")


def test_a_config_that_changes_meanwhile_is_that_of_the_beginning(tmp_path, monkeypatch):
    """It is read once, with the headers: no part of the work sees another one."""
    src = write_folder(tmp_path / "src", mixtral())
    regraft.convert(src, tmp_path / "wanted", to=V5)
    look = prepare.find_companions

    def later(source, config):
        (src / "config.json").write_text("{}")
        return look(source, config)

    monkeypatch.setattr(prepare, "find_companions", later)
    regraft.convert(src, tmp_path / "out", to=V5)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")


def test_a_config_that_is_none_matters_to_those_who_need_it(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    (src / "config.json").write_text("{")
    assert open_checkpoint(src).tensors.names
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    assert [finding.code for finding in caught.value.findings] == ["not-json"]
