"""An adapter of a language model for the vision, speech or omni model that has it inside, and back.

The base's config says which way: where it has other models' configs inside and the adapter's paths are those of a text
model, they move below the module that the big model has its language model in; where it has none, they move out. A
path that the base has already stays what it is. What belongs to a tower has no place in a text model, and what names
another family than the base's moves nowhere.

Source: transformers 5.23.0, the models' ``base_model_prefix`` and ``_checkpoint_conversion_mapping``; PEFT's paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from regraft.adapters.detect import Known, find_books, is_kin
from regraft.adapters.protocol import Names, Opened
from regraft.errors import Finding, RefusedError, RegraftError
from regraft.names.keys import Group
from regraft.planning.lookup import Lookup
from regraft.planning.outside import outside
from regraft.rules.book import books_for, own_books
from regraft.rules.templates import match_group

if TYPE_CHECKING:
    from regraft.planning.model import Foreign, ModelConfig

Rename = Callable[[str], str]

HOMES = ("model.language_model.", "language_model.model.", "thinker.model.", "model.text_model.")
"""Where big models have the layers of their language model, the usual place first."""
TEXT = "model."
"""Where a text model has them."""
_HEADS = {"language_model.model.": "language_model.lm_head", "thinker.model.": "thinker.lm_head"}
_HEAD = "lm_head"
_REPEATED = re.compile(r"\b(language_model\.)(?:language_model\.)+")


def at_home(
    opened: Opened, model: ModelConfig | None, foreign: Foreign | None = None
) -> tuple[Opened, str | None]:
    """The adapter with the paths that the base has for its modules, and what was done, if anything.

    Raises ``RefusedError`` where a part of it has no place in the base.
    """
    if model is None:
        return opened, None
    inside = has_parts(model)
    try:
        names = opened.names()
    except RegraftError:
        # Whoever converts it says what is wrong, where the base does not tell what is meant.
        return _read_otherwise(opened, model, foreign) or (opened, None)
    paths = [group.template for group in (*names.modules, *names.tensors)]
    if not paths or not names.bound:
        return opened, None
    if not is_kin(opened.hints(), names, model):
        # It stays where it is, and whoever looks for its rule books says that the base is another's.
        return opened, None
    homes = [home for home in HOMES if any(path.startswith(home) for path in paths)]
    if inside and not homes and all(path.startswith((TEXT, _HEAD)) for path in paths):
        return _move_in(opened, names, model, foreign)
    if not inside and homes and not _is_in_own_book(model, names):
        return _move_out(opened, names, homes, model)
    if inside and any(map(_REPEATED.search, paths)):
        made = opened.renamed(lambda path: _REPEATED.sub(r"\1", path))
        return made, "language_model stood in its paths several times, and the model has it once"
    return opened, None


def beside_language_model(names: Names) -> list[str]:
    """Paths that are no part of the language model, of an adapter for a model that has one inside."""
    groups = (*names.modules, *names.tensors)
    return _beside(
        names, [home for home in HOMES if any(g.template.startswith(home) for g in groups)]
    )


def _beside(names: Names, homes: Sequence[str]) -> list[str]:
    within = (*homes, *_HEADS.values(), _HEAD)
    beside = (g for g in (*names.modules, *names.tensors) if not g.template.startswith(within))
    return [path for group in beside for path in group.names()]


def _read_otherwise(
    opened: Opened, model: ModelConfig, foreign: Foreign | None
) -> tuple[Opened, str] | None:
    """The first reading of its keys whose modules the base has."""
    for reading, said in opened.readings():
        try:
            reading.names()
            there, moved = at_home(reading, model, foreign)
        except RegraftError:
            continue
        known = _known(there, model, foreign)
        names = there.names()
        if known is None or not explains(known, names):
            continue
        if known.imported or not _are_elsewhere(known, names, model):
            return there, said if moved is None else f"{said}; {moved}"
    return None


def _are_elsewhere(known: Known, names: Names, model: ModelConfig) -> bool:
    """Whether books only seem to know the modules, because nobody could be asked where the base has them."""
    groups = [Group(f"{m.template}.weight", m.ids, m.numbers) for m in names.modules]
    lookup = Lookup.of(known.books, [*groups, *names.tensors], known.scopes)
    return bool(outside(lookup, model))


def _is_in_own_book(model: ModelConfig, names: Names) -> bool:
    """Whether a book of the user's own for this model knows the modules where they are."""
    mine = {id(book) for book in own_books()}
    own = tuple(book for book in books_for(model.model_types()) if id(book) in mine)
    told = Known(own, {}, model, model.model_type, "")
    return bool(own) and explains(told, names)


def has_parts(model: ModelConfig) -> bool:
    """Whether a config has configs of towers, or of a language model, inside."""
    return model.is_composite() or any(
        name.endswith("_config")
        and isinstance(value, dict)
        and name.startswith(("text", "vision", "audio", "thinker", "llm"))
        for name, value in model.data.items()
    )


def _move_in(
    opened: Opened, names: Names, model: ModelConfig, foreign: Foreign | None
) -> tuple[Opened, str | None]:
    """Below the module that has the language model; the first of the usual places that the base has."""
    known = _known(opened, model, foreign)
    if known is not None and known.imported and explains(known, names):
        return opened, None
    for rename, home in _ways_in():
        moved = opened.renamed(rename)
        known = _known(moved, model, foreign)
        if known is not None and explains(known, moved.names()):
            kind = model.model_type or "the base"
            return moved, (
                f"it is a text model's, and {kind} has its language model at {home.removesuffix('.')}: its paths were "
                "moved there"
            )
    return opened, None


def _ways_in() -> Iterator[tuple[Rename, str]]:
    for home in HOMES:

        def rename(path: str, home: str = home) -> str:
            if path.startswith(TEXT):
                return home + path.removeprefix(TEXT)
            head = _HEADS.get(home, _HEAD)
            return head + path.removeprefix(_HEAD) if path.startswith(_HEAD) else path

        yield rename, home


def _move_out(
    opened: Opened, names: Names, homes: list[str], model: ModelConfig
) -> tuple[Opened, str | None]:
    """Out of the module that had the language model; towers have no place there."""
    left = _beside(names, homes)
    if left:
        more = f" (and {len(left) - 1} more modules)" if len(left) > 1 else ""
        raise RefusedError(
            Finding(
                "no-image",
                f"the base ({model.model_type}) is a text model, and this is no part of the language model{more}",
                where=opened.where,
                key=left[0],
                fix="convert it for the model that it was trained on",
            )
        )

    def rename(path: str) -> str:
        for home in homes:
            if path.startswith(home):
                return TEXT + path.removeprefix(home)
        for head in _HEADS.values():
            if path.startswith(head):
                return _HEAD + path.removeprefix(head)
        return path

    made = opened.renamed(rename)
    return made, (
        f"it is a bigger model's, which has its language model at {homes[0].removesuffix('.')}, and "
        f"{model.model_type} is a text model: its paths were moved out"
    )


def _known(opened: Opened, model: ModelConfig, foreign: Foreign | None) -> Known | None:
    try:
        return find_books(opened.names(), opened.hints(), model, opened.where, foreign)
    except RegraftError:
        return None


def explains(known: Known, names: Names) -> bool:
    """Whether some books have a word for every module of an adapter."""
    keys = []
    tables = []
    for book in known.books:
        scope = known.scopes.get(book.name)
        for rule in book.rules:
            for term in (*rule.equation.left, *rule.equation.right):
                keys.append((term.key, scope))
        keys += [(carry.term.key, scope) for carry in book.carries]
        tables += [(table.module, scope) for table in book.parameters]

    def told(group: Group, module: Group | None) -> bool:
        return any(
            key is not None
            and (scope is None or scope.admits(group.template))
            and match_group(key, group) is not None
            for key, scope in keys
        ) or (
            module is not None
            and any(
                (scope is None or scope.admits(module.template))
                and match_group(key, module) is not None
                for key, scope in tables
            )
        )

    return all(
        told(Group(module.template + ".weight", module.ids, module.numbers), module)
        for module in names.modules
    ) and all(told(group, None) for group in names.tensors)


__all__ = ["HOMES", "at_home", "explains", "has_parts"]
