"""Slices and windows against the whole: every golden base, and equations that are hard to cut.

python benchmarks/check_slices.py

Every slice must be that part of the converted tensor, bit for bit, and each of its elements must be written once. Every
mesh's ranks must hold each element once. Prints how many were compared.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/planning")]

from making import plan_of, rule_book, same_bits  # noqa: E402
from slicing import boxes, cut, gathered, meshes  # noqa: E402
from test_slices import EQUATIONS, filled  # noqa: E402

from regraft.arrays.apply import apply_plan  # noqa: E402
from regraft.bridges.transformers.files import InstalledTransformers  # noqa: E402
from regraft.checkpoints.prepare import prepare  # noqa: E402
from regraft.planning.plan import Plan  # noqa: E402
from regraft.planning.slices import Slicer, region_of  # noqa: E402
from regraft.planning.windows import window  # noqa: E402
from regraft.storage.safetensors import open_tensors  # noqa: E402


def compare(name: str, plan: Plan, arrays: list) -> tuple[int, int]:
    """Compare slices and windows of every target; how many of each."""
    slicer, rng, slices, windows = Slicer.of(plan), random.Random(name), 0, 0
    whole = apply_plan(plan, arrays)
    assert slicer.made.keys() == whole.keys()
    for key, target in whole.items():
        for box in boxes(target.shape, f"{name} {key}"):
            want = cut(target, box)
            found = gathered(
                slicer.strips(key, region_of(box)), arrays, want.shape, want.dtype, name == "padded"
            )
            assert same_bits(found, want), (name, key, box)
            slices += 1
        for ranks in meshes(target.shape):
            times = np.zeros(target.shape, np.uint8)
            for box in ranks:
                cut(times, box)[...] += 1
            assert (times == 1).all(), (name, key, ranks)
        for _ in range(8):
            start, stop = sorted((rng.randint(0, target.size), rng.randint(0, target.size)))
            found = gathered(
                window(slicer, key, start, stop),
                arrays,
                stop - start,
                target.dtype,
                name == "padded",
            )
            assert same_bits(found, target.reshape(-1)[start:stop]), (name, key, start, stop)
            windows += 1
    print(f"  {name:30} {len(whole):4} targets, {slices:6} slices, {windows:5} windows")
    return slices, windows


def main() -> None:
    begun, total = time.perf_counter(), [0, 0]
    for base in sorted((ROOT / "tests/golden/bases").iterdir()):
        ready = prepare(base, "transformers-v5", foreign=InstalledTransformers())
        if ready.plan is None:
            continue
        tensors = {k: t for file in ready.source.files for k, t in open_tensors(file.path).items()}
        arrays = [tensors[name] for name in ready.source.tensors.names]
        for i, count in enumerate(compare(base.name, ready.plan, arrays)):
            total[i] += count
    for name, (text, shapes) in EQUATIONS.items():
        tensors = filled(shapes)
        for i, count in enumerate(
            compare(name, plan_of(rule_book(text), tensors), [*tensors.values()])
        ):
            total[i] += count
    seconds = time.perf_counter() - begun
    print(f"{total[0]} slices and {total[1]} windows are those of the whole, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
