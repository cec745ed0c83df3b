"""What classes of modules are, told by their names, so that no library need be imported to ask.

A *wrapper* holds the module that it stands for as a child and adds nothing to the name of what it does. Which class
wraps through which child is written down here, with the place where it can be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told by a module's class alone."""

    wrapped: tuple[str, ...] = ()
    """Names of the child that it stands for; the first that there is counts. Empty: no wrapper."""
    hidden: bool = False
    """The state dict leaves the wrapper's segment out, and loading does without it, too."""
    adapter: bool = False
    """A wrapper of PEFT's; whatever else is in it belongs to adapters."""
    classes: tuple[str, ...] | None = None
    """The model classes, where it is a transformers model."""
    native: str | None = None
    """The first of them that transformers itself defines and that is a whole model."""
    kind: str | None = None
    """The kind of its weight; "any" if its tensors have none; ``None`` if they are parameters by themselves."""
    extra_state: bool = False
    """The state dict has an entry of its own for it that is no tensor."""


_WRAPPERS = {
    # torch/nn/parallel, torch/optim/swa_utils.py, torch/_dynamo/eval_frame.py
    ("torch", "DataParallel"): Facts(("module",)),
    ("torch", "DistributedDataParallel"): Facts(("module",)),
    ("torch", "AveragedModel"): Facts(("module",)),
    ("torch", "OptimizedModule"): Facts(("_orig_mod",)),
    # Both take their segment out by hooks: torch/distributed/fsdp/_state_dict_utils.py and
    # torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
    ("torch", "FullyShardedDataParallel"): Facts(("_fsdp_wrapped_module",), hidden=True),
    ("torch", "ActivationWrapper"): Facts(("_checkpoint_wrapped_module",), hidden=True),
    ("deepspeed", "DeepSpeedEngine"): Facts(("module",)),
    # peft/peft_model.py, mixed_model.py, tuners/tuners_utils.py, tuners/xlora/model.py, utils/other.py,
    # tuners/adaption_prompt
    ("peft", "PeftModel"): Facts(("base_model",), adapter=True),
    ("peft", "PeftMixedModel"): Facts(("base_model",), adapter=True),
    ("peft", "BaseTuner"): Facts(("model", "lora_model"), adapter=True),
    ("peft", "AdaptionPromptModel"): Facts(("model",), adapter=True),
    ("peft", "AdaptedAttention"): Facts(("model",), adapter=True),
    ("peft", "AdaptedAttentionGPT"): Facts(("model",), adapter=True),
    ("peft", "BaseTunerLayer"): Facts(("base_layer",), adapter=True),
    ("peft", "AuxiliaryTrainingWrapper"): Facts(("original_module", "token_adapter"), adapter=True),
}

_KINDS = {
    ("torch", "Linear"): "linear",
    ("torch", "Embedding"): "embedding",
    ("torch", "_ConvNd"): "any",
    ("transformers", "Conv1D"): "conv1d",
}

WRAPPER_SEGMENTS = frozenset(
    name
    for (library, _), facts in _WRAPPERS.items()
    for name in facts.wrapped
    if library != "peft" or name in ("base_layer", "original_module")
)
"""Segments that wrappers leave in saved names. PEFT's ``base_model.model`` and ``token_adapter.base_layer`` are two."""


def without_wrappers(key: str) -> str:
    """A key of a file without the segments that wrappers leave.

    >>> without_wrappers("mtp.layers.0._fsdp_wrapped_module.mlp.gate.weight")
    'mtp.layers.0.mlp.gate.weight'
    """
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPER_SEGMENTS)


_known: dict[type, Facts] = {}


def facts_of(kind: type) -> Facts:
    """What a class tells; remembered.

    >>> facts_of(int)
    Facts(wrapped=(), hidden=False, adapter=False, classes=None, native=None, kind=None, extra_state=False)
    """
    facts = _known.get(kind)
    if facts is None:
        facts = _known[kind] = _look(kind)
    return facts


def _look(kind: type) -> Facts:
    named = [((base.__module__ or "").partition(".")[0], base.__name__) for base in kind.__mro__]
    for name in named:
        if name in _WRAPPERS:
            return _WRAPPERS[name]
    return Facts(
        classes=_model_classes(kind),
        native=_native(kind),
        kind=None
        if _returns_several(kind)
        else next((_KINDS[name] for name in named if name in _KINDS), None),
        extra_state=_has_extra_state(kind),
    )


def _returns_several(kind: type) -> bool:
    """Whether a linear layer's own ``forward`` returns more than the product, as routers do.

    What adds to a layer's output cannot add to that, so PEFT can only adapt its weight, as a parameter.
    """
    owner = next((c for c in kind.__mro__ if "forward" in vars(c)), None)
    module = (owner.__module__ or "").partition(".")[0] if owner is not None else "torch"
    if module == "torch" or not any(c.__name__ == "Linear" for c in kind.__mro__):
        return False
    import ast
    import inspect
    import textwrap

    try:
        source = textwrap.dedent(inspect.getsource(vars(owner)["forward"]))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return False  # made by hand: there is no source
    return any(
        isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        for node in ast.walk(tree)
    )


def _models(kind: type) -> list[type]:
    """The classes below PreTrainedModel; those that torch makes on the way (FSDP2) are none of them."""
    order = kind.__mro__
    for at, base in enumerate(order):
        if base.__name__ == "PreTrainedModel" and base.__module__ == "transformers.modeling_utils":
            below = [c for c in order[:at] if issubclass(c, base)]
            return [c for c in below if not c.__module__.startswith("torch.")] or [base]
    return []


def _model_classes(kind: type) -> tuple[str, ...] | None:
    models = _models(kind)
    return tuple(c.__name__ for c in models) if models else None


def _native(kind: type) -> str | None:
    own = (c.__name__ for c in _models(kind) if c.__module__.startswith("transformers."))
    return next((name for name in own if not name.endswith("PreTrainedModel")), None)


def _has_extra_state(kind: type) -> bool:
    """Whether a class has something of its own to put into state dicts (torch's ``get_extra_state``)."""
    owner = next((c for c in kind.__mro__ if "get_extra_state" in vars(c)), None)
    return owner is not None and owner.__module__ != "torch.nn.modules.module"


def is_module(value: Any) -> bool:
    """Whether something is a torch module, by what it holds."""
    inside = getattr(value, "__dict__", None)
    return isinstance(inside, dict) and "_modules" in inside and "_parameters" in inside
