"""Layers for predicting further tokens (MTP), which checkpoints have beyond the model's own, or beside them.

Models leave them aside when they load, and programs that draft tokens with them read them by the names that the file
has. So they are converted with the rest: what a book says of a layer, it says of an MTP layer, too. They are layers
that follow the last one (DeepSeek, GLM: ``model.layers.61``), or modules called ``mtp`` (Qwen3-Next, ERNIE, LongCat).

Source: ``_keys_to_ignore_on_load_unexpected`` and ``modeling_layers.MtpModel`` of transformers 5.23.0.

>>> is_mtp_module("mtp.layers.0.mlp.gate.weight"), is_mtp_module("model.mtp_block.0.norm.weight")
(True, True)
>>> is_mtp_module("model.layers.0.mlp.gate.weight")
False
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.equation.notation import (
    Axis,
    Equation,
    Hole,
    Key,
    Segments,
    axes_of,
    parse_equation,
)
from regraft.errors import BadInputError, Finding, UnmatchedKeysError
from regraft.names.keys import MARK, Group, fill, group_names
from regraft.rules.book import Book, Carry, Rule
from regraft.rules.templates import match_group
from regraft.values import replace

WHY = "layers for predicting further tokens (MTP), which the model leaves aside when it loads"

_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_MODULE = re.compile(r"(?:^|\.)(?:mtp(?:_[a-z]\w*)?|nextn(?:_[a-z]\w*)?)(?=\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?=\.)")
_JOINT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:eh_proj|enorm|hnorm|shared_head)\.")
"""What an MTP layer has and no other: it joins a token's embedding with the hidden states of the layers before."""


class Counts(Struct, frozen=True):
    """How many layers a model's config tells of; ``None`` where it says nothing."""

    layers: int | None = None
    mtp: int | None = None

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Any]]) -> Counts:
        """Those of the part of a config that has layers of a text model, the parts given outermost first."""
        layers = mtp = None
        for part in parts:
            found = _number(part, _COUNTS)
            if found is not None and (mtp is None or found > mtp):
                layers, mtp = _number(part, _LAYERS), found
            elif mtp is None and layers is None and "vocab_size" in part:
                layers = _number(part, _LAYERS)
        return cls(layers, mtp)


class MtpKeys(Struct, frozen=True, eq=False):
    """The keys of a file's MTP layers."""

    groups: tuple[Group, ...] = ()
    roots: tuple[str, ...] = ()
    """The modules below which they are, such as ``model.layers.61`` or ``mtp``."""

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(name for group in self.groups for name in group.names())

    def without(self, groups: Iterable[Group]) -> list[Group]:
        """Some groups of the same file without these keys."""
        if not self.groups:
            return list(groups)
        mine = np.concatenate([group.ids for group in self.groups])
        left = (group.take(~np.isin(group.ids, mine)) for group in groups)
        return [group for group in left if len(group)]


def is_mtp_module(key: str) -> bool:
    """Whether a key is below a module that is called as MTP's are."""
    return _MODULE.search(key) is not None


def find_mtp(
    groups: Sequence[Group], counts: Counts, where: str, own: Iterable[Key] = ()
) -> MtpKeys:
    """The MTP layers among a file's keys; ``own`` are keys of the model itself, which may call its modules so, too.

    A layer counts where the config's number of MTP layers says so, or, where it says nothing, where it has what
    only MTP layers have.

    Raises ``BadInputError`` for MTP layers beyond the config's number.
    """
    named = {g.template: g for g in groups if is_mtp_module(g.template)}
    for key in own:
        for template in [t for t, g in named.items() if match_group(key, g) is not None]:
            del named[template]
    first, last = _range(groups, counts)
    found: list[Group] = []
    roots: dict[str, None] = {}
    beyond: list[str] = []
    for group in groups:
        if group.template in named:
            end = _end_of_module(group.template)
            prefix = group.template[:end]
            for row in range(len(group)):
                roots[fill(prefix, group.numbers[row, : prefix.count(MARK)].tolist())] = None
            beyond += _beyond(group, end, counts)
            found.append(group)
            continue
        column = _layer_column(group.template)
        if column is None or first is None:
            continue
        mine = (group.numbers[:, column] >= first) & (group.numbers[:, column] < last)
        if mine.any():
            taken = group.take(mine)
            end = _nth_mark(group.template, column) + 1
            for row in np.unique(taken.numbers[:, : column + 1], axis=0):
                roots[fill(group.template[:end], row.tolist())] = None
            found.append(taken)
    if beyond:
        raise BadInputError(
            Finding(
                "wrong-base",
                f"the base model has {counts.mtp} MTP layers, and this is beyond them",
                where=where,
                key=key,
                fix="give the base model's own config",
            )
            for key in beyond
        )
    return MtpKeys(tuple(found), tuple(roots))


def mtp_among(names: Sequence[str], parts: Iterable[Mapping[str, Any]]) -> MtpKeys:
    """The MTP layers among names that a model has no place for, by the parts of its config.

    >>> sorted(mtp_among(["model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight", "mtp.fc.weight"],
    ...     [{"vocab_size": 9, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}]).names())
    ['model.layers.2.mlp.up_proj.weight', 'mtp.fc.weight']
    """
    try:
        return find_mtp(group_names(names), Counts.of(parts), "")
    except BadInputError:
        return MtpKeys()


def check_mtp(books: Iterable[Book], keys: MtpKeys, layouts: Collection[str], where: str) -> None:
    """Check that MTP layers can go from one of the layouts to the other.

    Raises ``UnmatchedKeysError`` where one of them has names of its own for them, which no rule says.
    """
    own = [b.left if b.tells == "left" else b.right for b in books if not b.mtp]
    strange = next((layout for layout in own if layout in layouts), None)
    if strange is None or not len(keys):
        return
    patterns = " ".join(f"--drop '{root}.*'" for root in keys.roots)
    raise UnmatchedKeysError(
        Finding(
            "unmatched",
            f"{len(keys)} tensors are those of {WHY}, and {strange} calls these in its own way, which no rule says",
            where=where,
            key=root,
            fix=f"convert without them: {patterns}",
        )
        for root in keys.roots
    )


def with_mtp(book: Book, keys: MtpKeys) -> Book:
    """A book that says of the MTP layers of a file what it says of the others, and carries over the rest of them."""
    if not keys.groups:
        return book
    twins = {str(t.equation): t for rule in book.rules for t in _twins(rule, keys)}
    carries = [_carry(f"{root}.{{*q}}", book) for root in keys.roots]
    return dataclasses.replace(
        book,
        rules=(*book.rules, *twins.values()),
        carries=(*carries, *book.carries),
    )


def _twins(rule: Rule, keys: MtpKeys) -> Iterator[Rule]:
    """A layer's rule for each MTP layer that has tensors of it."""
    terms = (*rule.equation.left, *rule.equation.right)
    cut = [_below_layer(term.key, rule.equation) for term in terms]
    layers = {part[0] for part in cut if part is not None}
    tails = [part[1] for part in cut if part is not None]
    if len(tails) < len(terms) or len(layers) > 1:
        return
    prefixes: dict[str, None] = {}
    for tail in tails:
        key = Key((Segments("mtp"), *tail))
        for group in keys.groups:
            match = match_group(key, group)
            if match is None or len(match.rests) != 1 or not match.rests[0]:
                continue
            for row in np.unique(match.rest_numbers, axis=0):
                prefixes[fill(match.rests[0], row.tolist())] = None
    for prefix in prefixes:
        yield _twin(rule, prefix, tails, next(iter(layers)))


def _twin(
    rule: Rule, prefix: str, tails: Sequence[tuple[str | Hole | Segments, ...]], layer: str
) -> Rule:
    equation = rule.equation
    new = [Key((prefix, *tail)) for tail in tails]
    count = len(equation.left)
    left = tuple(replace(t, key=k) for t, k in zip(equation.left, new[:count], strict=True))
    right = tuple(replace(t, key=k) for t, k in zip(equation.right, new[count:], strict=True))
    still = {name for k in new for hole in k.holes for name in axes_of(hole)}
    bounds = tuple(b for b in equation.bounds if b.axis != layer or layer in still)
    begins = tuple(b for b in equation.begins if b.axis != layer or layer in still)
    kept = replace(equation, left=left, right=right, bounds=bounds, begins=begins)
    made = parse_equation(str(kept))
    return replace(rule, name=f"{rule.name} of {prefix}", equation=made)


def _below_layer(
    key: Key | None, equation: Equation
) -> tuple[str, tuple[str | Hole | Segments, ...]] | None:
    """The axis that numbers the layers in a key, and what follows it; ``None`` where there is no such axis."""
    if key is None:
        return None
    numbers = equation.indices
    for at, part in enumerate(key.parts[:-1]):
        if not isinstance(part, Hole) or not isinstance(part.expr, Axis):
            continue
        before, after = (key.parts[at - 1] if at else ""), key.parts[at + 1]
        if part.expr.name not in numbers or not (isinstance(before, str) and before.endswith(".")):
            continue
        if isinstance(after, str) and after.startswith(".") and after.count(".") > 1:
            return part.expr.name, key.parts[at + 1 :]
    return None


def _carry(key: str, book: Book) -> Carry:
    equation = parse_equation(f"{key} : ... == {key} : ...")
    return Carry(equation.left[0], equation, WHY, "any", book.path)


def _range(groups: Sequence[Group], counts: Counts) -> tuple[int | None, int]:
    """The numbers of the layers that follow the model's own, the second not included."""
    if counts.mtp is not None:
        if counts.layers is None:
            return None, 0
        return counts.layers, counts.layers + counts.mtp
    numbers: set[int] = set()
    for group in groups:
        for row in range(len(group)) if _JOINT.search(group.template.replace(MARK, "0")) else ():
            match = _JOINT.search(group.name(row))
            if match is not None:
                numbers.add(int(match[1]))
    if counts.layers is not None:
        numbers = {number for number in numbers if number >= counts.layers}
    return (min(numbers), max(numbers) + 1) if numbers else (None, 0)


def _beyond(group: Group, end: int, counts: Counts) -> list[str]:
    """Names of a module's layers beyond the config's number of them."""
    column = group.template.count(MARK, 0, end)
    numbered = re.match(rf"\.(?:layers\.)?{MARK}\.", group.template[end:])
    if not counts.mtp or numbered is None:
        return []
    over = np.flatnonzero(group.numbers[:, column] >= counts.mtp)
    return [group.name(int(row)) for row in over[:1]]


def _end_of_module(template: str) -> int:
    found = _MODULE.search(template)
    assert found is not None
    return found.end()


def _layer_column(template: str) -> int | None:
    """Which of a template's numbers is that of the layer."""
    found = _LAYER.search(template.replace(MARK, "0"))
    if found is None or template[found.start(1)] != MARK:
        return None
    return template.count(MARK, 0, found.start(1))


def _nth_mark(template: str, number: int) -> int:
    at = -1
    for _ in range(number + 1):
        at = template.index(MARK, at + 1)
    return at


def _number(part: Mapping[str, Any], names: Sequence[str]) -> int | None:
    values = (part.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
