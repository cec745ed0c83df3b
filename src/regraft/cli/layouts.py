"""`regraft layouts`: the names that --to and --from take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import CheckOptions

if TYPE_CHECKING:
    from regraft.layouts.catalog import Catalog


@click.command(cls=options.WithArguments)
@options.from_field(CheckOptions, "rules")
@options.json
@options.quiet
def layouts(rules: tuple[str, ...], *, json: bool, quiet: bool) -> Job:
    """List the names that --to and --from take.

    NAME[/VERSION] is a layout, or a dialect in its usual layout; LAYOUT:DIALECT[/VERSION] says both. For a checkpoint
    a name is a layout; for an adapter it is a dialect if there is one of that name, else that layout as PEFT. --from
    also takes a family, where SRC itself doesn't say what model it is of.
    """
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.dialects.names import dialect_names
        from regraft.layouts.catalog import catalog

        with options.own_books(rules):
            found = catalog(dialect_names())
        return tell(out, found)

    return job


def show_catalog(out: Output, found: Catalog) -> None:
    """All names, one a row."""
    from regraft.cli.styled import Column, Table

    rows = [
        ("layout", each.name, f"adapters: {each.adapters}; to {', '.join(each.leads_to)}")
        for each in found.layouts
    ]
    for dialect in found.dialects:
        versions = f" ({', '.join(f'/{v}' for v in dialect.versions)})" if dialect.versions else ""
        rows.append(("dialect", dialect.name, dialect.title + versions))
    rows.append(("families", "", ", ".join(each.name for each in found.families)))
    table = Table(*(Column("", wrapped=True) for _ in range(3)), header=False)
    for kind, name, more in rows:
        table.add_row(kind, name, more)
    out.show(table)
