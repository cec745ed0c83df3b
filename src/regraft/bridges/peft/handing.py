"""Handing PEFT an adapter that is converted already: while it loads, PEFT's own conversions rest.

PEFT converts in three places: the config when layers are made (``BaseTuner.inject_adapter``), the tensors when they
are set (``set_peft_model_state_dict``), and the names, into which it pastes the adapter's name. Each of them is asked
to step aside for the load at hand only; other threads and other loads see no difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import peft
import transformers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from regraft.bridges.peft.known import Adapter
from regraft.bridges.peft.patches import Patch, Patches
from regraft.bridges.peft.place import place_tensors
from regraft.errors import BadInputError, Finding, RefusedError

_OWN_WAY = frozenset(
    (
        "ADALORA",
        "ADAPTION_PROMPT",
        "FROD",
        "OFT",
        "PVERA",
        "RANDLORA",
        "SHIRA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "XLORA",
    )
)
"""Families whose files are not simply one tensor for each tensor of the model: PEFT puts them in place itself."""


@dataclass(frozen=True, slots=True)
class Handed:
    """An adapter for the load that is under way, and the model that its names are relative to."""

    adapter: Adapter
    root: nn.Module


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """What PEFT expects of setting tensors, like torch's ``load_state_dict``: nothing missing, nothing unexpected."""

    missing_keys: list[str]
    unexpected_keys: list[str]


_handed: ContextVar[Handed | None] = ContextVar("regraft_handed", default=None)


def is_handing() -> bool:
    """Whether this thread loads a converted adapter right now."""
    return _handed.get() is not None


@contextmanager
def handing(adapter: Adapter, root: nn.Module) -> Iterator[None]:
    """PEFT's loads inside get ``adapter``, whatever path they are given.

    Raises ``RefusedError`` for a PEFT that has not the places that this needs.
    """
    seams = peft_seams()
    seams.add_user()
    token = _handed.set(Handed(adapter, root))
    try:
        yield
    finally:
        _handed.reset(token)
        seams.drop_user()


@cache
def peft_seams() -> Patches:
    """The functions of PEFT that step aside.

    Raises ``RefusedError`` where one is not there.
    """
    wanted = [
        ("peft.peft_model", "load_peft_weights", _hand_weights),
        ("peft.peft_model", "set_peft_model_state_dict", _place),
    ]
    if int(transformers.__version__.split(".")[0]) >= 5:
        module = "peft.utils.transformers_weight_conversion"
        wanted += [
            (module, "get_model_conversion_mapping", _return_nothing),
            (module, "convert_peft_config_for_transformers", _return_nothing),
            (module, "convert_peft_adapter_state_dict_for_transformers", _return_tensors),
        ]
    patches = []
    missing = []
    for module, name, make in wanted:
        try:
            owner = importlib.import_module(module)
        except ImportError:
            owner = None
        if owner is None or not callable(vars(owner).get(name)):
            missing.append(
                Finding(
                    "unknown-peft",
                    f"PEFT {peft.__version__} with transformers {transformers.__version__} has no such function, "
                    "so its own conversion cannot be kept from running",
                    key=f"{module}.{name}",
                    fix="use PEFT 0.19 to 0.21, or convert the adapter's files with regraft.convert",
                )
            )
        else:
            patches.append(Patch(owner, name, make))
    if missing:
        raise RefusedError(missing)
    return Patches(patches)


Function = Callable[..., Any]


def _hand_weights(original: Function) -> Function:
    @wraps(original)
    def load_peft_weights(*args: Any, **options: Any) -> Any:
        handed = _handed.get()
        return original(*args, **options) if handed is None else dict(handed.adapter.tensors)

    return load_peft_weights


def _return_nothing(original: Function) -> Function:
    @wraps(original)
    def convert(*args: Any, **options: Any) -> Any:
        return original(*args, **options) if _handed.get() is None else None

    return convert


def _return_tensors(original: Function) -> Function:
    @wraps(original)
    def convert(*args: Any, **options: Any) -> Any:
        handed = _handed.get()
        return original(*args, **options) if handed is None else dict(handed.adapter.tensors)

    return convert


def _place(original: Function) -> Function:
    @wraps(original)
    def set_peft_model_state_dict(
        model: Any, tensors: Any, adapter_name: str = "default", *args: Any, **options: Any
    ) -> Any:
        handed = _handed.get()
        if handed is None:
            return original(model, tensors, adapter_name, *args, **options)
        config = model.peft_config[adapter_name]
        where = handed.adapter.where
        if config.is_prompt_learning:
            return original(model, tensors, adapter_name, *args, **options)
        if handed.adapter.peft_type in _OWN_WAY:
            done = original(model, tensors, adapter_name, *args, **options)
            _check(done, config, adapter_name, where)
            return done
        place_tensors(handed.root, handed.adapter.tensors, adapter_name, config, where)
        return LoadedKeys([], [])

    return set_peft_model_state_dict


def _check(done: Any, config: Any, adapter_name: str, where: str) -> None:
    """Everything must have found its place where PEFT itself put it there."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    findings = [
        Finding("no-place", "the model has no place for this tensor", where=where, key=key)
        for key in done.unexpected_keys
    ]
    findings += [
        Finding(
            "missing",
            "PEFT made room for this tensor, but the adapter does not have it",
            where=where,
            key=key,
        )
        for key in done.missing_keys
        if prefix and f".{prefix}" in key and key.endswith(f".{adapter_name}")
    ]
    if findings:
        raise BadInputError(findings)
