"""Tensors of a file that a live model has no place for, and need not have."""

from __future__ import annotations

import inspect

from regraft.bridges.transformers.imported import Imported
from regraft.live.mapping import Mapping
from regraft.live.ruled import Ruled
from regraft.names.live import LiveModel
from regraft.names.modules import without_wrappers
from regraft.names.resolve import Part, Resolved
from regraft.rules.mtp import WHY as MTP

_POOLER = "pooler."
_MAKES_POOLER = "add_pooling_layer"
"""The argument by which classes of transformers are made with a pooler or without."""


def left_out(target: Mapping, resolved: Resolved) -> tuple[dict[str, str], dict[str, str]]:
    """The unmatched keys that may be, each with the reason: those that are computed or ignored, and those that count.

    The second are a head's around a base model, or the pooler's of a model without one. A head's keys stand beside
    those that have the base model's prefix, which the base model alone has not.
    """
    quiet: dict[str, str] = {}
    loud: dict[str, str] = {}
    for part in resolved.parts if resolved.unmatched else ():
        model, imported = target.live.models[part.model], target.imported[part.model]
        outer = _around(part, model)
        mtp = mtp_of(imported, part, resolved)
        for key in resolved.unmatched:
            inside = key.startswith(part.prefix)
            if key in mtp:
                quiet[key] = MTP
                continue
            known = imported.unwanted(key[len(part.prefix) :]) if inside else None
            if known is not None:
                quiet[key] = known[0]
            elif outer is not None and key.startswith(outer[0]) and not key.startswith(outer[1]):
                loud[key] = f"{imported.name} has no head"
            elif inside and _is_pooler(key[len(part.prefix) :], model):
                loud[key] = f"{imported.name} was made without a pooler"
    return quiet, {key: why for key, why in loud.items() if key not in quiet}


def mtp_of(imported: Imported | Ruled, part: Part, resolved: Resolved) -> dict[str, str]:
    """The unmatched keys of a part that are of layers for predicting further tokens: as they are without wrappers."""
    left = [key for key in resolved.unmatched if key.startswith(part.prefix)]
    if not left:
        return {}
    bare = {key: without_wrappers(key[len(part.prefix) :]) for key in left}
    found = imported.mtp_among(list(bare.values())).names()
    return {key: name for key, name in bare.items() if name in found}


def _around(part: Part, model: LiveModel) -> tuple[str, str] | None:
    """What stands before a head's keys, and before the base model's; ``None`` where the file is of no head model."""
    base = f"{model.submodels[0].base_model_prefix}."
    if base == "." or any(key.startswith(base) for key in model.keys):
        return None
    shifted = all(key.startswith(base) for key in part.keys)
    inner = part.prefix + base if shifted else part.prefix
    if inner != base and not inner.endswith(f".{base}"):
        return None
    return inner.removesuffix(base), inner


def _is_pooler(key: str, model: LiveModel) -> bool:
    """Whether a key is of a pooler that a model, or the base model in it, could have and has not."""
    module = model.module
    path = ""
    base = model.submodels[0].base_model_prefix
    if any(submodel.path == base for submodel in model.submodels[1:]):
        module, path = module.base_model, f"{base}."
    if not key.removeprefix(f"{base}.").startswith(_POOLER):
        return False
    asked = inspect.signature(type(module).__init__).parameters
    return _MAKES_POOLER in asked and not any(k.startswith(path + _POOLER) for k in model.keys)
