"""Pages from what the commands find out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.dialects.judging import VERDICTS
from regraft.errors import Finding, RegraftError
from regraft.names.patterns import group_alike
from regraft.report import (
    AdapterReport,
    CheckpointReport,
    Report,
    Target,
    count_in_words,
    show_size,
)
from regraft.views.flows import Facts, Flows, made_facts, target_facts
from regraft.views.loading import how_to_load
from regraft.views.model import Fact, Flow, Page, Rows, Tone
from regraft.views.wording import LOSSLESS, shape_in_words, what_changed

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification
    from regraft.checking.for_tool import ToolCheck
    from regraft.checking.verdict import Check
    from regraft.checkpoints.verify import Verification
    from regraft.dialects.peft.inspect import Inspected, Inspection
    from regraft.views.outcome import Problem


def page_of_report(report: Report) -> Page:
    """What a conversion did."""
    made = Flows()
    if report.checkpoint is None:
        for adapter in report.adapters:
            _add_adapter(made, adapter)
    facts = [Fact("source", report.source), Fact("result", report.destination)]
    if report.checkpoint is not None:
        _add_checkpoint(made, report.checkpoint, report.targets)
        facts += _checkpoint_facts(report.checkpoint)
    for adapter in report.adapters:
        facts += _adapter_facts(adapter)
    if report.files:
        facts.append(Fact("also copied", ", ".join(report.files)))
    if not report.written:
        facts.append(Fact("written", "nothing: this was a dry run", "warning"))
    layouts = _layouts(report)
    return Page(
        title=Path(report.source).name or report.source,
        command="convert",
        verdict=_verdict(report),
        facts=tuple(facts),
        left=made.left.side(layouts[0]),
        right=made.right.side(layouts[1]),
        flows=tuple(made.flows),
        notes=tuple(report.notes),
        next=_load_line(report) if report.written and report.checkpoint is None else (),
    )


def _layouts(report: Report) -> tuple[str, str]:
    parts: list[AdapterReport | CheckpointReport] = [*report.adapters]
    if report.checkpoint is not None:
        parts.append(report.checkpoint)
    before = " and ".join(dict.fromkeys(part.source_layout for part in parts))
    after = " and ".join(dict.fromkeys(part.target_layout for part in parts))
    return f"source: {before}", f"result: {after}"


def _verdict(report: Report) -> Fact:
    word = "Converted" if report.written else "Can be converted"
    changed = what_changed(report.targets, report.checkpoint.casts if report.checkpoint else None)
    if changed:
        return Fact(word, "; ".join(changed) + "; the rest is bit for bit", "warning")
    return Fact(word, LOSSLESS, "good")


def _load_line(report: Report) -> tuple[Fact, ...]:
    how, _, calls = how_to_load(report).partition(": ")
    return (Fact(how, calls),)


def _add_adapter(made: Flows, adapter: AdapterReport) -> None:
    targets = {target.key: target for target in adapter.targets}

    def look(name: str) -> tuple[str | None, Facts]:
        target = targets.pop(name, None)
        return None, target_facts(target) if target is not None else {}

    if adapter.trace is not None:
        made.add(adapter.trace, look, adapter.name)
    for target in targets.values():
        row = made.right.add([target.key], "kept", target_facts(target), adapter.name)
        made.flows.append(Flow((), row, "kept", target.rule))


def _add_checkpoint(made: Flows, checkpoint: CheckpointReport, merged: Iterable[Target]) -> None:
    if checkpoint.trace is None:
        return
    facts = made_facts(checkpoint.trace)
    for target in merged:
        facts[target.key] = {**facts.get(target.key, {}), **target_facts(target)}
    made.add(checkpoint.trace, lambda name: (None, facts.get(name, {})))


def _adapter_facts(adapter: AdapterReport) -> list[Fact]:
    lead = f"{adapter.name}: " if adapter.name else ""
    facts = [
        Fact(f"{lead}kind", adapter.peft_type),
        Fact(f"{lead}tensors", f"{adapter.tensors_in} in, {adapter.tensors_out} out"),
        Fact(f"{lead}targets", str(len(adapter.targets))),
    ]
    if adapter.verified:
        error = f"the largest relative error is {adapter.error:.2g}"
        facts.append(Fact(f"{lead}verified", error, "good"))
    return facts + [Fact(f"{lead}evidence", reason) for reason in adapter.evidence]


def _checkpoint_facts(checkpoint: CheckpointReport) -> list[Fact]:
    files = f"{len(checkpoint.files)} of {show_size(checkpoint.bytes)} together"
    facts = [
        Fact("tensors", f"{checkpoint.tensors_in} in, {checkpoint.tensors_out} out"),
        Fact("weights files", files),
    ]
    facts += [Fact("cast", f"{count} from {what}") for what, count in checkpoint.casts.items()]
    facts += [Fact("config.json", change) for change in checkpoint.config]
    return facts + [Fact("evidence", reason) for reason in checkpoint.evidence]


def page_of_inspection(inspection: Inspection) -> Page:
    """What adapters are."""
    rows = Rows()
    facts = [Fact("source", inspection.source)]
    for adapter in inspection.adapters:
        wrong = _keys_of(adapter.problems)
        for target in adapter.targets:
            known: Facts = {"rank": target.rank, "alpha": target.alpha, "scale": target.scale}
            if target.shape is not None:
                known["base shape"] = shape_in_words(target.shape)
            known |= {
                "dtype": target.dtype,
                "adapted as": "a parameter" if target.parameter else "a module",
            }
            _add_by_state(rows, target.keys, "adapted", wrong, known, adapter.name)
        for other in adapter.others:
            known = {
                "shape": shape_in_words(other.shape),
                "dtype": other.dtype,
                "stored": "as it is",
            }
            _add_by_state(rows, other.keys, "saved", wrong, known, adapter.name)
        facts += _inspected_facts(adapter)
    problems = inspection.problems
    unknown = [a for a in inspection.adapters if not a.layouts and a.targets]
    verdict = Fact(
        "Readable",
        "no problem was found in the file; 'regraft check' tells whether it loads",
        "info",
    )
    if unknown:
        verdict = Fact(
            "Not known", "its layout is not known, so little could be checked", "warning"
        )
    if problems:
        verdict = Fact("Not sound", count_in_words(len(problems), "problem"), "bad")
    return Page(
        title=Path(inspection.source).name or inspection.source,
        command="inspect",
        verdict=verdict,
        facts=tuple(facts),
        left=rows.side("what it adapts"),
        findings=tuple(problems),
        notes=tuple(note for adapter in inspection.adapters for note in adapter.notes),
    )


def _keys_of(findings: Iterable[Finding], state: str = "problem") -> dict[str, str]:
    """States by key; a LoRA's tensors stand for the weight that they adapt."""
    from regraft.dialects.peft.scan import PREFIX

    states = {}
    for finding in findings:
        key = (finding.key or "").removeprefix(PREFIX)
        for suffix in ("", ".weight"):
            states[key + suffix] = state
        module, found, _ = key.partition(".lora_")
        if found:
            states[module] = states[f"{module}.weight"] = state
    return states


def _add_by_state(
    rows: Rows,
    names: Iterable[str],
    state: str,
    wrong: dict[str, str],
    facts: Facts,
    group: str = "",
) -> None:
    """Add names, those with a problem under the state that goes with it."""
    by_state: dict[str, list[str]] = {}
    for name in names:
        by_state.setdefault(wrong.get(name, state), []).append(name)
    for found, same in by_state.items():
        rows.add(same, found, facts, group)


def _inspected_facts(adapter: Inspected) -> list[Fact]:
    lead = f"{adapter.name}: " if adapter.name else ""
    layout: tuple[str, Tone] = (" or ".join(adapter.layouts), "good")
    if not adapter.layouts:
        layout = ("not known", "warning")
    facts = [
        Fact(f"{lead}kind", " with ".join([adapter.peft_type, *adapter.variants])),
        Fact(f"{lead}layout", *layout),
        Fact(f"{lead}base", adapter.model_type or "not known"),
        Fact(f"{lead}tensors", f"{adapter.tensors}, {show_size(adapter.bytes)}"),
    ]
    if adapter.packing:
        facts.append(Fact(f"{lead}experts", f"packed as by {adapter.packing}"))
    if adapter.peft_version:
        facts.append(Fact(f"{lead}saved by", f"PEFT {adapter.peft_version}"))
    return facts + [Fact(f"{lead}evidence", reason) for reason in adapter.evidence]


def page_of_verification(result: Verification) -> Page:
    """Whether two checkpoints are one."""
    made = Flows()
    states = {f.key: _DIFFERENCES.get(f.code, "differs") for f in result.differences if f.key}
    if result.trace is not None:
        facts = made_facts(result.trace)
        made.add(result.trace, lambda name: (states.get(name), facts.get(name, {})))
    made.right.add([f.key for f in result.differences if f.key and f.code == "extra"], "extra")
    if result.equal:
        verdict = Fact("Equal", "every bit is accounted for", "good")
    else:
        number = count_in_words(len(result.differences), "difference")
        verdict = Fact("Not equal", number, "bad")
    return Page(
        title=f"{Path(result.source).name} and {Path(result.destination).name}",
        command="verify",
        verdict=verdict,
        facts=(
            Fact("first", result.source),
            Fact("second", result.destination),
            Fact(
                "compared", f"{count_in_words(result.tensors, 'tensor')}, {show_size(result.bytes)}"
            ),
        ),
        left=made.left.side(f"first: {result.source_layout}"),
        right=made.right.side(f"second: {result.target_layout}"),
        flows=tuple(made.flows),
        findings=tuple(result.differences),
    )


def page_of_adapter_verification(result: AdapterVerification) -> Page:
    """Whether two adapters add the same to their bases."""
    rows = Rows()
    states = {f.key: _DIFFERENCES.get(f.code, "differs") for f in result.differences if f.key}
    alike: dict[tuple[str, str], list[str]] = {}
    for target in result.targets:
        state = states.pop(target.key, "equal")
        alike.setdefault((state, f"{target.error:.0e}"), []).append(target.key)
    for (state, error), keys in alike.items():
        rows.add(keys, state, {"error": error})
    for key, state in states.items():
        rows.add([key], state)
    counted = (
        f"{count_in_words(len(result.targets), 'target')}, the largest error is {result.error:.2g}"
    )
    verdict = Fact("Equal", counted, "good")
    if not result.equal:
        number = count_in_words(len(result.differences), "difference")
        verdict = Fact("Not equal", f"{number} in {counted}", "bad")
    return Page(
        title=f"{Path(result.source).name} and {Path(result.destination).name}",
        command="verify",
        verdict=verdict,
        facts=(
            Fact("first", f"{result.source}, {result.source_layout}"),
            Fact("second", f"{result.destination}, {result.target_layout}"),
            Fact("tolerance", f"{result.tolerance:g}, relative to each matrix"),
            Fact("other tensors", f"{result.others}, compared bit for bit"),
            *_sampled(result),
        ),
        left=rows.side("what they add to the base"),
        findings=tuple(result.differences),
    )


def _sampled(result: AdapterVerification) -> tuple[Fact, ...]:
    if not result.sampled:
        return ()
    counted = count_in_words(len(result.sampled), "target")
    told = f"{counted}, by 16 random vectors: {', '.join(result.sampled)}"
    return (Fact("not entry by entry", told, "warning"),)


def page_of_check(result: Check) -> Page:
    """Whether something loads as it is."""
    rows = Rows()
    facts = [Fact("source", result.source), Fact("checked for", result.layout)]
    following: list[Fact] = []
    for verdict in result.verdicts:
        lead = f"{verdict.name}: " if verdict.name else ""
        for row in verdict.rows:
            numbers = {"rank": row.rank, "scale": row.scale, "times too large": row.factor}
            known: Facts = {name: n for name, n in numbers.items() if n is not None}
            known |= {"dead": "B is zero"} if row.dead else {}
            known |= {"why": row.detail} if row.detail else {}
            rows.add(row.keys, _OUTCOMES[row.outcome], known, verdict.name)
        facts.append(Fact(f"{lead}tried with", verdict.tried or "nothing: by names and config"))
        if verdict.error is not None:
            facts.append(Fact(f"{lead}raises", verdict.error, "bad"))
        facts += [Fact(f"{lead}cause", cause, "warning") for cause in verdict.causes]
        if verdict.no_remedy is not None:
            facts.append(Fact(f"{lead}no fix is known", verdict.no_remedy, "bad"))
        following += [Fact(f"{lead}fix", line) for line in verdict.remedy]
    answer = Fact("Healthy", f"it loads with {result.layout} as it is", "good")
    if not result.healthy:
        proven = any(verdict.healthy is False for verdict in result.verdicts)
        word = "Will not load correctly" if proven else "Not proven"
        answer = Fact(word, f"with {result.layout}", "bad" if proven else "warning")
    return Page(
        title=Path(result.source).name or result.source,
        command="check",
        verdict=answer,
        facts=tuple(facts),
        left=rows.side("what becomes of it"),
        findings=tuple(f for verdict in result.verdicts for f in verdict.findings),
        notes=tuple(note for verdict in result.verdicts for note in verdict.notes),
        next=tuple(following),
    )


def page_of_tool_check(result: ToolCheck) -> Page:
    """What a tool does with an adapter as it is."""
    rows = Rows()
    alike: dict[tuple[str, str], list[str]] = {}
    for target in result.targets:
        alike.setdefault((target.outcome, target.reason), []).append(target.key)
    for (outcome, reason), keys in alike.items():
        rows.add(keys, _FATES[outcome], {"why": reason} if reason else {})
    release = f"{result.tool} {result.version}"
    facts = [Fact("source", result.source), Fact("known from", result.basis)]
    facts += [Fact("raises", why, "bad") for why in result.failures]
    if result.no_fix is not None:
        facts.append(Fact("no fix is known", result.no_fix, "bad"))
    tone: Tone = "good" if result.healthy else "warning" if result.is_unknown else "bad"
    verdict = Fact(VERDICTS[result.verdict], release, tone)
    return Page(
        title=Path(result.source).name or result.source,
        command="check",
        verdict=verdict,
        facts=tuple(facts),
        left=rows.side("what becomes of it"),
        notes=tuple(result.notes),
        next=tuple(Fact("fix", line) for line in result.remedy),
    )


_FATES = {
    "loaded": "lands",
    "ignored": "ignored",
    "fails": "fails",
    "wrong-scale": "scaled",
    "wrong-values": "values",
    "unknown": "unknown",
}
"""What a tool makes of a module, by the states of the page."""
_OUTCOMES = {
    "lands": "lands",
    "dropped": "ignored",
    "scaled": "scaled",
    "differs": "values",
    "extra": "causeless",
    "uncalled": "idle",
    "fails": "uncallable",
    "refused": "fails",
    "elsewhere": "elsewhere",
    "missing": "missing",
    "unexpected": "unused",
    "mismatched": "misshaped",
}
"""What becomes of a tensor in a check, by the states of the page; both have the same words for it."""
_DIFFERENCES = {"missing": "missing", "extra": "extra"}
_FAILED = {
    "refused": ("Refused", "there is no exact equivalent, or no safe way"),
    "unmatched-keys": ("Not matched", "no rule matches some keys"),
    "ambiguous": ("Ambiguous", "more than one reading fits"),
    "not-equal": ("Not equal", "what it adds is not what the source adds"),
    "bad-input": ("Bad input", "something is wrong with it"),
}


def page_of_failure(command: str, source: str, error: RegraftError | Problem) -> Page:
    """Why a command gave no result; what can be told of the source stands beside the findings."""
    state = {"refused": "refused", "unmatched-keys": "unmatched"}.get(error.kind, "problem")
    word, text = _FAILED.get(error.kind, ("Failed", "there is no result"))
    rows = Rows()
    wrong = _keys_of(error.findings, state)
    for names, facts, group in _source_names(Path(source)):
        if state == "problem":
            _add_by_state(rows, names, "saved", wrong, facts, group)
            continue
        # One finding speaks for all keys that are like the one it names.
        for pattern in group_alike(names):
            rows.add(pattern, state if any(n in wrong for n in pattern) else "saved", facts, group)
    return Page(
        title=Path(source).name or source,
        command=command,
        verdict=Fact(
            word,
            f"{text}: {count_in_words(len(error.findings), 'problem')}, nothing written",
            "bad",
        ),
        facts=(Fact("source", source),),
        left=rows.side("source"),
        findings=tuple(error.findings),
    )


def _source_names(source: Path) -> Iterable[tuple[Iterable[str], Facts, str]]:
    """Names of a source that could not be converted, as far as it can be read."""
    from regraft.checkpoints.source import is_checkpoint, open_checkpoint
    from regraft.dialects.peft.inspect import inspect

    try:
        if is_checkpoint(source):
            yield open_checkpoint(source).tensors.names, {}, ""
            return
        for adapter in inspect(source).adapters:
            for target in adapter.targets:
                known: Facts = {"rank": target.rank, "alpha": target.alpha, "scale": target.scale}
                yield target.keys, known, adapter.name
            for other in adapter.others:
                yield other.keys, {"shape": shape_in_words(other.shape)}, adapter.name
    except (RegraftError, OSError):
        return  # the findings that the page shows say what is wrong with it
