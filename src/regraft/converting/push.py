"""Sending a result to the hub: the files, and the model card, carried and extended."""

from __future__ import annotations

import re
from pathlib import Path

import regraft
from regraft.report import Report
from regraft.storage.hub import parse_id
from regraft.storage.hub_network import push

CARD = "README.md"
_HEAD = "<!-- regraft -->"
_FRONT = re.compile(r"---\n(.*?)^---[ \t]*\n", re.S | re.M)


def push_result(repository: str, report: Report) -> str:
    """Upload what a conversion wrote; where it is then.

    Raises ``BadInputError``.
    """
    place = Path(report.destination)
    paths = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file()]
    root = place.parent if place.is_file() else place
    files: dict[str, Path | bytes] = {path.relative_to(root).as_posix(): path for path in paths}
    card = root / CARD
    text = card.read_text(encoding="utf-8") if CARD in files else ""
    files[CARD] = extended(text, report).encode()
    source, target = _layouts(report)
    return push(repository, files, f"Weights in the layout {target} (from {source}, by regraft)")


def extended(card: str, report: Report) -> str:
    """A model card with a section on where the weights are from; one that has such a section gets another."""
    source, target = _layouts(report)
    named = parse_id(report.source)
    origin = report.source if named is None or Path(report.source).exists() else named[0]
    front = _FRONT.match(card)
    fields, body = (front[1], card[front.end() :]) if front else ("", card)
    if origin != report.source or named is not None:
        if not re.search(r"^base_model\s*:", fields, re.M):
            fields += f"base_model: {origin}\n"
    else:
        origin = Path(origin).name
    body = body.partition(_HEAD)[0].rstrip()
    words = f"These are the weights of {origin} in the layout {target}"
    words += f", rearranged from {source}" if source != target else ""
    section = (
        f"{_HEAD}\n## Weight layout\n\n{words} by regraft {regraft.__version__}: "
        f"{'the very numbers' if _is_exact(report) else 'see the notes below'}.\n"
    )
    notes = "".join(f"- {note}\n" for note in report.notes)
    if notes:
        section += f"\n{notes}"
    head = f"---\n{fields}---\n" if fields else ""
    return head + (f"{body}\n\n" if body else "") + section


def _layouts(report: Report) -> tuple[str, str]:
    made = report.checkpoint or next(iter(report.adapters), None)
    return ("", "") if made is None else (made.source_layout, made.target_layout)


def _is_exact(report: Report) -> bool:
    if report.checkpoint is not None:
        return not report.checkpoint.casts
    return all(target.exact for target in report.targets)
