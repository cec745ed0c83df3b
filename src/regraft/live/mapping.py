"""What the installed transformers does to the names of the models in a holder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from regraft.bridges.transformers.imported import Imported, import_model
from regraft.bridges.transformers.registry import check_version, read_key_mapping, warn_of_release
from regraft.checkpoints.quantization import title_of_part
from regraft.errors import BadInputError, Finding, UnmatchedKeysError
from regraft.live.ruled import Ruled
from regraft.names.live import Live, LiveModel, walk
from regraft.names.patterns import patterns
from regraft.names.resolve import Resolved, resolve
from regraft.report import count_in_words
from regraft.rules.book import Book, own_books


@dataclass(frozen=True, repr=False)
class Mapping:
    """The models that a holder holds, and what old names become in each of them. Print it to see all of it."""

    live: Live
    key_mapping: dict[str, str] = field(default_factory=dict)
    books: tuple[Book, ...] = ()
    """Rule books of the user's own, which come before the registry."""

    @cached_property
    def imported(self) -> tuple[Imported | Ruled, ...]:
        """What the user's books or the registry do to each model; looked up when it is first needed."""
        told: list[Imported | Ruled] = []
        for model in self.live.models:
            ruled = Ruled.of(model, self.books) if self.books else None
            told.append(ruled or import_model(model.skeleton, self.key_mapping))
        return tuple(told)

    def resolve(self, keys: Sequence[str]) -> Resolved:
        """Which of a file's keys is which tensor of which model, whatever its saver had wrapped around it.

        Raises ``UnmatchedKeysError`` where nothing lands, ``AmbiguousError`` where two models fit.
        """
        return resolve(self.live, keys, [imported.lands for imported in self.imported])

    def rename(self, key: str) -> str:
        """The live key for an old or a new one, bare or with prefixes; of a tensor that is cut, the first part's.

        Raises ``UnmatchedKeysError`` for a key that none of the models knows.
        """
        return self.renames([key])[key][0]

    def renames(self, keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """For each key all live keys that it gives something to.

        Raises ``UnmatchedKeysError`` for keys that none of the models knows, all together.
        """
        resolved = self.resolve(keys)
        result: dict[str, tuple[str, ...]] = {key: (k,) for key, k in resolved.carried.items()}
        for part in resolved.parts:
            model, imported = self.live.models[part.model], self.imported[part.model]
            imported.check_known()
            old = list(part.keys)
            for canonical, new in zip(old, imported.targets(old), strict=True):
                places = tuple(live for name in new for live in model.keys[name])
                result[part.keys[canonical]] = places
            for double, kept in part.doubles.items():
                result[double] = result[kept]
        if resolved.unmatched:
            raise UnmatchedKeysError([self.unknown(key) for key in resolved.unmatched])
        return {key: result[key] for key in keys}

    def unknown(self, key: str) -> Finding:
        """What is said of a key that no model has a place for."""
        names = " or ".join(imported.name for imported in self.imported)
        quantised = title_of_part(key)
        if quantised is not None:
            return Finding(
                "unmatched",
                f"it is a part of a quantised weight ({quantised}), and these are converted in files only",
                key=key,
                fix="convert the checkpoint's files with `regraft convert`, or dequantise the weights first",
            )
        return Finding(
            "unmatched",
            f"neither {names} nor what is around it has a place for this key, in an old spelling or the new one",
            key=key,
            fix="check that it is of this model, or take it out",
        )

    def lines(self) -> Iterator[str]:
        """What applies where, and to how many tensors."""
        for model, imported in zip(self.live.models, self.imported, strict=True):
            yield (
                f"{_place(model)}: {imported.name}, {count_in_words(len(model.keys), 'tensor')}, "
                f"as transformers {check_version()} has it"
            )
            if isinstance(imported, Ruled):
                yield from imported.lines()
                continue
            for applied in imported.scopes.applied:
                where = applied.path or "(the model)"
                if applied.entry is not None:
                    yield f"  {where}: registered as {applied.entry} ({applied.why})"
                elif not applied.path:
                    yield f"  {where}: {applied.why}"
            for change, times in _changes(imported).items():
                yield f"    {change}  ({times} times)"
        if self.live.own:
            yield f"the holder's own: {_shown(self.live.own.values())}"
        if self.live.adapters:
            yield f"adapters': {_shown(self.live.adapters.values())}"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        told = (f"{_place(m)}: {m.submodels[0].classes[0]}" for m in self.live.models)
        return f"<regraft mapping of {', '.join(told)}>"


def mapping(model: Any, *, key_mapping: dict[str, str] | None = None) -> Mapping:
    """What old names become in a live model, or in the models of a holder, whatever is wrapped around them.

    Args:
        model: a ``PreTrainedModel``, a module with one or more inside, or an object that has some as attributes.
        key_mapping: patterns and replacements of your own that come first, as ``from_pretrained`` takes them.

    Rule books of your own (``with regraft.only_books([...])``) come before transformers' registry, for the models
    that they know.

    Raises:
        BadInputError: it holds no model of transformers.

    >>> import transformers
    >>> config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    >>> print(mapping(transformers.ViTModel(config)).rename("encoder.layer.1.attention.attention.query.weight"))
    layers.1.attention.q_proj.weight
    """
    checked = _checked(key_mapping) if key_mapping else {}
    live = walk(model)
    if not live.models:
        raise BadInputError(
            Finding(
                "not-a-model",
                f"a {type(model).__name__} that holds no transformers model",
                fix="give a PreTrainedModel, or what holds one; for state dicts of any module, name a rule "
                "book of your own (with regraft.only_books('mine.toml'))",
            )
        )
    warn_of_release()
    own = tuple(book for book in own_books() if not book.is_addition)
    return Mapping(live, checked, own)


def _checked(key_mapping: Any) -> dict[str, str]:
    """Raises ``BadInputError`` for what transformers would not take as patterns and replacements."""
    if not isinstance(key_mapping, dict):
        message = f"key_mapping is a {type(key_mapping).__name__}"
        fix = "give a dict of patterns and replacements"
        raise BadInputError(Finding("option", message, fix=fix))
    for pattern, text in key_mapping.items():
        try:
            if not isinstance(text, str):
                raise TypeError(f"the replacement is a {type(text).__name__}")
            re.compile(pattern).sub(text, "")
            # transformers reads a replacement as a pattern, too, and not all that `re` takes is one.
            read_key_mapping({pattern: text})
        except Exception as error:
            message = f"key_mapping: no pattern and replacement: {error}"
            raise BadInputError(
                Finding("option", message, key=str(pattern), fix="correct it")
            ) from None
    return dict(key_mapping)


def _changes(imported: Imported) -> dict[str, int]:
    """Every rule that changes a name, with how many tensors it makes; those of one module's leaves together."""
    counts = imported.counts()
    together: dict[tuple[str, str], tuple[list[str], int]] = {}
    result: dict[str, int] = {}
    for rule in imported.book().rules:
        left = [str(term.key) for term in rule.equation.left]
        right = [str(term.key) for term in rule.equation.right]
        if left == right:
            continue
        times = counts.get(right[0], 0)
        old, _, leaf = left[0].rpartition(".")
        new, _, new_leaf = right[0].rpartition(".")
        if len(left) == len(right) == 1 and leaf == new_leaf and old and new:
            leaves, before = together.get((old, new), ([], 0))
            together[old, new] = [*leaves, leaf], before + times
        else:
            result[f"{', '.join(left)} -> {', '.join(right)}"] = times
    for (old, new), (leaves, times) in together.items():
        shown = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        result[f"{old}.{shown} -> {new}.{shown}"] = times
    return result


def _place(model: LiveModel) -> str:
    return model.path or "(the whole)"


def _shown(names: Any) -> str:
    return ", ".join(pattern for pattern, _ in patterns(names))
