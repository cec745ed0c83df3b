"""The page of the documentation that lists exit statuses and the codes of findings, from `regraft.errors`.

python scripts/errors_page.py       writes docs/errors.md
"""

from __future__ import annotations

from pathlib import Path

from regraft.errors import RegraftError
from regraft.errors.codes import Code, Part, Status

PAGE = Path(__file__).parents[1] / "docs/errors.md"

HEAD = """\
# Errors

Every problem is a `Finding` with a stable `code`. An error carries all findings of one run:

```python
>>> import regraft
>>> try:
...     regraft.convert("tests/golden/cases/mixtral__subset_regex", "out", to="transformers-v5")
... except regraft.RegraftError as error:
...     finding = error.findings[0]
>>> finding.code, finding.key
('unknown-size', 'model.layers.0.block_sparse_moe.experts.0.w1.weight')
>>> finding.fix
'give the base model with --model, with a config that says it'

```

`where` is the file or folder, `key` the tensor or the config's field, `rule` the line of the rule book
that was at work. The command prints findings on stderr, and with `--json` as one document on stdout.
Errors, exit statuses and codes are listed in `src/regraft/errors/`, from which
`scripts/errors_page.py` makes this page.

"""


def errors_page() -> str:
    """The page in Markdown."""
    text = HEAD + "| error | means | exit status |\n|---|---|---|\n"
    for error in RegraftError.__subclasses__():
        first = (error.__doc__ or "").strip().split("\n\n")[0].rstrip(".")
        text += f"| {error.__name__} | {first[0].lower()}{first[1:]} | {int(error.status)} |\n"
    text += "\n| exit status | means |\n|---|---|\n"
    text += "".join(f"| {int(status)} | {status.meaning} |\n" for status in Status)
    for part in Part:
        text += f"\n## {part.title}\n\n"
        text += f"{part.about}\n\n" if part.about else ""
        text += "| code | means | what to do | exit status |\n|---|---|---|---|\n"
        text += "".join(_line(code) for code in Code if code.part is part)
    return text


def _line(code: Code) -> str:
    means = f"{code.title}: {code.details}" if code.details else code.title
    return f"| `{code.value}` | {means} | {code.fix} | {int(code.status)} |\n"


if __name__ == "__main__":
    PAGE.write_text(errors_page(), encoding="utf-8")
