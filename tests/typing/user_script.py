"""What a user writes, for type checkers: `mypy` of `make lint` reads it, and nothing runs it.

Where a comment ignores an error, a checker that does not report it fails: unused comments are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import regraft


def convert_all(folder: Path) -> list[str]:
    names: list[str] = []
    for each in folder.iterdir():
        report = regraft.convert(each, folder / "out", to="transformers-v5", verify=True)
        assert_type(report, regraft.Report)
        names += [target.key for target in report.targets if not target.exact]
    return names


def look(src: str) -> None:
    found = regraft.inspect(src)
    if isinstance(found, regraft.Inspection):
        print(found.adapters[0].layout)
    elif isinstance(found, regraft.ImageFolder):
        print([each.family for each in found.files])
    checked = regraft.check(src, model="base", to="transformers-v4")
    print(checked.healthy, [verdict.causes for verdict in checked.verdicts])
    print(regraft.check(src, tool="vllm").fix)
    print(regraft.verify(src, "other").equal)
    plan = regraft.plan(src, to="vllm")
    if plan is not None:
        assert_type(plan, regraft.Plan)
        print(plan.result_shapes())
    layout: regraft.LayoutName = "transformers-v4"
    print(regraft.slices(src, to=layout, box=[(0, 1)]))


def train(model: object) -> None:
    model = regraft.load_adapter(model, "org/name", "mine", subfolder="best")
    regraft.save_adapter(model, "out", to="kohya", adapter="mine")
    callback = regraft.SaveInLayout("vllm", via="dense")
    print(callback.folder)


def mistakes(src: str) -> None:
    regraft.convrt(src, "out", to="vllm")  # type: ignore[attr-defined]
    regraft.convert(src, "out")  # type: ignore[call-arg]
    regraft.convert(src, "out", to="vllm", overwrit=True)  # type: ignore[call-arg]
    regraft.convert(src, "out", to=5)  # type: ignore[arg-type]
    print(regraft.inspect(src).laiout)  # type: ignore[union-attr]
    layout: regraft.LayoutName = "transfomers-v5"  # type: ignore[assignment]
    print(layout)
