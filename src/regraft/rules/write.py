"""Writing a rule book as TOML, such that ``load_book`` gives the same book again, apart from places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import tomlkit
from tomlkit.items import AoT, Array, Item, Table

from regraft.rules.book import (
    PLAIN,
    Absent,
    Book,
    Carry,
    Drop,
    ModuleRule,
    Parameters,
    Rule,
    Special,
)
from regraft.rules.direction import Side

_OPEN = " : ..."


def write_book(book: Book, comment: str = "") -> str:
    """A rule book as TOML. What it included becomes part of it; ``comment`` stands above.

    >>> from regraft.rules.book import find_book
    >>> write_book(find_book("dbrx")).splitlines()[0]
    'name = "dbrx"'
    """
    document = tomlkit.document()
    for line in comment.splitlines():
        document.add(tomlkit.comment(line))
    document["name"] = book.name
    document["title"] = book.title
    document["left"] = book.left
    document["right"] = book.right
    document["model_types"] = _array(book.model_types)
    if book.reclaimed:
        document["reclaimed"] = _array(book.reclaimed)
    if book.reclaimed_model_types:
        document["reclaimed_model_types"] = _array(book.reclaimed_model_types)
    if book.source:
        document["source"] = book.source
    if book.tells != "both":
        document["tells"] = book.tells
    if not book.mtp:
        document["mtp"] = False
    _add(document, "module", map(_module, book.module_rules))
    _add(document, "equation", (_equation(rule) for rule in book.rules if not rule.module))
    _add(document, "carry", (_carry(list(same)) for _, same in groupby(book.carries, _alike)))
    _add(document, "drop", map(_drop, book.drops))
    _add(document, "absent", map(_absent, book.absents))
    _add(document, "parameters", map(_parameters, book.parameters))
    _add(document, "special", map(_special, book.specials))
    if book.left_adapters or book.right_adapters:
        adapters = tomlkit.table()
        for side, written in (("left", book.left_adapters), ("right", book.right_adapters)):
            if written:
                adapters[side] = written
        document["adapters"] = adapters
    return tomlkit.dumps(document)


def _add(document: tomlkit.TOMLDocument, name: str, tables: Iterable[Table]) -> None:
    array = AoT(list(tables))
    if len(array):
        document[name] = array


def _equation(rule: Rule) -> Table:
    table = tomlkit.table()
    table["name"] = rule.name
    text = rule.equation.text
    table["text"] = _lines(text) if "\n" in text else text
    table["left_kind"] = _kinds(rule.left_kinds)
    table["right_kind"] = _kinds(rule.right_kinds)
    if rule.reads:
        table["reads"] = rule.reads
    return table


def _kinds(kinds: Sequence[str]) -> str | Array:
    return kinds[0] if len(set(kinds)) == 1 else _array(kinds)


def _alike(carry: Carry) -> tuple[str, str, str]:
    """What carry-overs of one table share; the equation is ``term == term where ...``."""
    return carry.kind, carry.why, carry.equation.text.partition(" where ")[2]


def _carry(same: Sequence[Carry]) -> Table:
    kind, why, where = _alike(same[0])
    table = tomlkit.table()
    keys = [carry.equation.text.partition(" == ")[0].removesuffix(_OPEN) for carry in same]
    table["keys"] = _array(keys)
    if kind != "any":
        table["kind"] = kind
    if where:
        table["where"] = _lines(where) if "\n" in where else where
    table["why"] = why
    return table


def _drop(drop: Drop) -> Table:
    table = tomlkit.table()
    table["side"] = drop.sides[0]
    table["keys"] = _array([str(drop.key)])
    table["why"] = drop.why
    return table


def _absent(absent: Absent) -> Table:
    table = tomlkit.table()
    table["side"] = absent.sides[0]
    table["keys"] = _array([str(absent.key)])
    table["why"] = absent.why
    return table


def _parameters(parameters: Parameters) -> Table:
    table = tomlkit.table()
    table["side"] = _side(parameters.sides)
    table["module"] = str(parameters.module)
    table["names"] = _array(parameters.names)
    return table


def _module(rule: ModuleRule) -> Table:
    """As left and right where it only renames, else as an equation."""
    table = tomlkit.table()
    table["name"] = rule.name
    left, right = rule.equation.left, rule.equation.right
    kinds = rule.left_kinds, rule.right_kinds
    plain = f"{left[0].key} : {PLAIN.get(kinds[0][0])} == {right[0].key} : {PLAIN.get(kinds[1][0])}"
    sides, _, where = rule.equation.text.partition(" where ")
    if len(left) == len(right) == 1 and sides == plain:
        table["left"], table["right"] = str(left[0].key), str(right[0].key)
        if where:
            table["where"] = where
    else:
        text = rule.equation.text
        table["text"] = _lines(text) if "\n" in text else text
    if len({*kinds[0], *kinds[1]}) == 1:
        table["kind"] = kinds[0][0]
    else:
        table["left_kind"], table["right_kind"] = map(_kinds, kinds)
    return table


def _special(module: Special) -> Table:
    table = tomlkit.table()
    table["side"] = _side(module.sides)
    table["module"] = str(module.module)
    table["tensors"] = _array(module.tensors)
    if not module.called:
        table["called"] = False
    if module.why:
        table["why"] = module.why
    return table


def _side(sides: Sequence[Side]) -> str:
    return "both" if len(sides) == 2 else sides[0]


def _array(values: Sequence[str]) -> Array:
    array = tomlkit.array()
    array.extend(values)
    return array.multiline(sum(map(len, values)) > 70 and len(values) > 1)


def _lines(text: str) -> Item:
    """Text on lines of its own, below the opening quotes; on one line where quotes in it forbid that."""
    if "'''" in text or text.endswith("'") or not text.replace("\n", "").isprintable():
        return tomlkit.string(text)
    return tomlkit.value(f"'''\n{text}'''")
