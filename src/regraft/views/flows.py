"""From a trace to rows and flows: which tensors became which, and by what rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from regraft.planning.plan import Entry
from regraft.report import Target, Trace
from regraft.views.model import Flow, Rows
from regraft.views.wording import shape_in_words

Facts = dict[str, str | int | float]
Look = Callable[[str], tuple[str | None, Facts]]
"""What is known of a target: a state that is worse than that of its flow, and its facts."""


@dataclass(frozen=True, slots=True)
class Step:
    """Sources that became targets by one rule; the ids of the sources are those of the trace's headers."""

    state: str
    rule: str
    note: str
    times: int
    sources: dict[str, int | None]
    """Names and ids."""
    targets: dict[str, tuple[int, ...] | None]
    """Names and shapes."""


@dataclass(slots=True)
class Flows:
    """Collects both sides and the flows between them."""

    left: Rows = field(default_factory=Rows)
    right: Rows = field(default_factory=Rows)
    flows: list[Flow] = field(default_factory=list)

    def add(self, trace: Trace, look: Look, group: str = "") -> None:
        """Add everything that a trace says."""
        for step in steps(trace):
            sources: dict[tuple[tuple[str, str | int | float], ...], list[str]] = {}
            for name, number in step.sources.items():
                facts = _source_facts(trace, number)
                sources.setdefault(tuple(facts.items()), []).append(name)
            targets: dict[
                tuple[str | None, tuple[tuple[str, str | int | float], ...]], list[str]
            ] = {}
            for name, shape in step.targets.items():
                worse, facts = look(name)
                if shape is not None:
                    facts = {"shape": shape_in_words(shape), **facts}
                else:
                    facts = {**facts, "stored": "as it is"}
                targets.setdefault((worse, tuple(facts.items())), []).append(name)
            left: list[int] = []
            for known, names in sources.items():
                left += self.left.add(names, step.state, dict(known), group)
            right: list[int] = []
            for (worse, seen), names in targets.items():
                right += self.right.add(names, worse or step.state, dict(seen), group)
            self.flows.append(
                Flow(tuple(left), tuple(right), step.state, step.rule, step.note, step.times)
            )


def steps(trace: Trace) -> Iterator[Step]:
    """What a trace says, rule by rule."""
    if trace.plan is None:
        for group in trace.headers.groups:
            names = group.names()
            ids = group.ids.tolist()
            yield from _kept(trace, names, ids, "unchanged", "")
    else:
        for entry in trace.plan.entries:
            yield from _entry_steps(trace, entry)
        for carried in trace.plan.carried:
            names, ids = carried.group.names(), carried.group.ids.tolist()
            rule = f"unchanged ({carried.carry.where})"
            yield from _kept(trace, names, ids, rule, carried.carry.why)
    yield from _beside(trace)


def _kept(trace: Trace, names: list[str], ids: list[int], rule: str, why: str) -> Iterator[Step]:
    real = {n: i for n, i in zip(names, ids, strict=True) if _is_real(trace, i)}
    targets: dict[str, tuple[int, ...] | None] = {
        n: trace.headers.shapes[i] for n, i in real.items()
    }
    if real:
        yield Step("kept", rule, why, len(real), dict(real), targets)


def _entry_steps(trace: Trace, entry: Entry) -> Iterator[Step]:
    sources: dict[str, int | None] = {}
    for term, ids in zip(entry.read, entry.sources, strict=True):
        named = zip(entry.keys(term).names(), ids.reshape(-1).tolist(), strict=True)
        sources.update((name, i) for name, i in named if i >= 0 and _is_real(trace, i))
    targets: dict[str, tuple[int, ...] | None] = {
        name: entry.shape(term) for term in entry.written for name in entry.keys(term).names()
    }
    if trace.real is not None and not sources:
        return
    text = entry.rule.equation.text.strip()
    yield Step(
        _state_of(entry, sources, targets), str(entry.rule), text, len(entry), sources, targets
    )


def _state_of(entry: Entry, sources: Mapping[str, int | None], targets: Iterable[str]) -> str:
    read = sum(prod(entry.stack(term)) for term in entry.read)
    written = sum(prod(entry.stack(term)) for term in entry.written)
    if read != written:
        return "fused" if read > written else "split"
    if [term.dims for term in entry.read] != [term.dims for term in entry.written]:
        return "turned"
    return "kept" if set(sources) == set(targets) else "renamed"


def _is_real(trace: Trace, number: int) -> bool:
    return trace.real is None or number < trace.real


def _beside(trace: Trace) -> Iterator[Step]:
    """What goes along with the rest; tensors that share a source or a target make one step."""
    targets: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for old, new in trace.beside:
        targets.setdefault(old, []).append(new)
        sources.setdefault(new, []).append(old)
    by_state: dict[str, tuple[dict[str, int | None], dict[str, None]]] = {}
    for old, new in trace.beside:
        if len(sources[new]) > 1:
            state = "fused"
        elif len(targets[old]) > 1:
            state = "split"
        else:
            state = "kept" if old == new else "renamed"
        olds, news = by_state.setdefault(state, ({}, {}))
        olds[old], news[new] = None, None
    for state, (olds, news) in by_state.items():
        yield Step(
            state, "moves with its weight or module", "", len(olds), olds, dict.fromkeys(news)
        )


def _source_facts(trace: Trace, number: int | None) -> Facts:
    if number is None:
        return {"stored": "as it is"}
    facts: Facts = {
        "shape": shape_in_words(trace.headers.shapes[number]),
        "dtype": trace.headers.dtypes[number],
    }
    if trace.scales:
        scale = trace.scales[number]
        facts |= {"rank": scale.rank, "alpha": scale.alpha, "scale": scale.value}
    return facts


def target_facts(target: Target) -> Facts:
    """What there is to say of an adapted tensor."""
    facts: Facts = {"rank": target.rank, "alpha": target.alpha, "scale": target.scale}
    if target.rung == "family":
        facts |= {"rung": "exact", "error": "0"}
        if not target.exact:
            facts |= {"rung": "rescaled", "error": "rounding of B"}
    else:
        facts["rung"] = _RUNGS[target.rung]
        facts["error"] = f"{target.error:.2g}" if target.rung == "svd" else "rounding"
    return facts | {"adapted as": "a parameter" if target.parameter else "a module"}


_RUNGS = {
    "lora": "exact, as LoRA",
    "base": "exact, by the base",
    "dense": "full rank",
    "svd": "approximated",
    "merged": "added to the base",
}


def made_facts(trace: Trace) -> dict[str, Facts]:
    """Shape and dtype of each tensor of a checkpoint's result."""
    return {
        name: {"shape": shape_in_words(shape), "dtype": dtype}
        for name, shape, dtype in zip(*trace.made, strict=True)
    }
