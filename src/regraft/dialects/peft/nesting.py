"""The order in which PEFT nests the factors of several parameters of one module, where no rule book says it.

Source: PEFT 0.21.2, ``peft/tuners/tuners_utils.py`` (``inject_adapter``), which goes through the parameters of a
module in the order in which the module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence

from regraft.errors import Finding
from regraft.names.keys import group_names
from regraft.planning.side import Side
from regraft.rules.book import table_of


def untold_order(
    side: Side, module: str, names: Sequence[str], where: str | None = None
) -> Finding:
    """What is wrong with adapting these parameters of a module, and the table that its rule book lacks.

    ``where`` is the adapter's place, where it is one that is read.
    """
    keys = group_names([f"{module}.{names[0]}"])[0]
    term = side.find(keys)
    template, listed, at, rule = module, tuple(names), side.edges[0] if side.edges else None, None
    if term is not None:
        template = str(term.key).rpartition(".")[0]
        at = next(edge for edge in side.edges if edge.book.name == term.rule.book)
        rule = f"{term.rule.book}/{term.rule.name} ({term.rule.where})"
        known = {each.module: each.names for each in at.book.unordered(at.reads)}
        listed = tuple(dict.fromkeys([*known.get(template, ()), *names]))
    book = (at.book.path or at.book.name) if at is not None else "a rule book"
    table = "; ".join(
        table_of(at.reads if at is not None else "both", template, listed).splitlines()
    )
    return Finding(
        "parameter-order",
        f"the adapter has factors for {len(names)} parameters of this module ({', '.join(names)}). PEFT nests them in "
        f"the order in which the module's class registers them, and {book} does not say which one that is",
        where=where or book,
        key=template,
        rule=rule,
        fix=f"look up the order in the class's __init__, and add these lines to {book}, with the names in that order: "
        f"{table}",
    )


__all__ = ["untold_order"]
