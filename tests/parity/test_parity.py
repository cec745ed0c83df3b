"""A sample of `make parity`: what regraft and the installed transformers make of one file is the same."""

import pytest
from making import slow_but

transformers = pytest.importorskip("transformers")

from compare import judge  # noqa: E402
from tiny import shrink  # noqa: E402

SAMPLE = [
    "AltCLIPModel",
    "CLIPModel",
    "DeepseekV4ForCausalLM",
    "DetrForObjectDetection",
    "Dinov2Model",
    "EsmModel",
    "GptOssForCausalLM",
    "GradiumPhononTTSModel",
    "HunYuanMoEV1Model",
    "LlavaForConditionalGeneration",
    "MixtralForSequenceClassification",
    "Molmo2TextModel",
    "PaliGemmaForConditionalGeneration",
    "Qwen2VLModel",
    "Qwen3MoeForCausalLM",
    "Sam3TrackerModel",
    "Step3p7Model",
    "ViTForImageClassification",
]


@pytest.mark.parametrize("name", slow_but(SAMPLE[:3], SAMPLE))
def test_regraft_and_transformers_agree(name):
    cls = getattr(transformers, name)
    verdict = judge(cls, shrink(cls.config_class()))
    assert verdict.keys > 10
    assert verdict.differences == []


def test_a_difference_would_be_seen(monkeypatch):
    import compare

    cls = transformers.MixtralModel
    real = compare.convert

    def wrong(state, books, to):
        plan, made = real(state, books, to)
        key = next(iter(made))
        return plan, {**made, key: made[key] + 1}

    monkeypatch.setattr(compare, "convert", wrong)
    assert judge(cls, shrink(cls.config_class())).differences
