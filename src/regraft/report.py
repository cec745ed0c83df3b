"""What a conversion did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from msgspec import Struct

from regraft.shown import Shown

if TYPE_CHECKING:
    from regraft.adapters.scale import Scale
    from regraft.planning.plan import Headers, Plan


SCHEMA_VERSION = 1
"""Stands in every JSON document; it grows when a field is renamed, removed or means something else."""


class Target(Struct, frozen=True, gc=False):
    """One adapted tensor of the result."""

    key: str
    """The base tensor's key in the result's layout."""
    rank: int
    alpha: int | float
    scale: float
    """What multiplies ``B @ A``."""
    rule: str
    """The rule that moved it, or why it was carried over."""
    exact: bool
    """Whether every number is the source's own, bit for bit; otherwise a scale was folded into B."""
    parameter: bool = False
    """Whether PEFT adapts it through ``target_parameters``."""
    rung: str = "family"
    """How it was reached: ``family`` (what it was), ``lora`` (exactly, as LoRA), ``base`` (the same, with the base's
    weights), ``dense`` or ``svd`` (on request), ``merged`` (there is no adapter any more)."""
    error: float = 0.0
    """How far an approximation is off, relative to the delta's Frobenius norm."""


class Trace(Struct, frozen=True, eq=False):
    """Where every tensor went, for reports that show it; no part of the plain data."""

    headers: Headers
    """What there was: for an adapter the tensors of the base that it adapts."""
    plan: Plan | None = None
    """``None`` where nothing moved."""
    real: int | None = None
    """Ids from here on stand for weights whose bytes are in other tensors."""
    scales: Sequence[Scale] = ()
    """By id, for an adapter."""
    beside: tuple[tuple[str, str], ...] = ()
    """What the plan does not speak of: names before and after."""
    made: tuple[Sequence[str], Sequence[tuple[int, ...]], Sequence[str]] = ((), (), ())
    """Names, shapes and dtypes of the result, where they are known."""


@dataclass(slots=True)
class AdapterReport:
    """What became of one adapter."""

    name: str
    """The sub-folder, or an empty string."""
    peft_type: str
    source_layout: str
    target_layout: str
    evidence: list[str]
    """Why it was taken for what it is."""
    copied: bool = False
    """Whether it was in the target layout already and was copied as it is."""
    targets: list[Target] = field(default_factory=list)
    carried: int = 0
    """How many tensors beside LoRA factors were carried over or moved."""
    tensors_in: int = 0
    tensors_out: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    """How often every rule fired."""
    notes: list[str] = field(default_factory=list)
    verified: int = 0
    """How many targets and other tensors were compared with the source's."""
    error: float = 0.0
    """The largest relative error of a delta that was found."""
    sampled: list[str] = field(default_factory=list)
    """Targets that were compared by random vectors, because the time for comparing every entry was spent."""
    trace: Trace | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True)
class PartReport:
    """What became of one part of a conversion that several processes do."""

    number: int
    """From 0."""
    count: int
    """How many parts there are."""
    pieces: int
    """How many pieces of the result are the part's."""
    bytes: int
    """Their size."""
    before: int = 0
    """How many of them were there before."""
    left: int = 0
    """How many pieces of the whole are not there, as far as was known at the end."""


@dataclass(slots=True)
class CheckpointReport:
    """What became of a checkpoint."""

    source_layout: str
    target_layout: str
    evidence: list[str]
    """Why it was taken for what it is."""
    tensors_in: int = 0
    tensors_out: int = 0
    bytes: int = 0
    """Of the weights files that were written."""
    files: list[str] = field(default_factory=list)
    """The weights files."""
    others: list[str] = field(default_factory=list)
    """Files beside the weights that were carried over."""
    rules: dict[str, int] = field(default_factory=dict)
    """How often every rule fired."""
    carried: int = 0
    """How many tensors are the same in both layouts."""
    renamed: int = 0
    """How many only got another name."""
    dropped: list[str] = field(default_factory=list)
    """The tensors that were left out because the user asked for it."""
    kept: list[str] = field(default_factory=list)
    """The tensors that stayed as they were because the user asked for it."""
    casts: dict[str, int] = field(default_factory=dict)
    """How many tensors were cast from what to what."""
    config: list[str] = field(default_factory=list)
    """What changed in ``config.json``."""
    traffic: dict[str, int] = field(default_factory=dict)
    """What went over the network, where anything did: requests, bytes read and written, retries, and seconds
    that were waited because a store asked for it, of all threads together."""
    memory: int = 0
    """The most memory it may take, in bytes, as announced before the work began."""
    resumed: bool = False
    """Whether a run before had done a part of it."""
    part: PartReport | None = None
    """Where one part was done of a conversion in parts; the result is in its place after the commit."""
    notes: list[str] = field(default_factory=list)
    trace: Trace | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True, repr=False)
class Report(Shown):
    """What a conversion did; ``to_dict`` gives plain data."""

    source: str
    destination: str
    adapters: list[AdapterReport] = field(default_factory=list)
    checkpoint: CheckpointReport | None = None
    """What became of a checkpoint, where that is what was converted."""
    files: list[str] = field(default_factory=list)
    """Other files that were copied."""
    written: bool = True
    pushed: str | None = None
    """Where the result is at the hub, where it was sent there."""
    ended: str | None = None
    """The stage that was ended and removed, where that was asked for; empty where there was none."""
    own_rules: list[str] = field(default_factory=list)
    """The user's own rule books that were in force, and whether REGRAFT_RULES named them."""

    @property
    def targets(self) -> list[Target]:
        """The adapted tensors of all adapters."""
        return [target for adapter in self.adapters for target in adapter.targets]

    @property
    def notes(self) -> list[str]:
        """What the user should know, of all adapters."""
        notes = [note for adapter in self.adapters for note in adapter.notes]
        return notes + (self.checkpoint.notes if self.checkpoint is not None else [])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        data: dict[str, Any] = plain_data(self)
        return data


def log_report(report: Report) -> None:
    """Tell what was found and done to the logger ``regraft``: notes as information, approximations as a warning."""
    import logging

    log = logging.getLogger("regraft")
    for adapter in report.adapters:
        name = f"{report.source}: {adapter.name}".rstrip(": ")
        log.info("%s: %s -> %s", name, adapter.source_layout, adapter.target_layout)
        for line in adapter.evidence:
            log.info("%s: %s", name, line)
        for rule, count in adapter.rules.items():
            log.info("%s: rule %s applied %d times", name, rule, count)
        off = max(adapter.targets, key=lambda target: target.error, default=None)
        if off is not None and off.error > 0:
            count = sum(target.error > 0 for target in adapter.targets)
            log.warning(
                "%s: %d of %d targets are approximations; the delta of %s is off by %.3g of its size (Frobenius norm), "
                "and no other by more",
                name, count, len(adapter.targets), off.key, off.error,
            )  # fmt: skip
    if report.checkpoint is not None:
        made = report.checkpoint
        log.info("%s: %s -> %s", report.source, made.source_layout, made.target_layout)
        for line in made.evidence:
            log.info("%s: %s", report.source, line)
        for rule, count in made.rules.items():
            log.info("%s: rule %s applied %d times", report.source, rule, count)
    for note in report.notes:
        log.info("%s: %s", report.source, note)


_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def logged(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a function tell the logger ``regraft`` what its result says of layouts, evidence, notes and warnings."""

    @wraps(function)
    def run(*args: _Given.args, **named: _Given.kwargs) -> _Result:
        result = function(*args, **named)
        log_result(result)
        return result

    return run


def log_result(result: Any, where: str = "") -> None:
    """Tell the logger ``regraft`` what a result says of layouts, evidence, notes and warnings."""
    import logging

    log = logging.getLogger("regraft")
    name = next(
        (
            str(getattr(result, f))
            for f in ("source", "src", "a", "name")
            if getattr(result, f, None)
        ),
        "",
    )
    where = f"{where}: {name}" if where and name else where or name
    layouts = getattr(result, "layouts", None) or [
        getattr(result, name, None) for name in ("source_layout", "target_layout", "layout")
    ]
    if any(layouts):
        log.info("%s: %s", where, " -> ".join(str(layout) for layout in layouts if layout))
    for line in [*getattr(result, "evidence", ()), *getattr(result, "notes", ())]:
        log.info("%s: %s", where, line)
    for line in getattr(result, "warnings", ()):
        log.warning("%s: %s", where, line)
    for part in ("adapters", "verdicts", "checkpoint"):
        inside = getattr(result, part, None) or []
        for each in inside if isinstance(inside, list) else [inside]:
            log_result(each, where)


def plain_data(value: Any) -> Any:
    """What ``asdict`` gives, without traces."""
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value) if field.name != "trace")
        return {name: plain_data(getattr(value, name)) for name in names}
    if isinstance(value, Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def count_in_words(number: int, noun: str, verb: str = "") -> str:
    """A number and a noun, and a verb that goes with them.

    >>> count_in_words(1, "key"), count_in_words(2, "key")
    ('1 key', '2 keys')
    >>> count_in_words(1, "tensor", "was copied"), count_in_words(2, "tensor", "was copied")
    ('1 tensor was copied', '2 tensors were copied')
    """
    first, _, rest = verb.partition(" ")
    if first and number != 1:
        first = _PLURALS.get(first) or first.removesuffix("s")
    return " ".join(filter(None, (f"{number} {noun}{'s' * (number != 1)}", first, rest)))


_PLURALS = {"is": "are", "was": "were", "has": "have", "does": "do"}


def show_size(count: float) -> str:
    """A number of bytes with a decimal unit.

    >>> show_size(4_400_000_000)
    '4.4 GB'
    """
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count / 1000:.3g} TB"
