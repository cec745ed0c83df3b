"""Renames of a learned book: one rule for each module, and one for a whole prefix where nothing contradicts it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from regraft.equation.notation import Key, parse_equation
from regraft.learning.assemble import Drafted
from regraft.learning.roles import Kinds
from regraft.names.keys import group_names
from regraft.rules.book import PLAIN, Carry, ModuleRule, Rule
from regraft.rules.templates import match_group

_STACKED = {
    "parameter": "o i",
    "experts": "e o i",
    "experts-transposed": "e i o",
    "experts-unmarked": "e i o",
}
"""The dims of kinds that are no modules' weights."""
_HAVE_BIASES = ("linear", "conv", "conv1d")


_COMPUTED = re.compile(r"\{[^}*]*[ (]")
"""A hole with more than one name."""


@dataclass(frozen=True, slots=True)
class Rename:
    """Tensors that only get another name: their keys with loops, and the names of one of them."""

    left: str
    right: str
    before: str
    after: str
    where: str = ""
    """Of which layers it is."""

    @staticmethod
    def of(text: str, each: Drafted) -> Rename | None:
        """The rename that an equation is; ``None`` for any other."""
        equation = parse_equation(text)
        if len(equation.left) > 1 or len(equation.right) > 1:
            return None
        left, right = equation.left[0], equation.right[0]
        plain = each.ranges or not equation.where
        if each.left[0].dims != "..." or not plain or left.key is None or right.key is None:
            return None
        where = f"\nwhere {', '.join(each.ranges)}" if each.ranges else ""
        return Rename(str(left.key), str(right.key), each.names[0][0], each.names[1][0], where)

    @property
    def of_some(self) -> bool:
        """Whether it is of some layers only: a clause says it, or their numbers are computed, as every second is."""
        return bool(self.where) or _COMPUTED.search(self.left) is not None

    @property
    def dims(self) -> str:
        """Both sides, as an equation."""
        return f"{self.left} : ...\n    == {self.right} : ...{self.where}\n"


class Titles:
    """A name for each rule of a book, none twice."""

    def __init__(self) -> None:
        self._count: dict[str, int] = defaultdict(int)

    def of(self, key: str) -> str:
        """The last words of a key, and a number where another rule is called so."""
        words = [w for w in key.split(".") if not w.startswith("{") and w != "weight"]
        title = " ".join(words[-2:]) or key
        self._count[title] += 1
        return title + (f" {self._count[title]}" if self._count[title] > 1 else "")


def rename_rules(
    renames: Sequence[Rename],
    names: tuple[Iterable[str], Iterable[str]],
    kinds: Kinds,
    titles: Titles,
    book: str,
) -> tuple[list[Rule], list[ModuleRule]]:
    """The rules of renames.

    Where all names with a prefix get another one, that is one rule; in it, modules have rules by the last of their
    segments, which say their kinds.
    """
    rules: list[Rule] = []
    modules: list[ModuleRule] = []
    both = tuple(list(each) for each in names)
    for prefixes, same in _by_prefix(renames, (both[0], both[1])):
        rest = same
        if prefixes is not None:
            sides = [f"{prefix}.{{*p}}" if prefix else "{*p}" for prefix in prefixes]
            text = f"{sides[0]} : ...\n    == {sides[1]} : ...\n"
            rules.append(_rule(titles.of(sides[1]), text, ("any", "any"), book))
            leaves, rest = _leaves(sides, same, kinds)
            for path, pair in leaves:
                modules.append(_module(titles, *path, pair))
        more = [
            _single(each, same, kinds, titles, book, covered=prefixes is not None) for each in rest
        ]
        rules += [each for each in more if isinstance(each, Rule)]
        modules += [each for each in more if isinstance(each, ModuleRule)]
    return rules, modules


def _rule(title: str, text: str, pair: tuple[str, str], book: str) -> Rule:
    return Rule(title, parse_equation(text), (pair[0],), (pair[1],), book, "")


def _module(
    titles: Titles, left: str, right: str, pair: tuple[str, str], where: str = ""
) -> ModuleRule:
    text = f"{left} : {PLAIN[pair[0]]} == {right} : {PLAIN[pair[1]]}{where}"
    return ModuleRule(titles.of(right), parse_equation(text), (pair[0],), (pair[1],), "")


def _single(
    each: Rename,
    all_of_them: Sequence[Rename],
    kinds: Kinds,
    titles: Titles,
    book: str,
    *,
    covered: bool,
) -> Rule | ModuleRule | None:
    """The rule of one rename; ``None`` where another one says it already."""
    pair = kinds.of_rename(each.before, each.after)
    stems = [key.removesuffix(".weight") for key in (each.left, each.right)]
    weights = each.left != stems[0] and each.right != stems[1]
    if all(kind in PLAIN and kind not in ("any", "vector") for kind in pair):
        if weights and _bias_follows(each, all_of_them, kinds):
            return _module(titles, stems[0], stems[1], pair, each.where)
        sides = PLAIN[pair[0]], PLAIN[pair[1]]
        text = f"{each.left} : {sides[0]}\n    == {each.right} : {sides[1]}{each.where}\n"
        return _rule(titles.of(each.right), text, pair, book)
    if covered and set(pair) <= {"any", "vector"}:
        return None
    if each.left.endswith(".bias") and each.right.endswith(".bias"):
        weight = each.left[: -len("bias")] + "weight", each.right[: -len("bias")] + "weight"
        for other in all_of_them:
            if (other.left, other.right) == weight:
                found = kinds.of_rename(other.before, other.after)
                follows = _bias_follows(other, all_of_them, kinds)
                if follows and all(kind in _HAVE_BIASES for kind in found):
                    return None
    text = each.dims
    if set(pair) & set(_STACKED) and all(kind in _STACKED or kind in PLAIN for kind in pair):
        dims = _STACKED.get(pair[0]) or _STACKED[pair[1]]
        text = f"{each.left} : {dims}\n    == {each.right} : {dims}{each.where}\n"
    elif not covered:
        pair = "any", "any"
    else:
        return None
    return _rule(titles.of(each.right), text, pair, book)


def _bias_follows(each: Rename, all_of_them: Sequence[Rename], kinds: Kinds) -> bool:
    """Whether the bias beside a weight, if there is one, goes where the weight goes."""
    names = [name.removesuffix("weight") + "bias" for name in (each.before, each.after)]
    if not any(name in shapes for name, shapes in zip(names, kinds.shapes, strict=True)):
        return True
    wanted = tuple(key.removesuffix("weight") + "bias" for key in (each.left, each.right))
    return any((other.left, other.right) == wanted for other in all_of_them)


def _by_prefix(
    renames: Sequence[Rename], names: tuple[Sequence[str], Sequence[str]]
) -> Iterator[tuple[tuple[str, str] | None, list[Rename]]]:
    """Renames that only exchange the first segments, where nothing else begins with them; and the others."""
    groups: dict[tuple[str, str], list[Rename]] = defaultdict(list)
    alone = [each for each in renames if each.of_some]
    for each in renames:
        if not each.of_some:
            groups[_prefixes(each.left, each.right)].append(each)
    for prefixes, same in groups.items():
        long = any(each.left.count(".") - _dots(prefixes[0]) > 0 for each in same)
        keys = [parse_equation(each.dims) for each in same]
        whole = all(
            "{" not in prefix
            and _all_match(
                [n for n in names[side] if not prefix or n.startswith(prefix + ".")],
                [e.sides()[side][0].key for e in keys],
            )
            for side, prefix in enumerate(prefixes)
        )
        if len(same) > 1 and long and whole:
            yield prefixes, same
        else:
            alone += same
    yield None, alone


def _dots(prefix: str) -> int:
    return prefix.count(".") + 1 if prefix else 0


def _all_match(names: Sequence[str], keys: Sequence[Key | None]) -> bool:
    """Whether each of some names is one of some keys'."""
    for group in group_names(list(names)):
        rows: set[int] = set()
        for key in keys:
            match = match_group(key, group) if key is not None else None
            if match is not None:
                rows.update(match.rows.tolist())
        if len(rows) < len(group):
            return False
    return True


def _prefixes(one: str, other: str) -> tuple[str, str]:
    a, b = one.split("."), other.split(".")
    while a and b and a[-1] == b[-1] and len(a) + len(b) > 1:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def _leaves(
    sides: Sequence[str], same: Sequence[Rename], kinds: Kinds
) -> tuple[list[tuple[tuple[str, str], tuple[str, str]]], list[Rename]]:
    """Modules of one last segment that are of one kind everywhere, and the renames that are not in them."""
    by_leaf: dict[str, list[Rename]] = defaultdict(list)
    for each in same:
        path, _, leaf = each.left.rpartition(".")
        if leaf == "weight":
            by_leaf[path.rpartition(".")[2]].append(each)
    found = []
    done: set[str] = set()
    for leaf, mine in by_leaf.items():
        pairs = {kinds.of_rename(each.before, each.after) for each in mine}
        if len(pairs) > 1 or not leaf.replace("_", "a").isalpha() or len(mine) < 2:
            continue
        if not all(_bias_follows(each, same, kinds) for each in mine):
            continue
        (pair,) = pairs
        if any(kind not in PLAIN or kind in ("any", "vector") for kind in pair):
            continue
        found.append(((f"{sides[0]}.{leaf}", f"{sides[1]}.{leaf}"), pair))
        done |= {each.left for each in mine}
    return found, [each for each in same if each.left not in done]


def kept_rules(
    keys: Mapping[str, Sequence[str]], kinds: Kinds, titles: Titles, book: str
) -> tuple[list[Rule], list[Carry]]:
    """Tensors that keep their names: carried over, or a rule where their modules are of another kind afterwards."""
    rules: list[Rule] = []
    carries: list[Carry] = []
    for key, names in keys.items():
        pairs = {kinds.of_rename(name, name) for name in names}
        pair = pairs.pop() if len(pairs) == 1 else ("any", "any")
        dims = _STACKED.get(pair[0]) or _STACKED.get(pair[1])
        if pair[0] != pair[1] and dims is not None:
            rules.append(_rule(titles.of(key), f"{key} : {dims} == {key} : {dims}", pair, book))
            continue
        equation = parse_equation(f"{key} : ... == {key} : ...")
        kind = pair[0] if pair[0] == pair[1] and pair[0] != "vector" else "any"
        carries.append(Carry(equation.left[0], equation, "the same in both", kind, ""))
    return rules, carries


__all__ = ["Rename", "Titles", "kept_rules", "rename_rules"]
