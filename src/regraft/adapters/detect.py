"""Finding out what an adapter is: which rule books apply, and which layout it is in, with the evidence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from regraft.adapters.protocol import Hints, Names
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding, UnmatchedKeysError
from regraft.errors.extras import lacking, or_ask_transformers
from regraft.layouts.names import known_layouts
from regraft.names.keys import Group
from regraft.planning.base import look_up_base
from regraft.planning.detect import Layouts, detect_layouts, mixed_layouts, names_tell
from regraft.planning.lookup import Lookup
from regraft.planning.model import (
    Foreign,
    ModelConfig,
    Scope,
    Told,
    load_model,
)
from regraft.planning.own_class import unchecked_names
from regraft.rules.book import Book, books_for, covers, library
from regraft.rules.direction import SIDES
from regraft.rules.releases import layouts_of
from regraft.rules.templates import match_group
from regraft.storage.checkpoint import names_beside
from regraft.storage.hub import find_cached
from regraft.storage.json_files import folder_with_config
from regraft.values import replace

_TASKS = {
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "CAUSAL_LM": ("ForCausalLM",),
}
"""What the classes are called that adapters are trained in, by the task that PEFT's configs name."""


class Known(Struct, frozen=True):
    """The rule books that apply and what told it."""

    books: tuple[Book, ...]
    scopes: Mapping[str, Scope]
    model: ModelConfig | None
    model_type: str | None
    """That of the whole base model, where it is known."""
    evidence: str
    foreign: Foreign | None = None
    """What made the book for just this model and this file, where that is not of the library."""
    notes: tuple[str, ...] = ()
    """What the user should know besides."""
    architecture: str | None = None
    """The class that the base was taken for, where it matters."""
    names: Names | None = None
    """The adapter's own, to tell whose they are where the base does not explain them."""
    hints: Hints | None = None
    """What the adapter says of its base."""
    layouts: Layouts = Layouts((), {}, None)
    """What its names tell of the layout that it is in."""

    @property
    def imported(self) -> bool:
        """Whether the book was made for just this model and this file."""
        return self.foreign is not None

    def unmatched_fix(self) -> str:
        """What to do about keys that none of the books explains."""
        if self.model is None:
            return "give the base model with --model (its folder or its config.json)"
        if (told := self._other_base()) is not None:
            return told
        return (
            f"check the prefix and the model, or add the key to a rule book{or_ask_transformers()}"
        )

    def _other_base(self) -> str | None:
        """To give another base, where the adapter itself tells that it was trained on one of another type."""
        if self.hints is None or self.names is None or self.model is None:
            return None
        given = f"the one given is {self.model.model_type or 'another'}"
        named = model_beside(self.hints)
        if named is not None and named.model_type != self.model.model_type:
            base = self.hints.base or self.hints.beside
            return f"give the base that it was trained on, {base} ({named.model_type}); {given}"
        others = _families_explaining(self.names)
        if not others:
            return None
        says = f" (it names {self.hints.base})" if self.hints.base else ""
        whose = f", and the names are those of {', '.join(others)}" if len(others) <= _SOME else ""
        return f"give the base that it was trained on{says}; {given}{whose}"


def find_books(
    names: Names,
    hints: Hints,
    model: ModelConfig | None,
    where: str,
    foreign: Foreign | None = None,
) -> Known:
    """The rule books for an adapter: by its base's config, by what its own config says, or by its keys.

    ``foreign`` is asked for models that the library does not know as a whole.

    Raises ``UnmatchedKeysError`` where no book knows the model, ``AmbiguousError`` where several books fit
    and lead to different results.
    """
    if not names.bound:
        told = "nothing in it is bound to a layer of the base"
        return Known((), {}, model, None, told, names=names, hints=hints)
    groups = names.candidates
    model = model or model_beside(hints)
    if model is not None:
        return _by_model(names, hints, model, where, foreign)
    if (named := hints.model_type) is None:
        return _by_keys(names, hints, where)
    books = tuple(books_for([named]))
    if not books:
        raise _unknown_model([named], f"{where}/{hints.source}", given=False)
    lookup = Lookup.of(books, groups, modules=names.modules)
    if unknown := lookup.unknown_modules:
        raise _unexplained(unknown[0], hints, where)
    return Known(
        books,
        {},
        None,
        named,
        f"base model: {named} ({hints.source})",
        notes=unchecked_names(lookup),
        names=names,
        hints=hints,
        layouts=detect_layouts(lookup),
    )


def _by_model(
    names: Names, hints: Hints, model: ModelConfig, where: str, foreign: Foreign | None
) -> Known:
    """What is known of an adapter by its base's config.

    Raises ``BadInputError`` where the adapter names a base of another family, ``UnmatchedKeysError`` where nothing
    knows the model.
    """
    given, model = model, _replicate_layers(model, hints.replicated)
    types, named = model.model_types(), hints.model_type
    classes = hints.classes or (*model.architectures(), *_TASKS.get(hints.task or "", ()))
    books = tuple(books_for(types))
    is_whole = covers(books, types)
    if named is not None and named not in types and books_for([named]):
        raise _of_another_family(hints, model, where)
    base = look_up_base(
        model,
        books,
        names.candidates,
        names.modules,
        foreign,
        is_whole=is_whole,
        ask=lambda: _ask(foreign, names, hints, given),
        classes=classes,
        there=lambda: _names_of_base(given),
    )
    if not base.books:
        raise _unknown_model(types, model.path, given=True)
    told = base.told
    if told is not None:
        evidence, notes = f"{told.evidence} ({model.path})", told.notes
    elif books:
        evidence = f"the base model is {', '.join(dict.fromkeys(types))} ({model.path})"
        notes = (*base.unchecked, *_note_on_heads(base.heads, classes))
    else:
        evidence, notes = f"the base is {model.architectures()[0]} ({model.path})", ()
    return Known(
        base.books,
        base.scopes,
        model if told is None else given,
        model.model_type,
        evidence,
        foreign if told is not None else None,
        notes if base.own is None else (*notes, base.own),
        told.architecture if told is not None else None,
        names,
        hints,
        base.layouts,
    )


def _names_of_base(model: ModelConfig) -> list[str]:
    return model.weights.names() if model.weights is not None else names_beside(Path(model.path))


def _by_keys(names: Names, hints: Hints, where: str) -> Known:
    """What is known of an adapter by its keys alone.

    Raises ``UnmatchedKeysError`` where they fit no model, ``AmbiguousError`` where they fit several that differ.
    """
    fitting = books_by_keys(names)
    if not fitting:
        raise UnmatchedKeysError(
            Finding(
                "model-needed",
                "nothing in these keys tells which model they are for",
                where=where,
                fix="give the base model with --model (its folder or its config.json)",
            )
        )
    outcomes: dict[object, list[tuple[Book, ...]]] = {}
    for books in _by_family(fitting):
        made = frozenset(_outcome(book, names) for book in books if book in fitting)
        outcomes.setdefault(made, []).append(books)
    if len(outcomes) > 1:
        raise _undecided(list(outcomes.values()), names, where)
    (alike,) = outcomes.values()
    return Known(
        alike[0],
        {},
        None,
        None,
        f"the keys are those of {_families_of(fitting)}",
        names=names,
        hints=hints,
        layouts=detect_layouts(names.lookup(alike[0])),
    )


def _by_family(fitting: Sequence[Book]) -> list[tuple[Book, ...]]:
    """The books of each family that some books are for: those, and others that lead on from their layouts."""
    ends = {frozenset(book.layouts) for book in fitting}
    found: dict[tuple[str, ...], tuple[Book, ...]] = {}
    for book in fitting:
        for model_type in book.model_types or ("",):
            same = books_for([model_type]) if model_type else [book]
            mine = tuple(b for b in same if b in fitting or frozenset(b.layouts) not in ends)
            found.setdefault(tuple(b.name for b in mine), mine)
    return list(found.values())


_SOME = 4
"""Where more families fit, none is named."""


def _families_explaining(names: Names) -> list[str]:
    """The model types of the library whose books explain every module of an adapter."""
    found: dict[str, None] = {}
    for books in _by_family(books_by_keys(names)):
        if books and not names.lookup(books).unknown_modules:
            found |= dict.fromkeys(books[0].model_types)
    return list(found)


def _undecided(
    outcomes: Sequence[Sequence[tuple[Book, ...]]], names: Names, where: str
) -> AmbiguousError:
    """Which model it is for, with one family of each kind to choose."""
    firsts = [alike[0] for alike in outcomes]
    types = [name for books in firsts for name in books[0].model_types[:1]]
    fits = ", ".join(dict.fromkeys(types)) or ", ".join(books[0].name for books in firsts)
    return AmbiguousError(
        Finding(
            "which-model",
            f"the keys fit models whose layouts differ (such as {fits})",
            where=where,
            fix="give the base model with --model (its folder or its config.json), or one of these with --from",
            choices=tuple(
                Choice(
                    books[0].model_types[0],
                    f"the keys are those of {books[0].title}",
                    _difference(books, names),
                )
                for books in firsts
                if books[0].model_types
            ),
        )
    )


def _difference(books: Sequence[Book], names: Names) -> str:
    """A rule that moves one of the keys."""
    for book in books:
        for group in names.candidates:
            for side in SIDES:
                for term, _ in book.terms(side).matching(group):
                    return f"{term.rule.name} moves {group.name(0)}"
    return ""


def _families_of(books: Sequence[Book]) -> str:
    """The models that books are for; several families name their tensors alike, so keys cannot tell one."""
    if len(books) > 1:
        return f"several families with one layout change ({', '.join(book.name for book in books)})"
    return " or ".join(books[0].model_types) or books[0].name


def books_of(hints: Hints, model: ModelConfig | None, where: str) -> tuple[Book, ...] | None:
    """The rule books of an adapter's base, where something besides its keys tells it.

    Raises ``UnmatchedKeysError`` where the library does not know all of the model.
    """
    model = model or model_beside(hints)
    if model is not None:
        books = tuple(books_for(model.model_types()))
        if not books or not covers(books, model.model_types()):
            raise _unknown_model(model.model_types(), model.path, given=True)
        return books
    named = hints.model_type
    if named is None:
        return None
    books = tuple(books_for([named]))
    if not books:
        raise _unknown_model([named], f"{where}/{hints.source}", given=False)
    return books


def base_names(names: Names) -> list[str]:
    """Names that tensors of the base may have, judging by an adapter's keys; others are no name of the base."""
    keys = [f"{name}.weight" for group in names.modules for name in group.names()]
    for group in names.tensors:
        for name in group.names():
            keys.append(name)
            parts = name.split(".")
            keys += (".".join(parts[:n]) + ".weight" for n in range(1, len(parts)))
    return keys


def _note_on_heads(strange: Sequence[Group], classes: Sequence[str]) -> tuple[str, ...]:
    """A note on heads that the base's class has not: an adapter's task may be another class's than the base's."""
    if not strange:
        return ()
    heads = sorted({name for group in strange for name in group.names()})
    return (
        f"{', '.join(classes)} {'has' if len(classes) == 1 else 'have'} no {', '.join(heads)}; it loads into a "
        "model of a class that has it",
    )


def _ask(foreign: Foreign | None, names: Names, hints: Hints, model: ModelConfig) -> Told | None:
    """What the installed transformers knows of an adapter's base."""
    if foreign is None:
        return None
    keys = [*hints.spelled, *hints.remembered.names, *base_names(names)]
    classes = [*hints.classes, *model.architectures()]
    return foreign.book(model, keys, {}, classes, adapter=True, task=hints.task)


def _replicate_layers(model: ModelConfig, replication: Any) -> ModelConfig:
    """The model as PEFT builds it for ``layer_replication``: ranges of layers, one after the other."""
    if not isinstance(replication, list):
        return model
    layers = sum(end - start for start, end in replication)
    return replace(model, data={**model.data, "num_hidden_layers": layers})


def model_beside(hints: Hints) -> ModelConfig | None:
    """The config of the base that an adapter names, where it is on this machine."""
    folder = folder_with_config(hints.base) or folder_with_config(hints.beside)
    if folder is not None:
        return load_model(folder)
    cached = find_cached(hints.base) if hints.base else None
    if cached is not None and (cached / "config.json").is_file():
        return load_model(cached)
    return None


def _of_another_family(hints: Hints, model: ModelConfig, where: str) -> BadInputError:
    """The base that the adapter names must be the one that is given, where both are known."""
    types = ", ".join(dict.fromkeys(model.model_types()))
    return BadInputError(
        Finding(
            "wrong-base",
            f"its base is {hints.model_type}, but {model.path} is of {types}",
            where=where,
            key=f"{hints.source}: {_NAMED}",
            fix="give the base model that it was trained on",
        )
    )


def is_kin(hints: Hints, names: Names, model: ModelConfig) -> bool:
    """Whether an adapter may move between the model that it names and one that is the other's language model.

    They are of one family, and the layouts of what is adapted changed alike. A model that no book knows, as Llava,
    has any language model inside: its name tells nothing against one.
    """
    named = hints.model_type
    types = model.model_types()
    if named is None or named in types or not (mine := books_for([named])):
        return True
    if _family_name(named) not in map(_family_name, types):
        return False
    ends = set(layouts_of("transformers"))
    theirs = [book for book in books_for(types) if ends.issuperset(book.layouts)]
    return all(
        one is other or _outcome(one, names) == _outcome(other, names)
        for one in mine
        if ends.issuperset(one.layouts)
        for other in theirs
        if frozenset(one.layouts) == frozenset(other.layouts)
    )


_PARTS = frozenset({"vl", "omni", "thinker", "text", "model"})
"""What a model type has besides its family's name where it is that of a big model, or of the part with the text."""


def _family_name(model_type: str) -> str:
    """The family of a language model, whether it is alone or inside a bigger one.

    >>> [_family_name(name) for name in ("qwen3_vl_moe", "qwen3_moe", "glm4v_moe_text", "qwen2_5_vl")]
    ['qwen3_moe', 'qwen3_moe', 'glm4_moe', 'qwen2']
    """
    words = [word for word in model_type.lower().split("_") if word not in _PARTS]
    name = re.sub(r"(?<=\d)v(?=_|$)", "", "_".join(words))
    # Qwen2.5 is of the type qwen2 where it is alone.
    return re.sub(r"^qwen2_5(?=_|$)", "qwen2", name)


_NAMED = "auto_mapping"
"""The field in which PEFT names the class of the base."""


def why_of_another(findings: Iterable[Finding]) -> str | None:
    """Why an adapter belongs to another family than the base that was given; ``None`` where no problem says that."""
    of_another = (
        finding.message
        for finding in findings
        if finding.code == "wrong-base" and (finding.key or "").endswith(f": {_NAMED}")
    )
    return next(of_another, None)


def _unexplained(group: Group, hints: Hints, where: str) -> UnmatchedKeysError:
    """Without a config the parts of a composite model are not known; then its keys are not explained."""
    return UnmatchedKeysError(
        Finding(
            "model-needed",
            f"{hints.source} says that the base is {hints.model_type}, which does not explain this key; it may "
            "belong to a part of it that only its config names",
            where=where,
            key=group.name(0),
            fix="give the base model with --model (its folder or its config.json)",
        )
    )


def _unknown_model(model_types: Sequence[str], where: str, *, given: bool) -> UnmatchedKeysError:
    return UnmatchedKeysError(
        Finding(
            "unknown-model",
            f"{', '.join(model_types)} has no built-in rules",
            where=where,
            fix=f"{_how_to_ask(given=given)}; `regraft rules list` shows what is built in",
        )
    )


def _how_to_ask(*, given: bool) -> str:
    line = lacking("transformers", "torch")
    if not given:
        asked = "" if line is None else f" ({line})"
        return f"pass --model DIR (its config.json is enough), so that the installed transformers can be asked{asked}"
    ask = line or "install a release of transformers that has the model"
    return f"{ask}, so that it can be asked, or write a rule book"


def books_by_keys(names: Names) -> list[Book]:
    """The books that have a rule for one of the keys."""
    return [book for book in library() if _speaks_of(book, names)]


def _speaks_of(book: Book, names: Names) -> bool:
    if book.tells != "both":
        return names_tell(book, names.candidates)
    return any(
        book.terms(side).matches(group) for side in SIDES for group in names.candidates
    ) or any(_has_own_parameters(book, group) for group in names.modules)


def _has_own_parameters(book: Book, modules: Group) -> bool:
    """Whether a book lists the parameters of modules."""
    return any(match_group(table.module, modules) for table in book.parameters)


def _outcome(book: Book, names: Names) -> object:
    """What a book makes of an adapter's keys, to compare books by."""
    result: list[object] = []
    for group in names.candidates:
        hits = [
            (
                tuple(str(t) for t in rule.equation.left),
                tuple(str(t) for t in rule.equation.right),
                rule.left_kinds,
                rule.right_kinds,
            )
            for rule in book.rules
            for term in (*rule.equation.left, *rule.equation.right)
            if term.key is not None and match_group(term.key, group) is not None
        ]
        carried = any(
            carry.term.key is not None and match_group(carry.term.key, group) is not None
            for carry in book.carries
        )
        result.append((group.template, tuple(hits), carried or bool(hits)))
    for group in names.modules:
        for table in book.parameters:
            if match_group(table.module, group) is not None:
                kinds = tuple(_parameter_kinds(book, f"{table.module}.{n}") for n in table.names)
                result.append((group.template, table.sides, table.names, kinds))
    return tuple(result)


def _parameter_kinds(book: Book, key: str) -> tuple[tuple[str, str], ...]:
    """The kinds that a parameter has on either side."""
    return tuple(
        (side, kind)
        for rule in book.rules
        for side, terms, kinds in (
            ("left", rule.equation.left, rule.left_kinds),
            ("right", rule.equation.right, rule.right_kinds),
        )
        for term, kind in zip(terms, kinds, strict=True)
        if str(term.key) == key
    )


class Detected(Struct, frozen=True):
    """The layout an adapter is in; ``None`` where nothing tells, because its names are the same in all."""

    layout: str | None
    evidence: list[str]
    by_names: bool = False
    """Whether the names themselves tell it."""
    possible: tuple[str, ...] = ()
    """The layouts that all names may be of."""
    mixed: tuple[str, ...] = ()
    """The layouts that parts are of, where they are of several."""


def detect_layout(told: Layouts, hints: Hints, books: Sequence[Book], where: str) -> Detected:
    """The layout that the names tell; where they are the same in several, what else makes one likely.

    Raises ``BadInputError`` where the names of one rule are of two layouts.
    """
    if told.clash:
        raise mixed_layouts(told.clash, where)
    if told.layout is not None:
        shown = f"layout: {told.layout} (found {told.evidence[told.layout]})"
        return Detected(told.layout, [shown], by_names=True, possible=told.possible)
    if told.mixed:
        shown = "; ".join(f"{key} belongs to {name}" for name, key in told.evidence.items())
        return Detected(
            None, [f"its parts are of several layouts: {shown}"], by_names=True, mixed=told.mixed
        )
    known = told.possible or tuple(known_layouts())
    form, wrote = hints.layout, hints.remembered.layout
    if (form or wrote) in known:
        shown = f"its names are {form}'s" if form else f"regraft wrote it as {wrote}"
        return Detected(form or wrote, [shown], possible=known)
    # Names that a layout shares with another tool's are of the one in which adapters usually are.
    usual = tuple(name for name in known if any(book.adapters(name) for book in books))
    known = usual or known
    if len(known) == 1 and known[0] in told.evidence:
        shown = f"layout: {known[0]} (found {told.evidence[known[0]]})"
        return Detected(known[0], [shown], by_names=True, possible=known)
    same = "all its names are the same in every layout"
    if hints.likely is None or hints.likely[0] not in known:
        return Detected(None, [same], possible=known)
    likely, why = hints.likely
    return Detected(likely, [same, why], possible=known)
