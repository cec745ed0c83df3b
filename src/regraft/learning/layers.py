"""Layers that a converter treats otherwise than the rest: the first ones, the last one, all from some layer on.

A tensor of one name may go one way in some layers and another way in others. Which layers those are must hold at every
size: at two sizes the last layer has two numbers. So the numbers of each form are compared over all pairs, and said by
the config, or as the last.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from regraft.learning.assemble import Drafted, Written
from regraft.learning.choosing import OTHERS, Chosen, Doubt, value_of
from regraft.learning.clauses import paths_of
from regraft.learning.infer import Inferred
from regraft.learning.loops import LAYER
from regraft.learning.pairs import Pair
from regraft.learning.relate import Names, isolated

LAST = "last"

_Place = tuple[int, str, int]
"""A number in names: the side, the template, and which number of it."""


@dataclass(slots=True, eq=False)
class _Form:
    """Tensors of which the same is made, but for numbers in their names."""

    members: list[list[Drafted]]
    """In each pair."""
    kept: bool = False
    """Whether they stay what they are."""
    dropped: bool = False

    @property
    def some(self) -> Drafted:
        return next(member for members in self.members for member in members)

    def terms(self) -> Iterator[tuple[int, int, Written]]:
        """Its terms, each with its side and its place there."""
        for side, terms in enumerate((self.some.left, self.some.right)):
            for at, term in enumerate(terms):
                yield side, at, term

    def numbers(self, side: int, at: int, place: int) -> list[list[int]]:
        """A number in the names of one term: of all members, in each pair."""
        return [
            [(m.left, m.right)[side][at].numbers[place] for m in members]
            for members in self.members
        ]

    def layers(self, side: int, template: str, place: int, names: Names) -> Iterator[list[int]]:
        """A number in all names that are called so, in each pair."""
        for members in self.members:
            split = [names[name] for member in members for name in member.names[side]]
            yield [numbers[place] for own, numbers in split if own == template]


@dataclass(frozen=True, slots=True)
class _Rival:
    """A form, and the term of it that is called as a term of another form."""

    form: _Form
    at: int
    values: tuple[frozenset[int], ...]
    """The numbers of its layers, in each pair."""
    stacked: bool
    """Whether it takes them all together."""

    @property
    def whole(self) -> bool:
        """Whether nothing can be said of its layers: it takes what others leave."""
        return self.stacked or self.form.dropped

    @property
    def everywhere(self) -> bool:
        """Whether there is something of it in every pair."""
        return all(self.values)

    @property
    def seen(self) -> list[frozenset[int]]:
        """The numbers of its layers, in the pairs that have some."""
        return [each for each in self.values if each]

    @property
    def single(self) -> bool:
        """Whether it is about one layer wherever it was seen."""
        return all(len(each) == 1 for each in self.seen)

    @property
    def fixed(self) -> bool:
        """Whether it is about the same layer wherever it was seen."""
        return self.single and len(set(self.seen)) == 1

    def is_late(self, everything: Sequence[set[int]]) -> bool:
        """Whether the pairs that have nothing of it have too few layers for it."""
        first = min(map(min, self.seen))
        return all(
            values or max(known, default=-1) < first
            for values, known in zip(self.values, everything, strict=True)
        )


def tell_layers(found: Sequence[Inferred], pairs: Sequence[Pair], chosen: Chosen) -> list[Doubt]:
    """Let equations that hold in some layers only say which, where all pairs agree on it.

    The equations of ``found`` are replaced. Returns what could be read otherwise.
    """
    if len(found) < 2:
        return []
    pairs = pairs[: len(found)]
    names = Names([n for pair in pairs for n in (*pair.before, *pair.after)])
    forms = _forms(found, names)
    doubts: list[Doubt] = []
    done: set[int] = set()
    turned: dict[int, int] = {}
    for place, rivals in _rivals(forms, names):
        if any(id(rival.form) in done for rival in rivals):
            # Their other side told them apart, which no clause needs to say again.
            for known in {turned[id(rival.form)] for rival in rivals if id(rival.form) in turned}:
                for rival in rivals:
                    if id(rival.form) not in done:
                        _put(rival.form, _in_turn(rival, place, known), found)
                        done.add(id(rival.form))
            continue
        all_of_them = [
            {names[n][1][place[2]] for n in side if names[n][0] == place[1]}
            for side in ((pair.before, pair.after)[place[0]] for pair in pairs)
        ]
        if _count_layers(place, all_of_them):
            late = all(rival.is_late(all_of_them) for rival in rivals)
            picks = _picked(rivals, all_of_them, pairs, chosen) if late else []
            turns = None if picks else _turns(rivals, all_of_them, pairs)
            if turns is not None:
                for rival in rivals:
                    _put(rival.form, _in_turn(rival, place, turns), found)
                    done.add(id(rival.form))
                    turned[id(rival.form)] = turns
                doubts += [] if turns > 1 else _unknown(rivals, chosen)
                continue
        else:
            picks = [(rival, _Pick(None)) for rival in rivals if rival.fixed and not rival.whole]
        for rival, pick in picks:
            sides = _text(rival.form.some)
            told = _told(rival, place, pick.clause)
            if told is None:
                continue
            _put(rival.form, told, found)
            done.add(id(rival.form))
            if pick.readings:
                doubts.append(Doubt(LAYER, sides, pick.readings, sure=pick.sure, verb=pick.verb))
    return doubts


def _count_layers(place: _Place, numbers: Sequence[set[int]]) -> bool:
    """Whether numbers count something of which a model has more or fewer: those in w1 and w3 do not."""
    _, template, column = place
    if any(each != numbers[0] for each in numbers):
        return True
    return isolated(template)[column] and numbers[0] == set(range(len(numbers[0])))


def _forms(found: Sequence[Inferred], names: Names) -> list[_Form]:
    """All forms; in pairs of few layers there may be nothing of one."""
    table: dict[object, list[list[Drafted]]] = defaultdict(lambda: [[] for _ in found])
    for number, each in enumerate(found):
        for member in each.drafts:
            table["made", _look(member)][number].append(member)
        for state, some in (("kept", each.kept), ("dropped", each.unused)):
            for name in some:
                term = Written(*names[name], (), "...")
                right = (term,) if state == "kept" else ()
                member = Drafted(
                    (term,), right, (), (), (), (), ((name,), (name,) if right else ())
                )
                table[state, term.template][number].append(member)
    return [
        _Form(members, kept=key[0] == "kept", dropped=key[0] == "dropped")  # type: ignore[index]
        for key, members in table.items()
    ]


def _look(member: Drafted) -> object:
    """What an equation says, whatever its axes are called: of a large pair they have other names."""
    names: dict[str, str] = {}

    def called(text: str) -> str:
        return _AXIS.sub(lambda axis: names.setdefault(axis[0], f"x{len(names)}"), text)

    sides = tuple(
        tuple(
            (t.template, tuple((column, called(hole)) for column, hole in t.holes), called(t.dims))
            for t in side
        )
        for side in (member.left, member.right)
    )
    fills = tuple((called(axis), value) for axis, value in member.fills)
    return sides, tuple(map(called, member.tags)), tuple(map(called, member.copies)), fills


_AXIS = re.compile(r"[a-z]\w*")


def _rivals(forms: Sequence[_Form], names: Names) -> Iterator[tuple[_Place, list[_Rival]]]:
    """Forms that speak of tensors called alike, and the number by which their layers differ."""
    table: dict[tuple[int, str], list[tuple[_Form, int, Written]]] = defaultdict(list)
    for form in forms:
        for side, at, term in form.terms():
            table[side, term.template].append((form, at, term))
    for (side, template), same in table.items():
        if len(same) < 2 or len({id(form) for form, _, _ in same}) < len(same):
            continue
        for place in range(len(same[0][2].numbers)):
            rivals = [
                _Rival(
                    form,
                    at,
                    tuple(map(frozenset, form.layers(side, template, place, names))),
                    place in {column for column, _ in term.holes},
                )
                for form, at, term in same
            ]
            if all(rival.fixed for rival in rivals):
                continue  # w1 and w3 are no layers
            beside = any(
                sum(map(bool, each)) > 1 for each in zip(*(r.values for r in rivals), strict=True)
            )
            if not beside or not any(rival.everywhere for rival in rivals):
                continue  # the same layers look otherwise at another size
            if all(
                not (a & b)
                for one, other in combinations(rivals, 2)
                for a, b in zip(one.values, other.values, strict=True)
            ):
                yield (side, template, place), rivals
                break


@dataclass(frozen=True, slots=True)
class _Pick:
    """What says the layers of a form: a clause, or their numbers spelled out; and what else would in all pairs."""

    clause: str | None
    readings: tuple[str, ...] = ()
    verb: str = "is"
    sure: bool = False


def _picked(
    rivals: Sequence[_Rival],
    everything: Sequence[set[int]],
    pairs: Sequence[Pair],
    chosen: Chosen,
) -> list[tuple[_Rival, _Pick]]:
    """What says the layers of all forms but one, which is about the others; none where they cannot be told."""
    options: list[_Pick | None] = []
    single = [rival.single and not rival.whole for rival in rivals]
    rest = [
        known
        - {n for rival, one in zip(rivals, single, strict=True) if one for n in rival.values[p]}
        for p, known in enumerate(everything)
    ]
    for rival, one in zip(rivals, single, strict=True):
        if rival.whole:
            options.append(None)
        elif one:
            options.append(_of_one(rival, everything, pairs, chosen))
        else:
            options.append(_beginning(rival, rest, pairs, chosen))
    open_ = [n for n, pick in enumerate(options) if pick is None]
    if len(open_) > 1:
        return _spelled([rivals[n] for n in open_], everything, chosen)
    told = [n for n in range(len(rivals)) if n not in open_]
    begun = [n for n in told if not single[n]]
    if not open_ and len(begun) == 1:
        pick = options[begun[0]]
        assert pick is not None
        number = (pick.clause or "").rpartition(" ")[2].isdigit()
        if number and not pick.readings:
            told = [n for n in told if n not in begun]  # the others are spelled out: it is the rest
        elif len(rivals) == 2:
            told = begun  # a field may say where it begins
    elif not open_:
        told = told[:-1] if all(options[n] for n in told) and len(told) > 1 else told
    return [(rivals[n], pick) for n in told if (pick := options[n]) is not None]


_MOST_TURNS = 8
_TURN_WORDS = ("interval", "freq", "every", "step", "period", "pattern", "stride")


def _turns(
    rivals: Sequence[_Rival], everything: Sequence[set[int]], pairs: Sequence[Pair]
) -> int | None:
    """After how many layers the forms come again in the same order; 1 where nothing says which layers are whose.

    ``None`` where no two forms have other layers at other sizes, so that the one is about what the other leaves, unless
    there is a size that has nothing of it.
    Nothing says it, either, where the config may: in a list with something for each layer, or a number of layers.
    """
    differ = [rival for rival in rivals if len(set(rival.values)) > 1 and not rival.whole]
    if len(differ) < 2 and all(rival.everywhere for rival in rivals):
        return None
    if len(differ) < len(rivals):
        return 1
    for turns in range(2, _MOST_TURNS + 1):
        rests = [{n % turns for values in rival.values for n in values} for rival in rivals]
        apart = sum(map(len, rests)) == len(set().union(*rests)) == turns
        if apart and max(map(len, everything)) >= 2 * turns:
            return 1 if _may_be_told(turns, everything, pairs) else turns
    return 1


def _may_be_told(turns: int, everything: Sequence[set[int]], pairs: Sequence[Pair]) -> bool:
    """Whether a config says something of every layer, or has a number of layers that is called as one of turns."""
    configs = [pair.config or {} for pair in pairs]
    lists = (
        name
        for name, value in configs[0].items()
        if isinstance(value, list) and len(set(map(str, value))) > 1
    )
    if any(
        all(
            isinstance(config.get(name), list) and len(config[name]) == max(known, default=-1) + 1
            for config, known in zip(configs, everything, strict=True)
        )
        for name in lists
    ):
        return True
    return any(
        any(word in path for word in _TURN_WORDS)
        and all(value_of(config, path) == turns for config in configs)
        for path in paths_of(configs[0])
    )


def _unknown(rivals: Sequence[_Rival], chosen: Chosen) -> list[Doubt]:
    """The question which layers are meant, where all numbers are spelled out."""
    few = min(rivals, key=lambda rival: sum(map(len, rival.values)))
    reading = ", ".join(map(str, sorted(set().union(*few.values))))
    if reading in chosen.fields:
        return []
    return [Doubt(LAYER, _text(few.form.some), (reading, OTHERS), verb="is")]


def _in_turn(rival: _Rival, place: _Place, turns: int) -> list[list[Drafted]]:
    """The members with numbers that are told from the turn; spelled out where there are no turns."""
    form = rival.form
    layers = form.numbers(place[0], rival.at, place[2])
    parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair, numbers in enumerate(layers):
        for at, number in enumerate(numbers):
            parts[number % turns if turns > 1 else number].append((pair, at))
    made = [list(members) for members in form.members]
    for rest, where in parts.items():
        known = [layers[pair][at] for pair, at in where]
        some = [form.members[pair][at] for pair, at in where]
        holes = {
            (side, at, column): text
            for side, at, term in form.terms()
            for column in range(len(term.numbers))
            if column not in {c for c, _ in term.holes}
            if (text := _of_turn([_number(m, side, at, column) for m in some], known, turns, rest))
        }
        for (pair, at), member in zip(where, some, strict=True):
            made[pair][at] = replace(
                member,
                left=tuple(_filled(member.left, 0, holes)),
                right=tuple(_filled(member.right, 1, holes)),
            )
    return made


def _number(member: Drafted, side: int, at: int, column: int) -> int:
    return (member.left, member.right)[side][at].numbers[column]


def _of_turn(values: Sequence[int], layers: Sequence[int], turns: int, rest: int) -> str | None:
    """A number that goes with the layer's: by as much, or by one with each turn; ``None`` for another one."""
    if turns == 1:
        return str(values[0]) if len(set(values)) == 1 else None
    for step in (turns, 1):
        away = {
            value - (layer - rest) // turns * step
            for value, layer in zip(values, layers, strict=True)
        }
        if len(away) == 1 and len(set(values)) > 1:
            (more,) = away
            times = LAYER if step == 1 else f"{step} {LAYER}"
            return times + (f" {'-' if more < 0 else '+'} {abs(more)}" if more else "")
    return None


def _filled(
    terms: Sequence[Written], side: int, holes: Mapping[tuple[int, int, int], str]
) -> Iterator[Written]:
    for at, term in enumerate(terms):
        mine = ((column, text) for (s, t, column), text in holes.items() if (s, t) == (side, at))
        yield replace(term, holes=(*term.holes, *mine))


def _spelled(
    rivals: Sequence[_Rival], everything: Sequence[set[int]], chosen: Chosen
) -> list[tuple[_Rival, _Pick]]:
    """Forms whose numbers are only spelled out: a question where no pair shows that other numbers belong to them."""
    fixed = [rival for rival in rivals if len(set(rival.values)) == 1 and not rival.whole]
    fixed = (
        fixed if len(fixed) < len(rivals) else sorted(fixed, key=lambda r: len(r.values[0]))[:-1]
    )
    result = []
    for rival in fixed:
        numbers = sorted(rival.values[0])
        if len(numbers) < 2 and len({frozenset(each) for each in everything}) > 1:
            continue
        reading = ", ".join(map(str, numbers))
        asked = () if reading in chosen.fields else (reading, OTHERS)
        result.append((rival, _Pick(None, asked)))
    return result


def _of_one(
    rival: _Rival, everything: Sequence[set[int]], pairs: Sequence[Pair], chosen: Chosen
) -> _Pick | None:
    """What says the number of a single layer; ``None`` where nothing does."""
    if rival.fixed:
        wanted = [min(rival.seen[0])] * len(pairs)
    elif rival.everywhere:
        wanted = [min(values) for values in rival.values]
    else:
        return None
    last = all(
        number == max(known) and len(known) > 1
        for number, known in zip(wanted, everything, strict=True)
    )
    readings = [str(wanted[0])] if rival.fixed else []
    if last or not rival.fixed:
        readings += _amounts(wanted, pairs, before_one=True)
    if last and not any("config." in each for each in readings):
        readings.append(LAST)
    if rival.fixed and len(readings) == 1 and readings[0] not in chosen.fields:
        # As every fourth layer, it would come again, where no pair has so many.
        (layer,) = rival.seen[0]
        if layer and max(map(len, everything)) <= 2 * layer + 1:
            readings.append(OTHERS)
    return _pick(readings, "is", chosen, last=last)


def _beginning(
    rival: _Rival, rest: Sequence[set[int]], pairs: Sequence[Pair], chosen: Chosen
) -> _Pick | None:
    """What says where layers begin that are all from there on; ``None`` where they are not, or begin with the first."""
    begun = {min(values) for values in rival.seen}
    if not rival.everywhere and len(begun) > 1:
        return None
    starts = [min(values or begun) for values in rival.values]
    whole = all(
        values == {n for n in known if n >= start}
        for values, known, start in zip(rival.values, rest, starts, strict=True)
    )
    if not whole or not all(starts):
        return None
    readings = [str(starts[0])] if len(set(starts)) == 1 else []
    readings += _amounts(starts, pairs, before_one=False)
    return _pick(readings, "from", chosen)


def _pick(
    readings: Sequence[str], verb: str, chosen: Chosen, *, last: bool = False
) -> _Pick | None:
    if not readings:
        return None
    picked = next((each for each in readings if each in chosen.fields), None)
    first = picked or readings[0]
    alike = tuple(readings) if picked is None and len(readings) > 1 else ()
    sure = [each for each in readings if _is_named(each)] == [first]
    number = first.isdigit()
    if number and verb == "is":
        return _Pick(None, alike, verb)
    if last and " - config." in first:
        verb, last = "from", False  # the last ones, which are a single one in every pair
    or_last = f" | {LAST}" if last and not number and first != LAST else ""
    return _Pick(f"{LAYER} {verb} {first}{or_last}", alike, verb, sure and not number)


def _amounts(wanted: Sequence[int], pairs: Sequence[Pair], *, before_one: bool) -> Iterator[str]:
    """Readings of a number in each pair: a field, one less, the difference of two, a part of one."""
    table: dict[str, list[int]] = {}
    first = pairs[0].config
    for path in paths_of(first) if first is not None else ():
        values = [value_of(pair.config, path) for pair in pairs]
        if None not in values:
            table[path] = [v for v in values if v is not None]
    fields = sorted(table, key=lambda path: (not _is_named(path), path.count("."), path))
    goal = list(wanted)
    yield from (f"config.{f}" for f in fields if table[f] == goal and not before_one)
    if before_one:
        yield from (f"config.{f} - 1" for f in fields if [v - 1 for v in table[f]] == goal)
        yield from (f"config.{f}" for f in fields if table[f] == goal)
    if len(set(goal)) == 1:
        return  # what is computed of two fields is no likelier than a number
    for one in fields:
        for other in fields:
            if (
                one != other
                and [a - b for a, b in zip(table[one], table[other], strict=True)] == goal
                and 0 not in table[other]
            ):
                yield f"config.{one} - config.{other}"
    for times in (2, 3, 4):
        yield from (
            f"config.{f} / {times}" for f in fields if table[f] == [times * v for v in goal]
        )


_LAYER_WORDS = ("layer", "block", "depth", "first", "dense", "begin", "start", "replace")


def _is_named(reading: str) -> bool:
    """Whether the fields of a reading are called as what counts layers is."""
    return any(word in reading for word in _LAYER_WORDS)


def _kind(reading: str) -> str:
    return next((sign for sign in (" - config.", " - ", " / ") if sign in reading), "")


def _told(rival: _Rival, place: _Place, clause: str | None) -> list[list[Drafted]] | None:
    """The members with a clause, and with holes wherever their names hold the layer's number; or with that number."""
    form = rival.form
    wanted = form.numbers(place[0], rival.at, place[2])
    columns: dict[tuple[int, int], tuple[int, int]] = {}
    """For each term the number that is the layer's, and how far it is from it."""
    for side, at, term in form.terms():
        stacked = {column for column, _ in term.holes}
        for column in range(len(term.numbers)):
            if column in stacked or (side, at) in columns:
                continue
            away = {
                value - layer
                for values, layers in zip(form.numbers(side, at, column), wanted, strict=True)
                for value, layer in zip(values, layers, strict=True)
            }
            if len(away) == 1:
                columns[side, at] = column, away.pop()
        if (side, at) not in columns and clause is not None and " is " not in clause:
            return None  # a loop stands in every name
    return [
        [
            replace(
                member,
                left=tuple(_holed(member.left, 0, columns, layer if clause is None else None)),
                right=tuple(_holed(member.right, 1, columns, layer if clause is None else None)),
                ranges=() if clause is None else (clause,),
            )
            for member, layer in zip(members, layers, strict=True)
        ]
        for members, layers in zip(form.members, wanted, strict=True)
    ]


def _holed(
    terms: Sequence[Written],
    side: int,
    columns: Mapping[tuple[int, int], tuple[int, int]],
    layer: int | None,
) -> Iterator[Written]:
    """Terms with the layer in their names: a number, or the axis that counts layers where there is none."""
    for at, term in enumerate(terms):
        if (side, at) not in columns:
            yield term
            continue
        column, away = columns[side, at]
        sign = f" {'-' if away < 0 else '+'} {abs(away)}" if away else ""
        hole = LAYER + sign if layer is None else str(layer + away)
        yield replace(term, holes=(*term.holes, (column, hole)))


def _put(form: _Form, told: Sequence[list[Drafted]], found: Sequence[Inferred]) -> None:
    """Exchange the equations of a form; what was kept has one of its own now."""
    for members, mine, each in zip(form.members, told, found, strict=True):
        if form.kept:
            gone = {member.names[0][0] for member in members}
            each.kept = [name for name in each.kept if name not in gone]
            each.drafts += mine
            continue
        others = {id(old): new for old, new in zip(members, mine, strict=True)}
        each.drafts = [others.get(id(old), old) for old in each.drafts]
    form.members = [list(each) for each in told]


def _text(each: Drafted) -> str:
    """The names of an equation's sides, for a question."""
    sides = (", ".join(names[:3]) for names in each.names)
    return " == ".join(sides)


__all__ = ["tell_layers"]
