"""Letting code that cannot be changed load adapters through regraft."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import peft
import peft.utils.hotswap
import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers.integrations.peft import PeftAdapterMixin

from regraft.bridges.peft.files import find_source
from regraft.bridges.peft.handing import is_handing, peft_seams
from regraft.bridges.peft.holders import Place, choose, find_models
from regraft.bridges.peft.hotswap import swap
from regraft.bridges.peft.known import Adapter
from regraft.bridges.peft.load import check_name, inject, load_by_peft
from regraft.bridges.peft.locks import alone_with
from regraft.bridges.peft.patches import Patch, Patches
from regraft.bridges.transformers.loading import loading_patch
from regraft.dialects.peft.source import Source
from regraft.errors import Finding, RefusedError, RegraftError
from regraft.live.memory import Way

Function = Callable[..., Any]

_ways: list[Way] = []
"""How models are loaded, for each time that this was installed."""
_TAKEN = {
    "from_pretrained": ("model", "model_id", "adapter_name", "is_trainable", "config"),
    "load_adapter": ("model_id", "adapter_name", "is_trainable"),
    "hotswap_adapter": ("model", "model_name_or_path", "adapter_name"),
    "mixin": ("peft_model_id", "adapter_name", "peft_config", "adapter_state_dict", "is_trainable"),
}
"""The parameters that the replacements rely on."""


def install(load: Way = "map") -> None:
    """Let PEFT and transformers load files through regraft, in the whole process: adapters, and models.

    ``PeftModel.from_pretrained``, ``PeftModel.load_adapter``, ``load_adapter`` of transformers models and
    ``peft.utils.hotswap.hotswap_adapter`` then take files of either layout. Only files are: a state dict that is
    passed in, a ``key_mapping`` of the caller's, and models that are not of transformers go the usual way. Installing
    twice takes uninstalling twice.

    ``from_pretrained`` of models of transformers, called by whatever library, then reads the bytes of a checkpoint
    through regraft: ``load`` is ``"map"``, ``"copy"`` or ``"off"``, as ``from_pretrained`` of regraft takes it; of
    several, the one that was given last. ``model.regraft_load`` says what was done.

    Raises:
        RefusedError: a PEFT or transformers that does not have the functions that this needs.
        BadInputError: there is no such way of loading.
    """
    from regraft.live.load import check_way

    check_way(load)
    peft_seams()
    _hooks().add_user()
    _ways.append(load)


def uninstall() -> None:
    """Undo ``install``; what was there before is put back. Does nothing where nothing is installed.

    Raises ``RefusedError`` where another library has replaced one of the functions since.
    """
    _hooks().drop_user()
    if _ways:
        _ways.pop()


@contextmanager
def installed(load: Way = "map") -> Iterator[None]:
    """``install`` for the length of a ``with`` block."""
    install(load)
    try:
        yield
    finally:
        uninstall()


def is_installed() -> bool:
    """Whether PEFT and transformers load through regraft now."""
    return _hooks().users > 0


@cache
def _hooks() -> Patches:
    """The functions that are replaced.

    Raises ``RefusedError`` where one is not what it is known to be.
    """
    patches = [
        (Patch(PeftModel, "from_pretrained", _from_pretrained), _TAKEN["from_pretrained"]),
        (Patch(PeftModel, "load_adapter", _load_adapter), _TAKEN["load_adapter"]),
        (Patch(PeftAdapterMixin, "load_adapter", _load_into_model), _TAKEN["mixin"]),
        (
            Patch(peft.utils.hotswap, "hotswap_adapter", _hotswap_adapter),
            _TAKEN["hotswap_adapter"],
        ),
    ]
    odd = [patch for patch, taken in patches if not _takes(patch.current(), taken)]
    if odd:
        raise RefusedError(
            Finding(
                "unknown-peft",
                f"this is not the function that regraft knows (PEFT {peft.__version__}, transformers "
                f"{transformers.__version__})",
                key=patch.label,
                fix="use PEFT 0.19 to 0.21, or call regraft.load_adapter instead",
            )
            for patch in odd
        )
    loading = loading_patch(lambda: _ways[-1] if _ways else "off")
    return Patches([*(patch for patch, _ in patches), *filter(None, [loading])])


def _takes(function: Any, wanted: tuple[str, ...]) -> bool:
    function = getattr(function, "__func__", function)
    return callable(function) and set(wanted) <= set(inspect.signature(function).parameters)


def _converted(root: Any, model_id: Any, options: dict[str, Any], config: Any = None) -> Any:
    """The model and the adapter for it; ``None`` where this is none of regraft's business."""
    if is_handing() or not isinstance(model_id, str | os.PathLike) or not find_models(root):
        return None
    source = find_source(model_id, options)
    if config is not None:
        source = replace(source, config=source.config | _plain(config))
    try:
        return (*choose(root, source), source)
    except RegraftError as error:
        if {finding.code for finding in error.findings} != {"unknown-model"}:
            raise
        warnings.warn(
            f"regraft has no rules for this model, so PEFT loads the adapter by itself: {error}",
            stacklevel=4,
        )
        return None


def _plain(config: PeftConfig) -> dict[str, Any]:
    """A config of the caller's as the file would have it; which PEFT wrote the weights, only the file knows."""
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    return {name: value for name, value in fields.items() if name != "peft_version"}


def _from_pretrained(original: classmethod[Any, Any, Any]) -> Any:
    function = original.__func__

    @wraps(function)
    def from_pretrained(
        cls: Any,
        model: Any,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,  # noqa: FBT001, FBT002 (the signature is PEFT's)
        config: PeftConfig | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        usual = [model, model_id, adapter_name, is_trainable, config, *args]
        if options.get("key_mapping") is not None or isinstance(model, PeftModel):
            return function(cls, *usual, **options)
        with alone_with(model):
            found = _converted(model, model_id, options, config)
            if found is None:
                return function(cls, *usual, **options)
            place, adapter, source = found
            check_name(adapter_name, source)
            rest = {key: value for key, value in options.items() if key != "subfolder"}
            return load_by_peft(
                model,
                model,
                place,
                adapter,
                lambda folder: function(
                    cls, model, folder, adapter_name, is_trainable, None, *args, **rest
                ),
            )

    return classmethod(from_pretrained)


def _load_adapter(original: Function) -> Function:
    @wraps(original)
    def load_adapter(
        self: Any, model_id: Any, adapter_name: str, *args: Any, **options: Any
    ) -> Any:
        with alone_with(self), alone_with(self.get_base_model()):
            return _load_there(original, self, model_id, adapter_name, args, options)

    return load_adapter


def _load_there(
    original: Function,
    self: Any,
    model_id: Any,
    adapter_name: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    found = None
    if options.get("key_mapping") is None:
        found = _converted(self, model_id, options)
    if found is None:
        return original(self, model_id, adapter_name, *args, **options)
    place, adapter, source = found
    check_name(adapter_name, source)
    rest = {key: value for key, value in options.items() if key != "subfolder"}
    return load_by_peft(
        self,
        self.get_base_model(),
        place,
        adapter,
        lambda folder: original(self, folder, adapter_name, *args, **rest),
    )


def _load_into_model(original: Function) -> Function:
    @wraps(original)
    def load_adapter(
        self: Any,
        peft_model_id: Any = None,
        adapter_name: str | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        usual = inspect.signature(original).bind(
            self, peft_model_id, adapter_name, *args, **options
        )
        usual.apply_defaults()
        given = usual.arguments
        found = None
        config = given.get("load_config")
        model_id = peft_model_id or getattr(config, "pretrained_model_name_or_path", None)
        if given["peft_config"] is None and given["adapter_state_dict"] is None:
            download = dict(getattr(config, "download_kwargs", None) or {})
            download |= given.get("kwargs", {}) | (given.get("adapter_kwargs") or {})
            if given.get("local_files_only"):
                download["local_files_only"] = True
            found = _converted(self, model_id, download)
        name = adapter_name or "default"
        with alone_with(self):
            if found is None:
                _check_release()
                return original(self, peft_model_id, adapter_name, *args, **options)
            _put(self, found, name, given)
        return _loading_info()

    return load_adapter


def _put(self: Any, found: tuple[Place, Adapter, Source], name: str, given: dict[str, Any]) -> None:
    """Load as transformers would: hotswapping where it is asked for, or switched on and the name is taken."""
    place, adapter, source = found
    place = Place("", place.base, None)
    check_name(name, source)
    taken = name in (getattr(self, "peft_config", None) or {})
    hotswap = given.get("hotswap", False)
    if hotswap == "auto":
        hotswap = taken and getattr(self, "_hotswap_enabled", False)
    if hotswap:
        swap(place, adapter, name)
        return
    if taken:
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    inject(
        self,
        adapter,
        name,
        is_trainable=bool(given["is_trainable"]),
        autocast=False,
        keeps_active=False,
    )


def _check_release() -> None:
    """Raises ``RefusedError`` where only transformers can load what was given, and wants another PEFT for it."""
    wanted = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", None)
    if wanted is None or _release(peft.__version__) >= _release(wanted):
        return
    raise RefusedError(
        Finding(
            "needs-newer-peft",
            f"only transformers itself can load this, and transformers {transformers.__version__} wants PEFT "
            f"{wanted} or newer for that; PEFT {peft.__version__} is installed",
            key="load_adapter",
            fix="give the adapter's folder or file, which regraft loads with this PEFT, or install another release of "
            "one of the two",
        )
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _loading_info() -> Any:
    """What transformers' ``load_adapter`` returns since it returns something: nothing missing, nothing left over."""
    from transformers.utils import loading_report

    made = getattr(loading_report, "LoadStateDictInfo", None)
    if made is None:
        return None
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    return made(**{name: empty.get(name, set()) for name in inspect.signature(made).parameters})


def _hotswap_adapter(original: Function) -> Function:
    @wraps(original)
    def hotswap_adapter(
        model: torch.nn.Module,
        model_name_or_path: Any,
        adapter_name: str,
        *args: Any,
        **options: Any,
    ) -> None:
        found = None
        if options.get("key_mapping") is None:
            found = _converted(model, model_name_or_path, options)
        if found is None:
            original(model, model_name_or_path, adapter_name, *args, **options)
            return
        place, adapter, _ = found
        with alone_with(model):
            swap(place, adapter, adapter_name)

    return hotswap_adapter
