"""Writes docs/families.md from what the families declare.

python scripts/families_page.py          write it
python scripts/families_page.py --check  fail where it is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from regraft.adapters.families.base import BASE, DENSE, FAMILY, LORA, NONE, OPERATIONS, Cell
from regraft.adapters.families.table import all_families

PAGE = Path(__file__).parents[1] / "docs/families.md"

SIGNS = {FAMILY: "E", LORA: "L", BASE: "B", DENSE: "D", NONE: "–"}

HEAD = """\
# Families

What becomes of an adapter depends on its family and on what a layout does to the weights that it stands on.
This page is written by `scripts/families_page.py` from what the code declares, and the declarations are
checked by merging with PEFT's own layers, before and after, for every family and every operation.

| sign | the adapter goes on | |
|---|---|---|
| E | in its family | by itself |
| L | as a LoRA with the same delta | by itself |
| B | as a LoRA with the same delta, made with the base's weights | if `--model` has them |
| D | as a LoRA of full rank with the same delta | with `--via dense`; families that multiply take the base's weights |
| – | not at all | merge it into its base |

`E/L` means: in its family under the condition that stands below, otherwise as LoRA. An adapter is of one
family, so the lowest rung that one of its modules needs is that of all. Plain LoRA is E everywhere.

"""


def sign(cell: Cell) -> str:
    """A cell of the table."""
    return SIGNS[cell.rung] if cell.better is None else f"{SIGNS[cell.better]}/{SIGNS[cell.rung]}"


def page() -> str:
    """The whole page."""
    lines = [
        f"| family | {' | '.join(OPERATIONS)} |",
        f"|---|{'---|' * len(OPERATIONS)}",
    ]
    conditions: list[str] = []
    for family in all_families():
        signs = " | ".join(sign(family.cell(operation)) for operation in OPERATIONS)
        lines.append(f"| {family.title} | {signs} |")
        by_condition: dict[str, list[str]] = {}
        for operation in OPERATIONS:
            cell = family.cell(operation)
            if cell.better is not None:
                by_condition.setdefault(cell.when, []).append(operation)
        told = "; ".join(f"{', '.join(ops)}: {when}" for when, ops in by_condition.items())
        if told:
            conditions.append(f"- **{family.title}** {told}")
    formulas = ["| family | `peft_type` | makes of W | rank of the delta |", "|---|---|---|---|"]
    for family in all_families():
        kind = ", ".join(f"`{name}`" for name in family.types)
        formulas.append(f"| {family.title} | {kind} | {family.formula} | {family.rank or 'full'} |")
    return "\n".join(
        [
            HEAD + "\n".join(lines),
            "",
            "## Conditions",
            "",
            *conditions,
            "",
            "## What they are",
            "",
            *formulas,
            "",
            "Prompt tuning, P-tuning, prefix tuning and their kin are bound to no weight and are carried over. LN",
            "tuning, `modules_to_save` and trained biases are weights of the base, and move as such. X-LoRA's",
            "classifier, Shadow, and UniLoRA without its indices go by the order of the base's modules; they are",
            "carried over where the layout leaves the modules as they are, and refused otherwise.",
            "",
        ]
    )


def main() -> int:
    """Write the page, or compare."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
