"""Why a class differs where it does: facts about transformers, looked up in its code and tried out."""

_THINKER = (
    "transformers takes its prefix off once for the model and once for the model in it, adds it twice when it saves "
    "(`thinker.model.thinker.…`), and cannot read that; regraft writes what transformers 4 did, without it"
)
_ERNIE = (
    "its experts for text and for vision have different sizes, and stand in one list in the old "
    "layout; regraft has no equation for that and refuses, with this reason"
)
_TURNED = (
    "transformers saves these stacks as the model has them, under names that are the same in both layouts; only their "
    "shapes tell, and regraft takes such a file for what it is, one of the new layout"
)
_STACKS_TWICE = (
    "two converters make one stack of experts, from names of different makers; regraft takes the one of the whole "
    "model and refuses files in the other's names"
)
_EXPLAINED = {
    "Qwen3VLMoeForConditionalGeneration": _TURNED,
    "Qwen3VLMoeModel": _TURNED,
    "Ernie4_5_VLMoeForConditionalGeneration": _ERNIE,
    "Ernie4_5_VLMoeModel": _ERNIE,
    "Ernie4_5_VL_MoeForConditionalGeneration": _ERNIE,
    "Ernie4_5_VL_MoeModel": _ERNIE,
    "Nemotron3_5TranscribeForConditionalGeneration": _STACKS_TWICE,
    "Nemotron3_5TranscribeModel": _STACKS_TWICE,
    "OneFormerForUniversalSegmentation": (
        "its `criterion.logit_scale` is made as float64 whatever type is asked for: transformers loads the number of "
        "a float32 file into it, so that the value is the same and the type is not"
    ),
    "PixioBackbone": (
        "it has `layernorm` and `pixio.layernorm`; transformers puts the base model's prefix before the first when it "
        "reads it, so that both go to one place; regraft leaves a key where the model has it"
    ),
    "Qwen2_5OmniThinkerForConditionalGeneration": _THINKER,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _THINKER,
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "an abstract class without tensors",
}
_WHOLE = (
    "before 5.12 the renames of a model inside act on the whole model, and on every place in a name; transformers "
    "saves names that it cannot read"
)
_UNSCOPED = {
    "ColPaliForRetrieval": (
        "before 5.12 `vlm` is a pattern for its head as well: transformers looks for `vlm.model.lm_head`, which is "
        "not there, and only the tie with the embedding fills the head"
    ),
    "Gemma3nForCausalLM": (
        "before 5.12 a rename acts on every place in a name: transformers saves "
        "`model.language_model.per_layer_model.language_model_projection`"
    ),
    "Qwen3_5ForConditionalGeneration": _WHOLE,
    "Qwen3_5MoeForConditionalGeneration": _WHOLE,
    "Sam3VideoModel": (
        "before 5.12 the renames of its tracker act on its detector, too: transformers saves "
        "`detector_model.detector_model.…`; regraft knows these names of no release and refuses"
    ),
}


_RENAMED_TWICE = {
    "RfDetrForInstanceSegmentation": (
        "5.12 adds `model.` to every name once for each of the models around, and `model.transformer.enc_output` is "
        "what it saves; it reads `transformer.enc_output` as well, which is what regraft writes"
    ),
}


def explain(name: str, release: str) -> str:
    """The reason for a class in a release; empty where there is none."""
    minor = tuple(int(part) for part in release.split(".")[:2])
    special = _UNSCOPED if minor < (5, 12) else _RENAMED_TWICE if minor < (5, 16) else {}
    return special.get(name, "") or _EXPLAINED.get(name, "")
