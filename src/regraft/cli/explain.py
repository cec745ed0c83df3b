"""`regraft explain`: the way of one tensor, or why it goes nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.options import ExplainOptions

if TYPE_CHECKING:
    from regraft.cli.styled import Text
    from regraft.explaining.explanation import End, Explanation

_PIECES = 8


@click.command(cls=options.WithArguments)
@options.src
@options.argument(
    "key",
    "A tensor's name in SRC, the base's tensor that it is about, or a name of the result.",
    metavar="KEY",
)
@options.from_class(ExplainOptions)
@options.beyond
@options.html
@options.json
@options.quiet
def explain(
    src: Path,
    key: str,
    *,
    html: Path | None,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Explain where one tensor goes, and by which rule.

    Where it goes nowhere, show which names and rules come close.

    Exit status: 0 it arrives, 1 SRC cannot be read, 2 usage, 4 it does not arrive.
    """
    asked = ExplainOptions(**given)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.cli.pages import failure_page
        from regraft.explaining.explain import explain

        with options.told(asked.rules, asked.architecture), failure_page(html, "explain", src):
            found = explain(src, key, **asked.values())
        return tell(out, found, html, src)

    return job


_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"


def show_explanation(out: Output, found: Explanation) -> None:
    """The way of one key, drawn from top to bottom."""
    from regraft.cli.styled import Text
    from regraft.cli.words import show_problem

    layouts = f"{found.source_layout or 'unknown'} -> {found.target_layout}"
    out.show(Text.assemble((visible(found.key), _NAME), f": {found.kind}, {layouts}"))
    for line in found.evidence:
        out.show(Text(f"  {visible(line)}", _FAINT))
    for line in found.steps:
        out.show(Text(f"  {visible(line)}"))
    out.show(Text())
    if found.fate == "moved":
        _show_moved(out, found)
    elif found.fate == "carried":
        out.show(
            Text.assemble("unchanged: ", (visible(found.why or ""), _GOOD), f" ({found.where})"),
            Text(f"  {visible(found.equation or '')}", _FAINT),
        )
    elif found.fate == "there":
        out.show(Text(visible(found.why or ""), _GOOD))
    else:
        out.show(Text("it goes nowhere: no rule matches it", _BAD))
    _show_near(out, found)
    for finding in found.problems:
        show_problem(out, finding)


def _show_moved(out: Output, found: Explanation) -> None:
    from regraft.cli.styled import Text

    for end in found.sources:
        out.show(_end(end))
    rule = Text.assemble("  | ", (visible(found.rule or ""), _NAME), f" ({found.where})")
    out.show(Text("  |"), rule)
    for line in (found.equation or "").splitlines():
        out.show(Text(f"  |   {visible(line)}", _FAINT))
    values = {**found.values, **{f"size of {k}": v for k, v in found.sizes.items()}}
    if values:
        told = ", ".join(f"{name} = {value}" for name, value in values.items() if value != "")
        out.show(Text(f"  | {visible(told)}"))
    out.show(Text("  v"))
    for end in found.targets:
        out.show(_end(end))
    if found.pieces:
        out.show(Text())
    for piece in found.pieces[:_PIECES]:
        out.show(
            Text.assemble(
                visible(piece.source),
                (f"[{', '.join(piece.source_place)}]", _FAINT),
                "  ->  ",
                visible(piece.target),
                (f"[{', '.join(piece.target_place)}]", _GOOD),
            )
        )
    if len(found.pieces) > _PIECES:
        more = len(found.pieces) - _PIECES
        out.show(Text(f"... and {more} more pieces; --json lists them all", _WARNING))
    for rule_name in found.passed:
        out.show(Text(f"it also fits {visible(rule_name)}, which is less close", _FAINT))


def _end(end: End) -> Text:
    from regraft.cli.styled import Text

    shape = "" if end.shape is None else f"  [{', '.join(map(str, end.shape))}]"
    count = f"  x {end.count}" if end.count > 1 else ""
    absent = f", {end.absent} of them absent" if end.absent else ""
    keys = ", ".join(map(visible, end.keys))
    return Text.assemble((keys, _NAME if end.mine else ""), f"{shape}{count}{absent}  {end.kind}")


def _show_near(out: Output, found: Explanation) -> None:
    from regraft.cli.styled import Text

    if found.near:
        out.show(Text(), Text("Rules that come close:"))
    for near in found.near:
        template = near.template
        out.show(
            Text(f"  {visible(template)}"),
            Text.assemble(f"    {visible(near.why)}", (f"  {near.rule} ({near.where})", _FAINT)),
        )
    if found.closest:
        out.show(Text(), Text("Names that are spelled alike:"))
        out.show(*(Text(f"  {visible(name)}") for name in found.closest))
