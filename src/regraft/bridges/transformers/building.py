"""Building models of transformers from a config of unknown origin: without weights, without code, without network.

A config names a class and says what it is made of. Only classes of models are taken, none that is a pipeline or a
function; fields that make transformers load something else (pretrained backbones, kernels) are taken out, and
the hub is out of reach meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig

_LOADING = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "use_kernels",
        "kernel_config",
        "auto_map",
        "custom_pipelines",
        "trust_remote_code",
    }
)
_lock = RLock()


def model_class(name: str) -> Any:
    """The class of models of this name in transformers; ``None`` where it is something else or not there.

    >>> model_class("MixtralForCausalLM").__name__, model_class("pipeline")
    ('MixtralForCausalLM', None)
    """
    import transformers

    if not name.isidentifier() or name.startswith("_"):
        return None
    try:
        found = getattr(transformers, name, None)
    except Exception:  # a class whose own imports fail
        return None
    wanted = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if wanted and found is not transformers.PreTrainedModel else None


def known_classes(model: ModelConfig, names: Iterable[str | None]) -> list[str]:
    """The names that are classes of models in transformers; those that it has not are left out.

    Raises ``BadInputError`` where transformers has something else under a name.
    """
    import transformers

    named = [name for name in dict.fromkeys(names) if name]
    known = [name for name in named if model_class(name) is not None]
    others = [name for name in named if name not in known and name in dir(transformers)]
    if not others:
        return known
    shown = ", ".join(repr(name[:80]) for name in others[:5])
    raise BadInputError(
        Finding(
            "model-config",
            f"it names {shown} as the model's class, and that is no model in transformers",
            where=model.path,
            key="architectures",
            fix="name the model's class, or install a transformers that has it",
        )
    )


def make_config(kind: str, fields: Mapping[str, Any]) -> Any:
    """The config object of a model type, from the fields of its file.

    Raises what transformers raises.
    """
    from transformers import AutoConfig

    kept = harmless(fields)
    kept.pop("model_type", None)
    with isolated():
        return AutoConfig.for_model(kind, **kept)


def build(cls: Any, config: Any) -> Any:
    """A model without weights, on the meta device.

    Raises what transformers raises.
    """
    import torch

    with isolated(), torch.device("meta"):
        return cls(config)


def harmless(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config without those that make transformers load something else.

    >>> harmless({"use_pretrained_backbone": True, "vision": {"attn_implementation": "org/kernel", "d": 4}})
    {'use_pretrained_backbone': False, 'vision': {'d': 4}}
    >>> harmless({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    {'time_step_limit': [0.0, inf]}
    """
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _LOADING:
            continue
        if name == "use_pretrained_backbone":
            value = False
        kept[name] = _harmless(value)
    return kept


_NO_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def _harmless(value: Any) -> Any:
    if isinstance(value, Mapping):
        # transformers 5 writes floats that JSON has not as {"__float__": "Infinity"} (Mamba's time_step_limit).
        tag = value.get("__float__") if len(value) == 1 else None
        return _NO_JSON[tag] if tag in _NO_JSON else harmless(value)
    return [_harmless(item) for item in value] if isinstance(value, list) else value


@contextmanager
def isolated() -> Iterator[None]:
    """Keep transformers from the hub and from talking meanwhile."""
    import huggingface_hub.constants as hub

    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = hub.HF_HUB_OFFLINE
        hub.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            hub.HF_HUB_OFFLINE = before
