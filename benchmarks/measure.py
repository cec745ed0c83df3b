"""What the benchmarks share: alternating runs on one thread, statistics, and the printed table."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("regraft", "numpy", "torch", "transformers", "peft")

Clock = Callable[[], float]


def use_one_thread() -> None:
    """Keep numpy and torch on one thread; to be called before they are imported."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is timed: its name and what it does."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of two contenders' times, and the bound that the ratio of medians should keep."""

    over: str
    under: str
    at_least: float = 0.0
    at_most: float = math.inf

    def reached(self, ratio: float) -> bool:
        """Whether a ratio keeps the bounds."""
        return self.at_least <= ratio <= self.at_most

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least else f"<= {self.at_most:g}"


def alternate(
    contenders: Sequence[Contender],
    rounds: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run, by name. Each round runs every contender once, in an order of its own.

    A result is dropped, and the garbage collected, before the next run starts. The collector stays
    on while the clock runs, as it does for users.
    """
    shuffled = random.Random(seed)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run()
    for _ in range(rounds):
        order = list(contenders)
        shuffled.shuffle(order)
        for contender in order:
            gc.collect()
            start = clock()
            result = contender.run()
            seconds[contender.name].append(clock() - start)
            del result
    return seconds


def parse_arguments(description: str, rounds: int) -> argparse.Namespace:
    """The arguments every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def report(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    goals: Sequence[Goal],
    facts: Mapping[str, Any],
    file: Path | None,
) -> None:
    """Print the figures, and write them to a file where one is given.

    Of ratios, the median is that of the medians; the least and the greatest are of one round.
    """
    print(title)
    for name, fact in facts.items():
        print(f"  {name}: {fact}")
    rows = [["milliseconds", "min", "median", "max", "runs", ""]]
    for name, values in seconds.items():
        spread = min(values), statistics.median(values), max(values)
        rows.append([name, *(f"{1000 * value:.1f}" for value in spread), str(len(values)), ""])
    rows.append([""] * 6)
    rows.append(["times as long", "min", "median", "max", "goal", ""])
    ratios = []
    for goal in goals:
        over, under = seconds[goal.over], seconds[goal.under]
        each = [x / y for x, y in zip(over, under, strict=True)]
        ratio = statistics.median(over) / statistics.median(under)
        verdict = "reached" if goal.reached(ratio) else "missed"
        name = f"{goal.over} / {goal.under}"
        spread = min(each), ratio, max(each)
        rows.append([name, *(f"{value:.2f}" for value in spread), str(goal), verdict])
        ratios.append({"name": name, "median": ratio, "each": each, "goal": str(goal)})
    _print_table(rows)
    if file is not None:
        data = {
            "title": title,
            "facts": dict(facts),
            "machine": _machine(),
            "seconds": {name: list(values) for name, values in seconds.items()},
            "ratios": ratios,
        }
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def _machine() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}
