"""What the tensors of a model are, by their rule books and layout, and the plan of what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from msgspec import Struct, field

from regraft.equation.notation import Key, Term
from regraft.equation.sizes import SizeError, UnknownSizeError, solve_sizes
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Choice,
    Finding,
    RegraftError,
    UnmatchedKeysError,
)
from regraft.errors.extras import lacking
from regraft.layouts.graph import Edge, edges_to, route_between
from regraft.names.keys import MARK, Group
from regraft.planning.build import Advice, build_plan, unmatched_advice
from regraft.planning.compose import plan_along
from regraft.planning.detect import detect_layouts, names_tell, telling
from regraft.planning.lookup import Lookup
from regraft.planning.model import Foreign, ModelConfig, Scope, Told
from regraft.planning.outside import strange_heads
from regraft.planning.own_class import own_modules, told_by_class, unchecked_names
from regraft.planning.plan import Carried, Headers, Plan
from regraft.rules.book import Book, Carry, Rule, books_for, covers, library
from regraft.rules.mtp import Counts, MtpKeys, find_mtp, with_mtp
from regraft.rules.templates import match_group
from regraft.values import replace


class Unstacked(Struct, frozen=True, eq=False):
    """Experts that stay one by one in every layout."""

    carried: tuple[Carried, ...] = ()
    why: str = ""

    def __len__(self) -> int:
        return sum(len(item.group) for item in self.carried)

    def carry_of(self, name: str) -> Carry | None:
        """What says that a tensor stays; ``None`` for others."""
        for item in self.carried:
            if name in item.group.names():
                return item.carry
        return None

    def without(self, headers: Headers) -> Headers:
        """Everything but these experts."""
        if not self.carried:
            return headers
        mine = np.concatenate([item.group.ids for item in self.carried])
        groups = [group.take(~np.isin(group.ids, mine)) for group in headers.groups]
        return Headers([g for g in groups if len(g)], headers.shapes, headers.dtypes)

    def beside(self, plan: Plan, headers: Headers) -> Plan:
        """A plan of everything else with these experts in it; ``headers`` are those of all tensors."""
        if not self.carried:
            return plan
        return replace(plan, headers=headers, carried=(*plan.carried, *self.carried))


Unstack = Callable[[Sequence[Book], Mapping[str, Scope], str], Unstacked]
"""What finds experts that stay one by one, by the books of a model and their scopes: its messages name the file."""


class Detected(Struct, frozen=True):
    """What a checkpoint is."""

    books: tuple[Book, ...]
    scopes: dict[str, Scope]
    layout: str | None
    """``None`` where its names are the same in every layout."""
    evidence: tuple[str, ...]
    imported: bool = False
    """Whether the installed transformers told the rules: then old names may have more than one spelling."""
    notes: tuple[str, ...] = ()
    """What the user should know besides."""
    architecture: str | None = None
    """The class that the model was taken for, where it matters."""
    unstacked: Unstacked = field(default_factory=Unstacked)
    """Quantised experts that stay one by one in every layout."""
    mixed: tuple[str, ...] = ()
    """The layouts that parts are of, where they are of several."""
    mtp: MtpKeys = field(default_factory=MtpKeys)
    """The layers for predicting further tokens."""


def detect(
    headers: Headers,
    model: ModelConfig | None,
    where: str,
    source: str | None = None,
    foreign: Foreign | None = None,
    spelled: Sequence[str] = (),
    unstack: Unstack | None = None,
) -> Detected:
    """The rule books for a checkpoint and the layout its names are of.

    Without a config, the names alone tell the book, where they do. ``foreign`` is asked for models that the
    library does not know as a whole; ``spelled`` are names that the checkpoint once had. Experts that ``unstack``
    finds tell no layout.

    Raises ``UnmatchedKeysError`` where no book knows the model, ``AmbiguousError`` where several do
    and differ, ``BadInputError`` where names of two layouts stand together.
    """
    imported: Told | None = None
    unchecked: tuple[str, ...] = ()
    lookup: Lookup | None = None
    if model is not None:
        model_types = model.model_types()
        found_books = books_for(model_types)
        additions = tuple(book for book in found_books if book.is_addition)
        books = tuple(book for book in found_books if not book.is_addition)
        counts = Counts.of(part for _, part in model.parts())
        known = covers(books, model_types)
        mtp = find_mtp(headers.groups, counts, where) if known else MtpKeys()
        lookup = Lookup.of(
            books,
            mtp.without(headers.groups),
            {book.name: model.scope_of(book.model_types) for book in books},
        )
        imported, unchecked = _asked(lookup, headers, model, foreign, spelled, known=known)
        if not books and imported is None and not additions:
            raise UnmatchedKeysError(
                Finding(
                    "unknown-model",
                    f"{', '.join(model_types)} has no built-in rules, and {_who_could_know()}",
                    where=model.path,
                    fix=f"{_how_to_ask()}, or write a rule book for it; `regraft rules list` shows what is built in",
                )
            )
        if imported is not None:
            # transformers speaks of its own layouts; how other tools name the same model, it does not know.
            books = (imported.book, *(book for book in books if book.tells != "both"))
        scopes = {book.name: model.scope_of(book.model_types) for book in books}
        if imported is not None:
            scopes[imported.book.name] = Scope()
        books = (*books, *additions)
        scopes |= {book.name: model.scope_of(book.model_types) for book in additions}
        told = f"the model is {', '.join(model_types)} ({model.path})"
        if imported is not None:
            told = f"{told}; {imported.evidence}"
        if imported is not None or not known:
            keys = (key for book in books for key in _own_keys(book))
            mtp = find_mtp(headers.groups, counts, where, keys if imported is not None else ())
    else:
        book = _book_by_names(headers, where)
        books, scopes = (book,), {book.name: Scope()}
        told = f"the names are those of {book.title.split(':')[0]}"
        mtp = find_mtp(headers.groups, Counts(), where)
        lookup = Lookup.of(books, mtp.without(headers.groups))
        unchecked = unchecked_names(lookup)
    if mtp.groups:
        books = tuple(with_mtp(book, mtp) for book in books)
    lookup = Lookup.of(books, headers.groups, scopes, known=lookup)
    own = own_modules(lookup, model, foreign)
    books, scopes = (*books, *own.books), {**scopes, **own.scopes}
    unstacked = unstack(books, scopes, where) if unstack is not None else Unstacked()
    layout, evidence, mixed = _layout_of(
        books, scopes, _without(mtp, unstacked.without(headers)), where, source, lookup
    )
    said = unchecked if own.note is None else (own.note, *unchecked)
    found = Detected(
        books,
        scopes,
        layout,
        (told, evidence),
        notes=said,
        unstacked=unstacked,
        mixed=mixed,
        mtp=mtp,
    )
    if imported is None:
        return found
    notes = (*imported.notes, *said)
    return replace(found, imported=True, notes=notes, architecture=imported.architecture)


def _asked(
    lookup: Lookup,
    headers: Headers,
    model: ModelConfig,
    foreign: Foreign | None,
    spelled: Sequence[str],
    *,
    known: bool,
) -> tuple[Told | None, tuple[str, ...]]:
    """What the installed transformers says of a model, where books do not know all of it or lack words for names.

    ``known`` says whether the books know all parts of the model. Beside it, notes on names that nobody could be
    asked about.
    """

    def ask() -> Told | None:
        if foreign is None:
            return None
        names = [name for group in headers.groups for name in group.names()]
        shapes = {
            group.name(0): tuple(headers.shapes[int(group.ids[0])]) for group in headers.groups
        }
        classes = model.architectures()
        return foreign.book(model, names, shapes, classes, adapter=False, spelled=spelled)

    if any(_is_of(book, headers.groups) for book in lookup.books):
        return None, ()  # transformers knows nothing of another tool's names
    if not known:
        return ask(), ()
    if any(not book.model_types for book in lookup.books):
        return None, ()
    heads = strange_heads(lookup, model.architectures())
    return told_by_class(lookup, model, foreign, ask, heads)


def _is_of(book: Book, groups: Sequence[Group]) -> bool:
    """Whether names are those of the tool that a book is for, all of them."""
    if book.tells == "both":
        return False
    own, other = book.terms(book.tells), book.terms("left" if book.tells == "right" else "right")
    return all(own.matches(group) for group in groups) and not all(map(other.matches, groups))


def _own_keys(book: Book) -> Iterator[Key]:
    """All keys that a book knows the model to have."""
    terms = [t for r in book.rules for t in (*r.equation.left, *r.equation.right)]
    yield from (t.key for t in [*terms, *(c.term for c in book.carries)] if t.key is not None)


def _without(mtp: MtpKeys, headers: Headers) -> Headers:
    """What tells the layout of a model: MTP layers may be in the other one, for nothing loads them with it."""
    return Headers(mtp.without(headers.groups), headers.shapes, headers.dtypes)


def detect_by_books(
    headers: Headers, books: Sequence[Book], scopes: dict[str, Scope], where: str
) -> Detected:
    """The layout of a model's tensors, where it is known which books are its.

    Raises ``BadInputError`` where names of two layouts stand together, ``AmbiguousError`` where nothing tells.
    """
    layout, evidence, mixed = _layout_of(books, scopes, headers, where, None)
    told = f"its rule book is {', '.join(book.name for book in books)}"
    return Detected(tuple(books), scopes, layout, (told, evidence), mixed=mixed)


def _layout_of(
    books: Sequence[Book],
    scopes: dict[str, Scope],
    headers: Headers,
    where: str,
    given: str | None,
    known: Lookup | None = None,
) -> tuple[str | None, str, tuple[str, ...]]:
    """The layout, ``None`` where it is not one only; what told it; and the layouts of parts that differ."""
    if given is not None:
        if not any(given in book.layouts for book in books):
            edges_to(books, given)
        return given, "its layout was given", ()
    books = telling(books, headers.groups)
    told = detect_layouts(Lookup.of(books, headers.groups, scopes, known=known)).checked(where)
    if told.layout is not None:
        return told.layout, f"layout: {told.layout} (found {told.evidence[told.layout]})", ()
    if told.mixed:
        shown = "; ".join(f"{key} belongs to {name}" for name, key in told.evidence.items())
        return None, f"its parts are of several layouts: {shown}", told.mixed
    shaped = _by_shape(books, scopes, headers, where)
    if shaped is None:
        return None, "all its names are the same in every layout", ()
    return *shaped, ()


def _by_shape(
    books: Sequence[Book], scopes: dict[str, Scope], headers: Headers, where: str
) -> tuple[str, str] | None:
    """The layout that a shape tells, where a tensor has one name in both and not one shape."""
    unclear: str | None = None
    choices: tuple[Choice, ...] = ()
    for book in books:
        scope = scopes[book.name]
        for rule in book.rules:
            left, right = rule.equation.left, rule.equation.right
            if len(left) == len(right) == 1 and left[0].dims == right[0].dims:
                continue
            for group in headers.groups:
                keys = [side[0].key for side in (left, right)]
                if not scope.admits(group.template) or not all(
                    key is not None and match_group(key, group) for key in keys
                ):
                    continue
                shape = headers.shapes[int(group.ids[0])]
                sides = ((book.left, left[0]), (book.right, right[0]))
                fits = [name for name, term in sides if _fits(rule, term, shape, scope)]
                if len(fits) == 1:
                    return fits[0], f"{group.name(0)} has the shape {list(shape)}, as in {fits[0]}"
                if unclear is None:
                    unclear = group.name(0)
                    choices = tuple(
                        Choice(name, f"its shape fits {term}", f"its dims are {_dims(term)}")
                        for name, term in sides
                    )
    if unclear is not None:
        raise AmbiguousError(
            Finding(
                "which-layout",
                "its name is the same in both layouts, and its shape fits both, or neither",
                where=where,
                key=unclear,
                fix="say with --from which layout it is in",
                choices=choices,
            )
        )
    return None


def _dims(term: Term) -> str:
    return " ".join(map(str, term.dims))


def _fits(rule: Rule, term: Term, shape: tuple[int, ...], scope: Scope) -> bool:
    try:
        solve_sizes(
            rule.equation,
            [(term, shape)],
            lookup=scope.look_up,
        )
    except UnknownSizeError:
        return True
    except SizeError:
        return False
    return True


def make_plan(
    headers: Headers,
    known: Detected,
    target: str,
    where: str,
    unmatched_fix: Advice = unmatched_advice,
) -> Plan | None:
    """The plan to a layout; ``None`` where the checkpoint is in it already, and spelled as usual.

    ``unmatched_fix`` says what to do about keys that nothing explains.

    Raises what `build_plan` raises.
    """
    if known.mixed and target not in known.mixed:
        raise BadInputError(
            Finding(
                "mixed-layouts",
                f"its parts are of {' and '.join(known.mixed)}, and {target} is neither",
                where=where,
                fix=f"convert it to {known.mixed[-1]} first",
            )
        )
    route = route_between(known.books, known.layout, target, where).steps
    if known.layout == target:
        books = [b.usual_spelling() for b in known.books if b.left == target and b.respelled]
        return build_plan(headers, edges_to(books, target), where=where) if books else None
    rest = known.unstacked.without(headers)
    plan = plan_along(
        rest,
        route,
        scopes=known.scopes,
        mixed=bool(known.mixed),
        where=where,
        unmatched_fix=unmatched_fix,
    )
    return known.unstacked.beside(plan, headers)


def _evidence(book: Book, groups: Sequence[Group], scope: Scope) -> list[tuple[str, str]]:
    sides = (
        (book.left, [t.key for r in book.rules for t in r.equation.left if t.key is not None]),
        (book.right, [t.key for r in book.rules for t in r.equation.right if t.key is not None]),
    )
    found = []
    for group in groups:
        if not scope.admits(group.template):
            continue
        hits = [name for name, keys in sides if any(match_group(k, group) for k in keys)]
        if len(hits) == 1:
            found.append((hits[0], group.name(0)))
    return found


def _model_choice(book: Book, made: frozenset[str], all_made: Iterable[frozenset[str]]) -> Choice:
    """A model that names fit, with a tensor that only its result has."""
    others = frozenset().union(*(each for each in all_made if each != made))
    alone = sorted(made - others) or sorted(made)
    shown = alone[0].replace(MARK, "*")
    return Choice(book.model_types[0], f"the names are those of {book.title}", f"it has {shown}")


def _book_by_names(headers: Headers, where: str) -> Book:
    outcomes: dict[frozenset[str], Book] = {}
    mtp = find_mtp(headers.groups, Counts(), where)
    books = library()
    for book in books:
        groups = _without(mtp, headers).groups
        evidence = _evidence(book, groups, Scope())
        if not evidence or (book.tells != "both" and not names_tell(book, groups)):
            continue
        layout = evidence[0][0]
        try:
            plan = build_plan(headers, [Edge.out_of(with_mtp(book, mtp), layout)], where=where)
        except RegraftError:
            if len(books) == 1:
                raise  # it is the book that was meant
            continue
        outcomes.setdefault(frozenset(g.template for g in plan.targets()), book)
    if not outcomes:
        raise UnmatchedKeysError(
            Finding(
                "model-needed",
                "there is no config.json, and the names do not tell which model this is",
                where=where,
                fix="give the model with --model (its folder or its config.json)",
            )
        )
    if len(outcomes) > 1:
        names = ", ".join(book.name for book in outcomes.values())
        raise AmbiguousError(
            Finding(
                "which-model",
                f"the names fit models whose layouts differ: {names}",
                where=where,
                fix="give the model with --model (its folder or its config.json), or one of these with --from",
                choices=tuple(
                    _model_choice(book, made, outcomes)
                    for made, book in outcomes.items()
                    if book.model_types
                ),
            )
        )
    return next(iter(outcomes.values()))


def _who_could_know() -> str:
    if lacking("transformers", "torch") is None:
        return "the installed transformers does not know it"
    return "transformers, which could be asked, is not installed"


def _how_to_ask() -> str:
    line = lacking("transformers", "torch")
    return line or "install a release of transformers that has the model"
