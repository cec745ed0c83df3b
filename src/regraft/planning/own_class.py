"""What a class of its own adds to a model: a head, a projection, another tower beside a model that is known.

A config may name a class that is not transformers' own: a subclass, or code that comes with the model
(``auto_map``). Where the rule books explain the model that it is built of, what they do not explain are modules of
that class; no release changes their names, so they stay as they are, and it is said which they are. Where the base's
own weights are at hand, a module must be among them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from regraft.equation.notation import parse_equation
from regraft.errors.extras import lacking
from regraft.names.keys import MARK, Group
from regraft.names.patterns import patterns
from regraft.planning.lookup import Lookup
from regraft.planning.model import Foreign, ModelConfig, Scope, Told
from regraft.planning.outside import outside
from regraft.rules.book import Book, Carry
from regraft.rules.releases import layouts_of
from regraft.values import Struct


class OwnModules(Struct, frozen=True):
    """Books that carry over what a class of its own adds, with their scopes, and what is said of it."""

    books: tuple[Book, ...] = ()
    note: str | None = None

    @property
    def scopes(self) -> dict[str, Scope]:
        """A scope for each of the books: they speak of the whole model."""
        return {book.name: Scope() for book in self.books}


def own_modules(
    lookup: Lookup,
    model: ModelConfig | None,
    foreign: Foreign | None,
    *,
    adapted: Collection[str] = (),
    there: Callable[[], Collection[str]] = tuple,
) -> OwnModules:
    """What a model's class adds to the one that books explain; nothing for transformers' own classes.

    ``adapted`` are the templates of names that are weights of modules that an adapter adapts; ``there`` gives the
    names of the base's own weights, where these are known.
    """
    left = [g for g in lookup.unexplained if not _holds_parameters(g, adapted, lookup)]
    if not left or sum(map(len, left)) == sum(map(len, lookup.groups)) or model is None:
        return OwnModules()
    if not is_own_class(model, foreign):
        return OwnModules()
    base = set(there())
    if base:
        left = [_among(group, base) for group in left]
    left = [group for group in left if len(group)]
    if not left:
        return OwnModules()
    name = model.architectures()[0]
    ends = dict.fromkeys(book.layouts for book in lookup.books)
    carries = tuple(
        _carry(group.template, is_adapted=group.template in adapted, name=name) for group in left
    )
    made = tuple(_book(name, number, *end, carries) for number, end in enumerate(ends))
    names = [name for group in left for name in group.names()]
    shown = ", ".join(pattern for pattern, _ in patterns(names))
    return OwnModules(
        made,
        f"{name} is not a class of transformers; these are modules that it adds to the model it is built of, and "
        f"they stay as they are: {shown}",
    )


def whole_class(
    groups: Sequence[Group],
    model: ModelConfig,
    foreign: Foreign | None,
    *,
    adapted: Collection[str],
    there: Callable[[], Collection[str]],
) -> OwnModules:
    """A model of which no rule book knows anything, whose class comes with it: no release changes its names.

    The base's own weights must have all names of the adapter; nothing otherwise.
    """
    if not groups or not is_own_class(model, foreign):
        return OwnModules()
    base = set(there())
    if any(name not in base for group in groups for name in group.names()):
        return OwnModules()
    name = model.architectures()[0]
    carries = tuple(
        _carry(group.template, is_adapted=group.template in adapted, name=name) for group in groups
    )
    # Of transformers' releases it is known that they leave a class of somebody's own as it is.
    oldest, *_, newest = layouts_of("transformers")
    return OwnModules(
        (_book(name, 0, oldest, newest, carries),),
        f"{name} is not a class of transformers, and its weights have these very names, so nothing moves",
    )


def told_by_class(
    lookup: Lookup,
    model: ModelConfig,
    foreign: Foreign | None,
    ask: Callable[[], Told | None],
    heads: Sequence[Group] = (),
) -> tuple[Told | None, tuple[str, ...]]:
    """What the model's class says where rule books do not tell whether the model has all of a file's tensors.

    ``ask`` asks for the class's own book. A release may have tensors that a book of
    the library does not name yet, and some that no model has are left aside by its class. Beside it, a note on names
    that only look like a model's, where nobody could be asked about them. ``heads`` are those of the names that its
    class should not have.
    """
    strange = [*outside(lookup, model), *heads]
    if not strange and not lookup.unexplained:
        return None, ()
    named = model.architectures()
    there = foreign.has_class(named) if foreign is not None and named else None
    told = ask() if there else None
    if told is None:
        return None, _unchecked(strange, named, there=there)
    whole = not told.book.gaps and not Lookup.of((told.book,), lookup.groups).unexplained
    return told if strange or whole else None, ()


def unchecked_names(lookup: Lookup) -> tuple[str, ...]:
    """A note on names that only look like a model's, where no config tells its class."""
    return _unchecked(outside(lookup, None), (), there=None)


def _unchecked(
    strange: Sequence[Group], named: Sequence[str], *, there: bool | None
) -> tuple[str, ...]:
    if not strange:
        return ()
    shown = ", ".join(p for p, _ in patterns([name for g in strange for name in g.names()]))
    if not named:
        why = "the config names no class that could be asked"
    elif there is False:
        why = f"{named[0]} is not a class of transformers"
    else:
        line = lacking("transformers")
        why = "transformers is not installed, or does not have it as a whole"
        why = why if line is None else f"transformers is not installed ({line})"
    return (
        "whether the model has these could not be checked, because they are not where models of its kind have them, "
        f"and {why}; they are taken for what they are called: {shown}",
    )


def is_own_class(model: ModelConfig, foreign: Foreign | None) -> bool:
    """Whether a config names classes, and the installed transformers has none of them."""
    named = model.architectures()
    if not named or model.architecture is not None or foreign is None:
        return False
    return foreign.has_class(named) is False


def _holds_parameters(group: Group, adapted: Collection[str], lookup: Lookup) -> bool:
    """Whether an adapted module is one that a book knows by its parameters: stacked experts have no weight."""
    module = group.template.removesuffix(".weight")
    if group.template not in adapted or module == group.template:
        return False
    return lookup.knows_parameters(Group(module, group.ids, group.numbers))


def _among(group: Group, there: Collection[str]) -> Group:
    return group.take(np.array([name in there for name in group.names()], dtype=bool))


def _carry(template: str, *, is_adapted: bool, name: str) -> Carry:
    pieces = template.split(MARK)
    key = pieces[0] + "".join(f"{{n{i}}}{text}" for i, text in enumerate(pieces[1:]))
    dims, kind = ("o i", "linear") if is_adapted else ("...", "any")
    equation = parse_equation(f"{key} : {dims} == {key} : {dims}")
    return Carry(equation.left[0], equation, f"a module of {name}'s own", kind, name)


def _book(name: str, number: int, left: str, right: str, carries: tuple[Carry, ...]) -> Book:
    return Book(
        f"{name} ({number})" if number else name,
        f"{name}: modules of its own",
        left,
        right,
        (),
        (),
        carries,
        (),
        (),
        (),
        (),
        name,
        "the names of the file",
    )
