"""Start a family of adapters: a module that works, and its test by the public conformance kit.

python scripts/new_family.py mylora --out src/regraft/adapters/families   # then its own formula
"""

from __future__ import annotations

import argparse
from pathlib import Path

from new_dialect import write

MODULE = '''"""{title}: what it adds to a weight, and where that is known from (a release of PEFT and a file)."""

from __future__ import annotations

from typing import Any, ClassVar

from regraft.adapters.families.base import FAMILY, IN, LORA, OUT, RANK, Part, as_wide, cells, narrowed
from regraft.adapters.families.low_rank import LowRank
from regraft.adapters.form import Array


class {title}(LowRank):
    """``s * B A``: replace this by the family's own formula."""

    types = ("{upper}",)
    """What ``peft_type`` says in adapter_config.json."""
    title = "{title}"
    prefix = "{name}_"
    roles: ClassVar = {{"{name}_A": (RANK, IN), "{name}_B": (OUT, RANK)}}
    """Its tensors of a module, each with the axes of its dimensions."""
    formula = "W + 2 B A"
    rank = "r"
    """The config's field with the rank."""
    table = cells(stack=LORA, rest=FAMILY)
    """What becomes of it under each operation: it stays what it is, becomes LoRA, or cannot follow."""

    def lora(self, part: Part, weight: Any) -> tuple[Array, Array]:
        """The factors A and B whose product is what it adds."""
        a, b = as_wide(part["{name}_A"], part["{name}_B"])
        return narrowed(a, part["{name}_A"]), narrowed(2 * b, part["{name}_B"])
'''

TEST = '''"""{title} follows rows, columns, transposes and joints exactly."""

import numpy as np
from {package}{name} import {title}

from regraft.adapters.families.base import Part
from regraft.testing import check_family


def made(random, out=6, into=4, rank=2):
    shapes = {{"{name}_A": (rank, into), "{name}_B": (out, rank)}}
    tensors = {{
        role: random.standard_normal(shape).astype(np.float32) for role, shape in shapes.items()
    }}
    return Part(tensors, out, into)


def test_the_conformance_kit():
    random = np.random.default_rng(0)
    follows = check_family({title}({{}}, {{}}), [made(random), made(random)])
    assert follows == ["take", "turn", "join out", "join in"]
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="a module's name, such as mylora")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder to write to")
    given = parser.parse_args()
    write(given.name, given.out, MODULE, TEST)


if __name__ == "__main__":
    main()
