"""Saved tensors as PEFT spells them: ``modules_to_save``, biases, trained tokens.

PEFT writes a base tensor inside an adapted module below its wrappers (``base_layer``), and rows of an embedding that
are trained (``trainable_token_indices``) under a name of their own. Source: PEFT 0.21.2,
``peft/utils/save_and_load.py`` and ``peft/tuners/trainable_tokens/layer.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from regraft.adapters.form import Saved, SavedGroup
from regraft.dialects.peft.config import tail_of
from regraft.dialects.peft.scan import PREFIX, Others
from regraft.names.keys import Group
from regraft.planning.side import Side

TOKENS = ".token_adapter.trainable_tokens_delta"
"""What PEFT puts after an embedding's path for the rows of single tokens."""


class Style(Struct, frozen=True):
    """Where a saved tensor stood in its module."""

    wrapped: bool
    """Whether ``.base_layer`` stood in its name: the module is adapted, too."""
    holder: str = ""
    """What PEFT holds it in, between its module and its own name."""


def saved_groups(others: Iterable[Others]) -> tuple[SavedGroup, ...]:
    """The tensors inside modules of the base, by the base tensors that they stand for."""
    return tuple(
        SavedGroup(
            Group(base_key(o.keys.template), o.keys.ids, o.keys.numbers),
            o.keys.template.endswith(TOKENS),
            Style(o.wrapped, o.holder),
            _copy_of(o.keys),
        )
        for o in others
        if o.prefix
    )


_COPIES = ("modules_to_save", "original_module")
"""Where PEFT holds the two copies of a module that is saved; with ``bias="all"`` it saves their biases as well."""


def _copy_of(keys: Group) -> Group | None:
    """The base tensors of which keys are copies: ``router.bias`` of ``router.original_module.bias``."""
    segments = keys.template.split(".")
    if len(segments) < 3 or segments[-2] not in _COPIES:
        return None
    return Group(".".join([*segments[:-2], segments[-1]]), keys.ids, keys.numbers)


def base_key(name: str) -> str:
    """The base tensor that a name stands for: rows of single tokens stand for their embedding's.

    >>> base_key("model.embed_tokens.token_adapter.trainable_tokens_delta")
    'model.embed_tokens.weight'
    """
    return f"{name.removesuffix(TOKENS)}.weight" if name.endswith(TOKENS) else name


def names_of(item: Saved) -> tuple[str, str]:
    """A tensor's names before and after, without PEFT's prefix and wrappers."""
    if not item.rows:
        return item.old, item.new
    old, new = (key.removesuffix(".weight") + TOKENS for key in (item.old, item.new))
    return old, new


def write_saved(items: Iterable[Saved], wrappers: Mapping[str, int]) -> dict[str, Any]:
    """Tensors by the names that PEFT gives them; ``wrappers`` is how many adapters are nested around each module."""
    result = {}
    for item in items:
        old, name = names_of(item)
        if item.bound:
            style = item.style if isinstance(item.style, Style) else Style(wrapped=False)
            # A base tensor inside an adapted module stands below its wrappers; an adapter's own does not.
            own = not style.wrapped and old == name
            name = name if own else _inside_wrappers(name, wrappers)
            if style.holder:
                module, _, leaf = name.rpartition(".")
                name = f"{module}.{style.holder}.{leaf}"
            name = PREFIX + name
        result[name] = item.tensor
    return result


def rename_tokens(config: Mapping[str, Any], saved: Iterable[Saved]) -> dict[str, Any] | None:
    """``trainable_token_indices`` with the names that embeddings have now; ``None`` where it need not change."""
    entries = config.get("trainable_token_indices")
    if not isinstance(entries, dict):
        return None
    result: dict[str, Any] = {}
    rows = [item for item in saved if item.rows]
    for entry, indices in entries.items():
        modules = [
            item.new.removesuffix(".weight")
            for item in rows
            if item.old.removesuffix(".weight").endswith(entry)
        ]
        same = all(module.endswith(entry) for module in modules)
        result.update(dict.fromkeys([entry] if same else modules, indices))
    return None if result == entries else result


def token_rows(config: Mapping[str, Any], name: str) -> Any:
    """The rows that ``trainable_token_indices`` names for an embedding's weight."""
    entries = config.get("trainable_token_indices")
    if not isinstance(entries, dict):
        return entries
    module = name.removesuffix(".weight")
    return next((rows for entry, rows in entries.items() if module.endswith(entry)), None)


def _inside_wrappers(name: str, wrappers: Mapping[str, int]) -> str:
    """A base tensor's name with ``.base_layer`` after every module that is adapted.

    >>> _inside_wrappers("mlp.gate.stats.bias", {"mlp.gate": 1})
    'mlp.gate.base_layer.stats.bias'
    """
    segments = name.split(".")
    result = segments[:1]
    for end in range(1, len(segments)):
        result += ["base_layer"] * wrappers.get(".".join(segments[:end]), 0)
        result.append(segments[end])
    return ".".join(result)


def rename_saved(
    config: Mapping[str, Any], saved: Iterable[Saved], there: Side
) -> list[str] | None:
    """``modules_to_save`` with the names that its modules have now; ``None`` where it need not change.

    PEFT saves no module inside another saved one, and an entry that named nothing must name nothing now.
    """
    entries = config.get("modules_to_save")
    if not isinstance(entries, list):
        return None
    tensors = list(saved)
    result: dict[str, list[str]] = {}
    for entry in entries:
        moved = [(owner, m) for m in tensors if (owner := owner_of(m.old, entry)) is not None]
        if not moved:
            if not there.has_parameters_in(entry):
                result[entry] = []
            continue
        if all(item.old == item.new for _, item in moved):
            result[entry] = sorted({owner for owner, _ in moved})
            continue
        if all(_stays_in(item.new, owner) for owner, item in moved):
            result[entry] = sorted({owner for owner, _ in moved})
            continue
        modules = _modules_of([item.new for _, item in moved])
        if all(module.endswith(entry) for module in modules):
            result[entry] = modules
        else:
            for module in modules:
                name = module if module.endswith(entry) else _ending(module, moved, entry)
                result.setdefault(name, []).append(module)
    for name, modules in list(result.items()):
        if modules and there.names_others(name, modules):
            del result[name]
            for module in modules:
                result.setdefault(module, []).append(module)
    every = {module for modules in result.values() for module in modules}
    kept = [
        name
        for name, modules in result.items()
        if not modules or not all(_is_inside(module, every) for module in modules)
    ]
    return None if kept == entries else kept


def _stays_in(name: str, owner: str) -> bool:
    """Whether a tensor is still in a module that can be saved: a list of numbered modules can not."""
    rest = name.removeprefix(owner + ".")
    return rest != name and not rest.split(".")[0].isdigit()


def _ending(module: str, moved: Iterable[tuple[str, Saved]], entry: str) -> str:
    """As much of a module's path as tells it from modules that are not saved."""
    if any(char.isdigit() for char in entry):
        return module
    for owner, _ in moved:
        if module.startswith(owner + "."):
            return tail_of(owner) + module[len(owner) :]
    return tail_of(module)


def _is_inside(module: str, others: Iterable[str]) -> bool:
    return any(module.startswith(other + ".") for other in others)


def owner_of(key: str, entry: str) -> str | None:
    """The module that an entry of ``modules_to_save`` saves and that a tensor belongs to, as PEFT matches them.

    >>> owner_of("model.layers.0.mlp.gate.weight", "gate")
    'model.layers.0.mlp.gate'
    """
    segments = key.split(".")
    for end in range(1, len(segments)):
        path = ".".join(segments[:end])
        if path.endswith(entry):
            return path
    return None


def _modules_of(names: list[str]) -> list[str]:
    """The modules that hold some tensors, without those inside another one of them."""
    modules = sorted({name.rpartition(".")[0] for name in names})
    outer: list[str] = []
    for module in modules:
        if not outer or not module.startswith(outer[-1] + "."):
            outer.append(module)
    return outer
