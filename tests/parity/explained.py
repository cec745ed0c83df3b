"""Why a class differs where it does: facts about transformers, looked up in its code and tried out."""

_THINKER = (
    "transformers adds its prefix once for the model and once for the model in it when it saves "
    "(`thinker.model.thinker.…`), and cannot read that; regraft writes and reads `thinker.…`"
)
_ERNIE = (
    "with the config's default its experts for text and for vision have different sizes, one list of experts in the old "
    "layout; regraft has no equation for that and refuses, with this reason"
)
_EXPLAINED = {
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
