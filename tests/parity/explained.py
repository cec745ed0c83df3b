"""Why a class differs where it does: facts about transformers, looked up in its code and tried out."""

_THINKER = (
    "transformers adds its prefix once for the model and once for the model in it when it saves "
    "(`thinker.model.thinker.…`), and cannot read that; regraft writes and reads `thinker.…`"
)
_ERNIE = (
    "its experts for text and for vision have different sizes, and stand in one list in the old "
    "layout; regraft has no equation for that and refuses, with this reason"
)
_TURNED = (
    "transformers saves these stacks as the model has them, under names that are the same in both layouts; only their "
    "shapes tell, and regraft takes such a file for what it is, one of the new layout"
)
_HEADS = "the tiny model has fewer key than query heads, and the registry cuts into equal parts; both refuse"
_EXPLAINED = {
    "Nemotron3_5TranscribeForConditionalGeneration": _HEADS,
    "Nemotron3_5TranscribeModel": _HEADS,
    "Qwen3VLMoeForConditionalGeneration": _TURNED,
    "Qwen3VLMoeModel": _TURNED,
    "Dots3NoteForConditionalGeneration": (
        "transformers writes `model.model.audio_encoder.dots_encoder.…` for six tensors of its audio encoder only "
        "through a doubled prefix; regraft refuses these names and writes others, which transformers loads"
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": _ERNIE,
    "Ernie4_5_VLMoeModel": _ERNIE,
    "Ernie4_5_VL_MoeForConditionalGeneration": _ERNIE,
    "Ernie4_5_VL_MoeModel": _ERNIE,
    "JevForDecision": "transformers 5.23 cannot load this class at all: its config is no config there",
    "PixioBackbone": "one module stands in two places, and transformers loads the values of either",
    "Qwen2_5OmniThinkerForConditionalGeneration": _THINKER,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _THINKER,
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "an abstract class without tensors",
}


def explain(name: str) -> str:
    """The reason for a class; empty where there is none."""
    return _EXPLAINED.get(name, "")
