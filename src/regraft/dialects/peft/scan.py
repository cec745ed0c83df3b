"""What an adapter's tensors are, by their names alone: LoRA factors with their modules, and the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from regraft.errors import Finding
from regraft.names.keys import MARK, Group, Ints, fill, group_names

IN_PROJ = "in_proj_weight"
"""The joined projection of torch's MultiheadAttention."""
OUT_PROJ = ".out_proj"
_INSIDE = ".base_layer" + OUT_PROJ

PREFIX = "base_model.model."
"""What PEFT writes before every module path."""

_AGAIN = "save the adapter again"
_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?", re.DOTALL)
_NAMED = re.compile(r"(.*)\.lora_(?:embedding_)?[AB]\.([^.]+?)(?:\.weight)?", re.DOTALL)
_WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_model",
)


class Pairs(Struct, frozen=True, eq=False):
    """The LoRA factors of modules of one template.

    Row i of ``modules`` has the tensors number ``a[i]`` and ``b[i]`` of the file.
    """

    modules: Group
    a: Ints
    b: Ints
    depth: int
    """How many ``.base_layer`` stood at the end of the module's path."""
    embedding: bool
    attention: Literal["", "in", "out"] = ""
    """Whether they are those of torch's MultiheadAttention: on its joined projection, or on ``out_proj``.

    PEFT wraps both in one layer, with the rank and alpha of the attention (``modules`` has its path, and for ``out``
    that of ``out_proj``), and adds the delta of ``out_proj`` twice (``MultiheadAttention.merge`` in
    ``peft/tuners/lora/layer.py``, 0.18.1 and 0.21.2).
    """

    parameter: str = "weight"
    """The base tensor's name below its module."""

    def owners(self) -> list[str]:
        """The paths that the config's ranks, alphas and targets are about."""
        paths = self.modules.names()
        return [x.removesuffix(OUT_PROJ) for x in paths] if self.attention == "out" else paths


class Tuned(Struct, frozen=True, eq=False):
    """Modules of one template that a family other than plain LoRA adapts.

    ``tensors`` has, for each end of a key, the tensor's number in the file for each module; -1 where it has none.
    """

    modules: Group
    tensors: Mapping[str, Ints]


class Others(Struct, frozen=True, eq=False):
    """Tensors that are no LoRA factors. ``keys`` are their names without the prefix and without ``base_layer``."""

    keys: Group
    prefix: str
    wrapped: bool
    """Whether ``.base_layer`` stood in the name: the module is adapted, too."""
    holder: str = ""
    """A segment before the last one that was taken out: what PEFT holds a base tensor in."""


class Scan(Struct, frozen=True, eq=False):
    """The tensors of an adapter by what they are."""

    pairs: tuple[Pairs, ...]
    others: tuple[Others, ...]
    tuned: tuple[Tuned, ...] = ()

    def modules(self) -> list[Group]:
        """All modules that are adapted, by template."""
        plain = [p.modules for p in self.pairs if p.attention != "in"]
        return plain + [t.modules for t in self.tuned]

    def parameters(self) -> list[Group]:
        """Tensors that are adapted and are no module's weight: joined projections of attentions."""
        return [
            Group(f"{p.modules.template}.{IN_PROJ}", p.modules.ids, p.modules.numbers)
            for p in self.pairs
            if p.attention == "in"
        ]


HOLDERS = ("ln_tuning_layers",)
"""Modules of PEFT's that hold a base tensor as it is to be."""


def scan_names(
    names: Sequence[str],
    where: str,
    *,
    lora: bool = True,
    prefix: str | None = None,
    doubled: bool = False,
) -> tuple[Scan, list[Finding]]:
    """Sort an adapter's tensor names; problems come as findings.

    Without ``lora`` nothing is taken for a LoRA's factor; ``prefix`` is what the tensors of another family begin with
    below their module. ``doubled`` says that the base has a ``model`` in its ``model``.

    >>> scan, _ = scan_names(["base_model.model.l.0.q.lora_A.weight", "base_model.model.l.0.q.lora_B.weight"], "f")
    >>> scan.pairs[0].modules.name(0), scan.pairs[0].a.tolist(), scan.pairs[0].b.tolist()
    ('l.0.q', [0], [1])
    """
    findings: list[Finding] = []
    factors: dict[tuple[str, str, int, bool], dict[str, Group]] = {}
    others: list[Others] = []
    tuned: dict[str, dict[str, list[tuple[Ints, Ints]]]] = {}
    for group in group_names(names):
        if prefix is not None and _split_module(
            group, prefix, where, tuned, findings, doubled=doubled
        ):
            continue
        found = _FACTOR.fullmatch(group.template) if lora else None
        if found is None:
            others.append(_other(group))
            if lora:
                _check_factor_name(group, where, findings)
            continue
        path, embedding, letter, weight = found.groups()
        if bool(embedding) == bool(weight):
            findings.append(
                _finding(
                    "odd-key",
                    "a LoRA factor's key ends in lora_A.weight, lora_B.weight, lora_embedding_A or "
                    "lora_embedding_B",
                    where,
                    group,
                    "rename it, or save the adapter with PEFT's save_pretrained",
                )
            )
            continue
        if not _check_prefix(group, path, where, findings, is_doubled=doubled):
            continue
        path = path[len(PREFIX) :]
        depth = 0
        while path.endswith(".base_layer"):
            path, depth = path[: -len(".base_layer")], depth + 1
        factors.setdefault((path, "", depth, bool(embedding)), {})[letter] = group
    pairs = []
    for (path, _, depth, embedding), letters in factors.items():
        pair = _pair(
            path, depth, embedding=embedding, letters=letters, where=where, findings=findings
        )
        if pair is not None:
            pairs.append(pair)
    return Scan(
        tuple(_with_attentions(pairs)),
        tuple(others),
        tuple(_tuned(*item) for item in tuned.items()),
    ), findings


def _with_attentions(pairs: Sequence[Pairs]) -> Iterator[Pairs]:
    """The pairs, with those of MultiheadAttention told by the projection inside."""
    attentions = {
        p.modules.template.removesuffix(_INSIDE)
        for p in pairs
        if p.modules.template.endswith(_INSIDE)
    }
    for p in pairs:
        template = p.modules.template
        if template in attentions and not p.depth:
            yield replace(p, attention="in", parameter=IN_PROJ)
        elif template.endswith(_INSIDE):
            there = Group(
                template.removesuffix(_INSIDE) + OUT_PROJ, p.modules.ids, p.modules.numbers
            )
            yield replace(p, modules=there, attention="out")
        else:
            yield p


def _split_module(
    group: Group,
    prefix: str,
    where: str,
    tuned: dict[str, dict[str, list[tuple[Ints, Ints]]]],
    findings: list[Finding],
    *,
    doubled: bool,
) -> bool:
    """Take a key apart into its module and what a family calls its tensor; whether it is one."""
    start = group.name(0).find("." + prefix)
    if start < 0:
        return False
    dots = group.name(0).count(".", 0, start)
    segments = group.template.split(".")
    path, end = ".".join(segments[: dots + 1]), ".".join(segments[dots + 1 :])
    if not group.template.startswith(PREFIX):
        return False
    if not _check_prefix(group, path, where, findings, is_doubled=doubled):
        return True
    marks = path.count(MARK)
    inner = group.numbers[:, marks:]
    by_end = tuned.setdefault(path[len(PREFIX) :], {})
    if not inner.shape[1]:
        by_end.setdefault(end, []).append((group.numbers, group.ids))
        return True
    for numbers in np.unique(inner, axis=0):
        rows = (inner == numbers).all(axis=1)
        name = fill(end, numbers.tolist())
        if not name.startswith(prefix):
            return False
        by_end.setdefault(name, []).append((group.numbers[rows, :marks], group.ids[rows]))
    return True


def _tuned(path: str, by_end: dict[str, list[tuple[Ints, Ints]]]) -> Tuned:
    joined = {
        end: tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        for end, parts in by_end.items()
    }
    first = next(iter(joined.values()))[0]
    if all(np.array_equal(numbers, first) for numbers, _ in joined.values()):
        ids = {end: found[1] for end, found in joined.items()}
        return Tuned(Group(path, np.arange(len(first)), first), ids)
    rows: dict[tuple[int, ...], int] = {}
    for numbers, _ in joined.values():
        for row in map(tuple, numbers.tolist()):
            rows.setdefault(row, len(rows))
    placed = {}
    for end, (numbers, found) in joined.items():
        placed[end] = np.full(len(rows), -1, dtype=np.int64)
        placed[end][[rows[row] for row in map(tuple, numbers.tolist())]] = found
    every = np.array(list(rows), dtype=np.int64).reshape(len(rows), -1)
    return Tuned(Group(path, np.arange(len(rows)), every), placed)


def _finding(code: str, message: str, where: str, group: Group, fix: str | None = None) -> Finding:
    more = f" ({len(group)} keys like this one)" if len(group) > 1 else ""
    return Finding(code, message + more, where=where, key=group.name(0), fix=fix)


def _check_prefix(
    group: Group, path: str, where: str, findings: list[Finding], *, is_doubled: bool
) -> bool:
    if not path.startswith(PREFIX):
        start = path.find(PREFIX)
        wrapper = path[:start] if start > 0 else path.split(".")[0] + "."
        findings.append(
            _finding(
                "prefix",
                f"keys of a PEFT adapter begin with {PREFIX!r}, this one begins with {wrapper!r}",
                where,
                group,
                f"give the base with --model, which may tell what it is, or strip {wrapper!r} from every key"
                if start > 0
                else f"put {PREFIX!r} before every key, or save the adapter with PEFT's save_pretrained",
            )
        )
        return False
    segments = path[len(PREFIX) :].split(".")
    for position, segment in enumerate(segments[:4]):
        twice = position + 1 < len(segments) and segment == segments[position + 1] == "model"
        doubled = twice and not is_doubled
        if segment in _WRAPPERS or doubled:
            shown = "model.model" if doubled else segment
            findings.append(
                _finding(
                    "prefix",
                    f"{shown!r} in the module path comes from a wrapper or from a doubled prefix, "
                    "it is no part of the model",
                    where,
                    group,
                    f"take {('model.' if doubled else segment + '.')!r} out of every key, or give the base "
                    "with --model",
                )
            )
            return False
    return True


def _check_factor_name(group: Group, where: str, findings: list[Finding]) -> None:
    found = _NAMED.fullmatch(group.template)
    if found and found[2] not in ("weight", "bias") and MARK not in found[2]:
        findings.append(
            _finding(
                "adapter-name",
                f"the adapter's name {found[2]!r} was left in the key; saved adapters have no names in their keys",
                where,
                group,
                f"take '.{found[2]}' out of every key, or save the adapter with PEFT's save_pretrained",
            )
        )


def _other(group: Group) -> Others:
    prefix = PREFIX if group.template.startswith(PREFIX) else ""
    key = group.template[len(prefix) :]
    parts = key.split(".")
    bare = [part for part in parts if part != "base_layer"]
    wrapped = len(bare) != len(parts)
    holder = bare.pop(-2) if len(bare) > 1 and bare[-2] in HOLDERS else ""
    return Others(Group(".".join(bare), group.ids, group.numbers), prefix, wrapped, holder)


def _pair(
    path: str,
    depth: int,
    *,
    embedding: bool,
    letters: dict[str, Group],
    where: str,
    findings: list[Finding],
) -> Pairs | None:
    a, b = letters.get("A"), letters.get("B")
    if a is None or b is None:
        have = a if a is not None else b
        assert have is not None
        other = "lora_B" if b is None else "lora_A"
        findings.append(_finding("half", f"it has no {other} beside it", where, have, _AGAIN))
        return None
    if np.array_equal(a.numbers, b.numbers):
        return Pairs(Group(path, a.ids, a.numbers), a.ids, b.ids, depth, embedding)
    rows = {numbers: row for row, numbers in enumerate(map(tuple, b.numbers.tolist()))}
    both_a, both_b = [], []
    for row, numbers in enumerate(map(tuple, a.numbers.tolist())):
        partner = rows.pop(numbers, None)
        if partner is None:
            findings.append(
                Finding(
                    "half", "it has no lora_B beside it", where=where, key=a.name(row), fix=_AGAIN
                )
            )
        else:
            both_a.append(row)
            both_b.append(partner)
    for row in rows.values():
        findings.append(
            Finding("half", "it has no lora_A beside it", where=where, key=b.name(row), fix=_AGAIN)
        )
    if not both_a:
        return None
    kept = a.take(np.array(both_a))
    ids = b.ids[np.array(both_b)]
    return Pairs(Group(path, kept.ids, kept.numbers), kept.ids, ids, depth, embedding)
