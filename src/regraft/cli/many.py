"""Many sources on one command line: each by itself, with its own base and its own verdict, and a table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Indented, Table, Text
from regraft.cli.words import BAD, FAINT, GOOD, NAME, WARNING, explain_codes, show_findings
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.errors.codes import Status
from regraft.report import count_in_words
from regraft.views.outcome import SourceOutcome, failure

if TYPE_CHECKING:
    from regraft.sources.resolve import Item

_LOADS = 20
_COLORS = {
    "converted": GOOD,
    "healthy": GOOD,
    "equal": GOOD,
    "unchanged": FAINT,
    "skipped": FAINT,
    "refused": WARNING,
}
_WHY = 100
_SHOWN = 3
"""How many folders that were not looked into are named."""


def run_many(
    out: Output,
    items: Sequence[Item],
    work: Callable[[Item], SourceOutcome],
    *,
    jobs: int = 1,
    fail_fast: bool = False,
    told: Callable[[Sequence[SourceOutcome]], None] | None = None,
    passes: Callable[[SourceOutcome], bool] = lambda outcome: outcome.good,
    bad: Status = Status.BAD_INPUT,
    resumes: bool = False,
) -> int:
    """Do some work for each source; what fails does not keep the others from it, unless ``fail_fast``.

    With ``--json`` each outcome is a line of its own, as soon as it is there; ``told`` gets all of them. The exit
    status is 0 where all pass, which is where all went well, 1 where a source gave an error, and ``bad`` otherwise.
    ``resumes`` says that --resume goes on with what is left.
    """
    done: list[SourceOutcome] = []
    try:
        for outcome in _outcomes(items, work, jobs):
            done.append(outcome)
            if out.json:
                out.line(outcome.to_dict())
            elif not out.quiet:
                out.show(_line(outcome))
            if outcome.error is not None and not out.json:
                title = f"{outcome.name}: {outcome.verdict}"
                show_findings(out, title, outcome.error.findings, more=False)
            if fail_fast and not passes(outcome):
                break
    except BaseException as error:
        if resumes and done:
            words = f"{len(done)} of {count_in_words(len(items), 'source')} are done"
            error.add_note(f"{words}; the same command with --resume goes on with the others")
        raise
    if not out.json and not out.quiet:
        _show_table(out, done, len(items))
        if resumes and any(map(passes, done)) and not all(map(passes, done)):
            out.show(
                Text("The same command with --resume tries those again that failed, and no others.")
            )
        wrong = [each for one in done if one.error is not None for each in one.error.findings]
        out.show(*explain_codes(wrong))
    if told is not None:
        told(done)
    if any(outcome.error is not None for outcome in done):
        return Status.BAD_INPUT
    return Status.DONE if all(map(passes, done)) else bad


def _outcomes(
    items: Sequence[Item], work: Callable[[Item], SourceOutcome], jobs: int
) -> Iterator[SourceOutcome]:
    def guarded(item: Item) -> SourceOutcome:
        try:
            return work(item)
        except RegraftError as error:
            return failure(item.name, item.path, error)
        except OSError as error:
            finding = Finding("system", error.strerror or str(error), where=str(item.path))
            return failure(item.name, item.path, BadInputError(finding))

    if jobs == 1:
        yield from map(guarded, items)
        return
    # What --rules, --from and --architecture say belongs to the context of this thread.
    with ThreadPoolExecutor(jobs, "regraft-source") as pool:
        waiting = [pool.submit(copy_context().run, guarded, item) for item in items]
        try:
            for one in waiting:
                yield one.result()
        finally:
            for one in waiting:
                one.cancel()


def _line(outcome: SourceOutcome) -> Text:
    color = _COLORS.get(outcome.verdict, BAD)
    text = Text.assemble((visible(outcome.name), NAME), ": ", (outcome.verdict, color))
    if outcome.good and outcome.why:
        text.append(f", {visible(outcome.why)}")
    return text


def _show_table(out: Output, done: Sequence[SourceOutcome], asked: int) -> None:
    titles = ("source", "result", "why")
    table = Table(*(Column(title, wrapped=True, style=FAINT) for title in titles))
    for outcome in done:
        verdict = Text(outcome.verdict, _COLORS.get(outcome.verdict, BAD))
        why = outcome.why if out.is_unbounded else _short(outcome.why)
        table.add_row(visible(outcome.name), verdict, visible(why))
    counts = Counter(outcome.verdict for outcome in done)
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    left = f", {asked - len(done)} not tried (--fail-fast)" if len(done) < asked else ""
    out.show(Text(), table, Text(), Text(f"{count_in_words(asked, 'source')}: {words}{left}"))
    hints = [outcome for outcome in done if outcome.load]
    for outcome in hints[:_LOADS]:
        out.show(Text.assemble((visible(outcome.name), NAME), f": {outcome.load}"))
    if len(hints) > _LOADS:
        out.show(Text(f"… and {len(hints) - _LOADS} more", FAINT))
    lines = list(_fixes(done))
    if lines:
        out.show(Text("Fix:", GOOD))
    for line in lines[:_LOADS]:
        out.show(Indented(line))
    if len(lines) > _LOADS:
        out.show(Text(f"… and {len(lines) - _LOADS} more: --json names them all", FAINT))


def _fixes(done: Iterable[SourceOutcome]) -> Iterator[Text]:
    """What to do for each source that is not well: first all commands, which are copied, then the rest in words."""
    for outcome in done:
        for command in outcome.fix:
            yield Text(visible(command), NAME)
    for outcome in done:
        if outcome.hint:
            yield Text.assemble((visible(outcome.name), NAME), f": {visible(outcome.hint)}")


def _short(why: str) -> str:
    """A reason that fits a table; all of it stands above, or in --json.

    >>> _short("a word " * 30)[-8:]
    'word a …'
    """
    return why if len(why) <= _WHY else why[:_WHY].rpartition(" ")[0] + " …"


def warn_of_rest(out: Output, sources: Iterable[Path], deeper: Sequence[Path]) -> None:
    """Say what of the folders is neither converted nor copied."""
    if out.quiet:
        return
    links = [path for path in deeper if path.is_symlink()]
    for paths, why in (
        ([path for path in deeper if path not in links], "they are deep inside"),
        (
            links,
            "links to folders are not followed (name them to convert or check what they lead to)",
        ),
    ):
        if paths:
            shown = ", ".join(visible(str(path)) for path in paths[:_SHOWN])
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            out.warn(f"Not looked into, because {why}: {shown}{more}\n")
    for folder in sources:
        if not folder.is_dir():
            continue
        beside = sorted(path.name for path in folder.iterdir() if path.is_file())
        beside = [name for name in beside if Path(name).suffix in (".json", ".md", ".txt")]
        if beside:
            out.warn(f"Not copied from {visible(str(folder))}: {', '.join(map(visible, beside))}\n")
