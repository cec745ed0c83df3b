"""Quantised experts that stay one by one, because the loader stacks them itself, with their scales.

Transformers 5 stacks the experts of many models into one parameter. Its loader does that, too, with a checkpoint that
has them one by one, and for some quantization methods it collects their scales and dequantises first. For a stacked
parameter it collects none. So quantised experts keep the names that they had, and everything else is converted.
Source: ``HfQuantizer.update_weight_conversions`` and ``get_load_operations`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from regraft.checkpoints.companions import Companions
from regraft.checkpoints.quantization import Quantization
from regraft.equation.notation import parse_equation
from regraft.errors import Finding, RefusedError
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints
from regraft.planning.build import build_plan
from regraft.planning.identify import Unstacked
from regraft.planning.model import Scope
from regraft.planning.plan import Carried, Entry, Headers
from regraft.rules.book import Book, Carry, Rule
from regraft.rules.direction import Direction
from regraft.rules.templates import match_group

Flags = npt.NDArray[np.bool_]


def find_unstacked(
    companions: Companions,
    books: Sequence[Book],
    scopes: Mapping[str, Scope],
    where: str,
) -> Unstacked:
    """The experts of a quantised checkpoint that its loader wants one by one.

    Raises what planning raises where experts are missing, and ``RefusedError`` where scales are.
    """
    told = companions.quantization
    if told is None:
        return Unstacked()
    why = f"the {told.method} loader of transformers 5 reads quantised experts one by one"
    if not told.is_in_config:
        why += "; it has to be told by a quantization_config, and config.json has none"
    weights = companions.weights()
    carried: list[Carried] = []
    for book in books:
        rules = tuple(r for r in book.rules if _stacks(r))
        scope = scopes.get(book.name, Scope())
        groups = _groups(rules, scope, companions.headers)
        if not told.collects_experts(book.right) or not _any_of(groups, weights):
            continue
        part = Headers(groups, companions.headers.shapes, companions.headers.dtypes)
        alone = replace(book, rules=rules, carries=(), drops=(), gaps=())
        plan = build_plan(part, [Edge(alone, Direction.FORWARD)], scopes=scopes, where=where)
        rows = [_quantised_rows(entry, weights) for entry in plan.entries]
        _check_complete(plan.entries, rows, companions, told)
        ids = [np.zeros(0, dtype=np.int64)]
        for entry, mine in zip(plan.entries, rows, strict=True):
            ids += [sources[mine].reshape(-1) for sources in entry.sources]
        staying = np.concatenate(ids)
        for group in groups:
            part_of = group.take(np.isin(group.ids, staying))
            if len(part_of):
                carried.append(Carried(part_of, _carry(part_of, why, book)))
    return Unstacked(tuple(carried), why)


def _stacks(rule: Rule) -> bool:
    """Whether a rule makes modules' weights into a parameter that is no module's."""
    left, right = rule.equation.left, rule.equation.right
    if len(left) == len(right) == 1 and left[0].dims == right[0].dims:
        return False
    return all(str(t.key).endswith(".weight") for t in left) and not any(
        str(t.key).endswith(".weight") for t in right
    )


def _groups(rules: Sequence[Rule], scope: Scope, headers: Headers) -> list[Group]:
    """What the rules read."""
    found = []
    for group in headers.groups:
        rows: list[Ints] = []
        for rule in rules if scope.admits(group.template) else ():
            for term in rule.equation.left:
                match = match_group(term.key, group) if term.key is not None else None
                dims = len(headers.shapes[int(group.ids[0])])
                if match is not None and len(term.dims) == dims:
                    rows.append(match.rows)
        if rows:
            found.append(group.take(np.unique(np.concatenate(rows))))
    return found


def _any_of(groups: Sequence[Group], weights: Ints) -> bool:
    return any(np.isin(group.ids, weights).any() for group in groups)


def _quantised_rows(entry: Entry, weights: Ints) -> Flags:
    """For each of the stacks that an entry makes, whether a quantised weight is in it."""
    flags = [np.isin(ids, weights).reshape(len(entry), -1).any(axis=1) for ids in entry.sources]
    found: Flags = np.any(flags, axis=0)
    return found


def _check_complete(
    entries: Sequence[Entry],
    rows: Sequence[Flags],
    companions: Companions,
    told: Quantization,
) -> None:
    """Raises ``RefusedError`` where some experts of a stack have scales, and some have none."""
    findings = []
    for entry, mine in zip(entries, rows, strict=True):
        for suffix, table in companions.of.items():
            having = np.array(sorted(table), dtype=np.int64)
            for sources in entry.sources:
                ids = sources[mine].reshape(-1)
                has = np.isin(ids, having)
                if has.any() and not has.all():
                    lacking = companions.headers.name(int(ids[np.flatnonzero(~has)[0]]))
                    findings.append(
                        Finding(
                            "companion",
                            f"it is quantised with {told.title}, and it has no {suffix.lstrip('@_.')}, while others "
                            "of its stack have it",
                            key=lacking,
                            rule=str(entry.rule),
                            fix="give the whole checkpoint",
                        )
                    )
    if findings:
        raise RefusedError(findings)


def _carry(group: Group, why: str, book: Book) -> Carry:
    name = group.name(0)
    equation = parse_equation(f"{name} : ... == {name} : ...")
    return Carry(equation.left[0], equation, why, "linear", book.name)
