"""What is known of an adapter's base: by the rule books of its types, and by its class where these do not tell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from msgspec import Struct

from regraft.names.keys import Group
from regraft.planning.detect import Layouts, detect_layouts
from regraft.planning.lookup import Lookup
from regraft.planning.model import Foreign, ModelConfig, Scope, Told
from regraft.planning.outside import strange_heads
from regraft.planning.own_class import own_modules, told_by_class, whole_class
from regraft.rules.book import Book


class Base(Struct, frozen=True, eq=False):
    """What is known of a model, for names that something has for its tensors and modules."""

    books: tuple[Book, ...]
    """None where nothing knows the model."""
    scopes: Mapping[str, Scope]
    layouts: Layouts
    """What the names tell of the layout that they are in."""
    told: Told | None
    """What its class says, where that was asked."""
    unchecked: tuple[str, ...]
    """Notes on names that nobody could be asked about."""
    heads: tuple[Group, ...]
    """Heads among the names that its class has not."""
    own: str | None
    """A note on modules of a class that is not transformers' own, where it is of one."""


def look_up_base(
    model: ModelConfig,
    books: tuple[Book, ...],
    names: Sequence[Group],
    modules: Sequence[Group],
    foreign: Foreign | None,
    *,
    is_whole: bool,
    ask: Callable[[], Told | None],
    classes: Sequence[str],
    there: Callable[[], Collection[str]],
) -> Base:
    """Look names up in the rule ``books`` of a model's types, and ask its class where these lack a word for one.

    ``names`` are those of tensors, the weights of ``modules`` first. ``is_whole`` says that the books know all parts of
    the model; otherwise its class is asked in any case. ``ask`` gives what the class says; ``classes`` are
    those whose heads may be among the names, ``there`` gives the names of the base's own weights, where these are
    known.
    """
    scopes = {book.name: model.scope_of(book.model_types) for book in books}
    lookup = Lookup.of(books, names, scopes, modules)
    bare = lookup.without_parameters
    if is_whole:
        told, unchecked = told_by_class(bare, model, foreign, ask)
    else:
        told, unchecked = ask(), ()
    heads = tuple(strange_heads(bare, classes)) if is_whole else ()
    if told is not None:
        others = tuple(book for book in books if book.tells != "both")
        books, scopes = (told.book, *others), {book.name: scopes[book.name] for book in others}
        lookup = Lookup.of(books, names, scopes, modules, known=lookup)
    adapted = {f"{group.template}.weight" for group in modules}
    if books:
        own = own_modules(lookup, model, foreign, adapted=adapted, there=there)
    else:
        own = whole_class(names, model, foreign, adapted=adapted, there=there)
    if own.note is not None:
        books, scopes = (*books, *own.books), {**scopes, **own.scopes}
        lookup = Lookup.of(books, names, scopes, modules, known=lookup)
    layouts = detect_layouts(lookup)
    return Base(books, scopes, layouts, told, unchecked, heads, own.note)


__all__ = ["Base", "look_up_base"]
