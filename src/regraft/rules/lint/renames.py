"""Lint of ordered renames by regular expression, as other libraries write them.

Such a list is a program: each rename works on what those before it left, and matches wherever its expression is
found. So its hazards are of another sort than a rule book's, and each is shown by a key that goes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from regraft.errors import Finding
from regraft.rules.lint.book import Fault, in_order
from regraft.storage.expressions import expression

_GROUP = re.compile(r"\\(\d)")


@dataclass(frozen=True, slots=True)
class Rename:
    r"""One rename: the first place where ``source`` (a regular expression) is found becomes ``target``.

    ``target`` is text in which ``\1`` stands for the first group.

    >>> Rename("to mlp", r"layers\.(\d+)\.ffn", r"layers.\1.mlp", "f.py:1").apply("m.layers.3.ffn.w")
    'm.layers.3.mlp.w'
    """

    name: str
    source: str
    target: str
    where: str
    """``file:line``."""

    def apply(self, key: str) -> str:
        """The key after this rename, itself where it does not match."""
        found = expression(self.source, self.name).search(key)
        if found is None:
            return key

        def group(mark: re.Match[str]) -> str:
            return found[int(mark[1])] or ""

        return key[: found.start()] + _GROUP.sub(group, self.target) + key[found.end() :]


def apply_all(renames: Sequence[Rename], key: str) -> list[str]:
    """The key before and after every rename, in order.

    >>> apply_all([Rename("1", "a", "b", ""), Rename("2", "b", "c", "")], "a")
    ['a', 'b', 'c']
    """
    steps = [key]
    for rename in renames:
        steps.append(rename.apply(steps[-1]))
    return steps


def lint_renames(renames: Sequence[Rename], keys: Sequence[str] = ()) -> tuple[Fault, ...]:
    """Everything that is suspicious about renames in this order.

    ``keys`` are the names of a checkpoint in the layout that they start from. Where there are none, each
    expression is tried on a key made from itself, which says less.
    """
    faults: list[Fault] = []
    sound: list[Rename] = []
    for rename in renames:
        try:
            tree = _parser.parse(rename.source)
        except re.error as error:
            message = f"{rename.source!r} is no regular expression: {error}"
            faults.append(_fault("error", "regex", rename, message, "correct it"))
            continue
        broken = [n for n in map(int, _GROUP.findall(rename.target)) if n >= tree.state.groups]
        if broken:
            message = f"{rename.target!r} uses the group {broken[0]}, which {rename.source!r} lacks"
            faults.append(_fault("error", "regex", rename, message, "correct the target"))
            continue
        sound.append(rename)
        faults += _runaway(rename, tree)
        faults += _loose(rename, tree)
        faults += _lossy(rename, tree)
    faults += _order(
        sound, keys or tuple(dict.fromkeys(map(example_of, (r.source for r in sound))))
    )
    if keys:
        faults += _on_keys(sound, keys)
    return in_order(faults)


def _fault(
    severity: Any,
    code: str,
    rename: Rename,
    message: str,
    fix: str,
    other: Rename | None = None,
    example: str | None = None,
) -> Fault:
    finding = Finding(code, message, where=rename.where, rule=rename.name, fix=fix)
    return Fault(severity, finding, f"{other.name} ({other.where})" if other else None, example)


def _order(renames: Sequence[Rename], keys: Sequence[str]) -> Iterator[Fault]:
    """Renames that eat another's output, or find nothing because of another."""
    told: set[tuple[int, int]] = set()
    fired: dict[int, str] = {}
    spoiled: dict[int, tuple[int, str]] = {}
    for key in keys:
        steps = apply_all(renames, key)
        for j, rename in enumerate(renames):
            changed = steps[j + 1] != steps[j]
            alone = rename.apply(key) != key
            if changed:
                fired.setdefault(j, key)
            before = [i for i in range(j) if steps[i + 1] != steps[i]]
            if changed and not alone and before and (before[-1], j) not in told:
                told.add((before[-1], j))
                message = (
                    f"it matches only what {renames[before[-1]].name!r} makes: {key} becomes "
                    f"{steps[j]} and then {steps[j + 1]}"
                )
                fix = "put it first, or anchor it so that it does not match the other's result"
                yield _fault(
                    "warning", "eats-output", rename, message, fix, renames[before[-1]], key
                )
            if alone and not changed and before:
                spoiled.setdefault(j, (before[0], key))
        again = apply_all(renames, steps[-1])
        if again[-1] != steps[-1]:
            j = next(i for i in range(len(renames)) if again[i + 1] != again[i])
            if (j, -1) not in told:
                told.add((j, -1))
                message = (
                    f"it is not idempotent: {key} becomes {steps[-1]}, and that becomes {again[-1]} when "
                    "it is converted again"
                )
                fix = "let it match the old name only (a look-ahead, or an anchor)"
                yield _fault("warning", "not-idempotent", renames[j], message, fix, None, key)
    for j, (i, key) in spoiled.items():
        if j in fired:
            continue
        made = apply_all(renames, key)[-1]
        meant = apply_all(renames[j + 1 :], renames[j].apply(key))[-1]
        message = f"it never fires: {renames[i].name!r} renames {key} first, to {made}"
        if made != meant:
            message += f", and this one would make it {meant}"
        fix = "put it before the other, or remove it"
        severity = "warning" if made == meant else "error"
        yield _fault(severity, "shadowed", renames[j], message, fix, renames[i], key)


def _on_keys(renames: Sequence[Rename], keys: Sequence[str]) -> Iterator[Fault]:
    """What a checkpoint's own names show: dead renames, and two keys that become one."""
    results: dict[str, tuple[str, int]] = {}
    fired: set[int] = set()
    for key in keys:
        steps = apply_all(renames, key)
        changed = [i for i in range(len(renames)) if steps[i + 1] != steps[i]]
        fired.update(changed)
        last = changed[-1] if changed else -1
        first, rename_of_first = results.setdefault(steps[-1], (key, last))
        if first != key:
            message = f"{first} and {key} both become {steps[-1]}"
            fix = "spell out what tells them apart"
            yield _fault(
                "error", "collision", renames[max(last, rename_of_first)], message, fix, None, key
            )
    for i, rename in enumerate(renames):
        yield from _part_of_word(rename, keys)
        if i not in fired:
            message = f"it matches none of the {len(keys)} keys"
            yield _fault("warning", "dead-rule", rename, message, "correct or remove it")


_REPEATS = {sre.MAX_REPEAT, sre.MIN_REPEAT}
_ANY_NUMBER = 64


def _walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every node of a parsed expression."""
    for op, value in tree:
        yield op, value
        for part in _parts(op, value):
            yield from _walk(part)


def _parts(op: Any, value: Any) -> list[Any]:
    if op is sre.SUBPATTERN:
        return [value[3]]
    if op in _REPEATS:
        return [value[2]]
    if op is sre.BRANCH:
        return list(value[1])
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    return []


def _runaway(rename: Rename, tree: Any) -> Iterator[Fault]:
    """A repetition of something that is itself repeated: the time grows with every letter's doubling."""
    for op, value in _walk(tree):
        if op not in _REPEATS or value[1] < _ANY_NUMBER:
            continue
        inner = [(o, v) for o, v in _walk(value[2]) if o in _REPEATS and v[1] >= _ANY_NUMBER]
        body = list(value[2])
        alone = len(body) == 1 and body[0][0] is sre.SUBPATTERN
        content = list(body[0][1][3]) if alone else body
        if inner and len(content) == 1:
            letter = example_of_tree(inner[0][1][2]) or "a"
            message = (
                f"{rename.source!r} repeats what is repeated already: on a key with a long run of "
                f"{letter!r} that does not match in the end, it takes exponential time"
            )
            fix = "take one of the two repetitions out"
            yield _fault("error", "runaway-regex", rename, message, fix, None, letter * 30 + "\n")
            return
    wild = [
        (op, value)
        for op, value in _walk(tree)
        if op in _REPEATS and value[1] >= _ANY_NUMBER and _crosses(value[2])
    ]
    if len(wild) > 1:
        message = f"{rename.source!r} has {len(wild)} parts that run across segments, so where one ends is chance"
        fix = r"write [^.]+ where one segment is meant, \d+ where an index is"
        yield _fault("warning", "runaway-regex", rename, message, fix, None, None)


def _crosses(tree: Any) -> bool:
    """Whether a repeated part matches a dot."""
    return any(
        op is sre.ANY or (op is sre.NOT_LITERAL and value != 46) for op, value in _walk(tree)
    )


def _loose(rename: Rename, tree: Any) -> Iterator[Fault]:
    """Expressions that match more or less than is meant: bare dots, indices of one digit."""
    flat = list(tree)
    for op, _ in flat:
        if op is sre.ANY:
            example = example_of(rename.source)
            other = example_of(rename.source, any_letter="x")
            if other != example and rename.apply(other) != other:
                message = f"an unescaped dot in {rename.source!r} matches any letter: {other}, too"
                yield _fault("note", "loose-regex", rename, message, r"write \.", None, other)
            break
    for op, value in flat:
        digit = op is sre.IN and value == [(sre.CATEGORY, sre.CATEGORY_DIGIT)]
        group = op is sre.SUBPATTERN and list(value[3]) == [
            (sre.IN, [(sre.CATEGORY, sre.CATEGORY_DIGIT)])
        ]
        if digit or group:
            message = (
                f"{rename.source!r} takes one digit: an index from 10 on is left out, or cut in two"
            )
            yield _fault("error", "incomplete-index", rename, message, r"write \d+", None, "10")
            return


def _part_of_word(rename: Rename, keys: Sequence[str]) -> Iterator[Fault]:
    """A name that is found by itself in some keys, and inside a longer one in others."""
    whole, part = None, None
    for key in keys:
        found = expression(rename.source, rename.name).search(key)
        if found is None or not found[0] or not (found[0][-1].isalnum() or found[0][-1] == "_"):
            continue
        following = key[found.end() : found.end() + 1]
        if following.isalnum() or following == "_":
            part = part or key
        else:
            whole = whole or key
    if whole is not None and part is not None:
        message = f"{rename.source!r} ends inside a segment: it renames {whole}, and {part}, too"
        fix = r"end it with \. or (?=\.|$)"
        yield _fault("warning", "loose-regex", rename, message, fix, None, part)


def _lossy(rename: Rename, tree: Any) -> Iterator[Fault]:
    """What varies in the source and is not kept in the target cannot come back."""
    kept = set(map(int, _GROUP.findall(rename.target)))

    def lost(nodes: Any) -> bool:
        for op, value in nodes:
            if op is sre.SUBPATTERN and value[0] in kept:
                continue
            if op in (sre.ASSERT, sre.ASSERT_NOT, sre.AT, sre.LITERAL):
                continue
            if op in (sre.SUBPATTERN,) and not lost(value[3]):
                continue
            if op is sre.ANY:
                continue  # an unescaped dot is told of by itself
            return True
        return False

    if lost(tree):
        message = (
            f"what varies in {rename.source!r} is not in {rename.target!r}, so several names become one "
            "and the way back is not known"
        )
        fix = r"put it in a group and write \1 in the target"
        yield _fault(
            "warning", "not-invertible", rename, message, fix, None, example_of(rename.source)
        )


def example_of(source: str, any_letter: str = ".") -> str:
    r"""A short text that an expression matches.

    >>> example_of(r"^layers\.(\d+)\.(?:gate|up)_proj")
    'layers.0.gate_proj'
    """
    return example_of_tree(_parser.parse(source), any_letter)


def example_of_tree(tree: Any, any_letter: str = ".") -> str:
    """The same for a parsed expression."""
    text = ""
    for op, value in tree:
        if op is sre.LITERAL:
            text += chr(value)
        elif op is sre.NOT_LITERAL:
            text += "x" if value != ord("x") else "y"
        elif op is sre.ANY:
            text += any_letter
        elif op is sre.IN:
            text += _example_of_set(value)
        elif op is sre.SUBPATTERN:
            text += example_of_tree(value[3], any_letter)
        elif op in _REPEATS:
            part = example_of_tree(value[2], "x")
            text += part * max(value[0], 1 if value[1] else 0)
        elif op is sre.BRANCH:
            text += example_of_tree(value[1][0], any_letter)
    return text


def _example_of_set(items: Any) -> str:
    banned: set[str] = set()
    negated = items[0][0] is sre.NEGATE
    for op, value in items:
        if op is sre.LITERAL:
            if not negated:
                return chr(value)
            banned.add(chr(value))
        elif op is sre.RANGE and not negated:
            return chr(value[0])
        elif op is sre.CATEGORY and not negated:
            return "0" if value is sre.CATEGORY_DIGIT else "x"
    return next(c for c in "x0y1" if c not in banned)
