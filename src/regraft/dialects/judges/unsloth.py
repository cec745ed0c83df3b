"""What Unsloth does with an adapter: it is PEFT's loader, with its own reading of packed experts.

Source: unsloth_zoo 2026.10.9, ``temporary_patches/moe_utils.py``; PEFT 0.21.2 for everything else.
"""

from __future__ import annotations

from regraft.dialects.judges.peft_like import (
    EXPERT,
    STACK,
    PeftLike,
    beyond_layers,
    doubled,
    not_read,
    swapped,
)
from regraft.dialects.judging import FAILS, IGNORED, LOADED, WRONG_VALUES, Files, Judgement
from regraft.dialects.peft.config import targets_module, targets_parameter
from regraft.errors import RegraftError


class UnslothReader:
    """Unsloth on transformers 5 and PEFT 0.19 or later."""

    tool = "unsloth"
    versions = ("2026.10.9",)
    basis = "its source"
    to = "unsloth"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if not_read(files, "Unsloth", judged):
            return judged
        source = PeftLike.of(files)
        config = source.config
        if files.dialect == "nemo" and any(m.packed for m in source.modules.values()):
            judged.notes.append("NeMo's stamp is not read: in and out are taken as PEFT has them")
        alone = all(EXPERT.fullmatch(path) for path in source.modules)
        replicated = bool(config.get("layer_replication"))
        for name in source.others:
            known = "magnitude" in name or "lora_" not in name or ".lora_B.bias" in name
            judged.add(
                name, LOADED if known else IGNORED, "" if known else "PEFT knows no such key"
            )
        for module in source.modules.values():
            name = source.name_of(module)
            try:
                named = targets_module(
                    config.get("target_modules"), module.path
                ) or targets_parameter(config.get("target_parameters"), f"{module.path}.weight")
                named = named or targets_parameter(config.get("target_parameters"), name)
            except RegraftError:
                named = False
            scale = source.scale(module)
            if module.b is None:
                judged.add(module.path, IGNORED, "it has no lora_B, which stays zero")
            elif module.a is None:
                why = "it has no lora_A, which stays as it is initialised"
                judged.add(module.path, WRONG_VALUES, why)
            elif module.bare:
                judged.add(module.path, IGNORED, "its keys have no 'base_model.model.' before them")
            elif STACK.fullmatch(module.path) or module.leaf == "unembed_tokens":
                judged.add(module.path, IGNORED, "no module of the model has this path")
            elif module.packed and swapped(source, module, files.model) and not _both_ways(files):
                judged.add(
                    module.path, FAILS, "PEFT before 0.19 packed it with in and out exchanged"
                )
            elif EXPERT.fullmatch(module.path) and not _converts(files):
                # PEFT raises where no module at all has a name of target_modules.
                why = "transformers 5 has no module for a single expert"
                judged.add(module.path, FAILS if alone else IGNORED, why)
            elif not named:
                judged.add(
                    module.path, IGNORED, "neither target_modules nor target_parameters name it"
                )
            elif not replicated and (doubled(module.path) or beyond_layers(module, files.model)):
                judged.add(module.path, IGNORED, "no module of the model has this path")
            elif scale is not None and not module.packed and module.a[0] % scale.rank:
                judged.add(
                    module.path, FAILS, f"its rank is {module.a[0]}, and the config's {scale.rank}"
                )
            elif misfit := source.misfit(module):
                judged.add(module.path, FAILS, misfit.reason)
            else:
                judged.add(module.path, LOADED)
        return judged


def _both_ways(files: Files) -> bool:
    return "gpt_oss" in files.types


def _converts(files: Files) -> bool:
    """Whether PEFT itself moves the experts of this model type when it loads an adapter."""
    from regraft.rules.book import library

    return any(name in book.reclaimed_model_types for book in library() for name in files.types)


READER = UnslothReader()
__all__ = ["READER", "WRONG_VALUES", "UnslothReader"]
