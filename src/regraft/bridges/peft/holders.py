"""Finding the model that an adapter is for, inside whatever holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from regraft.adapters.protocol import Opened
from regraft.bridges.peft.known import Adapter, Arriving, below, convert_for
from regraft.bridges.peft.slots import base_slots, inner_name
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import AmbiguousError, BadInputError, Finding, RegraftError
from regraft.names.live import walk_modules


@dataclass(frozen=True, slots=True)
class Place:
    """A model in a holder."""

    path: str
    """Where it stands, wrappers left out; empty for the holder itself."""
    base: Any
    """The transformers model that an adapter's names are relative to, or a module of the user's own."""
    peft_model: PeftModel | None
    """The ``PeftModel`` around it, if there is one."""

    @property
    def label(self) -> str:
        """The place for people."""
        return f"{self.path or 'the model'} ({type(self.base).__name__})"


def find_models(root: Any) -> list[Place]:
    """The outermost models in ``root``, each once; ``root`` may be a module or any object with models as attributes."""
    places: dict[int, Place] = {}
    for place in _models_below(root, "", None):
        places.setdefault(id(place.base), place)
    return list(places.values())


def find_peft_models(root: Any) -> list[Place]:
    """Each ``PeftModel`` in ``root`` that is around a module of the user's own."""
    modules = [root] if isinstance(root, nn.Module) else [m for _, m in walk_modules(root)]
    found = {id(m): m for top in modules for m in top.modules() if isinstance(m, PeftModel)}
    return [Place("", model.get_base_model(), model) for model in found.values()]


def _models_below(node: Any, path: str, around: PeftModel | None) -> Iterator[Place]:
    if isinstance(node, PeftModel):
        yield from _models_below(node.get_base_model(), path, node)
    elif isinstance(node, PreTrainedModel):
        yield Place(path, node, around)
    elif isinstance(node, nn.Module):
        wrapped = inner_name(node)
        for name, child in node._modules.items():
            if child is not None:
                below = path if name == wrapped else _join(path, name)
                yield from _models_below(child, below, around)
    else:
        for prefix, module in walk_modules(node):
            yield from _models_below(module, prefix[:-1], around)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def choose(root: Any, source: Opened, arriving: Arriving | None = None) -> tuple[Place, Adapter]:
    """The model in ``root`` that an adapter is for, and the adapter in its layout.

    An adapter fits where its names are there, as they are or without the model's path in the holder before them; it
    must fit one model only. ``arriving`` are values that the models are about to be given.

    Raises ``BadInputError`` where there is no model or it fits none of several, ``AmbiguousError`` where it fits
    several; and what the conversion raises where there is one model only.
    """
    places = find_models(root)
    if not places:
        raise BadInputError(
            Finding(
                "no-model",
                f"there is no transformers model in this {type(root).__name__}",
                where=source.where,
                fix="give a PreTrainedModel, a PeftModel, or something that holds one; for another model convert the "
                "adapter's files (regraft.convert) and load them with PEFT",
            )
        )
    fitting: list[tuple[Place, Adapter]] = []
    failed: list[RegraftError] = []
    for place in places:
        try:
            fitting.append((place, _fitted(place, source, arriving)))
        except RegraftError as error:
            failed.append(error)
    if len(fitting) == 1:
        return fitting[0]
    if len(places) == 1:
        raise failed[0]
    if not fitting:
        raise BadInputError(
            _misfit(place, str(error), source) for place, error in zip(places, failed, strict=True)
        )
    names = " and ".join(place.label for place, _ in fitting)
    raise AmbiguousError(
        Finding(
            "which-target",
            f"the adapter fits several models in this {type(root).__name__}: {names}",
            where=source.where,
            fix="give the model itself instead of what holds it",
        )
    )


def _fitted(place: Place, source: Opened, arriving: Arriving | None) -> Adapter:
    """The adapter for one model.

    Raises what the conversion raises, and ``BadInputError`` where names are not there.
    """
    try:
        return _landing(place, source, arriving)
    except RegraftError:
        bare = below(source, place.path)
        if bare is None:
            raise
    return _landing(place, bare, arriving)


def _landing(place: Place, source: Opened, arriving: Arriving | None) -> Adapter:
    adapter = convert_for(place.base, source, arriving)
    odd = strangers(place.base, adapter)
    if odd:
        raise BadInputError(
            Finding(
                "no-place",
                f"the {type(place.base).__name__} has no such module",
                where=source.where,
                key=name,
                fix="give the model that the adapter was trained on",
            )
            for name in odd
        )
    return adapter


def _misfit(place: Place, why: str, source: Opened) -> Finding:
    return Finding(
        "wrong-base",
        f"it does not fit {place.label}: {why}",
        where=source.where,
        fix="give the model that the adapter was trained on",
    )


def strangers(base: nn.Module, adapter: Adapter) -> list[str]:
    """The modules that an adapter's keys name and ``base`` has not; none where its layers are yet to be repeated."""
    if adapter.config.get("layer_replication"):
        return []
    tree = {"": None}
    tensors = base_slots(base)
    for name in tensors:
        parts = name.split(".")[:-1]
        tree |= dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts)))
    odd: dict[str, None] = {}
    for key in adapter.tensors:
        if not key.startswith(PREFIX):
            continue
        name, lora, _ = key.removeprefix(PREFIX).partition(".lora_")
        name = ".".join(part for part in name.split(".") if part != "base_layer")
        # Other families put up to two names of their own behind the module's.
        shorter = (name.rsplit(".", cut)[0] for cut in range(1 if lora else 3))
        if name not in tree and name not in tensors and not any(p in tree for p in shorter):
            odd[name] = None
    return list(odd)
