"""Adapters whose tensors name no module of the base: whether they may stay as they are.

Prompts do not depend on the base's layout. A prefix depends on the order of the numbers in a key and in a value; other
adapters go by the modules that their config names, or by the order of the modules in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from regraft.adapters.detect import books_of
from regraft.adapters.saved import changes_nothing
from regraft.dialects.peft.config import ALL_LINEAR, targets_module
from regraft.dialects.peft.source import Source
from regraft.equation.notation import Term
from regraft.errors import Finding, RefusedError, UnmatchedKeysError
from regraft.planning.model import ModelConfig
from regraft.rules.book import Book, Rule, library

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
_KEYS_AND_VALUES = re.compile(r"(^|[._])(k|v|key|value|kv|qkv|query_key_value)(_proj)?\b", re.I)
_STAY = "keep it with the layout that it was trained in; PEFT cannot merge it either"


def check_unbound(source: Source, model: ModelConfig | None) -> bool:
    """Whether an adapter is to be copied as it is, without a look at its keys.

    Raises ``RefusedError`` where the base's new layout changes what it means, ``UnmatchedKeysError`` where nothing
    tells whether it does.
    """
    kind = source.kind
    if kind in _PREFIXES:
        _refuse(
            source,
            [r for r in _changing(_likely(source, model)) if _reorders(r)],
            _PREFIX,
            _RETRAIN,
        )
        return False
    if kind == "XLORA":
        if source.config.get("layerwise_scalings"):
            _refuse(source, _changing(_known(source, model)), _XLORA, _STAY)
        return True
    if kind == "SHADOW":
        _refuse(source, _changing(_known(source, model)), _SHADOW, _STAY)
        return True
    if kind == "UNILORA" and not any("unilora_indices" in name for name in source.tensors):
        entries = source.config.get("target_modules")
        rules = [r for r in _changing(_known(source, model)) if _touches(r, entries)]
        _refuse(source, rules, _UNILORA, _UNILORA_FIX)
        return True
    return False


_PREFIX = "its keys and values are those of attention heads, whose numbers change their order"
_RETRAIN = "train the prefix again"
_XLORA = (
    "its classifier has an output for each LoRA in the order of the model's modules, which changes"
)
_SHADOW = "it has a small copy of the base model inside, and follows its blocks; both change"
_UNILORA = (
    "it goes by the order of all modules that target_modules names, some of which change, and its places are not in "
    "the file (save_indices was off)"
)
_UNILORA_FIX = "load it with PEFT in its layout, set save_indices and save it again"


def _likely(source: Source, model: ModelConfig | None) -> Sequence[Book]:
    """The base's books; where nothing tells which model it is, all of the library."""
    try:
        return books_of(source.hints(), model, source.where) or library()
    except UnmatchedKeysError:
        return library()


def _known(source: Source, model: ModelConfig | None) -> Sequence[Book]:
    books = books_of(source.hints(), model, source.where)
    if books is None:
        raise UnmatchedKeysError(
            Finding(
                "model-needed",
                "nothing in this adapter tells which model it is for",
                where=source.where,
                fix="give the base model with --model (its folder or its config.json)",
            )
        )
    return books


def _refuse(source: Source, rules: Sequence[Rule], why: str, fix: str) -> None:
    if rules:
        key = next(iter(source.tensors), None)
        raise RefusedError(
            Finding("no-image", why, where=source.where, key=key, rule=str(rules[0]), fix=fix)
        )


def _changing(books: Iterable[Book]) -> list[Rule]:
    """The rules that do not leave everything as it is; books for other tools do not count, which have no such files."""
    own = [book for book in books if book.tells == "both"]
    return [rule for book in own for rule in book.rules if not changes_nothing(rule)]


def _reorders(rule: Rule) -> bool:
    """Whether numbers of keys or values change their order inside of a head."""
    terms = (*rule.equation.left, *rule.equation.right)
    if not any(_KEYS_AND_VALUES.search(str(term.key)) for term in terms):
        return False
    return _groups(rule.equation.left) != _groups(rule.equation.right)


def _groups(terms: Iterable[Term]) -> set[str]:
    return {group for term in terms for group in re.findall(r"\([^+)]*\)", str(term))}


def _touches(rule: Rule, entries: object) -> bool:
    """Whether ``target_modules`` may name a module of a rule."""
    if not isinstance(entries, list) or ALL_LINEAR in entries:
        return True
    for term in (*rule.equation.left, *rule.equation.right):
        path = str(term.key).removesuffix(".weight")
        leaf = path.rpartition(".")[2]
        if "{" in leaf or targets_module([e.rpartition(".")[2] for e in entries], path):
            return True
    return False
