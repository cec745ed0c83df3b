"""Learning a rule book from files that hold the same weights in two layouts.

Equations are inferred from the first pair, their sizes named by the config's fields of all pairs. Then the book is
loaded as any other, and carried out on every pair, in both directions; what it makes is compared bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from itertools import islice, product
from typing import Any, TypedDict, cast

import numpy as np

from regraft.equation.notation import Key, parse_equation, parse_key
from regraft.errors import AmbiguousError, BadInputError, Finding
from regraft.learning.assemble import Drafted
from regraft.learning.casts import joined
from regraft.learning.choosing import Chosen, Doubts
from regraft.learning.clauses import Clauses, Config, Seen, clauses_of, likely, numbers_of
from regraft.learning.content import Tensor
from regraft.learning.fitting import fits, is_there
from regraft.learning.infer import Inferred, infer
from regraft.learning.layers import tell_layers
from regraft.learning.loops import Looped, is_told, with_loops
from regraft.learning.making import Orders, comment, make_book, order_questions, with_tables
from regraft.learning.pairs import Pair, Source
from regraft.learning.propose import check, plan_names
from regraft.learning.relate import Names, carried
from regraft.learning.roles import KindOf, kinds_told
from regraft.names.keys import group_names
from regraft.names.live import skeleton_of_any
from regraft.names.patterns import patterns
from regraft.report import count_in_words, logged
from regraft.rules.book import Book, Drop, load_book
from regraft.rules.templates import match_group
from regraft.rules.write import write_book


@dataclass(frozen=True, slots=True)
class Verified:
    """How a pair of files confirms a book."""

    where: str
    learned_from: bool
    """Whether equations or sizes were read off it."""
    equal: bool
    """Whether the book leads from the one to the other and back, bit for bit."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A rule book and its evidence."""

    book: Book
    text: str
    """As TOML."""
    explained: int
    """How many tensors after the book makes."""
    total: int
    odd: dict[str, str] = field(default_factory=dict)
    """Tensors after that it does not make, each with the reason."""
    unused: tuple[str, ...] = ()
    """Tensors before from which nothing is taken."""
    verified: tuple[Verified, ...] = ()
    notes: tuple[str, ...] = ()
    questions: tuple[Finding, ...] = ()
    """Readings that fit alike, of which one was taken."""
    doubts: Doubts = field(default_factory=Doubts)
    """All of them, with those that names decided."""

    @property
    def sound(self) -> bool:
        """Whether everything is explained, and all pairs confirm it."""
        return not self.odd and all(each.equal for each in self.verified)


def learn_telling(
    learned: Callable[[], Learned], config: Config, probe: Callable[[dict[str, int]], bool]
) -> Learned:
    """Learn, and again with one more probe as long as readings fit alike that one can tell apart.

    ``probe`` adds one with other values of some fields of ``config``, and says whether there can be such a model.
    """
    found = learned()
    for _ in range(_MOST_PROBES):
        if not any(map(probe, found.doubts.telling(config))):
            break
        count, found = found.doubts.readings, learned()
        if found.doubts.readings >= count:
            break
    return found


_MOST_PROBES = 5


@logged
def learn(
    before: Source,
    after: Source,
    *more: tuple[Source, Source],
    layouts: tuple[str, str] = ("before", "after"),
    name: str = "learned",
    configs: Sequence[Config | None] = (),
    model_types: Sequence[str] | None = None,
    partial: bool = False,
    choose: Sequence[str] = (),
    model: Any = None,
) -> Book:
    """A rule book that leads from one file to another, learned from both.

    Args:
        before: a checkpoint (a path), or a state dict: names and arrays of any shapes.
        after: the same tensors in the other layout.
        more: pairs of other sizes: from them sizes are named by the config's fields, and the book is verified on them.
        layouts: the names of the two layouts.
        name: the book's name.
        configs: the config of each pair, where it is not beside the files.
        model_types: what the book is for; those of the configs where it is not given.
        partial: accept a book that does not explain everything.
        choose: answers to questions about readings that fit alike: ``AFTER=BEFORE`` for tensors that are equal to
            others, ``config.FIELD`` for sizes.
        model: a torch module of any class that has the tensors before, or those after; on the meta device is enough.
            It tells their kinds, and the order of a module's stacked parameters, which adapters of them need.

    >>> import numpy as np
    >>> q, k = np.arange(8.0).reshape(4, 2), np.arange(8.0, 12.0).reshape(2, 2)
    >>> book = learn({"q": q, "k": k}, {"qk": np.concatenate([q, k])})
    >>> str(book.rules[0].equation)
    'k : a b, q : c b == qk : (c + a) b where a = 2'

    Raises:
        BadInputError: a file cannot be read, or something is not explained.
        AmbiguousError: two readings fit; ``choices`` of its finding answer it.
    """
    given = [(before, after), *more]
    known = [*configs, *[None] * (len(given) - len(configs))]
    pairs = [Pair.of(a, b, config) for (a, b), config in zip(given, known, strict=True)]
    found = learn_pairs(
        pairs,
        layouts=layouts,
        name=name,
        model_types=model_types,
        choose=choose,
        **asked_of(model, pairs),
    )
    if not partial:
        require_sound(found)
    return found.book


class Told(TypedDict, total=False):
    """What a live model tells of the tensors of a side."""

    kind_of: tuple[KindOf, KindOf]
    orders: Orders


def asked_of(model: Any, pairs: Sequence[Pair]) -> Told:
    """What a model tells of a side of pairs; nothing where there is none.

    Raises ``BadInputError`` where it is of neither side.
    """
    if model is None:
        return {}
    skeleton = skeleton_of_any(model)
    sides = [(shapes_of(pair.before), shapes_of(pair.after)) for pair in pairs]
    return {"kind_of": kinds_told(skeleton, sides), "orders": lambda: skeleton.parameters}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Their shapes by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def require_sound(found: Learned) -> None:
    """Raise what keeps a book from being whole.

    Raises ``BadInputError``, or ``AmbiguousError`` where all is explained, but not in one way only.
    """
    findings = [
        Finding(
            "not-explained",
            f"{count} of the tensors after: {why}",
            key=pattern,
            fix="accept a book without them with --partial (partial=True)",
        )
        for why, same in _by_reason(found.odd).items()
        for pattern, count in patterns(same)
    ]
    findings += [
        Finding(
            "not-verified",
            "the learned rules do not lead from the one to the other and back, bit for bit",
            where=each.where,
            fix="give pairs of the same model at other sizes, or accept the book with --partial",
        )
        for each in found.verified
        if not each.equal and not found.odd
    ]
    if findings:
        raise BadInputError(findings)
    if found.questions:
        raise AmbiguousError(found.questions)


def _by_reason(odd: Mapping[str, str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = defaultdict(list)
    for name, why in odd.items():
        table[why].append(name)
    return table


def learn_pairs(
    pairs: Sequence[Pair],
    *,
    layouts: tuple[str, str],
    name: str = "learned",
    model_types: Sequence[str] | None = None,
    kind_of: tuple[KindOf, KindOf] | None = None,
    source: str = "regraft learn",
    naming: int = 2,
    choose: Sequence[str] = (),
    orders: Orders | None = None,
) -> Learned:
    """A rule book from pairs of files; the first ``naming`` of them name its sizes, all of them verify it.

    Where a pair that did not name sizes contradicts the book, it helps to name them: two fields of the config may have
    been the same by chance.

    ``kind_of`` tells kinds of tensors before and after, where live models say them, ``orders`` the parameters of
    modules of either side in the order in which a live model registers them.
    """
    _check_pairs(pairs)
    pairs = joined(pairs)
    chosen = Chosen.of(
        choose,
        {name: None for pair in pairs for name in pair.before},
        {name: None for pair in pairs for name in pair.after},
    )
    found = [infer(pair.before, pair.after, chosen) for pair in pairs[:naming]]
    doubts = Doubts(tell_layers(found, pairs, chosen))
    looped = [list(with_loops(each.drafts)) for each in found]
    notes: list[str] = [*pairs[0].notes]
    sights = [
        [sight for one in each for sight in _sights(one, number, looped, pairs)]
        for number, each in enumerate(looped)
    ]
    rules: list[tuple[str, Drafted]] = []
    told: list[tuple[str, Drafted]] = []
    for everywhere in (True, False):
        # Pieces that are alike by chance at one size may look like another rule there.
        for number, each in enumerate(sights):
            for sight in each:
                if sight.everywhere != everywhere:
                    continue
                if not _is_made(sight.one, rules if number else told):
                    written = _with_sizes(sight, notes, doubts, chosen)
                    rules += written
                    told += written if number else ()
    kinds = kind_of or (lambda _: None, lambda _: None)
    for inferred, pair in zip(found, pairs, strict=False):
        _value_changes(inferred, pair)
    first = found[0]
    for more in found[1:]:
        _add_rest(first, more, rules)
    shown = Pair(
        {n: t for pair in reversed(pairs) for n, t in pair.before.items()},
        {n: t for pair in reversed(pairs) for n, t in pair.after.items()},
        pairs[0].config,
        pairs[0].where,
    )
    if model_types is None:
        known = pairs[0].config.get("model_type") if pairs[0].config is not None else None
        model_types = [known] if isinstance(known, str) else []
    book = make_book(
        rules,
        first,
        (shown.before, shown.after),
        name=name,
        layouts=layouts,
        model_types=model_types,
        kinds=kinds,
        source=source,
    )
    book = with_tables(book, orders)
    counts = len(shown.after) - len(first.odd), len(shown.after)
    loaded = load_book(cast(Traversable, _Text(write_book(book))), f"{name}.toml")
    verified = []
    for number, pair in enumerate(pairs):
        dropped = dropped_names(loaded, pair)
        # What is explained at one size and not at another is no rule: only what the book leaves out is left out here.
        odd = _odd_of(loaded, pair)
        if number < naming:
            odd &= set(found[number].odd)
        made = set(pair.after) - odd
        equal = check(
            loaded, pair.before, pair.after, set(pair.before) - dropped, made, pair.config
        )
        verified.append(Verified(pair.where, number < naming, equal))
    wrong = verified[0].equal and not all(each.equal for each in verified)
    if naming < len(pairs) and (wrong or doubts.sizes):
        return learn_pairs(
            pairs,
            layouts=layouts,
            name=name,
            model_types=model_types,
            kind_of=kind_of,
            source=source,
            naming=len(pairs),
            choose=choose,
            orders=orders,
        )
    notes += [doubt.note for doubt in doubts.sizes if doubt.sure]
    seen = [(each.learned_from, each.equal) for each in verified]
    lines = [*notes, *order_questions(book)]
    text = write_book(book, comment(seen, counts, first, lines, live=kind_of is not None))
    return Learned(
        load_book(cast(Traversable, _Text(text)), f"{name}.toml"),
        text,
        *counts,
        dict(first.odd),
        tuple(first.unused),
        tuple(verified),
        tuple(dict.fromkeys(notes)),
        tuple(doubts.findings([(t.target, t.sources) for t in first.tied], pairs[0].where)),
        doubts,
    )


class _Text:
    """A file that is only its text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read_text(self, encoding: str) -> str:
        return self.text


def _check_pairs(pairs: Sequence[Pair]) -> None:
    findings = []
    for pair in pairs:
        if not pair.before or not pair.after:
            what = "before" if not pair.before else "after"
            findings.append(Finding("empty", f"there are no tensors {what}", where=pair.where))
            continue
        for side, tensors in (("before", pair.before), ("after", pair.after)):
            bad = [n for n, t in tensors.items() if t.has_nan()]
            if bad:
                message = f"values that are not numbers (NaN): in {count_in_words(len(bad), 'tensor')} {side}"
                findings.append(
                    Finding(
                        "not-a-number",
                        message,
                        where=pair.where,
                        key=bad[0],
                        fix="learn from a probe (regraft probe) or from whole weights",
                    )
                )
    if findings:
        raise BadInputError(findings)


def dropped_names(book: Book, pair: Pair) -> set[str]:
    """The tensors before that a book drops: of those that it says so of, the ones that no rule takes."""
    drops = [d for d in book.drops if "left" in d.sides]
    if not drops:
        return set()
    plan = plan_names(book, pair.before, pair.before, book.right, pair.config)
    if plan is None:
        return _matching(drops, pair.before)
    return {name for each in plan.dropped for name in each.group.names()}


def _odd_of(book: Book, pair: Pair) -> set[str]:
    return _matching([d for d in book.drops if "right" in d.sides], pair.after)


def _matching(drops: Iterable[Drop], tensors: Mapping[str, Tensor]) -> set[str]:
    return _matched([drop.key for drop in drops], tensors)


def _matched(keys: Iterable[Key], among: Iterable[str]) -> set[str]:
    """The names that some keys speak of."""
    names: set[str] = set()
    groups = group_names(list(among))
    for key in keys:
        for group in groups:
            match = match_group(key, group)
            if match is not None:
                names.update(group.take(match.rows).names())
    return names


def _is_made(one: Looped, rules: Sequence[tuple[str, Drafted]]) -> bool:
    """Whether rules make all targets of an equation already: another size has layers that the first has not.

    What says of which layers it is, is made by nothing but itself.
    """
    if is_told(one.members[0]):
        return any(text.startswith(one.sides + "\n") for text, _ in rules)
    targets = {name for member in one.members for name in member.names[1]}
    equations = [parse_equation(text) for text, _ in rules]
    return not targets - _matched([t.key for e in equations for t in e.right if t.key], targets)


def _add_rest(first: Inferred, more: Inferred, rules: Sequence[tuple[str, Drafted]]) -> None:
    """What another size shows that stays, is dropped or is not made, of which the first has nothing."""
    equations = [parse_equation(text) for text, _ in rules]
    split = Names([*first.kept, *first.unused, *first.odd, *more.kept, *more.unused])
    for side, mine, others in ((1, first.kept, more.kept), (0, first.unused, more.unused)):
        known = [t.key for e in equations for t in e.sides()[side] if t.key]
        known += [parse_key(key) for key in carried(mine, split)]
        mine += sorted(set(others) - _matched(known, others))
    known = [t.key for e in equations for t in e.right if t.key]
    known += [parse_key(key) for key in carried([*first.kept, *first.odd], split)]
    for name in sorted(set(more.odd) - _matched(known, more.odd)):
        first.odd[name] = more.odd[name]


@dataclass(frozen=True, slots=True)
class _Sight:
    """An equation, and its sizes in the pairs in which it holds."""

    one: Looped
    base: int
    """The number of the pair that it is from."""
    seen: tuple[Seen, ...]
    """In that pair, and in others."""
    pairs: tuple[Pair, ...]
    found: tuple[Looped | None, ...]
    """What was found in each of these pairs; ``None`` where the equation was only tried."""
    everywhere: bool
    """Whether it holds in all pairs that have its tensors."""

    @staticmethod
    def of(
        one: Looped, base: int, looped: Sequence[Sequence[Looped]], pairs: Sequence[Pair]
    ) -> _Sight:
        """Look for an equation in other pairs: as what was found there, or by trying it."""
        seen, held, everywhere = [_seen(one, pairs[base])], [pairs[base]], True
        known: list[Looped | None] = [one]
        for number, others in enumerate(looped):
            if number == base:
                continue
            same = [each for each in others if each.sides == one.sides]
            found = _seen(same[0], pairs[number]) if same else _fitted(one, seen[0], pairs[number])
            if found is not None:
                seen.append(found)
                held.append(pairs[number])
                known.append(same[0] if same else None)
            else:
                everywhere = everywhere and not is_there(one.sides, pairs[number])
        return _Sight(one, base, tuple(seen), tuple(held), tuple(known), everywhere)

    def parts(self) -> list[_Sight]:
        """Its members apart where their sizes differ in any pair; none where they are alike."""
        tables = [
            {m.numbered: m.sizes for m in each.members} for each in self.found if each is not None
        ]
        groups: dict[object, list[Drafted]] = defaultdict(list)
        for member in self.one.members:
            groups[tuple(table.get(member.numbered) for table in tables)].append(member)
        if len(groups) < 2:
            return []
        return [self._only(again) for part in groups.values() for again in with_loops(part)]

    def _only(self, one: Looped) -> _Sight:
        """The same of some of its members."""
        numbers = {member.numbered for member in one.members}
        kept: list[tuple[Seen, Pair, Looped | None]] = []
        for seen, pair, found in zip(self.seen, self.pairs, self.found, strict=True):
            if found is None:
                kept.append((seen, pair, None))
                continue
            members = tuple(member for member in found.members if member.numbered in numbers)
            if members:
                mine = Looped(one.sides, members)
                kept.append((_seen(mine, pair), pair, mine))
        seen_, pairs, founds = zip(*kept, strict=True)
        return _Sight(one, self.base, seen_, pairs, founds, self.everywhere)


def _sights(
    one: Looped, base: int, looped: Sequence[Sequence[Looped]], pairs: Sequence[Pair]
) -> Iterator[_Sight]:
    """An equation, or its members apart where only they hold in all pairs: their sizes differ."""
    whole = _Sight.of(one, base, looped, pairs)
    parts: dict[object, list[Drafted]] = defaultdict(list)
    for member in one.members:
        parts[member.sizes].append(member)
    if whole.everywhere or len(parts) < 2:
        yield whole
        return
    for part in parts.values():
        for again in with_loops(part):
            yield _Sight.of(again, base, looped, pairs)


def _with_sizes(
    sight: _Sight,
    notes: list[str],
    doubts: Doubts,
    chosen: Chosen,
) -> list[tuple[str, Drafted]]:
    """The equation with clauses; by itself for each of its members where their sizes differ."""
    one, seen, held = sight.one, sight.seen, sight.pairs
    found = clauses_of(one, seen, chosen.fields)
    if found is None and (parts := sight.parts()):
        return [rule for part in parts for rule in _with_sizes(part, notes, doubts, chosen)]
    if found is None and len(seen) > 1:
        found = clauses_of(one, seen[:1], chosen.fields)
    if len(seen) > 1 and (found is None or found.weak):
        found = _better(one, seen, held, found, chosen)
    if found is None:
        if len(one.members) == 1:
            notes.append(f"nothing says the sizes of {one.sides}")
        return []
    notes += found.notes
    doubts.sizes += found.doubts if len(seen) > 1 else ()
    where = f"\nwhere {', '.join(found.where)}" if found.where else ""
    return [(one.sides + where + "\n", one.members[0])]


def _fitted(one: Looped, base: Seen, pair: Pair) -> Seen | None:
    """Sizes for which an equation holds in a pair in which other equations were found."""
    tables = [dict(table) for table in base.sizes]
    if any(table != tables[0] for table in tables) or _elements(pair) > _MOST:
        return None
    sizes = next(_ways(one, base, pair, tuple(range(1, _LONGEST))), None)
    return None if sizes is None else Seen((sizes,), pair.config)


def _better(
    one: Looped,
    seen: Sequence[Seen],
    pairs: Sequence[Pair],
    found: Clauses | None,
    chosen: Chosen,
) -> Clauses | None:
    """Other sizes for which the equation holds as well, where the config says more of them.

    Where a run of elements goes on into the next piece, one size alone does not tell where the piece ends.
    """
    if any(len({tuple(t.items()) for t in each.sizes}) > 1 for each in seen):
        return found
    if max(map(_elements, pairs)) > _MOST:
        return found
    ways = [
        list(islice(_ways(one, each, pair), _MOST_WAYS))
        for each, pair in zip(seen, pairs, strict=True)
    ]
    for tables in product(*ways):
        others = [Seen((t,), pair.config) for t, pair in zip(tables, pairs, strict=True)]
        again = clauses_of(one, others, chosen.fields)
        if again is not None and (found is None or again.cost < found.cost):
            found = again
    return found


_MOST = 1 << 20
"""Elements of a pair on which sizes are tried."""
_MOST_WAYS = 12
_LONGEST = 64
"""Sizes above which an axis only gets those that a config suggests."""


def _ways(
    one: Looped, known: Seen, pair: Pair, others: tuple[int, ...] = ()
) -> Iterator[dict[str, int]]:
    numbers = tuple(dict.fromkeys((*numbers_of(pair.config), *others)))
    return fits(one.sides, one.members[0].fixed, pair, likely(known, pair.config), numbers)


def _elements(pair: Pair) -> int:
    return sum(t.bits.size for t in pair.before.values())


def _seen(looped: Looped, pair: Pair) -> Seen:
    return Seen(tuple(dict(member.sizes) for member in looped.members), pair.config)


def _value_changes(found: Inferred, pair: Pair) -> None:
    """Say more of tensors that have a counterpart of their shape, with other values."""
    found.odd.update({name: why for name, why in pair.odd.items() if name in found.odd})
    for name in found.odd:
        if name in pair.odd:
            continue
        one, other = pair.before.get(name), pair.after[name]
        if one is None or one.shape != other.shape:
            continue
        if one.dtype == other.dtype and np.array_equal(
            np.sort(one.bits, None), np.sort(other.bits, None)
        ):
            continue  # only their order does
        if one.dtype != other.dtype:
            found.odd[name] = f"it was {one.dtype} and is {other.dtype}: a cast is no layout change"
        else:
            found.odd[name] = "its values change, so that is no layout change"


__all__ = [
    "Config",
    "Learned",
    "Pair",
    "Verified",
    "dropped_names",
    "learn",
    "learn_pairs",
    "learn_telling",
    "require_sound",
]
