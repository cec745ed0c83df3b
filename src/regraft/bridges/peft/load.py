"""Loading an adapter's files, old or new, straight into a live model."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, set_adapter
from torch import nn
from transformers import PreTrainedModel

from regraft.adapters.protocol import Opened
from regraft.bridges.peft.handing import handing
from regraft.bridges.peft.holders import Place, choose
from regraft.bridges.peft.hotswap import swap
from regraft.bridges.peft.known import Adapter, Arriving, open_any
from regraft.bridges.peft.locks import alone_with
from regraft.bridges.peft.place import place_tensors
from regraft.bridges.peft.slots import wrappers_aside
from regraft.bridges.peft.undo import undone_on_failure
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.rules.book import Rules, only_books
from regraft.storage.hub import find_cached


def load_adapter(
    model: Any,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    subfolder: str = "",
    hotswap: bool = False,
    is_trainable: bool = False,
    rules: Rules = (),
) -> Any:
    """Load an adapter of either layout into a live model.

    Args:
        model: a transformers model; a ``PeftModel``; or anything that holds one of them: a module of your own, a
            data-parallel, sharded or compiled model, a value head, an object with a model as attribute. In a holder
            of several models the adapter goes into the one whose path its keys begin with, or else into the only one
            that it fits.
        path: the folder that ``save_pretrained`` wrote, its weights file, an adapter of any other dialect, or the name
            of a repository in the Hub's local cache (``"org/name"``).
        adapter_name: what to call it in the model; any name that torch accepts for a module's child.
        subfolder: the folder of the adapter inside ``path``.
        hotswap: put the adapter in the place of a loaded one of that name, without new layers. Layers that it does
            not adapt are set to zero.
        is_trainable: leave the adapter's parameters open to training.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them. The layout of a model that
            only they know is told by its names.

    Returns:
        A plain transformers model as a ``PeftModel``, of the class that the adapter's task asks for. Everything else
        as itself, with the adapter inside: a second adapter is added, and the active one stays active.

    Raises:
        BadInputError: the adapter, or its fit to the model. The model is as it was before, here and below.
        UnmatchedKeysError: keys that no rule matches.
        AmbiguousError: the adapter fits several models, or the path holds several adapters.
        RefusedError: it has no exact equivalent in this layout.
    """
    source = open_any(_found(path, subfolder))
    with only_books(rules) if rules else nullcontext(), alone_with(model):
        place, adapter = choose(model, source)
        with alone_with(place.base):
            return _load(
                model,
                place,
                adapter,
                source,
                adapter_name,
                hotswap=hotswap,
                is_trainable=is_trainable,
            )


class _RehearsedError(Exception):
    """An adapter went in; it is taken out again."""


@dataclass(frozen=True, slots=True)
class Inside:
    """An adapter that goes into a model itself, with no ``PeftModel`` around it, when its base is loaded."""

    model: Any
    """What was given: a model, or what holds it."""
    place: Place
    adapter: Adapter
    source: Opened

    @staticmethod
    def prepare(model: Any, path: str | os.PathLike[str], arriving: Arriving) -> Inside:
        """Read and convert an adapter for a model whose weights, ``arriving``, are yet to be loaded.

        Raises as ``load_adapter``.
        """
        source = open_any(_found(path, ""))
        with alone_with(model):
            place, adapter = choose(model, source, arriving)
            check_free(place, "default", source)
            check_sharding(model, place, adapter)
        return Inside(model, place, adapter, source)

    def rehearse(self) -> None:
        """Put the adapter into the model and take it out again, for what only PEFT's layers tell, such as shapes.

        What takes something off the base's weights (PiSSA, OLoRA, ...) is not rehearsed: they are not there yet.

        Raises as ``put``.
        """
        if changes_weights(self.adapter):
            return
        with suppress(_RehearsedError), undone_on_failure(self.place.peft_model or self.place.base):
            self.put()
            raise _RehearsedError

    def put(self) -> None:
        """Put the adapter into the model.

        Raises as ``load_adapter``; the model is as it was then.
        """
        place, adapter, source = self.place, self.adapter, self.source
        with alone_with(self.model), alone_with(place.base):
            if place.peft_model is not None:
                _load(
                    self.model, place, adapter, source, "default", hotswap=False, is_trainable=False
                )
                return
            check_free(place, "default", source)
            inject(place.base, adapter, "default", is_trainable=False)


def _found(path: str | os.PathLike[str], subfolder: str) -> Path:
    """Where the adapter is; what exists here always wins over a repository in the Hub's cache."""
    local = Path(path)
    cached = None if os.path.lexists(local) else find_cached(os.fspath(path))
    return (cached or local) / subfolder


def _load(
    model: Any,
    place: Place,
    adapter: Adapter,
    source: Opened,
    adapter_name: str,
    *,
    hotswap: bool,
    is_trainable: bool,
) -> Any:
    check_name(adapter_name, source)
    if hotswap:
        swap(place, adapter, adapter_name)
        return model
    check_free(place, adapter_name, source)
    if place.peft_model is not None:
        peft_model = place.peft_model
        load_by_peft(
            peft_model,
            peft_model.get_base_model(),
            place,
            adapter,
            lambda folder: peft_model.load_adapter(folder, adapter_name, is_trainable=is_trainable),
        )
        return model
    check_sharding(model, place, adapter)
    if place.base is not model or is_adapted(place.base):
        inject(place.base, adapter, adapter_name, is_trainable=is_trainable)
        return model
    return load_by_peft(
        place.base,
        place.base,
        place,
        adapter,
        lambda folder: PeftModel.from_pretrained(
            place.base, folder, adapter_name, is_trainable=is_trainable
        ),
    )


def load_by_peft(
    outer: nn.Module, root: nn.Module, place: Place, adapter: Adapter, load: Callable[[str], Any]
) -> Any:
    """Let PEFT load a converted adapter; ``load`` is called with a folder that holds its config.

    ``root`` is the module that PEFT adapts. Whatever fails, ``outer`` is as it was before.
    """
    if root is not place.base:
        adapter = adapter.anywhere()
    with (
        undone_on_failure(outer, weights=changes_weights(adapter)),
        wrappers_aside(place.base),
        handing(adapter, place.base),
        adapter.config_folder() as folder,
    ):
        return load(folder)


def inject(
    base: PreTrainedModel,
    adapter: Adapter,
    adapter_name: str,
    *,
    is_trainable: bool,
    autocast: bool = True,
    keeps_active: bool = True,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Put an adapter into the model itself, as transformers' own ``load_adapter`` does.

    With ``autocast`` 16-bit factors become float32, as in a ``PeftModel``. With ``keeps_active`` a second adapter
    does not become the active one.
    """
    with adapter.config_folder() as folder:
        config = PeftConfig.from_pretrained(folder)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    shares = getattr(tuner, "uses_shared_state", False)
    # AdaLoRA divides by numbers of ranks that its files do not have: its own model keeps them, with its allocator.
    allocates = config.peft_type == "ADALORA"
    if config.is_prompt_learning or config.is_adaption_prompt or shares or allocates:
        raise RefusedError(
            Finding(
                "needs-peft-model",
                f"{adapter.peft_type} needs a PeftModel around the model",
                where=adapter.where,
                fix="load it with regraft.load_adapter into the bare transformers model",
            )
        )
    config.inference_mode = not is_trainable
    before = active_adapters(base) if keeps_active else None
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    with undone_on_failure(base, weights=changes_weights(adapter)):
        with wrappers_aside(base), handing(adapter, base):
            inject_adapter_in_model(config, base, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            if autocast:
                cast_adapter_dtype(base, adapter_name, autocast_adapter_dtype=True)
            place_tensors(base, adapter.tensors, adapter_name, config, adapter.where)
        base._hf_peft_config_loaded = True
        if before is not None:
            set_adapter(base, before)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        if not is_trainable:
            base.train(mode=False)


def active_adapters(base: nn.Module) -> list[str] | None:
    """The adapters that are switched on in a model, as PEFT's layers have them; ``None`` where it has no adapters.

    transformers' own method of this name wants the PEFT that its release was made for.
    """
    layers = (module for module in base.modules() if isinstance(module, BaseTunerLayer))
    return next((list(layer.active_adapters) for layer in layers), None)


def is_adapted(base: nn.Module) -> bool:
    """Whether a model has adapters inside."""
    return any(isinstance(module, BaseTunerLayer) for module in base.modules())


def changes_weights(adapter: Adapter) -> bool:
    """Whether PEFT takes something off the base's weights when it makes the layers (PiSSA, OLoRA, ...)."""
    return isinstance(adapter.config.get("init_lora_weights"), str)


def check_name(adapter_name: str, source: Opened) -> None:
    """Raises ``BadInputError`` for a name that torch takes for no child of a module."""
    try:
        torch.nn.ModuleDict({adapter_name: torch.nn.Identity()})
    except (KeyError, TypeError) as error:
        raise BadInputError(
            Finding(
                "bad-adapter-name",
                f"an adapter cannot be called {adapter_name!r}: {error.args[0]}",
                where=source.where,
                fix="choose another name",
            )
        ) from error


def check_sharding(holder: Any, place: Place, adapter: Adapter) -> None:
    """Raises ``RefusedError`` for stacked experts whose parameters FSDP1 keeps flattened."""
    modules = [*place.base.modules(), *(holder.modules() if isinstance(holder, nn.Module) else ())]
    if adapter.config.get("target_parameters") and any(
        type(module).__name__ == "FullyShardedDataParallel" for module in modules
    ):
        raise RefusedError(
            Finding(
                "flattened",
                "PEFT cannot adapt a parameter that FullyShardedDataParallel has flattened",
                where=adapter.where,
                key=f"target_parameters: {min(adapter.config['target_parameters'])}",
                fix="load the adapter before the model is wrapped, or shard it with fully_shard",
            )
        )


def check_free(place: Place, adapter_name: str, source: Opened) -> None:
    """Raises ``BadInputError`` where the model has an adapter of this name."""
    holder: Any = place.peft_model or place.base
    if adapter_name in (getattr(holder, "peft_config", None) or {}):
        raise BadInputError(
            Finding(
                "adapter-exists",
                f"the model has an adapter called {adapter_name!r}",
                where=source.where,
                fix="choose another name, or pass hotswap=True to put this one in its place",
            )
        )
