"""The book of what was learned: rules with kinds, what is carried over, and what is dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from regraft.equation.notation import parse_equation, parse_key
from regraft.learning.assemble import Drafted
from regraft.learning.content import Tensor
from regraft.learning.infer import Inferred
from regraft.learning.naming import Rename, Titles, kept_rules, rename_rules
from regraft.learning.relate import Names, carried
from regraft.learning.roles import KindOf, Kinds, kinds_of
from regraft.names.keys import group_names
from regraft.rules.book import Book, Drop, Parameters, Rule, library, table_of
from regraft.rules.direction import SIDES
from regraft.rules.templates import match_group

Tensors = Mapping[str, Tensor]
Orders = Callable[[], Mapping[str, Sequence[str]]]
"""Modules and their own parameters, in the order in which their class registers them, where a class can be asked."""


def make_book(
    rules: Sequence[tuple[str, Drafted]],
    found: Inferred,
    sides: tuple[Tensors, Tensors],
    *,
    name: str,
    layouts: tuple[str, str],
    model_types: Sequence[str],
    kinds: tuple[KindOf, KindOf],
    source: str,
) -> Book:
    """A book of equations and the rest; ``sides`` are the tensors before and after, of all sizes."""
    before, after = ({n: t.shape for n, t in side.items()} for side in sides)
    known = Kinds(kinds, (before, after))
    titles = Titles()
    renames: list[Rename] = []
    made: list[Rule] = []
    for text, each in rules:
        rename = Rename.of(text, each)
        if rename is not None:
            renames.append(rename)
            continue
        equation = parse_equation(text)
        pair = kinds_of(equation.left, equation.right, each, kinds)
        made.append(Rule(titles.of(str(equation.right[0].key)), equation, *pair, name, ""))
    renamed, modules = rename_rules(renames, sides, known, titles, name)
    split = Names([*sides[0], *sides[1]])
    kept: dict[str, list[str]] = defaultdict(list)
    for each_name in found.kept:
        kept[carried([each_name], split)[0]].append(each_name)
    turned, carries = kept_rules(kept, known, titles, name)
    books = [b for b in library() if set(b.reclaimed_model_types) & set(model_types)]
    of_transformers = any(layout.startswith("transformers-") for layout in layouts)
    reclaimed = sorted({n for b in books for n in b.reclaimed}) if of_transformers else []
    return Book(
        name,
        f"Learned: from {layouts[0]} to {layouts[1]}",
        *layouts,
        tuple(model_types),
        (*renamed, *made, *turned),
        tuple(carries),
        (),
        (),
        tuple(reclaimed),
        tuple(model_types) if reclaimed else (),
        "",
        source,
        tuple(_drops(found, split)),
        module_rules=tuple(modules),
    )


def with_tables(book: Book, orders: Orders | None) -> Book:
    """A book with a table for each module whose parameters' order is known, by the module's path.

    ``orders`` is only asked where the book has modules without one.
    """
    missing = [(side, module) for side in SIDES for module in book.unordered(side)]
    if orders is None or not missing:
        return book
    tables = list(book.parameters)
    known = orders()
    for side, module in missing:
        key = parse_key(module.module)
        names = {
            tuple(listed)
            for path, listed in known.items()
            if set(module.names) <= set(listed)
            and match_group(key, group_names([path])[0]) is not None
        }
        if len(names) == 1:
            told = [name for name in names.pop() if name in module.names]
            tables.append(Parameters((side,), key, tuple(told)))
    return replace(book, parameters=tuple(tables))


def order_questions(book: Book) -> list[str]:
    """What to add to a book before adapters are converted: tables whose order of names nobody told."""
    lines = []
    for side in SIDES:
        for module in book.unordered(side):
            table = table_of(side, module.module, module.names).splitlines()
            lines.append(
                f"In which order does the class of {module.module} register its parameters? Adapters of several of "
                "them are refused until this says it, with the names in that order: "
                + "; ".join(table)
            )
    return lines


def _drops(found: Inferred, split: Names) -> list[Drop]:
    drops = [
        _drop("left", key, "nothing of it is in the other layout")
        for key in carried(found.unused, split)
    ]
    drops += [
        _drop("right", key, f"not made: {found.odd[n]}")
        for n in found.odd
        for key in carried([n], split)
    ]
    return list({(d.sides, str(d.key)): d for d in drops}.values())


def _drop(side: str, key: str, why: str) -> Drop:
    return Drop(("left",) if side == "left" else ("right",), parse_key(key), why, "")


def comment(
    seen: Sequence[tuple[bool, bool]],
    counts: tuple[int, int],
    first: Inferred,
    notes: Sequence[str],
    *,
    live: bool,
) -> str:
    """What stands above a learned book: its evidence, and what to check.

    ``seen`` says of each size whether it was learned from, and whether the book is right there.
    """
    pairs = len(seen)
    right = sum(equal for _, equal in seen)
    fresh = sum(equal for learned_from, equal in seen if not learned_from)
    lines = [
        "Learned by regraft from what a converter made of weights.",
        f"Seen at {pairs} size{'s' if pairs > 1 else ''}; "
        f"{counts[0]} of {counts[1]} tensors explained.",
        f"Equal bit for bit, both ways, at {right} of them, {fresh} of which it was not learned from.",
    ]
    if not live:
        lines.append(
            "Kinds are told from names and numbers of dims: check them before you convert adapters."
        )
    if pairs == 1:
        lines.append(
            "Sizes that are numbers here hold for that size: learn from a second one to have them named."
        )
    if first.by_name:
        lines.append(
            f"{first.by_name} tensors are equal to others: only their names told which is which."
        )
    return "\n".join([*lines, *dict.fromkeys(notes)])
