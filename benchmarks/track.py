"""The ratios of the quick benchmarks beside those that are kept in ratios.json: has something become slower?

python benchmarks/track.py [--out build/benchmarks]   # exit status 1 where a ratio is worse by more than a quarter
python benchmarks/track.py --write                     # keep what is measured now

Ratios of one run hardly differ between machines; seconds do, so only ratios are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
KEPT = FOLDER / "ratios.json"
TRACKED = ("bench_adapter", "bench_dialects", "bench_plan")
SLACK = 1.25


def measure(name: str, out: Path) -> dict[str, tuple[float, str]]:
    """The medians of a benchmark's ratios, each with its goal."""
    figures = out / f"{name}.json"
    subprocess.run([sys.executable, FOLDER / f"{name}.py", "--json", figures], check=True)
    ratios = json.loads(figures.read_text("utf-8"))["ratios"]
    return {f"{name}: {each['name']}": (each["median"], each["goal"]) for each in ratios}


def is_worse(now: float, kept: float, goal: str) -> bool:
    """Whether a ratio is worse than the one that is kept; the goal says which way is better."""
    return now * SLACK < kept if goal.startswith(">") else now > kept * SLACK


def main() -> int:
    """Measure, show and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {key: ratio for name in TRACKED for key, ratio in measure(name, asked.out).items()}
    if asked.write:
        medians = {key: round(median, 3) for key, (median, _) in found.items()}
        KEPT.write_text(json.dumps(medians, indent=1) + "\n", "utf-8")
        return 0
    kept = json.loads(KEPT.read_text("utf-8"))
    rows = ["| ratio | now | kept | goal | |", "|---|---|---|---|---|"]
    slower = []
    for key, (now, goal) in found.items():
        before = kept.get(key)
        worse = before is not None and is_worse(now, before, goal)
        slower += [key] * worse
        shown = "new" if before is None else f"{before:.2f}"
        rows.append(f"| {key} | {now:.2f} | {shown} | {goal} | {'worse' if worse else ''} |")
    rows += [f"| {key} | | {kept[key]:.2f} | | gone |" for key in kept.keys() - found.keys()]
    text = "\n".join(rows) + "\n"
    (asked.out / "summary.md").write_text(text, "utf-8")
    print(text)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
