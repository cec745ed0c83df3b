"""`regraft verify`: whether two checkpoints or adapters are equivalent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import VerifyOptions

if TYPE_CHECKING:
    from regraft.cli.progress import Mode


@click.command(cls=options.WithArguments)
@options.argument(
    "src", "A checkpoint or an adapter: a folder or a file.", metavar="SRC", type=options.PLACE
)
@options.argument(
    "dst", "The same in another layout, or in this one.", metavar="DST", type=options.PLACE
)
@options.from_class(VerifyOptions)
@options.beyond
@options.html
@options.json
@options.quiet
@options.progress
def verify(
    src: Path,
    dst: Path,
    *,
    html: Path | None,
    json: bool,
    quiet: bool,
    progress: Mode,
    **given: Any,
) -> Job:
    """Check that two checkpoints or adapters are equivalent.

    Each may be in a layout of its own. Checkpoints are compared bit for bit. Of adapters, what every target adds to
    its base is compared in float64, entry by entry.

    Exit status: 0 they are equal, 1 one of them is wrong in itself, 2 usage, 4 they are not equal.
    """
    asked = VerifyOptions(**given)
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        from regraft.checking.verify import verify
        from regraft.cli.forms import tell
        from regraft.cli.pages import failure_page

        with (
            options.told(asked.rules, asked.architecture),
            failure_page(html, "verify", src),
            out.waiting("comparing", src) as progressed,
        ):
            result = verify(src, dst, **asked.values(), progress=progressed)
        return tell(out, result, html, src, dst)

    return job
