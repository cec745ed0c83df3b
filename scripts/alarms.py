"""The false alarms and the false healthies of `regraft check`, over a list of adapters and checkpoints.

    python scripts/alarms.py EXPECTED.jsonl [--slowest 5]

Each line of the list is ``{"group": NAME, "path": PATH, "model": PATH or null, "right": true or false}``: whether the
installed transformers and PEFT load it rightly as it is, which was found by loading it. A false alarm is one that loads
rightly and is called unhealthy, a false healthy one that does not and is called healthy; of some, check says that it
cannot tell. Exit 1 where there is a false one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("right, healthy", (True, True)),
    ("wrong, unhealthy", (False, False)),
    ("false alarms", (True, False)),
    ("false healthies", (False, True)),
    ("right, not told", (True, None)),
    ("wrong, not told", (False, None)),
)


@dataclass(frozen=True)
class Row:
    """What check said of one."""

    group: str
    path: str
    right: bool
    healthy: bool | None
    seconds: float
    why: str


def judge(line: dict[str, Any], peft: Any) -> Row:
    """Check one."""
    import regraft

    begun = time.perf_counter()
    healthy: bool | None
    try:
        told = regraft.check(line["path"], model=line["model"], peft=peft)
        each = [verdict.healthy for verdict in told.verdicts]
        healthy = False if False in each else None if None in each else True
        why = "; ".join(text for v in told.verdicts for text in [*v.causes, *map(str, v.findings)])
    except regraft.RegraftError as error:
        healthy, why = False, str(error)
    spent = time.perf_counter() - begun
    return Row(line["group"], line["path"], line["right"], healthy, spent, why[:200])


def show(rows: list[Row], slowest: int) -> str:
    """The table, the false ones, and the slowest."""
    names = [name for name, _ in COLUMNS]
    lines = [f"| group | checked | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    counts: defaultdict[str, Counter[tuple[bool, bool | None]]] = defaultdict(Counter)
    for row in rows:
        counts[row.group][row.right, row.healthy] += 1
        counts["all"][row.right, row.healthy] += 1
    for group in [*(g for g in counts if g != "all"), "all"]:
        told = counts[group]
        cells = " | ".join(str(told[kind]) for _, kind in COLUMNS)
        lines.append(f"| {group} | {told.total()} | {cells} |")
    lines.append("")
    for row in rows:
        if row.healthy is not None and row.healthy != row.right:
            kind = "false alarm" if row.right else "false healthy"
            lines.append(f"{kind}: {row.path}: {row.why}")
    for row in sorted(rows, key=lambda r: -r.seconds)[:slowest]:
        lines.append(f"{row.seconds:.1f} s: {row.path}")
    return "\n".join(lines)


def main() -> int:
    """1 where a verdict is false."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("expected", type=Path)
    parser.add_argument("--slowest", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    from regraft.bridges.peft.trial import StockPeft

    peft = StockPeft()
    rows = []
    for text in options.expected.read_text().splitlines():
        rows.append(judge(json.loads(text), peft))
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(show(rows, options.slowest))
    return int(any(row.healthy is not None and row.healthy != row.right for row in rows))


if __name__ == "__main__":
    sys.exit(main())
